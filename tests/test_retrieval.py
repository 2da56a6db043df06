"""Retrieval of queriers from embeddings: planted ones, and those of an untrained run."""

from __future__ import annotations

import dataclasses
import functools

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
import untrained
from sklearn.metrics import silhouette_score
from sklearn.neighbors import NearestCentroid

from qaperso.data import synthetic
from qaperso.data.batches import make_batch
from qaperso.data.store import Store, make_store
from qaperso.errors import UserError
from qaperso.eval import awareness, retrieval
from qaperso.eval.retrieval import Embedded
from qaperso.types import Turn

NAMES = ("retrieval_top1", "retrieval_mrr", "retrieval_chance", "retrieval_mrr_chance", "silhouette")


def points(vectors: np.ndarray, who: str, clusters: list[int] | int = 0, responders: str | None = None) -> Embedded:
    """A point a letter of `who`, each a group of its own."""
    n = len(who)
    return Embedded(
        np.asarray(vectors, float),
        np.arange(n),
        np.array(list(who), object),
        np.array(list(responders or "r" * n), object),
        np.array([f"g{i}" for i in range(n)], object),
        np.broadcast_to(np.array(clusters), n).copy(),
    )


@functools.cache
def town() -> Store:
    dialogues = synthetic.make_dialogues(synthetic.make_world(0, 6), 5)
    return make_store(dialogues, np.array([len(d.query) % 2 for d in dialogues], np.int32))


def planted(split: str, vectors: np.ndarray) -> Embedded:
    """Vectors [n, D] as the embeddings of a split of the town."""
    store = town()
    index = store.split(split)
    named = {
        key: np.array([getattr(store.dialogues[i], key) for i in index], object)
        for key in ("querier", "responder", "group")
    }
    return Embedded(vectors, index, **named, cluster=store.cluster[index].astype(np.int64))


def one_hot(split: str) -> np.ndarray:
    return np.eye(town().registry.rows)[town().row[town().split(split)]]


def test_planted_embeddings_are_retrieved_without_fail() -> None:
    found = retrieval.scores(planted("train", one_hot("train")), planted("test", one_hot("test")))
    for name in ("retrieval_top1", "retrieval_mrr", "silhouette"):
        assert found[name] == {"value": 1.0, "low": 1.0, "high": 1.0, "n": 6}
    # Each of six asks in both clusters in training.
    assert found["retrieval_chance"]["value"] == pytest.approx(1 / 6)
    assert found["retrieval_mrr_chance"]["value"] == pytest.approx(sum(1 / k for k in range(1, 7)) / 6)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_shuffled_labels_are_retrieved_by_chance(seed: int) -> None:
    rng = np.random.default_rng(seed)
    test = planted("test", one_hot("test"))
    shuffled = dataclasses.replace(test, querier=rng.permutation(test.querier))
    found = retrieval.scores(planted("train", one_hot("train")), shuffled, level=0.999)
    for name, chance in (("top1", "chance"), ("mrr", "mrr_chance")):
        metric = found[f"retrieval_{name}"]
        assert metric["low"] <= found[f"retrieval_{chance}"]["value"] <= metric["high"] < 0.6, name
    assert found["silhouette"]["value"] < 0.1


def test_embeddings_that_say_nothing_are_at_chance_exactly() -> None:
    store = town()
    flat = [planted(split, np.ones((len(store.split(split)), 4))) for split in ("train", "test")]
    found = retrieval.scores(*flat)
    assert found["retrieval_top1"]["value"] == pytest.approx(found["retrieval_chance"]["value"], abs=1e-12)
    assert found["retrieval_mrr"]["value"] == pytest.approx(found["retrieval_mrr_chance"]["value"], abs=1e-12)
    assert found["silhouette"]["value"] == 0


def test_scores_by_hand() -> None:
    # In cluster 0 the centroids of a, b and c are 1, 4 and 9; in cluster 1 there are a and b, at 0 and 2; d is alone in 2.
    train = points(np.array([[0], [2], [4], [9], [0], [2], [5]]), "aabcabd", [0, 0, 0, 0, 1, 1, 2])
    test = points(np.array([[1.5], [5], [5], [1], [1], [5], [5]]), "aacabde", [0, 0, 0, 1, 1, 2, 0])
    found = retrieval.scores(train, test)
    # a at 1.5: first; a at 5: third or tied with c at 9 (4 and 4 away, b is nearest): ranks 2 and 3 shared; c at 5: the
    # same; in cluster 1 both stand in the middle. d and e have nobody to be taken for, or are not in training.
    shared = (1 / 2 + 1 / 3) / 2
    top = {"a": (1 + 0 + 0.5) / 3, "b": 0.5, "c": 0}
    mrr = {"a": (1 + shared + 0.75) / 3, "b": 0.75, "c": shared}
    chance = {"a": (1 / 3 + 1 / 3 + 1 / 2) / 3, "b": 1 / 2, "c": 1 / 3}
    third, half = (1 + 1 / 2 + 1 / 3) / 3, (1 + 1 / 2) / 2
    mrr_chance = {"a": (2 * third + half) / 3, "b": half, "c": third}
    for name, expected in zip(NAMES, (top, mrr, chance, mrr_chance), strict=False):
        assert found[name]["value"] == pytest.approx(np.mean(list(expected.values()))), name
        assert found[name]["n"] == 3
    # Cluster 0: a at 1.5 and 5, c and e at 5, alone and so 0. a at 1.5 is 3.5 from its own and from the others; a at 5 is
    # 3.5 from its own, 0 from the others. In cluster 1 nobody is there twice.
    assert found["silhouette"]["value"] == pytest.approx(np.mean([(0 - 1) / 2, 0, 0]))


@hypothesis.settings(deadline=None, max_examples=25)
@hypothesis.given(seed=st.integers(0, 2**31), queriers=st.integers(2, 6), dim=st.integers(1, 5))
def test_top1_and_silhouette_are_those_of_scikit_learn(seed: int, queriers: int, dim: int) -> None:
    rng = np.random.default_rng(seed)
    letters = "abcdef"[:queriers]
    train = points(rng.normal(size=(4 * queriers, dim)), letters * 4)
    test = points(rng.normal(size=(3 * queriers, dim)), letters * 3)
    found = retrieval.scores(train, test)
    guessed = NearestCentroid().fit(train.vectors, train.querier.astype(str)).predict(test.vectors)
    # Each asks three times: the mean over queriers is the mean over dialogues.
    assert found["retrieval_top1"]["value"] == pytest.approx(np.mean(guessed == test.querier.astype(str)))
    assert found["silhouette"]["value"] == pytest.approx(silhouette_score(test.vectors, test.querier.astype(str)))
    assert found["retrieval_top1"]["value"] <= found["retrieval_mrr"]["value"] <= 1


def test_one_querier_gives_no_retrieval() -> None:
    train, test = points(np.eye(3), "aaa"), points(np.eye(3), "aaa")
    assert retrieval.scores(train, test) == {}
    # A querier with one test dialogue beside another can be retrieved.
    found = retrieval.scores(points(np.eye(2), "ab"), points(np.eye(2)[:1], "a"))
    assert set(found) == set(NAMES) - {"silhouette"} and found["retrieval_top1"]["n"] == 1
    assert np.isnan(found["retrieval_top1"]["low"])
    assert retrieval.scores(points(np.eye(2), "ab"), points(np.zeros((0, 2)), "")) == {}


def test_centroids_are_of_few_training_dialogues_spread_evenly(monkeypatch: pytest.MonkeyPatch) -> None:
    store = town()
    train = store.split("train")
    monkeypatch.setattr(retrieval, "EACH", 99)
    np.testing.assert_array_equal(retrieval.centroid_dialogues(store, "test"), train)
    monkeypatch.setattr(retrieval, "EACH", 2)
    found = retrieval.centroid_dialogues(store, "test")
    for label in set(store.label[train].tolist()):
        members = train[store.label[train] == label]
        expected = {members[0], members[len(members) // 2]}
        assert set(found[store.label[found] == label].tolist()) == expected
    assert not len(retrieval.centroid_dialogues(store, "train"))
    # Only of clusters that the split has.
    one = [i for i in range(len(store.dialogues)) if store.dialogues[i].split == "train" or store.cluster[i] == 1]
    part = make_store([store.dialogues[i] for i in one], store.cluster[one])
    assert set(part.cluster[retrieval.centroid_dialogues(part, "test")].tolist()) == {1}


def test_embeddings_are_those_of_strangers_one_at_a_time() -> None:
    run, store, trainable = untrained.opened(method="qar")
    indices = store.split("dev", 7)
    found = retrieval.embed(run, trainable, store, indices, "visible")
    assert found.vectors.shape == (7, run.config.model.embed) and found.index.tolist() == indices.tolist()
    assert found.querier.tolist() == [store.dialogues[i].querier for i in indices]
    assert found.cluster.tolist() == store.cluster[indices].tolist()
    examples, _ = run.examples(store, "dev", 7)
    for example, vector in zip(examples, found.vectors, strict=True):
        batch = make_batch([[dataclasses.replace(example, querier=0)]], run.shape)
        alone, count = retrieval.batch_embeddings(run.setting, run.method, trainable, run.base, batch)
        np.testing.assert_allclose(vector, alone[0, 0], rtol=1e-4, atol=1e-5)
        assert count[0, 0] == (example.role == 1).sum()
    # With their rows they would be others.
    batch = make_batch([examples[:1]], run.shape)
    known, _ = retrieval.batch_embeddings(run.setting, run.method, trainable, run.base, batch)
    assert np.abs(known[0, 0] - found.vectors[0]).max() > 1e-2


def test_masked_embeddings_do_not_depend_on_names() -> None:
    run, store, trainable = untrained.opened(method="qar")
    indices = store.split("dev")[:5]
    renamed = dataclasses.replace(store, dialogues=tuple(awareness.rename(d, "pip") for d in store.dialogues))
    for names, equal in (("masked", True), ("visible", False)):
        a, b = (retrieval.embed(run, trainable, s, indices, names).vectors for s in (store, renamed))
        assert np.array_equal(a, b) == equal


def test_a_dialogue_of_several_sequences_is_their_mean_by_responder_tokens() -> None:
    run, store, trainable = untrained.opened(method="qar")
    index = int(store.split("dev")[0])
    old = store.dialogues[index]
    turns = (Turn(old.querier, old.query), Turn(old.responder, old.reply)) * 10
    long = dataclasses.replace(old, turns=turns, replies=tuple(range(1, 20, 2)))
    store = dataclasses.replace(store, dialogues=(*store.dialogues[:index], long, *store.dialogues[index + 1 :]))
    (vector,) = retrieval.embed(run, trainable, store, np.array([index]), "visible").vectors
    examples, _ = run.examples(store, "dev", 1)
    assert len(examples) > 1
    batches = [make_batch([[dataclasses.replace(e, querier=0)]], run.shape) for e in examples]
    each = [retrieval.batch_embeddings(run.setting, run.method, trainable, run.base, batch) for batch in batches]
    expected = np.average([v[0, 0] for v, _ in each], axis=0, weights=[count[0, 0] for _, count in each])
    np.testing.assert_allclose(vector, expected, rtol=1e-4, atol=1e-5)


def test_a_run_with_contrast_is_measured() -> None:
    run, store, trainable = untrained.opened(method="qar")
    store = untrained.of_queriers(store, "tilda", "harald", "agnes")
    found = retrieval.measure(run, trainable, store, "dev")
    masked = {f"{name}_masked" for name in ("retrieval_top1", "retrieval_mrr", "silhouette")}
    assert set(found.metrics) == {*NAMES, *masked} and not found.absent
    assert set(found.train) == set(found.test) == {"visible", "masked"}
    np.testing.assert_array_equal(found.test["masked"].index, store.split("dev"))
    expected = retrieval.scores(found.train["masked"], found.test["masked"])["retrieval_mrr"]
    assert found.metrics["retrieval_mrr_masked"] == expected
    for metric in found.metrics.values():
        assert -1 <= metric["low"] <= metric["value"] <= metric["high"] <= 1
    trained = retrieval.measure(run, trainable, store, "train")
    assert "retrieval_top1" not in trained.metrics and "make the centroids" in trained.absent["retrieval_top1"]
    assert "silhouette" in trained.metrics


def test_what_cannot_be_retrieved_is_absent_with_the_reason() -> None:
    run, store, trainable = untrained.opened(method="sft")
    found = retrieval.measure(run, trainable, store, "dev")
    assert found.metrics == found.train == found.test == {}
    assert "trained without contrast" in found.absent["retrieval_top1"]
    run, store, trainable = untrained.opened(method="qar")
    alone = untrained.of_queriers(store, "pip")
    found = retrieval.measure(run, trainable, alone, "dev")
    assert found.metrics == {} and set(found.absent) == {"retrieval_top1", "silhouette"}
    assert "its querier and another" in found.absent["retrieval_top1"]
    endless = [
        dataclasses.replace(d, turns=(*d.turns[:-1], Turn(d.responder, "bread " * 200))) for d in alone.dialogues
    ]
    with pytest.raises(UserError, match="fits batch.length"):
        retrieval.measure(run, trainable, dataclasses.replace(alone, dialogues=tuple(endless)), "dev")
