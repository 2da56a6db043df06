"""What a page on a run shows: numbers by hand, embeddings by a second computation."""

from __future__ import annotations

import collections
import dataclasses
import json
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import untrained

from qaperso.data.store import Store, make_store
from qaperso.errors import UserError
from qaperso.eval import gather
from qaperso.eval.compare import Items
from qaperso.run import Run
from qaperso.types import STRANGER, Dialogue, Turn

Tree = Any


@pytest.fixture(scope="module")
def qar() -> tuple[Run, Store, Tree]:
    return untrained.opened(method="qar")


def talk(name: str, querier: str, text: str, split: str, responder: str = "cy", turns: int = 2) -> Dialogue:
    early = tuple(Turn((querier, responder)[i % 2], "ahem") for i in range(turns - 2))
    return Dialogue(name, responder, querier, (*early, Turn(querier, text), Turn(responder, name)), name, split=split)


def small(cluster: int = 0) -> Store:
    """Cy answers ann, bo and eve in training, ann most; dee answers nobody but ann."""
    trained = [talk(f"t{i}", q, f"is there bread {i}?", "train") for i, q in enumerate(["ann", "ann", "bo", "eve"])]
    trained.append(talk("td", "ann", "who rings the bell?", "train", "dee"))
    test = [talk(f"x{i}", "bo", f"why {i}?", "test", turns=4 if i < 2 else 2) for i in range(6)]
    test += [talk("y", "ann", "why?", "test", "dee"), talk("z", "new", "why me?", "test")]
    dialogues = [*trained, *test]
    return make_store(dialogues, np.array([cluster] * 4 + [1] * (len(dialogues) - 4), np.int32))


def test_curves_are_read_as_far_as_they_are_there(tmp_path: Path) -> None:
    lines = [
        {"step": 0, "dev_nll": 4.5},
        {"step": 1, "loss": 3.0, "lm": 2.5, "mfu": 0.1},
        {"step": 2, "loss": float("nan")},
    ]
    text = "".join(json.dumps(line) + "\n" for line in lines) + '7\n{"loss": 1.0}\n{"step": 3, "lo'
    (tmp_path / "metrics.jsonl").write_text(text, encoding="utf-8")
    found = gather.read_curves(tmp_path / "metrics.jsonl")
    assert found == {"dev_nll": [(0, 4.5)], "loss": [(1, 3.0)], "lm": [(1, 2.5)]}
    assert gather.read_curves(tmp_path / "absent.jsonl") == {}
    many = "".join(json.dumps({"step": i, "loss": 1.0}) + "\n" for i in range(2500))
    (tmp_path / "metrics.jsonl").write_text(many, encoding="utf-8")
    steps = [step for step, _ in gather.read_curves(tmp_path / "metrics.jsonl")["loss"]]
    assert steps == list(range(0, 2500, 3))


def test_summary_and_configuration(qar: tuple[Run, Store, Tree]) -> None:
    run, store, trainable = qar
    run = dataclasses.replace(
        run, record={**run.record, "base": {"name": "random", "path": "", "sha256": "0123456789abcdef"}}
    )
    found = gather.summary(run, trainable, store, "dev", 3)
    assert found["method"] == "qar" and found["base"] == "random (sha256 0123456789ab)"
    assert found["people"] == "queriers: 12, responders: 1, clusters: 2"
    assert (
        found["scored"] == "dev split, checkpoint of step 3 of 1,000"
        and found["replies"] == "greedy, at most 64 tokens"
    )
    assert f"{len(store.split('dev'))} dev" in found["dialogues"]
    keys = {key: (value, changed) for key, value, changed in gather.changed_keys(run.config)}
    assert keys["batch.rows"] == ("4", True) and keys["seed"] == ("0", False) and keys["lora.rank"] == ("4", True)


def test_maps_are_of_clusters_in_which_people_can_be_told_apart() -> None:
    names = [*("abcd" * 10), *"ab", *("a" * 9), *("abc" * 2), *("ab" * 4)]
    cluster = [0] * 40 + [1] * 2 + [2] * 9 + [3] * 6 + [4] * 8
    store = make_store([talk(str(i), q, "?", "train") for i, q in enumerate(names)], np.array(cluster, np.int32))
    vectors = np.random.default_rng(0).normal(size=(len(names), 5))
    vectors[57:] = 1.0  # all of cluster 4 in one place
    found = gather.maps(store, vectors, np.arange(len(names)))
    assert [(m.cluster, m.how, m.points.shape) for m in found] == [(0, "t-SNE", (40, 2)), (3, "PCA", (6, 2))]
    assert "".join(found[0].queriers) == "abcd" * 10 and "".join(found[1].queriers) == "abcabc"
    again = gather.maps(store, vectors, np.arange(len(names)))
    np.testing.assert_array_equal(again[0].points, found[0].points)


def test_projections_keep_clumps_apart() -> None:
    rng = np.random.default_rng(0)
    for size in (8, 60):
        vectors = np.concatenate([rng.normal(size=(size // 2, 9)), rng.normal(size=(size // 2, 9)) + 20])
        _, points = gather.project(vectors)
        middles = points[: size // 2].mean(0), points[size // 2 :].mean(0)
        width = max(p.std(0).max() for p in (points[: size // 2], points[size // 2 :]))
        assert np.linalg.norm(middles[0] - middles[1]) > 3 * width


def test_clusters_are_told_by_their_words() -> None:
    store = small(cluster=4)
    rows = gather.cluster_rows(store)
    assert [(r["cluster"], r["size"], r["queriers"]) for r in rows] == [(1, 1, 1), (4, 4, 3)]
    assert "bell" in rows[0]["terms"] and rows[1]["terms"][:3] == ["bread", "is", "there"]
    assert sorted(rows[1]["examples"]) == [f"is there bread {i}?" for i in range(4)]


def test_the_worst_come_first() -> None:
    store = small()
    ids = tuple(store.dialogues[i].id for i in store.split("test"))
    nll, tokens = np.array([4.0, 9, 2, 0, 30, 8, 5, 1]), np.array([2.0, 3, 2, 0, 6, 2, 5, 1])
    overlap = np.array([0.5, 0.1, 0, 0, 0.2, 0, 0, 0]), np.array([1.0, 1, 0, 0, 1, 0, 0, 0])
    items = Items(ids, ("bo",) * 8, ids, {"reply_nll": (nll, tokens), "rouge_l": overlap}, "")
    found = gather.failures(store, "test", items, [{"id": "x1", "reply": "hm"}, {"id": "x4", "reply": ""}])
    rows = {title: [(f.id, f.value, f.reply) for f in rows] for title, rows in found.items()}
    assert rows == {
        "Least likely true replies": [
            ("x4", "5.00 nats per token", ""),
            ("x5", "4.00 nats per token", None),
            ("x1", "3.00 nats per token", "hm"),
            ("x0", "2.00 nats per token", None),
            ("x2", "1.00 nats per token", None),
            ("y", "1.00 nats per token", None),
        ],
        "Least like the true reply": [
            ("x1", "ROUGE-L 0.10", "hm"),
            ("x4", "ROUGE-L 0.20", ""),
            ("x0", "ROUGE-L 0.50", None),
        ],
    }
    first = found["Least likely true replies"][0]
    assert (first.querier, first.query, first.reference) == ("bo", "why 4?", "x4")
    assert gather.failures(store, "test", dataclasses.replace(items, scores={}), []) == {}


def test_queries_are_asked_by_the_others(qar: tuple[Run, Store, Tree], monkeypatch: pytest.MonkeyPatch) -> None:
    store = small()
    monkeypatch.setattr(gather.reply, "fits", lambda _, d: d.id != "x3 <- eve")
    found = gather.asked_by_others(qar[0], store, "test")
    # Those with the fewest turns; dee answers nobody else in training, and nobody but those in training asks.
    groups = collections.defaultdict(list)
    for d, row in zip(found.dialogues, found.row, strict=True):
        name, _, querier = d.id.partition(" <- ")
        groups[name].append(querier)
        assert d.querier == d.turns[0].speaker == querier and d.turns[0].text == d.query
        assert row == (STRANGER if querier == "new" else store.registry.row(querier))
    assert groups == {
        "x2": ["bo", "ann", "eve"],
        "x3": ["bo", "ann"],
        "x5": ["bo", "ann", "eve"],
        "z": ["new", "ann", "bo", "eve"],
    }
    assert found.split("test").tolist() == list(range(len(found.dialogues)))
    records = [{"id": d.id, "querier": d.querier, "reply": f"to {d.querier}"} for d in found.dialogues]
    shown = gather.across(store, "test", records)
    assert [a.query for a in shown] == ["why 2?", "why 3?", "why 5?", "why me?"]
    assert shown[1].replies == {"bo": "to bo", "ann": "to ann"}
    assert (shown[3].querier, shown[3].responder, shown[3].reference) == ("new", "cy", "z")


def test_nobody_else_to_ask(qar: tuple[Run, Store, Tree]) -> None:
    alone = [talk(f"a{i}", "ann", f"why {i}?", split) for i, split in enumerate(("train", "train", "test"))]
    found = gather.asked_by_others(qar[0], make_store(alone, np.zeros(3, np.int32)), "test")
    assert not found.dialogues and not len(found.row) and gather.across(found, "test", []) == []


def test_places_are_those_of_the_rows(qar: tuple[Run, Store, Tree]) -> None:
    run, _, trainable = qar
    names = run.registry.queriers
    # Rows of a plane: their distances are kept, but for one factor.
    points = np.random.default_rng(0).normal(size=(run.registry.rows, 2)) * [3, 1]
    basis = np.linalg.qr(np.random.default_rng(1).normal(size=(trainable["tower"]["rows"].shape[1], 2)))[0]
    rows = jnp.asarray(points @ basis.T, jnp.float32)
    trainable = {**trainable, "tower": {**trainable["tower"], "rows": rows}}
    found = gather.querier_places(run, trainable)
    assert list(found) == ["stranger", *names]
    distance = lambda x: np.linalg.norm(x[:, None] - x[None], axis=-1)  # noqa: E731
    ours, theirs = distance(np.array(list(found.values()))), distance(points[: len(names) + 1])
    np.testing.assert_allclose(ours * theirs[0, 1] / ours[0, 1], theirs, atol=5e-3)
    # Somebody who came later has a place in the plane of those who were there.
    later = dataclasses.replace(run, registry=run.registry.called(len(names) + 1, "zita"))
    again = gather.querier_places(later, trainable)
    assert {name: again[name] for name in found} == found and again["zita"] not in list(found.values())
    with pytest.raises(UserError, match="no querier rows"):
        gather.querier_places(run, {})
