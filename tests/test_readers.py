from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qaperso.data.readers import read_mqdialog, read_scenes
from qaperso.errors import UserError
from qaperso.types import Dialogue, Turn

FIXTURES = Path(__file__).parent / "fixtures" / "readers"

GOOD_ITEM = {"conversations": [{"from": "Ida", "value": "Hello?"}, {"from": "Noor", "value": "Hello."}]}
GOOD_SCENE = {"group": "g", "turns": [{"speaker": "Ida", "text": "Hello?"}, {"speaker": "Noor", "text": "Hello."}]}


def turns(*pairs: tuple[str, str]) -> tuple[Turn, ...]:
    return tuple(Turn(*pair) for pair in pairs)


def message(read: Callable[..., Any], path: Path, *args: Any, **kwargs: Any) -> str:
    """The UserError's message, which must be one line, without the folder."""
    with pytest.raises(UserError) as caught:
        read(path, *args, **kwargs)
    text = str(caught.value)
    assert len(text.splitlines()) == 1
    return text.replace(f"{path.parent}/", "")


# mqdialog


def test_mqdialog_file():
    first, second = read_mqdialog(FIXTURES / "mqdialog" / "ida_train.json")
    assert first == Dialogue(
        id="episode_2_chunk_0_index_1_part0",
        responder="Noor",
        querier="Ida",
        turns=turns(("Ida", "Did you eat?"), ("Noor", "Yes, aunt.")),
        group="episode_2_chunk_0",
        split="train",
        fields={"role_pair_id": 1, "cluster_id": 4},
    )
    assert second == Dialogue(
        id="ida_train/1",
        responder="Noor",
        querier="Ida",
        turns=turns(("Noor", "I am off."), ("Ida", "Where to?"), ("Noor", "The caf\u00e9.")),
        group="3",
        split="train",
        fields={"role_pair_id": 1, "cluster_id": 7, "target_role": "Noor"},
    )


def test_mqdialog_folder_with_responder():
    dialogues = read_mqdialog(FIXTURES / "mqdialog", responder="Noor")
    assert [(d.id, d.split, d.group) for d in dialogues] == [
        ("ida_train/episode_2_chunk_0_index_1_part0", "train", "episode_2_chunk_0"),
        ("ida_train/1", "train", "3"),
        ("valid/bram/episode_2_chunk_0_index_1_part0", "dev", "episode_2_chunk_0"),
    ]
    assert dialogues[2].turns == turns(("Bram", "Got a light?"), ("Noor", "Not for you."))
    assert (dialogues[2].responder, dialogues[2].querier) == ("Noor", "Bram")


def test_mqdialog_responder_speaks_last_unless_given():
    last = read_mqdialog(FIXTURES / "mqdialog" / "valid" / "bram.json")[0]
    assert (last.responder, last.querier, len(last.turns)) == ("Bram", "Noor", 3)


def test_mqdialog_keeps_an_unasked_reply(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps([GOOD_ITEM]))
    (dialogue,) = read_mqdialog(tmp_path / "a.json", responder="Ida")
    assert (dialogue.turns, dialogue.querier, dialogue.query) == (turns(("Ida", "Hello?")), "Noor", "")


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("train.json", "train"),
        ("Train_ida.json", "train"),
        ("ida_response_L512_dev.json", "dev"),
        ("valid.json", "dev"),
        ("test-2.json", "test"),
        ("testimony.json", None),
        ("latest.json", None),
        ("test/ida.json", "test"),
        ("tests/ida.json", None),
        ("test/train.json", "train"),
    ],
)
def test_mqdialog_split_from_name(tmp_path, name, split):
    path = tmp_path / "data" / name
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps([GOOD_ITEM]))
    assert read_mqdialog(path)[0].split == split
    assert read_mqdialog(tmp_path / "data")[0].split == split


@pytest.mark.parametrize(
    ("keys", "group"),
    [
        ({}, "a/0"),
        ({"id": "x"}, "x"),
        ({"id": "s_1_index_2"}, "s_1"),
        ({"id": "s_index_2_part3"}, "s"),
        ({"episode": 4, "scene": "b"}, "b"),
        ({"group": "c", "scene": "b", "id": "s_index_2_part3"}, "c"),
    ],
)
def test_mqdialog_group(tmp_path, keys, group):
    (tmp_path / "a.json").write_text(json.dumps([GOOD_ITEM | keys]))
    assert read_mqdialog(tmp_path / "a.json")[0].group == group


def _one_turn(turn: dict[str, Any]) -> list[dict[str, Any]]:
    return [{"conversations": [turn]}]


def _conversation(*speakers: str) -> dict[str, Any]:
    return {"conversations": [{"from": s, "value": "x"} for s in speakers]}


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ({"conversations": []}, "found an object, expected a JSON list of dialogues"),
        ([], "found no dialogue, expected at least one"),
        ([GOOD_ITEM, 7], "[1]: found 7, expected an object with the keys 'conversations'"),
        ([{"conversation": []}], "[0]: found the key 'conversation', expected the key 'conversations'; did you"),
        ([{}], "[0]: found no such key, expected the key 'conversations'; add it"),
        ([GOOD_ITEM | {"cluster_ids": 3}], "[0]: found the key 'cluster_ids', expected a known key; did you"),
        ([GOOD_ITEM | {"cluster_id": "3"}], "[0].cluster_id: found '3', expected an integer"),
        ([GOOD_ITEM | {"role_pair_id": True}], "[0].role_pair_id: found true, expected an integer"),
        ([GOOD_ITEM | {"id": ""}], "[0].id: found '', expected a name"),
        ([GOOD_ITEM | {"scene": None}], "[0].scene: found null, expected a string"),
        ([GOOD_ITEM | {"id": "x"}] * 2, "[1]: found id 'x' a second time, expected it at a.json: [0] only"),
        ([GOOD_ITEM, GOOD_ITEM | {"id": "a/0"}], "[1]: found id 'a/0' a second time"),
        ([{"conversations": {}}], "[0].conversations: found an object, expected a list of turns"),
        ([{"conversations": [[]]}], "[0].conversations[0]: found a list, expected an object"),
        (
            _one_turn({"from": "Ida", "text": "x"}),
            "[0].conversations[0]: found the key 'text', expected the key 'value'",
        ),
        (_one_turn({"from": "Ida", "value": 5}), "[0].conversations[0].value: found 5, expected a string"),
        (_one_turn({"from": " ", "value": "x"}), "[0].conversations[0].from: found ' ', expected a name"),
        (
            _one_turn({"from": "Ida", "value": "\ud800"}),
            "[0].conversations[0].value: found half a surrogate pair (\\ud800)",
        ),
        ([_conversation()], "[0].conversations: found 0 speakers with text, expected two"),
        ([_conversation("Ida")], "[0].conversations: found 1 speakers with text ('Ida'), expected two"),
        (
            [GOOD_ITEM, _conversation("Ida", "Noor", "Bram")],
            "[1].conversations: found 3 speakers with text ('Ida', 'Noor', 'Bram'), expected two",
        ),
    ],
)
def test_mqdialog_bad_content(tmp_path, content, expected):
    path = tmp_path / "a.json"
    path.write_text(json.dumps(content))
    assert message(read_mqdialog, path).startswith(f"a.json: {expected}")


def test_mqdialog_unknown_responder(tmp_path):
    path = tmp_path / "a.json"
    path.write_text(json.dumps([GOOD_ITEM]))
    assert message(read_mqdialog, path, responder="Nour") == (
        "a.json: [0].conversations: found no turn of the responder 'Nour', expected at least one; did you mean 'Noor'?"
    )


def test_mqdialog_empty_folder(tmp_path):
    assert "no *.json file in the folder" in message(read_mqdialog, tmp_path)


# Bytes and JSON: both readers


@pytest.mark.parametrize("read", [read_mqdialog, read_scenes])
def test_unreadable_files(tmp_path, read):
    path = tmp_path / "a.json"
    assert message(read, path) == "a.json: found nothing there, expected a file; check the path"
    path.write_bytes(b"\xef\xbb\xbf \n")
    assert message(read, path) == "a.json: found an empty file, expected dialogues; check that it was written"
    path.write_bytes(b'\n\n ["caf\xe9"]')
    assert message(read, path) == "a.json:3: found byte 0xe9 at offset 8, expected UTF-8; save the file as UTF-8"
    path.write_text("\n\n" + "[" * 100_000)
    assert re.match(r"a.json:(1|3): found JSON out of bounds \(", message(read, path))
    assert "found no readable file (" in message(read, path / "below")


def test_scenes_of_a_folder(tmp_path):
    assert "found no readable file (Is a directory), expected one; check the path" in message(read_scenes, tmp_path)


def test_broken_json_names_the_line(tmp_path):
    path = tmp_path / "a.json"
    path.write_text('[\n {"conversations": [\n  {"from": "Ida" "value": "x"}]}]')
    assert message(read_mqdialog, path) == (
        "a.json:3: found broken JSON (Expecting ',' delimiter at column 18), expected valid JSON; mend that line"
    )
    path.write_text(f'{json.dumps(GOOD_SCENE)}\n\n{{"group": "g",}}\n')
    assert message(read_scenes, path).startswith("a.json:3: found broken JSON (")


def test_byte_order_mark_and_line_separators_inside_strings(tmp_path):
    path = tmp_path / "a.jsonl"
    scene = json.dumps(GOOD_SCENE, ensure_ascii=False).replace("Hello?", "Hel\u2028lo?")
    path.write_bytes(b"\xef\xbb\xbf" + scene.encode() + b"\r\n" + scene.encode())
    assert [d.query for d in read_scenes(path)] == ["Hel\u2028lo?"] * 2


# scenes


def test_scenes_windows():
    dialogues = read_scenes(FIXTURES / "scenes.jsonl", responders=["Noor"], max_turns=3)
    ready, rope = ("Ida", "Is the boat  ready?"), ("Noor", "Almost. One rope is missing.")
    fetch, aunt, mule = ("Ida", "Then fetch it."), ("Noor", "At once, aunt."), ("Noor", "Only me, you mule.")
    assert [(d.id, d.querier, d.turns) for d in dialogues] == [
        ("harbour/1#1.0.1", "Ida", turns(ready, rope)),
        ("harbour/1#1.0.3", "Ida", turns(rope, fetch, aunt)),
        ("harbour/1#1.1.2", "Bram", turns(aunt, ("Bram", "Who goes there?"), mule)),
        ("harbour/2#3.0.2", "Bram", turns(("Noor", "Never."), ("Bram", "Please."), ("Noor", "Take it, then."))),
    ]
    assert [d.group for d in dialogues] == ["harbour/1"] * 3 + ["harbour/2"]
    assert [d.fields for d in dialogues] == [{"year": 1921}] * 3 + [{}]
    assert {d.split for d in dialogues} == {None}


def test_scenes_everybody_is_the_union_of_all_responders():
    path = FIXTURES / "scenes.jsonl"
    everybody = read_scenes(path)
    single = [d for name in ("Bram", "Ida", "Noor") for d in read_scenes(path, responders=[name])]
    assert sorted(everybody, key=lambda d: d.id) == sorted(single, key=lambda d: d.id)
    assert [(d.id, d.responder, d.querier) for d in everybody] == [
        ("harbour/1#1.0.1", "Noor", "Ida"),
        ("harbour/1#1.0.2", "Ida", "Noor"),
        ("harbour/1#1.0.3", "Noor", "Ida"),
        ("harbour/1#1.1.1", "Bram", "Noor"),
        ("harbour/1#1.1.2", "Noor", "Bram"),
        ("harbour/2#3.0.1", "Bram", "Noor"),
        ("harbour/2#3.0.2", "Noor", "Bram"),
    ]


def test_scenes_min_per_querier_counts_pairs_in_order(tmp_path):
    path = FIXTURES / "scenes.jsonl"
    pairs = {(d.responder, d.querier) for d in read_scenes(path, min_per_querier=2)}
    assert pairs == {("Noor", "Ida"), ("Noor", "Bram"), ("Bram", "Noor")}  # Ida replies to Noor once only
    assert message(read_scenes, path, ["Noor", "Ida"], min_per_querier=2) == (
        "scenes.jsonl: found at most 1 windows of 'Ida' with any querier, expected at least 2;"
        " lower min_per_querier or leave that responder out"
    )
    assert message(read_scenes, path, min_per_querier=3) == (
        "scenes.jsonl: found at most 2 windows for any pair of speakers, expected at least 3; lower min_per_querier"
    )


def test_scenes_bad_arguments():
    path = FIXTURES / "scenes.jsonl"
    assert message(read_scenes, path, ["Nor"]) == (
        "scenes.jsonl: found no speaker 'Nor', expected responders who speak in it; did you mean 'Noor'?"
    )
    assert message(read_scenes, path, max_turns=1).startswith("max_turns: found 1, expected at least 2")


@pytest.mark.parametrize(
    ("scene", "expected"),
    [
        ([], "found a list, expected an object with the keys 'group', 'turns'"),
        (
            {"group": "g", "turn": []},
            "found the key 'turn', expected the key 'turns'; did you mean 'turns'?",
        ),
        ({"turns": []}, "found no such key, expected the key 'group'; add it"),
        ({"group": ["g"], "turns": []}, "group: found a list, expected a string"),
        ({"group": "g", "turns": "x"}, "turns: found 'x', expected a list of turns"),
        ({"group": "g", "turns": [1.5]}, "turns[0]: found 1.5, expected an object"),
        (
            {"group": "g", "turns": [{"text": "x"}]},  # the known key that is there is not taken for a mistyped one
            "turns[0]: found no such key, expected the key 'speaker'; add it",
        ),
        ({"group": "g", "turns": [{"speaker": "", "text": "x"}]}, "turns[0].speaker: found '', expected a name"),
        ({"group": "g", "turns": [{"speaker": "Ida", "text": None}]}, "turns[0].text: found null, expected a string"),
    ],
)
def test_scenes_bad_content(tmp_path, scene, expected):
    path = tmp_path / "a.jsonl"
    path.write_text(f"{json.dumps(GOOD_SCENE)}\n{json.dumps(scene)}\n")
    assert message(read_scenes, path).startswith(f"a.jsonl:2: {expected}")


def test_scenes_without_a_window(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"group": "g", "turns": [{"speaker": "Ida", "text": "Hello?"}]}))
    assert message(read_scenes, path).startswith("a.jsonl: found at most 0 windows for any pair of speakers")


_SCENES = st.lists(st.lists(st.sampled_from(["Ann", "Bob", "Cy", None]), max_size=12), min_size=1, max_size=3)


@settings(max_examples=150, deadline=None)
@given(scenes=_SCENES, max_turns=st.integers(2, 6))
def test_scenes_windows_are_what_the_docstring_says(tmp_path_factory, scenes, max_turns):
    path = tmp_path_factory.mktemp("scenes") / "a.jsonl"
    lines = []
    for row, speakers in enumerate(scenes):
        entries = [{"speaker": who, "text": f"{row}:{place}"} for place, who in enumerate(speakers)]
        lines.append(json.dumps({"group": f"g{row}", "turns": entries}))
    path.write_text("\n".join(lines))
    found = set()
    try:
        dialogues = read_scenes(path, max_turns=max_turns)
    except UserError:
        dialogues = []
    for dialogue in dialogues:
        row = int(dialogue.group[1:])
        speakers = scenes[row]
        window = dialogue.turns
        assert window[-1].speaker == dialogue.responder
        assert window[-2].speaker == dialogue.querier != dialogue.responder
        assert {turn.speaker for turn in window} == {dialogue.querier, dialogue.responder}
        assert 2 <= len(window) <= max_turns
        # The turns are neighbouring places of the scene in order, each under its own speaker.
        places = [[int(part.split(":")[1]) for part in turn.text.split()] for turn in window]
        flat = [place for turn in places for place in turn]
        assert flat == list(range(flat[0], flat[-1] + 1))
        assert all(
            speakers[place] == turn.speaker for turn, merged in zip(window, places, strict=True) for place in merged
        )
        # Whole turns: nobody goes on speaking beyond either end.
        before = speakers[flat[0] - 1] if flat[0] else None
        after = speakers[flat[-1] + 1] if flat[-1] + 1 < len(speakers) else None
        assert before != window[0].speaker and after != window[-1].speaker
        # As much context as there is: full, or a third speaker or nobody stands before it.
        assert len(window) == max_turns or before not in (dialogue.querier, dialogue.responder)
        assert (row, flat[-1]) not in found
        found.add((row, flat[-1]))
    # Each reply once: every last place of a speaker's turn right after another speaker's ends a window.
    expected = set()
    for row, speakers in enumerate(scenes):
        first = 0
        for place, who in enumerate(speakers):
            if place and speakers[place - 1] != who:
                first = place
            ends = place + 1 == len(speakers) or speakers[place + 1] != who
            if who is not None and ends and first and speakers[first - 1] is not None:
                expected.add((row, place))
    assert found == expected
    assert len({d.id for d in dialogues}) == len(dialogues)


# Totality: any input gives dialogues or one UserError that names the file.

_JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.sampled_from(["", "Ida", "Noor", "\n", "\ud800", "e\u0301"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["conversations", "from", "value", "id", "group", "turns", "speaker", "text"]), inner
        )
    ),
    max_leaves=12,
)
_NEARLY = st.lists(
    st.fixed_dictionaries(
        {"conversations": st.lists(st.fixed_dictionaries({"from": _JSON, "value": _JSON}), max_size=3)},
        optional={"id": _JSON, "group": _JSON, "cluster_id": _JSON},
    ),
    max_size=2,
) | st.fixed_dictionaries(
    {"group": _JSON, "turns": st.lists(st.fixed_dictionaries({"speaker": _JSON, "text": _JSON}), max_size=3)}
)


@settings(max_examples=150, deadline=None)
@given(raw=st.binary(max_size=40) | (_JSON | _NEARLY).map(lambda value: json.dumps(value).encode()))
def test_readers_are_total(tmp_path_factory, raw):
    path = tmp_path_factory.mktemp("any") / "a.json"
    path.write_bytes(raw)
    for read in (read_mqdialog, read_scenes):
        try:
            dialogues = read(path)
        except UserError as error:
            assert str(error).startswith(str(path)) and len(str(error).splitlines()) == 1
        else:
            assert dialogues
            assert all(d.turns[-1].speaker == d.responder != d.querier for d in dialogues)
