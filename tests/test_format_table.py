from __future__ import annotations

import collections
import csv
import io
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qaperso.data.formats import common, detect, table
from qaperso.errors import UserError
from qaperso.types import Conversation, Message

FOLDER = Path(__file__).parent / "fixtures" / "formats" / "table"


def read(path: Path, text: str, /, **columns: str) -> tuple[list[Conversation], dict[str, int]]:
    path.write_text(text, encoding="utf-8", newline="")
    counts: collections.Counter[str] = collections.Counter()
    return list(table.read(path, counts, columns)), dict(counts)


def rows(path: Path, text: str, /, **columns: str) -> list[tuple[str | None, str, float | None]]:
    ((found,), _) = read(path, text, **columns)
    return [(m.speaker, m.text, m.time) for m in found.messages]


def test_fixture():
    (unit,) = table.units(FOLDER)
    counts: collections.Counter[str] = collections.Counter()
    assert list(table.read(unit, counts)) == [
        Conversation(
            name="wechat/5",
            messages=(Message("me", "好了吗？", 1619863201.0), Message("小艾", "快了，\n马上", 1619863202.0)),
            group="wechat/5",
        ),
        Conversation(name="wechat/6", messages=(Message("Noor", "Hello", 1619863204.0),), group="wechat/6"),
    ]
    assert counts == {"system lines": 1, "media": 1, "empty messages": 1}
    why = "a table with the columns localId, TalkerId, Type, SubType, IsSender, CreateTime"
    assert detect(unit) == ("table", why)


@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
def test_delimiters(tmp_path: Path, delimiter: str):
    lines = [["Sender", "Text", "Mood, now; or | not"], ["Ida", "a, b; c | d", ""], ["Noor", 'say "no"\r\nor\t', ""]]
    file = io.StringIO()
    csv.writer(file, delimiter=delimiter).writerows(lines)
    assert rows(tmp_path / "a.csv", file.getvalue()) == [("Ida", "a, b; c | d", None), ("Noor", 'say "no"\r\nor', None)]


@pytest.mark.parametrize(
    "header",
    [
        "发送人,时间,内容",
        "昵称,StrTime,StrContent",
        "NickName,CreateTime,content",
        "talker,timestamp,message",
        "from,date,body",
    ],
)
def test_known_headers(tmp_path: Path, header: str):
    assert rows(tmp_path / "a.csv", f"{header}\nIda,2021-05-01 10:00:00,好\n") == [("Ida", "好", 1619863200.0)]


def test_columns_by_name(tmp_path: Path):
    text = "Who,What,When,sender,time\nIda,a,1619863200,x,never\n"
    assert rows(tmp_path / "a.csv", text, sender="who", text="What", time="When") == [("Ida", "a", 1619863200.0)]
    assert rows(tmp_path / "a.csv", text, text="What", time="") == [("x", "a", None)]


@pytest.mark.parametrize(
    ("cell", "time"),
    [
        ("1619863200", 1619863200.0),
        ("1619863200.5", 1619863200.5),
        ("1619863200500", 1619863200.5),
        ("2021-05-01 10:00:00", 1619863200.0),
        ("2021/5/1 10:00", 1619863200.0),
        ("2021.05.01 10:00:00.5", 1619863200.5),
        ("2021年5月1日 10:00", 1619863200.0),
        ("2021-05-01T12:00:00+02:00", 1619863200.0),
        ("2021-05-01T10:00:00Z", 1619863200.0),
        ("2021-05-01", 1619827200.0),
        ("", None),
    ],
)
def test_times(tmp_path: Path, cell: str, time: float | None):
    assert rows(tmp_path / "a.csv", f"sender,text,time\nIda,a,{cell}\n") == [("Ida", "a", time)]


@pytest.mark.parametrize(
    "cell", ["20210501", "20210501100000", "12", "noon", "2021-02-30", "1/5/2021", "2021-05-01 25:00"]
)
def test_times_refused(tmp_path: Path, cell: str):
    with pytest.raises(UserError) as caught:
        rows(tmp_path / "a.csv", f"sender,text,time\nIda,a,{cell}\n")
    assert str(caught.value) == (
        f"{tmp_path}/a.csv:2: found the time '{cell}', expected Unix seconds or milliseconds, or a date; mend it, name"
        " another column with --column time=NAME, or leave times out with --column time="
    )


def test_conversations(tmp_path: Path):
    text = "from,to,text\nIda,Noor,a\nNoor,Ida,b\nIda,Sam,c\nIda,,d\n"
    found, _ = read(tmp_path / "a.csv", text)
    assert [(c.name, [m.text for m in c.messages]) for c in found] == [
        ("a/Ida & Noor", ["a", "b"]),
        ("a/Ida & Sam", ["c"]),
        ("a", ["d"]),
    ]
    found, _ = read(tmp_path / "a.csv", "sender,text,会话\nIda,a,1\nIda,b,2\nNoor,c,1\n")
    assert [(c.name, [m.text for m in c.messages]) for c in found] == [("a/1", ["a", "c"]), ("a/2", ["b"])]


def test_newest_first_is_turned_round(tmp_path: Path):
    found, counts = read(tmp_path / "a.csv", "sender,text,time\nIda,b,1619863201\nNoor,a,1619863200\n")
    assert [m.text for m in found[0].messages] == ["a", "b"] and counts == {"turned round": 1}
    found, counts = read(tmp_path / "a.csv", "sender,text,time\nIda,b,1619863200\nNoor,a,1619863200\n")
    assert [m.text for m in found[0].messages] == ["b", "a"] and counts == {}
    # A cell without a time says nothing of the order.
    found, counts = read(tmp_path / "a.csv", "sender,text,time\nIda,c,1619863201\nNoor,b,\nIda,a,1619863200\n")
    assert [m.text for m in found[0].messages] == ["a", "b", "c"] and counts == {"turned round": 1}


def test_own_messages(tmp_path: Path):
    text = "is_sender,talker,room_name,content\n1,ida,r,a\n0,ida,r,b\n0,,r,c\n"
    found, counts = read(tmp_path / "a.csv", text)
    assert [(m.speaker, m.text) for m in found[0].messages] == [("me", "a"), ("ida", "b")]
    assert counts == {"no sender": 1}
    assert [speaker for speaker, _, _ in rows(tmp_path / "a.csv", text.replace("0,,", "0,x,"), sender="talker")] == [
        "ida",
        "ida",
        "x",
    ]


def test_unknown_types_are_no_reason_to_drop(tmp_path: Path):
    assert len(rows(tmp_path / "a.csv", "sender,text,type\nIda,a,question\nNoor,b,answer\n")) == 2


@pytest.mark.parametrize(
    ("text", "columns", "said"),
    [
        ("", {}, "found an empty file"),
        ('""', {}, ":1: found no header"),
        (
            "who,what\na,b",
            {},
            ":1: found the header 'who', 'what', expected a column of the text; give --column text=NAME",
        ),
        (
            "who,text\na,b",
            {},
            ":1: found the header 'who', 'text', expected a column of the sender; give --column sender=",
        ),
        ("IsSender,text\n0,b", {}, "expected a column of the sender"),
        ("sender,text", {}, "found no row with a sender and a text"),
        ("sender,text\na", {}, ":2: found 1 cells, expected 2 as in the header"),
        ("sender,text\n\na,b\na,b,c", {}, ":4: found 3 cells, expected 2 as in the header"),
        ('sender,text\na,"b', {}, ":1: found a broken row there or below"),
        ('sender,text\na,b\na,"b"c', {}, ":2: found a broken row there or below"),
        ("sender,text,sender\na,b,c", {}, ":1: found two columns 'sender'"),
        ("sender,text\na,b", {"txt": "a"}, "--column: found 'txt', expected a known meaning; did you mean 'text'?"),
        ("sender,text\na,b", {"time": "tex"}, ":1: found no column 'tex', expected it for time; did you mean 'text'?"),
        ("IsSender,sender,text\n2,a,b", {}, ":2: found '2', expected 1 or 0"),
        ("sender,text\n../x,b", {}, ":2: found the name '../x'"),
        ("sender,text\na," + "b" * 140_000, {}, "found a broken row there or below (field larger than field limit"),
    ],
)
def test_refused(tmp_path: Path, text: str, columns: dict[str, str], said: str):
    with pytest.raises(UserError) as caught:
        read(tmp_path / "a.csv", text, **columns)
    assert said in str(caught.value) and "\n" not in str(caught.value)


CHARACTERS = st.characters(codec="utf-8", exclude_characters="\r") | st.sampled_from(",;\t|\"\n'")
TEXTS = st.text(CHARACTERS, min_size=1, max_size=12).map(common.normal).filter(bool)


@settings(max_examples=80, deadline=None)
@given(
    said=st.lists(st.tuples(st.sampled_from(["Ida", "No;or", '小"艾']), TEXTS), min_size=1, max_size=5),
    delimiter=st.sampled_from(",;\t|"),
    quoting=st.sampled_from([csv.QUOTE_ALL, csv.QUOTE_MINIMAL]),
)
def test_round_trip(tmp_path_factory: pytest.TempPathFactory, said: list, delimiter: str, quoting: int):
    file = io.StringIO()
    writer = csv.writer(file, delimiter=delimiter, quoting=quoting)
    writer.writerow(["time", "sender", "text"])
    writer.writerows([1_600_000_000 + i, name, text] for i, (name, text) in enumerate(said))
    found = rows(tmp_path_factory.mktemp("table") / "a.csv", file.getvalue())
    assert found == [(name, text, 1_600_000_000.0 + i) for i, (name, text) in enumerate(said)]


@settings(max_examples=200, deadline=None)
@given(
    raw=st.binary(max_size=60)
    | st.text("sender,text\n;\t\"'|time1\r\x00", max_size=60).map(str.encode)
    | st.text(',\n"1a\t \x00\r', max_size=40).map(lambda s: f"sender,text,time\n{s}".encode()),
)
def test_reads_or_refuses_in_one_line(tmp_path_factory: pytest.TempPathFactory, raw: bytes):
    path = tmp_path_factory.mktemp("table") / "a.csv"
    path.write_bytes(raw)
    try:
        found = list(table.read(path, collections.Counter()))
    except UserError as error:
        assert len(str(error).splitlines()) == 1
    else:
        assert found and all(m.speaker and m.text for c in found for m in c.messages)
