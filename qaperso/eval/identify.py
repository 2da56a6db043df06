"""Which querier was a reply written for? Asked of probes that have read how each responder answers people (ours).

A probe knows one responder: words and characters of the replies in training, names and vocatives taken out, and a
logistic regression over the queriers they went to. What it makes of generated replies is compared with what it makes
of the true ones (its ceiling: where that is no better than a guess, it can say nothing), with what a probe of the
queries makes of the query alone, and with a guess.
"""

from __future__ import annotations

import collections
import dataclasses
import re
from collections.abc import Collection, Iterable, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_union
from threadpoolctl import threadpool_limits

from qaperso.data.features import WORD, words
from qaperso.data.store import Store, evenly
from qaperso.eval.intervals import LEVEL, absent, macro
from qaperso.types import Dialogue

# Replies in training that a querier must have had, and how many of them a probe reads at most.
LEAST, MOST = 5, 200
# Fewer replies than this are not scored: so few right guesses could be luck, whatever the interval says.
FEWEST = 20
# Inverse strength of the probes' L2 penalty; set once, not tuned.
PENALTY = 10.0

# What ends a phrase.
_MARK = re.compile(r"([^\w\s'’-]+)")
# Words of which a vocative consists; it ends in one of _ADDRESS.
_BEFORE = frozenset("o my our your thy good dear sweet gentle noble worthy fair old young poor honest".split())
_ADDRESS = frozenset(
    """
    boy brother captain cousin dad darling daughter dear doctor dude father friend friends gentleman gentlemen girl
    grace highness honey honour king ladies lady ladyship liege lord lords lordship love ma madam madame majesty man
    master mate miss mister mistress mom mother mum prince princess professor queen sir sirs sister son sweetheart
    uncle aunt worship
    """.split()
)
# Words of the longest phrase that is taken for a vocative.
_LONGEST = 4


def names(dialogues: Iterable[Dialogue]) -> frozenset[str]:
    """Every word of any speaker's name, in lower case; Chinese and Japanese names by the character."""
    speakers = {s for d in dialogues for s in (d.responder, d.querier, *(turn.speaker for turn in d.turns))}
    return frozenset(word for speaker in speakers for word in words(speaker))


def without_names(text: str, hidden: Collection[str]) -> str:
    """A text in lower case without the words in `hidden`, also where they mean something else."""
    return WORD.sub(lambda word: "" if word[0] in hidden else word[0], text.lower())


def strip(text: str, hidden: Collection[str]) -> str:
    """A text in lower case without names and vocatives.

    A vocative is a phrase between punctuation marks or the text's ends, of one to four words: a name or a form of address
    such as "lord", "madam" or "friend", and before it only such, or words like "my", "good" and "dear". So "Yes, my good
    lord." becomes "yes.". The lists are English; what no punctuation sets off ("Yes sir") stays, and so do nicknames.

    Args:
      text: of a reply.
      hidden: from `names`.
    """
    pieces = _MARK.split(text.lower())
    kept: list[str] = []
    for mark, phrase in zip(["", *pieces[1::2]], pieces[::2], strict=True):
        if not _vocative(words(phrase), hidden):
            # Where the text began with a vocative, the mark behind it goes too.
            kept += [mark if kept else "", without_names(phrase, hidden)]
    return "".join(kept)


def _vocative(phrase: Sequence[str], hidden: Collection[str]) -> bool:
    if not 1 <= len(phrase) <= _LONGEST:
        return False
    called = [word in _ADDRESS or word in hidden for word in phrase]
    return called[-1] and all(a or word in _BEFORE for a, word in zip(called, phrase, strict=True))


def exchanges(dialogue: Dialogue) -> list[tuple[str, str]]:
    """(query, reply) of each of a dialogue's replies; the query is "" where the responder speaks unasked."""
    found = []
    for i in dialogue.replies or (len(dialogue.turns) - 1,):
        asked = (turn.text for turn in reversed(dialogue.turns[:i]) if turn.speaker == dialogue.querier)
        found.append((next(asked, ""), dialogue.turns[i].text))
    return found


def trained(store: Store) -> dict[str, dict[str, list[tuple[str, str]]]]:
    """What each responder answered each querier in training: {responder: {querier: [(query, reply)]}}."""
    found: dict[str, dict[str, list[tuple[str, str]]]] = {}
    for d in store.dialogues:
        if d.split == "train":
            found.setdefault(d.responder, {}).setdefault(d.querier, []).extend(exchanges(d))
    return found


def probe(texts: Sequence[str], labels: Sequence[str], others: Sequence[str]) -> list[str | None]:
    """Learns labels of texts and gives those of others.

    Features are TF-IDF of words and pairs of words and of 2 to 4 characters within words, each part of length 1; the
    classes weigh the same. Nothing is drawn, so equal texts give equal answers.

    Args:
      texts: n of them, of at least two labels.
      labels: n names.
      others: m texts.

    Returns:
      m labels; None where nothing in a text is known.
    """
    if not any(map(words, texts)):
        return [None] * len(others)
    spoken = dict(tokenizer=words, token_pattern=None, lowercase=False, ngram_range=(1, 2), max_features=20_000)
    spelled = dict(analyzer="char_wb", ngram_range=(2, 4), max_features=50_000)
    features = make_union(*(TfidfVectorizer(sublinear_tf=True, **how) for how in (spoken, spelled)))
    with threadpool_limits(1):
        model = LogisticRegression(C=PENALTY, class_weight="balanced", max_iter=1000)
        model.fit(features.fit_transform(texts), list(labels))
        found = features.transform(others).tocsr()
        said = model.predict(found).tolist()
    return [label if known else None for label, known in zip(said, np.diff(found.indptr), strict=True)]


@dataclasses.dataclass(frozen=True, eq=False)
class Verdicts:
    """What probes say of m replies.

    Attributes:
      responder, querier, group: of each, m names.
      said: whom "reply" (the generated one), "human" (the true one) and "query" point to, m names each; None where a
        text says nothing.
      chance: float64[m], 1 / number of queriers to choose from.
      empty: how many of the generated replies hold nothing.
    """

    responder: list[str]
    querier: list[str]
    group: list[str]
    said: dict[str, list[str | None]]
    chance: Float[np.ndarray, " m"]
    empty: int

    def right(self, kind: str) -> Float[np.ndarray, " m"]:
        """1 where a kind of text points to the true querier, 0 where to another; where to nobody, the chance."""
        pairs = zip(self.said[kind], self.querier, self.chance, strict=True)
        return np.array([guess if said is None else float(said == true) for said, true, guess in pairs])


def judge(store: Store, indices: Sequence[int] | np.ndarray, written: Sequence[str]) -> Verdicts:
    """Puts generated replies before the probes of their responders.

    A responder's probe chooses among the queriers who had `LEAST` replies in training and occur among these dialogues,
    so that the macro mean of whoever always names the same one is chance. Others are left out, as are responders with
    fewer than two. Names and vocatives are taken out of replies and not out of queries, which a model sees as they are.

    Args:
      store: its training split teaches the probes.
      indices: of the dialogues that were answered.
      written: a generated reply to each.
    """
    hidden, known = names(store.dialogues), trained(store)
    asked: dict[str, dict[str, list[int]]] = collections.defaultdict(lambda: collections.defaultdict(list))
    for place, index in enumerate(indices):
        d = store.dialogues[index]
        if len(known.get(d.responder, {}).get(d.querier, ())) >= LEAST:
            asked[d.responder][d.querier].append(place)
    found: dict[str, list[Any]] = collections.defaultdict(list)
    for responder, people in sorted(asked.items()):
        if len(people) < 2:
            continue
        lessons = [(q, *known[responder][q][i]) for q in sorted(people) for i in evenly(len(known[responder][q]), MOST)]
        labels, queries, replies = zip(*lessons, strict=True)
        places = [place for q in sorted(people) for place in people[q]]
        dialogues = [store.dialogues[indices[place]] for place in places]
        texts = [strip(text, hidden) for text in (*(written[p] for p in places), *(d.reply for d in dialogues))]
        said = probe([strip(text, hidden) for text in replies], labels, texts)
        found["reply"] += said[: len(places)]
        found["human"] += said[len(places) :]
        found["query"] += probe(queries, labels, [d.query for d in dialogues])
        found["responder"] += [responder] * len(places)
        found["querier"] += [d.querier for d in dialogues]
        found["group"] += [d.group for d in dialogues]
        found["chance"] += [1 / len(people)] * len(places)
        found["empty"] += [not written[p].strip() for p in places]
    said = {kind: found[kind] for kind in ("reply", "human", "query")}
    people = found["responder"], found["querier"], found["group"]
    return Verdicts(*people, said, np.array(found["chance"], float), sum(found["empty"]))


def metrics(verdicts: Verdicts, level: float = LEVEL) -> dict[str, dict[str, Any]]:
    """How well a probe tells for whom replies were written, as shares of replies.

    All are macro means over the queriers of each responder (one who asks two responders counts as two), with intervals
    that resample these and groups. A text that says nothing counts as a guess.

    Returns:
      identification: of generated replies.
      identification_gain: that minus identification_query, or minus chance where this is more: where no question of a
        querier is in two splits, a question resembles those of others, and its probe does worse than a guess. A gain
        may also come from a dialogue's history, which names nobody but may address somebody; `paired` has none.
      identification_ceiling: of the true replies to the same queries.
      identification_query: of the queries, by the probe that learned from queries.
      identification_chance: of a guess.

      The first two have no value but a note where there are too few replies, only empty ones, or no power: where the
      ceiling's interval does not clear chance.
    """
    count = len(verdicts.chance)
    if count < FEWEST:
        note = (
            f"{count} replies to queriers with {LEAST} or more in training, where a responder has two; {FEWEST} needed"
        )
        return dict.fromkeys(("identification", "identification_gain"), absent(note))
    pairs = [f"{r}\n{q}" for r, q in zip(verdicts.responder, verdicts.querier, strict=True)]

    def mean(values: np.ndarray) -> dict[str, Any]:
        return macro(values, np.ones(count), pairs, verdicts.group, level=level)

    chances = dict(zip(pairs, verdicts.chance.tolist(), strict=True))
    chance = sum(chances.values()) / len(chances)
    reply, human, query = (verdicts.right(kind) for kind in ("reply", "human", "query"))
    ceiling, asked = mean(human), mean(query)
    found = {
        "identification": mean(reply),
        "identification_gain": mean(reply - (query if asked["value"] > chance else verdicts.chance)),
        "identification_ceiling": ceiling,
        "identification_query": asked,
        "identification_chance": {"value": chance, "low": chance, "high": chance, "n": len(chances)},
    }
    note = ""
    if verdicts.empty == count:
        note = f"all {count} replies are empty"
    elif not ceiling["low"] > chance:
        shown = f"{ceiling['value']:.3f} [{ceiling['low']:.3f}, {ceiling['high']:.3f}]"
        note = f"no power: ceiling {shown}, chance {chance:.3f}"
    if note:
        found |= dict.fromkeys(("identification", "identification_gain"), absent(note))
    return found
