"""The terminal chat: what each line does, what is remembered, what a mistake leaves alone."""

from __future__ import annotations

import io
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import untrained
from rich.console import Console

from qaperso import chat, reply
from qaperso.batching import Model
from qaperso.chat import Session
from qaperso.errors import UserError
from qaperso.generate import Sampling
from qaperso.types import Dialogue, Turn


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Dialogue]:
    """What is put to the model, which replies in two pieces; a query of "long" is stopped after the first."""
    found: list[Dialogue] = []

    def stream(model: Model, dialogue: Dialogue, row: int, how: Sampling) -> Iterator[str]:
        found.append(dialogue)
        if dialogue.query == "never":
            raise KeyboardInterrupt
        yield f"aye {row} "
        if dialogue.query == "long":
            raise KeyboardInterrupt
        yield "[b]!"

    def replies(model: Model, dialogues: list[Dialogue], rows: list[int], how: list[Sampling]) -> list[str]:
        found.extend(dialogues)
        return [f"to {row}\nand on" for row in rows]

    def streams(
        model: Model, dialogues: list[Dialogue], rows: list[int], how: list[Sampling]
    ) -> Iterator[tuple[int, str]]:
        found.extend(dialogues)
        for piece in ("aye", " [b]"):
            for i in range(len(rows)):
                yield i, f"{piece}{rows[i]}"
        if dialogues[0].query == "long":
            raise KeyboardInterrupt

    monkeypatch.setattr(reply, "streams", streams)
    monkeypatch.setattr(reply, "stream", stream)
    monkeypatch.setattr(reply, "replies", replies)
    return found


def session(*queriers: str) -> Session:
    run, _, _ = untrained.opened(method="qar", qar__contrast="none")
    return Session(Model(run, {}, {}), "maren", queriers or ("pip",), Sampling(4))


def test_replies_are_streamed_and_remembered(asked: list[Dialogue], capsys: pytest.CaptureFixture[str]) -> None:
    talk = session()
    row = talk.model.run.registry.row("pip")
    for line in ("any bread? \n", "", "   ", "and milk?"):
        assert talk.take(line)
    assert capsys.readouterr().out == f"aye {row} [b]!\n" * 2
    first = (Turn("pip", "any bread?"), Turn("maren", f"aye {row} [b]!"))
    assert len(asked) == 2 and asked[1].turns == (*first, Turn("pip", "and milk?"), Turn("maren", ""))
    talk.take("/history")
    assert capsys.readouterr().out.splitlines()[:2] == ["pip: any bread?", f"maren: aye {row} [b]!"]
    talk.take("/clear")
    talk.take("/history")
    assert not talk.history and capsys.readouterr().out == "nothing was said yet\n"


def test_somebody_else_begins_anew(asked: list[Dialogue]) -> None:
    talk = session()
    talk.take("any bread?")
    with pytest.raises(UserError, match=r"querier 'vos' is not known to this run; did you mean 'voss'\?"):
        talk.take("/as vos")
    assert talk.queriers == ("pip",) and len(talk.history) == 2
    talk.take("/as  voss ")
    assert talk.queriers == ("voss",) and not talk.history
    talk.take("/as stranger")
    talk.take("any bread?")
    assert asked[-1].querier == "stranger" and len(asked[-1].turns) == 2
    with pytest.raises(UserError, match="/as needs a name; known are .*pip.*stranger"):
        talk.take("/as")


def test_comparing_puts_one_query_as_several(asked: list[Dialogue], capsys: pytest.CaptureFixture[str]) -> None:
    talk = session()
    with pytest.raises(UserError, match="nothing to compare yet"):
        talk.take("/compare")
    talk.take("any bread?")
    talk.take("/compare")
    names = [d.querier for d in asked[1:]]
    assert names[0] == "pip" and names[-1] == "stranger" and len(set(names)) == len(names) == chat.OTHERS + 2
    assert {d.query for d in asked} == {"any bread?"} and len(talk.history) == 2
    talk.take("/compare any milk?")
    assert asked[-1].query == "any milk?" and f"to {talk.model.run.registry.row('pip')}" in capsys.readouterr().out
    # Those who were named are compared, for every line.
    both = session("pip", "voss")
    asked.clear()
    both.take("any bread?")
    both.take("/compare")
    assert [d.querier for d in asked] == ["pip", "voss"] * 2 and not both.history


def test_a_stopped_reply_ends_where_it_is(asked: list[Dialogue], capsys: pytest.CaptureFixture[str]) -> None:
    talk = session()
    row = talk.model.run.registry.row("pip")
    assert talk.take("long") and talk.history == [Turn("pip", "long"), Turn("maren", f"aye {row} ")]
    assert talk.take("never") and len(talk.history) == 2
    assert capsys.readouterr().out == f"aye {row}  [stopped]\n [stopped]\n"


def test_through_a_pipe_replies_come_one_after_the_other(
    asked: list[Dialogue], capsys: pytest.CaptureFixture[str]
) -> None:
    talk = session("pip", "harald")
    talk.take("is it [red] bread?")
    rows = [talk.model.run.registry.row(name) for name in ("pip", "harald")]
    told = [f"pip     to {rows[0]}", "        and on", f"harald  to {rows[1]}", "        and on"]
    assert capsys.readouterr().out.splitlines() == told


def test_on_a_terminal_a_comparison_streams_side_by_side(
    asked: list[Dialogue], monkeypatch: pytest.MonkeyPatch
) -> None:
    def terminal(width: int) -> Console:
        console = Console(file=io.StringIO(), force_terminal=True, width=width, color_system=None)
        monkeypatch.setattr(chat, "Console", lambda: console)
        return console

    talk = session("pip", "harald")
    first, second = (talk.model.run.registry.row(name) for name in ("pip", "harald"))
    console = terminal(80)
    talk.take("is it [red] bread?")
    text = console.file.getvalue()
    assert "is it [red] bread?" in text and "pip" in text and "harald" in text
    # A frame a piece (and the last once more): what is written grows, and both stand on one line.
    frames = [line for line in text.splitlines() if f"aye{first}" in line]
    assert [f"aye{second}" in line for line in frames[:4]] == [False, True, True, True]
    assert [f"[b]{first}" in line for line in frames[:4]] == [False, False, True, True]
    assert f"aye{second} [b]{second}" in frames[-1]
    narrow = terminal(2 * chat.COLUMN - 1)
    talk.take("is it [red] bread?")
    assert not [x for x in narrow.file.getvalue().splitlines() if f"aye{first}" in x and f"aye{second}" in x]
    # A reply that is stopped stays as far as it was written.
    console = terminal(80)
    talk.take("long")
    assert f"aye{second} [b]{second}" in console.file.getvalue()


def test_a_comparison_can_be_stopped(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def stopped(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(reply, "replies", stopped)
    assert session().take("/compare any bread?") and capsys.readouterr().out == "[stopped]\n"


def test_mistakes_are_told_to_a_person_and_end_a_pipe(
    asked: list[Dialogue], capsys: pytest.CaptureFixture[str]
) -> None:
    lines = ["/compar\n", "any bread?\n", "/quit\n", "never read\n"]
    session().talk(iter(lines), patient=True)
    assert [d.query for d in asked] == ["any bread?"]
    assert "'/compar' is no command; did you mean '/compare'?" in capsys.readouterr().err
    with pytest.raises(UserError, match="did you mean '/compare'"):
        session().talk(iter(lines), patient=False)


def test_help_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    session().take("/help")
    told = capsys.readouterr().out
    assert all(name in told for name in ("/as", "/compare", "/history", "/clear", "/help", "/quit", "Ctrl-C"))


def test_typing_goes_on_after_ctrl_c_and_ends_with_the_input(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    typing: Iterator[str | BaseException] = iter(["one", KeyboardInterrupt(), "two", EOFError()])
    prompts: list[str] = []

    def typed(prompt: str) -> str:
        prompts.append(prompt)
        line = next(typing)
        if isinstance(line, BaseException):
            raise line
        return line

    monkeypatch.setattr("builtins.input", typed)
    talk = session("pip", "voss")
    assert list(chat.typed(talk)) == ["one", "two"]
    assert prompts == ["pip voss> "] * 4 and "/quit or Ctrl-D leaves" in capsys.readouterr().out


def test_lines_come_through_a_pipe(
    asked: list[Dialogue], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    talk = session()
    monkeypatch.setattr(chat, "open_run", lambda _: talk.model.run)
    monkeypatch.setattr(chat, "restore", lambda _: ({}, {}, 0))
    monkeypatch.setattr(chat, "prepare", lambda *_: talk.model)
    monkeypatch.setattr(sys, "stdin", io.StringIO("any bread?\n/as voss\nand for me?"))
    assert chat.main(["--workdir", "x", "--querier", "pip"]) == 0
    assert [(d.querier, d.query) for d in asked] == [("pip", "any bread?"), ("voss", "and for me?")]
    out = capsys.readouterr().out
    assert out.count("[b]!") == 2 and ">" not in out
    monkeypatch.setattr(sys, "stdin", io.StringIO("/as nobody at all\nany bread?"))
    assert chat.main(["--workdir", "x", "--querier", "pip"]) == 2 and len(asked) == 2
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("où?".encode("latin-1")), "utf-8"))
    capsys.readouterr()
    assert chat.main(["--workdir", "x", "--querier", "pip"]) == 2 and len(asked) == 2
    assert capsys.readouterr().err.startswith("error: standard input: found byte 0xf9, expected UTF-8")
    assert chat.main(["--workdir", "x", "--querier", "pip", "--once", "o\udcf9?"]) == 2
    assert "--once: found half a surrogate pair" in capsys.readouterr().err
    assert chat.main(["--workdir", "x", "--querier", "pip", "--once", " ou\u0300?"]) == 0 and asked[-1].query == "où?"
