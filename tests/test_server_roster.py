"""Who is known to a server, with which key: names, rows, the file of those who were enrolled, and the map."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from qaperso import people
from qaperso.data.store import Registry
from qaperso.errors import UserError
from qaperso.people import Person
from qaperso.server.keys import Caller, Keys, load_keys
from qaperso.server.protocol import ApiError
from qaperso.server.roster import Roster
from qaperso.types import Dialogue, Turn

NAMES = Registry(("agnes", "brandt", "tilda"), ("maren",), spare=2)
TABLE = np.random.default_rng(0).normal(size=(6, 4)).astype(np.float32)
VECTOR = np.float32([0.1, -2.5e-8, 3.0e12, 1 / 3])
LONG = "sk-" + "x" * 20


def roster(folder: Path, step: int = 5, names: Registry = NAMES, table: np.ndarray | None = TABLE) -> Roster:
    return Roster(names, table, folder, step, "weights")


def refused(status: int, function: object, *arguments: object) -> str:
    with pytest.raises(ApiError) as error:
        function(*arguments)
    assert error.value.status == status
    return str(error.value)


def test_rows_are_those_of_training(tmp_path: Path) -> None:
    known = roster(tmp_path)
    assert [known.row(q, Caller()) for q in ("stranger", "agnes", "brandt", "tilda")] == [0, 1, 2, 3]
    assert "did you mean 'tilda'?" in refused(404, known.row, "tilde", Caller())
    assert "is not known" in refused(404, known.row, "../../etc/passwd", Caller())


def test_a_limited_key_hears_of_nobody_else(tmp_path: Path) -> None:
    known, caller = roster(tmp_path), Caller(frozenset({"agnes"}))
    assert [q["id"] for q in known.listed(caller)] == ["stranger", "agnes"]
    assert known.row("agnes", caller) == 1 and known.row("stranger", caller) == 0
    # Somebody who is there and somebody who is not look alike.
    assert refused(403, known.row, "tilda", caller) == refused(403, known.row, "nobody", caller)


def test_whoever_is_enrolled_is_there_after_a_restart(tmp_path: Path) -> None:
    known = roster(tmp_path)
    rows = [known.reserve(name) for name in ("anna", "<script>")]
    assert rows == [4, 5] and "no spare row" in refused(409, known.reserve, "third")
    known.add(known.person("<script>", 5, VECTOR, ()))
    known.release(4)
    again = roster(tmp_path)
    for one in (known, again):
        ((name, person),) = one.enrolled.items()
        assert (name, person.row) == ("<script>", 5) and person.vector.dtype == np.float32
        np.testing.assert_array_equal(person.vector, VECTOR)
        assert [q["id"] for q in one.listed(Caller()) if q["enrolled"]] == ["<script>"]
        assert "already" in refused(409, one.reserve, "<script>")
        assert one.reserve("anna") == 4
    assert "in what the model was trained with" in refused(409, again.remove, "tilda")
    assert again.remove("<script>") == 5
    refused(404, again.row, "<script>", Caller())
    refused(404, again.remove, "<script>")
    assert not roster(tmp_path).enrolled and not people.read(tmp_path)


def test_a_write_that_fails_changes_nothing(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    known = roster(folder)
    known.add(known.person("anna", known.reserve("anna"), VECTOR, ()))
    folder.rename(tmp_path / "kept")
    with pytest.raises(UserError, match="cannot be written"):
        known.add(known.person("berta", 5, VECTOR, ()))
    with pytest.raises(UserError, match="cannot be written"):
        known.remove("anna")
    assert list(known.enrolled) == ["anna"] and known.row("anna", Caller()) == 4
    refused(404, known.row, "berta", Caller())


def test_it_is_what_the_command_of_enrolment_reads_and_writes(tmp_path: Path) -> None:
    known = roster(tmp_path)
    row = known.reserve("anna")
    people.write(tmp_path, Person("berta", row, 5, "weights", VECTOR, (), {}))  # by somebody else, meanwhile
    assert "restart it" in refused(409, known.add, known.person("anna", row, VECTOR, ()))
    again = roster(tmp_path)
    assert again.row("berta", Caller()) == row and again.reserve("anna") == 5
    again.add(again.person("anna", 5, VECTOR, ()))
    found = people.read(tmp_path)
    assert [(p.name, p.row, p.step, p.weights) for p in found] == [
        ("berta", 4, 5, "weights"),
        ("anna", 5, 5, "weights"),
    ]
    # Whoever was forgotten leaves a row that is free; whose names do not fit are refused.
    gone = Registry(("agnes", "", "tilda"), ("maren",), spare=2)
    assert roster(tmp_path, names=gone).reserve("carl") == 2
    with pytest.raises(UserError, match="a row that nobody has"):
        roster(tmp_path, names=Registry(("agnes", "anna", "tilda"), ("maren",), spare=2))


def test_who_was_forgotten_by_the_command_stays_forgotten(tmp_path: Path) -> None:
    known = roster(tmp_path)
    known.add(known.person("anna", known.reserve("anna"), VECTOR, ()))
    anna = known.of("anna")
    people.file_of(tmp_path, anna.row).unlink()
    assert "restart it" in refused(409, known.change, anna) and not people.read(tmp_path)
    # Their row is somebody else's by now, whose file is left alone.
    people.write(tmp_path, Person("berta", anna.row, 5, "weights", VECTOR, (), {}))
    assert "restart it" in refused(409, known.change, anna)
    assert known.remove("anna") == anna.row and not known.enrolled
    assert [person.name for person in people.read(tmp_path)] == ["berta"]


def test_a_run_without_rows_enrols_nobody(tmp_path: Path) -> None:
    known = roster(tmp_path, table=None)
    assert "no rows for queriers" in refused(409, known.reserve, "anna")
    # One that reads history needs no row's value, but a number to be kept under.
    known = Roster(NAMES, None, tmp_path, 5, "", history=True)
    said = Dialogue("d", "maren", "anna", (Turn("anna", "bread?"), Turn("maren", "aye")), "g")
    known.add(known.person("anna", known.reserve("anna"), None, [said]))
    more = dataclasses.replace(known.of("anna"), dialogues=people.numbered([said, said], 4))
    known.change(more)
    again = Roster(NAMES, None, tmp_path, 5, "", history=True)
    (person,) = people.read(tmp_path)
    assert again.of("anna").dialogues == person.dialogues == more.dialogues and person.vector is None
    assert [d.id for d in person.dialogues] == ["enrolled/4/0", "enrolled/4/1"] and person.weights == ""
    assert "can be changed" in refused(409, again.of, "tilda") and "not known" in refused(404, again.of, "carl")
    assert again.reserve("carl") == 5 and "or none left" in refused(409, again.reserve, "dora")
    assert [q["position"] for q in known.listed(Caller())] == [None] * 5


def test_the_map_keeps_what_lies_in_a_plane(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    points = rng.normal(size=(4, 2)) * [3, 1]
    basis = np.linalg.qr(rng.normal(size=(4, 2)))[0]
    table = np.concatenate([points @ basis.T + 5, np.zeros((2, 4))]).astype(np.float32)
    known = roster(tmp_path, table=table)
    found = np.array([q["position"] for q in known.listed(Caller())])
    distance = lambda x: np.linalg.norm(x[:, None] - x[None], axis=-1)  # noqa: E731
    ratio = distance(found)[0, 1] / distance(points)[0, 1]
    np.testing.assert_allclose(distance(found), ratio * distance(points), atol=1e-3)
    assert np.abs(found).max() == pytest.approx(1, abs=1e-3) and found[:, 0].std() > found[:, 1].std()
    # Two people differ in one direction, one in none.
    one = roster(tmp_path, names=Registry((), ("maren",), 1), table=table[:2])
    assert [q["position"] for q in one.listed(Caller())] == [[0.0, 0.0]]


def test_keys_let_in_whom_they_are_for() -> None:
    keys = Keys({LONG: None, LONG + "2": frozenset({"agnes"})})
    assert keys.required and keys.caller(f"Bearer {LONG}") == Caller() and keys.caller(f"bearer  {LONG} ") == Caller()
    limited = keys.caller(f"Bearer {LONG}2")
    assert limited.may_ask_as("agnes") and limited.may_ask_as("stranger") and not limited.may_ask_as("tilda")
    refused(403, limited.check_unlimited)
    for header in (None, "", LONG, f"Basic {LONG}", f"Bearer {LONG}3", "Bearer \udcff"):
        assert "API key" in refused(401, keys.caller, header)
    assert not Keys({}).required and Keys({}).caller(None) == Caller()


def test_keys_of_files_and_of_the_environment(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    path.write_text(json.dumps({LONG: ["agnes"]}))
    keys = load_keys(path, {"QAPERSO_API_KEYS": f"{LONG}2, {LONG}3,"})
    assert keys.caller(f"Bearer {LONG}").queriers == {"agnes"} and keys.caller(f"Bearer {LONG}3") == Caller()
    assert not load_keys(None, {}).required
    for text, says in (
        ("{", "found no JSON"),
        ("{}", "found no key"),
        (json.dumps({LONG: "agnes"}), "something else than queriers"),
        (json.dumps({"short": None}), "a key of 5 characters"),
    ):
        path.write_text(text)
        with pytest.raises(UserError, match=says) as error:
            load_keys(path, {})
        assert LONG not in str(error.value)
    with pytest.raises(UserError, match="cannot be read"):
        load_keys(tmp_path / "none", {})
    with pytest.raises(UserError, match="QAPERSO_API_KEYS: found a key of 1 characters"):
        load_keys(None, {"QAPERSO_API_KEYS": "a"})
