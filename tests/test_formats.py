from __future__ import annotations

import collections
import inspect
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qaperso.data import shards
from qaperso.data.formats import FORMATS, as_time, detect, load, shape
from qaperso.errors import UserError

FIXTURES = Path(__file__).parent / "fixtures" / "formats"


@pytest.mark.parametrize("name", FORMATS)
def test_readers_share_one_interface(name: str) -> None:
    module = load(name)
    assert isinstance(module.LINES, bool)
    assert list(inspect.signature(module.sniff).parameters) == ["path", "head"]
    assert list(inspect.signature(module.units).parameters) == ["path"]
    assert list(inspect.signature(module.read).parameters) == ["unit", "counts", "columns", "start", "stop"]


@pytest.mark.parametrize("name", FORMATS)
def test_nothing_of_a_folder_of_the_format_is_left(name: str) -> None:
    """Outputs of LaMP and lists of Slack are read beside the units."""
    assert shards.unread(name, [FIXTURES / name]) == []


@pytest.mark.parametrize(
    ("name", "file", "called"),
    [
        ("whatsapp", "WhatsApp Chat with Ida.txt", "WhatsApp Chat with Dev.txt"),
        ("whatsapp", "WhatsApp Chat with Ida.txt", "test/_chat.txt"),
        ("telegram", "result.json", "test/result.json"),
        ("discord", "Quay - harbour [9].json", "Dev - harbour [9].json"),
        ("slack", "harbour", "dev"),
    ],
)
def test_names_of_people_and_channels_are_no_splits(tmp_path: Path, name: str, file: str, called: str) -> None:
    folder = tmp_path / name
    shutil.copytree(FIXTURES / name, folder)
    (folder / "test").mkdir()
    records = list(load(name).read((folder / file).rename(folder / called), collections.Counter()))
    assert records and {record.split for record in records} == {None}


def test_hidden_files_are_no_input(tmp_path: Path) -> None:
    """What editors and systems leave in a folder is neither read nor part of what the data was made from."""
    table = "sender,text\nIda,Is it ready?\nNoor,Almost.\n"
    (tmp_path / "chats.csv").write_text(table)
    before = shards.fingerprint([tmp_path])
    (tmp_path / ".ipynb_checkpoints").mkdir()
    (tmp_path / ".ipynb_checkpoints" / "chats-checkpoint.csv").write_text(table)
    (tmp_path / "._chats.csv").write_bytes(b"\x00\x05\x16\x07")
    (tmp_path / ".DS_Store").write_bytes(b"\x00")
    assert load("table").units(tmp_path) == [tmp_path / "chats.csv"]
    assert detect(tmp_path)[1] == "chats.csv: a table with the columns sender, text"
    assert shards.fingerprint([tmp_path]) == before and before["files"] == 1


def test_unknown_format() -> None:
    with pytest.raises(UserError) as caught:
        load("whatsap")
    assert str(caught.value) == "format: found 'whatsap', expected a known format; did you mean 'whatsapp'?"


@pytest.mark.parametrize(
    ("name", "file", "reason"),
    [
        ("jsonl", "harbour.jsonl", 'JSON lines of the form {"responder", "querier", "turns", ...}'),
        ("mqdialog", "ida_train.json", 'a JSON list of {"conversations": [{"from", "value"}, ...]}'),
        (
            "longlamp",
            "topic_test.jsonl",
            'rows of {"input", "output", "profile"} with the instruction of topic_writing',
        ),
        (
            "lamp",
            "LaMP_4/dev_questions.json",
            'a JSON list of {"id", "input", "profile"} with the instruction of LaMP_4',
        ),
        ("chitchat", "dataset.json", 'a JSON object of {"messages": [[{"text", "timestamp", "sender"}, ...], ...]}'),
        ("reviews", "Lamps.jsonl", "reviews with the keys user_id, parent_asin, text"),
        ("scenes", "harbour.jsonl", 'JSON lines of the form {"group", "turns": [{"speaker", "text"}, ...]}'),
    ],
)
def test_files_and_folders_are_told_apart(name: str, file: str, reason: str) -> None:
    assert detect(FIXTURES / name / file) == (name, reason)
    found, why = detect(FIXTURES / name)
    assert found == name and why.endswith(f": {reason}")


TELEGRAM = {
    "name": "Ida",
    "type": "personal_chat",
    "id": 5,
    "messages": [
        {
            "id": 1,
            "type": "message",
            "date": "2024-05-01T10:00:00",
            "date_unixtime": "1714557600",
            "from": "Ida",
            "from_id": "user5",
            "text": "Hello?",
            "text_entities": [{"type": "plain", "text": "Hello?"}],
        }
    ],
}


def test_no_reader_of_a_benchmark_takes_a_telegram_export(tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    path.write_text(json.dumps(TELEGRAM))
    assert detect(path)[0] == "telegram"
    head = path.read_text()
    for name in ("jsonl", "mqdialog", "longlamp", "lamp", "chitchat", "reviews", "scenes"):
        assert load(name).sniff(path, head) is None


def test_two_formats_at_once(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes((FIXTURES / "scenes" / "harbour.jsonl").read_bytes())
    (tmp_path / "b.json").write_bytes((FIXTURES / "mqdialog" / "ida_train.json").read_bytes())
    name, reason = detect(tmp_path)
    assert name == "mqdialog"
    assert reason.startswith("b.json: a JSON list of ") and reason.endswith("; it also looks like scenes")


def test_nothing_known(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nowhere: found nothing there, expected a file or a folder"):
        detect(tmp_path / "nowhere")
    path = tmp_path / "a.bin"
    path.write_bytes(b"\x00\xff\x00")
    for place in (path, tmp_path):
        with pytest.raises(UserError) as caught:
            detect(place)
        listed = ", ".join(FORMATS)
        expected = f"nothing that looks like a known format, expected one of {listed}; say --format NAME"
        assert str(caught.value) == f"{place}: found {expected}"


_JSON = st.recursive(
    st.none() | st.integers() | st.text(st.characters(exclude_categories=("Cs",)), max_size=6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("abc.", max_size=2), inner, max_size=3),
    max_leaves=10,
)


def _paths(value: Any, here: str = "") -> set[str]:
    if isinstance(value, list):
        return {path for inner in value for path in _paths(inner, f"{here}[]")}
    if isinstance(value, dict):
        inside = {f"{here}.{key}".lstrip("."): inner for key, inner in value.items()}
        return set(inside) | {
            path for key, inner in value.items() for path in _paths(inner, f"{here}.{key}".lstrip("."))
        }
    return set()


@settings(max_examples=300, deadline=None)
@given(value=st.lists(_JSON, max_size=4) | st.dictionaries(st.text("abc", min_size=1), _JSON), cut=st.integers(0, 400))
def test_shape_is_that_of_the_parsed_value(value: Any, cut: int) -> None:
    text = json.dumps(value, ensure_ascii=False)
    assert shape(f' \n{text}\n{{"more": 1}}') == _paths(value)
    assert shape(text[:cut]) <= _paths(value)


def test_shape_of_no_json() -> None:
    assert shape('[01.05.24, 10:00:00] Ida: "hello": all') == set()
    assert shape('Ida: {"a": 1}') == set()
    assert shape("") == shape("[" * 65536) == set()


@settings(max_examples=200, deadline=None)
@given(raw=st.binary(max_size=80) | st.text(alphabet='{}[]":,\\ \nabIda1', max_size=80).map(str.encode))
def test_detection_is_total(tmp_path_factory: pytest.TempPathFactory, raw: bytes) -> None:
    path = tmp_path_factory.mktemp("any") / "a.json"
    path.write_bytes(raw)
    try:
        name, reason = detect(path)
    except UserError as error:
        assert str(error).startswith(str(path)) and len(str(error).splitlines()) == 1
    else:
        assert name in FORMATS and reason


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        (0, 0.0),
        (1252800000, 1252800000.0),
        ("1252800000", 1252800000.0),
        (1588687728923, 1588687728.923),
        (1714550400.25, 1714550400.25),
        (2009, 1230768000.0),
        ("2009-09", 1251763200.0),
        ("2009-9-3", 1251936000.0),
        (20090903, 1251936000.0),
        ("2009-09-03T01:00:00+01:00", 1251936000.0),
        ("2009-09-03 00:00:00", 1251936000.0),
    ],
)
def test_times(value: Any, seconds: float) -> None:
    assert as_time(value, "a") == seconds


@pytest.mark.parametrize("value", [None, True, [], {}, "", "noon", "2009-13", 20091399, float("nan"), 1e300, 10**400])
def test_no_times(value: Any) -> None:
    with pytest.raises(
        UserError, match=r"^a: found .*, expected Unix seconds or a date such as 2024-05-01; write it so"
    ):
        as_time(value, "a")
