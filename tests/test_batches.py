"""Batches: packing, the plan, and arrays from which every example can be read back."""

from __future__ import annotations

import dataclasses
import itertools

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qaperso.data.batches import dropped_groups, make_batch, make_examples, plan_batch, sequential, stream
from qaperso.data.clusters import assign
from qaperso.data.contrast import contrast_masks, dialogue_keys
from qaperso.data.load import encode_split
from qaperso.data.plan import Plan, Shape
from qaperso.data.store import make_store
from qaperso.data.synthetic import make_dialogues, make_world, words
from qaperso.data.text import Encoded, encode_dialogue, template_of
from qaperso.errors import UserError
from qaperso.models.tokenizer import word_tokenizer
from qaperso.types import QUERIER, RESPONDER, STRANGER, TEMPLATE, Batch, Dialogue, Example

TOKENIZER = word_tokenizer(words())
TEMPLATE_OF_TOWN = template_of(TOKENIZER)
TOWN = make_dialogues(make_world(0, queriers=4), per_pair=3)[:80]
STORE = make_store(TOWN, assign(TOWN, 3, seed=0))
SHAPE = Shape(rows=2, length=100, targets=60, dialogues=3)


def examples_of(indices: np.ndarray, length: int = 100) -> list[Example]:
    encoded = [
        encode_dialogue(TOKENIZER, TEMPLATE_OF_TOWN, d.turns, d.responder, length=length)
        for d in (TOWN[i] for i in indices)
    ]
    return make_examples(STORE, encoded, indices)


EVERY = examples_of(np.arange(len(TOWN)))
TRAIN = examples_of(STORE.split("train"))
SLOW = settings(max_examples=60, deadline=None)


def assert_equal(a: Batch, b: Batch) -> None:
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(x, y)


# Items (tokens, predictions) that fit a row of `shapes` alone.
items = st.lists(st.tuples(st.integers(2, 12), st.integers(1, 6)), min_size=1, max_size=40)
shapes = st.builds(Shape, st.integers(1, 3), st.integers(12, 30), st.integers(6, 15), st.integers(1, 5))


def toys(sizes: list[tuple[int, int]]) -> list[Example]:
    """Examples whose every token is unlike any other's (one is 0, like padding); the last tokens are predicted."""
    out = []
    for i, (n, t) in enumerate(sizes):
        n = max(n, t + 1)
        role = np.array([TEMPLATE, QUERIER] + [RESPONDER] * n, np.int32)[:n]
        tokens = np.arange(n, dtype=np.int32) + 100 * i
        out.append(Example(tokens, role, np.arange(n) >= n - t, i % 3 + 1, i % 2, i % 4, i, i % 5 - 1, i))
    return out


def test_make_examples_takes_ids_of_the_store():
    indices = np.array([5, 70, 3])
    encoded = [encode_dialogue(TOKENIZER, TEMPLATE_OF_TOWN, TOWN[i].turns, "maren", length=100) for i in indices]
    encoded[1] = []
    for i, example in zip([5, 3], make_examples(STORE, encoded, indices), strict=True):
        assert example.index == i
        ids = (example.querier, example.responder, example.cluster, example.text, example.label)
        assert ids == tuple(int(x[i]) for x in (STORE.row, STORE.responder, STORE.cluster, STORE.text, STORE.label))
        words_of_reply = TOKENIZER.decode(example.tokens[example.predicted][:-1])
        assert words_of_reply == TOKENIZER.decode(TOKENIZER.encode(TOWN[i].reply))


def test_make_examples_keeps_the_count_of_cut_tokens():
    whole = {e.index: e for e in EVERY}
    short = examples_of(np.arange(len(TOWN)), length=40)
    assert any(e.cut for e in short) and not all(e.cut for e in short)
    assert all(len(e) + e.cut == len(whole[e.index]) for e in short)


def fitting(shape: Shape, labels: str = "reply") -> tuple[list[Example], int]:
    def encode(d: Dialogue) -> list[Encoded]:
        bounds = {"length": shape.length, "targets": shape.targets, "labels": labels}
        return encode_dialogue(TOKENIZER, TEMPLATE_OF_TOWN, d.turns, d.responder, **bounds)

    return encode_split(STORE, np.arange(len(TOWN)), encode, shape, labels)


def test_examples_of_a_split_fit_a_row():
    whole, none = fitting(SHAPE)
    assert none == 0
    for example, expected in zip(whole, EVERY, strict=True):
        np.testing.assert_array_equal(example.tokens, expected.tokens)
    predictions = np.array([e.predicted.sum() for e in EVERY])
    bound = int(np.median(predictions))
    kept, left_out = fitting(dataclasses.replace(SHAPE, targets=bound))
    assert [e.index for e in kept] == np.flatnonzero(predictions <= bound).tolist()
    assert left_out == (predictions > bound).sum() > 0


def test_with_every_turn_a_label_each_that_fits_nowhere_is_counted():
    assert any(sum(t.speaker == d.responder for t in d.turns) > 1 for d in TOWN)
    assert fitting(SHAPE, "all")[1] == 0
    ends = TEMPLATE_OF_TOWN.end[0]
    turns = [sum(e.predicted[e.tokens == ends]) for e in fitting(SHAPE, "all")[0]]
    assert sum(turns) == sum(t.speaker == d.responder for d in TOWN for t in d.turns)
    bound = int(np.median([e.predicted.sum() for e in EVERY]))
    kept, left_out = fitting(dataclasses.replace(SHAPE, targets=bound), "all")
    assert left_out == sum(turns) - sum(sum(e.predicted[e.tokens == ends]) for e in kept) > 0


@pytest.mark.parametrize("bounds", [{"length": 5}, {"targets": 3}])
def test_nothing_fits(bounds):
    shape = dataclasses.replace(SHAPE, **bounds)
    found = rf"^none of 80 dialogues fits batch\.length={shape.length}, less .*, and batch\.targets={shape.targets}; raise them$"
    with pytest.raises(UserError, match=found):
        fitting(shape)


def read_back(batch: Batch, rows: list[list[Example]], shape: Shape) -> None:
    """Every array of the batch, against the examples of its rows; `querier` is left to the caller."""
    x = batch.inputs
    assert x.tokens.shape == (shape.rows, shape.length) and x.present.shape == (shape.rows, shape.dialogues)
    for r in range(shape.rows):
        row = rows[r] if r < len(rows) else []
        used = sum(map(len, row))
        assert not x.segment[r, used:].any() and not x.tokens[r, used:].any() and not x.role[r, used:].any()
        np.testing.assert_array_equal(x.attend[r], np.arange(shape.length) < used)
        np.testing.assert_array_equal(x.present[r], np.arange(shape.dialogues) < len(row))
        weighted = batch.weight[r] > 0
        assert set(batch.weight[r].tolist()) <= {0.0, 1.0}
        place, target = batch.target_index[r][weighted], batch.target[r][weighted]
        assert len(place) == sum(int(e.predicted.sum()) for e in row)
        np.testing.assert_array_equal(x.tokens[r, place + 1], target)
        np.testing.assert_array_equal(x.segment[r, place], x.segment[r, place + 1])
        for k, e in enumerate(row):
            span = np.flatnonzero(x.segment[r] == k + 1)
            np.testing.assert_array_equal(x.tokens[r, span], e.tokens)
            np.testing.assert_array_equal(x.role[r, span], e.role)
            np.testing.assert_array_equal(x.position[r, span], np.arange(len(e)))
            own = place[x.segment[r, place] == k + 1]
            np.testing.assert_array_equal(x.position[r, own] + 1, np.flatnonzero(e.predicted))
            assert (x.responder[r, k], x.cluster[r, k]) == (e.responder, e.cluster)


@SLOW
@given(items, shapes)
def test_examples_can_be_read_back(sizes, shape):
    examples = toys(sizes)
    seen: list[int] = []
    for batch, numbers in sequential(examples, shape):
        rows = [[examples[i] for i in row] for row in numbers]
        assert len(rows) == shape.rows and any(rows) and batch.contrast is None
        read_back(batch, rows, shape)
        for r, row in enumerate(rows):
            assert batch.inputs.querier[r, : len(row)].tolist() == [e.querier for e in row]
        seen += [e.index for row in rows for e in row]
    assert sorted(seen) == list(range(len(examples)))


def test_sequential_over_the_town():
    seen = []
    for batch, numbers in sequential(EVERY, SHAPE):
        rows = [[EVERY[i] for i in row] for row in numbers]
        read_back(batch, rows, SHAPE)
        seen += [e.index for row in rows for e in row]
    assert sorted(seen) == list(range(len(TOWN)))


def test_batch_written_out():
    a, b = toys([(4, 2), (3, 1)])
    batch = make_batch([[a, b]], Shape(2, 9, 4, 3))
    x = batch.inputs
    assert x.tokens.tolist() == [[0, 1, 2, 3, 100, 101, 102, 0, 0], [0] * 9]
    assert x.segment.tolist() == [[1, 1, 1, 1, 2, 2, 2, 0, 0], [0] * 9]
    assert x.position.tolist() == [[0, 1, 2, 3, 0, 1, 2, 0, 0], [0] * 9]
    assert x.role.tolist() == [[0, 2, 1, 1, 0, 2, 1, 0, 0], [0] * 9]
    assert x.querier.tolist() == [[1, 2, 0], [0, 0, 0]]
    assert x.attend.tolist() == [[True] * 7 + [False] * 2, [False] * 9]
    assert x.present.tolist() == [[True, True, False], [False, False, False]]
    assert batch.target_index.tolist() == [[1, 2, 5, 0], [0] * 4]
    assert batch.target.tolist() == [[2, 3, 102, 0], [0] * 4]
    assert batch.weight.tolist() == [[1, 1, 1, 0], [0] * 4]


def test_first_token_is_never_predicted():
    (example,) = toys([(4, 3)])
    example = dataclasses.replace(example, predicted=np.ones(4, bool))
    batch = make_batch([[example]], Shape(1, 4, 4, 1))
    assert (batch.target_index[0].tolist(), batch.weight[0].tolist()) == ([0, 1, 2, 0], [1, 1, 1, 0])


@pytest.mark.parametrize("stranger", [None, True])
def test_contrast_of_a_batch(stranger):
    """Masks of the keys against the definition by examples; padding, other classes and rowed dialogues stay out."""
    rows = [EVERY[0:3], EVERY[3:5], EVERY[12:15], EVERY[24:27]]
    shape = Shape(5, 200, 150, 4)
    flags = None if stranger is None else [[(r + k) % 3 > 0 for k in range(len(row))] for r, row in enumerate(rows)]
    contrast = make_batch(rows, shape, flags, "in_batch").contrast
    slots: list[Example | None] = [None] * (shape.rows * shape.dialogues)
    for r, row in enumerate(rows):
        for k, e in enumerate(row):
            if e.label >= 0 and (flags is None or flags[r][k]):
                slots[r * shape.dialogues + k] = e
    assert contrast.label.reshape(-1).tolist() == [-1 if e is None else e.label for e in slots]
    positives, candidates = np.zeros((2, len(slots), len(slots)), bool)
    for (i, a), (j, b) in itertools.product(enumerate(slots), repeat=2):
        if a is not None and b is not None and (a.responder, a.cluster) == (b.responder, b.cluster):
            positives[i, j] = a.querier == b.querier and (i == j or a.text != b.text)
            candidates[i, j] = positives[i, j] or a.querier != b.querier
    keys = dialogue_keys(contrast.label.reshape(-1), contrast.text.reshape(-1), STORE.classes)
    found = contrast_masks(keys, keys)
    np.testing.assert_array_equal(found[0], positives)
    np.testing.assert_array_equal(found[1], candidates)
    assert (candidates & ~positives).any() and (positives & ~np.eye(len(slots), dtype=bool)).any()


def test_no_responder_token_no_contrast():
    example = dataclasses.replace(toys([(4, 2)])[0], label=2)
    silent = dataclasses.replace(example, role=np.full(4, QUERIER, np.int32))
    labels = make_batch([[example, silent]], Shape(1, 8, 4, 2), None, "prototypes").contrast.label
    assert labels.tolist() == [[2, -1]]


@pytest.mark.parametrize("contrast", ["none", "prototypes", "in_batch"])
def test_micro_batches_are_the_rows_of_the_plan(contrast):
    plan = Plan(TRAIN, SHAPE, seed=1)
    for step in (0, 4):
        batch = plan_batch(plan, TRAIN, step, 3, None, contrast)
        rows = [[[TRAIN[p.example] for p in row] for row in plan.rows(3 * step + k)] for k in range(3)]
        for k in range(3):
            expected = make_batch(rows[k], SHAPE, None, contrast)
            assert_equal(jax.tree.map(lambda x, k=k: x[k], batch), expected)
        whole = make_batch(list(itertools.chain(*rows)), dataclasses.replace(SHAPE, rows=3 * SHAPE.rows))
        joined = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), batch.replace(contrast=None))
        assert_equal(joined, whole)


@pytest.mark.parametrize("queriers", [0, 2])
@pytest.mark.parametrize("rate", [0.0, 0.4, 1.0])
def test_dropped_groups_get_row_zero_and_only_they_are_contrasted(rate, queriers):
    examples = EVERY
    plan = Plan(examples, SHAPE, seed=5, queriers=queriers)
    outcomes = set()
    for step in range(len(examples) // SHAPE.rows):
        batch = plan_batch(plan, examples, step, 2, rate, "prototypes")
        queriers, labels = (x.reshape(-1, SHAPE.dialogues) for x in (batch.inputs.querier, batch.contrast.label))
        for r, row in enumerate([*plan.rows(2 * step), *plan.rows(2 * step + 1)]):
            for k, place in enumerate(row):
                example = examples[place.example]
                dropped = dropped_groups(5, place.epoch, len(examples), rate)[place.group]
                assert queriers[r, k] == (STRANGER if dropped else example.querier)
                assert labels[r, k] == (example.label if dropped else -1)
                outcomes.add((bool(dropped), example.label >= 0))
            assert (labels[r, len(row) :] == -1).all()
    chosen = {0.0: {False}, 0.4: {False, True}, 1.0: {True}}[rate]
    assert outcomes == set(itertools.product(chosen, {False, True}))


def test_share_of_dropped_groups():
    n, rate = 40_000, 0.15
    first, second = (dropped_groups(3, epoch, n, rate) for epoch in (0, 1))
    for flags, expected in ((first, rate), (second, rate), (first & second, rate**2)):
        assert abs(flags.mean() - expected) < 4 * np.sqrt(expected * (1 - expected) / n)
    np.testing.assert_array_equal(dropped_groups(3, 0, n, rate), first)
    assert not np.array_equal(dropped_groups(4, 0, n, rate), first)


def test_without_a_drop_rate_nobody_is_a_stranger():
    batch = plan_batch(Plan(TRAIN, SHAPE, seed=5), TRAIN, 0, 1, None, "prototypes")
    present = batch.inputs.present
    assert (batch.inputs.querier[present] > 0).all() and (batch.contrast.label[present] >= 0).all()


def test_resumed_stream_is_the_tail_of_the_stream():
    def run(start: int, stop: int) -> list[Batch]:
        plan = Plan(TRAIN, SHAPE, 7, 2)
        return list(stream(lambda number: plan_batch(plan, TRAIN, number, 2, 0.3, "in_batch"), start, stop))

    steps = len(TRAIN) // (2 * SHAPE.rows)
    full = run(0, steps)
    assert len(full) == steps
    plan = Plan(TRAIN, SHAPE, 7, 2)
    assert any(p.epoch for row in plan.rows(2 * steps - 1) for p in row), "the stream should go past the first epoch"
    for step, batch in enumerate(full):
        assert_equal(batch, plan_batch(plan, TRAIN, step, 2, 0.3, "in_batch"))
    starts = {0, steps, *np.random.default_rng(0).integers(1, steps, 100).tolist()}
    for start in starts:
        for resumed, expected in zip(run(start, steps), full[start:], strict=True):
            assert_equal(resumed, expected)
