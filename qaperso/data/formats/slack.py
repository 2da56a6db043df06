"""Slack workspaces as Slack exports them: `users.json`, `channels.json`, and a folder of daily files for each channel.

Source: slack.com/help/articles/220556107 (how to read exports) and docs.slack.dev (message events, formatting).
"""

from __future__ import annotations

import collections
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from qaperso.data.formats import common, visible
from qaperso.types import Conversation, Message

LINES = False

_DAY = re.compile(r"\d{4}-\d{2}-\d{2}\.json")
_LISTS = ("channels.json", "groups.json", "mpims.json", "dms.json")

# What people write has no subtype or one of these; all the other subtypes are notes of the app.
_PERSONAL = (None, "me_message", "thread_broadcast", "file_share")
_BOTS = ("bot_message", "bot_add", "bot_remove")
_SLACKBOT = "USLACKBOT"

# <@U1>, <@U1|ida>, <#C1>, <#C1|general>, <!here>, <!subteam^S1|@team>, <https://a.b>, <https://a.b|label>
_LINK = re.compile(r"<(?P<mark>[@#!]?)(?P<target>[^<>|]+)(?:\|(?P<label>[^<>]*))?>")
_ENTITIES = (("&lt;", "<"), ("&gt;", ">"), ("&amp;", "&"))


def sniff(path: Path, head: str) -> str | None:
    """Says why `path` looks like such an export: a folder with users.json and a list of channels.

    Args:
      path: of the folder; a file is never taken for an export.
      head: not needed.
    """
    lists = [name for name in _LISTS if (path / name).is_file()] if path.is_dir() else []
    return f"a folder with users.json and {lists[0]}" if lists and (path / "users.json").is_file() else None


def units(path: Path) -> list[Path]:
    """The folders with daily files, at any depth, sorted; `path` itself if it is one.

    Raises:
      UserError: nothing there, a file, no such folder.
    """
    if not path.is_dir():
        found = "a file" if path.exists() else "nothing there"
        common.fail(path, found, "the folder of a Slack export", "; unpack the export and give its folder")
    folders = {file.parent for file in visible(path, "*.json") if _DAY.fullmatch(file.name)}
    if not folders:
        expected = "folders of channels with files such as 2021-12-31.json"
        common.fail(path, "no daily file", expected, "; give the folder of the unpacked export")
    return sorted(folders, key=Path.as_posix)


def beside(unit: Path) -> list[Path]:
    """A channel's daily files, and the export's lists, where they are there."""
    return [*_days(unit), *(unit.parent / name for name in ("users.json", *_LISTS))]


def _days(unit: Path) -> list[Path]:
    return sorted(file for file in unit.glob("*.json") if _DAY.fullmatch(file.name))


def read(
    unit: Path,
    counts: collections.Counter[str],
    columns: Mapping[str, str] = {},
    start: int = 0,
    stop: int | None = None,
) -> Iterator[Conversation]:
    """Reads one channel: the talk in the channel, then its threads, each a conversation of its own.

    - The channel's conversation is named by its folder, a thread's FOLDER/THREAD_TS; messages are in the order of their
      times. A thread begins with the message that it answers, which stands in the channel too; its replies do not. As
      they share that message, all of a channel is one group.
    - The speaker is the name shown of an account in users.json, else the real name, else the account's name, else (for
      guests who are not listed there) the profile in the message or the bare id. Where several accounts share a name,
      the id is added in brackets.
    - Mentions become `@name`, links to channels `#name`, other links their label or address; `&amp;`, `&lt;` and `&gt;`
      are undone.

    Args:
      unit: the channel's folder; `users.json` and, if there, `channels.json` and `groups.json` are read beside it.
      counts: is told how many messages of "bots", "system lines" (joins, topics and so on), "deleted" messages, files
        without text ("media"), "empty messages" and messages with "no sender" were dropped.
      columns, start, stop: not used by this format.

    Yields:
      Conversations with at least one message; at least one.

    Raises:
      UserError: no users.json, an unreadable file, broken JSON, wrong keys or types, no message of a person.
    """
    names, bots = _users(unit.parent / "users.json")
    channels = _channels(unit.parent)
    days = _days(unit)
    talk: list[tuple[float, Message]] = []
    threads: dict[str, list[tuple[float, Message]]] = {}
    firsts: dict[str, tuple[float, Message]] = {}
    for file in days:
        items = common.as_list(common.decode_json(common.read_text(file), file), f"{file}: $", "messages")
        for index, item in enumerate(items):
            place = f"{file}: [{index}]"
            if not isinstance(item, dict) or "ts" not in item:
                common.as_object(item, ("ts",), (), place)
            account = _account(item, bots, counts, place)
            text = _text(item, names, channels, counts, place) if account else ""
            if not text:
                continue
            stamp = common.as_name(item["ts"], f"{place}.ts")
            time = _time(stamp, f"{place}.ts")
            message = Message(names.get(account) or _guest(item, account, place), text, time)
            thread = item.get("thread_ts")
            thread = stamp if thread is None else common.as_name(thread, f"{place}.thread_ts")
            if thread == stamp:
                talk.append((time, message))
                firsts[stamp] = (time, message)
            else:
                _time(thread, f"{place}.thread_ts")
                threads.setdefault(thread, []).append((time, message))
    if not talk and not threads:
        common.fail(unit, "no message of a person with text", "at least one", "; leave this folder out")
    name = common.as_name(unit.name, f"{unit}: name")
    if talk:
        yield Conversation(name, _sorted(talk), name)
    for thread in sorted(threads, key=float):
        first = [firsts[thread]] if thread in firsts else []
        yield Conversation(f"{name}/{thread}", _sorted(first + threads[thread]), name)


def _sorted(timed: list[tuple[float, Message]]) -> tuple[Message, ...]:
    return tuple(message for _, message in sorted(timed, key=lambda pair: pair[0]))


def _users(file: Path) -> tuple[dict[str, str], set[str]]:
    """The name of every account of users.json, and which accounts are bots."""
    if not file.is_file():
        common.fail(file, "no such file", "it beside the folders of the channels", "; keep the whole export together")
    shown: dict[str, str] = {}
    bots = {_SLACKBOT}
    for index, item in enumerate(
        common.as_list(common.decode_json(common.read_text(file), file), f"{file}: $", "users")
    ):
        place = f"{file}: [{index}]"
        user = common.as_object(item, ("id",), (), place)
        account = common.as_name(user["id"], f"{place}.id")
        shown[account] = _shown(user, user.get("profile"), place) or account
        if user.get("is_bot"):
            bots.add(account)
    times = collections.Counter(shown.values())
    return {a: name if times[name] == 1 else f"{name} ({a})" for a, name in shown.items()}, bots


def _shown(user: dict[str, Any], profile: Any, place: str) -> str:
    """The name shown, else the real name, else the account's; "" where there is none of them."""
    profile = profile if isinstance(profile, dict) else {}
    places = ((profile, "display_name"), (profile, "real_name"), (user, "real_name"), (user, "name"), (profile, "name"))
    return next((common.as_name(part[key], f"{place}.{key}") for part, key in places if part.get(key)), "")


def _guest(item: dict[str, Any], account: str, place: str) -> str:
    """The name of an account that users.json does not have."""
    return _shown({}, item.get("user_profile"), f"{place}.user_profile") or account


def _channels(folder: Path) -> dict[str, str]:
    """The name of every channel in the export's lists, as far as there are any."""
    names = {}
    for file in (folder / name for name in _LISTS[:2]):
        if file.is_file():
            items = common.as_list(common.decode_json(common.read_text(file), file), f"{file}: $", "channels")
            for index, item in enumerate(items):
                place = f"{file}: [{index}]"
                item = common.as_object(item, ("id", "name"), (), place)
                names[common.as_name(item["id"], f"{place}.id")] = common.as_name(item["name"], f"{place}.name")
    return names


def _account(item: dict[str, Any], bots: set[str], counts: collections.Counter[str], place: str) -> str:
    """The id of the person who wrote a message; "" where no person did, which is counted."""
    subtype, user = item.get("subtype"), item.get("user")
    user = "" if user is None or user == "" else common.as_name(user, f"{place}.user")
    if subtype in _BOTS or item.get("bot_id") or user in bots:
        kind = "bots"
    elif subtype == "tombstone":
        kind = "deleted"
    elif item.get("type", "message") != "message" or subtype not in _PERSONAL:
        kind = "system lines"
    elif not user:
        kind = "no sender"
    else:
        return user
    counts[kind] += 1
    return ""


def _text(
    item: dict[str, Any],
    names: Mapping[str, str],
    channels: Mapping[str, str],
    counts: collections.Counter[str],
    place: str,
) -> str:
    """The text of a message, readable; "" where it has none, which is counted."""

    def readable(match: re.Match[str]) -> str:
        mark, target, label = match["mark"], match["target"], match["label"] or ""
        if mark == "@":
            return "@" + (names.get(target) or label.removeprefix("@") or target)
        if mark == "#":
            return "#" + (label or channels.get(target) or target)
        if mark == "!":
            return label or f"@{target}"
        return label or target

    raw = item.get("text")
    text = _LINK.sub(readable, common.as_text("" if raw is None else raw, f"{place}.text"))
    for entity, char in _ENTITIES:
        text = text.replace(entity, char)
    text = common.as_text(text, f"{place}.text")
    if not text:
        counts["media" if item.get("files") or item.get("file") else "empty messages"] += 1
    return text


def _time(stamp: str, place: str) -> float:
    """Seconds since the epoch of Slack's time stamp, which is also the message's id."""
    if not re.fullmatch(r"\d{1,11}(?:\.\d{1,9})?", stamp, re.ASCII):
        common.fail(place, common.show(stamp), "seconds such as '1609459200.000200'", "; mend that message")
    return float(stamp)
