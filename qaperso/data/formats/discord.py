"""Discord channels as DiscordChatExporter writes them: one JSON file for each channel, thread or part of one.

Source: the files of github.com/Tyrrrz/DiscordChatExporter, format Json.
"""

from __future__ import annotations

import collections
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from qaperso.data.formats import as_time, common, files, head_of, shape
from qaperso.types import Conversation, Message

LINES = False

_KINDS = ("Default", "Reply")
_MENTION = re.compile(r"<@!?(\d+)>")
_EMOJI = re.compile(r"<a?:(\w+):\d+>")


def sniff(path: Path, head: str) -> str | None:
    """Says why `path` looks like such a file: it has the keys guild and channel.

    Args:
      path: of the file.
      head: its first characters; "" for a folder, of which the first JSON file is looked at.
    """
    if path.is_dir():
        first = min(path.glob("*.json"), default=None)
        head = head_of(first) if first and first.is_file() else ""
    found = {"guild.id", "channel.id", "channel.name"} <= shape(head)
    return "an object with guild and channel" if found else None


def units(path: Path) -> list[Path]:
    """The file itself, or the `*.json` files of a folder at any depth, sorted; not those that were sent (`*_Files/`).

    Raises:
      UserError: none there.
    """
    found = files(path, (".json",))
    return [file for file in found if not file.parent.name.endswith("_Files")] or found


def read(
    unit: Path,
    counts: collections.Counter[str],
    columns: Mapping[str, str] = {},
    start: int = 0,
    stop: int | None = None,
) -> Iterator[Conversation]:
    """Reads one channel as one conversation, named and grouped by its file.

    The speaker is the account's name, since the name shown differs from server to server; where one name is that of
    several accounts in the file, the id is added in brackets. Mentions and emoji that the exporter left in their raw
    form become `@name` and `:name:`. The names of server and channel are kept in `fields`.

    Args:
      unit: the file.
      counts: is told how many messages of "bots", "system lines" (of types other than Default and Reply), of "media"
        without text and "empty messages" were dropped.
      columns, start, stop: not used by this format.

    Yields:
      One conversation.

    Raises:
      UserError: an unreadable file, broken JSON, wrong keys or types, no message of a person with text.
    """
    whole = common.decode_json(common.read_text(unit), unit)
    whole = common.as_object(whole, ("channel", "messages"), ("guild",), f"{unit}: $")
    items = common.as_list(whole["messages"], f"{unit}: messages", "messages")
    places = [f"{unit}: messages[{index}]" for index in range(len(items))]
    authors = [_author(item, place) for item, place in zip(items, places, strict=True)]
    accounts = collections.defaultdict(set)
    for name, account, _ in authors:
        accounts[name].add(account)
    messages = []
    for item, place, (name, account, bot) in zip(items, places, authors, strict=True):
        text = _text(item, bot, counts, place)
        if text:
            speaker = f"{name} ({account})" if len(accounts[name]) > 1 else name
            time = as_time(item["timestamp"], f"{place}.timestamp")
            messages.append(Message(speaker, text, time))
    if not messages:
        common.fail(unit, "no message of a person with text", "at least one", "; export a channel with messages")
    name = common.as_name(unit.stem, f"{unit}: name")
    names = {key: whole[key].get("name") for key in ("guild", "channel") if isinstance(whole.get(key), dict)}
    fields = {key: value for key, value in names.items() if isinstance(value, str)}
    yield Conversation(name, tuple(messages), name, fields=fields)


def _author(item: Any, place: str) -> tuple[str, str, bool]:
    """(name, id, whether it is a bot) of who sent a message that has all that is needed."""
    keys = ("type", "timestamp", "content", "author")
    if not isinstance(item, dict) or any(key not in item for key in keys):
        common.as_object(item, keys, (), place)
    author = item["author"]
    if not isinstance(author, dict) or "id" not in author or "name" not in author:
        common.as_object(author, ("id", "name"), (), f"{place}.author")
    name = common.as_name(author["name"], f"{place}.author.name")
    return name, common.as_name(author["id"], f"{place}.author.id"), bool(author.get("isBot"))


def _text(item: dict[str, Any], bot: bool, counts: collections.Counter[str], place: str) -> str:
    """The text that a person wrote; "" where there is none, which is counted."""
    text = ""
    if bot:
        kind = "bots"
    elif item["type"] not in _KINDS:
        kind = "system lines"
    else:
        kind = "media" if item.get("attachments") or item.get("stickers") or item.get("embeds") else "empty messages"
        text = common.as_text(item["content"], f"{place}.content")
        mentioned = item.get("mentions") if isinstance(item.get("mentions"), list) else []
        known = {str(who["id"]): who["name"] for who in mentioned if isinstance(who, dict) and {"id", "name"} <= {*who}}
        text = _MENTION.sub(lambda match: f"@{known.get(match[1], match[1])}", text)
        text = common.as_text(_EMOJI.sub(r":\1:", text), f"{place}.mentions")
    if not text:
        counts[kind] += 1
    return text
