"""Contrast masks against their definition, pair by pair."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from qaperso.data.contrast import class_keys, contrast_masks, dialogue_keys, first_anchored

FIELDS = ("querier", "responder", "cluster", "text", "index")


def table(records: list[tuple[int, ...]]) -> dict[str, np.ndarray]:
    return {name: np.array([r[i] for r in records], np.int32) for i, name in enumerate(FIELDS)}


# (querier, responder, cluster, text); few values, so that every kind of coincidence is common.
dialogue = st.tuples(st.integers(-1, 2), st.integers(0, 1), st.integers(0, 1), st.integers(0, 2))
record = st.tuples(dialogue, st.integers(-1, 5)).map(lambda x: (*x[0], x[1]))


def batches(n: int | None = None) -> st.SearchStrategy[dict[str, np.ndarray]]:
    """Dialogues numbered in order, as a batch has them."""
    sizes = {"min_size": n or 1, "max_size": n or 9}
    return st.lists(dialogue, **sizes).map(lambda ds: table([(*d, i) for i, d in enumerate(ds)]))


def tables(n: int | None = None) -> st.SearchStrategy[dict[str, np.ndarray]]:
    return st.lists(record, min_size=n or 1, max_size=n or 9).map(table)


def by_definition(rows: dict, columns: dict) -> tuple[np.ndarray, np.ndarray]:
    n, k = len(rows["index"]), len(columns["index"])
    positives, candidates = np.zeros((n, k), bool), np.zeros((n, k), bool)
    for i in range(n):
        for j in range(k):
            a = {name: int(rows[name][i]) for name in FIELDS}
            b = {name: int(columns[name][j]) for name in FIELDS}
            if a["querier"] < 0 or b["querier"] < 0:
                continue
            if (a["responder"], a["cluster"]) != (b["responder"], b["cluster"]):
                continue
            if a["querier"] != b["querier"]:
                candidates[i, j] = True
            elif a["text"] != b["text"] or a["index"] == b["index"] != -1:
                positives[i, j] = candidates[i, j] = True
    return positives, candidates


def part(columns: dict, span: slice) -> dict:
    return {name: column[span] for name, column in columns.items()}


@settings(max_examples=150, deadline=None)
@given(tables(), tables())
def test_definition(rows, columns):
    for got, expected in zip(contrast_masks(rows, columns), by_definition(rows, columns), strict=True):
        assert got.dtype == np.bool_
        np.testing.assert_array_equal(got, expected)


@settings(max_examples=25, deadline=None)
@given(tables(6), tables(4))
def test_jax_gives_the_same(rows, columns):
    on_device = contrast_masks(*({k: jnp.asarray(v) for k, v in t.items()} for t in (rows, columns)))
    on_host = contrast_masks(rows, columns)
    for got, expected in zip(on_device, on_host, strict=True):
        np.testing.assert_array_equal(np.asarray(got), expected)


@settings(max_examples=60, deadline=None)
@given(batches(), st.integers(1, 4), st.integers(1, 4))
def test_tiles_make_the_whole(batch, height, width):
    n = len(batch["index"])
    tiles = [
        [
            contrast_masks(part(batch, slice(i, i + height)), part(batch, slice(j, j + width)))
            for j in range(0, n, width)
        ]
        for i in range(0, n, height)
    ]
    for which, expected in enumerate(contrast_masks(batch, batch)):
        np.testing.assert_array_equal(np.block([[tile[which] for tile in row] for row in tiles]), expected)


@settings(max_examples=60, deadline=None)
@given(batches())
def test_symmetric_within_a_batch(batch):
    positives, candidates = contrast_masks(batch, batch)
    np.testing.assert_array_equal(positives, positives.T)
    np.testing.assert_array_equal(candidates, candidates.T)
    # The other view of the dialogue itself is always there to be found, unless it is nobody's.
    np.testing.assert_array_equal(np.diagonal(positives), batch["querier"] >= 0)


@settings(max_examples=60, deadline=None)
@given(tables(), tables())
def test_masks_are_transposed_with_their_arguments(rows, columns):
    for one, other in zip(contrast_masks(rows, columns), contrast_masks(columns, rows), strict=True):
        np.testing.assert_array_equal(one, other.T)


def test_written_out():
    #                   ann asks   copy       ann again  bea        bea: other cluster  nobody
    batch = table(
        [(1, 0, 0, 7, 0), (1, 0, 0, 7, 1), (1, 0, 0, 8, 2), (2, 0, 0, 7, 3), (2, 0, 1, 9, 4), (-1, 0, 0, 6, 5)]
    )
    positives, candidates = contrast_masks(batch, batch)
    assert positives.astype(int).tolist() == [
        [1, 0, 1, 0, 0, 0],
        [0, 1, 1, 0, 0, 0],
        [1, 1, 1, 0, 0, 0],
        [0, 0, 0, 1, 0, 0],
        [0, 0, 0, 0, 1, 0],
        [0, 0, 0, 0, 0, 0],
    ]
    assert candidates.astype(int).tolist() == [
        [1, 0, 1, 1, 0, 0],
        [0, 1, 1, 1, 0, 0],
        [1, 1, 1, 1, 0, 0],
        [1, 1, 1, 1, 0, 0],
        [0, 0, 0, 0, 1, 0],
        [0, 0, 0, 0, 0, 0],
    ]


def test_keys_of_dialogues_and_classes_by_hand():
    classes = {
        name: np.array(v, np.int32) for name, v in dict(querier=[3, 4], responder=[0, 5], cluster=[7, 8]).items()
    }
    found = dialogue_keys(np.array([1, -1, 0], np.int32), np.array([6, 6, 2], np.int32), classes)
    assert {name: v.tolist() for name, v in found.items() if name in ("querier", "text", "index")} == {
        "querier": [4, -1, 3],
        "text": [6, 6, 2],
        "index": [0, 1, 2],
    }
    assert found["responder"].tolist()[::2] == [5, 0] and found["cluster"].tolist()[::2] == [8, 7]
    columns = class_keys(classes, np.array([True, False]))
    expected = {"querier": [3, -1], "responder": [0, 5], "cluster": [7, 8], "text": [-1, -1], "index": [-1, -1]}
    assert {name: v.tolist() for name, v in columns.items()} == expected
    assert class_keys(classes)["querier"].tolist() == [3, 4]


@settings(max_examples=60, deadline=None)
@given(batches(), st.lists(st.tuples(*[st.integers(0, 2)] * 3), min_size=1, max_size=6, unique=True))
def test_prototypes_as_columns(batch, classes):
    """Of a class's prototype only the class counts: text -1 is no dialogue's, index -1 is nobody's own."""
    columns = table([(querier, responder, cluster, -1, -1) for responder, querier, cluster in classes])
    positives, candidates = contrast_masks(batch, columns)
    own = np.stack([batch["responder"], batch["querier"], batch["cluster"]], 1)[:, None] == np.array(classes)
    np.testing.assert_array_equal(positives, own.all(-1))
    np.testing.assert_array_equal(candidates, own[:, :, [0, 2]].all(-1) & (batch["querier"] >= 0)[:, None])


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_first_batch_with_an_anchor(data):
    """Within a batch anybody else of the cluster will do: a dialogue's other view is its positive. A prototype has to be there first."""
    classes = data.draw(st.lists(st.tuples(*[st.integers(0, 2)] * 3), min_size=1, max_size=5, unique=True))
    batch = st.lists(st.integers(-1, len(classes) - 1), min_size=1, max_size=4)
    labels = data.draw(st.lists(batch, max_size=4))
    given_classes = {n: np.array(v, np.int32) for n, v in zip(FIELDS, zip(*classes, strict=True), strict=False)}
    given_batches = [(np.array(b, np.int32), np.arange(len(b), dtype=np.int32)) for b in labels]

    def anchored(label: int, others: set[int]) -> bool:
        querier, *near = classes[label]
        return any(classes[o][0] != querier and list(classes[o][1:]) == near for o in others)

    within = [any(anchored(x, set(b) - {-1}) for x in set(b) - {-1}) for b in labels]
    held = [{x for b in labels[:i] for x in b} - {-1} for i in range(len(labels))]
    earlier = [any(x in h and anchored(x, h) for x in set(b) - {-1}) for b, h in zip(labels, held, strict=True)]
    for prototypes, expected in ((False, within), (True, earlier)):
        found = first_anchored(given_batches, given_classes, prototypes)
        assert found == (expected.index(True) if True in expected else None)
