"""The plan: every example once an epoch within the bounds, partners together, and the same whoever asks."""

from __future__ import annotations

import itertools
from pathlib import Path

import helpers
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qaperso import config as configs
from qaperso.data.batches import plan_batch
from qaperso.data.contrast import contrast_masks, dialogue_keys
from qaperso.data.plan import (
    Place,
    Plan,
    Shape,
    contrast_units,
    deal,
    fill,
    partnered,
    partners,
    shuffled_units,
    statistics,
)
from qaperso.step import DEAD_PARAMETER_STEPS
from qaperso.types import RESPONDER, Example

SLOW = settings(max_examples=80, deadline=None)
shapes = st.builds(Shape, st.integers(1, 3), st.integers(12, 30), st.integers(6, 15), st.integers(1, 5))
# (tokens, predictions, responder, cluster, querier, text) of examples that fit a row of `shapes` alone.
kinds = st.tuples(st.integers(2, 12), st.integers(1, 6), *[st.integers(0, 2)] * 3, st.integers(0, 20))
sizes = st.lists(kinds, min_size=1, max_size=40)


def examples_of(kinds: list[tuple[int, ...]]) -> list[Example]:
    out = []
    for i, (n, t, responder, cluster, querier, text) in enumerate(kinds):
        n = max(n, t + 1)
        role, ids = np.full(n, RESPONDER, np.int32), dict(responder=responder, cluster=cluster, querier=querier + 1)
        out.append(
            Example(np.arange(n, dtype=np.int32), role, np.arange(n) >= n - t, **ids, text=text, label=0, index=i)
        )
    return out


def within(rows: list[list[Place]], plan: Plan) -> bool:
    shape = plan.shape
    return len(rows) == shape.rows and all(
        len(row) <= shape.dialogues
        and sum(plan.lengths[p.example] for p in row) <= shape.length
        and sum(plan.targets[p.example] for p in row) <= shape.targets
        for row in rows
    )


@SLOW
@given(sizes, shapes, st.integers(0, 2**32), st.integers(0, 3), st.integers(2, 3))
def test_each_example_once_an_epoch_and_within_bounds(kinds, shape, seed, queriers, each):
    plan = Plan(examples_of(kinds), shape, seed, queriers, each)
    seen: list[Place] = []
    for number in range(20):
        rows = plan.rows(number)
        assert within(rows, plan) and any(rows)
        found = list(itertools.chain(*rows))
        # Epochs follow one another without a gap: what is older stands in an earlier batch or in this one.
        assert not seen or max(p.epoch for p in seen) <= min(p.epoch for p in found)
        seen += found
    epochs = {e: [p.example for p in seen if p.epoch == e] for e in range(seen[-1].epoch + 2)}
    for epoch, found in epochs.items():
        assert len(set(found)) == len(found)
        if epochs.get(epoch + 1):
            assert len(found) == len(kinds)


@SLOW
@given(sizes, shapes, st.integers(0, 99), st.integers(0, 3), st.lists(st.integers(0, 30), min_size=1, max_size=8))
def test_rows_are_a_function_of_their_number(kinds, shape, seed, queriers, numbers):
    examples = examples_of(kinds)
    in_order = Plan(examples, shape, seed, queriers)
    expected = [in_order.rows(number) for number in range(31)]
    any_order = Plan(examples, shape, seed, queriers)
    assert [any_order.rows(number) for number in numbers] == [expected[number] for number in numbers]


def test_a_hundred_kill_points():
    rng = np.random.default_rng(1)
    drawn = zip(rng.integers(2, 13, 60), rng.integers(1, 6, 60), *rng.integers(0, 3, (3, 60)), range(60), strict=True)
    examples, shape, stop = examples_of([tuple(map(int, k)) for k in drawn]), Shape(2, 24, 12, 4), 110
    whole = Plan(examples, shape, 3, 2)
    expected = [whole.rows(number) for number in range(stop)]
    assert max(p.epoch for row in expected[-1] for p in row) > 4
    for start in rng.choice(np.arange(1, stop), 100, replace=False).tolist():
        resumed = Plan(examples, shape, 3, 2)
        assert [resumed.rows(number) for number in range(start, stop)] == expected[start:]


def test_rows_long_gone_are_made_again():
    examples = examples_of([(5, 2, 0, 0, 0, 0)] * 3)
    plan = Plan(examples, Shape(1, 12, 6, 1), 0)
    first = plan.rows(0)
    plan.rows(3000)
    assert plan.rows(0) == first


@SLOW
@given(sizes, st.integers(1, 4), st.integers(2, 4), st.integers(0, 50), st.integers(0, 3))
def test_contrast_units(kinds, queriers, each, seed, epoch):
    classes, texts = [k[2:5] for k in kinds], [k[5] for k in kinds]
    units = list(contrast_units(classes, texts, queriers, each, seed, epoch))
    assert sorted(p.example for unit in units for p in unit) == list(range(len(kinds)))
    able = partners(classes, texts)
    members = {key: [i for i, c in enumerate(classes) if c == key] for key in set(classes)}
    for unit in units:
        (key,) = {classes[p.example] for p in unit}
        assert {p.epoch for p in unit} == {epoch} and len({p.group for p in unit}) == 1
        own = [texts[p.example] for p in unit]
        # Whoever has a partner has one here, and the first two are partners; whoever has none stands alone.
        assert len(set(own)) > 1 and own[0] != own[1] if able[unit[0].example] else len(unit) == 1
        if len({texts[i] for i in members[key]}) == len(members[key]) > 1:
            assert 2 <= len(unit) <= each + 1
    groups: dict[int, list[tuple]] = {}
    for unit in units:
        groups.setdefault(unit[0].group, []).append(classes[unit[0].example])
    assert [g for g, _ in itertools.groupby(u[0].group for u in units)] == list(groups), "groups stand together"
    for found in groups.values():
        assert len(found) <= queriers and len({key[:2] for key in found}) == 1


def test_groups_hold_different_queriers_where_there_are():
    classes = [(0, 0, q) for q in range(4) for _ in range(4)]
    groups: dict[int, set[int]] = {}
    for unit in contrast_units(classes, list(range(16)), 2, 2, 0, 0):
        groups.setdefault(unit[0].group, set()).add(classes[unit[0].example][2])
    assert [len(found) for found in groups.values()] == [2] * 4


def test_partnered_written_out():
    # Three of one text and one of another make one unit: in two, one would hold a single text.
    assert partnered([0, 1, 2, 3], [7, 7, 7, 8], 2) == [[2, 3, 0, 1]]
    assert partnered([0, 1, 2, 3], [7, 7, 8, 8], 2) == [[1, 3], [0, 2]]
    # What is left of five joins the first pair.
    assert partnered([0, 1, 2, 3, 4], [5, 6, 7, 8, 9], 2) == [[0, 1, 4], [2, 3]]
    assert partnered([0, 1, 2, 3, 4], [5, 6, 7, 8, 9], 3) == [[0, 1, 2], [3, 4]]
    assert partnered([0, 1], [7, 7], 2) == [[0], [1]]
    assert partnered([], [], 2) == []


def test_deal():
    assert deal([1, 2, 3, 4, 5], 2) == [[1, 3, 5], [2, 4]]
    assert deal([], 0) == []


def test_order_changes_with_epoch_and_seed():
    def order(seed: int, epoch: int) -> tuple[int, ...]:
        return tuple(unit[0].example for unit in shuffled_units(30, seed, epoch))

    assert len({order(s, e) for s in range(2) for e in range(3)}) == 6


def places(*groups: tuple[int, ...]) -> list[tuple[Place, ...]]:
    return [tuple(Place(i, 0, g) for i in group) for g, group in enumerate(groups)]


def numbers(batches: list) -> list[list[list[int]]]:
    return [[[p.example for p in row] for row in rows] for rows in batches]


def test_fill_written_out():
    lengths, targets = [6, 5, 4, 3, 2], [1] * 5
    alone = places((0,), (1,), (2,), (3,), (4,))
    # 5 does not fit beside 6; of what is ahead, 4 is the largest that does.
    assert numbers(fill(alone, lengths, targets, Shape(1, 10, 9, 9))) == [[[0, 2]], [[1, 3, 4]]]
    assert numbers(fill(alone, lengths, targets, Shape(1, 10, 9, 2))) == [[[0, 2]], [[1, 3]], [[4]]]
    assert numbers(fill(alone, lengths, targets, Shape(1, 10, 2, 9))) == [[[0, 2]], [[1, 3]], [[4]]]
    assert numbers(fill(alone, lengths, targets, Shape(1, 10, 9, 9), look_ahead=1)) == [[[0]], [[1, 2]], [[3, 4]]]
    assert numbers(fill(alone, lengths, targets, Shape(2, 10, 9, 9))) == [[[0, 2], [1, 3, 4]]]
    # A unit stays together though 4 alone would fit beside 6; one that fits no empty batch falls apart.
    assert numbers(fill(places((0,), (2, 1), (4,)), lengths, targets, Shape(1, 10, 9, 9))) == [[[0, 4]], [[1, 2]]]
    assert numbers(
        fill(
            places(
                (0, 1),
            ),
            lengths,
            targets,
            Shape(1, 10, 9, 9),
        )
    ) == [[[0]], [[1]]]


@pytest.mark.parametrize("queriers", [1, 2, 3])
def test_partners_meet_under_the_contrast_plan(queriers):
    rng = np.random.default_rng(0)
    kinds = [
        (int(n), int(n) // 3 + 1, int(r), int(c), int(q), i)
        for i, (n, r, c, q) in enumerate(
            zip(rng.integers(8, 60, 300), *(rng.integers(0, k, 300) for k in (2, 3, 6)), strict=True)
        )
    ]
    examples = examples_of(kinds)
    shape = Shape(4, 128, 96, 8)
    planned = statistics(Plan(examples, shape, 0, queriers), examples, 60)
    shuffled = statistics(Plan(examples, shape, 0), examples, 60)
    assert planned["partner"] == 1.0 and shuffled["partner"] < 0.7
    assert planned["ceiling"] == shuffled["ceiling"] == partners([k[2:5] for k in kinds], range(300)).mean() > 0.9
    assert planned["contrasted"] > shuffled["contrasted"] + 0.2
    assert min(planned["tokens"], shuffled["tokens"]) > 0.9
    if queriers > 1:
        alone = statistics(Plan(examples, shape, 0, 1), examples, 60)
        assert planned["contrasted"] > alone["contrasted"] + 0.1


def test_statistics_written_out():
    # Two partners, one alone; a batch holds two rows of one dialogue.
    examples = examples_of([(10, 1, 0, 0, 0, 0), (10, 1, 0, 0, 0, 1), (5, 1, 0, 0, 1, 2)])
    found = statistics(Plan(examples, Shape(3, 10, 5, 1), 0, 1), examples, 1)
    assert found == {"tokens": 25 / 30, "ceiling": 2 / 3, "partner": 1.0, "contrasted": 1.0}


@pytest.mark.parametrize("name", ["qar_llama3_8b", "qar_llama3_70b", "qar_qwen2_5_7b", "qar_qwen3_8b"])
def test_large_configurations_have_anchors_before_their_heads_are_looked_at(name):
    """Without, training would stop: no gradient reached the heads."""
    c = configs.load(Path(__file__).parents[1] / "configs" / f"{name}.py")
    assert (c.qar.contrast, c.batch.accumulate) == ("in_batch", 1)
    classes = helpers.setting().classes
    shape = Shape(c.batch.rows, c.batch.length, c.batch.targets, c.batch.dialogues)
    for count in (48, 120, 480):
        examples, anchors = helpers.examples(0, count), 0
        plan = Plan(examples, shape, c.seed, c.batch.queriers, c.batch.per_querier)
        for number in range(DEAD_PARAMETER_STEPS):
            contrast = plan_batch(plan, examples, number, 1, c.qar.drop_row, c.qar.contrast).contrast
            keys = dialogue_keys(contrast.label.ravel(), contrast.text.ravel(), classes)
            positives, candidates = contrast_masks(keys, keys)
            anchors += int((positives.any(1) & (candidates & ~positives).any(1)).sum())
        assert anchors >= c.batch.rows
