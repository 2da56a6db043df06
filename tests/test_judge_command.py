"""The command: what it writes, what it refuses, and that a key is nowhere to be found."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from endpoints import KEY, MODEL, error, serving
from planted import longer, make_pairs, says, true_reply
from tiny import call, contents

from qaperso import endpoint
from qaperso import judge as judging
from qaperso.eval import judge
from qaperso.eval.judge import Pair


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two runs' predictions, and an environment without a proxy; waits are short."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(endpoint, "FIRST_WAIT", 0.0)
    for name, step in (("ours", 30), ("theirs", 20)):
        (tmp_path / name).mkdir()
        for split, file in (("dev", "predictions_dev.jsonl"), ("test", "predictions.jsonl")):
            lines = [line(p, getattr(p, name), step, split) for p in make_pairs()]
            (tmp_path / name / file).write_text("".join(lines), encoding="utf-8")
    return tmp_path


def line(pair: Pair, reply: str, step: int, split: str) -> str:
    """One of predictions.jsonl."""
    record = {k: v for k, v in dataclasses.asdict(pair).items() if k not in ("ours", "theirs")}
    record |= {
        "id": f"{split} {pair.id}",
        "split": split,
        "reply": reply,
        "seed": 7,
        "sampling": {},
        "prompt": "",
        "step": step,
    }
    return json.dumps(record, ensure_ascii=False) + "\n"


def command(folder: Path, base: str, *words: object, **environment: str) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of the command on the two runs."""
    variables = {"QAPERSO_API_BASE": base, "QAPERSO_API_MODEL": MODEL, "QAPERSO_API_KEY": KEY} | environment
    with pytest.MonkeyPatch.context() as patch:
        for name, value in variables.items():
            patch.setenv(name, value)
        return call(judging.main, "--workdir", folder / "ours", "--against", folder / "theirs", *words)


def test_the_command(folder: Path) -> None:
    with serving(says(true_reply)) as server:
        code, out, err = command(folder, server.base, "--price-in", 2, "--price-out", 10)
        assert code == 0 and len(server.asked) == 48, err
        assert (
            "1.000 [1.000, 1.000] n=12" in out and "judged by judge-1" in out and "ours @30 against theirs @20" in out
        )
        assert "48 calls, 48 of them made now: 480 prompt and 144 completion tokens, cost 0.0024" in out
        written = (folder / "ours" / "judge_theirs.json").read_bytes()
        found = json.loads(written)
        assert found["metrics"]["win_rate"] == {"value": 1.0, "low": 1.0, "high": 1.0, "n": 12}
        cost = found["usage"].pop("cost")
        assert found["usage"] == {"calls": 48, "prompt_tokens": 480, "completion_tokens": 144} and cost == 0.0024
        about = {"model": MODEL, "split": "test", "step": 30, "against": "theirs", "against_step": 20}
        assert {k: v for k, v in found.items() if k not in ("metrics", "usage")} == about
        # Again: the same result, and nobody is asked.
        code, out, _ = command(folder, server.base, "--price-in", 2, "--price-out", 10)
        assert code == 0 and "48 calls, 0 of them made now" in out and len(server.asked) == 48
        assert (folder / "ours" / "judge_theirs.json").read_bytes() == written
    assert not any(KEY.encode() in data for data in contents(folder).values() if data)
    assert KEY not in out + err


def test_a_part_of_another_split(folder: Path) -> None:
    with serving(says(longer)) as server:
        code, out, err = command(folder, server.base, "--split", "dev", "--limit", 6, "--concurrency", 2)
        assert code == 0 and len(server.asked) == 24 and "cost" not in out, err
    found = json.loads((folder / "ours" / "judge_theirs_dev.json").read_text())
    assert found["metrics"]["win_rate"]["n"] == 6 and found["usage"]["cost"] is None and found["split"] == "dev"


def test_a_failing_endpoint_costs_no_answer_twice(folder: Path) -> None:
    passing: list = [error(500), None, error(429), None, None]
    with serving(says(true_reply), [*passing, *[error(503)] * 99]) as server:
        code, out, err = command(folder, server.base, "--concurrency", 1)
        assert code == 2 and out == "" and len(err.splitlines()) == 1 and "failed 6 times in a row" in err
        assert sorted(p.name for p in (folder / "ours").iterdir()) == [
            "judge_answers.jsonl",
            "predictions.jsonl",
            "predictions_dev.jsonl",
        ]
        server.script.clear()
        before = len(server.asked)
        code, out, _ = command(folder, server.base)
        assert code == 0 and len(server.asked) - before == 48 - 3 and "48 calls, 45 of them made now" in out


def refused(found: tuple[int, str, str]) -> str:
    """The one line of a command that ends with exit code 2."""
    code, out, err = found
    assert code == 2 and out == "" and len(err.splitlines()) == 1 and err.startswith("error: "), err
    assert KEY not in err
    return err


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["--split", "tests"], "--split is 'tests', expected one of"),
        (["--limit", "0"], "--limit is 0, expected 1 or more"),
        (["--concurrency", "0"], "--concurrency is 0"),
        (["--price-in", "1"], "--price-out is not given"),
        (["--price-in", "-1", "--price-out", "1"], "--price-in is -1.0, expected 0 or more"),
        (["--price-in", "1", "--price-out", "nan"], "--price-out is nan"),
    ],
)
def test_bad_options(folder: Path, words: list[str], part: str) -> None:
    before = contents(folder)
    assert part in refused(command(folder, "http://127.0.0.1:9/v1", *words))
    assert contents(folder) == before


def test_no_endpoint(folder: Path) -> None:
    before = contents(folder)
    for name in ("QAPERSO_API_BASE", "QAPERSO_API_MODEL", "QAPERSO_API_KEY"):
        assert f"{name} is not set" in refused(command(folder, "http://127.0.0.1:9/v1", **{name: ""}))
    assert contents(folder) == before


def spoil(name: str, change: Callable[[str], str | None]) -> Callable[[Path], None]:
    """A change of one run's file of predictions; None = it goes."""

    def apply(folder: Path) -> None:
        path = folder / name / "predictions.jsonl"
        changed = change(path.read_text(encoding="utf-8"))
        path.unlink() if changed is None else path.write_text(changed, encoding="utf-8")

    return apply


@pytest.mark.parametrize(
    ("damage", "parts"),
    [
        (spoil("theirs", lambda _: None), ["theirs/predictions.jsonl is not there; run python -m qaperso.evaluate"]),
        (spoil("ours", lambda _: ""), ["ours/predictions.jsonl holds no reply of the test split"]),
        (spoil("ours", lambda t: t.replace('"test"', '"dev"')), ["holds no reply of the test split", "--split test"]),
        (spoil("ours", lambda t: t[:-20] + "\n"), ["ours/predictions.jsonl, line 12: not JSON"]),
        (
            spoil("theirs", lambda t: f"[]\n{t}"),
            ["theirs/predictions.jsonl, line 1: found list, expected a JSON object"],
        ),
        (spoil("ours", lambda t: t.replace('"reply"', '"said"', 1)), ["line 1: 'reply' is nothing, expected str"]),
        (spoil("ours", lambda t: t.replace(": 30", ": null", 1)), ["'step' is None, expected int"]),
        (spoil("ours", lambda t: t[:-3] + "1}\n"), ["holds replies of steps 30, 31, expected those of one"]),
        (
            spoil("ours", lambda t: t.replace('"id": "', '"id": "x')),
            ["no (dialogue, querier) in common", "('xtest d0', mother)"],
        ),
        (
            spoil("ours", lambda t: t.replace("yes 3", "no")),
            ["differ in the reference of dialogue 'test d3', asked by mother"],
        ),
    ],
)
def test_bad_predictions(folder: Path, damage: Callable[[Path], None], parts: list[str]) -> None:
    damage(folder)
    before = contents(folder)
    found = refused(command(folder, "http://127.0.0.1:9/v1"))
    assert all(part in found for part in parts), found
    assert contents(folder) == before


def test_bytes_that_are_no_text(folder: Path) -> None:
    (folder / "ours" / "predictions.jsonl").write_bytes(b"\xff\xfe\n")
    assert "ours/predictions.jsonl, line 1: not JSON" in refused(command(folder, "http://127.0.0.1:9/v1"))


def test_the_last_reply_of_several_counts(folder: Path) -> None:
    path = folder / "ours" / "predictions.jsonl"
    text = path.read_text(encoding="utf-8")
    path.write_text(
        text.replace('"step": 30', '"step": 10').replace('"reply": "', '"reply": "old ') + text, encoding="utf-8"
    )
    found = judge.read_predictions(path, "test")
    assert len(found) == 12 and {r["step"] for r in found.values()} == {30}
    assert found["test d0", "boss"]["reply"] == "boss, yes 0"
