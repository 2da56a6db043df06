"""Scores of single dialogues: their means, and differences between runs that are planted and have to be found."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from qaperso.errors import UserError
from qaperso.eval import compare, intervals
from qaperso.eval.compare import Items
from qaperso.types import Dialogue, Turn


def items(seed: int, size: int = 240, shift: float = 0.0, noise: float = 0.0, vocabulary: str = "a") -> Items:
    """Scores that are hard or easy by group, `shift` worse than seed 0's by token, up to noise of this run's own."""
    rng = np.random.default_rng(0)
    who, where = rng.integers(6, size=size), rng.integers(40, size=size)
    counts = rng.integers(3, 30, size).astype(float)
    hardness = 4.0 + rng.normal(size=40)[where]
    own = noise * np.random.default_rng([seed, 1]).normal(size=size)
    exact = (np.random.default_rng([seed, 2]).random(size) < 0.5).astype(float)
    return Items(
        tuple(f"d{i}" for i in range(size)),
        tuple(f"q{i}" for i in who),
        tuple(f"g{i}" for i in where),
        {"reply_nll": (counts * (hardness + shift + own), counts), "exact": (exact, np.ones(size))},
        vocabulary,
    )


def test_means_over_all_and_by_querier() -> None:
    found = items(0)
    sums, counts = found.scores["reply_nll"]
    assert compare.metrics(found)["reply_nll"] == intervals.bootstrap(sums, counts, found.groups)
    parts = compare.by_querier(found, "reply_nll")
    assert list(parts) == sorted(set(found.queriers))
    mine = np.array(found.queriers) == "q3"
    assert parts["q3"]["value"] == pytest.approx(sums[mine].sum() / counts[mine].sum())
    assert parts["q3"]["n"] == mine.sum() and sum(p["n"] for p in parts.values()) == 240
    assert compare.by_querier(found, "rouge_l") == {}


def test_dialogues_without_a_score_count_for_nothing() -> None:
    found = items(0)
    sums, counts = (x.copy() for x in found.scores["reply_nll"])
    out = np.array(found.queriers) == "q3"
    sums[out] = counts[out] = 0
    part = dataclasses.replace(found, scores={"reply_nll": (sums, counts)})
    assert compare.metrics(part)["reply_nll"]["n"] == (~out).sum()
    assert "q3" not in compare.by_querier(part, "reply_nll")
    nothing = dataclasses.replace(found, scores={"fact": (np.zeros(240), np.zeros(240))})
    assert np.isnan(compare.metrics(nothing)["fact"]["value"]) and compare.by_querier(nothing, "fact") == {}


def test_a_querier_with_a_single_dialogue_has_no_interval() -> None:
    found = Items(("a", "b", "c"), ("ann", "bo", "bo"), ("x", "x", "y"), {"m": (np.arange(3.0), np.ones(3))}, "")
    parts = compare.by_querier(found, "m")
    assert parts["ann"]["value"] == 0 and np.isnan(parts["ann"]["low"]) and parts["ann"]["n"] == 1
    assert (parts["bo"]["value"], parts["bo"]["low"], parts["bo"]["high"]) == (1.5, 1, 2)


def test_a_planted_difference_is_found_where_unpaired_intervals_hide_it() -> None:
    ours, theirs = items(1, shift=-0.05, noise=0.1), items(2, noise=0.1)
    found = compare.paired(ours, theirs)
    assert list(found) == ["reply_nll", "exact"]
    gap = found["reply_nll"]
    assert gap["low"] < -0.05 < gap["high"] < 0 and gap["n"] == 240
    a, b = (compare.metrics(one)["reply_nll"] for one in (ours, theirs))
    assert a["high"] > b["low"] and gap["value"] == pytest.approx(a["value"] - b["value"])
    assert gap["high"] - gap["low"] < (a["high"] - a["low"]) / 4
    # Coins of their own: no difference to be found.
    assert found["exact"]["low"] < 0 < found["exact"]["high"]
    turned = compare.paired(theirs, ours)["reply_nll"]
    assert [turned[k] for k in ("value", "low", "high")] == pytest.approx([-gap[k] for k in ("value", "high", "low")])


def test_no_difference_is_zero() -> None:
    same = compare.paired(items(1), items(1))
    assert all((m["value"], m["low"], m["high"]) == (0, 0, 0) for m in same.values())


def test_runs_are_joined_by_id() -> None:
    ours, theirs = items(1, noise=0.3), items(2, noise=0.3)
    order = np.random.default_rng(5).permutation(240)
    mixed = Items(
        *(tuple(np.array(column)[order].tolist()) for column in (theirs.ids, theirs.queriers, theirs.groups)),
        {name: (a[order], b[order]) for name, (a, b) in theirs.scores.items()},
        "a",
    )
    assert compare.paired(ours, mixed) == compare.paired(ours, theirs)


def test_what_cannot_be_compared_is_left_out() -> None:
    ours, theirs = items(1), items(2, shift=1.0)
    # Another number of tokens: part of a long dialogue did not fit one of the runs.
    sums, counts = (x.copy() for x in theirs.scores["reply_nll"])
    counts[:7] -= 1
    sums[:7] = 1e6
    cut = dataclasses.replace(theirs, scores={"reply_nll": (sums, counts)})
    found = compare.paired(ours, cut)
    assert list(found) == ["reply_nll"] and found["reply_nll"]["n"] == 233
    assert found["reply_nll"]["value"] == pytest.approx(-1)
    # Tokens of another tokeniser are not the same tokens, whatever their number.
    assert list(compare.paired(ours, dataclasses.replace(theirs, vocabulary="b"))) == ["exact"]


def talk(name: str, text: str = "so?", querier: str = "ann") -> Dialogue:
    return Dialogue(name, "cy", querier, (Turn(querier, text), Turn("cy", "well")), name)


def test_runs_of_other_dialogues_are_refused() -> None:
    mine = [talk("a"), talk("b"), talk("c")]
    compare.check_same("one", mine, "two", mine[::-1], "test")
    with pytest.raises(UserError) as error:
        compare.check_same("one", mine, "two", [talk("a"), talk("x")], "test")
    message = str(error.value)
    assert "'one' and 'two' do not share the test split" in message
    assert "2 of 3 dialogues are only in the first and 1 of 2 only in the second, such as 'b'" in message
    with pytest.raises(UserError, match="0 of 1 .* and 2 of 3 only in the second, such as 'b'"):
        compare.check_same("one", mine[:1], "two", mine, "test")
    for other in (talk("b", "why?"), talk("b", querier="bo")):
        with pytest.raises(UserError, match="dialogue 'b' has other words or people in the second"):
            compare.check_same("one", mine, "two", [talk("a"), other, talk("c")], "test")


def test_other_dialogues_are_not_compared() -> None:
    with pytest.raises(UserError, match="different dialogues"):
        compare.difference(items(0), items(0, size=239), "exact")


def test_the_file_gives_back_what_was_saved(tmp_path: Path) -> None:
    path, made = tmp_path / "items.npz", items(0, vocabulary="ä")
    compare.save(path, made)
    assert list(tmp_path.iterdir()) == [path]
    found = compare.load(path)
    assert [getattr(found, k) for k in ("ids", "queriers", "groups", "vocabulary")] == [
        made.ids,
        made.queriers,
        made.groups,
        made.vocabulary,
    ]
    assert list(found.scores) == list(made.scores)
    for name, columns in made.scores.items():
        np.testing.assert_array_equal(np.stack(found.scores[name]), np.stack(columns))


def test_a_missing_or_broken_file_is_one_clear_error(tmp_path: Path) -> None:
    path = tmp_path / "items.npz"
    with pytest.raises(UserError, match="run python -m qaperso.evaluate"):
        compare.load(path)
    for content in (b"", b"not an archive"):
        path.write_bytes(content)
        with pytest.raises(UserError, match="is broken"):
            compare.load(path)
