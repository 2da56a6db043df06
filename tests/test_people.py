"""Who came after training: files that say it is so, or one clear error, and nothing else that changes."""

from __future__ import annotations

import dataclasses
import json
import threading
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from qaperso import people
from qaperso.data.history import history
from qaperso.data.store import Registry, make_store
from qaperso.errors import UserError
from qaperso.people import Person
from qaperso.types import Dialogue, Turn

REGISTRY = Registry(("ann", "bo"), ("maren",), spare=2)


def talk(number: int, asks: str, group: str = "g") -> Dialogue:
    turns = (Turn(asks, f"well {number}?"), Turn("maren", "aye"))
    return Dialogue(f"d{number}", "maren", asks, turns, f"{group}{number}", split="train")


def zita(row: int = 3, **changes) -> Person:
    vector = np.float32([0.1, -2.5e-8, 3e7])
    person = Person("zita", row, 7, "weights", vector, (talk(1, "zita"),), {"seconds": 0.5})
    return dataclasses.replace(person, **changes)


def test_what_is_written_comes_back(tmp_path: Path) -> None:
    bare = zita(4, name="<../é\N{SNOWMAN}>", vector=None, dialogues=())
    with people.locked(tmp_path):
        people.write(tmp_path, bare)
        people.write(tmp_path, zita())
    found, nameless = people.read(tmp_path)
    for field in ("name", "row", "step", "weights", "dialogues", "found"):
        assert getattr(found, field) == getattr(zita(), field)
        assert getattr(nameless, field) == getattr(bare, field)
    np.testing.assert_array_equal(found.vector, zita().vector)
    assert nameless.vector is None and found.vector.dtype == np.float32
    # No name is part of a path.
    assert sorted(p.name for p in (tmp_path / people.FOLDER).iterdir()) == ["000003.json", "000004.json"]
    assert people.read(tmp_path / "absent") == ()


@pytest.mark.parametrize(
    "old, new", [('"zita"', '"rita"'), ('"row": 3', '"row": 2'), ('"layout": 1', '"layout": 9'), ("{", "")]
)
def test_a_file_that_was_changed_is_refused(tmp_path: Path, old: str, new: str) -> None:
    people.write(tmp_path, zita())
    path = people.file_of(tmp_path, 3)
    path.write_text(path.read_text(encoding="utf-8").replace(old, new, 1), encoding="utf-8")
    with pytest.raises(UserError, match=r"000003\.json.*enrol"):
        people.read(tmp_path)


def test_names_and_rows_are_joined(tmp_path: Path) -> None:
    joint = people.joined(REGISTRY, [zita(4)], tmp_path)
    assert joint.row("zita") == 4 and joint.free_row() == 3 and joint.rows == REGISTRY.rows
    assert [joint.row(name) for name in REGISTRY.queriers] == [1, 2]
    for wrong in (zita(2), zita(5), zita(0), zita(name="bo")):
        with pytest.raises(UserError, match="expected a name and a row that nobody has, below 5"):
            people.joined(REGISTRY, [wrong], tmp_path)
    # The row of somebody who was forgotten can be another's.
    assert people.joined(REGISTRY.called(1, ""), [zita(1)], tmp_path).row("zita") == 1


def test_rows_are_placed_beside_the_weights_that_they_were_fitted_beside(tmp_path: Path) -> None:
    trainable = {"lora": {"a": jnp.ones(3)}, "tower": {"rows": jnp.zeros((5, 3)), "alpha": jnp.ones(3)}}
    person = zita(weights=people.digest(trainable))
    found = people.placed(trainable, [person, zita(4, vector=None)], 7, tmp_path)
    expected = np.zeros((5, 3), np.float32)
    expected[3] = person.vector
    np.testing.assert_array_equal(found["tower"]["rows"], expected)
    assert found["lora"] is trainable["lora"] and not np.asarray(trainable["tower"]["rows"]).any()
    # Others' rows do not matter to it; all else does.
    other = people.with_row(trainable, 1, jnp.ones(3))
    np.testing.assert_array_equal(people.placed(other, [person], 7, tmp_path)["tower"]["rows"][3], person.vector)
    moved = {**trainable, "lora": {"a": jnp.zeros(3)}}
    for weights, step in ((moved, 7), (trainable, 8)):
        with pytest.raises(UserError, match=r"'zita' was enrolled on checkpoint 7.*--again"):
            people.placed(weights, [person], step, tmp_path)
    assert people.placed(moved, [], 8, tmp_path) is moved


def test_their_dialogues_are_history() -> None:
    old = [talk(0, "ann"), talk(2, "bo")]
    store = make_store(old, np.array([0, 1]), 2)
    person = zita(dialogues=(talk(5, "zita"), talk(6, "zita")))
    joint = people.with_history(store, people.joined(REGISTRY, [person], Path()), [person])
    asked = dataclasses.replace(talk(7, "zita"), split=None)
    assert [joint.dialogues[i].id for i in history(joint, asked, "pair")] == ["d5", "d6"]
    assert [joint.dialogues[i].id for i in history(joint, person.dialogues[0], "querier")] == ["d6"]
    assert len(history(joint, asked, "responder")) == 4 and not len(history(joint, asked, "cluster"))
    # Nobody's cluster holds them, and nobody else's history is another.
    for d in old:
        assert history(joint, d, "pair").tolist() == history(store, d, "pair").tolist()
        assert history(joint, d, "cluster").tolist() == history(store, d, "cluster").tolist()
    assert joint.row.tolist() == [1, 2, 3, 3] and joint.label.tolist()[2:] == [-1, -1]
    assert len(set(joint.text.tolist())) == 4 and joint.classes is store.classes


def test_one_at_a_time(tmp_path: Path) -> None:
    entered = threading.Event()

    def enter() -> None:
        with people.locked(tmp_path):
            entered.set()

    other = threading.Thread(target=enter)
    with people.locked(tmp_path):
        other.start()
        assert not entered.wait(0.2)
    other.join()
    assert entered.is_set()
    half = people.file_of(tmp_path, 3).with_suffix(".json.partial")
    half.parent.mkdir(exist_ok=True)
    half.write_text('{"name": "zita"', encoding="utf-8")
    with people.locked(tmp_path):
        assert not half.exists()
    with pytest.raises(UserError, match="cannot be written"), people.locked(tmp_path / "absent"):
        pass


def test_the_checksum_is_of_what_stands_there(tmp_path: Path) -> None:
    people.write(tmp_path, zita())
    whole = json.loads(people.file_of(tmp_path, 3).read_text(encoding="utf-8"))
    assert whole["sha256"] == people._checksum(whole["person"]) and whole["person"]["name"] == "zita"
