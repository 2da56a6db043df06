"""Who stands for the others, by hand; and that nobody does who may not be looked at."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qaperso.data.history import history, peers
from qaperso.data.peers import record_seed, reply_features, reply_vectors, representatives
from qaperso.data.store import Store, make_store
from qaperso.types import Dialogue, Turn

SELECTS = ("kmeans", "least_similar", "random")
# Own record, two others like it, three at the right and three above.
PLANE = np.array(
    [[0, 0], [0.2, 0], [0, 0.2], [9, 0], [10, 0], [11.6, 0], [0, 20], [0.5, 20.4], [0, 23]], np.float32
)  # fmt: skip


def test_kmeans_by_hand() -> None:
    """Centroids: (10.2, 0), to which (10, 0) is nearest, and (0.17, 21.13), to which (0.5, 20.4) is."""
    assert [*PLANE[3:6].mean(0), *PLANE[6:].mean(0)] == pytest.approx([10.2, 0, 0.17, 21.13], abs=0.01)
    assert np.linalg.norm(PLANE[6:] - PLANE[6:].mean(0), axis=1).argmin() == 1
    for seed in range(3):
        assert representatives(PLANE, 2, "kmeans", seed) == [4, 7]
    # Two clusters: what is far above, and the rest, to which the own record belongs.
    assert representatives(PLANE, 1, "kmeans", 0) == [7]


def test_fewer_others_than_asked_for() -> None:
    assert representatives(PLANE[[0, 4, 7]], 4, "kmeans", 0) == [1, 2]
    assert representatives(PLANE[[0, 4]], 4, "kmeans", 0) == [1]
    # What is as the own record is shows no difference; what is alike is one.
    assert representatives(PLANE[[0, 0, 4, 4, 4]], 4, "kmeans", 0) == [2]
    assert representatives(PLANE[[0, 0, 0]], 4, "kmeans", 0) == []
    for select in SELECTS:
        assert representatives(PLANE[:1], 4, select, 0) == []
    for select in SELECTS[1:]:
        assert representatives(PLANE[[0, 0, 4]], 4, select, 0) == [1, 2]


def test_least_similar_by_hand() -> None:
    """Cosines with (1, 0): 1, 0.6, 0, -1, and 0 for no known word."""
    vectors = np.array([[1, 0], [2, 0], [0.6, 0.8], [0, 3], [-1, 0], [0, 0]], np.float32)
    found = [representatives(vectors, count, "least_similar", 0) for count in (1, 2, 3, 4, 9)]
    assert found == [[4], [3, 4], [3, 4, 5], [2, 3, 4, 5], [1, 2, 3, 4, 5]]


def test_random_is_the_seed_s() -> None:
    drawn = [tuple(representatives(PLANE, 3, "random", seed)) for seed in range(40)]
    assert drawn == [tuple(representatives(PLANE, 3, "random", seed)) for seed in range(40)]
    assert len(set(drawn)) > 20 and set().union(*drawn) == set(range(1, 9))
    assert len({record_seed(seed, name) for seed in (0, 1) for name in ("a", "b", "\ud800")}) == 6


@settings(max_examples=40, deadline=None)
@given(
    rows=st.lists(st.tuples(st.integers(-3, 3), st.integers(-3, 3)), min_size=1, max_size=9),
    count=st.integers(1, 5),
    select=st.sampled_from(SELECTS),
)
def test_they_are_few_and_different_others(rows: list, count: int, select: str) -> None:
    vectors = np.array(rows, np.float32)
    found = representatives(vectors, count, select, 1)
    assert len(found) <= min(count, len(rows) - 1) and found == sorted(set(found))
    assert all(1 <= i < len(rows) for i in found)
    if select == "kmeans":
        assert len({rows[i] for i in found} | {rows[0]}) == len(found) + 1
        assert bool(found) == (len(set(rows)) > 1)
    else:
        assert len(found) == min(count, len(rows) - 1)


def review(name: str, user: str, item: object, time: float | None, split: str, responder: str = "reviewer") -> Dialogue:
    turns = Turn(user, "review it"), Turn(responder, f"word{name} well said")
    fields = {} if item is None else {"item": item}
    return Dialogue(name, responder, user, turns, f"{user}/{item}", time, split, fields=fields)


entry = st.tuples(
    st.sampled_from(["ann", "bo", "eve"]),
    st.sampled_from(["lamp", "rope", None]),
    st.none() | st.integers(0, 3).map(float),
    st.sampled_from(["train", "train", "train", "dev", "test"]),
    st.sampled_from(["reviewer", "reviewer", "cy"]),
)


@settings(max_examples=80, deadline=None)
@given(st.lists(entry, min_size=1, max_size=12).filter(lambda es: any(e[3] == "train" for e in es)), st.data())
def test_peers_are_what_the_dialogue_may_look_at(es: list[tuple], data: st.DataObject) -> None:
    store = make_store([review(f"d{i}", *e) for i, e in enumerate(es)], np.array([i % 2 for i in range(len(es))]))
    dialogue = data.draw(st.sampled_from(store.dialogues))
    for record in history(store, dialogue, "pair").tolist():
        own = store.dialogues[record]
        found = peers(store, dialogue, own).tolist()
        for i, other in enumerate(store.dialogues):
            later = None not in (other.time, dialogue.time) and other.time >= dialogue.time
            allowed = other.split == "train" and other.group != dialogue.group and not later
            someone_else = other.querier != own.querier and other.responder == own.responder
            if "item" in own.fields:
                same = other.fields.get("item") == own.fields["item"]
            else:
                same = store.cluster[i] == store.cluster[record]
            assert (i in found) == (allowed and someone_else and same)


def test_history_of_an_item() -> None:
    store = make_store(
        [review(f"d{i}", user, item, None, "train") for i, (user, item) in enumerate(
            [("ann", "lamp"), ("bo", "lamp"), ("eve", "rope"), ("eve", None), ("bo", ["no", "name"]), ("ann", 3)]
        )],
        np.zeros(6, np.int32),
    )  # fmt: skip
    new = review("new", "zoe", "lamp", None, "test")
    assert history(store, new, "item").tolist() == [0, 1]
    assert history(store, store.dialogues[0], "item").tolist() == [1]
    for i in (3, 4):
        assert history(store, store.dialogues[i], "item").tolist() == []
    assert history(store, review("new", "zoe", 3, None, "test"), "item").tolist() == [5]


def test_vectors_of_replies() -> None:
    store: Store = make_store(
        [review(name, "ann", "lamp", None, "train" if name != "secret" else "test") for name in ("a", "b", "secret")],
        np.zeros(3, np.int32),
    )
    vectors = reply_vectors(store, ["worda well", "said", "unheard", "wordsecret"])
    assert np.linalg.norm(vectors, axis=1) == pytest.approx([1, 1, 0, 0], abs=1e-6)
    assert set(reply_features(store).terms) == {"worda", "wordb", "well", "said"}
    np.testing.assert_array_equal(reply_vectors(store, ["worda well"])[0], vectors[0])
