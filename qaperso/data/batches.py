"""Batches: the examples of a plan's rows as arrays, made ahead of the step that reads them."""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import grain
import jax
import numpy as np

from qaperso import arrays
from qaperso.data.plan import Place, Plan, Shape, fill
from qaperso.data.store import Store
from qaperso.data.text import Encoded
from qaperso.errors import UserError
from qaperso.types import RESPONDER, STRANGER, Batch, Contrast, Example, Inputs


def make_examples(store: Store, encoded: Sequence[Sequence[Encoded]], indices: np.ndarray) -> list[Example]:
    """Examples of the dialogues at `indices`, whose sequences are in `encoded` (none = did not fit: left out)."""
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
            e.columns,
        )
        for i, sequences in zip(indices, encoded, strict=True)
        for e in sequences
    ]


def dropped_groups(seed: int, epoch: int, count: int, rate: float) -> np.ndarray:
    """Which of `count` groups of the plan are answered as to strangers in this epoch, bool[count].

    Whole groups, since only dialogues without a row are contrasted: dropped one by one, few would meet their partners.
    """
    return np.random.default_rng([seed, epoch, 1]).random(count) < rate


def columns_of(rows: Sequence[Sequence[Mapping[str, Any]]], b: int, m: int) -> dict[str, np.ndarray]:
    """What was looked up for the dialogues of each row as arrays [b, m, ...]; 0 where there is no dialogue.

    Args:
      rows: for each dialogue what `types.Example` calls columns; all have the same names and shapes.
      b: number of rows, at least as many as are given.
      m: dialogues a row, at least as many as there are.
    """
    first = next((columns for row in rows for columns in row), {})
    whole = {name: np.zeros((b, m, *one.shape), one.dtype) for name, one in first.items()}
    for r, row in enumerate(rows):
        for k, columns in enumerate(row):
            for name, one in columns.items():
                whole[name][r, k] = np.asarray(one)
    return whole


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
      contrast: as in the configuration; "none" leaves out what it reads.

    Returns:
      A Batch of numpy arrays. Where `stranger` is given, only dialogues that got row 0 are contrasted: an embedding
      that has seen the row could satisfy the contrast by copying it.
    """
    b, s, t, m = shape.rows, shape.length, shape.targets, shape.dialogues
    grid = {name: np.zeros((b, s), np.int32) for name in ("tokens", "segment", "position", "role")}
    target_index, target, weight = np.zeros((b, t), np.int32), np.zeros((b, t), np.int32), np.zeros((b, t), np.float32)
    each = {name: np.zeros((b, m), np.int32) for name in ("querier", "responder", "cluster", "text")}
    label, present = np.full((b, m), -1, np.int32), np.zeros((b, m), bool)
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
            if (stranger is None or as_stranger) and (e.role == RESPONDER).any():
                label[r, k] = e.label
            start, used = start + len(e), used + len(predicted)
    text = each.pop("text")
    columns = columns_of([[e.columns for e in row] for row in rows], b, m)
    inputs = Inputs(**grid, **each, attend=grid["segment"] > 0, present=present, columns=columns)
    comparison = None if contrast == "none" else Contrast(label, text)
    return Batch(inputs, target_index, target, weight, comparison)


def plan_batch(
    plan: Plan, examples: Sequence[Example], step: int, accumulate: int, drop_rate: float | None, contrast: str
) -> Batch:
    """The batch of a step, leaves [K, ...] for K = `accumulate` micro-batches.

    Args:
      plan: of the run.
      examples: what the plan's numbers mean.
      step: which batch.
      accumulate: K.
      drop_rate: share of dialogues answered as to a stranger; None for models without querier rows.
      contrast: see `make_batch`.
    """
    micro = []
    for number in range(step * accumulate, (step + 1) * accumulate):
        places = plan.rows(number)
        flags: list[list[bool]] | None = None
        if drop_rate is not None:
            epochs = {p.epoch for row in places for p in row}
            dropped = {e: dropped_groups(plan.seed, e, len(examples), drop_rate) for e in epochs}
            flags = [[bool(dropped[p.epoch][p.group]) for p in row] for row in places]
        rows = [[examples[p.example] for p in row] for row in places]
        micro.append(make_batch(rows, plan.shape, flags, contrast))
    return jax.tree.map(lambda *x: np.stack(x), *micro)


def stream(make: Callable[[int], Batch], start: int, stop: int) -> Iterator[Batch]:
    """Batches start .. stop - 1, each as `make` makes it of its number, ahead by a Grain thread."""
    dataset = grain.MapDataset.range(start, stop).map(lambda number: make(int(number)))
    return iter(dataset.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=2)))


def sequential(examples: Sequence[Example], shape: Shape) -> Iterator[tuple[Batch, list[list[int]]]]:
    """All examples once, in packed batches [B, ...] for evaluation, each with the numbers of its rows' examples."""
    units = ((Place(i, 0, i),) for i in range(len(examples)))
    targets = [int(e.predicted.sum()) for e in examples]
    for places in fill(units, [len(e) for e in examples], targets, shape):
        rows = [[p.example for p in row] for row in places]
        yield make_batch([[examples[i] for i in row] for row in rows], shape), rows


def save_batch(path: Path, batch: Batch, step: int, found: Mapping[str, float]) -> None:
    """Writes a batch to an .npz file, whole or not at all.

    Args:
      path: of the file.
      batch: numpy leaves, which are kept by their names.
      step: whose batch it is, 1 for the first.
      found: what the step reported, kept as `found/NAME`.
    """
    partial = path.with_name(path.name + ".partial")
    with partial.open("wb") as file:
        np.savez(file, **arrays.flat(batch), **{f"found/{name}": x for name, x in found.items()}, step=step)
    partial.replace(path)


def load_batch(path: Path) -> tuple[dict[str, np.ndarray], int, dict[str, float]]:
    """The leaves by name, the step and what it reported, as `save_batch` got them.

    Raises:
      UserError: there is no such file, or it is broken.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            held = {name: file[name] for name in file.files}
        step = int(held.pop("step"))
    except FileNotFoundError as error:
        raise UserError(f"{path} is not there; training names the file when it leaves an update out") from error
    except (OSError, EOFError, ValueError, KeyError, TypeError, AttributeError, zipfile.BadZipFile) as error:
        raise UserError(f"{path} is broken or holds no batch ({error}); train again to have it written anew") from error
    found = {name.removeprefix("found/"): float(held.pop(name)) for name in list(held) if name.startswith("found/")}
    return held, step, found
