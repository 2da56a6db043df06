"""What every reader needs: bytes to text, strict look-ups, and the one-line error.

A reader is strict: it gives its records or raises one `UserError` whose line names the file and the line or item, what
was found, what was expected, and the mend. Texts and names come back in Unicode NFC, stripped.
"""

from __future__ import annotations

import difflib
import json
import re
import unicodedata
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

from qaperso.errors import UserError, nearest

# A longer line is no dialogue but a broken file, and would take many times its size to parse.
LONGEST_LINE = 16 * 2**20

# What file and folder names say about the split.
SPLIT_WORDS = {
    "train": "train",
    "training": "train",
    "dev": "dev",
    "val": "dev",
    "valid": "dev",
    "validation": "dev",
    "test": "test",
}


def fail(place: object, found: object, expected: str, mend: str) -> NoReturn:
    """Raises the one-line error that every check of a reader ends in; `mend` begins with "; "."""
    raise UserError(" ".join(f"{place}: found {found}, expected {expected}{mend}".splitlines()))


def writable(text: str) -> str:
    """`text`, which may name files, with "?" for what cannot be written as UTF-8: a name of a file may be any bytes."""
    return text.encode("utf-8", "replace").decode()


def show(value: Any) -> str:
    """Names a JSON value in an error."""
    if isinstance(value, dict):
        return "an object"
    if isinstance(value, list):
        return "a list"
    text = repr(value) if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."


def read_bytes(path: Path) -> bytes:
    """The file's bytes; an unreadable file is a UserError."""
    try:
        return path.read_bytes()
    except FileNotFoundError:
        fail(path, "nothing there", "a file", "; check the path")
    except (OSError, ValueError) as error:
        fail(path, f"no readable file ({getattr(error, 'strerror', None) or error})", "one", "; check the path")


def decode_utf8(raw: bytes, place: Path, line: int = 1) -> str:
    """`raw`, which begins at that line of the file, as text; anything but UTF-8 is a UserError."""
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        line += raw.count(b"\n", 0, error.start)
        byte = f"byte 0x{raw[error.start]:02x} at offset {error.start}"
        fail(f"{place}:{line}", byte, "UTF-8", "; save the file as UTF-8")


def read_text(path: Path) -> str:
    """The file's text, without a byte order mark; an unreadable, empty or not UTF-8 encoded file is a UserError."""
    text = decode_utf8(read_bytes(path), path).removeprefix("\ufeff")
    if not text.strip():
        fail(path, "an empty file", "dialogues", "; check that it was written")
    return text


def read_lines(path: Path, start: int = 0, stop: int | None = None) -> Iterator[tuple[int, str]]:
    """(offset, text) of the lines that begin in bytes [start, stop) of a file, without blank ones and line ends.

    Parts of a file that meet give its lines once each: a line belongs to the part in which it begins.

    Raises:
      UserError: an unreadable file, a line that is not UTF-8 or is longer than `LONGEST_LINE` bytes.
    """
    try:
        file = path.open("rb")
    except OSError as error:
        fail(path, f"no readable file ({error.strerror or error})", "one", "; check the path")
    with file:
        if start:
            # The line that runs over `start` belongs to the part before.
            file.seek(start - 1)
            while (skipped := file.readline(LONGEST_LINE)) and not skipped.endswith(b"\n"):
                pass
        while stop is None or file.tell() < stop:
            offset = file.tell()
            raw = file.readline(LONGEST_LINE + 1)
            if not raw:
                return
            if len(raw) > LONGEST_LINE:
                found = f"a line of more than {LONGEST_LINE // 2**20} MiB"
                fail(place_of(path, offset), found, "one record a line", "; split it into lines")
            try:
                text = raw.decode("utf-8")
            except UnicodeDecodeError as error:
                byte = f"byte 0x{raw[error.start]:02x} at offset {offset + error.start}"
                fail(place_of(path, offset), byte, "UTF-8", "; save the file as UTF-8")
            text = text.removeprefix("\ufeff") if offset == 0 else text
            if text.strip():
                yield offset, text.rstrip("\r\n")


def place_of(path: Path, offset: int) -> str:
    """FILE:LINE of a byte offset; reads the file up to it."""
    line, left = 1, offset
    with path.open("rb") as file:
        while left and (part := file.read(min(left, 2**20))):
            line += part.count(b"\n")
            left -= len(part)
    return f"{path}:{line}"


def decode_json(text: str, path: Path, line: int = 1) -> Any:
    """The JSON value in `text`, which begins at that line of the file."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        place = f"{path}:{line + error.lineno - 1}"
        fail(place, f"broken JSON ({error.msg} at column {error.colno})", "valid JSON", "; mend that line")
    except (RecursionError, ValueError) as error:  # nested too deeply; a number of thousands of digits
        fail(f"{path}:{line}", f"JSON out of bounds ({error})", "plain dialogues", "; mend that value")


def json_lines(path: Path, start: int = 0, stop: int | None = None) -> Iterator[tuple[int, Any]]:
    """(offset, value) of the JSON lines that begin in bytes [start, stop); see `read_lines`."""
    for offset, text in read_lines(path, start, stop):
        try:
            value = json.loads(text)
        except (RecursionError, ValueError):
            decode_json(text, path, int(place_of(path, offset).rpartition(":")[2]))
            raise
        yield offset, value


def as_object(value: Any, required: Sequence[str], optional: Sequence[str], place: str) -> dict[str, Any]:
    """`value` if it is an object with the required keys and no optional key that is only mistyped."""
    if not isinstance(value, dict):
        keys = ", ".join(map(repr, required))
        fail(place, show(value), f"an object with the keys {keys}", "; write one between { and }")
    unknown = [key for key in value if key not in required and key not in optional]
    for key in required:
        if key not in value:
            best = difflib.get_close_matches(key, unknown, n=1, cutoff=0.0)
            found = f"the key {best[0]!r}" if best else "no such key"
            mend = nearest(best[0], [key]) if best else "; add it"
            fail(place, found, f"the key {key!r}", mend)
    for key in unknown:
        # Far stricter than for required keys: other keys are welcome, and most of them mean what they say.
        absent = [name for name in optional if name not in value]
        if difflib.get_close_matches(key, absent, n=1, cutoff=0.85):
            fail(place, f"the key {key!r}", "a known key", nearest(key, absent))
    return value


def normal(text: str) -> str:
    """`text` in NFC, stripped."""
    return unicodedata.normalize("NFC", text).strip()


def as_text(value: Any, place: str) -> str:
    """`value` in NFC, stripped, if it is a string that can be written as UTF-8."""
    if not isinstance(value, str):
        fail(place, show(value), "a string", '; write it between " and "')
    half = next((c for c in value if "\ud800" <= c <= "\udfff"), None)
    if half is not None:
        fail(place, f"half a surrogate pair (\\u{ord(half):04x})", "whole characters", "; mend the escape")
    return normal(value)


def as_name(value: Any, place: str) -> str:
    """A name, an id or a group: an integer, or a string with something in it and nothing that breaks a line or a path.

    Control characters would forge lines of logs and tables, and `../` would leave the folder where a name becomes part
    of a path: both are refused.
    """
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    name = as_text(value, place)
    if not name:
        fail(place, show(value), "a name", "; fill it in")
    bad = next((c for c in name if unicodedata.category(c) in ("Cc", "Zl", "Zp")), None)
    if bad is not None:
        fail(place, f"the control character U+{ord(bad):04X} in a name", "printable characters", "; take it out")
    if ".." in re.split(r"[/\\]", name):
        fail(place, f"the name {show(name)}", "one without '..' between slashes", "; rename it")
    return name


def as_list(value: Any, place: str, what: str = "turns") -> list[Any]:
    """`value` if it is a list."""
    if not isinstance(value, list):
        fail(place, show(value), f"a list of {what}", f"; put the {what} between [ and ]")
    return value


def split_of(file: Path) -> str | None:
    """The split that a file's own name or else its folder's name says.

    Not for what apps export: their files are named after people and channels, and Dev and Val are people.
    """
    words = re.split(r"[\W\d_]+", file.stem.lower())
    names = (words[0], words[-1], file.parent.name.lower())
    return next((SPLIT_WORDS[name] for name in names if name in SPLIT_WORDS), None)
