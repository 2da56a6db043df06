"""Killed processes of a supervised run of two: the run ends as one that nothing happened to."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
from tiny import CACHE

ROOT = Path(__file__).resolve().parent.parent
SETTINGS = {
    "JAX_PLATFORMS": "cpu",
    "XLA_FLAGS": "",
    "OMP_NUM_THREADS": "1",
    "JAX_COMPILATION_CACHE_DIR": CACHE,
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
}


@pytest.fixture(scope="module")
def faults() -> ModuleType:
    """benchmarks/faults.py, which imports its neighbour."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        spec = importlib.util.spec_from_file_location("qaperso_faults", ROOT / "benchmarks" / "faults.py")
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module
        spec.loader.exec_module(module)
        return module
    finally:
        sys.path.remove(str(ROOT / "benchmarks"))


def test_one_kill_of_each_kind(faults, tmp_path):
    """Of runs that train next to nothing, by the modules that training uses; then one goes on as a single process."""
    done = subprocess.run(
        [sys.executable, str(ROOT / "tests" / "survivor.py"), str(tmp_path), "1"],
        env=os.environ | SETTINGS | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["kinds"] == dict.fromkeys(faults.KINDS, 1)
    assert found["gap"] < faults.TOLERANCE and all(seconds > 0 for seconds in found["recovery"])


@pytest.mark.slow
def test_one_kill_of_each_kind_in_training(faults, tmp_path):
    (tmp_path / "tiny.py").write_text(faults.CONFIG, encoding="utf-8")
    whole = faults.Crew(tmp_path / "tiny.py", tmp_path / "whole", 2, SETTINGS, 16, ("method=sft",))
    found = faults.campaign(whole, dict.fromkeys(faults.KINDS, 1), at_once=3, seed=3)
    assert sorted(one.kind for one in found) == sorted(faults.KINDS)
    assert faults.moved(whole, 1, 6) < faults.TOLERANCE


def test_difference_of_losses(faults):
    ours = [{"step": 0, "dev_nll": 9.0}, {"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.0}]
    theirs = [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.5}]
    assert faults.difference(ours, theirs) == 0.5
    assert faults.difference(ours, theirs[:1]) == float("inf")
