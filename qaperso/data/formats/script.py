"""Plain text scripts: `NAME: what is said`, scene after scene."""

from __future__ import annotations

import collections
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

from qaperso.data.formats import common, files
from qaperso.types import Conversation, Message

LINES = False
SUFFIXES = (".txt", ".text", ".md", ".script")

# What stands before a colon at the start of a line; a full-width colon (Chinese, Japanese) needs no space after it.
# What is in brackets before it may be long and hold any mark.
_ASIDE = r"\s*(?:\([^()]*\)|（[^（）]*）)"
_CUE = re.compile(rf"(?P<name>[^\W\d_][^:：,;!?\"“”\[\]{{}}<>|…\t]{{0,39}}?)(?:{_ASIDE})?(?::(?=\s|$)|：)(?P<text>.*)")
_MOST_WORDS = 4

# Small words within names that are written with a capital otherwise: "Lady of the Lake", "Walther von der Heide".
_LINKS = frozenset("of the and de la le du des di da do dos del den der van von zu y e bin ibn al el".split())

# So many lines must begin with a name in lower case before it is taken for one.
_RECURS = 3

# A longer word before a full stop ends a sentence; "Prof." does not.
_LONGEST_TITLE = 5

_RULE = re.compile(r"(?:-{3,}|\*{3,}|_{3,}|={3,}|\* \* \*)")
_NUMBER = r"(?:[IVXLC]+|\d+|[Oo]ne|[Tt]wo|[Tt]hree|[Ff]our|[Ff]ive)\b"
_HEADING = re.compile(
    rf"#+ (?P<mark>.*)|\[(?P<box>[^\]]*)\]|(?P<act>(?:ACT|SCENE)\b.*|(?:Act|Scene)(?: {_NUMBER}|:).*)"
)
_DIRECTION = re.compile(r"\([^()]*\)|（[^（）]*）")


def sniff(path: Path, head: str) -> str | None:
    """Says why `path` looks like a script: at least two lines, and a quarter of them, begin with a name.

    Args:
      path: of the file.
      head: its first characters; "" for a folder, which is never taken for a script by itself.
    """
    if path.suffix.lower() not in SUFFIXES:
        return None
    lines = [line.strip() for line in head.split("\n") if line.strip()]
    cues = sum(_heading(line) is None and _cue(line) is not None and _is_name(_cue(line)[0]) for line in lines)
    return "lines of the form NAME: text" if cues >= 2 and 4 * cues >= len(lines) else None


def units(path: Path) -> list[Path]:
    """The file itself, or the text files of a folder at any depth, sorted.

    Raises:
      UserError: none there.
    """
    return files(path, SUFFIXES)


def read(
    unit: Path,
    counts: collections.Counter[str],
    columns: Mapping[str, str] = {},
    start: int = 0,
    stop: int | None = None,
) -> Iterator[Conversation]:
    """Reads a script; every scene is a conversation, named and grouped FILE/NUMBER (silent ones not counted).

    - A turn begins with a name before a colon. A name has at most 4 words and 40 characters, begins with a letter and
      holds none of `,;!?"[]{}<>|`; its words begin with a capital letter, a digit or a letter of a script without
      capitals, or are small words such as "of" and "von", and no word of more than four letters ends in a full stop.
      Anything else ("ida", "he said") counts if at least 3 lines of the file begin with it. What is in brackets after
      a name is not part of it: "IDA (aside):".
    - Any other line goes on with the turn before, joined by a space; blank lines end nothing.
    - A new scene begins with a line of `---`, `***`, `___` or `===`, with `# HEADING`, with a line in square brackets,
      and with ACT or SCENE (or Act, Scene and a number or a colon). The heading is kept in `fields["heading"]`.
    - A line in round brackets is a stage direction and is dropped.

    The limits: "Note: ..." at the start of a line that goes on with a turn is taken for a speaker called Note, and a
    lower-case speaker of one or two lines is not found. The latter lines are counted as "colons not after a name".

    Args:
      unit: the file.
      counts: is told how many "stage directions", "lines before a speaker", "empty turns" and lines with "colons not
        after a name" there are; all but the last are dropped.
      columns, start, stop: not used by this format.

    Yields:
      Conversations whose messages have no time; at least one.

    Raises:
      UserError: an unreadable file, no line with a name, a name that cannot be one.
    """
    lines = [common.normal(line) for line in common.read_text(unit).split("\n")]
    starts = collections.Counter(cue[0] for line in lines if _heading(line) is None and (cue := _cue(line)))
    names = {name for name, times in starts.items() if _is_name(name) or times >= _RECURS}
    stem = common.as_name(unit.stem, f"{unit}: name")
    split = common.split_of(unit)
    number = 0
    for heading, first, scene in _scenes(lines):
        messages = _messages(scene, names, unit, first, counts)
        if messages:
            number += 1
            name = f"{stem}/{number}"
            yield Conversation(name, messages, name, split, {"heading": heading} if heading else {})
    if not number:
        common.fail(f"{unit}:1", "no line that begins with a name", "lines of the form NAME: text", "; check the file")


def _heading(line: str) -> str | None:
    """The text of a line that begins a scene, "" where it is only a rule; None for other lines."""
    if _RULE.fullmatch(line):
        return ""
    match = _HEADING.fullmatch(line)
    return next(text for text in match.groups() if text is not None).strip() if match else None


def _cue(line: str) -> tuple[str, str] | None:
    """(what may be a name, the text after it) of a line with a colon in the right place."""
    match = _CUE.fullmatch(line)
    if match is None:
        return None
    name = match["name"].strip()
    return (name, match["text"].strip()) if name and len(name.split()) <= _MOST_WORDS else None


def _is_name(name: str) -> bool:
    """Whether a name is written like one."""
    words = name.split()
    if any(word.endswith(".") and len(word) > _LONGEST_TITLE for word in words):
        return False
    letters = [next((c for c in word if c.isalnum()), "") for word in words]
    return all(not c.islower() or (i > 0 and words[i].lower() in _LINKS) for i, c in enumerate(letters))


def _scenes(lines: list[str]) -> Iterator[tuple[str, int, list[str]]]:
    """(heading, number of its first line, lines) of every scene."""
    heading, first, scene = "", 1, []
    for number, line in enumerate(lines, start=1):
        found = _heading(line)
        if found is None:
            scene.append(line)
        else:
            yield heading, first, scene
            heading, first, scene = found, number + 1, []
    yield heading, first, scene


def _messages(
    scene: list[str], names: set[str], unit: Path, first: int, counts: collections.Counter[str]
) -> tuple[Message, ...]:
    """The turns of a scene whose lines begin at line `first` of the file."""
    turns: list[tuple[str, list[str]]] = []
    for number, line in enumerate(scene, start=first):
        cue = _cue(line)
        if not line:
            continue
        if _DIRECTION.fullmatch(line):
            counts["stage directions"] += 1
        elif cue is not None and cue[0] in names:
            turns.append((common.as_name(cue[0], f"{unit}:{number}"), [cue[1]]))
        elif not turns:
            counts["lines before a speaker"] += 1
        else:
            if cue is not None:
                counts["colons not after a name"] += 1
            turns[-1][1].append(line)
    spoken = [(name, common.as_text(" ".join(filter(None, said)), f"{unit}:{first}")) for name, said in turns]
    if empty := sum(not text for _, text in spoken):
        counts["empty turns"] += empty
    return tuple(Message(name, text) for name, text in spoken if text)
