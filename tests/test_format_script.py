from __future__ import annotations

import collections
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qaperso.data.formats import detect, script
from qaperso.errors import UserError
from qaperso.types import Conversation, Message

FIXTURE = Path(__file__).parent / "fixtures" / "formats" / "script" / "harbour_train.txt"


def read(path: Path, text: str | None = None) -> tuple[list[list[tuple[str | None, str]]], dict[str, int]]:
    """(speaker, text) of every scene, and the counts."""
    if text is not None:
        path.write_text(text, encoding="utf-8")
    counts: collections.Counter[str] = collections.Counter()
    scenes = list(script.read(path, counts))
    return [[(m.speaker, m.text) for m in scene.messages] for scene in scenes], dict(counts)


def test_fixture():
    counts: collections.Counter[str] = collections.Counter()
    quay, cabin, deck = script.read(FIXTURE, counts)
    assert quay == Conversation(
        name="harbour_train/1",
        messages=(
            Message("IDA", "Is the boat ready?"),
            Message("NOOR", "Almost. The rope is still wet."),
            Message("First Mate", "He said he said: no."),
            Message("Noor", "Then we wait."),
        ),
        group="harbour_train/1",
        split="train",
        fields={"heading": "The quay"},
    )
    assert cabin.messages == (Message("Ida", "Tea?"), Message("NOOR", "Please. Note: no sugar."))
    assert cabin.fields == {"heading": "Scene: the cabin"}
    assert (deck.name, deck.fields) == ("harbour_train/3", {"heading": "ACT TWO"})
    assert deck.messages == (Message("Lady of the Lake", "You are late!"),)
    assert counts == {"stage directions": 2, "lines before a speaker": 1, "colons not after a name": 2}


def test_detected():
    assert detect(FIXTURE) == ("script", "lines of the form NAME: text")
    assert script.sniff(Path("a.txt"), "It rained.\nAll day.\nNote: bring a coat.") is None
    assert script.sniff(Path("a.json"), "Ida: a\nNoor: b") is None


@pytest.mark.parametrize(
    ("line", "speaker"),
    [
        ("J. R. Smith: x", "J. R. Smith"),
        ("Mary-Jane O'Neil: x", "Mary-Jane O'Neil"),
        ("Guard 2: x", "Guard 2"),
        ("小艾：x", "小艾"),
        ("अदिति: x", "अदिति"),
        ("NOOR (O.S.): x", "NOOR"),
        ("NOOR (turning, aghast!): x", "NOOR"),
        ("NOOR (to Ida: quietly): x", "NOOR"),
        ("NOOR (without turning to look at any of those behind her): x", "NOOR"),
        ("小艾（小声，对我）：x", "小艾"),
        ("Walther von der Heide: x", "Walther von der Heide"),
        ("He said: x", None),
        ("Prof. Ng: x", "Prof. Ng"),
        ("Please. Note: x", None),
        ("One Two Three Four Five: x", None),
        ("A" * 41 + ": x", None),
        ("Well, Ida: x", None),
        ("http://example.org", None),
        ("12: x", None),
        ("ida: x", None),
    ],
)
def test_what_is_a_name(tmp_path: Path, line: str, speaker: str | None):
    (scene,), _ = read(tmp_path / "a.txt", f"Zed: first\n{line}\n")
    assert scene == ([("Zed", "first"), (speaker, "x")] if speaker else [("Zed", f"first {line}")])


def test_a_lower_case_name_counts_from_three_lines_on(tmp_path: Path):
    twice, counts = read(tmp_path / "a.txt", "Zed: a\nida: b\nida: c\n")
    assert twice == [[("Zed", "a ida: b ida: c")]] and counts == {"colons not after a name": 2}
    thrice, counts = read(tmp_path / "a.txt", "Zed: a\nida: b\nida: c\nida: d\n")
    assert thrice == [[("Zed", "a"), ("ida", "b"), ("ida", "c"), ("ida", "d")]] and counts == {}


@pytest.mark.parametrize("line", ["---", "***", "# Two", "[Two]", "ACT II", "SCENE 2. A room", "Scene 2", "Act Two"])
def test_what_begins_a_scene(tmp_path: Path, line: str):
    assert read(tmp_path / "a.txt", f"Ida: a\n{line}\n{line}\nNoor: b")[0] == [[("Ida", "a")], [("Noor", "b")]]


@pytest.mark.parametrize("line", ["#two", "Acting up", "Scene stealer", "[a] b", "--"])
def test_what_does_not(tmp_path: Path, line: str):
    assert read(tmp_path / "a.txt", f"Ida: a\n{line}\nNoor: b")[0] == [[("Ida", f"a {line}"), ("Noor", "b")]]


def test_a_turn_without_text_is_dropped(tmp_path: Path):
    assert read(tmp_path / "a.txt", "Ida:\n\nNoor: b") == ([[("Noor", "b")]], {"empty turns": 1})


def test_units(tmp_path: Path):
    for name in ("b.txt", "a.md", "c.pdf"):
        (tmp_path / name).write_text("Ida: a")
    assert [unit.name for unit in script.units(tmp_path)] == ["a.md", "b.txt"]
    assert script.units(tmp_path / "b.txt") == [tmp_path / "b.txt"]
    with pytest.raises(UserError, match=r"found nothing there"):
        script.units(tmp_path / "none")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "found an empty file"),
        ("It rained.\nAll day.", ":1: found no line that begins with a name, expected lines of the form NAME: text"),
        ("Ida: a\nA/../B: b", ":2: found the name 'A/../B'"),
    ],
)
def test_refused(tmp_path: Path, text: str, said: str):
    with pytest.raises(UserError) as caught:
        read(tmp_path / "a.txt", text)
    assert said in str(caught.value) and "\n" not in str(caught.value)


NAMES = st.sampled_from(["Ida", "NOOR", "First Mate", "Lady of the Lake", "小艾", "Dr. Ng"])
TEXTS = st.text(st.sampled_from("ab é好,.?!'"), min_size=1, max_size=9).map(lambda s: " ".join(s.split())).filter(bool)


@settings(max_examples=50, deadline=None)
@given(
    scenes=st.lists(
        st.lists(st.tuples(NAMES, st.lists(TEXTS, min_size=1, max_size=3)), min_size=1, max_size=4),
        min_size=1,
        max_size=3,
    )
)
def test_round_trip(tmp_path_factory: pytest.TempPathFactory, scenes: list[list[tuple[str, list[str]]]]):
    path = tmp_path_factory.mktemp("script") / "a.txt"
    written = ("\n".join(f"{name}: " + "\n\n".join(lines) for name, lines in scene) for scene in scenes)
    found, counts = read(path, "\n---\n".join(written))
    assert found == [[(name, " ".join(lines)) for name, lines in scene] for scene in scenes]
    assert counts == {}


@settings(max_examples=80, deadline=None)
@given(raw=st.binary(max_size=80) | st.text("Ia:# ()[]-\n*\x00\u2028é", max_size=80).map(str.encode))
def test_reads_or_refuses_in_one_line(tmp_path_factory: pytest.TempPathFactory, raw: bytes):
    path = tmp_path_factory.mktemp("script") / "a.txt"
    path.write_bytes(raw)
    try:
        scenes = read(path)[0]
    except UserError as error:
        assert len(str(error).splitlines()) == 1
    else:
        assert all(speaker and text for scene in scenes for speaker, text in scene) and all(scenes) and scenes
