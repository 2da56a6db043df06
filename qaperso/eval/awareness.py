"""Does the model know who is asking? The true reply is scored again with that knowledge taken away, swapped or renamed.

All measures are ours. `gaps` gets the likelihoods from a function, so that it can be checked with models whose
knowledge is known; `measure` gives it a run's.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
import scipy.sparse

from qaperso import generate
from qaperso.data import features
from qaperso.data.batches import make_examples
from qaperso.data.store import STRANGER_NAME, Store
from qaperso.data.text import MASKED, Encoded
from qaperso.errors import UserError
from qaperso.eval.intervals import LEVEL, bootstrap, macro
from qaperso.eval.scores import reply_nll
from qaperso.run import Run
from qaperso.types import QUERIER, RESPONDER, STRANGER, Dialogue, Example, Turn

Tree = Any

# Random other queriers that are drawn for each reply.
DRAWS = 3
# What each gap compares with the true querier; several conditions are averaged.
GAPS = {
    "gap_random": tuple(f"random_{k}" for k in range(DRAWS)),
    "gap_nearest": ("nearest",),
    "gap_masked": ("masked",),
    "gap_renamed": ("renamed",),
    "gap_row": ("row",),
    "gap_name": ("name",),
}
# Those that need somebody else to ask.
SWAPS = ("gap_random", "gap_nearest", "gap_row", "gap_name")
_SYLLABLES = ("ka", "lo", "mi", "ru", "ve")


@dataclasses.dataclass(frozen=True)
class Asked:
    """A true reply to be scored, and who is said to have asked for it.

    Attributes:
      index: place of the true dialogue in the store.
      dialogue: the same words under the names that are told. What a method knows by names (a profile, a history) goes
        with them.
      row: the querier row that is told.
      masked: whether speakers are called "user" and "assistant" instead.
      past: the same words asked by somebody else, whose history alone is told; None = the history goes with the names.
    """

    index: int
    dialogue: Dialogue
    row: int
    masked: bool = False
    past: Dialogue | None = None


# NLL of replies in nats and their numbers of tokens, float64[n] each; 0 and 0 where a reply does not fit a row.
Score = Callable[[Sequence[Asked]], tuple[np.ndarray, np.ndarray]]


@dataclasses.dataclass(frozen=True)
class Awareness:
    """What was measured.

    Attributes:
      metrics: see `gaps`.
      scores: {metric: (nats, tokens)} of each of the split's dialogues, float64[n] each; 0 and 0 where one is left out.
      absent: {metric: why it is not there}.
    """

    metrics: dict[str, dict[str, float]]
    scores: dict[str, tuple[np.ndarray, np.ndarray]]
    absent: dict[str, str]


def measure(run: Run, trainable: Tree, store: Store, split: str, every: bool = True) -> Awareness:
    """`gaps` of a run; without `every` only `reply_nll` and `swap_gap`, two conditions instead of nine.

    Raises:
      UserError: the split has no dialogue, or none fits a row.
    """
    history = run.method.reads_history(run.setting)
    return gaps(
        store, split, likelihoods(run, trainable, store), has_rows(run, trainable), every=every, history=history
    )


def gaps(
    store: Store,
    split: str,
    score: Score,
    rows: bool,
    seed: int = 0,
    level: float = LEVEL,
    every: bool = True,
    history: bool = False,
) -> Awareness:
    """How much worse, in nats per token, the true reply becomes when it is not the true querier who is said to ask.

    `reply_nll` is the true reply's NLL per token and `swap_gap` how much one random other querier of the responder (name
    and row) adds to it, both over all tokens with intervals from resampling groups. So is `history_gap`, only where the
    method reads history: what the history of that other querier adds under the true name and row. The others are means over
    queriers of each one's nats per token, with intervals that resample queriers and groups, all over the same replies:

    - `gap_random`: a random other querier whom the responder answers in training; mean of DRAWS draws, the first of which
      is that of `swap_gap`;
    - `gap_nearest`: the other querier who is most like the true one, see `nearest`;
    - `gap_masked`: names hidden, and the stranger's row;
    - `gap_renamed`: a name that nobody has, and the true row;
    - `gap_row`, `gap_name`: the first draw's row under the true name, and its name beside the true row; only where the
      model has rows;
    - `compared`: the share of replies that the gaps are over. Left out are replies that do not fit a row under all names,
      and those whose responder answers nobody else in training, or not this querier. Where that is everybody,
      `gap_masked` and `gap_renamed` are over all that fit.

    A model that does not know who asks has gaps of 0, up to what longer names cost: they leave less room for old turns.

    Args:
      store, split: whose replies.
      score: gives their likelihoods; called once.
      rows: whether the model has querier rows.
      seed: of the draws.
      level: of the intervals.
      every: False = only `reply_nll`, `swap_gap` and `history_gap`.
      history: whether the method reads history.

    Raises:
      UserError: the split has no dialogue, or none fits a row.
    """
    indices = store.split(split)
    if not len(indices):
        found = ", ".join(sorted({str(d.split) for d in store.dialogues}))
        raise UserError(f"the {split} split of the data has no dialogue to score; --split may be one of: {found}")
    asked = conditions(store, indices, rows, seed, history)
    singly = {"swap_gap": "random_0"} | ({"history_gap": "history"} if history else {})
    asked = asked if every else {name: asked[name] for name in ("true", *singly.values())}
    nll, counts = _table(asked, score)
    tokens, scored = counts["true"], counts["true"] > 0
    same = {name: scored & (counts[name] == tokens) for name in asked}
    if not scored.any():
        raise UserError(f"no reply of the {split} split fits batch.length and batch.targets; raise them")
    alone = f"no responder of the {split} split answers both its querier and another one in training"
    unfit = f"no reply of the {split} split fits batch.length under all names; raise it"
    absent = {name: "the method has no querier rows" for name in ("gap_row", "gap_name") if not rows}
    scores = {"reply_nll": (nll["true"], tokens)}
    # The first draw may fit where others do not: these gaps are over as many replies as they can be.
    for name, part in singly.items():
        if same[part].any():
            scores[name] = (nll[part] - nll["true"]) * same[part], tokens * same[part]
        else:
            absent[name] = unfit if any(asked[part]) else alone
    if not any(asked.get("nearest", ())):
        absent = dict.fromkeys(SWAPS, alone) | absent
    names = [name for name in GAPS if name not in absent] if every else []
    compared = np.all([same[part] for name in names for part in GAPS[name]], 0)
    if names and not compared.any():
        absent |= dict.fromkeys(names, unfit)
        names = []
    for name in names:
        # The mean of differences, which is exactly 0 where each of them is.
        delta = np.mean([nll[part] - nll["true"] for part in GAPS[name]], 0)
        scores[name] = delta * compared, tokens * compared
    if not every:
        absent = {name: why for name, why in absent.items() if name not in GAPS}
    found = Awareness({}, scores, absent)
    for name, (nats, number) in scores.items():
        kept = np.flatnonzero(number)
        who, where = ([getattr(store.dialogues[i], key) for i in indices[kept]] for key in ("querier", "group"))
        if name in GAPS:
            found.metrics[name] = macro(nats[kept], number[kept], who, where, level=level)
        else:
            found.metrics[name] = bootstrap(nats[kept], number[kept], where, level=level)
    if names:
        share = float(compared.sum() / scored.sum())
        found.metrics["compared"] = {"value": share, "low": share, "high": share, "n": int(scored.sum())}
    return found


def _table(asked: dict[str, list[Asked | None]], score: Score) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """NLL and numbers of tokens by condition, float64[n] each; 0 where nobody can be said to ask."""
    there = np.array([[a is not None for a in column] for column in asked.values()])
    sums, counts = np.zeros((2, *there.shape))
    sums[there], counts[there] = score([a for column in asked.values() for a in column if a is not None])
    return dict(zip(asked, sums, strict=True)), dict(zip(asked, counts, strict=True))


def conditions(
    store: Store, indices: np.ndarray, rows: bool, seed: int, history: bool = False
) -> dict[str, list[Asked | None]]:
    """Who is said to ask for the replies at `indices`, by condition; "true" comes first, None = nobody can be.

    `rows`, `history`: whether a row, or a history, and a name can be told apart from each other.
    """
    dialogues = [store.dialogues[i] for i in indices]

    def told(who: Sequence[str | None]) -> list[Asked | None]:
        return [
            Asked(int(i), rename(d, q), store.registry.row(q)) if q is not None else None
            for i, d, q in zip(indices, dialogues, who, strict=True)
        ]

    drawn = [told(others(store, dialogues, seed + k)) for k in range(DRAWS)]
    true = [Asked(int(i), d, int(store.row[i])) for i, d in zip(indices, dialogues, strict=True)]
    nobody = newcomer(store)
    result = {"true": true, **dict(zip(GAPS["gap_random"], drawn, strict=True))}
    result["nearest"] = told(nearest(store, dialogues))
    result["masked"] = [Asked(a.index, rename(a.dialogue, STRANGER_NAME), STRANGER, masked=True) for a in true]
    result["renamed"] = [dataclasses.replace(a, dialogue=rename(a.dialogue, nobody)) for a in true]
    pairs = list(zip(true, drawn[0], strict=True))
    if history:
        result["history"] = [dataclasses.replace(a, past=b.dialogue) if b else None for a, b in pairs]
    if rows:
        result["row"] = [dataclasses.replace(a, row=b.row) if b else None for a, b in pairs]
        result["name"] = [dataclasses.replace(a, dialogue=b.dialogue) if b else None for a, b in pairs]
    return result


def rename(dialogue: Dialogue, querier: str) -> Dialogue:
    """The same words, asked by somebody else."""
    turns = tuple(Turn(querier, t.text) if t.speaker == dialogue.querier else t for t in dialogue.turns)
    return dataclasses.replace(dialogue, querier=querier, turns=turns)


def others(store: Store, dialogues: Sequence[Dialogue], seed: int) -> list[str | None]:
    """For each dialogue a random other querier whom its responder answers in training; None where there is none."""
    rng = np.random.default_rng(seed)
    answered: dict[str, set[str]] = {}
    for d in store.dialogues:
        if d.split == "train":
            answered.setdefault(d.responder, set()).add(d.querier)
    chosen: list[str | None] = []
    for d in dialogues:
        names = sorted(answered.get(d.responder, set()) - {d.querier})
        chosen.append(names[rng.integers(len(names))] if names else None)
    return chosen


def nearest(store: Store, dialogues: Sequence[Dialogue]) -> list[str | None]:
    """For each dialogue the other querier of its responder whose training dialogues are most like its own querier's.

    A querier's vector is the mean over their training dialogues with this responder of the TF-IDF vectors of all turns
    ((1 + ln tf) idf, length 1), the words of all speakers' names left out. The likeness of two is the cosine; of equals
    the first in sorted order is taken.

    Returns:
      None where the responder answers nobody else in training, or not this querier.
    """
    asked = {d.responder for d in dialogues}
    train = [d for d in store.dialogues if d.split == "train" and d.responder in asked]
    named = {w for d in store.dialogues for name in (d.querier, d.responder) for w in features.words(name)}
    texts = [" ".join(w for t in d.turns for w in features.words(t.text) if w not in named) for d in train]
    counts = features.count_terms(texts)
    terms = tuple(sorted(counts))
    idf = np.array([1 + math.log((1 + len(texts)) / (1 + counts[term])) for term in terms], np.float32)
    # The words' own weights are wanted: nothing is projected.
    weights = features.Tfidf(terms, idf, np.zeros((len(terms), 0), np.float32)).weights(texts)
    pairs = sorted({(d.responder, d.querier) for d in train})
    place = {pair: i for i, pair in enumerate(pairs)}
    member = np.array([place[d.responder, d.querier] for d in train], int)
    # The cosine asks for directions only: sums serve as means.
    ones = scipy.sparse.csr_array((np.ones(len(train)), (member, np.arange(len(train)))), (len(pairs), len(train)))
    total = ones @ scipy.sparse.csr_array(weights, dtype=float)
    length = np.sqrt(total.multiply(total).sum(1))
    chosen: dict[tuple[str, str], str] = {}
    for responder, group in itertools.groupby(range(len(pairs)), lambda i: pairs[i][0]):
        own = list(group)
        if len(own) < 2:
            continue
        likeness = (total[own] @ total[own].T).toarray() / np.maximum(np.outer(length[own], length[own]), 1e-12)
        np.fill_diagonal(likeness, -1)
        for i, best in zip(own, likeness.argmax(1), strict=True):
            chosen[responder, pairs[i][1]] = pairs[own[best]][1]
    return [chosen.get((d.responder, d.querier)) for d in dialogues]


def newcomer(store: Store) -> str:
    """A name that is no word of any name or text of the data, always the same for the same data."""
    said = {
        word
        for d in store.dialogues
        for text in (d.querier, d.responder, *(t.text for t in d.turns))
        for word in features.words(text)
    }
    made = ("".join(s) for n in itertools.count(3) for s in itertools.product(_SYLLABLES, repeat=n))
    return next(name for name in made if name not in said).capitalize()


def encoder(run: Run, names: str) -> Callable[..., list[Encoded]]:
    """`run.encode` for names that are "visible" or "masked", whatever the run's own `data.names` is."""
    config = copy.deepcopy(run.config)
    config.data.names = names
    other = dataclasses.replace(run, setting=dataclasses.replace(run.setting, config=config))
    if config.compat == "paper" and names == "masked":  # the published layout shows speakers as they are called
        return lambda dialogue, **more: other.encode(_unnamed(dialogue), **more)
    return other.encode


def _unnamed(dialogue: Dialogue) -> Dialogue:
    roles = [RESPONDER if t.speaker == dialogue.responder else QUERIER for t in dialogue.turns]
    turns = tuple(Turn(MASKED[role], t.text) for role, t in zip(roles, dialogue.turns, strict=True))
    return dataclasses.replace(dialogue, turns=turns, querier=MASKED[QUERIER], responder=MASKED[RESPONDER])


def has_rows(run: Run, trainable: Tree) -> bool:
    """Whether the model is told by a row who asks; if not, nothing but the tokens can tell it."""
    nobody = generate.pad([Encoded(*np.zeros((2, 1), np.int32), np.zeros(1, bool))], [STRANGER], 1)
    condition = functools.partial(run.method.condition, run.setting)
    return jax.eval_shape(condition, trainable, nobody).rows is not None


def likelihoods(run: Run, trainable: Tree, store: Store) -> Score:
    """The likelihoods of a run. What is equal for the model is scored once, so that it has equal numbers to the last bit."""
    rows = has_rows(run, trainable)
    encoders = {False: run.encode, True: encoder(run, "masked")}

    def score(asked: Sequence[Asked]) -> tuple[np.ndarray, np.ndarray]:
        place = np.array([a.index for a in asked], int)
        numbers = {key: getattr(store, key)[place] for key in ("responder", "cluster", "text", "label")}
        row = np.array([a.row for a in asked], np.int32)
        said = dataclasses.replace(store, dialogues=tuple(a.dialogue for a in asked), row=row, **numbers)
        run.annotate([a.past or a.dialogue for a in asked])
        encoded = [encoders[a.masked](a.dialogue, past=a.past) for a in asked]
        examples = make_examples(said, encoded, np.arange(len(asked)))
        keys = [_key(e, rows) for e in examples]
        distinct = dict(zip(keys, examples, strict=True))
        number = {key: i for i, key in enumerate(distinct)}
        which = np.array([number[key] for key in keys], int)
        sums, counts = np.zeros((2, len(asked)))
        for total, values in zip((sums, counts), reply_nll(run, trainable, list(distinct.values())), strict=True):
            np.add.at(total, np.array([e.index for e in examples], int), values[which])
        return sums, counts

    return score


def _key(example: Example, rows: bool) -> tuple:
    """Equal for examples that are equal for the model."""
    arrays = (example.tokens, example.role, example.predicted)
    row = example.querier if rows else STRANGER
    columns = (column.tobytes() for _, column in sorted(example.columns.items()))
    return (*(a.tobytes() for a in arrays), *columns, example.responder, example.cluster, row)
