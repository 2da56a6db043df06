"""Telegram chats as Telegram Desktop exports them: `result.json`, of one chat or of the whole account.

Source: the "Machine-readable JSON" of Telegram Desktop's export (telegramdesktop, export_output_json.cpp).
"""

from __future__ import annotations

import collections
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from qaperso.data.formats import as_time, common, files, head_of, shape, visible
from qaperso.types import Conversation, Message

LINES = False

# Keys of messages that no other export has.
_OWN_KEYS = {f"messages[].{key}" for key in ("from_id", "actor_id", "date_unixtime", "text_entities")}


def sniff(path: Path, head: str) -> str | None:
    """Says why `path` looks like such an export: the keys of its chats and messages.

    Args:
      path: of the file.
      head: its first characters; "" for a folder, where `result.json` is looked for.
    """
    if path.is_dir():
        file = path / "result.json"
        if not file.is_file():
            return None
        head = head_of(file)
    keys = shape(head)
    if keys & _OWN_KEYS:
        return "messages with from_id and date_unixtime"
    if {"personal_information", "personal_information.user_id"} <= keys:
        return "the personal_information of an account"
    return None


def units(path: Path) -> list[Path]:
    """The file itself, or the files `result.json` of a folder at any depth, or else its `*.json` files, sorted.

    Raises:
      UserError: none there.
    """
    named = path.is_dir() and any(visible(path, "result.json"))  # chats come with files that were sent
    return files(path, (".json",), "result.json" if named else "*")


def read(
    unit: Path,
    counts: collections.Counter[str],
    columns: Mapping[str, str] = {},
    start: int = 0,
    stop: int | None = None,
) -> Iterator[Conversation]:
    """Reads the chats of an export, each as one conversation named and grouped NAME#ID.

    The speaker is the name shown (`from`), or `user` and the number of an account that was deleted. Where one name is
    that of several accounts in the file, the account is added in brackets. Times are `date_unixtime`; exports of before
    2021 have only `date`, a wall clock without a zone, which is read as UTC. The type of the chat is kept in `fields`.

    Args:
      unit: the file.
      counts: is told how many "system lines" (joins, pins, calls), messages of "media" without text, "empty messages",
        messages with "no sender" and messages of chats with "bots" were dropped.
      columns, start, stop: not used by this format.

    Yields:
      Conversations with at least one message, in the order of the file; at least one.

    Raises:
      UserError: an unreadable file, broken JSON, wrong keys or types, no chat with text.
    """
    chats = list(_chats(common.decode_json(common.read_text(unit), unit), unit))
    accounts = collections.defaultdict(set)
    for chat, place in chats:
        for index, message in enumerate(chat["messages"]):
            name, account = _sender(message, f"{place}.messages[{index}]")
            accounts[name].add(account)
    found = False
    for number, (chat, place) in enumerate(chats):
        messages = []
        for index, message in enumerate(chat["messages"]):
            where = f"{place}.messages[{index}]"
            name, account = _sender(message, where)
            text = _text(message, chat, name, counts, where)
            if name and text:
                speaker = f"{name} ({account})" if len(accounts[name]) > 1 else name
                messages.append(Message(speaker, text, _time(message, where)))
        if messages:
            found = True
            own = chat.get("name") or str(chat.get("type") or "chat")
            name = common.as_name(own, f"{place}.name") + f"#{common.as_name(chat.get('id', number), f'{place}.id')}"
            fields = {"type": chat["type"]} if isinstance(chat.get("type"), str) else {}
            yield Conversation(name, tuple(messages), name, fields=fields)
    if not found:
        common.fail(unit, "no message of a person with text", "at least one", "; export chats with their messages")


def _chats(value: Any, unit: Path) -> Iterator[tuple[dict[str, Any], str]]:
    """(chat, place) of every chat of an export, with the messages known to be a list of objects with a type."""
    place = f"{unit}: "
    if isinstance(value, dict) and "messages" not in value and ("chats" in value or "left_chats" in value):
        found = []
        for key in ("chats", "left_chats"):
            if key in value:
                part = common.as_object(value[key], ("list",), (), f"{place}{key}")
                chats = common.as_list(part["list"], f"{place}{key}.list", "chats")
                found += [(chat, f"{place}{key}.list[{i}]") for i, chat in enumerate(chats)]
    else:
        found = [(value, f"{place}$")]
    for chat, where in found:
        chat = common.as_object(chat, ("messages",), (), where)
        for index, message in enumerate(common.as_list(chat["messages"], f"{where}.messages", "messages")):
            if not isinstance(message, dict) or "type" not in message:
                common.as_object(message, ("type",), (), f"{where}.messages[{index}]")
        yield chat, where


def _sender(message: dict[str, Any], place: str) -> tuple[str, str]:
    """(name, account) of who sent a message; the name is "" for a service message and where nobody is named."""
    if message["type"] != "message":
        return "", ""
    account = message.get("from_id")
    account = "" if account is None else common.as_name(account, f"{place}.from_id")
    name = message.get("from")
    if name is not None and name != "":
        return common.as_name(name, f"{place}.from"), account
    return (account if account[:1].isalpha() or not account else f"user{account}"), account


def _text(
    message: dict[str, Any], chat: dict[str, Any], name: str, counts: collections.Counter[str], place: str
) -> str:
    """The text that a person wrote; "" where there is none, which is counted."""
    if message["type"] != "message":
        kind, text = "system lines", ""
    elif chat.get("type") == "bot_chat":
        kind, text = "bots", ""
    elif not name:
        kind, text = "no sender", ""
    else:
        text = _flat(message.get("text", ""), f"{place}.text")
        kind = "media" if any(key in message for key in ("photo", "file", "media_type")) else "empty messages"
    if not text:
        counts[kind] += 1
    return text


def _flat(value: Any, place: str) -> str:
    """The text of a string, or of a list of strings and of objects with a text (links, mentions, bold words)."""
    parts = [value] if isinstance(value, str) else common.as_list(value, place, "strings and objects")
    flat = []
    for index, part in enumerate(parts):
        where = f"{place}[{index}]"
        text = part if isinstance(part, str) else common.as_object(part, ("text",), (), where)["text"]
        common.as_text(text, where)
        flat.append(text)  # unstripped, since the spaces between the parts stand in them
    return common.as_text("".join(flat), place)


def _time(message: dict[str, Any], place: str) -> float | None:
    """Seconds since the epoch; None where the message has no date."""
    for key in ("date_unixtime", "date"):
        if message.get(key) is not None:
            return as_time(message[key], f"{place}.{key}")
    return None
