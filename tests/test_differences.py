"""What is asked, and how answers of all kinds are read."""

from __future__ import annotations

import dataclasses
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qaperso import differences
from qaperso.differences import ASPECTS, DIALOGUES, REVIEWS, Differences, Quote
from qaperso.types import Turn

GOOD = Differences("shorter", "colder", "names the price first")
FIELDS = json.dumps(dataclasses.asdict(GOOD))


def test_aspects_are_the_fields() -> None:
    assert list(ASPECTS) == [field.name for field in dataclasses.fields(Differences)]


@pytest.mark.parametrize(
    "text",
    [
        FIELDS,
        f"Sure!\n```json\n{json.dumps(dataclasses.asdict(GOOD), indent=2)}\n```\nAnything else?",
        FIELDS.replace("writing", "Writing").replace("semantic", "SEMANTIC "),
        FIELDS.replace('"shorter"', '["shorter"]'),
        FIELDS.replace("shorter", "  shorter\\n"),
        f'{{"thought": "hm"}} {FIELDS}',
        FIELDS[:-1] + ', "extra": 3}',
        "writing: shorter\nemotional: colder\nsemantic: names the price first",
        "- **Writing** style: shorter\n- **Emotional** style: colder\n- **Semantic** style: names the price first\n",
        '1. writing: "shorter"\n2. emotional: colder,\n3. semantic: names the price first',
        FIELDS.replace("}", "").replace(",", ",\n").replace("{", "{\n"),
    ],
)
def test_what_can_be_read(text: str) -> None:
    assert differences.parse(text, 10) == GOOD


@pytest.mark.parametrize(
    "text",
    [
        "",
        "They are shorter, colder, and name the price first.",
        '{"writing": "shorter", "emotional": "colder"}',
        FIELDS.replace('"shorter"', '""'),
        FIELDS.replace('"shorter"', "5"),
        FIELDS.replace('"shorter"', "null"),
        FIELDS.replace('"shorter"', '[["shorter"]]'),
        FIELDS[: len(FIELDS) // 2],
        f"[{'[' * 5000}",
        '{"writing":' * 5000,
        "writing: shorter\nwriting: longer",
        "x" * differences.LONGEST + FIELDS,
    ],
)
def test_what_cannot(text: str) -> None:
    assert differences.parse(text, 10) is None


def test_fields_are_cut() -> None:
    assert differences.parse(FIELDS, 2) == Differences("shorter", "colder", "names the ...")


word = st.text('abc\u4f60"\\{}', min_size=1, max_size=4)
sentence = st.lists(word, min_size=1, max_size=6).map(" ".join).filter(lambda s: differences._sentence(s) == s)


@settings(max_examples=60, deadline=None)
@given(st.tuples(sentence, sentence, sentence), st.booleans())
def test_what_was_written_is_read(said: tuple, ascii: bool) -> None:
    found = Differences(*said)
    text = json.dumps(dataclasses.asdict(found), ensure_ascii=ascii)
    assert differences.parse(text, 10) == Differences(*(differences.clip(s, 10) for s in said))


@settings(max_examples=100, deadline=None)
@given(st.text(st.sampled_from('{}[]":,\\\n -*writngemoalsc'), max_size=120) | st.text(max_size=60))
def test_any_answer_is_read_or_not(text: str) -> None:
    found = differences.parse(text, 3)
    assert found is None or all(dataclasses.astuple(found))


def test_clip() -> None:
    assert differences.clip("a\n b\t c", 3) == "a b c"
    assert differences.clip("a b c", 2) == "a b ..."
    assert differences.clip("", 2) == ""
    # A text without blanks is cut by letters.
    assert differences.clip("\u4f60" * 99, 3) == "\u4f60" * 36 + " ..."


@settings(max_examples=100, deadline=None)
@given(st.text(max_size=80), st.integers(1, 9))
def test_clipped_texts_are_one_bounded_line(text: str, words: int) -> None:
    found = differences.clip(text, words)
    assert "\n" not in found and "\r" not in found
    assert len(found.split()) <= words + 1 and len(found) <= differences.LETTERS * words + 4
    assert found == " ".join(text.split()) or found.endswith(" ...")


def test_questions() -> None:
    own, others = Quote("a lamp", "bright"), [Quote("a lamp", "dim"), Quote("a red lamp", "dark")]
    system, user = differences.compare(REVIEWS, own, others)
    assert [system["role"], user["role"]] == ["system", "user"]
    assert all(f'"{aspect}": "..."' in system["content"] for aspect in ASPECTS)
    assert user["content"] == (
        "## Item\na lamp\n\n## This reviewer\nbright\n\n## Another reviewer, 1\ndim\n\n"
        "## Another reviewer, 2\n(Item: a red lamp)\ndark"
    )
    said = differences.summarise(DIALOGUES, [("hello?", GOOD)], [Quote("hello?", "hi"), Quote("who?", "me")])
    assert said[1]["content"] == (
        f"## Difference 1\nQuery: hello?\n{FIELDS}\n\n## Record 1\nQuery: hello?\nReply to this person: hi\n\n"
        "## Record 2\nQuery: who?\nReply to this person: me"
    )
    assert "how the speaker replies to this person" in said[0]["content"]
    again = differences.repair("they differ " * 9999)
    assert len(again[1]["content"]) < differences.LONGEST + 20 and "they differ" in again[1]["content"]


def test_a_reply_is_asked_for_as_a_chat() -> None:
    turns = [Turn("system", "be brief"), Turn("ann", "a?"), Turn("bo", "b"), Turn("ann", "c?"), Turn("bo", "secret")]
    assert differences.answer(turns, "bo") == [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "a?"},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "c?"},
    ]
