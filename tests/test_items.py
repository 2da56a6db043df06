"""Metrics by dialogue: their means, their differences, and the file."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from qaperso.errors import UserError
from qaperso.eval import items
from qaperso.eval.items import Items


def make(ids: str, **metrics: tuple[list[float], list[float]]) -> Items:
    made = Items(list(ids), [f"querier {i}" for i in ids], [f"group {i}" for i in ids], {}, {})
    for name, (sums, counts) in metrics.items():
        made.add(name, np.array(sums), np.array(counts))
    return made


def test_a_metric_is_a_mean_over_what_has_a_value() -> None:
    found = make("abc", nll=([2.0, 4.0, 0.0], [1.0, 2.0, 0.0])).metrics()["nll"]
    assert (found["value"], found["n"]) == (2.0, 2)
    made = make("ab")
    made.add("exact", np.array([True, False]))
    assert made.metrics()["exact"]["value"] == 0.5


def test_differences_are_of_the_same_dialogues() -> None:
    # b was asked in another order; c has another number of tokens there, d is not there, e has no value.
    a = make("abcde", nll=([3.0, 5.0, 7.0, 9.0, 0.0], [1.0, 2.0, 3.0, 4.0, 0.0]))
    b = make("cbae", nll=([1.0, 1.0, 1.0, 0.0], [2.0, 2.0, 1.0, 0.0]))
    groups, gap, counts = items.difference(a, b, "nll")
    assert (groups, gap.tolist(), counts.tolist()) == (["group a", "group b"], [2.0, 4.0], [1.0, 2.0])
    with pytest.raises(UserError, match="no dialogue alike for 'nll'"):
        items.difference(a, make("xy", nll=([1.0, 1.0], [1.0, 1.0])), "nll")


def test_the_file_gives_back_what_was_saved(tmp_path: Path) -> None:
    made = make("äb", nll=([1.0, np.pi], [1.0, 3.0]), exact=([0.0, 1.0], [1.0, 1.0]))
    items.save(tmp_path, made)
    assert [p.name for p in tmp_path.iterdir()] == [items.FILE]
    found = items.load(tmp_path)
    assert (found.ids, found.queriers, found.groups) == (made.ids, made.queriers, made.groups)
    for kind in ("sums", "counts"):
        ours, theirs = getattr(found, kind), getattr(made, kind)
        assert list(ours) == list(theirs)
        for name in ours:
            np.testing.assert_array_equal(ours[name], theirs[name])


def test_a_missing_or_broken_file_is_one_clear_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="run python -m qaperso.evaluate"):
        items.load(tmp_path)
    for content in (b"", b"not an archive"):
        (tmp_path / items.FILE).write_bytes(content)
        with pytest.raises(UserError, match="is broken"):
            items.load(tmp_path)
