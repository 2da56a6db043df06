"""Intervals: the resampling by its definition, and the widths that theory gives."""

from __future__ import annotations

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

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
