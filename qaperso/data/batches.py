"""Batches as a plan: a pure function of seed and lengths says which dialogues make which row of which batch.

Every host computes the same plan, so resuming needs one integer, the step.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Sequence

import grain
import jax
import numpy as np

from qaperso.data.contrast import contrast_masks
from qaperso.data.store import Store
from qaperso.data.text import Encoded
from qaperso.types import RESPONDER, STRANGER, Batch, Contrast, Example, Inputs


@dataclasses.dataclass(frozen=True)
class Shape:
    """Bounds of a batch: rows B, tokens S, predictions T and dialogues M of a row."""

    rows: int
    length: int
    targets: int
    dialogues: int


def make_examples(store: Store, encoded: Sequence[Encoded | None], indices: np.ndarray) -> list[Example]:
    """Examples of the dialogues at `indices` whose tokens are in `encoded` (None = did not fit: left out)."""
    return [
        Example(
            e.tokens,
            e.role,
            e.predicted,
            int(store.row[i]),
            int(store.responder[i]),
            int(store.cluster[i]),
            int(store.text[i]),
            int(store.label[i]),
            int(i),
            e.cut,
        )
        for i, e in zip(indices, encoded, strict=True)
        if e is not None
    ]


def pack(
    lengths: np.ndarray, targets: np.ndarray, order: np.ndarray, shape: Shape, window: int = 16
) -> list[list[int]]:
    """First-fit packing of items into rows, in the given order.

    Args:
      lengths, targets: tokens and predictions of each item, int[n].
      order: a permutation of (some) items.
      shape: bounds of a row; each item must fit a row alone.
      window: how many rows stay open; the oldest is closed first, so memory and time are bounded.

    Returns:
      Rows of items; each item of `order` exactly once.
    """
    closed: list[list[int]] = []
    opened: list[tuple[list[int], int, int]] = []
    for item in order:
        n, t = int(lengths[item]), int(targets[item])
        for k, (row, tokens, predictions) in enumerate(opened):
            if tokens + n <= shape.length and predictions + t <= shape.targets and len(row) < shape.dialogues:
                opened[k] = ([*row, int(item)], tokens + n, predictions + t)
                break
        else:
            opened.append(([int(item)], n, t))
        if len(opened) > window:
            closed.append(opened.pop(0)[0])
    return closed + [row for row, _, _ in opened]


class Plan:
    """Which examples make which row of which batch: a pure function of (seed, epoch, lengths), on every host the same.

    Rows of one epoch follow those of the last without a gap, so every batch is full and every example is seen once an
    epoch.
    """

    def __init__(self, examples: Sequence[Example], shape: Shape, seed: int, batch_rows: int):
        self.lengths = np.array([len(e) for e in examples])
        self.targets = np.array([int(e.predicted.sum()) for e in examples])
        self.shape, self.seed, self.batch_rows = shape, seed, batch_rows
        # Rows up to the end of each epoch. A batch spans few epochs, so the rows of the last ones are kept.
        self._ends: list[int] = []
        self.epoch_rows = functools.lru_cache(maxsize=4)(self._epoch_rows)

    def _epoch_rows(self, epoch: int) -> list[list[int]]:
        order = np.random.default_rng([self.seed, epoch]).permutation(len(self.lengths))
        return pack(self.lengths, self.targets, order, self.shape)

    def batch(self, step: int) -> list[tuple[int, list[int]]]:
        """The (epoch, examples) of each of the batch's rows."""
        rows = []
        for number in range(step * self.batch_rows, (step + 1) * self.batch_rows):
            while not self._ends or self._ends[-1] <= number:
                self._ends.append((self._ends[-1] if self._ends else 0) + len(self.epoch_rows(len(self._ends))))
            epoch = int(np.searchsorted(self._ends, number, side="right"))
            start = self._ends[epoch - 1] if epoch else 0
            rows.append((epoch, self.epoch_rows(epoch)[number - start]))
        return rows


def dropped_rows(seed: int, epoch: int, count: int, rate: float) -> np.ndarray:
    """Which of `count` examples are answered as to a stranger in this epoch, bool[count]."""
    return np.random.default_rng([seed, epoch, 1]).random(count) < rate


def make_batch(
    rows: Sequence[Sequence[Example]],
    shape: Shape,
    stranger: Sequence[Sequence[bool]] | None = None,
    contrast: str = "none",
) -> Batch:
    """Lays examples out as arrays.

    Args:
      rows: at most `shape.rows` rows of examples.
      shape: of the arrays.
      stranger: for each example whether the model gets row 0 instead of its querier's; None = never.
      contrast: "none", "prototypes" (labels only) or "in_batch" (labels and masks).

    Returns:
      A Batch of numpy arrays. Where `stranger` is given, only dialogues that got row 0 are contrasted: an embedding
      that has seen the row could satisfy the contrast by copying it.
    """
    b, s, t, m = shape.rows, shape.length, shape.targets, shape.dialogues
    grid = {name: np.zeros((b, s), np.int32) for name in ("tokens", "segment", "position", "role")}
    target_index, target, weight = np.zeros((b, t), np.int32), np.zeros((b, t), np.int32), np.zeros((b, t), np.float32)
    each = {name: np.zeros((b, m), np.int32) for name in ("querier", "responder", "cluster", "text")}
    contrasted, label = np.full((b, m), -1, np.int32), np.full((b, m), -1, np.int32)
    present = np.zeros((b, m), bool)
    for r, row in enumerate(rows):
        start = used = 0
        for k, e in enumerate(row):
            span = slice(start, start + len(e))
            grid["tokens"][r, span], grid["role"][r, span] = e.tokens, e.role
            grid["segment"][r, span], grid["position"][r, span] = k + 1, np.arange(len(e))
            predicted = np.flatnonzero(e.predicted[1:]) + 1
            places = slice(used, used + len(predicted))
            target_index[r, places], target[r, places] = start + predicted - 1, e.tokens[predicted]
            weight[r, places] = 1
            as_stranger = stranger is not None and stranger[r][k]
            each["querier"][r, k] = STRANGER if as_stranger else e.querier
            each["responder"][r, k], each["cluster"][r, k], each["text"][r, k] = e.responder, e.cluster, e.text
            present[r, k] = True
            if (stranger is None or as_stranger) and e.label >= 0 and (e.role == RESPONDER).any():
                contrasted[r, k], label[r, k] = e.querier, e.label
            start, used = start + len(e), used + len(predicted)
    text = each.pop("text")
    inputs = Inputs(**grid, **each, attend=grid["segment"] > 0, present=present)
    comparison = None
    if contrast != "none":
        keys = {"querier": contrasted, "responder": inputs.responder, "cluster": inputs.cluster, "text": text}
        keys = {k: v.reshape(-1) for k, v in keys.items()} | {"index": np.arange(b * m)}
        masks = contrast_masks(keys, keys) if contrast == "in_batch" else (None, None)
        comparison = Contrast(label, *masks)
    return Batch(inputs, target_index, target, weight, comparison)


def plan_batch(
    plan: Plan, examples: Sequence[Example], step: int, accumulate: int, drop_rate: float | None, contrast: str
) -> Batch:
    """The batch of a step, leaves [K, ...] for K = `accumulate` micro-batches.

    Args:
      plan: of the run; plan.batch_rows = K * plan.shape.rows.
      examples: what the plan's numbers mean.
      step: which batch.
      accumulate: K.
      drop_rate: share of dialogues answered as to a stranger; None for models without querier rows.
      contrast: see `make_batch`.
    """
    entries = plan.batch(step)
    flags: list[list[bool]] | None = None
    if drop_rate is not None:
        dropped = {e: dropped_rows(plan.seed, e, len(examples), drop_rate) for e in {e for e, _ in entries}}
        flags = [[bool(dropped[e][i]) for i in row] for e, row in entries]
    rows = [[examples[i] for i in row] for _, row in entries]
    size = plan.shape.rows
    micro = [
        make_batch(rows[k : k + size], plan.shape, flags and flags[k : k + size], contrast)
        for k in range(0, accumulate * size, size)
    ]
    return jax.tree.map(lambda *x: np.stack(x), *micro)


def stream(
    plan: Plan,
    examples: Sequence[Example],
    start: int,
    stop: int,
    accumulate: int,
    drop_rate: float | None,
    contrast: str,
) -> Iterator[Batch]:
    """Batches start .. stop - 1, made ahead by a Grain thread."""

    def make(step: int) -> Batch:
        return plan_batch(plan, examples, int(step), accumulate, drop_rate, contrast)

    dataset = grain.MapDataset.range(start, stop).map(make)
    return iter(dataset.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=2)))


def sequential(examples: Sequence[Example], shape: Shape) -> Iterator[tuple[Batch, list[list[Example]]]]:
    """All examples once, in packed batches [B, ...] for evaluation, each with the examples of its rows."""
    lengths = np.array([len(e) for e in examples])
    targets = np.array([int(e.predicted.sum()) for e in examples])
    rows = pack(lengths, targets, np.arange(len(examples)), shape)
    for k in range(0, len(rows), shape.rows):
        chosen = [[examples[i] for i in row] for row in rows[k : k + shape.rows]]
        yield make_batch(chosen, shape), chosen
