"""Tiny whole runs, in this process or in one that is killed."""

from __future__ import annotations

import atexit
import contextlib
import functools
import io
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import helpers  # noqa: F401  (its import switches costly compiler passes off)
import jax
import ml_collections
import pytest
from jax.sharding import AxisType

from qaperso import run, train
from qaperso.data import load
from qaperso.mesh import AXES

ROOT = Path(__file__).resolve().parent.parent
# Not the user's own cache; shared by all runs of a session, since compiling is what tiny runs spend their time on.
FOLDER = Path(tempfile.mkdtemp(prefix="qaperso-test-"))
CACHE = str(FOLDER / "xla")
atexit.register(shutil.rmtree, FOLDER, ignore_errors=True)
jax.config.update("jax_compilation_cache_dir", CACHE)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)

CONFIG = """
from qaperso.config import default


def get_config():
    c = default()
    c.model.embed, c.model.layers, c.model.heads, c.model.kv_heads, c.model.mlp = 32, 2, 2, 1, 48
    c.data.per_pair = 3
    c.data.clusters = 2
    c.batch.rows, c.batch.length, c.batch.targets, c.batch.dialogues = 4, 96, 64, 2
    c.lora.rank, c.lora.dropout = 2, 0.1
    c.qar.rank, c.qar.head_dim, c.qar.drop_row = 4, 8, 0.5
    c.optimizer.warmup = 2
    c.steps, c.log_every, c.checkpoint_every, c.dev_dialogues = 8, 1, 3, 4
    c.generate.max_new_tokens = 4
    c.peak_flops = 1e11
    return c
"""
TINY = FOLDER / "tiny.py"
TINY.write_text(CONFIG, encoding="utf-8")
QAR = ("method=qar",)
PROTOTYPES = ("method=qar", "qar.contrast=prototypes")
SFT = ("method=sft", "optimizer.lr=0.05")
SFT_ALL = ("method=sft", "trainable=all")
RUNS = {"qar": QAR, "prototypes": PROTOTYPES, "adapter": SFT, "all": SFT_ALL}
SPEED = ("tokens_per_second", "mfu", "eta")


def one_mesh() -> jax.sharding.Mesh:
    """A mesh of the first of the fake devices: compiling for all of them takes longer."""
    return jax.make_mesh((1, 1, 1), AXES, axis_types=(AxisType.Auto,) * 3, devices=jax.devices()[:1])


@functools.cache
def _store(data: str) -> Any:
    return _load_store(ml_collections.ConfigDict(json.loads(data)))


_load_store = load.load_store


@contextlib.contextmanager
def patched() -> Iterator[None]:
    """Runs use one device, and read equal data once."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("make_mesh", "mesh_over"):
            patch.setattr(run, name, lambda *_: one_mesh())
        patch.setattr(load, "load_store", lambda data: _store(data.to_json_best_effort()))
        yield


@pytest.fixture(scope="module")
def one_device() -> Iterator[None]:
    """`patched` for a module."""
    with patched():
        yield


def arguments(config: Path, workdir: Path, *overrides: str) -> list[str]:
    """Of `python -m qaperso.train`."""
    return ["--config", str(config), "--workdir", str(workdir), *(f"--config.{o}" for o in overrides)]


def call(main: Callable, *words: Any) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of a command's `main`."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main([str(w) for w in words])
    return code, out.getvalue(), err.getvalue()


def trained(config: Path, workdir: Path, *overrides: str) -> str:
    """Trains in this process; what stdout got."""
    code, out, err = call(train.main, *arguments(config, workdir, *overrides))
    assert code == 0, err
    return out


@functools.cache
def finished(name: str) -> tuple[Path, str]:
    """The folder of a finished run of `RUNS`, trained once a session, and what stdout got. Copy it to change it."""
    with patched():
        return FOLDER / name, trained(TINY, FOLDER / name, *RUNS[name])


def spawn(config: Path, workdir: Path, *overrides: str) -> subprocess.CompletedProcess:
    """Runs `python -m qaperso.train` as a process of its own, which sees one device."""
    settings = {"XLA_FLAGS": "", "JAX_PLATFORMS": "cpu", "JAX_COMPILATION_CACHE_DIR": CACHE}
    settings |= {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    words = [sys.executable, "-m", "qaperso.train", *arguments(config, workdir, *overrides)]
    return subprocess.run(words, cwd=ROOT, env=os.environ | settings, capture_output=True, text=True, timeout=300)


def record(workdir: Path) -> list[dict[str, float]]:
    """The lines of metrics.jsonl without what the clock decides."""
    lines = (workdir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in SPEED} for line in lines]


def contents(folder: Path) -> dict[str, bytes | None]:
    """Every file below a folder with its bytes, every folder with None."""
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in sorted(folder.rglob("*"))}
