from __future__ import annotations

import collections
import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qaperso.data.formats import reviews
from qaperso.errors import UserError
from qaperso.types import Dialogue, Turn

FIXTURE = Path(__file__).parent / "fixtures" / "formats" / "reviews" / "Lamps.jsonl"


def read(path: Path, start: int = 0, stop: int | None = None, **columns: str) -> tuple[list, collections.Counter]:
    counts: collections.Counter = collections.Counter()
    return list(reviews.read(path, counts, columns, start, stop)), counts


def test_reviews() -> None:
    (first, second), counts = read(FIXTURE)
    assert first == Dialogue(
        id="Lamps/0",
        responder="reviewer",
        querier="AE2",
        turns=(
            Turn("AE2", "Write my review of this item.\nItem: B00"),
            Turn("reviewer", "Lights the whole quay."),
        ),
        group="AE2/B00",
        time=1588687728.923,
        fields={"item": "B00", "rating": 4.0, "title": "Bright"},
    )
    assert (second.querier, second.group, second.time) == ("AG7", "AG7/B03", 1252800000.0)
    assert second.fields == {"item": "B03", "rating": 2.0, "title": "No"}
    assert counts == {"empty reviews": 1}
    assert reviews.units(FIXTURE.parent) == [FIXTURE]


def test_other_names_and_all_there_is(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    review = {
        "who": "Ida",
        "item": 7,
        "body": "Good.",
        "stars": "4.5",
        "item_title": "Lamp",
        "description": ["Blue.", "Bright."],
        "date": "2016-03-09 16:21:11",
    }
    path.write_text(json.dumps([review, review | {"body": None}]))
    ((dialogue,), counts) = read(path, user="who", text="body")
    assert dialogue.turns[0].text == "Write my review of this item.\nItem: Lamp\nDescription: Blue. Bright."
    assert (dialogue.id, dialogue.group, dialogue.time) == ("a/0", "Ida/7", 1457540471.0)
    assert dialogue.fields == {"item": "7", "rating": 4.5, "item_title": "Lamp", "description": "Blue. Bright."}
    assert counts == {"empty reviews": 1}


GOOD = {"user": "Ida", "item": "lamp", "text": "Good."}


@pytest.mark.parametrize(
    ("review", "expected"),
    [
        ([], ": found a list, expected an object"),
        ({}, ": found no key, expected one that says the user (user, user_id, "),
        ({"user": "Ida", "text": "x"}, ": found only the keys 'user', 'text', expected one that says the item ("),
        (GOOD | {"user": ""}, ": user: found '', expected a name"),
        (GOOD | {"user": "reviewer"}, ": user: found 'reviewer', expected another name than the responder's"),
        (GOOD | {"rating": "good"}, ": rating: found 'good', expected a rating such as 4.0"),
        (GOOD | {"overall": float("nan")}, ": overall: found NaN, expected a rating"),
        (GOOD | {"time": "then"}, ": time: found 'then', expected Unix seconds or a date"),
        (GOOD | {"time": 1e30}, ": time: found 1e+30, expected Unix seconds or a date"),
        (GOOD | {"text": 5}, ": text: found 5, expected a string"),
    ],
)
def test_bad_content(tmp_path: Path, review: object, expected: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(f"{json.dumps(GOOD)}\n{json.dumps(review)}")
    with pytest.raises(UserError) as caught:
        read(path)
    assert str(caught.value).startswith(f"{path}:2{expected}") and len(str(caught.value).splitlines()) == 1


def test_bad_columns_and_no_text(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="column: found 'txt', expected what a review says; did you mean 'text'?"):
        read(FIXTURE, txt="body")
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps(GOOD))
    with pytest.raises(UserError, match=r"no review with text \(under body\), expected .*; say --column text=KEY"):
        read(path, text="body")


@settings(max_examples=100, deadline=None)
@given(
    content=st.lists(
        st.tuples(st.sampled_from(["Ida", "Bo"]), st.integers(0, 3), st.sampled_from(["x", "\u4f60\u597d", ""])),
        min_size=1,
        max_size=6,
    ),
    cuts=st.lists(st.integers(0, 3000), max_size=4),
)
def test_any_cuts_give_every_review_once(tmp_path_factory: pytest.TempPathFactory, content: list, cuts: list) -> None:
    path = tmp_path_factory.mktemp("reviews") / "a.jsonl"
    rows = [{"user": user, "item": item, "text": text} for user, item, text in content]
    path.write_bytes("\n".join(json.dumps(row, ensure_ascii=False) for row in rows).encode())
    size = path.stat().st_size
    edges = sorted({0, size // 2, size, *(cut % (size + 1) for cut in cuts)})
    parts = [read(path, start, stop) for start, stop in zip(edges[:-1], edges[1:], strict=True)]
    found = [dialogue for part, _ in parts for dialogue in part]
    assert [(d.group, d.reply) for d in found] == [(f"{user}/{item}", text) for user, item, text in content if text]
    assert sum(counts["empty reviews"] for _, counts in parts) == sum(not text for *_, text in content)
    assert len({d.id for d in found}) == len(found)


@settings(max_examples=100, deadline=None)
@given(place=st.integers(0, 10_000), byte=st.integers(0, 255))
def test_any_byte_changed_gives_reviews_or_one_error(
    tmp_path_factory: pytest.TempPathFactory, place: int, byte: int
) -> None:
    raw = bytearray(FIXTURE.read_bytes())
    raw[place % len(raw)] = byte
    path = tmp_path_factory.mktemp("any") / "a.jsonl"
    path.write_bytes(raw)
    try:
        found, _ = read(path)
    except UserError as error:
        assert str(error).startswith(str(path)) and len(str(error).splitlines()) == 1
    else:
        assert found and all(d.reply and d.querier != d.responder for d in found)
