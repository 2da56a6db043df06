"""Readers: dialogue files become `Dialogue` records.

Both readers are strict and total: they return at least one dialogue or raise one `UserError` whose line names the file
and the line or item, what was found, what was expected, and the mend. Texts and names come back in Unicode NFC,
stripped; turns without text are dropped before anything else is done with them.
"""

from __future__ import annotations

import collections
import difflib
import json
import re
import unicodedata
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from qaperso.errors import UserError, nearest
from qaperso.types import Dialogue, Turn

# What file and folder names say about the split.
_SPLIT_WORDS = {
    "train": "train",
    "training": "train",
    "dev": "dev",
    "val": "dev",
    "valid": "dev",
    "validation": "dev",
    "test": "test",
}

# Keys of an item that name what must not straddle a split, the first present one wins.
_GROUP_KEYS = ("group", "scene", "episode")

# The published extraction names the i-th stretch of a scene between two people, and its sliding windows, like this
# (github.com/Nidryen-zh/QuerierAwareResponder, data/*/extract_two_role_diag_*.py).
_WINDOW_ID = re.compile(r"(?P<scene>.+)_index_\d+(_part\d+)?")


def read_mqdialog(path: Path, responder: str | None = None) -> list[Dialogue]:
    """Reads the layout of the QAR paper's benchmark (arXiv 2412.11736).

    A file holds a JSON list of `{"conversations": [{"from": NAME, "value": TEXT}, ...]}`, each between two speakers,
    with the optional keys `role_pair_id` and `cluster_id` (integers), `id`, and `group`, `scene` or `episode`
    (strings or integers). These and any other keys but `conversations`, `id` and the group are kept in
    `Dialogue.fields`.

    - id: FILE/ID, or FILE/INDEX (from 0) where no id is given; FILE is the file's path inside the folder without its
      suffix, or its stem. A file read on its own keeps its ids as they are. Published ids repeat from file to file
      (one scene is cut once for each querier), so they name a dialogue within its file only.
    - group: the group, scene or episode; else what stands before `_index_I_partJ` in a published id (windows of one
      scene overlap, so they belong together); else the dialogue's own id.
    - split: given by the first or last word of the file's stem, or by the name of its folder: train, dev, valid
      (becomes dev), test; None where neither says so.

    Args:
      path: a file, or a folder whose `*.json` files are read at any depth in the order of their paths.
      responder: who answers; turns after their last one are dropped. None: whoever speaks last in each dialogue.

    Returns:
      The dialogues in the order of the files; at least one.

    Raises:
      UserError: nothing to read, broken bytes or JSON, wrong keys or types, a dialogue that has not two speakers or no
        turn of the responder, an id that occurs twice.
    """
    path = Path(path)
    whole = path.is_dir()
    files = sorted((f for f in path.rglob("*.json") if f.is_file()), key=Path.as_posix) if whole else [path]
    if not files:
        _fail(path, "no *.json file in the folder", "at least one", "; check the path")
    dialogues = []
    places: dict[str, str] = {}
    for file in files:
        items = _decode(_read_text(file), file, 1)
        if not isinstance(items, list):
            _fail(file, _show(items), "a JSON list of dialogues", "; put the dialogues between [ and ]")
        stem = file.relative_to(path).with_suffix("").as_posix() if whole else file.stem
        split = _split_of(file)
        for index, item in enumerate(items):
            place = f"{file}: [{index}]"
            name, group, fields = _mqdialog_head(item, place)
            unique = f"{stem}/{index if name is None else name}" if whole or name is None else name
            if places.setdefault(unique, place) != place:
                _fail(place, f"id {unique!r} a second time", f"it at {places[unique]} only", "; rename one of them")
            turns, who, querier = _mqdialog_turns(item["conversations"], responder, f"{place}.conversations")
            dialogues.append(Dialogue(unique, who, querier, turns, group or unique, split=split, fields=fields))
    if not dialogues:
        _fail(path, "no dialogue", "at least one", "; check that this is the right file")
    return dialogues


def read_scenes(
    path: Path, responders: Sequence[str] = (), max_turns: int = 6, min_per_querier: int = 1
) -> list[Dialogue]:
    """Cuts scenes with any number of speakers into two-party windows, each ending with a reply.

    The file holds JSON lines `{"group": NAME, "turns": [{"speaker": NAME or null, "text": TEXT}, ...]}`; other keys of
    a scene are kept in `Dialogue.fields`. Each scene is cut in three steps (ours):

    1. A turn without a named speaker (null) ends what stands before it and belongs to nothing. Consecutive turns of
       one speaker are joined by a space, never across such a turn.
    2. A run is a maximal stretch of turns by exactly two speakers, who alternate after step 1. Where A-B turns into
       B-C, B's turn in the middle ends the run A-B and begins the run B-C: neighbouring runs overlap by that one turn.
       So any two neighbouring turns stand together in exactly one run.
    3. Every turn of a run but its first is a reply to the turn before it, and ends one window: the run's last
       `max_turns` turns up to it. So no reply ends two windows, and windows of one run overlap by their context.

    The id is `GROUP#LINE.RUN.TURN`, with the line counted from 1, the run within the scene and the turn within the run
    from 0; it depends on nothing but the file.

    Args:
      path: the file.
      responders: whose replies to keep; empty: everybody's.
      max_turns: at most so many turns in a window, the reply included; at least 2.
      min_per_querier: a responder's queriers with fewer windows are left out.

    Returns:
      The windows in the order of the file; at least one for each responder asked for.

    Raises:
      UserError: nothing to read, broken bytes or JSON, wrong keys or types, an unknown responder, no window left.
    """
    path = Path(path)
    if max_turns < 2:
        _fail("max_turns", max_turns, "at least 2", "; a window holds a query and its reply")
    dialogues: list[Dialogue] = []
    speakers: set[str] = set()
    for line, text in enumerate(_read_text(path).split("\n"), start=1):
        if text.strip():
            place = f"{path}:{line}"
            scene = _object(_decode(text, path, line), ("group", "turns"), (), place)
            group = _label(scene["group"], f"{place}: group")
            turns = _scene_turns(scene["turns"], f"{place}: turns")
            speakers.update(speaker for speaker, _ in turns if speaker is not None)
            fields = {key: value for key, value in scene.items() if key not in ("group", "turns")}
            runs = (run for stretch in _stretches(turns) for run in _runs(stretch))
            for number, run in enumerate(runs):
                for last in range(1, len(run)):
                    window = tuple(run[max(0, last + 1 - max_turns) : last + 1])
                    who, querier = window[-1].speaker, window[-2].speaker
                    unique = f"{group}#{line}.{number}.{last}"
                    dialogues.append(Dialogue(unique, who, querier, window, group, fields=fields))
    asked = [_normal(name) for name in responders]
    for name in asked:
        if name not in speakers:
            _fail(path, f"no speaker {name!r}", "responders who speak in it", nearest(name, speakers))
    count = collections.Counter((d.responder, d.querier) for d in dialogues)
    kept = [d for d in dialogues if count[d.responder, d.querier] >= min_per_querier]
    kept = [d for d in kept if not asked or d.responder in asked]
    for name in asked or [None]:
        if not any(name in (None, d.responder) for d in kept):
            most = max((n for (who, _), n in count.items() if name in (None, who)), default=0)
            whose = "for any pair of speakers" if name is None else f"of {name!r} with any querier"
            mend = "; lower min_per_querier" + ("" if name is None else " or leave that responder out")
            _fail(path, f"at most {most} windows {whose}", f"at least {max(min_per_querier, 1)}", mend)
    return kept


def _fail(place: object, found: object, expected: str, mend: str) -> NoReturn:
    """Raises the one-line error that every check here ends in."""
    raise UserError(" ".join(f"{place}: found {found}, expected {expected}{mend}".splitlines()))


def _show(value: Any) -> str:
    """Names a JSON value in an error."""
    if isinstance(value, dict):
        return "an object"
    if isinstance(value, list):
        return "a list"
    text = repr(value) if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _read_text(path: Path) -> str:
    """The file's text, without a byte order mark; an unreadable, empty or not UTF-8 encoded file is a UserError."""
    try:
        raw = path.read_bytes()
    except FileNotFoundError:
        _fail(path, "nothing there", "a file", "; check the path")
    except (OSError, ValueError) as error:
        _fail(path, f"no readable file ({getattr(error, 'strerror', None) or error})", "one", "; check the path")
    try:
        text = raw.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        byte = f"byte 0x{raw[error.start]:02x} at offset {error.start}"
        _fail(f"{path}:{line}", byte, "UTF-8", "; save the file as UTF-8")
    if not text.strip():
        _fail(path, "an empty file", "dialogues", "; check that it was written")
    return text


def _decode(text: str, path: Path, line: int) -> Any:
    """The JSON value in `text`, which begins at that line of the file."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        place = f"{path}:{line + error.lineno - 1}"
        _fail(place, f"broken JSON ({error.msg} at column {error.colno})", "valid JSON", "; mend that line")
    except (RecursionError, ValueError) as error:  # nested too deeply; a number of thousands of digits
        _fail(f"{path}:{line}", f"JSON out of bounds ({error})", "plain dialogues", "; mend that value")


def _object(value: Any, required: Sequence[str], optional: Sequence[str], place: str) -> dict[str, Any]:
    """`value` if it is an object with the required keys and no optional key that is only mistyped."""
    if not isinstance(value, dict):
        keys = ", ".join(map(repr, required))
        _fail(place, _show(value), f"an object with the keys {keys}", "; write one between { and }")
    unknown = [key for key in value if key not in required and key not in optional]
    for key in required:
        if key not in value:
            best = difflib.get_close_matches(key, unknown, n=1, cutoff=0.0)
            found = f"the key {best[0]!r}" if best else "no such key"
            mend = nearest(best[0], [key]) if best else "; add it"
            _fail(place, found, f"the key {key!r}", mend)
    for key in unknown:
        # Far stricter than for required keys: other keys are welcome, and most of them mean what they say.
        absent = [name for name in optional if name not in value]
        if difflib.get_close_matches(key, absent, n=1, cutoff=0.85):
            _fail(place, f"the key {key!r}", "a known key", nearest(key, absent))
    return value


def _normal(text: str) -> str:
    return unicodedata.normalize("NFC", text).strip()


def _text(value: Any, place: str) -> str:
    """`value` in NFC, stripped, if it is a string that can be written as UTF-8."""
    if not isinstance(value, str):
        _fail(place, _show(value), "a string", '; write it between " and "')
    half = next((c for c in value if "\ud800" <= c <= "\udfff"), None)
    if half is not None:
        _fail(place, f"half a surrogate pair (\\u{ord(half):04x})", "whole characters", "; mend the escape")
    return _normal(value)


def _label(value: Any, place: str) -> str:
    """A name, an id or a group: a string with something in it, or an integer."""
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    name = _text(value, place)
    if not name:
        _fail(place, _show(value), "a name", "; fill it in")
    return name


def _list(value: Any, place: str) -> list[Any]:
    if not isinstance(value, list):
        _fail(place, _show(value), "a list of turns", "; put the turns between [ and ]")
    return value


def _split_of(file: Path) -> str | None:
    """The split that a file's own name or else its folder's name says."""
    words = re.split(r"[\W\d_]+", file.stem.lower())
    names = (words[0], words[-1], file.parent.name.lower())
    return next((_SPLIT_WORDS[name] for name in names if name in _SPLIT_WORDS), None)


def _mqdialog_head(item: Any, place: str) -> tuple[str | None, str | None, dict[str, Any]]:
    """The item's own id and its group, None where it does not say, and its other keys but the turns."""
    item = _object(item, ("conversations",), ("id", "role_pair_id", "cluster_id", *_GROUP_KEYS), place)
    for key in ("role_pair_id", "cluster_id"):
        if key in item and (isinstance(item[key], bool) or not isinstance(item[key], int)):
            _fail(f"{place}.{key}", _show(item[key]), "an integer", "; write a number without quotes, or no such key")
    name = _label(item["id"], f"{place}.id") if "id" in item else None
    window = _WINDOW_ID.fullmatch(name or "")
    group = window["scene"] if window else None
    key = next((key for key in _GROUP_KEYS if key in item), None)
    if key is not None:
        group = _label(item[key], f"{place}.{key}")
    return name, group, {k: value for k, value in item.items() if k not in ("conversations", "id", key)}


def _mqdialog_turns(value: Any, responder: str | None, place: str) -> tuple[tuple[Turn, ...], str, str]:
    """The turns up to the responder's last one, the responder, the querier."""
    turns = []
    for number, entry in enumerate(_list(value, place)):
        entry = _object(entry, ("from", "value"), (), f"{place}[{number}]")
        speaker = _label(entry["from"], f"{place}[{number}].from")
        text = _text(entry["value"], f"{place}[{number}].value")
        if text:
            turns.append(Turn(speaker, text))
    speakers = list(dict.fromkeys(turn.speaker for turn in turns))
    if len(speakers) != 2:
        who = ", ".join(map(repr, speakers[:4])) + (", ..." if len(speakers) > 4 else "")
        found = f"{len(speakers)} speakers with text" + (f" ({who})" if speakers else "")
        _fail(place, found, "two", "; split or drop this dialogue")
    who = turns[-1].speaker if responder is None else _normal(responder)
    if who not in speakers:
        _fail(place, f"no turn of the responder {who!r}", "at least one", nearest(who, speakers))
    last = max(i for i, turn in enumerate(turns) if turn.speaker == who)
    querier = next(speaker for speaker in speakers if speaker != who)
    return tuple(turns[: last + 1]), who, querier


def _scene_turns(value: Any, place: str) -> list[tuple[str | None, str]]:
    """(speaker, text) of every turn with text."""
    turns = []
    for number, entry in enumerate(_list(value, place)):
        entry = _object(entry, ("speaker", "text"), (), f"{place}[{number}]")
        speaker = entry["speaker"]
        if speaker is not None:
            speaker = _label(speaker, f"{place}[{number}].speaker")
        text = _text(entry["text"], f"{place}[{number}].text")
        if text:
            turns.append((speaker, text))
    return turns


def _stretches(turns: Iterable[tuple[str | None, str]]) -> list[list[Turn]]:
    """Cuts at turns without a speaker and joins neighbouring turns of one speaker."""
    stretches: list[list[Turn]] = [[]]
    for speaker, text in turns:
        stretch = stretches[-1]
        if speaker is None:
            stretches.append([])
        elif stretch and stretch[-1].speaker == speaker:
            stretch[-1] = Turn(speaker, f"{stretch[-1].text} {text}")
        else:
            stretch.append(Turn(speaker, text))
    return stretches


def _runs(turns: Sequence[Turn]) -> list[Sequence[Turn]]:
    """Maximal two-speaker runs of turns whose neighbours differ in speaker; neighbouring runs share one turn."""
    runs = []
    start = 0
    while start + 1 < len(turns):
        stop = start + 2
        while stop < len(turns) and turns[stop].speaker == turns[stop - 2].speaker:
            stop += 1
        runs.append(turns[start:stop])
        start = stop - 1
    return runs
