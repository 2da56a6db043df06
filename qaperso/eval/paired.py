"""The same query asked by everybody: do replies differ between queriers more than between two draws for one? (Ours.)"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Collection, Sequence
from typing import Any

import numpy as np
from sacrebleu.metrics import CHRF

from qaperso.data.store import Store, evenly
from qaperso.eval.awareness import rename
from qaperso.eval.identify import trained, without_names
from qaperso.eval.intervals import LEVEL, absent, bootstrap
from qaperso.generate import Sampling
from qaperso.types import Dialogue, Turn

# Dialogues, querier rows and samplings to replies, as `reply.replies` with its model.
Generate = Callable[[Sequence[Dialogue], Sequence[int], Sequence[Sampling]], Sequence[str]]

# What replies are drawn at where the run's own temperature is 0: greedy replies to one querier do not differ.
TEMPERATURE = 0.7
NAMES = ("paired_between", "paired_within", "paired_gap", "paired_agreement", "paired_agreement_chance")
# With beta = 1 the two texts of a score may change places.
_CHRF = CHRF(beta=1)


@dataclasses.dataclass(frozen=True)
class Asked:
    """One query and what was replied to each querier.

    Attributes:
      dialogue: the query and the true reply, without what went before.
      queriers: Q names; the first is who asked it in the data.
      replies: Q x d texts, d draws each.
    """

    dialogue: Dialogue
    queriers: tuple[str, ...]
    replies: tuple[tuple[str, ...], ...]


def choose(
    store: Store, indices: Sequence[int] | np.ndarray, count: int, queriers: int, seed: int
) -> list[tuple[int, Dialogue, tuple[str, ...]]]:
    """Queries and as whom to ask them.

    Args:
      store, indices: the dialogues whose last query may be asked: those of a querier whom the responder answers in
        training, beside somebody else.
      count: how many of them at most, evenly spread.
      queriers: of each query, at most: who asked it, and others of the responder's in training, drawn by `seed`.
      seed: any integer from 0.

    Returns:
      Of each query its index, the dialogue without what went before, and the names, the true one first.
    """
    known = trained(store)
    usable = []
    for index in map(int, indices):
        d = store.dialogues[index]
        people = known.get(d.responder, {})
        if d.query and d.querier in people and len(people) > 1:
            usable.append(index)
    found = []
    for place in evenly(len(usable), count):
        index = usable[place]
        d = store.dialogues[index]
        alone = dataclasses.replace(d, turns=(Turn(d.querier, d.query), Turn(d.responder, d.reply)), replies=())
        others = sorted(known[d.responder].keys() - {d.querier})
        picks = np.random.default_rng([seed, index]).permutation(len(others))[: queriers - 1]
        found.append((index, alone, (d.querier, *(others[i] for i in picks))))
    return found


def ask(
    generate: Generate,
    fits: Callable[[Dialogue], bool],
    store: Store,
    indices: Sequence[int] | np.ndarray,
    count: int,
    how: Sampling,
    queriers: int = 8,
    draws: int = 2,
    seed: int = 0,
) -> list[Asked]:
    """Puts the same queries to a responder as several of its queriers.

    The prompt is the query alone: what went before would be another querier's talk. Its words stay, name and row change.
    Every draw has a seed of its own, so that replies to two queriers are as independent as two replies to one: for a
    model that ignores the querier both are equally far apart on average. The seed depends on the query, the querier and
    the draw, not on what else is asked.

    Args:
      generate: writes the replies.
      fits: whether a prompt can be read; a query whose prompt cannot, for any of its queriers, is left out.
      store, indices, count, queriers, seed: see `choose`.
      how: replies are drawn like this, but at TEMPERATURE where its temperature is 0.
      draws: replies to each querier, at least 2.
    """
    how = dataclasses.replace(how, temperature=how.temperature or TEMPERATURE)
    asked, prompts, rows, samplings = [], [], [], []
    for index, dialogue, people in choose(store, indices, count, queriers, seed):
        renamed = [rename(dialogue, name) for name in people]
        if not all(map(fits, renamed)):
            continue
        asked.append((dialogue, people))
        for one, draw in itertools.product(renamed, range(draws)):
            row = store.registry.row(one.querier)
            own = np.random.SeedSequence([seed, index, row, draw]).generate_state(1).item()
            prompts.append(one)
            rows.append(row)
            samplings.append(dataclasses.replace(how, seed=own))
    written = iter(generate(prompts, rows, samplings) if prompts else ())
    return [Asked(d, people, tuple(tuple(itertools.islice(written, draws)) for _ in people)) for d, people in asked]


@functools.lru_cache(maxsize=1 << 16)
def distance(a: str, b: str) -> float:
    """1 - chrF (Popović, 2015) of characters up to 6 in a row with precision and recall weighing the same: symmetric, 0
    for equal texts, 1 where nothing is shared."""
    return 0.0 if a == b else 1 - _CHRF.sentence_score(a, [b]).score / 100


def measure(asked: Asked, hidden: Collection[str]) -> dict[str, float]:
    """Mean distances of two replies to different queriers and to one, and agreement, of one query; see `metrics`."""
    texts = [[without_names(text, hidden).strip() for text in replies] for replies in asked.replies]
    truth = without_names(asked.dialogue.reply, hidden).strip()
    apart: dict[bool, list[float]] = {True: [], False: []}
    for (i, a), (j, b) in itertools.combinations([(i, t) for i, replies in enumerate(texts) for t in replies], 2):
        apart[i == j].append(distance(a, b))
    agreed = []
    for replies in zip(*texts, strict=True):
        far = [distance(text, truth) for text in replies]
        # Of several that are as near one is picked.
        agreed.append((far[0] == min(far)) / far.count(min(far)))
    between, within = np.mean(apart[False]), np.mean(apart[True])
    values = between, within, between - within, np.mean(agreed), 1 / len(texts)
    return {name: float(value) for name, value in zip(NAMES, values, strict=True)}


def metrics(answers: Sequence[Asked], hidden: Collection[str], level: float = LEVEL) -> dict[str, dict[str, Any]]:
    """What changes in replies with who asks, all else being equal; means over queries, whose groups are resampled.

    Args:
      answers: from `ask`.
      hidden: from `identify.names`: saying somebody's name makes no difference here; a form of address does.
      level: of the intervals.

    Returns:
      paired_between, paired_within: mean `distance` of two replies to different queriers, and to one.
      paired_gap: the first minus the second; 0 for a model that ignores the querier, and above 0 also for one that
        tells queriers apart and answers each as somebody else.
      paired_agreement: how often, of one draw for each querier, the one for the true querier is nearest to the true
        reply; where several are equally near, one over their number.
      paired_agreement_chance: of a guess, 1 / number of queriers.

      All have no value but a note where nothing was asked or all replies are empty.
    """
    texts = [text for asked in answers for replies in asked.replies for text in replies]
    if not any(text.strip() for text in texts):
        nobody = "no query of somebody whom a responder answers in training beside somebody else"
        return dict.fromkeys(NAMES, absent(f"all {len(texts)} replies are empty" if texts else nobody))
    found = [measure(asked, hidden) for asked in answers]
    groups = [asked.dialogue.group for asked in answers]
    ones = np.ones(len(found))
    return {name: bootstrap(np.array([f[name] for f in found]), ones, groups, level=level) for name in NAMES}
