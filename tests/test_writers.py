"""Who is asked: the run's own base, many questions at a time, or an endpoint; answers are kept as they come."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax
import pytest
import untrained
from endpoints import KEY, MODEL, serving

from qaperso import batching, writers
from qaperso.endpoint import Cache, Messages
from qaperso.errors import UserError
from qaperso.notes import Notes
from qaperso.reply import decode
from qaperso.run import Run

OPENED = dict(method="dpl", data__format="synthetic_reviews", data__clusters=1, dpl__new_tokens=4)


def question(text: str, system: str = "the make") -> Messages:
    return [{"role": "system", "content": system}, {"role": "user", "content": text}]


def fresh(folder: Path, **changes: Any) -> Run:
    """The tiny run with notes of its own."""
    run, _, _ = untrained.opened(**OPENED)
    run = untrained.changed(run, **changes)
    return dataclasses.replace(run, setting=dataclasses.replace(run.setting, notes=Notes(folder)))


def test_the_base_answers_each_whatever_else_is_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = fresh(tmp_path)
    writers.ready(run, {})
    asked = [question("is the rope cheap ?"), question("what a joy"), question("is the rope cheap ?")]
    together = run.setting.notes.complete(asked)
    assert together[0] == together[2] and all(len(text.split()) <= 4 for text in together)
    usage = run.setting.notes.usage()
    assert usage["calls"] == usage["made"] == 2 and 0 < usage["completion_tokens"] <= 8
    prompts = [writers.prompt_of(run, m) for m in asked[:2]]
    assert usage["prompt_tokens"] == sum(len(p.tokens) for p in prompts)
    # In other company, too.
    other = writers.of_base(run, {})(Cache(tmp_path / "other.jsonl"), [question("who is the reviewer ?"), asked[0]])
    assert other[1].text == together[0]
    # What is known needs no model.
    monkeypatch.setattr(batching, "prepare", lambda *_: pytest.fail("it was made"))
    again = fresh(tmp_path)
    writers.ready(again, {})
    assert again.setting.notes.complete(asked) == together and again.setting.notes.usage()["made"] == 0


def test_a_question_is_a_chat(tmp_path: Path) -> None:
    run = fresh(tmp_path)
    prompt = writers.prompt_of(run, question("what a joy"))
    # Instruction, question, and the header of the answer: the sign, who speaks, a newline.
    (start,) = run.template.start
    places = [i for i, t in enumerate(prompt.tokens) if t == start]
    assert len(places) == 3 and places[-1] == len(prompt.tokens) - 3
    plain = decode(run, [int(t) for t in prompt.tokens])
    assert plain.index("the make") < plain.index("what a joy")
    limit = run.setting.model.max_position
    for long in (question("joy " * limit), question("joy", "joy " * limit)):
        with pytest.raises(UserError, match=r"take more than the \d+ tokens that the base reads; lower dpl\.words"):
            writers.prompt_of(run, long)


def test_who_is_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, _, _ = untrained.opened(method="sft")
    writers.ready(plain, {})
    assert plain.setting.notes is None
    run = fresh(tmp_path, dpl__writer="endpoint")
    monkeypatch.delenv("QAPERSO_API_BASE", raising=False)
    with pytest.raises(UserError, match="QAPERSO_API_BASE is not set"):
        writers.ready(run, {})
    with serving(lambda text: f"on {text}") as server:
        names = {"NO_PROXY": "127.0.0.1", "QAPERSO_API_BASE": server.base}
        for name, value in (names | {"QAPERSO_API_MODEL": MODEL, "QAPERSO_API_KEY": KEY}).items():
            monkeypatch.setenv(name, value)
        writers.ready(run, {})
        assert run.setting.notes.complete([question("joy"), question("rope")]) == ["on joy", "on rope"]
        assert run.setting.notes.complete([question("rope")]) == ["on rope"] and len(server.asked) == 2
    assert run.setting.notes.usage() == {"calls": 2, "made": 2, "prompt_tokens": 20, "completion_tokens": 6}
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(UserError, match=r"config\.method='dpl' asks a language model on one host"):
        writers.ready(run, {})
