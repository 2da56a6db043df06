from __future__ import annotations

import collections
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qaperso.data.formats import lamp
from qaperso.errors import UserError
from qaperso.types import Dialogue, Turn

FOLDER = Path(__file__).parent / "fixtures" / "formats" / "lamp"
FIXTURE = FOLDER / "LaMP_4" / "dev_questions.json"

ASK = "Generate a headline for the following article:"


def read(path: Path) -> tuple[list[Dialogue], collections.Counter]:
    counts: collections.Counter = collections.Counter()
    return list(lamp.read(path, counts)), counts


def message(path: Path) -> str:
    with pytest.raises(UserError) as caught:
        read(path)
    assert len(str(caught.value).splitlines()) == 1
    return str(caught.value).replace(f"{path.parent}/", "")


def write(folder: Path, questions: Any, outputs: Any = None) -> Path:
    (folder / "dev_questions.json").write_text(json.dumps(questions))
    if outputs is not None:
        (folder / "dev_outputs.json").write_text(json.dumps(outputs))
    return folder / "dev_questions.json"


def test_questions() -> None:
    (first, second), counts = read(FIXTURE)
    assert first == Dialogue(
        id="LaMP_4/dev/310",
        responder="LaMP_4",
        querier="user 310",
        turns=(
            Turn("user 310", "What headline do I put over this?\nThe ferry is late: again."),
            Turn("LaMP_4", "Late, late ferry"),
        ),
        group="LaMP_4/dev/310",
        split="dev",
        fields={
            "task": "LaMP_4",
            "query": "The ferry is late: again.",
            "history": [
                {"id": "3100", "query": "Gulls took the mayor's hat.", "reply": "Hat gone", "time": 1425254400.0}
            ],
        },
    )
    assert (second.id, second.reply, second.fields["history"]) == ("LaMP_4/dev/311", "Grey day", [])
    assert counts == {"empty history": 1}
    assert lamp.units(FOLDER) == lamp.units(FIXTURE) == [FIXTURE]


TASKS = [
    (
        'For an author who has written the paper with the title "On "Tides"", which reference is related? Just answer'
        ' with [1] or [2] without explanation. [1]: "Moons" [2]: "A [2] spoons"',
        "LaMP_1",
        'On "Tides"\nMoons\nA [2] spoons',
        {"title": "Ebb", "abstract": "It ebbs."},
        ("Ebb", "It ebbs."),
    ),
    (
        "Which tag does this movie relate to among the following tags? Just answer with the tag name without further"
        " explanation. tags: [sci-fi, comedy] description: A whale: lost.",
        "LaMP_2",
        "A whale: lost.",
        {"description": "A shark.", "tag": "comedy"},
        ("A shark.", "comedy"),
    ),
    (
        "Which category does this article relate to among the following categories? Just answer with the category name"
        " without further explanation. categories: [crime, sports] article: A heist.",
        "LaMP_2",
        "A heist.",
        {"text": "A match.", "title": "Match", "category": "sports"},
        ("A match.", "sports"),
    ),
    (
        "What is the score of the following review on a scale of 1 to 5? just answer with 1, 2, 3, 4, or 5 without"
        " further explanation. review: Fine.",
        "LaMP_3",
        "Fine.",
        {"text": "Bad.", "score": 1},
        ("Bad.", "1"),
    ),
    (f"{ASK} Fog.", "LaMP_4", "Fog.", {"text": "Rain.", "title": "Wet"}, ("Rain.", "Wet")),
    (
        "Generate a title for the following abstract of a paper: We row.",
        "LaMP_5",
        "We row.",
        {"abstract": "We sail.", "title": "Sails"},
        ("We sail.", "Sails"),
    ),
    (
        "Generate a subject for the following email: Dear all,\nfog.",
        "LaMP_6",
        "Dear all,\nfog.",
        {"text": "Rain.", "title": "Wet"},
        ("Rain.", "Wet"),
    ),
    (
        "Paraphrase the following tweet without any explanation before or after it: at sea: again",
        "LaMP_7",
        "at sea: again",
        {"text": "on land"},
        ("", "on land"),
    ),
]


@pytest.mark.parametrize(("text", "task", "query", "item", "pair"), TASKS)
def test_tasks(tmp_path: Path, text: str, task: str, query: str, item: dict, pair: tuple[str, str]) -> None:
    questions = [{"id": "1", "input": text, "profile": [{"id": "10"} | item]}]
    path = write(tmp_path, questions, {"task": task, "golds": [{"id": "1", "output": "gold"}]})
    ((dialogue,), _) = read(path)
    past = [{"id": "10", "query": pair[0], "reply": pair[1]}]
    assert dialogue.fields == {"task": task, "query": query, "history": past}
    asked, answered = dialogue.turns
    assert (asked.speaker, answered) == ("user 1", Turn(task, "gold"))
    # Our words around the benchmark's: each part of the query, and the labels where there are some, as they were.
    labels = [part for part in ("tags: [sci-fi, comedy]", "categories: [crime, sports]") if part in text]
    assert all(part in asked.text for part in (*query.split("\n"), *labels))
    opening = next(t.opening for t in lamp.TASKS if text.startswith(t.opening))
    assert opening not in asked.text and asked.text == lamp.worded(lamp.match(lamp.TASKS, text, "")[0], text)
    assert task in lamp.sniff(path, path.read_text())


def test_outputs_inside_the_questions(tmp_path: Path) -> None:
    question = {"id": 5, "input": f"{ASK} Fog.", "profile": [], "output": " Grey "}
    ((dialogue,), counts) = read(write(tmp_path, [question, question | {"id": 6, "output": ""}]))
    assert (dialogue.id, dialogue.responder, dialogue.reply) == ("LaMP_4/dev/5", "LaMP_4", "Grey")
    assert counts == {"empty replies": 1}


@pytest.mark.parametrize(
    ("date", "seconds"),
    [(1999, 915148800.0), ("1999", 915148800.0), ("1999-2", 917827200.0), ("1999-02-03", 918000000.0), (1.5e9, 1.5e9)],
)
def test_dates(tmp_path: Path, date: Any, seconds: float) -> None:
    item = {"id": "10", "text": "Rain.", "title": "Wet", "date": date}
    path = write(tmp_path, [{"id": "1", "input": f"{ASK} Fog.", "profile": [item], "output": "Grey"}])
    assert read(path)[0][0].fields["history"][0]["time"] == seconds


QUESTION = {"id": "1", "input": f"{ASK} Fog.", "profile": []}
GOLDS = {"task": "LaMP_4", "golds": [{"id": "1", "output": "Grey"}]}
ITEM = {"id": "2", "text": "Rain.", "title": "Wet"}


@pytest.mark.parametrize(
    ("questions", "outputs", "expected"),
    [
        ([QUESTION], None, "dev_questions.json: found no dev_outputs.json beside it, expected the gold outputs; add"),
        ({}, GOLDS, "dev_questions.json: found an object, expected a list of questions"),
        ([], GOLDS, "dev_questions.json: found no question with an output, expected at least one"),
        ([QUESTION | {"input": "2-17.txt"}], GOLDS, "dev_questions.json: [0].input: found '2-17.txt', expected one of"),
        ([QUESTION] * 2, GOLDS, "dev_questions.json: [1].id: found '1' a second time"),
        (
            [QUESTION | {"id": "9"}],
            GOLDS,
            "dev_questions.json: [0]: found no output for the id '9', expected one in dev_",
        ),
        (
            [QUESTION],
            GOLDS | {"task": "LaMP_5"},
            "dev_questions.json: [0].input: found the instruction of LaMP_4, expected",
        ),
        ([QUESTION], {"golds": []}, "dev_outputs.json: found no such key, expected the key 'task'"),
        ([QUESTION], GOLDS | {"golds": GOLDS["golds"] * 2}, "dev_outputs.json: golds[1].id: found '1' a second time"),
        (
            [QUESTION | {"profile": [{"id": "2"}]}],
            GOLDS,
            "dev_questions.json: [0].profile[0]: found no such key, expected",
        ),
        (
            [QUESTION | {"profile": [ITEM | {"title": {}}]}],
            GOLDS,
            "dev_questions.json: [0].profile[0].title: found an obj",
        ),
        (
            [QUESTION | {"profile": [ITEM | {"date": "May"}]}],
            GOLDS,
            "dev_questions.json: [0].profile[0].date: found 'May'",
        ),
    ],
)
def test_bad_content(tmp_path: Path, questions: Any, outputs: Any, expected: str) -> None:
    assert message(write(tmp_path, questions, outputs)).startswith(expected)


@settings(max_examples=150, deadline=None)
@given(place=st.integers(0, 10_000), byte=st.integers(0, 255), golds=st.booleans())
def test_any_byte_changed_gives_dialogues_or_one_error(
    tmp_path_factory: pytest.TempPathFactory, place: int, byte: int, golds: bool
) -> None:
    folder = tmp_path_factory.mktemp("lamp")
    raws = [bytearray((FIXTURE.parent / f"dev_{name}.json").read_bytes()) for name in ("questions", "outputs")]
    raws[golds][place % len(raws[golds])] = byte
    for name, raw in zip(("questions", "outputs"), raws, strict=True):
        (folder / f"dev_{name}.json").write_bytes(raw)
    try:
        found, _ = read(folder / "dev_questions.json")
    except UserError as error:
        assert str(error).startswith(str(folder)) and len(str(error).splitlines()) == 1
    else:
        assert 1 <= len(found) <= 2 and all(d.reply and d.responder == d.fields["task"] for d in found)
