"""Enrolling: somebody new is known to whatever opens the run, and what training wrote stays as it is."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from newcomers import lines_of, renamed, replies, town
from tiny import TINY, call, contents, finished, one_device, trained  # noqa: F401

from qaperso import chat, enrol, people, reply, run
from qaperso.eval import scores
from qaperso.types import Dialogue, Turn

pytestmark = pytest.mark.usefixtures("one_device")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A run of two towers, to be changed."""
    return Path(shutil.copytree(finished("qar")[0], tmp_path / "run"))


def test_somebody_new_is_known_and_nobody_else_is_changed(folder: Path, tmp_path: Path) -> None:
    before = contents(folder)
    opened = run.open_run(folder)
    trainable, _, step = run.restore(opened)
    given = town(folder, "pip", 6)
    file = lines_of([*renamed(given, "zita"), *town(folder, "voss", 1)], tmp_path / "zita.jsonl")
    code, out, err = call(enrol.main, "--workdir", folder, "--querier", "zita", "--input", file)
    assert code == 0, err
    assert out.startswith("enrolled 'zita' in row 13 of ") and "learned: " in out and "held out: " in out
    now = contents(folder)
    assert {k: v for k, v in now.items() if k in before} == before
    assert set(now) - set(before) == {"enrolled", "enrolled/000013.json", people.LOCK}

    again = run.open_run(folder)
    changed, _, at = run.restore(again)
    assert at == step and again.registry.row("zita") == 13 and again.registry.rows == opened.registry.rows
    table, old = (np.asarray(t["tower"]["rows"]) for t in (changed, trainable))
    np.testing.assert_array_equal(np.delete(table, 13, 0), np.delete(old, 13, 0))
    (person,) = again.people
    np.testing.assert_array_equal(table[13], person.vector)
    assert person.step == step and [d.querier for d in person.dialogues] == ["zita"] * 6
    figures = person.found["given"]
    assert figures["after"] < figures["before"] and person.found["learned"] + person.found["held_out"] == 6
    # The figures are what the run says of these dialogues as it is opened now.
    learned, unheard = enrol.hold_out(person.dialogues)
    for dialogues, found in ((learned, figures), (unheard, person.found["unheard"])):
        examples, _ = enrol.encode(again, dialogues)
        for row, key in ((0, "before"), (13, "after")):
            sums, counts = scores.reply_nll(again, changed, [dataclasses.replace(e, querier=row) for e in examples])
            assert found[key] == pytest.approx(sums.sum() / counts.sum(), rel=1e-4) and found["tokens"] == counts.sum()

    # Everybody else is answered as before; the new one can be talked to as.
    names = opened.registry.queriers[:3]
    *said, new = replies(again, changed, [*names, "zita"])
    assert said == replies(again, trainable, names) and new
    # A name is taken once; the next row is the next one's.
    words = ("--workdir", folder, "--input", file, "--querier")
    assert "'zita' is known to this run already; forget them first" in call(enrol.main, *words, "zita")[2]

    # Weights that the row was not fitted beside are refused, and fitted anew.
    with people.locked(folder):
        people.write(folder, dataclasses.replace(person, step=step - 1))
    code, out, err = call(chat.main, "--workdir", folder, "--querier", "zita", "--once", "well?")
    assert code == 2 and "'zita' was enrolled on checkpoint" in err and "--again" in err
    code, out, err = call(enrol.main, "--workdir", folder, "--again")
    assert code == 0 and out.startswith("enrolled 'zita' in row 13"), err
    np.testing.assert_array_equal(run.restore(run.open_run(folder))[0]["tower"]["rows"], table)
    assert run.open_run(folder).people[0].dialogues == person.dialogues


def test_a_script_will_do(folder: Path, tmp_path: Path) -> None:
    turns = ["Zita: what do i still owe?", "maren: ahoy, the ledger says tab stands at nine crowns."] * 3
    file = tmp_path / "talk.txt"
    file.write_text("\n".join([*turns, "---", "Zita: thank you.", "maren: take care."]), encoding="utf-8")
    code, out, err = call(enrol.main, "--workdir", folder, "--querier", "Zita", "--input", file)
    assert code == 0 and out.startswith("enrolled 'Zita' in row 13 "), err
    (person,) = run.open_run(folder).people
    assert [len(d.replies) for d in person.dialogues] == [3, 1] and person.found["unheard"] is None


def test_a_run_without_rows_knows_them_by_their_history(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    trained(TINY, folder, "method=prompts", "prompts.kind=history", "prompts.tokens=60")
    file = lines_of(renamed(town(folder, "pip", 2), "zita"), tmp_path / "zita.jsonl")
    before = run.open_run(folder)
    asked = {name: reply.question(before, [], name, "well?", "maren") for name in ("zita", "pip")}
    assert not before.preface(asked["zita"]) and before.preface(asked["pip"])
    code, out, err = call(enrol.main, "--workdir", folder, "--querier", "zita", "--input", file)
    assert code == 0 and "no row was fitted" in out, err
    after = run.open_run(folder)
    said = {turn.text for d in after.people[0].dialogues for turn in d.turns}
    told = after.preface(asked["zita"])
    assert told and {turn.text for turn in told} <= said and {turn.speaker for turn in told} == {"zita", "maren"}
    assert after.preface(asked["pip"]) == before.preface(asked["pip"])
    assert run.restore(after)[2] == 0


def test_what_cannot_be_enrolled(folder: Path, tmp_path: Path) -> None:
    file = lines_of(renamed(town(folder, "pip", 1), "zita"), tmp_path / "zita.jsonl")
    before = contents(folder)

    def refused(*words: Any, where: Path = folder) -> str:
        code, out, err = call(enrol.main, "--workdir", where, *words)
        assert (code, out) == (2, "") and err.startswith("error: ") and len(err.splitlines()) == 1, err
        return err

    asks = ("--input", file, "--querier")
    assert "found no dialogue in which 'maren' answers 'zitta'" in (line := refused(*asks, "zitta"))
    assert "did you mean 'zita'?" in line
    assert "'pip' is known to this run already" in refused(*asks, "pip")
    assert "'stranger' is what everybody unknown is called" in refused(*asks, "stranger")
    assert "--responder 'marin' is not known" in refused(*asks, "zita", "--responder", "marin")
    assert "--input PATH, or give --again" in refused("--querier", "zita")
    assert "leave --querier and --input out" in refused(*asks, "zita", "--again")
    assert "found nobody who was enrolled" in refused("--again")
    assert "nothing there" in refused("--input", tmp_path / "absent", "--querier", "zita")
    (tmp_path / "other.txt").write_text("Ida: one.\nOle: two.\nIda: three.\n", encoding="utf-8")
    assert "nobody is answered there" in refused("--input", tmp_path / "other.txt", "--querier", "zita")
    assert "no querier rows in this run" in refused(*asks, "zita", where=finished("adapter")[0])
    long = dataclasses.replace(renamed(town(folder, "pip", 1), "zita")[0], id="long")
    long = dataclasses.replace(long, turns=(Turn("zita", "bread " * 200), Turn("maren", "aye")))
    assert "fits batch.length" in refused("--input", lines_of([long], tmp_path / "l.jsonl"), "--querier", "zita")
    assert {k: v for k, v in contents(folder).items() if k != people.LOCK} == before
    # Every row is somebody's.
    record = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    record["registry"]["queriers"] += ["a", "b", "c", "d"]
    record["registry"]["spare"] = 0
    (folder / "run.json").write_text(json.dumps(record), encoding="utf-8")
    assert "found no free row beside those of 16 queriers" in refused(*asks, "zita")


def dialogue(number: int, group: str, time: float | None = None) -> Dialogue:
    turns = (Turn("zita", "well?"), Turn("maren", "aye"))
    return Dialogue(f"d{number}", "maren", "zita", turns, group, time)


@pytest.mark.parametrize(
    "groups, times, held",
    [
        ("abcde", None, [4]),
        ("abcd", None, []),  # too few
        ("aaaaa", None, []),  # nothing would be left
        ("aabbcc", None, [4, 5]),
        ("abccc", None, [1]),  # the last group is too large
        ("abcde", [5, 1, 2, 3, 4], [0]),  # the newest
    ],
)
def test_what_is_held_out(groups: str, times: list[float] | None, held: list[int]) -> None:
    given = [dialogue(i, g, None if times is None else float(times[i])) for i, g in enumerate(groups)]
    learned, unheard = enrol.hold_out(given)
    assert unheard == [given[i] for i in held]
    assert learned == [d for i, d in enumerate(given) if i not in held]
    assert not {d.group for d in learned} & {d.group for d in unheard}
