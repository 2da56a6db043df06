"""Replies that are kept: a file that was resumed is that of an uninterrupted run, and what is not true any more goes."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import untrained

from qaperso import batching, reply
from qaperso.data.store import Store
from qaperso.errors import UserError
from qaperso.eval import predictions
from qaperso.generate import Sampling
from qaperso.run import Run

Tree = Any


@pytest.fixture(scope="module")
def qar() -> tuple[Run, Store, Tree]:
    run, store, trainable = untrained.opened(method="qar", qar__contrast="none")
    return untrained.changed(run, generate__max_new_tokens=4, generate__temperature=1.0), store, trainable


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The ids of the dialogues that were answered, by something quicker than a model."""
    heard: list[str] = []

    def replies(model: str, dialogues: list, rows: list[int], samplings: list[Sampling]) -> list[str]:
        heard.extend(d.id for d in dialogues)
        found = zip(dialogues, rows, samplings, strict=True)
        return ["" if row % 3 == 0 else f"{d.query} {row} {how.seed} é" for d, row, how in found]

    monkeypatch.setattr(batching, "prepare", lambda *_: "a model")
    monkeypatch.setattr(reply, "replies", replies)
    return heard


def prepared(run: Run, trainable: Tree) -> Callable[[], Any]:
    """The run ready to reply, once it is asked for."""
    return lambda: batching.prepare(run, trainable)


def some(store: Store, split: str, count: int) -> list[int]:
    places = store.split(split)
    return places[np.linspace(0, len(places) - 1, count).round().astype(int)].tolist()


def test_names_of_files() -> None:
    folder = Path("runs/a")
    assert predictions.file_of(folder, "test") == folder / "predictions.jsonl"
    assert predictions.file_of(folder, "dev") == folder / "predictions_dev.jsonl"
    assert predictions.file_of(folder, "dev", "across") == folder / "across_dev.jsonl"


def test_records_hold_the_replies_of_the_model(qar: tuple[Run, Store, Tree], tmp_path: Path) -> None:
    run, store, trainable = qar
    indices = some(store, "dev", 6)[::-1]
    found = predictions.collect(run, prepared(run, trainable), store, "dev", indices, 8, tmp_path / "p.jsonl")
    dialogues = [store.dialogues[i] for i in indices]
    how = [Sampling(4, 1.0, 1.0, r["seed"]) for r in found]
    model = batching.prepare(run, trainable)
    assert [r["reply"] for r in found] == reply.replies(model, dialogues, store.row[indices].tolist(), how)
    assert len({r["seed"] for r in found}) == len({r["prompt"] for r in found}) == len(indices)
    for record, d in zip(found, dialogues, strict=True):
        assert list(record) == list(predictions.FIELDS)
        facts = {"id": d.id, "querier": d.querier, "responder": d.responder, "group": d.group, "step": 8}
        facts |= {"query": d.query, "reference": d.reply, "split": "dev"}
        facts |= {"sampling": {"new_tokens": 4, "temperature": 1.0, "top_p": 1.0}}
        assert {k: record[k] for k in facts} == facts
    # In the file they stand in the data's order.
    lines = [json.loads(line) for line in (tmp_path / "p.jsonl").read_text(encoding="utf-8").splitlines()]
    assert lines == found[::-1]


@pytest.mark.parametrize("chunks", [0, 1, 3])
def test_a_resumed_file_is_that_of_an_uninterrupted_run(
    qar: tuple[Run, Store, Tree], tmp_path: Path, asked: list[str], monkeypatch: pytest.MonkeyPatch, chunks: int
) -> None:
    run, store, trainable = qar
    indices = some(store, "dev", 11)
    monkeypatch.setattr(predictions, "CHUNK", 3)
    whole = predictions.collect(run, prepared(run, trainable), store, "dev", indices, 8, tmp_path / "whole.jsonl")
    # Empty replies are replies.
    assert len(asked) == 11 and 0 < [r["reply"] for r in whole].count("") < 11
    asked.clear()
    answer, left = reply.replies, iter(range(chunks))

    def killed(*words: Any) -> list[str]:
        if next(left, None) is None:
            raise KeyboardInterrupt
        return answer(*words)

    path = tmp_path / "p.jsonl"
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(reply, "replies", killed)
        predictions.collect(run, prepared(run, trainable), store, "dev", indices, 8, path)
    before = asked.copy()
    assert len(before) == 3 * chunks == path.read_bytes().count(b"\n")
    assert predictions.collect(run, prepared(run, trainable), store, "dev", indices, 8, path) == whole
    assert path.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    # Nobody was asked twice, and once all is there nobody is asked, nor is a model made.
    assert sorted(asked) == sorted(r["id"] for r in whole)
    monkeypatch.setattr(batching, "prepare", None)
    assert predictions.collect(run, prepared(run, trainable), store, "dev", indices, 8, path) == whole
    assert not list(tmp_path.glob("*.partial"))


def test_a_torn_last_line_is_left_out_with_a_warning(
    qar: tuple[Run, Store, Tree], tmp_path: Path, asked: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    run, store, trainable = qar
    indices, path = some(store, "dev", 4), tmp_path / "p.jsonl"
    predictions.collect(run, prepared(run, trainable), store, "dev", indices, 8, path)
    whole = path.read_bytes()
    # In the middle of a line, in the middle of a character, and before nothing but its end.
    last = whole.rindex(b"\n", 0, -1)
    for cut in (last + 20, whole.rindex("é".encode()) + 1, len(whole) - 1):
        asked.clear()
        path.write_bytes(whole[:cut])
        predictions.collect(run, prepared(run, trainable), store, "dev", indices, 8, path)
        lost = whole[cut:].count(b"\n")
        assert path.read_bytes() == whole and len(asked) == lost > 0
        assert f"{path}, line {4 - lost + 1}: cut off" in capsys.readouterr().err


def test_only_what_is_still_true_is_reused(qar: tuple[Run, Store, Tree], tmp_path: Path, asked: list[str]) -> None:
    run, store, trainable = qar
    indices, path = some(store, "dev", 6), tmp_path / "p.jsonl"
    whole = predictions.collect(run, prepared(run, trainable), store, "dev", indices, 8, path)
    content = path.read_bytes()

    def again(run: Run = run, store: Store = store, part: list[int] = indices, step: int = 8) -> int:
        """How many were asked anew."""
        asked.clear()
        predictions.collect(run, prepared(run, trainable), store, "dev", part, step, path)
        return len(asked)

    # Of a part of the dialogues: the others' lines stay.
    assert again(part=indices[2:4]) == 0 and path.read_bytes() == content
    assert again(step=9) == 6 and again() == 6 and path.read_bytes() == content
    # Lines of another step go, whoever they are about.
    assert again(part=indices[:1], step=9) == 1 and path.read_bytes().count(b"\n") == 1
    assert again() == 6
    cooler = untrained.changed(run, generate__temperature=0.5)
    assert again(run=cooler) == 6 and again(run=cooler) == 0 and again() == 6
    # Another prompt (names hidden), another row, other words.
    assert again(run=untrained.changed(run, data__names="masked")) == 6 and again() == 6
    row = store.row.copy()
    row[indices[1]] = 0
    assert again(store=dataclasses.replace(store, row=row)) == 1 and again() == 1
    dialogues = list(store.dialogues)
    old = dialogues[indices[2]]
    dialogues[indices[2]] = dataclasses.replace(
        old, turns=(*old.turns[:-1], dataclasses.replace(old.turns[-1], text="?"))
    )
    assert again(store=dataclasses.replace(store, dialogues=tuple(dialogues))) == 1 and again() == 1
    # A dialogue that the data has no more.
    dialogues[indices[2]] = dataclasses.replace(old, id="new")
    assert again(store=dataclasses.replace(store, dialogues=tuple(dialogues))) == 1
    assert path.read_bytes().count(b"\n") == 6 and b'"new"' in path.read_bytes()
    assert again() == 1 and path.read_bytes() == content and whole[0]["id"].encode() in content


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("", "not JSON"),
        ('{"id": "a", ', "not JSON"),
        ("\ud800", "not JSON"),
        ("[1]", "found list, expected a JSON object"),
        ('{"id": 7}', "'id' is 7, expected str"),
        ("LESS", "'reply' is nothing, expected str"),
        ("NULL", "'reply' is None, expected str"),
        ("TRUE", "'seed' is True, expected int"),
    ],
)
def test_a_corrupt_line_is_named(
    qar: tuple[Run, Store, Tree], tmp_path: Path, asked: list[str], line: str, complaint: str
) -> None:
    run, store, trainable = qar
    indices, path = some(store, "dev", 3), tmp_path / "p.jsonl"
    predictions.collect(run, prepared(run, trainable), store, "dev", indices, 8, path)
    lines = path.read_text(encoding="utf-8").splitlines()
    record = json.loads(lines[1])
    changes: dict[str, Any] = {"NULL": {"reply": None}, "TRUE": {"seed": True}}
    if line == "LESS":
        del record["reply"]
    lines[1] = json.dumps(record | changes.get(line, {})) if line.isupper() else line
    path.write_bytes("".join(f"{one}\n" for one in lines).encode("utf-8", "surrogatepass"))
    content = path.read_bytes()
    with pytest.raises(UserError) as error:
        predictions.collect(run, prepared(run, trainable), store, "dev", indices, 8, path)
    assert str(error.value).startswith(f"{path}, line 2: {complaint}")
    assert "delete the line" in str(error.value) and path.read_bytes() == content
    # The mend that it names.
    path.write_text("".join(f"{one}\n" for one in (lines[0], lines[2])), encoding="utf-8")
    asked.clear()
    assert (
        len(predictions.collect(run, prepared(run, trainable), store, "dev", indices, 8, path)) == 3 and len(asked) == 1
    )


def test_fits(qar: tuple[Run, Store, Tree]) -> None:
    run, store, _ = qar
    assert reply.fits(run, store.dialogues[0])
    assert not reply.fits(run, reply.question(run, (), "tilda", "bread " * 130, "maren"))
