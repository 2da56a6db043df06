"""Which earlier records a method may look at: training only, never the own group, never a later time."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qaperso.data.history import exchanges, history, items
from qaperso.data.store import Store, make_store
from qaperso.types import Dialogue, Turn

BY = ("pair", "querier", "responder", "cluster")
by_any = pytest.mark.parametrize("by", BY)


def dialogue(name: str, querier: str, responder: str, group: str, time: float | None, split: str) -> Dialogue:
    turns = (Turn(querier, f"{name}?"), Turn(responder, f"{name}!"))
    return Dialogue(name, responder, querier, turns, group, time, split)


entry = st.tuples(
    st.sampled_from(["ann", "bo", "eve"]),
    st.sampled_from(["cy", "dee"]),
    st.sampled_from("gh"),
    st.none() | st.integers(0, 3).map(float),
    st.sampled_from(["train", "train", "train", "dev", "test", "unseen"]),
    st.integers(0, 1),
)
entries = st.lists(entry, min_size=1, max_size=14).filter(lambda es: any(e[4] == "train" for e in es))


def make(es: list[tuple]) -> Store:
    return make_store([dialogue(f"d{i}", *e[:5]) for i, e in enumerate(es)], np.array([e[5] for e in es]))


def shared(store: Store, i: int, asked: int, by: str) -> bool:
    a, b = store.dialogues[i], store.dialogues[asked]
    same = {"querier": a.querier == b.querier, "responder": a.responder == b.responder}
    same |= {"pair": all(same.values()), "cluster": store.cluster[i] == store.cluster[asked]}
    return bool(same[by])


@by_any
@settings(max_examples=150, deadline=None)
@given(entries)
def test_what_is_found_may_be_looked_at_and_nothing_else(by: str, es: list[tuple]) -> None:
    store = make(es)
    for asked, d in enumerate(store.dialogues):
        found = history(store, d, by)
        assert found.dtype == np.int64 and len(set(found.tolist())) == len(found)
        for i in range(len(es)):
            other = store.dialogues[i]
            later = None not in (other.time, d.time) and other.time >= d.time
            allowed = other.split == "train" and other.group != d.group and not later
            assert (i in found) == (allowed and shared(store, i, asked, by))
        times = [-np.inf if store.dialogues[i].time is None else store.dialogues[i].time for i in found]
        assert list(zip(times, found, strict=True)) == sorted(zip(times, found, strict=True))


@settings(max_examples=60, deadline=None)
@given(entries, st.data())
def test_what_is_not_training_changes_nothing(es: list[tuple], data: st.DataObject) -> None:
    """Neither the words of other splits nor those of the own group or of later times can reach anybody."""
    store = make(es)
    d = data.draw(st.sampled_from(store.dialogues))
    allowed = {i for by in BY for i in history(store, d, by).tolist()}
    kept = [i for i, other in enumerate(store.dialogues) if i in allowed or other is d]
    if not allowed:
        return
    small = make_store([store.dialogues[i] for i in kept], store.cluster[kept])
    for by in BY:
        whole = [store.dialogues[i].id for i in history(store, d, by)]
        assert [small.dialogues[i].id for i in history(small, d, by)] == whole


def test_written_out() -> None:
    store = make(
        [
            ("ann", "cy", "g", 2.0, "train", 0),
            ("ann", "cy", "h", 1.0, "train", 1),
            ("bo", "cy", "i", 1.0, "train", 0),
            ("ann", "dee", "j", None, "train", 1),
            ("ann", "cy", "k", 5.0, "train", 0),
            ("ann", "cy", "l", 0.0, "dev", 0),
            ("ann", "cy", "m", 3.0, "test", 0),
        ]
    )
    asked = store.dialogues[6]
    found = {by: history(store, asked, by).tolist() for by in BY}
    assert found == {"pair": [1, 0], "querier": [3, 1, 0], "responder": [1, 2, 0], "cluster": [2, 0]}
    # Without a time everything is older; the record of unknown time stays the first.
    undated = dataclasses.replace(asked, time=None)
    assert history(store, undated, "querier").tolist() == [3, 1, 0, 4]
    assert history(store, dataclasses.replace(undated, group="h"), "pair").tolist() == [0, 4]


def test_a_dialogue_the_store_does_not_hold() -> None:
    store = make([("ann", "cy", "g", None, "train", 0), ("bo", "dee", "h", None, "train", 0)])
    new = dialogue("new", "ann", "cy", "question", None, "train")
    assert {by: history(store, new, by).tolist() for by in BY} == {
        "pair": [0],
        "querier": [0],
        "responder": [0],
        "cluster": [],
    }
    # Who asks decides, whatever the store says of the dialogue: as under a swap of queriers.
    renamed = dataclasses.replace(store.dialogues[0], querier="bo", responder="dee")
    assert history(store, renamed, "pair").tolist() == [1]
    nobody = dialogue("new", "zoe", "kim", "question", None, "test")
    assert [len(history(store, nobody, by)) for by in BY] == [0, 0, 0, 0]


def test_exchanges() -> None:
    turns = tuple(Turn(who, f"{i}") for i, who in enumerate(["cy", "ann", "ann", "cy", "cy", "ann", "cy"]))
    d = Dialogue("x", "cy", "ann", turns, "g", replies=(0, 3, 4, 6))
    assert [(q.text, r.text) for q, r in exchanges(d)] == [("2", "3"), ("2", "4"), ("5", "6")]
    assert [(q.text, r.text) for q, r in exchanges(dataclasses.replace(d, replies=()))] == [("5", "6")]
    assert exchanges(dataclasses.replace(d, turns=turns[:1], replies=())) == []


def told(querier: str, name: str, time: float | None = None, split: str = "train", **fields: Any) -> Dialogue:
    d = dialogue(name, querier, "cy", name, time, split)
    return dataclasses.replace(d, fields=fields)


def entries_of(*names: str, times: Sequence[float | None] = ()) -> list[dict[str, Any]]:
    known = [*times, *[None] * len(names)]
    return [
        {"id": n, "query": f"{n}?", "reply": f"{n}!"} | ({} if t is None else {"time": t})
        for n, t in zip(names, known, strict=False)
    ]


def names_of(store: Store, asked: Dialogue, limit: int = 99) -> list[str]:
    found = items(store, asked, limit)
    assert all(x.reply == x.query.replace("?", "!") for x in found)
    return [x.query[:-1] for x in found]


def test_items_are_the_pair_s_exchanges_oldest_first() -> None:
    store = make_store(
        [
            told("ann", "b", 2.0),
            told("ann", "a", 1.0),
            told("bo", "c"),
            told("ann", "d", split="dev"),
            told("ann", "n"),
        ],
        np.zeros(5, np.int32),
    )
    asked = told("ann", "x", split="test")
    assert names_of(store, asked) == ["n", "a", "b"] and names_of(store, asked, 2) == ["a", "b"]
    assert names_of(store, dataclasses.replace(asked, time=2.0)) == ["n", "a"]
    assert names_of(store, store.dialogues[0]) == ["n", "a"]
    # Nobody has asked dee, so it is what ann asked anybody.
    assert names_of(store, dataclasses.replace(asked, responder="dee")) == ["n", "a", "b"]
    assert names_of(store, dataclasses.replace(asked, querier="eve")) == []


def test_a_profile_is_its_querier_s() -> None:
    own, others = entries_of("p", "q", times=(5.0, 1.0)), entries_of("r")
    store = make_store(
        [
            told("ann", "a", 3.0, history=entries_of("old")),
            told("bo", "b", history=others),
            told("eve", "e", history="no list"),
        ]
        + [told("ann", "t", split="test", history=own), told("zed", "z", split="test", history=own)],
        np.zeros(5, np.int32),
    )
    ann, zed = store.dialogues[3:]
    assert names_of(store, ann) == ["q", "a", "p"] and names_of(store, dataclasses.replace(ann, time=4.0)) == ["q", "a"]
    assert names_of(store, zed) == ["q", "p"]
    # Where somebody else is said to ask it goes with them; where a record has none it is that of training.
    assert names_of(store, dataclasses.replace(ann, querier="bo")) == ["r", "b"]
    assert names_of(store, told("ann", "new", split="test")) == ["old", "a"]
    # No record but a test one knows zed's, and nobody else may see it.
    assert names_of(store, dataclasses.replace(ann, querier="zed")) == []
    assert names_of(store, told("eve", "new")) == ["e"]


def test_the_most_recent_come_last() -> None:
    said = [told("ann", "a", 3.0), told("ann", "b"), told("ann", "l", 5.0), told("ann", "m", 4.0)]
    store = make_store(said, np.zeros(4, np.int32))
    asked = told("ann", "x")
    assert names_of(store, asked) == ["b", "a", "m", "l"] and names_of(store, asked, 1) == ["l"]
    assert names_of(store, dataclasses.replace(asked, group="l")) == ["b", "a", "m"]
    assert names_of(store, dataclasses.replace(asked, time=4.0)) == ["b", "a"]
