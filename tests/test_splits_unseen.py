"""Queriers that are held out whole."""

from __future__ import annotations

import collections

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_splits import asked, components, corpus, dialogue

from qaperso.data.splits import (
    check_disjoint,
    hold_out_queriers,
    split_by_group,
)
from qaperso.errors import UserError


def test_held_out_queriers_are_unseen_and_their_groups_test():
    rows = [asked(f"{g}.{q}", f"g{g}", f"q{(g + q) % 20}") for g in range(20) for q in range(2)]
    out = hold_out_queriers(rows, share=0.1, seed=4)
    held = {d.querier for d in out if d.split == "unseen"}
    touched = {d.group for d in rows if d.querier in held}
    assert len(held) == 2
    for d in out:
        assert d.split == ("unseen" if d.querier in held else "test" if d.group in touched else None)
    full = split_by_group(out, seed=0, dev=0.1, test=0.1)
    check_disjoint(full)
    assert {d.split for d in full} == {"train", "dev", "test", "unseen"}
    assert all(b.split == a.split for a, b in zip(out, full, strict=True) if a.split is not None)


def test_held_out_querier_reaches_equal_texts_and_near_duplicates():
    rows = [
        asked("a", "g", "Ida", "Same."),
        asked("b", "h", "Ole", "same."),
        asked("c", "i", "Ole"),
        asked("d", "j", "Una"),
    ]
    for seed in range(20):
        out = {d.id: d.split for d in hold_out_queriers(rows, 0.3, seed, near=[0, 1, 0, 3])}
        if out["a"] == "unseen":
            assert out == {"a": "unseen", "b": "test", "c": "test", "d": None}
            break
    else:
        pytest.fail("Ida was never drawn")


def test_unseen_counts_for_no_share():
    rows = [*corpus([1] * 20), *(asked(f"u{i}", f"u{i}", "Una", split="unseen") for i in range(50))]
    out = split_by_group(rows, seed=0, dev=0.1, test=0.1)
    assert collections.Counter(d.split for d in out) == {"train": 16, "dev": 2, "test": 2, "unseen": 50}


def test_rest_of_a_given_unseen_group_is_test():
    rows = [*corpus([1, 1, 1]), asked("u", "g0", "Una", split="unseen")]
    assert split_by_group(rows, 0, 0.3, 0.1)[0].split == "test"
    rows[0] = dialogue("0.0", "g0", split="train")
    with pytest.raises(UserError, match="'0.0' and 'u': found splits train and unseen, .* are in group 'g0'"):
        split_by_group(rows, 0, 0.3, 0.1)


@pytest.mark.parametrize(("split", "fine"), [("test", True), ("train", False), ("dev", False)])
def test_only_test_may_share_a_group_with_unseen(split, fine):
    rows = [asked("a", "g", "Ida", split="unseen"), asked("b", "g", "Ole", split=split)]
    for order in (rows, rows[::-1]):
        if fine:
            check_disjoint(order)
        else:
            with pytest.raises(UserError, match="since they are in group 'g'"):
                check_disjoint(order)


def test_unseen_querier_asks_nowhere_else():
    rows = [asked("a", "g", "Ida", split="unseen"), asked("b", "h", "Ida", split="test")]
    with pytest.raises(UserError, match="'b' and 'a': found splits test and unseen, .* have the querier 'Ida'"):
        check_disjoint(rows)


@settings(max_examples=100, deadline=None)
@given(
    rows=st.lists(st.tuples(st.integers(0, 9), st.integers(0, 30), st.integers(0, 5)), min_size=1, max_size=40),
    share=st.sampled_from([0.0, 0.1, 0.3]),
    seed=st.integers(0, 99),
)
def test_hold_out_properties(rows, share, seed):
    dialogues = [asked(str(i), f"g{g}", f"q{q}", f"text {t}") for i, (g, t, q) in enumerate(rows)]
    queriers = {d.querier for d in dialogues}
    try:
        out = hold_out_queriers(dialogues, share, seed)
    except UserError as error:
        assert "found no dialogue outside the groups" in str(error)
        return
    held = {d.querier for d in out if d.split == "unseen"}
    assert len(held) == (max(1, round(share * len(queriers))) if share else 0)
    label = components(dialogues)
    touched = {label[d.group] for d in dialogues if d.querier in held}
    for d in out:
        expected = "unseen" if d.querier in held else "test" if label[d.group] in touched else None
        assert d.split == expected
    assert [d.split for d in hold_out_queriers(dialogues[::-1], share, seed)][::-1] == [d.split for d in out]
    check_disjoint(split_by_group(out, seed, 0.0, 0.0))


def test_bad_hold_out():
    rows = [asked("a", "g", "Ida"), asked("b", "g", "Ole")]
    with pytest.raises(UserError, match=r"unseen: found 1.5, expected a fraction of the queriers in \[0, 1\)"):
        hold_out_queriers(rows, 1.5, 0)
    with pytest.raises(UserError, match="unseen: found no dialogue outside the groups of the 1 of 2 queriers held out"):
        hold_out_queriers(rows, 0.5, 0)
    with pytest.raises(UserError, match="dialogue 'c': found split 'dev', expected none to hold out queriers"):
        hold_out_queriers([*rows, asked("c", "h", "Una", split="dev")], 0.5, 0)
