"""WhatsApp chats as the app exports them: text files of `date, time - name: text` or `[date, time] name: text`.

The layout is undocumented; what is read here was gathered from exports of both apps. Date and clock are written as the
phone's locale has them (Unicode CLDR, short date and time patterns), without a time zone.
"""

from __future__ import annotations

import collections
import dataclasses
import datetime
import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from qaperso.data.formats import common, files
from qaperso.types import Conversation, Message

LINES = False

# Left-to-right and right-to-left marks, embeddings and isolates: layout only, no part of any word.
_MARKS = re.compile("[\u200e\u200f\u202a-\u202e\u2066-\u2069]")
_APP_MARK = "\u200e"

# What the halves of the day are called, by what they add to the hour modulo 12.
_HALVES = {
    0: "am a.m a.m. 上午 凌晨 清晨 早上 오전 午前 ص π.μ. sa öö ق.ظ.",
    12: "pm p.m p.m. 下午 中午 晚上 오후 午後 م μ.μ. ch ös ب.ظ.",
}
_HALF = {word: hours for hours, words in _HALVES.items() for word in words.split()}
# "a. m." and "p. m." come with a space within, which is taken out before the look-up.
_HALF_PATTERN = "|".join([r"[ap]\.?\s?m\.?", *map(re.escape, sorted(_HALF, key=len, reverse=True))])

_HEADER = re.compile(
    r"(?P<box>\[)?(?P<one>\d{1,4})(?P<by>[./-])\s?(?P<two>\d{1,2})(?P=by)\s?(?P<three>\d{1,4})\.?[,،]?\s"
    r"(?:(?:at|à|a las|às|alle|um|klo|kl\.)\s)?"
    rf"(?:(?P<before>{_HALF_PATTERN})\s?)?"
    r"(?P<hour>\d{1,2})[:.](?P<minute>\d{2})(?:[:.](?P<second>\d{2}))?"
    rf"(?:\s?(?P<after>{_HALF_PATTERN}))?"
    r"(?(box)\]|\s[-–])\s(?P<rest>.*)",
    re.IGNORECASE,
)
_SAID = re.compile(r'(?P<name>[^"“”«»„]{1,100}?):(?:\s(?P<text>.*)|$)')

_FOUNDED = 2009

_KINDS = (
    "media|image|photo|video|video note|audio|voice message|gif|sticker|document|contact card|file"
    "|medien|bild|foto|videonotiz|sprachnachricht|dokument|kontaktkarte|datei"
    "|multimedia|imagen|vídeo|documento|tarjeta de contacto|archivo|nota de video"
    "|média|vidéo|fiche contact|fichier"
    "|mídia|imagem|áudio|figurinha|cartão do contato|ficheiro"
    "|immagine|adesivo|scheda contatto"
)
_OMITTED = "omitted|ausgeschlossen|weggelassen|omitid[oa]|omise?|ocult[oa]|absente?|omess[oa]"
_ATTACHED = "attached|angehängt|anhang|adjunto|pièce jointe|joint|anexado|anexo|allegato"
_FILE = "file attached|datei angehängt|archivo adjunto|fichier joint|arquivo anexado|ficheiro anexado|file allegato"
_PLACEHOLDER = re.compile(
    # Android, in any language: a note of some words, or in another script, between angle brackets and nothing else.
    r"<(?=[^<>]*[ \u0080-\uffff])[^<>]{4,60}>"
    rf"|(?:.+ • .+ )?(?:{_KINDS}) (?:{_OMITTED})|.+\.\w{{1,5}} \((?:{_FILE})\)"
    r"|(?:location|standort|ubicación|localisation|localização|posizione): https://\S+",
    re.IGNORECASE,
)
_ATTACHMENT = re.compile(rf"<(?:{_ATTACHED})\s?: [^<>]+>", re.IGNORECASE)
_EDITED = re.compile(
    r"\s*<(?:this message was edited|diese nachricht wurde bearbeitet|se editó este mensaje|ce message a été modifié"
    r"|mensagem editada|questo messaggio è stato modificato)\.?>\s*$",
    re.IGNORECASE,
)
_DELETED = re.compile(
    r"(?:this message was deleted(?: by admin.*)?|you deleted this message"
    r"|diese nachricht wurde gelöscht|du hast diese nachricht gelöscht"
    r"|se eliminó este mensaje|este mensaje fue eliminado|eliminaste este mensaje"
    r"|ce message a été supprimé|vous avez supprimé ce message"
    r"|(?:essa |esta )?mensagem (?:foi )?apagada|você apagou (?:essa|esta) mensagem"
    r"|questo messaggio è stato eliminato|hai eliminato questo messaggio)\.?",
    re.IGNORECASE,
)
_EPOCH = datetime.date(1970, 1, 1).toordinal()


@dataclasses.dataclass
class _Entry:
    """A line with a date and a time, and the lines up to the next one.

    Attributes:
      line: its number in the file.
      header: its parts.
      marked: whether its text begins with the mark that the app sets before its own words.
      more: the other lines.
    """

    line: int
    header: re.Match[str]
    marked: bool
    more: list[str]


def sniff(path: Path, head: str) -> str | None:
    """Says why `path` looks like such an export: its first line with text begins with a date and a time.

    Args:
      path: of the file.
      head: its first characters; "" for a folder, where a name with WhatsApp in it, or `_chat.txt`, is looked for.
    """
    if path.is_dir():
        found = min((file.name for file in path.glob("*.txt") if _named(file)), default=None)
        return f"a folder with {found}" if found else None
    header = _header(next((line for line in map(_plain, head.split("\n")) if line), ""))
    if header is None:
        return None
    return f"lines of the form {'[date, time]' if header['box'] else 'date, time -'} name: text"


def units(path: Path) -> list[Path]:
    """The file itself, or the `*.txt` files of a folder at any depth, sorted.

    Beside a file that is named as the app does it, others are taken for files that were sent, and left out.

    Raises:
      UserError: none there.
    """
    found = files(path, (".txt",))
    folders = {file.parent for file in found if _named(file)}
    return [file for file in found if len(found) == 1 or _named(file) or file.parent not in folders]


def read(
    unit: Path,
    counts: collections.Counter[str],
    columns: Mapping[str, str] = {},
    start: int = 0,
    stop: int | None = None,
) -> Iterator[Conversation]:
    """Reads one exported chat as one conversation, named and grouped by its file (by its folder if it is `_chat.txt`).

    - A message begins with a date and a time; lines without go on with the message before. Dates may be d/m/y, m/d/y or
      y/m/d between slashes, and d.m.y, d-m-y, y.m.d or y-m-d, with two or four digits of the year; clocks may have 12
      or 24 hours. Times are the phone's wall clock, read as UTC.
    - The order of day, month and year is decided once for the file. An order is out if it makes a date that does not
      exist or lies before 2009, when the app came out; if day/month and month/day are both left, the one wins by which
      dates run backwards by more than a day less often. Two-digit years that come first are considered only if no
      other order is possible.
    - The sender ends at the first colon with a space behind it. A message without one, with a quotation mark before it
      (as when somebody renames a group), or with a text that begins with the app's own mark U+200E is the app's and is
      dropped, and so are deleted messages and those that hold nothing but media. Captions are kept.
    - Marks of the writing direction are taken out, and so is the note that a message was edited. The other notes of
      the app are known in English, German, Spanish, French, Portuguese and Italian.

    Args:
      unit: the file.
      counts: is told how many "system lines", "deleted", "media" and "empty messages" were dropped, and of how many
        messages with "captioned media" only the media were.
      columns, start, stop: not used by this format.

    Yields:
      One conversation.

    Raises:
      UserError: an unreadable file, a first line without date and time, a date that does not exist, two possible orders
        of day and month, no message.
    """
    entries = _entries(common.read_text(unit), unit)
    messages = []
    for entry, day in zip(entries, _days(entries, unit), strict=True):
        said = _SAID.fullmatch(entry.header["rest"])
        if said is None:
            counts["system lines"] += 1
            continue
        place = f"{unit}:{entry.line}"
        text = _text([said["text"] or "", *entry.more], entry.marked, counts, place)
        if text:
            time = 86400.0 * (day - _EPOCH) + _seconds(entry.header)
            messages.append(Message(common.as_name(said["name"], place), text, time))
    if not messages:
        common.fail(unit, "no message with text", "at least one", "; check that this is the right file")
    stem = unit.resolve().parent.name if unit.stem == "_chat" else unit.stem
    name = common.as_name(stem, f"{unit}: name")
    yield Conversation(name, tuple(messages), name)


def _named(file: Path) -> bool:
    """Whether a file has the name of an export, in any language."""
    return file.name == "_chat.txt" or "whatsapp" in file.name.lower()


def _plain(line: str) -> str:
    """A line in NFC without marks of direction and spaces around."""
    return common.normal(_MARKS.sub("", line))


def _header(line: str) -> re.Match[str] | None:
    """The parts of a line that begins with a date and a time; None also where no clock shows that time."""
    header = _HEADER.fullmatch(line)
    if header is None or int(header["minute"]) > 59 or int(header["second"] or 0) > 59:
        return None
    return header if int(header["hour"]) <= (12 if header["before"] or header["after"] else 23) else None


def _entries(text: str, unit: Path) -> list[_Entry]:
    """The lines with a date and a time, each with those that belong to it."""
    entries: list[_Entry] = []
    for number, raw in enumerate(text.split("\n"), start=1):
        line = _plain(raw)
        header = _header(line)
        if header is not None:
            after = re.split(r"\]\s" if header["box"] else r"\s[-–]\s", raw, maxsplit=1)[-1]
            marked = re.split(r":\s", after, maxsplit=1)[-1].startswith(_APP_MARK)
            entries.append(_Entry(number, header, marked, []))
        elif entries:
            entries[-1].more.append(_MARKS.sub("", raw).rstrip())
        elif line:
            expected = "a line such as 31/12/2021, 23:59 - NAME: TEXT or [31/12/2021, 23:59:00] NAME: TEXT"
            common.fail(f"{unit}:{number}", common.show(line), expected, "; export the chat again")
    return entries


def _ordinal(header: re.Match[str], order: str) -> int | None:
    """The day (date.toordinal) by that order of its parts; None where there is no such date."""
    parts = dict(zip(order, (header["one"], header["two"], header["three"]), strict=True))
    year = parts["y"]
    if len(year) not in (2, 4) or len(parts["d"]) > 2 or len(parts["m"]) > 2:
        return None
    if order == "mdy" and header["by"] != "/":  # no locale of CLDR has it
        return None
    try:
        day = datetime.date(int(year) + (2000 if len(year) == 2 else 0), int(parts["m"]), int(parts["d"]))
    except ValueError:
        return None
    return day.toordinal() if day.year >= _FOUNDED else None


def _days(entries: Sequence[_Entry], unit: Path) -> list[int]:
    """The day (date.toordinal) of every entry, by the one order of day, month and year that fits all of them."""
    read_as = {order: [_ordinal(entry.header, order) for entry in entries] for order in ("dmy", "mdy", "ymd")}
    fitting = {order: days for order, days in read_as.items() if None not in days}
    if not fitting:
        order = min(read_as, key=lambda order: read_as[order].count(None))
        entry = entries[read_as[order].index(None)]
        found = "the date " + entry.header["by"].join(entry.header.group("one", "two", "three"))
        expected = f"a date from {_FOUNDED} on in the order {'/'.join(order)}, which fits most of the file"
        common.fail(f"{unit}:{entry.line}", found, expected, "; mend that line or export the chat again")
    if "dmy" in fitting and "mdy" in fitting and fitting["dmy"] != fitting["mdy"]:
        back = {order: sum(b < a - 1 for a, b in itertools.pairwise(fitting[order])) for order in ("dmy", "mdy")}
        if back["dmy"] == back["mdy"]:
            line, header = next((e.line, e.header) for e in entries if int(e.header["one"]) != int(e.header["two"]))
            found = (
                f"dates such as {header['one']}/{header['two']}/{header['three']} that may be day/month or month/day"
            )
            mend = "; export more of the chat, or write the year first with four digits (2021/12/31) in every line"
            common.fail(f"{unit}:{line}", found, "dates of which one order fits better", mend)
        return fitting[min(back, key=back.__getitem__)]
    return next(iter(fitting.values()))


def _seconds(header: re.Match[str]) -> int:
    """Seconds since midnight."""
    hour = int(header["hour"])
    half = header["before"] or header["after"]
    if half:
        hour = hour % 12 + _HALF["".join(half.lower().split())]
    return 3600 * hour + 60 * int(header["minute"]) + int(header["second"] or 0)


def _text(lines: list[str], marked: bool, counts: collections.Counter[str], place: str) -> str:
    """What a person wrote in these lines; "" where nobody did, which is counted."""
    kept = []
    for line in lines:
        if not _PLACEHOLDER.fullmatch(line.strip()) or _EDITED.fullmatch(line):
            kept.append(_ATTACHMENT.sub("", line))
    media = kept != lines
    text = common.as_text(_EDITED.sub("", "\n".join(kept)), place)
    if _DELETED.fullmatch(text):
        kind, text = "deleted", ""
    elif marked and not media:
        kind, text = "system lines", ""
    elif media:
        kind = "captioned media" if text else "media"
    else:
        kind = "" if text else "empty messages"
    if kind:
        counts[kind] += 1
    return text
