"""Processes of several devices each, which train, stop, and evaluate as one: what comes out is what a single device gives."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import tiny
from tiny import CACHE, QAR, ROOT, TINY, one_device  # noqa: F401

from qaperso import evaluate
from qaperso.errors import STOPPED

pytestmark = pytest.mark.usefixtures("one_device")
FSDP = ("mesh.data=1", "mesh.fsdp=-1")
TRAINING = (*QAR, "lora.dropout=0.0")
WANTED = ("--replies", "96", "--paired", "2")
# What float32 sums in another order may change.
CLOSE = 1e-5
# Seconds after which a command is taken to hang; on an idle machine it ends in thirty.
HANGS = 400.0


def start(processes: int, devices: int, *words: str) -> subprocess.Popen:
    """A command under `python -m qaperso.launch`, not started again when it fails."""
    own = {"JAX_NUM_CPU_DEVICES": str(devices), "JAX_PLATFORMS": "cpu", "XLA_FLAGS": "", "OMP_NUM_THREADS": "1"}
    own |= {"JAX_COMPILATION_CACHE_DIR": CACHE, "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    launch = [sys.executable, "-m", "qaperso.launch", "--processes", str(processes), "--restarts", "0", "--grace", "20"]
    own |= {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    return subprocess.Popen([*launch, "--", *words], cwd=ROOT, env=os.environ | own, **pipes)


def end(process: subprocess.Popen, code: int = 0) -> str:
    """What it wrote to stdout; a hang is an error, and what hangs is ended with its launcher."""
    watch = threading.Timer(HANGS, process.terminate)
    watch.start()
    out, err = process.communicate()
    watch.cancel()
    assert process.returncode == code, err[-3000:]
    return out


def trained(folder: Path, processes: int, devices: int, mesh: Sequence[str] = ()) -> dict[int, list[float]]:
    """Losses and gradient norms of a run, by step."""
    end(start(processes, devices, "train", *tiny.arguments(TINY, folder, *TRAINING, *mesh)))
    return losses(folder)


def losses(folder: Path) -> dict[int, list[float]]:
    lines = map(json.loads, (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    return {v["step"]: [v["lm"], v["contrast"], v["grad_norm"]] for v in lines if "loss" in v}


def compare(ours: dict[int, list[float]], theirs: dict[int, list[float]]) -> None:
    assert ours.keys() == theirs.keys() and len(ours) == 8
    np.testing.assert_allclose([*ours.values()], [*theirs.values()], rtol=CLOSE, atol=CLOSE)


def alone(folder: Path, *overrides: str) -> dict[int, list[float]]:
    """`trained` on one device of this process."""
    tiny.trained(TINY, folder, *TRAINING, *overrides)
    return losses(folder)


def test_two_processes_are_one_device(tmp_path: Path) -> None:
    whole, folder = tmp_path / "whole" / "run", tmp_path / "run"
    compare(trained(folder, 2, 2, FSDP), alone(whole))
    code, _, err = tiny.call(evaluate.main, "--workdir", whole, *WANTED)
    assert code == 0, err

    # Stopped while it writes replies, an evaluation goes on where it was; only the first process writes.
    words = "evaluate", "--workdir", str(folder), *WANTED
    first, replies = start(2, 2, *words), folder / "predictions.jsonl"
    while first.poll() is None and not (replies.exists() and replies.stat().st_size):
        time.sleep(0.02)
    first.send_signal(signal.SIGTERM)
    end(first, STOPPED)
    begun = replies.read_bytes()
    assert begun and not (folder / "eval.json").exists()
    table = end(start(2, 2, *words))
    assert table.count("reply_nll") == 1
    left = sorted(p.name for p in folder.iterdir() if p.name not in {q.name for q in whole.iterdir()})
    assert left == []

    # Of another mesh's weights, so not to the last bit; greedy replies are the same words.
    assert set(begun.split(b"\n")[:-1]) <= set(replies.read_bytes().split(b"\n"))
    written = [[json.loads(line) for line in (f / "predictions.jsonl").open()] for f in (folder, whole)]
    assert np.mean([a["reply"] == b["reply"] for a, b in zip(*written, strict=True)]) > 0.97
    ours, theirs = (json.loads((f / "eval.json").read_text())["metrics"] for f in (folder, whole))
    assert ours.keys() == theirs.keys() and {"paired_gap", "swap_gap"} <= ours.keys()
    for name in ("reply_nll", "swap_gap"):
        np.testing.assert_allclose(ours[name]["value"], theirs[name]["value"], rtol=1e-4, atol=CLOSE, err_msg=name)


MESHES = {
    "data": (),
    "fsdp": FSDP,
    "tensor": ("mesh.data=-1", "mesh.tensor=2"),
    "mixed": ("mesh.data=2", "mesh.fsdp=-1", "mesh.tensor=2"),
}


@pytest.mark.slow
@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("processes, devices", [(1, 8), (2, 4), (4, 2)])
def test_eight_devices_are_one(tmp_path: Path, processes: int, devices: int, mesh: str) -> None:
    ours = trained(tmp_path / "run", processes, devices, (*MESHES[mesh], "batch.rows=8"))
    compare(ours, alone(tmp_path / "alone", "batch.rows=8"))
