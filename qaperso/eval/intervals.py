"""Intervals from resampling what was sampled together: groups of dialogues, and queriers."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy.sparse import coo_array, csr_array

LEVEL = 0.95
# Resamples that are worked out at a time; bounds memory, changes no number.
CHUNK = 250


def bootstrap(
    sums: np.ndarray, counts: np.ndarray, groups: Sequence[str], seed: int = 0, draws: int = 2000, level: float = LEVEL
) -> dict[str, float]:
    """Mean sum(sums) / sum(counts) with a percentile interval from resampling whole groups (Efron, 1979).

    Args:
      sums, counts: numerators and denominators, float[n].
      groups: what is resampled together, n names.
      seed: of the resampling.
      draws: number of resamples.
      level: of the interval.

    Returns:
      {"value", "low", "high", "n"}; n counts items. With a single group there is no interval: low and high are NaN,
      and so is the value where nothing was counted.
    """
    names, member = np.unique(np.asarray(groups, str), return_inverse=True)
    total = np.bincount(member, sums, len(names))
    number = np.bincount(member, counts, len(names))
    low = high = float("nan")
    if len(names) > 1:
        picks = np.random.default_rng(seed).integers(len(names), size=(draws, len(names)))
        means = total[picks].sum(1) / np.maximum(number[picks].sum(1), 1e-12)
        low, high = _quantiles(means, level)
    value = float(total.sum() / number.sum()) if number.sum() else float("nan")
    return {"value": value, "low": low, "high": high, "n": len(sums)}


def macro(
    sums: np.ndarray,
    counts: np.ndarray,
    queriers: Sequence[str],
    groups: Sequence[str],
    seed: int = 0,
    draws: int = 2000,
    level: float = LEVEL,
) -> dict[str, float]:
    """Mean over queriers of each one's sum(sums) / sum(counts); the interval resamples queriers and groups.

    Each resample draws queriers and, apart from them, groups; an item counts as often as the product of the two says
    (the pigeonhole bootstrap; Owen, 2007). What there is only one of stays as it is.

    Args:
      sums, counts: numerators and denominators, float[n].
      queriers, groups: of each item, n names.
      seed, draws, level: of the resampling and of the interval.

    Returns:
      {"value", "low", "high", "n"}; n counts queriers with anything counted. NaN where there is nothing to resample.
    """
    (people, who), (scenes, where) = (np.unique(np.asarray(x, str), return_inverse=True) for x in (queriers, groups))
    shape = (len(people), len(scenes))
    table = [coo_array((x, (who, where)), shape=shape).tocsr() for x in (sums, counts)]
    once = np.ones((1, shape[1])), np.ones((1, shape[0]))
    value = float(_resampled(table, *once)[0])
    held = int((np.bincount(who, counts, len(people)) > 0).sum())
    if max(shape) < 2:
        return {"value": value, "low": float("nan"), "high": float("nan"), "n": held}
    rng = np.random.default_rng(seed)
    found = []
    for start in range(0, draws, CHUNK):
        size = min(CHUNK, draws - start)
        found.append(_resampled(table, *(_multiplicities(rng, size, n) for n in shape[::-1])))
    low, high = _quantiles(np.concatenate(found), level)
    return {"value": value, "low": low, "high": high, "n": held}


def absent(note: str) -> dict[str, float | int | str | None]:
    """A metric that has no value, and why."""
    return {"value": None, "low": None, "high": None, "n": 0, "note": note}


def _multiplicities(rng: np.random.Generator, draws: int, n: int) -> np.ndarray:
    """How often each of n is drawn, float64[draws, n]."""
    return rng.multinomial(n, np.full(n, 1 / n), draws).astype(float)


def _resampled(table: list[csr_array], groups: np.ndarray, queriers: np.ndarray) -> np.ndarray:
    """The macro mean under multiplicities [draws, G] and [draws, Q]; NaN where nothing was drawn."""
    total, number = (x @ groups.T for x in table)
    there = queriers.T * (number > 0)
    ratio = total / np.where(number > 0, number, 1)
    with np.errstate(invalid="ignore"):
        return (there * ratio).sum(0) / there.sum(0)


def _quantiles(values: np.ndarray, level: float) -> tuple[float, float]:
    """The interval that holds `level` of the values, of which NaN count for nothing."""
    low, high = np.nanquantile(values, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
