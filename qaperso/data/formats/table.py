"""Tables with a header, CSV or TSV: one message a row. WeChat chats come so, and whatever a spreadsheet can hold.

WeChat: the columns of the exporters WeChatMsg (github.com/LC044/WeChatMsg) and PyWxDump (github.com/xaoyaoo/PyWxDump).
"""

from __future__ import annotations

import collections
import csv
import io
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from qaperso.data.formats import as_time, common, files
from qaperso.errors import UserError, nearest
from qaperso.types import Conversation, Message

LINES = False
SUFFIXES = (".csv", ".tsv", ".tab")

# What a column can mean, and the headers that are known to mean it (in lower case), the first one in the table wins.
MEANINGS = {
    "sender": "sender from speaker author sender_name username user name nickname "
    "发送者 发送人 发言人 发送者昵称 昵称 talker strtalker 发件人",
    "text": "text content message body strcontent msg 内容 消息内容 消息 文本 聊天内容",
    "time": "createtime timestamp time datetime date sent_at created_at strtime 时间 发送时间 日期 消息时间",
    "conversation": "conversation conversation_id chat chat_id thread thread_id room room_name channel session "
    "talkerid 会话 会话名 会话名称 群聊 群名 聊天",
    "type": "type message_type msg_type type_name 类型 消息类型",
    "receiver": "receiver recipient to 接收者 接收人 收件人",
    "is_sender": "issender is_sender is_send issend 是否发送",
}
_KNOWN = {meaning: names.split() for meaning, names in MEANINGS.items()}

# In a chat that only says which messages are one's own: who the others are called.
_OTHERS = "remark 备注 nickname 昵称 sender talker strtalker".split()
ME = "me"
_OWN = {"1": True, "true": True, "是": True, "0": False, "false": False, "否": False}

# Types of messages: WeChat's numbers (1 = text, 10000 = a note of the app), and words.
_TEXTS = frozenset(("1", "text", "message", "chat", "文本", "文字", "文本消息"))
_NOTES = frozenset(("10000", "10002", "system", "notification", "系统", "系统消息", "系统通知"))

_DELIMITERS = ",;\t|"
_DATE = re.compile(
    r"(\d{4})[-/.年](\d{1,2})[-/.月](\d{1,2})日?(?:[ T]+(\d{1,2}):(\d{2})(?::(\d{2})(\.\d+)?)?)?", re.ASCII
)
# Unix seconds of 1980 to 2099. Other numbers are more likely dates without dashes (20211231), or counts.
_SECONDS = (315_532_800, 4_102_444_800)


def sniff(path: Path, head: str) -> str | None:
    """Says why `path` looks like a table: its suffix, and a header of several columns.

    Args:
      path: of the file.
      head: its first characters; "" for a folder, which is never taken for a table by itself.
    """
    if path.suffix.lower() not in SUFFIXES:
        return None
    first = next((line for line in head.splitlines() if line.strip()), "")
    most = max(_DELIMITERS, key=first.count)
    return f"a table with the columns {', '.join(first.split(most)[:6])[:200]}" if most in first else None


def units(path: Path) -> list[Path]:
    """The file itself, or the `*.csv`, `*.tsv` and `*.tab` files of a folder at any depth, sorted.

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
    """Reads a table, the rows of each conversation in their order; FILE/CONVERSATION is name and group, or FILE.

    - Columns are found by their headers (`MEANINGS`), upper and lower case alike, unless `columns` names them. Needed
      are a text and a sender. The delimiter is the one of `,`, `;`, tab and `|` that parts the header into them.
    - With a column that says which messages are one's own (WeChat's IsSender), those are of the sender "me"; the others
      are of the first of Remark, NickName, Sender and talker that the row fills in.
    - Conversations are told apart by their column, else by the pair of sender and receiver where there are receivers.
    - If any row has a type known to mean text, rows of other types are dropped; else the column of types is ignored.
    - Times are Unix seconds or milliseconds, ISO 8601, or a date with slashes or dots, the year first; without a zone
      they are read as UTC. An empty cell is no time. A conversation whose times all run backwards is turned round.

    Args:
      unit: the file.
      counts: is told how many rows of "media" and "system lines" (by their type), "empty messages" and messages with
        "no sender" were dropped, and how many conversations were "turned round".
      columns: the header that has a meaning, by meaning; "" where none has it.
      start, stop: not used by this format.

    Yields:
      Conversations with at least one message, in the order of their first rows; at least one.

    Raises:
      UserError: an unreadable file, an unknown meaning or header, a missing column, a row of another length, broken
        quotes, a time that is none, no message.
    """
    text = common.read_text(unit)
    for meaning in columns:
        if meaning not in MEANINGS:
            common.fail("--column", repr(meaning), "a known meaning", nearest(meaning, MEANINGS))
    delimiter, header = _header(text, unit, columns)
    at = _meanings(header, columns)
    _check(header, at, columns, unit)
    others = [header.index(name) for name in _OTHERS if name in header]
    if columns.get("sender") or not others:
        others = [at["sender"]]
    rows = list(_rows(text, delimiter, len(header), unit))
    filtered = "type" in at and any(_kind(row[at["type"]]) in _TEXTS for _, row in rows)
    found: dict[str, list[Message]] = {}
    for line, row in rows:
        place = f"{unit}:{line}"
        said = common.as_text(row[at["text"]], place)
        sender = _sender(row, at, others, place)
        kind = _kind(row[at["type"]]) if filtered else ""
        if filtered and kind not in _TEXTS:
            counts["system lines" if kind in _NOTES else "media"] += 1
        elif not said:
            counts["empty messages"] += 1
        elif not sender:
            counts["no sender"] += 1
        else:
            cell = row[at["time"]].strip() if "time" in at else ""
            message = Message(sender, said, _time(cell, place) if cell else None)
            found.setdefault(_conversation(row, at, sender, place), []).append(message)
    if not found:
        common.fail(unit, "no row with a sender and a text", "at least one", "; check that this is the right file")
    stem = common.as_name(unit.stem, f"{unit}: name")
    for key, messages in found.items():
        if _backwards(messages):
            counts["turned round"] += 1
            messages = messages[::-1]
        name = f"{stem}/{key}" if key else stem
        yield Conversation(name, tuple(messages), name, common.split_of(unit))


def _records(text: str, delimiter: str) -> Iterator[tuple[int, list[str]]]:
    """(line it begins at, cells) of the records that are not blank; csv.Error where quotes are broken."""
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    line = 1
    for record in reader:
        if record and any(cell.strip() for cell in record):
            yield line, record
        line = reader.line_num + 1


def _header(text: str, unit: Path, columns: Mapping[str, str]) -> tuple[str, list[str]]:
    """The delimiter and the headers in lower case; if none parts them as needed, the one that makes most of them."""
    headers = []
    for delimiter in _DELIMITERS:
        try:
            _, first = next(_records(text, delimiter))
        except (csv.Error, StopIteration):
            continue
        header = [common.normal(cell).lower() for cell in first]
        at = _meanings(header, columns)
        headers.append(("text" in at and ("sender" in at or "is_sender" in at), len(header), delimiter, header))
    if not headers:
        common.fail(f"{unit}:1", "no header", "the names of the columns", "; mend the quotes of the first line")
    best = max(headers, key=lambda found: found[:2])
    return best[2], best[3]


def _meanings(header: Sequence[str], columns: Mapping[str, str]) -> dict[str, int]:
    """The column of every meaning that the header has."""
    at = {}
    for meaning, known in _KNOWN.items():
        asked = [common.normal(columns[meaning]).lower()] if meaning in columns else known
        name = next((name for name in asked if name and name in header), None)
        if name is not None:
            at[meaning] = header.index(name)
    if "is_sender" in at and columns.get("sender") and "is_sender" not in columns:
        del at["is_sender"]  # whoever names the senders' column wants the names in it
    return at


def _check(header: list[str], at: Mapping[str, int], columns: Mapping[str, str], unit: Path) -> None:
    """Raises a UserError unless the header has each name asked for once, a text and a sender."""
    for meaning, name in columns.items():
        if name and meaning not in at:
            common.fail(f"{unit}:1", f"no column {name!r}", f"it for {meaning}", nearest(name.lower(), header))
    for meaning, index in at.items():
        if header.count(header[index]) > 1:
            mend = "; rename one of them"
            common.fail(f"{unit}:1", f"two columns {header[index]!r}", f"one for {meaning}", mend)
    named = "sender" in at or ("is_sender" in at and any(name in header for name in _OTHERS))
    for meaning, there in (("text", "text" in at), ("sender", named)):
        if not there:
            shown = ", ".join(map(repr, header[:16]))[:300]
            common.fail(
                f"{unit}:1", f"the header {shown}", f"a column of the {meaning}", f"; give --column {meaning}=NAME"
            )


def _rows(text: str, delimiter: str, width: int, unit: Path) -> Iterator[tuple[int, list[str]]]:
    """(line, cells) of every row below the header."""
    records = _records(text, delimiter)
    line = 1
    try:
        next(records)
        for line, row in records:
            if len(row) != width:
                mend = "; mend the quotes of that row, or give every column a name"
                common.fail(f"{unit}:{line}", f"{len(row)} cells", f"{width} as in the header", mend)
            yield line, row
    except csv.Error as error:
        common.fail(
            f"{unit}:{line}", f"a broken row there or below ({error})", "quotes that match", "; mend the quotes"
        )


def _kind(cell: str) -> str:
    return cell.strip().lower()


def _sender(row: Sequence[str], at: Mapping[str, int], others: Sequence[int], place: str) -> str:
    """Who sent a row's message; "" where the row does not say."""
    candidates: Sequence[int] = [at["sender"]] if "sender" in at else []
    if "is_sender" in at:
        cell = _kind(row[at["is_sender"]])
        if cell not in _OWN:
            common.fail(place, common.show(cell), "1 or 0 for whose message it is", "; fill it in")
        if _OWN[cell]:
            return ME
        candidates = others
    name = next((row[index] for index in candidates if row[index].strip()), None)
    return "" if name is None else common.as_name(name, place)


def _conversation(row: Sequence[str], at: Mapping[str, int], sender: str, place: str) -> str:
    """What tells a row's conversation from the others; "" where nothing does."""
    name = row[at["conversation"]] if "conversation" in at else ""
    if name.strip():
        return common.as_name(name, place)
    receiver = row[at["receiver"]] if "receiver" in at else ""
    return " & ".join(sorted((sender, common.as_name(receiver, place)))) if receiver.strip() else ""


def _time(cell: str, place: str) -> float:
    """Seconds since the epoch."""
    mend = "; mend it, name another column with --column time=NAME, or leave times out with --column time="
    moment = cell
    match = _DATE.fullmatch(cell)
    if match:
        year, month, day, hour, minute, second, part = match.groups()
        moment = f"{year}-{month:0>2}-{day:0>2}T{hour or '0':0>2}:{minute or '00'}:{second or '00'}{part or ''}"
    elif re.fullmatch(r"\d+(?:\.\d+)?", cell, re.ASCII) and not _plausible(float(cell)):
        common.fail(place, f"the time {common.show(cell)}", "Unix seconds or milliseconds, or a date", mend)
    try:
        return as_time(moment, place)
    except UserError:
        common.fail(place, f"the time {common.show(cell)}", "Unix seconds or milliseconds, or a date", mend)


def _plausible(number: float) -> bool:
    """Whether a number of seconds or milliseconds lies within the years of chats."""
    return any(_SECONDS[0] <= part < _SECONDS[1] for part in (number, number / 1000))


def _backwards(messages: Sequence[Message]) -> bool:
    """Whether the times of those messages that have one never rise, and fall at least once."""
    times = [message.time for message in messages if message.time is not None]
    falls = all(b <= a for a, b in zip(times, times[1:], strict=False))
    return falls and len(times) > 1 and times[0] > times[-1]
