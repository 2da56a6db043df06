"""Names to numbers and back; classes from training only."""

from __future__ import annotations

import collections
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qaperso.data.store import NOBODY, Registry, evenly, make_store, without
from qaperso.errors import UserError
from qaperso.types import STRANGER, Dialogue, Turn


def dialogue(i: int, querier: str, responder: str = "maren", split: str = "train", text: str = "aye") -> Dialogue:
    turns = (Turn(querier, "well?"), Turn(responder, text))
    return Dialogue(f"d{i}", responder, querier, turns, f"g{i}", split=split)


NAMES = ["ann", "bea", "cyd", "dan"]
entry = st.tuples(
    st.sampled_from(NAMES),
    st.sampled_from(["maren", "olaf"]),
    st.sampled_from(["train", "train", "dev", "test"]),
    st.sampled_from(["aye", "no", "go"]),
    st.integers(0, 2),
)
entries = st.lists(entry, min_size=1, max_size=20).filter(lambda es: any(e[2] == "train" for e in es))


def make(es: list[tuple], spare: int = 0):
    return make_store([dialogue(i, *e[:4]) for i, e in enumerate(es)], np.array([e[4] for e in es]), spare)


@given(st.lists(st.text(), unique=True), st.lists(st.text(), unique=True), st.integers(0, 9))
def test_registry_round_trip(queriers, responders, spare):
    registry = Registry(tuple(queriers), tuple(responders), spare)
    assert Registry.from_json(json.loads(json.dumps(registry.to_json()))) == registry


def test_rows_of_names():
    registry = Registry(("ann", "bea"), ("maren",), spare=3)
    assert [registry.row(name) for name in ("stranger", "ann", "bea")] == [STRANGER, 1, 2] == [0, 1, 2]
    assert registry.rows == 6
    assert Registry((), ("maren",)).rows == 1


def test_unknown_querier():
    registry = Registry(("Marta", "Jon"), ("maren",), spare=2)
    with pytest.raises(UserError, match=r"^querier 'Martha' is not known to this run; did you mean 'Marta'\?$"):
        registry.row("Martha")
    with pytest.raises(UserError, match=r"did you mean 'stranger'\?$"):
        registry.row("Stranger")
    with pytest.raises(UserError, match=r"^querier 'xyz' is not known to this run; valid: Jon, Marta, stranger$"):
        registry.row("xyz")


def test_written_out():
    es = [
        ("bea", "maren", "train", "aye", 1),
        ("ann", "maren", "train", "no", 0),
        ("ann", "maren", "train", "aye", 0),
        ("ann", "maren", "test", "go", 0),
        ("ann", "maren", "dev", "go", 1),
        ("cyd", "olaf", "dev", "go", 1),
    ]
    store = make(es, spare=2)
    assert store.registry == Registry(("ann", "bea"), ("maren", "olaf"), 2)
    assert store.row.tolist() == [2, 1, 1, 1, 1, 0]
    assert store.responder.tolist() == [0, 0, 0, 0, 0, 1]
    assert store.cluster.tolist() == [1, 0, 0, 0, 1, 1]
    assert store.text.tolist() == [0, 1, 0, 2, 2, 2]
    assert {k: v.tolist() for k, v in store.classes.items()} == {
        "responder": [0, 0],
        "querier": [1, 2],
        "cluster": [0, 1],
    }
    assert store.label.tolist() == [1, 0, 0, 0, -1, -1]
    assert {name: store.split(name).tolist() for name in ("train", "dev", "test")} == {
        "train": [0, 1, 2],
        "dev": [4, 5],
        "test": [3],
    }
    for array in (store.row, store.responder, store.cluster, store.text, store.label, *store.classes.values()):
        assert array.dtype == np.int32


@settings(max_examples=60, deadline=None)
@given(entries)
def test_classes_and_labels(es):
    store = make(es)
    trained = {(r, q, c) for q, r, split, _, c in es if split == "train"}
    who = {store.registry.row(querier): querier for _, querier, _ in trained}
    names = [
        (store.registry.responders[r], who[q], c)
        for r, q, c in zip(*(store.classes[k].tolist() for k in ("responder", "querier", "cluster")), strict=True)
    ]
    assert set(names) == trained and len(names) == len(trained)
    for (querier, responder, _, _, cluster), label in zip(es, store.label.tolist(), strict=True):
        assert (names[label] if label >= 0 else None) == (
            (responder, querier, cluster) if (responder, querier, cluster) in trained else None
        )


@settings(max_examples=60, deadline=None)
@given(entries, st.randoms(use_true_random=False))
def test_order_of_dialogues_does_not_matter(es, random):
    order = list(range(len(es)))
    random.shuffle(order)
    store, other = make(es), make([es[i] for i in order])
    assert store.registry == other.registry
    for name, column in store.classes.items():
        np.testing.assert_array_equal(column, other.classes[name])
    for name in ("row", "responder", "cluster", "label"):
        np.testing.assert_array_equal(getattr(store, name)[order], getattr(other, name))


@settings(max_examples=60, deadline=None)
@given(entries)
def test_other_splits_add_no_rows_and_no_classes(es):
    train = [e for e in es if e[2] == "train"]
    store, alone = make(es), make(train)
    assert store.registry.queriers == alone.registry.queriers
    for key in ("querier", "cluster"):
        assert collections.Counter(store.classes[key].tolist()) == collections.Counter(alone.classes[key].tolist())
    for (querier, *_), row in zip(es, store.row.tolist(), strict=True):
        assert (row == STRANGER) == (querier not in alone.registry.queriers)


@settings(max_examples=60, deadline=None)
@given(entries)
def test_equal_texts_share_an_id(es):
    ids = make(es).text
    texts = [e[3] for e in es]
    np.testing.assert_array_equal(ids[:, None] == ids, [[a == b for a in texts] for b in texts])


def test_text_is_every_turn_and_not_who_speaks():
    def store(*turns: tuple[Turn, ...]):
        ds = [Dialogue(f"d{i}", "maren", "ann", t, f"g{i}", split="train") for i, t in enumerate(turns)]
        return make_store(ds, np.zeros(len(ds), np.int32))

    a, b, other = ((Turn(who, said), Turn("maren", "aye")) for who, said in (("ann", "x"), ("bea", "x"), ("ann", "y")))
    assert store(a, b, other).text.tolist() == [0, 0, 1]


def test_no_training_split():
    with pytest.raises(
        UserError, match=r"^no dialogue of 2 is in the training split; prepare the data with lower --dev and --test$"
    ):
        make([("ann", "maren", "dev", "aye", 0), ("ann", "maren", "test", "aye", 0)])


def test_a_forgotten_querier_leaves_a_free_row() -> None:
    registry = Registry(("ann", "bea", "cyd"), ("maren",), spare=1)
    assert registry.free_row() == 4 and registry.forgotten == () and registry.known == ("ann", "bea", "cyd")
    less = registry.called(2, NOBODY)
    assert (less.known, less.forgotten, less.free_row(), less.rows) == (("ann", "cyd"), (2,), 2, registry.rows)
    assert [less.row(name) for name in ("stranger", "ann", "cyd")] == [0, 1, 3]
    for gone in ("bea", NOBODY):
        with pytest.raises(UserError, match=r"is not known to this run"):
            less.row(gone)
    assert less.called(2, "dan").row("dan") == 2
    full = registry.called(4, "dan")
    assert full.free_row() is None and full.rows == registry.rows and full.spare == 0
    # A row further on leaves the ones before it free.
    wide = Registry(("ann",), ("maren",), spare=3).called(4, "dan")
    assert (wide.forgotten, wide.free_row(), wide.rows, wide.spare) == ((2, 3), 2, 5, 0)
    assert Registry.from_json(json.loads(json.dumps(wide.to_json()))) == wide


@settings(max_examples=50, deadline=None)
@given(entries, st.data())
def test_without_somebody_nobody_else_changes(es: list[tuple], data: st.DataObject) -> None:
    store = make(es)
    row = data.draw(st.integers(1, len(store.registry.queriers)))
    name = store.registry.queriers[row - 1]
    less = without(store, [row])
    kept = [i for i, d in enumerate(store.dialogues) if d.querier != name]
    assert less.dialogues == tuple(store.dialogues[i] for i in kept)
    for key in ("row", "responder", "cluster", "text", "label"):
        np.testing.assert_array_equal(getattr(less, key), getattr(store, key)[kept])
    for key, value in store.classes.items():
        others = store.classes["querier"] != row
        np.testing.assert_array_equal(less.classes[key], np.where(others, value, 0))
    assert less.registry == store.registry.called(row, NOBODY)
    assert without(store, []) is store


@given(count=st.integers(0, 300), limit=st.none() | st.integers(0, 400))
def test_evenly(count: int, limit: int | None) -> None:
    places = evenly(count, limit)
    wanted = count if limit is None else min(count, limit)
    assert len(set(places.tolist())) == len(places) == wanted
    assert places.tolist() == sorted(places) and all(0 <= i < count for i in places)
    if wanted > 1:
        gaps = np.diff(places)
        assert (places[0], places[-1]) == (0, count - 1) and gaps.max() - gaps.min() <= 1


def test_a_split_s_dialogues_are_taken_from_all_over_it() -> None:
    told = [dialogue(i, "ann", split="dev" if i % 3 else "train") for i in range(90)]
    store = make_store(told, np.zeros(90, np.int32))
    whole = store.split("dev")
    assert store.split("dev", 10**6).tolist() == whole.tolist()
    assert store.split("dev", 3).tolist() == [whole[0], whole[30], whole[-1]]
