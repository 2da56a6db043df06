from __future__ import annotations

import collections
import dataclasses
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qaperso.data.splits import (
    Columns,
    check_columns,
    check_disjoint,
    draw_by_group,
    draw_by_time,
    draw_queriers,
    split_by_group,
    split_by_time,
)
from qaperso.errors import UserError
from qaperso.types import Dialogue, Turn

# Long enough that nobody says it by chance.
LONG = "Well, is there any bread left on the shelf today?"


def dialogue(name: str, group: str, text: str | None = None, split: str | None = None) -> Dialogue:
    turns = (Turn("Ida", LONG), Turn("Noor", f"reply {name}" if text is None else text))
    return Dialogue(name, "Noor", "Ida", turns, group, split=split)


def corpus(sizes: list[int]) -> list[Dialogue]:
    return [dialogue(f"{g}.{i}", f"g{g}") for g, size in enumerate(sizes) for i in range(size)]


def components(dialogues: list[Dialogue]) -> dict[str, str]:
    """Group -> first name of its connected component under shared texts, by repeated relabelling."""
    label = {d.group: d.group for d in dialogues}
    text = {d.id: [t.text for t in d.turns] for d in dialogues}
    changed = True
    while changed:
        changed = False
        for a in dialogues:
            for b in dialogues:
                if text[a.id] == text[b.id] and label[a.group] < label[b.group]:
                    label[b.group] = label[a.group]
                    changed = True
        for g in label:
            if label[label[g]] < label[g]:
                label[g] = label[label[g]]
                changed = True
    return label


def test_exact_shares_for_equal_groups():
    out = split_by_group(corpus([5] * 20), seed=3, dev=0.1, test=0.2)
    assert collections.Counter(d.split for d in out) == {"train": 70, "dev": 10, "test": 20}
    check_disjoint(out)


def test_three_groups_fill_three_splits():
    out = split_by_group(corpus([1, 1, 1]), seed=0, dev=0.01, test=0.01)
    assert sorted(d.split for d in out) == ["dev", "test", "train"]


def test_no_split_that_was_not_asked_for():
    out = split_by_group(corpus([4, 1, 3]), seed=0, dev=0.0, test=0.0)
    assert {d.split for d in out} == {"train"}


def test_seed_changes_the_draw():
    draws = {tuple(d.split for d in split_by_group(corpus([1] * 12), seed, 0.25, 0.25)) for seed in range(20)}
    assert len(draws) > 10


def test_draw_is_pinned():
    # A changed draw would silently move test dialogues of published results into training.
    out = split_by_group(corpus([2, 1, 3, 1, 2, 1]), seed=7, dev=0.2, test=0.2)
    # Worked out by hand: hash order g2 g1 g3 g5 g0 g4, shares 6, 2, 2 of 10.
    assert {d.group: d.split for d in out} == {
        "g2": "train",
        "g1": "train",
        "g3": "train",
        "g5": "dev",
        "g0": "test",
        "g4": "train",
    }


def test_groups_with_equal_texts_are_one():
    rows = [
        dialogue("a", "g0", "Same."),
        dialogue("b", "g1", " ｓａｍｅ.\t"),  # equal after NFKC, case folding and stripping
        dialogue("c", "g1", "bridge"),
        dialogue("d", "g2", "Bridge"),
        dialogue("e", "g3"),
        dialogue("f", "g4"),
    ]
    for seed in range(10):
        out = split_by_group(rows, seed, dev=0.2, test=0.2)
        assert len({d.split for d in out[:4]}) == 1
        assert {d.split for d in out} == {"train", "dev", "test"}
        check_disjoint(out)


def test_given_splits_stay_and_extend_to_their_groups():
    rows = [*corpus([2, 2, 2, 2]), dialogue("x", "g0", split="test"), dialogue("y", "h", split="dev")]
    for seed in range(10):
        out = split_by_group(rows, seed, dev=0.1, test=0.1)
        assert {d.split for d in out if d.group == "g0"} == {"test"}
        assert out[-1].split == "dev"
        # Both small shares are more than filled by what was given.
        assert {d.split for d in out if d.group in ("g1", "g2", "g3")} == {"train"}


def test_result_is_the_input_with_splits():
    rows = corpus([2, 1, 1])
    out = split_by_group(rows, seed=0, dev=0.3, test=0.3)
    assert [dataclasses.replace(d, split=None) for d in out] == rows


ROWS = st.lists(st.tuples(st.integers(0, 7), st.integers(0, 25)), min_size=3, max_size=40)
SHARE = st.sampled_from([0.0, 0.05, 0.1, 0.25, 0.4])


@settings(max_examples=150, deadline=None)
@given(rows=ROWS, seed=st.integers(0, 2**31), dev=SHARE, test=SHARE, shuffle=st.randoms(use_true_random=False))
def test_split_properties(rows, seed, dev, test, shuffle):
    dialogues = [dialogue(str(i), f"g{g}", f"text {text}") for i, (g, text) in enumerate(rows)]
    label = components(dialogues)
    share = {"train": 1 - dev - test, "dev": dev, "test": test}
    asked = {name for name in share if share[name] > 0}
    size = collections.Counter(label[d.group] for d in dialogues)
    if len(size) < len(asked):
        with pytest.raises(UserError, match=f"found {len(size)} groups without a split"):
            split_by_group(dialogues, seed, dev, test)
        return
    out = split_by_group(dialogues, seed, dev, test)
    check_disjoint(out)
    assert {d.split for d in out} == asked
    assert all(len({d.split for d in out if label[d.group] == g}) == 1 for g in size)
    count = collections.Counter(d.split for d in out)
    most = max(size.values())
    for name in asked:
        assert count[name] - share[name] * len(out) < most + 1e-9
        if min(share[other] for other in asked) * len(out) >= most:
            assert share[name] * len(out) - count[name] <= most + 1e-9
    mixed = list(dialogues)
    shuffle.shuffle(mixed)
    again = {d.id: d.split for d in split_by_group(mixed, seed, dev, test)}
    assert again == {d.id: d.split for d in out}


def test_large_uneven_corpus_comes_near_the_shares():
    sizes = random.Random(5).choices(range(1, 60), k=300)
    out = split_by_group(corpus(sizes), seed=1, dev=0.1, test=0.1)
    count = collections.Counter(d.split for d in out)
    assert abs(count["dev"] / len(out) - 0.1) < 0.01 and abs(count["test"] / len(out) - 0.1) < 0.01


@pytest.mark.parametrize(
    ("dev", "test", "expected"),
    [
        (-0.1, 0.1, "dev: found -0.1, expected a fraction in [0, 1)"),
        (0.1, 1.0, "test: found 1.0, expected a fraction in [0, 1)"),
        (0.5, 0.5, "dev + test: found 1.0, expected a fraction in [0, 1)"),
        (float("nan"), 0.1, "dev: found nan, expected a fraction in [0, 1)"),
    ],
)
def test_bad_fractions(dev, test, expected):
    with pytest.raises(UserError) as caught:
        split_by_group(corpus([1, 1, 1]), 0, dev, test)
    assert str(caught.value).startswith(expected)


def test_too_few_groups():
    with pytest.raises(UserError, match=r"found 2 groups .* expected at least 3 .*; give --dev 0, or add groups"):
        split_by_group(corpus([9, 9]), 0, 0.1, 0.1)
    with pytest.raises(UserError, match=r"found 0 groups .* expected at least 1 to fill train"):
        split_by_group([], 0, 0.0, 0.0)
    given_train = [dialogue("a", "g", split="train"), dialogue("b", "h")]
    with pytest.raises(UserError, match=r"found 1 groups .* expected at least 2 to fill dev, test"):
        split_by_group(given_train, 0, 0.1, 0.1)


def test_group_given_two_splits():
    rows = [dialogue("a", "g", split="train"), dialogue("b", "g", split="test")]
    with pytest.raises(
        UserError, match="'a' and 'b': found splits train and test, expected one, since they are in group"
    ):
        split_by_group(rows, 0, 0.1, 0.1)
    with pytest.raises(
        UserError, match="'a' and 'b': found splits train and test, expected one, since they are in group"
    ):
        check_disjoint(rows)


def test_equal_texts_given_two_splits():
    rows = [dialogue("a", "g", "Same.", split="train"), dialogue("b", "h", "same.", split="test")]
    with pytest.raises(UserError, match="'a' and 'b'.*groups 'g' and 'h' that share dialogue texts"):
        split_by_group(rows, 0, 0.1, 0.1)
    with pytest.raises(UserError, match="'a' and 'b': found splits train and test.*have the same text"):
        check_disjoint(rows)
    check_disjoint([rows[0], dataclasses.replace(rows[1], split="train")])


def test_what_anybody_says_joins_nothing():
    """A year of a chat in which "ok?", "sure" is said every day: every day stays a group of its own."""
    days = [
        Dialogue(f"{day}.{k}", "Noor", "Ida", (Turn("Ida", said), Turn("Noor", "sure")), f"day {day}")
        for day in range(365)
        for k, said in enumerate(("ok?", f"{day} is the number that I was told this morning, is it right?"))
    ]
    out = split_by_group(days, seed=0, dev=0.1, test=0.1)
    assert all(abs(n - share) <= 2 for n, share in zip(_sizes(out), (584, 73, 73), strict=True))
    check_disjoint(out)
    # Forty characters are nobody's chance.
    same = [dataclasses.replace(d, turns=(Turn("Ida", "ok?" * 11), Turn("Noor", "sure!!"))) for d in days]
    assert sorted(_sizes(split_by_group([*same, dialogue("z", "z")], 0, 0.0, 0.1))) == [0, 1, 730]


def _sizes(dialogues: list[Dialogue]) -> list[int]:
    return [sum(d.split == split for d in dialogues) for split in ("train", "dev", "test")]


def test_turn_borders_are_part_of_the_text():
    one = Dialogue("a", "Noor", "Ida", (Turn("Ida", f"{LONG} y"), Turn("Noor", "z")), "g", split="train")
    other = Dialogue("b", "Noor", "Ida", (Turn("Ida", LONG), Turn("Noor", "y z")), "h", split="test")
    check_disjoint([one, other])


def test_unknown_and_missing_splits():
    with pytest.raises(UserError, match="dialogue 'a': found split 'tset', expected one of .*; did you mean 'test'?"):
        split_by_group([dialogue("a", "g", split="tset")], 0, 0.0, 0.0)
    with pytest.raises(UserError, match="dialogue 'a': found no split, expected one of train, dev, test"):
        check_disjoint([dialogue("a", "g")])


def asked(name: str, group: str, querier: str, text: str | None = None, **more) -> Dialogue:
    turns = (Turn(querier, LONG), Turn("Noor", f"reply {name}" if text is None else text))
    return Dialogue(name, "Noor", querier, turns, group, **more)


def test_near_duplicates_join_groups():
    rows = corpus([1] * 8)
    near = np.array([0, 1, 0, 3, 3, 5, 1, 7])
    for seed in range(10):
        out = split_by_group(rows, seed, dev=0.25, test=0.25, near=near)
        assert out[0].split == out[2].split and out[3].split == out[4].split and out[1].split == out[6].split
        check_disjoint(out, near)


def test_leak_check_finds_near_duplicates():
    rows = [dialogue("a", "g", split="train"), dialogue("b", "h", split="dev")]
    check_disjoint(rows)
    with pytest.raises(UserError, match="'a' and 'b': found splits train and dev, .* since they are near-duplicates"):
        check_disjoint(rows, near=[0, 0])
    with pytest.raises(UserError, match="'a' and 'b': found splits train and dev"):
        split_by_group(rows, 0, 0.1, 0.1, near=[0, 0])


def test_newest_to_test_then_dev():
    # Groups of two, one second apart; the group's latest dialogue counts.
    rows = [asked(f"{g}.{i}", f"g{g}", "Ida", time=float(g + 100 * i)) for g in range(10) for i in range(2)]
    random.Random(0).shuffle(rows)
    out = split_by_time(rows, dev=0.2, test=0.3)
    splits = {d.group: d.split for d in out}
    assert [splits[f"g{g}"] for g in range(10)] == ["train"] * 5 + ["dev"] * 2 + ["test"] * 3
    assert [dataclasses.replace(d, split=None) for d in out] == rows
    check_disjoint(out)


def test_equal_times_go_by_name():
    rows = [asked(name, name, "Ida", time=1.0) for name in "cab"]
    assert {d.group: d.split for d in split_by_time(rows, 0.3, 0.3)} == {"a": "test", "b": "dev", "c": "train"}


def test_unknown_time():
    rows = [asked("a", "g", "Ida", time=1.0), asked("b", "g", "Ida"), asked("c", "h", "Ida"), asked("d", "i", "Ida")]
    with pytest.raises(UserError, match="group 'h': found no time, expected one to split by time"):
        split_by_time(rows, 0.3, 0.3)
    timed = [dataclasses.replace(d, time=2.0) if d.group != "g" else d for d in rows]
    assert split_by_time(timed, 0.0, 0.25)[0].split == "train"


@settings(max_examples=150, deadline=None)
@given(
    rows=st.lists(st.tuples(st.integers(0, 7), st.integers(0, 25), st.integers(0, 9)), min_size=3, max_size=40),
    dev=SHARE,
    test=SHARE,
)
def test_split_by_time_properties(rows, dev, test):
    dialogues = [asked(str(i), f"g{g}", "Ida", f"text {t}", time=float(s)) for i, (g, t, s) in enumerate(rows)]
    label = components(dialogues)
    size = collections.Counter(label[d.group] for d in dialogues)
    share = {"train": 1 - dev - test, "dev": dev, "test": test}
    wanted = {name for name in share if share[name] > 0}
    if len(size) < len(wanted):
        with pytest.raises(UserError, match=f"found {len(size)} groups without a split"):
            split_by_time(dialogues, dev, test)
        return
    out = split_by_time(dialogues, dev, test)
    check_disjoint(out)
    assert {d.split for d in out} == wanted
    latest = {root: max(d.time for d in dialogues if label[d.group] == root) for root in size}
    bounds = {s: [latest[label[d.group]] for d in out if d.split == s] for s in wanted}
    for older, newer in (("train", "dev"), ("dev", "test"), ("train", "test")):
        if older in bounds and newer in bounds:
            assert max(bounds[older]) <= min(bounds[newer])


def test_columns_need_no_records():
    plain = Columns(
        ids="abcd", groups=["g", "g", "h", "i"], texts=[b"1", b"2", b"3", b"4"], queriers="xyxy",
        times=[1.0, None, 2.0, 3.0], splits=[None, None, None, "dev"],
    )  # fmt: skip
    by_time = draw_by_time(plain, 0.25, 0.25)
    assert by_time == ["train", "train", "test", "dev"]
    check_columns(dataclasses.replace(plain, splits=by_time))
    by_group = draw_by_group(plain, 0, 0.25, 0.25)
    assert by_group[0] == by_group[1] and set(by_group) == {"train", "dev", "test"}
    with pytest.raises(UserError, match="dialogue 'd': found split 'dev', expected none"):
        draw_queriers(plain, 0.5, 0)
