"""Clusters of queries: fitted on the training split, the same each time."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from qaperso.data.clusters import assign
from qaperso.data.synthetic import make_dialogues, make_world
from qaperso.errors import UserError
from qaperso.types import Dialogue, Turn

TOWN = make_dialogues(make_world(0, queriers=4), per_pair=4)
TRAIN = np.array([d.split == "train" for d in TOWN])


def dialogue(i: int, query: str, split: str = "train", **fields) -> Dialogue:
    turns = (Turn("ann", query), Turn("maren", "aye"))
    return Dialogue(f"d{i}", "maren", "ann", turns, f"g{i}", split=split, fields=fields)


def with_query(d: Dialogue, query: str) -> Dialogue:
    return dataclasses.replace(d, turns=(Turn(d.querier, query), d.turns[-1]))


def test_fitted_on_training_only():
    assert not TRAIN.all()
    before = assign(TOWN, 6, seed=0)
    strange = [d if d.split == "train" else with_query(d, f"zebra {i} quark ?") for i, d in enumerate(TOWN)]
    np.testing.assert_array_equal(assign(strange, 6, seed=0)[TRAIN], before[TRAIN])
    alone = assign([d for d in TOWN if d.split == "train"], 6, seed=0)
    np.testing.assert_array_equal(alone, before[TRAIN])


def test_same_each_time_and_every_cluster_used():
    first = assign(TOWN, 6, seed=3)
    np.testing.assert_array_equal(assign(TOWN, 6, seed=3), first)
    assert first.dtype == np.int32 and first.shape == (len(TOWN),)
    assert set(first[TRAIN].tolist()) == set(range(6))


def test_equal_queries_share_a_cluster():
    """Whoever asks, in whichever split."""
    clusters = assign(TOWN, 6, seed=0)
    copies = [dataclasses.replace(with_query(d, d.query), querier="x", split="test") for d in TOWN]
    copies = [dataclasses.replace(c, turns=(Turn("x", c.turns[0].text), c.turns[1])) for c in copies]
    np.testing.assert_array_equal(assign([*TOWN, *copies], 6, seed=0), [*clusters, *clusters])


def test_topics_come_apart():
    queries = [
        "fresh bread today",
        "bread or rolls today",
        "any fresh rolls",
        "mend my boat",
        "boat needs paint",
        "my boat",
    ]
    clusters = assign([dialogue(i, q) for i, q in enumerate(queries)], 2, seed=0).tolist()
    assert len(set(clusters[:3])) == len(set(clusters[3:])) == 1 and clusters[0] != clusters[3]


@pytest.mark.parametrize("queries", [["I", "a"], ["你 好", "再 见"]])
def test_words_of_one_letter_count(queries):
    clusters = assign([dialogue(i, q) for i, q in enumerate(queries * 2)], 2, seed=0).tolist()
    assert clusters[:2] == clusters[2:] and clusters[0] != clusters[1]


def test_given_clusters():
    given = [dialogue(i, "same", split, cluster_id=c) for i, (split, c) in enumerate([("train", 7), ("dev", 2)])]
    clusters = assign(given, 0, seed=0)
    assert clusters.tolist() == [7, 2] and clusters.dtype == np.int32


def test_no_given_cluster():
    with pytest.raises(UserError, match=r"^data\.clusters=0 .* dialogue 'd1' has no cluster_id$"):
        assign([dialogue(0, "x", cluster_id=1), dialogue(1, "y")], 0, seed=0)


@pytest.mark.parametrize(
    ("queries", "count", "distinct"),
    [(["x", "y", "x"], 3, 2), (["", "?!"], 1, 0), (["x", "..."], 2, 1)],
)
def test_fewer_queries_than_clusters(queries, count, distinct):
    dialogues = [dialogue(i, q) for i, q in enumerate(queries)] + [dialogue(9, "z", "dev")]
    found = (
        rf"^data\.clusters={count}, but the training split has {distinct} distinct queries .*; lower data\.clusters$"
    )
    with pytest.raises(UserError, match=found):
        assign(dialogues, count, seed=0)
