"""Intervals from resampling what was sampled together: groups of dialogues, and queriers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from scipy.sparse import coo_array, csr_array
from scipy.stats import norm, t

LEVEL = 0.95
# Resamples that are worked out at a time; bounds memory.
CHUNK = 250

# Sums of many resamples float[r, k] to a value each, float[r]; NaN where it is not defined.
Statistic = Callable[[np.ndarray], np.ndarray]


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
    return bootstrap_statistic(np.stack([sums, counts], 1), groups, ratio, seed, draws, level)


def bootstrap_statistic(
    items: np.ndarray,
    groups: Sequence[str],
    statistic: Statistic,
    seed: int = 0,
    draws: int = 2000,
    level: float = LEVEL,
) -> dict[str, float]:
    """A function of summed counts with a percentile interval from resampling whole groups (Efron, 1979).

    For what is no mean over items: the BLEU of a corpus follows from n-gram counts summed over all of it, a macro-F1
    from the hits of each label. Every resample sums the counts of the groups it drew and applies the statistic to them.

    Args:
      items: what each item adds to the sums, float[n, k].
      groups: what is resampled together, n names.
      statistic: sums float[r, k] to values float[r], each row by itself.
      seed, draws, level: as for `bootstrap`; equal seeds and groups draw equal resamples, whatever the statistic.

    Returns:
      {"value", "low", "high", "n"} as `bootstrap`; without items the value is NaN.
    """
    value, drawn = _group_values(items, groups, statistic, seed, draws)
    return _metric(value, drawn, len(items), level)


def bootstrap_pairs(
    values: np.ndarray,
    first: np.ndarray,
    second: np.ndarray,
    groups: Sequence[str],
    seed: int = 0,
    draws: int = 2000,
    level: float = LEVEL,
) -> dict[str, float]:
    """Mean over pairs of items with a percentile interval from resampling the items' groups.

    A pair of two groups counts as often as both were drawn, times each other; a pair within one group as often as
    that group was. Copies of one group are not paired with each other, for they would meet themselves (ours, after
    the bootstrap of U-statistics; Arcones and Giné, 1992).

    Args:
      values: of each pair, float[p].
      first, second: places of its two items, int[p].
      groups: of the items, n names.
      seed, draws, level: as for `bootstrap`.

    Returns:
      {"value", "low", "high", "n"}; n counts items. NaN as for `bootstrap`.
    """
    names, member = np.unique(np.asarray(groups, str), return_inverse=True)
    a, b = member[first], member[second]
    drawn = []
    for times in _multiplicities_of_groups(len(names), seed, draws):
        weight = times[:, a] * np.where(a == b, 1, times[:, b])
        drawn.append(ratio(np.stack([weight @ values, weight.sum(1)], 1)))
    value = float(values.mean()) if len(values) else float("nan")
    return _metric(value, _joined(drawn), len(member), level)


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
    value, drawn, held = _macro_values(sums, counts, queriers, groups, seed, draws)
    return _metric(value, drawn, held, level)


def crossed(
    sums: np.ndarray, counts: np.ndarray, seeds: Sequence[str], groups: Sequence[str], level: float = LEVEL
) -> dict[str, float]:
    """The mean over seeds of sum(sums) / sum(counts), with an interval for other seeds and other groups.

    Every seed scores the same dialogues, so seeds and groups are crossed. Few seeds cannot be resampled: a percentile
    interval of three covers less than 80%, this one 90% and more (tested). The variance is that of two crossed random
    effects, s2_seed / S + s2_group / G - s2_rest / (S G), of means by seed, means by group and what is left (Searle, Casella
    and McCulloch, Variance Components, 1992, ch. 4), groups by their part in each seed's ratio; Student's t has the degrees
    of freedom of Satterthwaite (1946).

    Args:
      sums, counts: numerators and denominators, float[n].
      seeds, groups: of each item, n names.
      level: of the interval.

    Returns:
      {"value", "low", "high", "n"}; n counts seeds with anything counted. Of one seed it is `bootstrap`'s interval over groups.
    """
    (runs, who), (scenes, where) = (np.unique(np.asarray(x, str), return_inverse=True) for x in (seeds, groups))
    table = np.zeros((2, len(runs), len(scenes)))
    np.add.at(table, (slice(None), who, where), np.stack([sums, counts]))
    table = table[:, table[1].sum(1) > 0]
    total, number = table[:, :, table[1].any(0)]
    s, g = total.shape
    if s < 2 or g < 2:
        kept = counts > 0
        return bootstrap(sums[kept], counts[kept], np.asarray(groups, str)[kept].tolist(), level=level) | {"n": s}
    means = total.sum(1) / number.sum(1)
    # What a group adds to its seed's mean, G times; 0 in the mean over groups.
    part = (total - means[:, None] * number) * g / number.sum(1, keepdims=True)
    by_group = part.mean(0)
    freedom = np.array([s - 1, g - 1, (s - 1) * (g - 1)])
    rest = ((part - by_group) ** 2).sum() / freedom[2]
    terms = np.array([means.var(ddof=1) / s, by_group.var(ddof=1) / g, -rest / (s * g)])
    # Neither of the first two is less than nothing without the third's share of it.
    variance = max(terms.sum(), terms[0], terms[1])
    value, half = float(means.mean()), 0.0
    if variance > 0:
        half = float(t.ppf((1 + level) / 2, variance**2 / (terms**2 / freedom).sum()) * np.sqrt(variance))
    return {"value": value, "low": value - half, "high": value + half, "n": s}


def jackknife(
    value: float, without: np.ndarray, n: int, bounds: tuple[float, float], level: float = LEVEL
) -> dict[str, float]:
    """An interval for what no resample with repetition can stand for, from leaving out one group after the other.

    The number of different words is such a thing: a group drawn twice adds none, so every resample has fewer than
    the sample and a percentile interval may not even hold the value. The normal interval here has the jackknife's
    standard error, which errs on the wide side in expectation (Efron and Stein, 1981).

    Args:
      value: of all items.
      without: the value without each of the groups, float[groups].
      n: number of items.
      bounds: the least and the largest possible value; the interval is cut there.
      level: of the interval.

    Returns:
      {"value", "low", "high", "n"}; low and high are NaN with fewer than two groups.
    """
    if len(without) < 2:
        return {"value": value, "low": float("nan"), "high": float("nan"), "n": n}
    error = np.sqrt((len(without) - 1) * np.var(without))
    reach = norm.ppf((1 + level) / 2) * error
    low, high = np.clip([value - reach, value + reach], *bounds)
    return {"value": value, "low": float(low), "high": float(high), "n": n}


def paired(
    a: np.ndarray,
    b: np.ndarray,
    counts: np.ndarray,
    groups: Sequence[str],
    queriers: Sequence[str] | None = None,
    *,
    lower_is_better: bool,
    seed: int = 0,
    draws: int = 2000,
    level: float = LEVEL,
) -> dict[str, Any]:
    """How much the mean of run A is above that of run B over the same items, resampled together.

    Args:
      a, b: numerators of the two runs, float[n], item by item.
      counts: their common denominators, float[n].
      groups: of each item, n names.
      queriers: of each item, n names: the means are over queriers, as by `macro`; None = as by `bootstrap`.
      lower_is_better: whether A is the better one where the difference is negative (losses, errors).
      seed, draws, level: as for `bootstrap`.

    Returns:
      {"value", "low", "high", "n", "p", "better"}: the difference with its interval; p, the two-sided p-value of no
      difference by the same resamples, (1 + those beyond zero) / (1 + draws) on the smaller side, twice (Davison and
      Hinkley, 1997, ch. 4); better: True or False where the interval leaves out zero, None where it does not or where
      there is none (p is NaN then).
    """
    if queriers is None:
        items = np.stack([a - b, counts], 1)
        return _verdict(*_group_values(items, groups, ratio, seed, draws), len(items), lower_is_better, level)
    return _verdict(*_macro_values(a - b, counts, queriers, groups, seed, draws), lower_is_better, level)


def paired_statistic(
    a: np.ndarray,
    b: np.ndarray,
    groups: Sequence[str],
    statistic: Statistic,
    *,
    lower_is_better: bool,
    seed: int = 0,
    draws: int = 2000,
    level: float = LEVEL,
) -> dict[str, Any]:
    """How much a statistic of run A is above that of run B over the same items; see `bootstrap_statistic`, `paired`.

    Args:
      a, b: what each item adds to the sums of the two runs, float[n, k].
      groups, statistic, lower_is_better, seed, draws, level: as there.

    Returns:
      As `paired`.
    """
    k = a.shape[1]

    def difference(sums: np.ndarray) -> np.ndarray:
        return statistic(sums[:, :k]) - statistic(sums[:, k:])

    value, drawn = _group_values(np.concatenate([a, b], 1), groups, difference, seed, draws)
    return _verdict(value, drawn, len(a), lower_is_better, level)


def transformed(metric: dict[str, float], function: Callable[[float], float]) -> dict[str, float]:
    """The metric on another scale; the function increases, so that quantiles go over into quantiles."""
    return {key: metric[key] if key == "n" else float(function(metric[key])) for key in ("value", "low", "high", "n")}


def ratio(sums: np.ndarray) -> np.ndarray:
    """The statistic of a mean: float[r, 2] numerators and denominators to float[r], NaN where nothing was counted."""
    total, number = sums.T
    return np.divide(total, number, out=np.full(len(sums), np.nan), where=number > 0)


def _group_values(
    items: np.ndarray, groups: Sequence[str], statistic: Statistic, seed: int, draws: int
) -> tuple[float, np.ndarray]:
    """The statistic of all items and of each resample of groups; no resamples of a single group."""
    names, member = np.unique(np.asarray(groups, str), return_inverse=True)
    if not len(names):
        return float("nan"), np.zeros(0)
    table = np.stack([np.bincount(member, column, len(names)) for column in items.T], 1)
    value = float(statistic(table.sum(0)[None])[0])
    return value, _joined([statistic(x @ table) for x in _multiplicities_of_groups(len(names), seed, draws)])


def _multiplicities_of_groups(count: int, seed: int, draws: int) -> Iterator[np.ndarray]:
    """How often each group is drawn, float64[CHUNK or fewer, count] at a time; nothing for fewer than two groups."""
    rng = np.random.default_rng(seed)
    for start in range(0, draws if count > 1 else 0, CHUNK):
        size = min(CHUNK, draws - start)
        picks = rng.integers(count, size=(size, count)) + count * np.arange(size)[:, None]
        yield np.bincount(picks.ravel(), minlength=size * count).reshape(size, count).astype(float)


def _macro_values(
    sums: np.ndarray, counts: np.ndarray, queriers: Sequence[str], groups: Sequence[str], seed: int, draws: int
) -> tuple[float, np.ndarray, int]:
    """The macro mean, that of each resample, and the number of queriers with anything counted."""
    (people, who), (scenes, where) = (np.unique(np.asarray(x, str), return_inverse=True) for x in (queriers, groups))
    shape = (len(people), len(scenes))
    table = [coo_array((x, (who, where)), shape=shape).tocsr() for x in (sums, counts)]
    once = np.ones((1, shape[1])), np.ones((1, shape[0]))
    value = float(_resampled(table, *once)[0])
    held = int((np.bincount(who, counts, len(people)) > 0).sum())
    if max(shape) < 2:
        return value, np.zeros(0), held
    rng = np.random.default_rng(seed)
    found = []
    for start in range(0, draws, CHUNK):
        size = min(CHUNK, draws - start)
        found.append(_resampled(table, *(_multiplicities(rng, size, n) for n in shape[::-1])))
    return value, _joined(found), held


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
    means = total / np.where(number > 0, number, 1)
    with np.errstate(invalid="ignore"):
        return (there * means).sum(0) / there.sum(0)


def _joined(drawn: list[np.ndarray]) -> np.ndarray:
    """The values of all resamples of which there is one."""
    values = np.concatenate([np.zeros(0), *drawn])
    return values[~np.isnan(values)]


def _metric(value: float, drawn: np.ndarray, n: int, level: float) -> dict[str, float]:
    """A value with the interval that holds `level` of the resamples' values; NaN without resamples."""
    low = high = float("nan")
    if len(drawn):
        low, high = map(float, np.quantile(drawn, [(1 - level) / 2, (1 + level) / 2]))
    return {"value": value, "low": low, "high": high, "n": n}


def _verdict(value: float, drawn: np.ndarray, n: int, lower_is_better: bool, level: float) -> dict[str, Any]:
    """The metric of a difference with "p" and "better"; see `paired`."""
    metric = _metric(value, drawn, n, level)
    p, better = float("nan"), None
    if len(drawn):
        beyond = min((drawn <= 0).sum(), (drawn >= 0).sum())
        p = float(min(1, 2 * (1 + beyond) / (1 + len(drawn))))
        if metric["low"] > 0 or metric["high"] < 0:
            better = (metric["high"] < 0) == lower_is_better
    return metric | {"p": p, "better": better}
