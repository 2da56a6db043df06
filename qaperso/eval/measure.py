"""Everything that is measured of a run on a split of its data."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from qaperso import batching, reply
from qaperso.batching import Model
from qaperso.data import reviews_town, synthetic
from qaperso.data.store import Store, evenly
from qaperso.eval import (
    awareness,
    compare,
    identify,
    intervals,
    lamp,
    leakage,
    overlap,
    paired,
    predictions,
    retrieval,
    unseen,
)
from qaperso.eval.compare import Items
from qaperso.eval.retrieval import Embedded
from qaperso.generate import Sampling
from qaperso.run import Run
from qaperso.types import Dialogue

Tree = Any
Metrics = dict[str, dict[str, Any]]
Columns = tuple[np.ndarray, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Wanted:
    """What is measured beside likelihoods, replies and their scores.

    Attributes:
      replies: to so many dialogues of the split, evenly spread; None = all.
      awareness: the reply's NLL under every kind of other querier, and retrieval of queriers from embeddings.
      paired: so many queries are put to several queriers each.
      unseen: rows are fitted for queriers that training never met.
      leakage: canary facts are asked for as their owners and as others.
    """

    replies: int | None = None
    awareness: bool = False
    paired: int = 0
    unseen: bool = False
    leakage: bool = False


@dataclasses.dataclass(frozen=True, eq=False)
class Measured:
    """What was found.

    Attributes:
      items: scores of single dialogues.
      metrics: each {"value", "low", "high", "n"}; without a value it may have a "note" that says why.
      records: of `predictions.collect`.
      embedded: the split's dialogues, names visible; None where the method has no embeddings.
      notes: sentences on what is not there, and why.
      model: gives the run ready to reply; made once, and not before it is needed.
    """

    items: Items
    metrics: Metrics
    records: list[predictions.Record]
    embedded: Embedded | None
    notes: list[str]
    model: Callable[[], Model]


def measure(run: Run, trainable: Tree, store: Store, split: str, step: int, wanted: Wanted, path: Path) -> Measured:
    """All that is wanted of a run.

    Args:
      run, trainable, step: what is scored, and of which checkpoint.
      store: of its data.
      split: one of `splits.SPLITS`, with at least one dialogue.
      wanted: what.
      path: where replies are kept, see `predictions.collect`.
    """
    facts = run.annotate([store.dialogues[i] for i in store.split(split)])
    gaps = awareness.measure(run, trainable, store, split, every=wanted.awareness)
    items, absent = items_of(run, store, split, gaps.scores), dict(gaps.absent)
    metrics: Metrics = {"reply_nll": gaps.metrics["reply_nll"]}
    metrics["perplexity"] = intervals.transformed(metrics["reply_nll"], np.exp)
    metrics |= gaps.metrics
    if wanted.awareness:
        found = retrieval.measure(run, trainable, store, split)
        metrics |= found.metrics
        absent |= found.absent
        embedded = found.test.get("visible")
    else:
        embedded = retrieval.embed(run, trainable, store, store.split(split), "visible")
    model = functools.cache(lambda: batching.prepare(run, trainable))
    indices, records = answerable(run, store, split, items, wanted.replies), []
    if indices:
        records = predictions.collect(run, model, store, split, indices, step, path)
        dialogues, texts = [store.dialogues[i] for i in indices], [record["reply"] for record in records]
        own = reply_scores(run, dialogues, items, texts)
        items = dataclasses.replace(items, scores={**items.scores, **own})
        metrics |= {name: m for name, m in compare.metrics(items).items() if name in own}
        metrics |= overlap.score([d.reply for d in dialogues], texts, [d.group for d in dialogues])
        metrics |= lamp.score(dialogues, texts)
        metrics |= identify.metrics(identify.judge(store, indices, texts))
        if run.config.data.format in ("synthetic", "synthetic_reviews"):
            metrics |= town_chance(run, dialogues)
    if wanted.paired:
        answers = same_queries(run, model(), store, split, wanted.paired)
        metrics |= paired.metrics(answers, identify.names(store.dialogues))
    metrics |= unseen.unseen_queriers(run, trainable, store) if wanted.unseen else {}
    metrics |= leakage.leakage(run, trainable, model, store, split) if wanted.leakage else {}
    missing = what_is_missing(items, absent) + ([f"{run.setting.notes.told(facts)}."] if facts else [])
    return Measured(items, metrics, records, embedded, missing, model)


def items_of(run: Run, store: Store, split: str, scores: dict[str, Columns]) -> Items:
    """Items of a split's dialogues with what `awareness.gaps` found of them."""
    dialogues = [store.dialogues[i] for i in store.split(split)]
    vocabulary = json.dumps(run.tokenizer.get_vocab(), sort_keys=True)
    return Items(
        tuple(d.id for d in dialogues),
        tuple(d.querier for d in dialogues),
        tuple(d.group for d in dialogues),
        dict(scores),
        hashlib.sha256(vocabulary.encode()).hexdigest(),
    )


def answerable(run: Run, store: Store, split: str, items: Items, replies: int | None) -> list[int]:
    """Dialogues that get replies: `replies` of the split, evenly spread, without those too long for a row."""
    places = store.split(split)
    chosen = evenly(len(places), replies)
    scored = items.scores["reply_nll"][1] > 0
    return [int(places[n]) for n in chosen if scored[n] and reply.fits(run, store.dialogues[places[n]])]


def reply_scores(run: Run, dialogues: Sequence[Dialogue], items: Items, texts: Sequence[str]) -> dict[str, Columns]:
    """Scores of replies: by metric, numerators and denominators for all of a split's dialogues, see `compare.Items`.

    Args:
      run: whose replies these are.
      dialogues: that were answered.
      items: of the whole split.
      texts: the replies to the dialogues.
    """
    place = {name: n for n, name in enumerate(items.ids)}
    where = [place[d.id] for d in dialogues]

    def column(values: Sequence[float] | np.ndarray, keep: Sequence[bool] | None = None) -> Columns:
        kept = np.ones(len(where), bool) if keep is None else np.array(keep, bool)
        sums, counts = np.zeros((2, len(place)))
        sums[where], counts[where] = np.where(kept, values, 0.0), kept
        return sums, counts

    result = {"empty_replies": column([float(not text.strip()) for text in texts])}
    result |= {name: column(values) for name, values in overlap.rouge([d.reply for d in dialogues], texts).items()}
    if run.config.data.format == "synthetic_reviews":
        styled = [reviews_town.score_review(d, text) for d, text in zip(dialogues, texts, strict=True)]
        for part in (*reviews_town.STYLES, "fact", "exact"):
            result[part] = column([s[part] for s in styled])
    if run.config.data.format == "synthetic":
        town = [synthetic.score_reply(d, text) for d, text in zip(dialogues, texts, strict=True)]
        for part in ("exact", "address", "register", "fact"):
            result[part] = column([t.get(part, 0.0) for t in town], [part in t for t in town])
        held_out = [d.fields["held_out"] for d in dialogues]
        if any(held_out):
            result["exact_heldout"] = column([t["exact"] for t in town], held_out)
    return result


def town_chance(run: Run, dialogues: Sequence[Dialogue]) -> Metrics:
    """What the embedded world's exact scores are by chance: computed, not sampled, so low and high are the value."""
    town = reviews_town if run.config.data.format == "synthetic_reviews" else synthetic
    found = town.chance(town.make_world(run.config.data.seed), dialogues)
    return {f"{part}_chance": {"value": v, "low": v, "high": v, "n": len(dialogues)} for part, v in found.items()}


def same_queries(run: Run, model: Model, store: Store, split: str, count: int) -> list[paired.Asked]:
    """Replies to `count` queries of a split, each as to several queriers; see `paired.ask`."""
    g = run.config.generate
    ways = functools.partial(reply.replies, model), functools.partial(reply.fits, run)
    how = Sampling(g.max_new_tokens, g.temperature, g.top_p)
    return paired.ask(*ways, store, store.split(split), count, how, seed=run.config.seed)


def what_is_missing(items: Items, absent: dict[str, str]) -> list[str]:
    """Sentences on dialogues and scores that are not there, and on replies without text.

    `absent`: metrics and why they are not there.
    """
    notes = []
    total, scored = len(items.ids), int((items.scores["reply_nll"][1] > 0).sum())
    if scored < total:
        notes.append(f"{total - scored} of {total} dialogues do not fit batch.length and are not scored.")
    notes += [f"No {name}: {reason}." for name, reason in absent.items()]
    empty, written = items.scores.get("empty_replies", (np.zeros(1), np.zeros(1)))
    if empty.sum():
        notes.append(f"{int(empty.sum())} of {int(written.sum())} replies hold no text.")
    return notes
