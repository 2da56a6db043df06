"""How well a run answers queriers whom training never met, once it has a few of their dialogues to fit a row on."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from qaperso import people, rows
from qaperso.data.store import Store
from qaperso.errors import UserError
from qaperso.eval.intervals import macro
from qaperso.eval.scores import reply_nll
from qaperso.run import Run
from qaperso.types import STRANGER, Dialogue, Example

Tree = Any
Metrics = dict[str, dict[str, float]]
# Dialogues (numbers of them) to a row, and a row (None = the stranger's) and dialogues to their NLL and tokens.
Fit = Callable[[Sequence[int]], Any]
Score = Callable[[Any, Sequence[int]], tuple[np.ndarray, np.ndarray]]

# How many dialogues are given; the first is what all others are compared with.
GIVEN = (0, 1, 5, 20)


def divide(dialogues: Sequence[Dialogue], given: Sequence[int], seed: int) -> tuple[list[int], list[int]]:
    """Cuts one querier's dialogues into those that may be given, in their order, and those that are scored (ours).

    Groups come in random order, and dialogues within them. Given are the first dialogues, as many as the largest of
    `given` that leaves a group untouched; all of these are scored. The rest of a group that was cut is neither.

    Returns:
      Numbers of dialogues; giving the first n makes nested subsets, and what is scored is the same for each.
    """
    rng = random.Random(f"unseen/{seed}/{dialogues[0].querier}")
    groups = sorted({d.group for d in dialogues})
    place = dict(zip(rng.sample(groups, len(groups)), range(len(groups)), strict=True))
    order = sorted(rng.sample(range(len(dialogues)), len(dialogues)), key=lambda i: place[dialogues[i].group])
    for count in sorted(given, reverse=True):
        touched = {dialogues[i].group for i in order[:count]}
        rest = [i for i in order if dialogues[i].group not in touched]
        if count <= len(order) and rest:
            return order[:count], rest
    return [], order


def learning(
    dialogues: Sequence[Dialogue], fit: Fit, score: Score, given: Sequence[int] = GIVEN, seed: int = 0
) -> Metrics:
    """Reply NLL of unseen queriers after fitting a row on some of their dialogues (ours).

    Args:
      dialogues: of the unseen queriers.
      fit: the row for a querier, from numbers of dialogues.
      score: NLL (nats) and number of tokens of each numbered dialogue under a row; None = the stranger's.
      given: how many dialogues a fit gets, rising from 0.
      seed: which ones, and in what order.

    Returns:
      For n of `given`: `unseen_nll_N`, nats per token, the mean over queriers; for n > 0 also `unseen_gain_N`, by how
      much it is lower than with nothing given, for the same queriers and dialogues; and `unseen_left_out_N`, how many
      queriers have too few dialogues. Where all have, there is only that. Intervals resample queriers and groups.
    """
    queriers = sorted({d.querier for d in dialogues})
    own = {name: [i for i, d in enumerate(dialogues) if d.querier == name] for name in queriers}
    parts = {}
    for name, numbers in own.items():
        pool, rest = divide([dialogues[i] for i in numbers], given, seed)
        parts[name] = [numbers[i] for i in pool], [numbers[i] for i in rest]
    scored = [i for _, rest in parts.values() for i in rest]
    before, counts = np.zeros((2, len(dialogues)))
    before[scored], counts[scored] = score(None, scored)
    metrics: Metrics = {}
    for n in given:
        kept = [name for name in queriers if len(parts[name][0]) >= n]
        now, after = [i for name in kept for i in parts[name][1]], before.copy()
        for name in kept if n else ():
            pool, rest = parts[name]
            after[rest] = score(fit(pool[:n]), rest)[0]
        labels = [dialogues[i].querier for i in now], [dialogues[i].group for i in now]
        if now:
            metrics[f"unseen_nll_{n}"] = macro(after[now], counts[now], *labels)
        if n and now:
            metrics[f"unseen_gain_{n}"] = macro((before - after)[now], counts[now], *labels)
        if n:
            gone = float(len(queriers) - len(kept))
            metrics[f"unseen_left_out_{n}"] = {"value": gone, "low": gone, "high": gone, "n": len(queriers)}
    return metrics


def gains(metrics: Metrics) -> dict[int, dict[str, float]]:
    """The curve of `learning`: by how many dialogues were given, `unseen_gain_N`; {} where it was not measured."""
    found = {n: metrics.get(f"unseen_gain_{n}") for n in GIVEN}
    return {n: metric for n, metric in found.items() if metric is not None}


def unseen_queriers(run: Run, trainable: Tree, store: Store, given: Sequence[int] = GIVEN, seed: int = 0) -> Metrics:
    """`learning` of a run's "unseen" split, each querier in a spare row.

    Raises:
      UserError: the split is empty, or the run has no (spare) rows.
    """
    row = rows.spare_row(run, trainable)
    examples, _ = run.examples(store, "unseen")
    if not examples:
        raise UserError(
            "found no dialogue in the unseen split, expected those of queriers held out of training; prepare the data"
            " with --unseen SHARE and train again"
        )
    sequences: dict[int, list[Example]] = {}
    for e in examples:
        sequences.setdefault(e.index, []).append(e)
    fitting = list(sequences)

    def some(numbers: Sequence[int], asker: int) -> tuple[list[Example], list[int]]:
        """Sequences of some dialogues as of the querier with a row, and where in `numbers` each belongs."""
        pairs = [(k, e) for k, i in enumerate(numbers) for e in sequences[fitting[i]]]
        return [dataclasses.replace(e, querier=asker) for _, e in pairs], [k for k, _ in pairs]

    def fit(numbers: Sequence[int]) -> Any:
        return rows.fit_row(run, trainable, some(numbers, row)[0], seed=seed)

    def score(vector: Any, numbers: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        asked, place = some(numbers, STRANGER if vector is None else row)
        values = trainable if vector is None else people.with_row(trainable, row, vector)
        sums, counts = np.zeros((2, len(numbers)))
        for total, found in zip((sums, counts), reply_nll(run, values, asked), strict=True):
            np.add.at(total, place, found)
        return sums, counts

    return learning([store.dialogues[i] for i in fitting], fit, score, given, seed)
