"""Answers are kept, given again and counted."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from qaperso.endpoint import Cache, Completion, Messages, digest
from qaperso.errors import UserError
from qaperso.notes import FILE, Notes


def user(text: str) -> Messages:
    return [{"role": "user", "content": text}]


class Echo:
    """A writer that repeats what it is asked, and fails at "stop"."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    def __call__(self, cache: Cache, asked: Sequence[Messages]) -> list[Completion]:
        for messages in asked:
            text = messages[-1]["content"]
            if cache.get(digest("echo", messages)) is None:
                self.asked.append(text)
                if text == "stop":
                    raise UserError("stopped")
                cache.put(digest("echo", messages), Completion(text, len(text), 1))
        return [cache.get(digest("echo", messages)) for messages in asked]


def opened(folder: Path) -> tuple[Notes, Echo]:
    notes, echo = Notes(folder), Echo()
    notes.writer = echo
    return notes, echo


def test_nothing_is_asked_twice(tmp_path: Path) -> None:
    notes, echo = opened(tmp_path)
    assert notes.complete([]) == [] and not (tmp_path / FILE).exists()
    assert notes.complete([user("aa"), user("b"), user("aa")]) == ["aa", "b", "aa"]
    assert notes.complete([user("b")]) == ["b"] and echo.asked == ["aa", "b"]
    assert notes.usage() == {"calls": 2, "made": 2, "prompt_tokens": 3, "completion_tokens": 2}
    notes.close()
    again, echo = opened(tmp_path)
    assert again.complete([user("b"), user("ccc")]) == ["b", "ccc"] and echo.asked == ["ccc"]
    assert again.usage() == {"calls": 2, "made": 1, "prompt_tokens": 4, "completion_tokens": 2}
    again.close()
    assert again.complete([user("aa")]) == ["aa"] and echo.asked == ["ccc"]
    assert again.told({"items": 1200, "profiles": 3}) == (
        "items 1,200, profiles 3; 3 calls, 1 of them made now: 6 prompt and 3 completion tokens"
    )


def test_what_was_answered_before_a_failure_is_kept(tmp_path: Path) -> None:
    notes, _ = opened(tmp_path)
    with pytest.raises(UserError, match="stopped"):
        notes.complete([user("a"), user("stop"), user("b")])
    assert notes.usage() == {"calls": 0, "made": 1, "prompt_tokens": 0, "completion_tokens": 0}
    again, echo = opened(tmp_path)
    again.complete([user("a"), user("b")])
    assert echo.asked == ["b"]


def test_nobody_to_ask(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"use python -m qaperso\.train, evaluate, chat or annotate"):
        Notes(tmp_path).complete([user("a")])
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(UserError, match="cannot be opened"):
        opened(tmp_path / "absent")[0].complete([user("a")])
