"""Intervals: the resampling by its definition, and the widths that theory gives."""

from __future__ import annotations

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
from scipy import stats

from qaperso.eval import intervals


@hypothesis.settings(deadline=None, max_examples=40)
@hypothesis.given(
    items=st.lists(st.tuples(st.floats(-5, 5), st.integers(1, 9), st.sampled_from("abcde")), min_size=1, max_size=12),
    seed=st.integers(0, 2**31),
)
def test_bootstrap_is_its_definition(items: list[tuple[float, int, str]], seed: int) -> None:
    sums, counts, groups = (np.array(column) for column in zip(*items, strict=True))
    found = intervals.bootstrap(sums, counts, groups.tolist(), seed, draws=50)
    assert found["n"] == len(items)
    assert found["value"] == pytest.approx(sums.sum() / counts.sum())
    names = sorted(set(groups))
    if len(names) == 1:
        assert np.isnan(found["low"]) and np.isnan(found["high"])
        return
    means = []
    for pick in np.random.default_rng(seed).integers(len(names), size=(50, len(names))):
        members = np.concatenate([np.flatnonzero(groups == names[g]) for g in pick])
        means.append(sums[members].sum() / counts[members].sum())
    assert [found["low"], found["high"]] == pytest.approx(np.quantile(means, [0.025, 0.975]).tolist())


def test_the_interval_holds_the_mean_and_narrows() -> None:
    rng = np.random.default_rng(0)
    widths = []
    for n in (30, 300, 3000):
        found = intervals.bootstrap(rng.normal(2, 1, n), np.ones(n), [str(i) for i in range(n)])
        assert found["low"] < found["value"] < found["high"]
        widths.append(found["high"] - found["low"])
        # Twice 1.96 standard errors of a mean of n normal draws.
        assert widths[-1] == pytest.approx(3.92 / np.sqrt(n), rel=0.3)
    assert widths == sorted(widths, reverse=True)


def test_groups_are_resampled_and_not_items() -> None:
    # Of two groups a quarter of all resamples hold only the one, a quarter only the other.
    values = np.repeat([0.0, 1.0], 50)
    found = intervals.bootstrap(values, np.ones(100), ["scene 1"] * 50 + ["scene 2"] * 50)
    assert (found["low"], found["value"], found["high"]) == (0.0, 0.5, 1.0)
    alone = intervals.bootstrap(values, np.ones(100), [str(i) for i in range(100)])
    assert 0.35 < alone["low"] < 0.5 < alone["high"] < 0.65


def test_nothing_counted_has_no_mean(recwarn: pytest.WarningsRecorder) -> None:
    for n in (0, 2):
        found = intervals.bootstrap(np.zeros(n), np.zeros(n), ["a"] * n)
        assert found["n"] == n and all(np.isnan(found[k]) for k in ("value", "low", "high"))
    assert not recwarn.list


def test_the_macro_mean_gives_each_querier_the_same_weight() -> None:
    sums, counts = np.array([2.0, 4.0, 9.0, 0.0]), np.array([1.0, 1.0, 3.0, 0.0])
    found = intervals.macro(sums, counts, ["a", "a", "b", "c"], ["x", "y", "x", "y"])
    # 6 / 2 of a and 9 / 3 of b; c has nothing counted.
    assert (found["value"], found["n"]) == (3.0, 2)


@hypothesis.settings(deadline=None, max_examples=25)
@hypothesis.given(
    items=st.lists(
        st.tuples(st.floats(-5, 5), st.integers(1, 9), st.sampled_from("abc"), st.sampled_from("vwxyz")),
        min_size=1,
        max_size=14,
    ),
    seed=st.integers(0, 2**31),
)
def test_macro_is_its_definition(items: list[tuple[float, int, str, str]], seed: int) -> None:
    sums, counts, who, where = (np.array(column) for column in zip(*items, strict=True))
    found = intervals.macro(sums, counts, who.tolist(), where.tolist(), seed, draws=40, level=0.8)
    people, scenes = sorted(set(who)), sorted(set(where))

    def mean(v: dict[str, float], w: dict[str, float]) -> float:
        kept = []
        for q in people:
            mine = who == q
            weight = np.array([v[g] for g in where[mine]])
            number = (weight * counts[mine]).sum()
            kept += [(w[q], (weight * sums[mine]).sum() / number)] if number else []
        total = sum(a for a, _ in kept)
        return sum(a * b for a, b in kept) / total if total else np.nan

    ones = dict.fromkeys(scenes, 1.0), dict.fromkeys(people, 1.0)
    assert found["value"] == pytest.approx(mean(*ones), abs=1e-9)
    if max(len(people), len(scenes)) == 1:
        assert np.isnan(found["low"])
        return
    rng = np.random.default_rng(seed)
    drawn = [rng.multinomial(n, np.full(n, 1 / n), 40) for n in (len(scenes), len(people))]
    values = [
        mean(dict(zip(scenes, v, strict=True)), dict(zip(people, w, strict=True))) for v, w in zip(*drawn, strict=True)
    ]
    expected = np.nanquantile(values, [0.1, 0.9])
    assert [found["low"], found["high"]] == pytest.approx(expected.tolist(), abs=1e-9)


def test_an_effect_of_few_queriers_has_a_wide_interval() -> None:
    # Four queriers with values of their own, in many dialogues: the dialogues' number must not hide that there are four.
    who = np.repeat(["a", "b", "c", "d"], 200)
    values = np.repeat([0.0, 0.0, 1.0, 1.0], 200)
    groups = [str(i) for i in range(800)]
    found = intervals.macro(values, np.ones(800), who.tolist(), groups)
    assert found["high"] - found["low"] > 0.7
    assert intervals.bootstrap(values, np.ones(800), groups)["high"] < 0.55


@hypothesis.settings(deadline=None, max_examples=25)
@hypothesis.given(
    items=st.lists(st.tuples(st.integers(0, 5), st.integers(0, 9), st.sampled_from("abcde")), min_size=1, max_size=12),
    seed=st.integers(0, 2**31),
)
def test_a_statistic_of_sums_is_its_definition(items: list[tuple[int, int, str]], seed: int) -> None:
    first, second, groups = (np.array(column) for column in zip(*items, strict=True))
    table = np.stack([first, second], 1).astype(float)

    def statistic(sums: np.ndarray) -> np.ndarray:
        return np.where(sums[:, 1] > 0, sums[:, 0] ** 2 / np.maximum(sums[:, 1], 1), np.nan)

    # More draws than are worked out at a time, so that the pieces must fit together.
    draws = intervals.CHUNK + 7
    found = intervals.bootstrap_statistic(table, groups.tolist(), statistic, seed, draws, level=0.8)
    names = sorted(set(groups))
    np.testing.assert_allclose(found["value"], statistic(table.sum(0)[None])[0])
    values = []
    for pick in np.random.default_rng(seed).integers(len(names), size=(draws, len(names))):
        members = np.concatenate([np.flatnonzero(groups == names[g]) for g in pick])
        values.append(statistic(table[members].sum(0)[None])[0])
    held = [v for v in values if not np.isnan(v)]
    expected = np.quantile(held, [0.1, 0.9]) if held and len(names) > 1 else [np.nan] * 2
    np.testing.assert_allclose([found["low"], found["high"]], expected, atol=1e-9)


def test_pairs_are_resampled_by_their_items_groups() -> None:
    groups = ["a", "a", "b", "c"]
    first, second, values = np.array([0, 0, 2, 3]), np.array([1, 2, 3, 1]), np.array([1.0, 2.0, 4.0, 8.0])
    found = intervals.bootstrap_pairs(values, first, second, groups, seed=5, draws=60, level=0.5)
    means = []
    for pick in np.random.default_rng(5).integers(3, size=(60, 3)).tolist():
        times = dict(zip("abc", map(pick.count, range(3)), strict=True))
        # The first pair is within one group.
        weight = [times["a"], times["a"] * times["b"], times["b"] * times["c"], times["c"] * times["a"]]
        if sum(weight):
            means.append(np.dot(weight, values) / sum(weight))
    assert len(means) < 60  # some draw one group whose items are in no pair
    assert (found["value"], found["n"]) == (15 / 4, 4)
    assert [found["low"], found["high"]] == pytest.approx(np.quantile(means, [0.25, 0.75]).tolist())


def test_the_interval_of_few_different_replies_is_wide() -> None:
    # Six people of whom three always say one thing: that there are 15 pairs must not hide that there are six.
    place = np.array([(i, j) for i in range(6) for j in range(6) if i != j])
    values = (place < 3).all(1).astype(float)
    found = intervals.bootstrap_pairs(values, *place.T, list("abcdef"))
    assert found["value"] == pytest.approx(0.2)
    assert found["low"] == 0 and found["high"] > 0.5


def test_the_jackknife_of_a_mean_is_its_standard_error() -> None:
    values = np.random.default_rng(0).normal(0.5, 0.1, 30)
    without = (values.sum() - values) / 29
    found = intervals.jackknife(float(values.mean()), without, 30, (0.0, 1.0), level=0.9)
    reach = 1.644854 * values.std(ddof=1) / np.sqrt(30)
    assert found["n"] == 30
    assert [found["low"], found["high"]] == pytest.approx([values.mean() - reach, values.mean() + reach], abs=1e-7)
    found = intervals.jackknife(0.5, np.array([0.0, 1.0]), 2, (0.0, 1.0))
    assert (found["low"], found["high"]) == (0.0, 1.0)
    assert np.isnan(intervals.jackknife(0.5, np.array([0.0]), 1, (0.0, 1.0))["high"])


def test_another_scale() -> None:
    found = intervals.transformed({"value": 0.0, "low": float("nan"), "high": 1.0, "n": 7}, np.exp)
    assert (found["value"], found["high"], found["n"]) == (1.0, np.e, 7) and np.isnan(found["low"])


# ---- two runs over the same items


def test_a_paired_difference_is_the_interval_of_the_difference() -> None:
    rng = np.random.default_rng(0)
    a, b, counts = rng.normal(3, 1, 40), rng.normal(3, 1, 40), rng.integers(1, 9, 40).astype(float)
    groups, queriers = [str(i % 13) for i in range(40)], [str(i % 5) for i in range(40)]
    plain = intervals.paired(a, b, counts, groups, lower_is_better=True, seed=4, draws=300, level=0.9)
    expected = intervals.bootstrap(a - b, counts, groups, seed=4, draws=300, level=0.9)
    assert {k: plain[k] for k in expected} == expected
    over = intervals.paired(a, b, counts, groups, queriers, lower_is_better=True, seed=4, draws=300, level=0.9)
    expected = intervals.macro(a - b, counts, queriers, groups, seed=4, draws=300, level=0.9)
    assert {k: over[k] for k in expected} == expected
    one = intervals.macro(a, counts, queriers, groups)["value"] - intervals.macro(b, counts, queriers, groups)["value"]
    assert over["value"] == pytest.approx(one) and over["n"] == 5
    tables = [np.stack([x, counts], 1) for x in (a, b)]
    general = intervals.paired_statistic(
        *tables, groups, intervals.ratio, lower_is_better=True, seed=4, draws=300, level=0.9
    )
    assert general.pop("better") is plain.pop("better")
    assert general == pytest.approx(plain)


def test_p_counts_the_resamples_beyond_zero() -> None:
    a, groups = np.array([3.0, 1.0, -2.0, 0.5]), list("abcd")
    found = intervals.paired(a, np.zeros(4), np.ones(4), groups, lower_is_better=False, seed=1, draws=99)
    means = [a[pick].mean() for pick in np.random.default_rng(1).integers(4, size=(99, 4))]
    assert 0 < sum(m <= 0 for m in means) < 50
    assert found["p"] == pytest.approx(2 * (1 + sum(m <= 0 for m in means)) / 100)
    assert found["better"] is None


@pytest.mark.parametrize(("lower_is_better", "expected"), [(True, True), (False, False)])
@pytest.mark.parametrize("queriers", [None, list("aabbcc")])
def test_better_goes_by_what_is_better(lower_is_better: bool, expected: bool, queriers: list[str] | None) -> None:
    small, large = np.array([1.0, 1.1, 1.2, 1.0, 1.1, 1.2]), np.full(6, 2.0)
    groups, ones = list("uvwxyz"), np.ones(6)
    found = intervals.paired(small, large, ones, groups, queriers, lower_is_better=lower_is_better)
    assert found["better"] is expected and found["high"] < 0
    assert found["p"] < 0.01
    found = intervals.paired(large, small, ones, groups, queriers, lower_is_better=lower_is_better)
    assert found["better"] is not expected


def test_no_difference_and_nothing_to_resample() -> None:
    same = intervals.paired(np.ones(5), np.ones(5), np.ones(5), list("abcde"), lower_is_better=True)
    assert (same["value"], same["low"], same["high"], same["p"], same["better"]) == (0, 0, 0, 1, None)
    alone = intervals.paired(np.ones(2), np.zeros(2), np.ones(2), ["a", "a"], lower_is_better=True)
    assert alone["value"] == 1 and np.isnan(alone["p"]) and alone["better"] is None


def test_paired_intervals_hold_the_truth_as_often_as_they_say() -> None:
    # Items of a group share much of both runs' values, and some of their difference.
    rng, held, items, decided = np.random.default_rng(0), [], [], []
    groups = [str(i // 5) for i in range(200)]
    for _ in range(200):
        both, effect = rng.normal(0, 2, 40), rng.normal(0.1, 0.3, 40)
        b = np.repeat(both, 5) + rng.normal(0, 0.2, 200)
        a = np.repeat(both + effect, 5) + rng.normal(0, 0.2, 200)
        found = intervals.paired(a, b, np.ones(200), groups, lower_is_better=True, draws=300, level=0.9)
        held.append(found["low"] <= 0.1 <= found["high"])
        decided.append(found["better"] is True)  # A is worse
        found = intervals.paired(
            a, b, np.ones(200), list(map(str, range(200))), lower_is_better=True, draws=300, level=0.9
        )
        items.append(found["low"] <= 0.1 <= found["high"])
    # Three standard deviations of 200 draws around .9 are .064.
    assert 0.83 <= np.mean(held) <= 0.965
    assert np.mean(decided) <= 0.03
    assert np.mean(items) < 0.75


def test_paired_macro_intervals_hold_the_truth_for_other_queriers_too() -> None:
    rng, held, plain = np.random.default_rng(1), [], []
    who, where = np.arange(240) % 12, np.arange(240) // 6
    queriers, groups = list(map(str, who)), list(map(str, where))
    for _ in range(120):
        effect = rng.normal(0.2, 0.3, 12)[who] + rng.normal(0, 0.2, 40)[where] + rng.normal(0, 0.3, 240)
        b = rng.normal(0, 2, 240)
        found = intervals.paired(
            b + effect, b, np.ones(240), groups, queriers, lower_is_better=True, draws=200, level=0.9
        )
        held.append(found["low"] <= 0.2 <= found["high"])
        found = intervals.paired(b + effect, b, np.ones(240), groups, lower_is_better=True, draws=200, level=0.9)
        plain.append(found["low"] <= 0.2 <= found["high"])
    # Twelve queriers are few for a percentile interval, and the pigeonhole bootstrap is a little wide.
    assert 0.8 <= np.mean(held) <= 0.99
    assert np.mean(plain) < np.mean(held) - 0.1


def grid(values: np.ndarray) -> tuple[np.ndarray, np.ndarray, list[str], list[str]]:
    """Arguments of `crossed` for a value of each (seed, group)."""
    s, g = values.shape
    return (
        values.ravel(),
        np.ones(s * g),
        [*map(str, np.repeat(np.arange(s), g))],
        [*map(str, np.tile(np.arange(g), s))],
    )


def test_crossed_by_hand() -> None:
    # Means of seeds 2 and 5, so 4.5 / 2; of groups 2, 4 and 4.5, so 1.75 / 3; what is left is -1, 0 and 1 and the same
    # negated, 4 in all over 2 degrees of freedom, so 2 / 6 is counted twice.
    values = np.array([[-0.5, 2.5, 4.0], [4.5, 5.5, 5.0]])
    terms = np.array([4.5 / 2, 1.75 / 3, -2 / 6])
    freedom = 2.5**2 / (terms**2 / [1, 2, 2]).sum()
    half = stats.t.ppf(0.975, freedom) * 2.5**0.5
    found = intervals.crossed(*grid(values))
    assert terms.sum() == pytest.approx(2.5) and found["n"] == 2 and found["value"] == 3.5
    assert [found["low"], found["high"]] == pytest.approx([3.5 - half, 3.5 + half])


def test_crossed_where_one_effect_rules() -> None:
    seeds, groups = np.array([-1.0, 0.0, 2.0]), np.random.default_rng(0).normal(size=40)
    only = intervals.crossed(*grid(seeds[:, None] + np.zeros(40)))
    half = stats.t.ppf(0.975, 2) * seeds.std(ddof=1) / 3**0.5
    assert [only["low"], only["high"]] == pytest.approx([1 / 3 - half, 1 / 3 + half])
    # Seeds that agree on every group are as good as one.
    only = intervals.crossed(*grid(np.zeros((3, 1)) + groups))
    half = stats.t.ppf(0.975, 39) * groups.std(ddof=1) / 40**0.5
    assert [only["low"], only["high"]] == pytest.approx([groups.mean() - half, groups.mean() + half])
    # Larger groups count for more, and items of nothing for nothing.
    sums, counts = np.array([2.0, 3.0, 0.0, 4.0, 5.0, 0.0]), np.array([1.0, 3.0, 0.0, 1.0, 3.0, 0.0])
    found = intervals.crossed(sums, counts, list("aaabbb"), list("xyzxyz"))
    assert found["value"] == pytest.approx((5 / 4 + 9 / 4) / 2) and found["low"] < found["value"] < found["high"]


def test_crossed_without_anything_to_compare() -> None:
    one = intervals.crossed(*grid(np.array([[1.0, 2.0, 4.0]])))
    assert one == intervals.bootstrap(np.array([1.0, 2.0, 4.0]), np.ones(3), list("012")) | {"n": 1}
    same = intervals.crossed(*grid(np.full((3, 4), 0.5)))
    assert same == {"value": 0.5, "low": 0.5, "high": 0.5, "n": 3}
    assert np.isnan(intervals.crossed(np.zeros(2), np.zeros(2), ["a", "b"], ["x", "x"])["value"])


@pytest.mark.parametrize("spread", [(1, 0.5, 0.5), (0.05, 2, 1), (0.1, 1, 4), (0.3, 3, 3)])
def test_crossed_covers(spread: tuple[float, float, float]) -> None:
    """Three seeds and sixty groups: 90% where seeds alone differ, else 95% and more, within what 300 trials can tell."""
    rng, hits = np.random.default_rng(0), 0
    for _ in range(300):
        seed, group, rest = (
            rng.normal(size=size) * x for size, x in zip(((3, 1), (1, 60), (3, 60)), spread, strict=True)
        )
        found = intervals.crossed(*grid(seed + group + rest))
        hits += found["low"] <= 0 <= found["high"]
    assert 0.88 <= hits / 300 <= 0.995
