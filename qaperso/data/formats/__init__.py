"""The formats that raw files come in: one reader a module, found by name or by what a file looks like.

Besides `FORMATS`, `load` and `detect`, this holds what the readers of JSON share.
"""

from __future__ import annotations

import datetime
import importlib
import json
import re
import types
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from qaperso.data.formats.common import (
    as_list,
    as_text,
    decode_json,
    fail,
    json_lines,
    place_of,
    read_text,
    show,
    writable,
)
from qaperso.errors import UserError, nearest

# From the most to the least specific: the first one that fits wins.
FORMATS = (
    "jsonl",
    "mqdialog",
    "longlamp",
    "lamp",
    "chitchat",
    "telegram",
    "discord",
    "slack",
    "reviews",
    "scenes",
    "whatsapp",
    "table",
    "script",
)

# How many bytes of a file, and how many files of a folder, are looked at to tell its format.
HEAD = 64 * 2**10
FILES = 8

Record = TypeVar("Record")

# A string (perhaps cut off, perhaps a key) or a bracket.
_TOKEN = re.compile(r'"([^"\\]*(?:\\.[^"\\]*)*)(?:"(\s*:)?|\\?\Z)|[][{}]', re.DOTALL)
_DEEPEST = 16

_DATE = re.compile(r"([0-9]{4})(?:-([0-9]{1,2}))?(?:-([0-9]{1,2}))?")
_COMPACT = re.compile(r"(19|20)[0-9]{6}")
_NUMBER = re.compile(r"-?[0-9]+(\.[0-9]+)?(e[+-]?[0-9]+)?")

# Seconds of the year 5138; a greater number counts milliseconds, which reach it in 1973.
_MILLISECONDS = 1e11


def load(name: str) -> types.ModuleType:
    """The reader of a format.

    Raises:
      UserError: no format of that name.
    """
    if name not in FORMATS:
        fail("format", repr(name), "a known format", nearest(name, FORMATS))
    return importlib.import_module(f"qaperso.data.formats.{name}")


def detect(path: Path) -> tuple[str, str]:
    """What a file or folder looks like.

    A folder that no reader knows as a whole is taken for what its first few files are.

    Returns:
      (name of the format, why); where several fit, the first in the order of `FORMATS`, and the reason names the rest.

    Raises:
      UserError: nothing there, or nothing known.
    """
    path = Path(path)
    if not path.exists():
        fail(path, "nothing there", "a file or a folder", "; check the path")
    found = _looks(path)
    if not found and path.is_dir():
        for file in sorted(visible(path), key=Path.as_posix)[:FILES]:
            for name, reason in _looks(file).items():
                found.setdefault(name, f"{file.relative_to(path)}: {reason}")
    if not found:
        fail(path, "nothing that looks like a known format", "one of " + ", ".join(FORMATS), "; say --format NAME")
    first, *others = (name for name in FORMATS if name in found)
    return first, writable(found[first]) + (f"; it also looks like {', '.join(others)}" if others else "")


def _looks(path: Path) -> dict[str, str]:
    """{format: why} of all formats that fit."""
    head = "" if path.is_dir() else head_of(path)
    reasons = {name: load(name).sniff(path, head) for name in FORMATS}
    return {name: reason for name, reason in reasons.items() if reason}


def head_of(path: Path) -> str:
    """The first 64 KiB of a file as text: undecodable bytes replaced, no byte order mark."""
    try:
        with path.open("rb") as file:
            return file.read(HEAD).decode("utf-8", "replace").removeprefix("\ufeff")
    except OSError as error:
        fail(path, f"no readable file ({error.strerror or error})", "one", "; check the path")


def shape(head: str) -> set[str]:
    """The paths of all keys in the first JSON value of a text that may break off anywhere.

    `[{"from": "Ida", "turns": [{"text": ...` gives {"[].from", "[].turns", "[].turns[].text"}. Of JSON lines it shows
    the first; of a text that does not begin with a bracket it shows nothing.
    """
    keys: set[str] = set()
    if not head.lstrip().startswith(("[", "{")):
        return keys
    here, around = "", []  # the path of the value to come, and of the open brackets
    for token in _TOKEN.finditer(head):
        if token[0] in ("[", "{"):
            here += "[]" if token[0] == "[" else ""
            around.append(here)
        elif token[0] in ("]", "}"):
            around.pop()
            if not around:
                break
            here = around[-1]
        elif token[2]:
            here = f"{around[-1]}.{token[1]}".lstrip(".")
            keys.add(here)
        if len(around) > _DEEPEST:
            break
    return keys


def visible(folder: Path, name: str = "*") -> Iterator[Path]:
    """The files of a folder at any depth whose names fit a pattern, but hidden ones and those in hidden folders.

    Those are not what somebody has put there: copies that editors keep, what systems note beside a file.
    """
    for file in folder.rglob(name):
        if file.is_file() and not any(part.startswith(".") for part in file.relative_to(folder).parts):
            yield file


def files(path: Path, suffixes: Collection[str], name: str = "*") -> list[Path]:
    """The file itself, or the folder's visible files with one of the suffixes, in the order of their paths.

    Args:
      path: a file or a folder.
      suffixes: in lower case, with the dot.
      name: a pattern that the names of a folder's files fit as well.

    Raises:
      UserError: nothing there, or no such file in the folder.
    """
    path = Path(path)
    if path.is_file():
        return [path]
    if not path.is_dir():
        fail(path, "nothing there", "a file or a folder", "; check the path")
    found = [file for file in visible(path, name) if file.suffix.lower() in suffixes]
    if not found:
        wanted = " or ".join(name if name.endswith(suffix) else name + suffix for suffix in suffixes)
        fail(path, f"no {wanted} file in the folder", "at least one", "; check the path")
    return sorted(found, key=Path.as_posix)


def parse_lines(
    parse: Callable[[Any, int, str], Record], path: Path, start: int = 0, stop: int | None = None
) -> Iterator[Record]:
    """`parse(value, byte offset, place)` of the JSON lines that begin in bytes [start, stop).

    The place in errors is FILE:LINE; since counting lines takes as long as reading them, it is found only for a line
    that `parse` refuses, which it then sees twice.

    Raises:
      UserError: what `parse` raises; broken bytes or JSON; a whole file without a line.
    """
    offset = None
    for offset, value in json_lines(path, start, stop):
        try:
            record = parse(value, offset, str(path))
        except UserError:
            parse(value, offset, place_of(path, offset))
            raise
        yield record
    if offset is None and not start and stop is None:
        fail(path, "an empty file", "dialogues", "; check that it was written")


def parse_rows(
    parse: Callable[[Any, int, str], Record], path: Path, start: int = 0, stop: int | None = None
) -> Iterator[Record]:
    """As `parse_lines`, for a file that holds either JSON lines or one JSON list.

    A list is read whole by the part in which the file begins; its items have an index instead of an offset.
    """
    if not head_of(path).lstrip().startswith("["):
        yield from parse_lines(parse, path, start, stop)
    elif not start:
        for index, value in enumerate(as_list(decode_json(read_text(path), path), str(path), "records")):
            yield parse(value, index, f"{path}: [{index}]")


def kept(record: Mapping[str, Any], taken: Collection[str], place: str) -> dict[str, Any]:
    """The other keys of a record, for `fields`: only what can be written as JSON in UTF-8 again."""
    fields = {key: value for key, value in record.items() if key not in taken}
    try:
        json.dumps(fields, ensure_ascii=False, allow_nan=False).encode()
    except (RecursionError, ValueError) as error:
        fail(place, f"a value that cannot be written again ({error})", "plain JSON", "; mend or drop that key")
    return fields


def as_time(value: Any, place: str) -> float:
    """Seconds since the epoch of what a JSON value says about time.

    Numbers, or strings of digits, are Unix seconds, or milliseconds from 1e11 on; but four digits are a year and
    eight that begin with 19 or 20 a date. Else a string is a date, YYYY-MM or YYYY-MM-DD, or an ISO 8601 time. What has
    no zone is read as UTC, what has no month or day as the first.
    """
    text = as_text(value, place) if isinstance(value, str) else show(value)
    try:
        if date := _DATE.fullmatch(text):
            moment = datetime.datetime(*(int(part or 1) for part in date.groups()))
        elif _COMPACT.fullmatch(text):
            moment = datetime.datetime.strptime(text, "%Y%m%d")
        elif _NUMBER.fullmatch(text):
            number = float(text)
            number = number / 1000 if abs(number) >= _MILLISECONDS else number
            if abs(number) >= _MILLISECONDS:
                raise ValueError
            return number
        else:
            moment = datetime.datetime.fromisoformat(text)
        zoned = moment if moment.tzinfo else moment.replace(tzinfo=datetime.UTC)
        return zoned.timestamp()
    except (OverflowError, ValueError):
        fail(place, show(value), "Unix seconds or a date such as 2024-05-01", "; write it so, or drop that key")
