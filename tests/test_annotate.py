"""DPL from command to reply: what sets people apart is planted, and arrives in prompts and replies."""

from __future__ import annotations

import collections
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from endpoints import KEY, MODEL, Server, error, raw, serving
from scripted import SAID, mumble, respond
from tiny import TINY, arguments, call, one_device, trained  # noqa: F401

from qaperso import annotate, chat, endpoint, evaluate, train
from qaperso.data import reviews_town
from qaperso.data.reviews_town import STYLES, make_world
from qaperso.run import open_run

# The tiny base sees few words of what stands before the review: all of these tests are of what it is given to read.
COMMON = ("method=dpl", "data.format=synthetic_reviews", "data.clusters=1", "batch.length=256", "dev_dialogues=12")
HOW = (*COMMON, "dpl.writer=endpoint", "prompts.examples=3", "prompts.tokens=160")
pytestmark = pytest.mark.usefixtures("one_device")


@pytest.fixture(autouse=True)
def direct(monkeypatch: pytest.MonkeyPatch) -> None:
    """No proxy, no waits."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(endpoint, "FIRST_WAIT", 0.0)


def environment(monkeypatch: pytest.MonkeyPatch, server: Server) -> None:
    for name, value in (("BASE", server.base), ("MODEL", MODEL), ("KEY", KEY)):
        monkeypatch.setenv(f"QAPERSO_API_{name}", value)


def steps(*first: Callable) -> list[Callable]:
    """These, then the scripted model for ever."""
    return [*first, *[respond] * 2000]


def questions(server: Server) -> collections.Counter[str]:
    return collections.Counter(json.dumps(body["messages"]) for body in server.asked)


def test_planted_differences_arrive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "run"
    # It misbehaves in every way; a fifth of what it says needs a repair.
    trouble = [error(429), error(500), raw('{"choices": [', missing=99), raw({}), error(503)]
    script = steps(*trouble, *[respond, respond, respond, respond, mumble] * 20)
    with serving(script=script) as server:
        environment(monkeypatch, server)
        out = trained(TINY, folder, *HOW)
        assert out.startswith("final step=0 loss=nan")
        code, out, err = call(annotate.main, "--workdir", folder, "--reply", "--concurrency", "4")
        assert code == 0, err
        before = len(server.asked)
        again = call(annotate.main, "--workdir", folder, "--reply")
        assert again[0] == 0 and len(server.asked) == before and " 0 of them made now" in again[2]
    found = json.loads((folder / "endpoint.json").read_text(encoding="utf-8"))
    # Every reviewer's every side shows in the reviews; who knows all styles and draws one gets an eighth.
    for name in (*STYLES, "fact", "exact"):
        assert found["metrics"][name]["value"] == 1.0, name
    assert found["metrics"]["exact_chance"]["value"] < 0.2
    facts = found["found"]
    assert facts["dialogues"] == facts["profiles"] == 12 and facts["unreadable"] == 0
    assert facts["repaired"] > 0 and facts["items"] == 36
    assert facts["differences"] + facts["nobody else on the item"] == 36
    assert found["usage"]["calls"] > 40 and found["usage"]["prompt_tokens"] > 400
    lines = [json.loads(line) for line in (folder / "endpoint_replies.jsonl").read_text().splitlines()]
    assert all(line["reply"] == line["reference"] for line in lines) and len(lines) == 12
    # And the base's prompt says so, in evaluation too.
    with serving(script=steps()) as server:
        environment(monkeypatch, server)
        code, _, err = call(evaluate.main, "--workdir", folder, "--replies", "0")
        assert code == 0 and "dialogues 12, no history 0, items 36, " in err, err
        assert "swap_gap" in json.loads((folder / "eval.json").read_text(encoding="utf-8"))["metrics"]
        # Only those who are swapped in were not asked for before.
        assert max(questions(server).values()) == 1 and not any("Write my review" in c for c in server.contents)
        asked = len(server.asked)
        run = open_run(folder)
        annotate.writers.ready(run, {})
        for person in make_world(0).reviewers:
            (test,) = [d for d in run.store.dialogues if d.querier == person.name and d.split == "test"]
            instruction = run.preface(test)[0]
            told = {kind: [side for side in sides if sides[side] in instruction.text] for kind, sides in SAID.items()}
            assert instruction.speaker == "system" and told == {kind: [side] for kind, side in person.style.items()}
        assert len(server.asked) == asked
        _what_the_command_refuses(folder)


def test_a_failing_endpoint_is_asked_nothing_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "run"
    with serving(script=[*[respond] * 9, *[error(500)] * 200]) as server:
        environment(monkeypatch, server)
        code, out, err = call(train.main, *arguments(TINY, folder, *HOW))
        assert code == 2 and out == "" and "failed 6 times in a row" in err and "run again to go on" in err
        answered = {json.dumps(body["messages"]) for body in server.asked[:9]}
    kept = (folder / "notes.jsonl").read_bytes()
    assert 1 <= kept.count(b"\n") <= 9 and KEY.encode() not in kept
    # Killed while it wrote, too.
    (folder / "notes.jsonl").write_bytes(kept + b'{"key": "ab')
    with serving(script=steps()) as server:
        environment(monkeypatch, server)
        trained(TINY, folder, *HOW)
        asked = questions(server)
    assert max(asked.values()) == 1
    assert len(set(asked) & answered) == 9 - kept.count(b"\n")
    assert json.loads((folder / "metrics.jsonl").read_text().splitlines()[0])["step"] == 0


@pytest.mark.slow
def test_the_base_writes_evaluates_and_chats(tmp_path: Path) -> None:
    """Its answers are no English, so nothing can be read; all else goes its way, and is counted."""
    folder = tmp_path / "run"
    short = ("prompts.examples=1", "prompts.tokens=60", "dpl.new_tokens=3", "dpl.words=8", "dev_dialogues=2")
    trained(TINY, folder, *COMMON, *short)
    code, _, err = call(evaluate.main, "--workdir", folder, "--replies", "2")
    assert code == 0, err
    found = json.loads((folder / "eval.json").read_text(encoding="utf-8"))["metrics"]
    assert {"exact", "length", "warmth", "order", "exact_chance", "swap_gap"} <= set(found)
    assert "dialogues 12, no history 0, items 12" in err and " calls, " in err
    name = reviews_town.make_world(0).reviewers[0].name
    code, out, _ = call(chat.main, "--workdir", folder, "--once", "a rope", "--querier", name, "stranger")
    assert code == 0 and name in out
    code, _, err = call(annotate.main, "--workdir", folder)
    assert code == 0 and err.startswith("test: dialogues 12,") and " 0 of them made now" in err


def refused(*words: Any) -> str:
    code, out, err = call(annotate.main, *words)
    assert code == 2 and out == "" and len(err.splitlines()) == 1
    return err


def _what_the_command_refuses(folder: Path) -> None:
    assert "--split is 'tset', expected one of train" in refused("--workdir", folder, "--split", "tset")
    assert "has no dialogue in the unseen split" in refused("--workdir", folder, "--split", "unseen")
    assert "--concurrency is 0, expected 1 or more" in refused("--workdir", folder, "--concurrency", "0")
    record = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    record["config"]["dpl"]["writer"] = "base"
    (folder / "run.json").write_text(json.dumps(record), encoding="utf-8")
    assert "--reply has an endpoint reply, but config.dpl.writer='base'" in refused("--workdir", folder, "--reply")
    record["config"]["method"] = "prompts"
    (folder / "run.json").write_text(json.dumps(record), encoding="utf-8")
    assert "config.method='prompts' asks no language model; 'dpl' does" in refused("--workdir", folder)
