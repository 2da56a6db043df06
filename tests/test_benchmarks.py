"""Every benchmark runs on tiny shapes and writes what `benchmarks/bench.py` joins; what they count is right."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qaperso import config as configs
from qaperso.types import Dialogue, Turn

ROOT = Path(__file__).resolve().parent.parent
BENCHMARKS = ROOT / "benchmarks"
NAMES = ("train", "layout", "scaling", "pipeline", "contrast", "checkpoint", "generation", "history")
# Their programs take longest to compile.
SLOW = ("train", "layout", "scaling", "generation")


@pytest.fixture(scope="module")
def beside() -> Iterator[None]:
    """The scripts import each other as neighbours; some are named like modules of tests."""
    sys.path.insert(0, str(BENCHMARKS))
    yield
    sys.path.remove(str(BENCHMARKS))


def numbers(value: Any) -> Iterator[float]:
    """All numbers in nested figures."""
    if isinstance(value, dict):
        for one in value.values():
            yield from numbers(one)
    elif isinstance(value, int | float):
        yield value


def ran(folder: Path, *only: str) -> tuple[dict[str, Any], str]:
    """What a quick `bench.py` writes and prints."""
    settings = {"XLA_FLAGS": "", "JAX_PLATFORMS": "cpu", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    settings |= {"XDG_CACHE_HOME": str(folder), "PYTHONPATH": str(ROOT)}
    words = [sys.executable, str(BENCHMARKS / "bench.py"), "--quick", "--json", str(folder / "results.json")]
    done = subprocess.run(
        [*words, "--only", *only], env=os.environ | settings, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads((folder / "results.json").read_text(encoding="utf-8")), done.stdout


def check(name: str, one: dict[str, Any], shown: str) -> None:
    """A benchmark's part of the results."""
    assert set(one) == {"ratios", "figures", "seconds"}
    assert np.isfinite(list(numbers(one["figures"]))).all() and list(numbers(one["figures"]))
    for ratio in one["ratios"]:
        assert set(ratio) == {"name", "value", "spread", "target", "sense"}
        low, high = ratio["spread"]
        assert ratio["sense"] in (">=", "<=") and 0 <= low <= high and f"{name}: {ratio['name']}" in shown


def test_every_benchmark_runs(tmp_path):
    only = [name for name in NAMES if name not in SLOW]
    found, shown = ran(tmp_path, *only)
    assert found["quick"] and {"cpu", "cores", "jax", "date", "commit"} <= set(found["machine"])
    assert list(found["benchmarks"]) == only
    for name, one in found["benchmarks"].items():
        check(name, one, shown)


@pytest.mark.slow
@pytest.mark.parametrize("name", SLOW)
def test_a_slow_benchmark_runs(tmp_path, name):
    found, shown = ran(tmp_path, name)
    check(name, found["benchmarks"][name], shown)
    if name == "train":
        ratios = {ratio["name"] for ratio in found["benchmarks"][name]["ratios"]}
        assert {"sft float32 mfu", "qar / sft, step time, float32"} <= ratios


def test_a_ratio_by_hand(beside):
    import common

    ratio = common.compare("a / b", [2.0, 3.0, 10.0], [1.0, 2.0, 4.0], 1.5, ">=")
    assert (ratio.value, ratio.spread, ratio.holds) == (1.5, (1.5, 2.5), True)
    assert not common.compare("a / b", [2.0], [1.0], 1.5, "<=").holds
    assert common.single("bytes", 3.0, 3.0, "<=").holds


def test_fastest_keeps_one_program_running(beside):
    import common

    class Fake:
        def __init__(self, seconds: float):
            self.seconds, self.open = seconds, True

        def close(self) -> None:
            self.open = False

    made = {name: Fake(s) for name, s in (("a", 3.0), ("b", 1.0), ("c", 2.0))}
    name, kept, trials = common.fastest({k: (lambda v=v: v) for k, v in made.items()}, lambda w: w.seconds)
    assert (name, kept, trials) == ("b", made["b"], {"a": 3.0, "b": 1.0, "c": 2.0})
    assert [w.open for w in made.values()] == [False, True, False]
    assert common.fastest({"a": lambda: made["a"]}, lambda w: w.seconds) == ("a", made["a"], {})


def town(beside: None) -> tuple[Any, list, list]:
    """Forty dialogues of the town, packed and in windows."""
    import packing

    config = configs.load(ROOT / "configs" / "quickstart.py")
    config.base, config.qar.contrast, config.batch.rows = "random", "prototypes", 2
    corpus = packing.Corpus(config, 40)
    return corpus, corpus.packed()[0], corpus.windows(192)


def test_windows_end_in_each_reply_once(beside):
    import packing

    turns = tuple(Turn("ab"[i % 2], str(i)) for i in range(12))
    parts = packing.windows(Dialogue("x", "b", "a", turns, "g", replies=(1, 9, 11)))
    assert [[t.text for t in w.turns] for w in parts] == [["0", "1"], [*"456789"], [*"6789", "10", "11"]]
    assert all(w.replies == () for w in parts)


def test_layouts_count_positions_and_learned_tokens(beside):
    import layout
    import peer

    from qaperso.data.plan import Shape

    corpus, examples, windows = town(beside)
    assert layout.evenly(10, 2) == [2, 7] and layout.evenly(3, 3) == [0, 1, 2]
    # Two rows a batch and as many batches drawn as there are: every window once.
    shape = Shape(2, 192, 192, 1)
    epoch = layout.published_epoch(windows, shape, corpus.config, len(windows) // 2)
    learned = sum(float(b.weight.sum()) for b in epoch.batches)
    assert learned == sum(int(w.predicted.sum()) for w in windows)
    assert epoch.useful == learned / sum(epoch.positions) and epoch.positions[0] == 2 * 192
    for batch in epoch.batches:
        assert batch.target_index.shape == (1, 2, 192) and (batch.target_index == np.arange(192)).all()
        chosen = batch.weight[:, :, :-1] > 0
        assert (batch.target[:, :, :-1][chosen] == batch.inputs.tokens[:, :, 1:][chosen]).all()
    packed = layout.packed_epoch(corpus, examples, "qar", 1)
    assert packed.positions == [2 * 96] and 0 < packed.useful < 1
    for by_length in (False, True):
        found = layout.padded_epoch(windows, 4, by_length, len(windows) // 4)
        labels = sum(int((b["labels"] != peer.IGNORED).sum()) for b in found.batches)
        assert labels == learned and found.useful == labels / sum(found.positions)
        assert found.positions == [b["labels"].size for b in found.batches] == sorted(found.positions)
    assert found.useful > layout.padded_epoch(windows, 4, False, 1).useful
    assert found.rate(0, 2.0) == found.positions[0] / 2 * found.useful


def test_layout_ratios_by_hand(beside, monkeypatch):
    import layout
    import ours
    import peer

    class Clock:
        """A program whose every step takes as long."""

        rss = 0

        def __init__(self, seconds: float):
            self.step = seconds

        def seconds(self, asked: list[int]) -> list[float]:
            return [self.step] * len(asked)

        def close(self) -> None:
            pass

    def ours_worker(setting: Any, batches: list, devices: int) -> Clock:
        shape = (setting.config.batch.rows, setting.config.batch.length)
        assert all(b.inputs.tokens.shape == (1, *shape) for b in batches)
        return Clock({"qar": 2.0, "sft": 1.0}[setting.config.method] / devices)

    monkeypatch.setattr(ours, "worker", ours_worker)
    monkeypatch.setattr(peer, "worker", lambda *_, attention, **__: Clock({"eager": 4.0, "sdpa": 3.0}[attention]))
    monkeypatch.setattr(layout.common, "missing", lambda *_: "")
    options = argparse.Namespace(quick=True, rounds=3, devices=[1, 2], attention=["sdpa"], dtype=None, threads=1)
    ratios, figures = layout.measure(options, None)
    named = {name: found for name, found in figures.items() if isinstance(found, dict) and "useful tokens/s" in found}
    rates = {name: found["useful tokens/s"] for name, found in named.items()}
    assert figures["packed"]["chosen"] == "4 x 96, 2 devices" and set(rates) == {
        "qar packed",
        "sft packed",
        "qar published layout",
        "peer",
    }
    useful = {name: figures[name]["useful tokens a position"] for name in rates}
    # Four rows of 96, twice that length as published; two devices take half the time.
    assert rates["qar packed"] == 4 * 96 * useful["qar packed"] and rates["sft packed"] == 2 * rates["qar packed"]
    assert rates["qar published layout"] == 4 * 192 * useful["qar published layout"]
    by_name = {r.name.removeprefix("town, float32: "): r.value for r in ratios}
    assert by_name == {
        "qar packed / published layout": rates["qar packed"] / rates["qar published layout"],
        "sft packed / transformers+peft windows": rates["sft packed"] / rates["peer"],
        "qar packed / transformers+peft windows": rates["qar packed"] / rates["peer"],
    }


def test_the_peer_reads_what_we_read(beside):
    import peer

    batch = peer.padded([np.array([5, 6, 7]), np.array([8])], [np.array([0, 1, 1], bool), np.array([0], bool)])
    assert batch["input_ids"].tolist() == [[5, 6, 7], [8, 0, 0]]
    assert batch["labels"].tolist() == [[-100, 6, 7], [-100, -100, -100]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert set(peer.padded([np.array([1])], [np.array([True])])) == {"input_ids", "labels"}


def test_kernels_are_held_against_every_score_at_once(beside):
    import kernels

    spec = {"program": "blocks", "quick": True, "rounds": 1}
    (row,) = kernels.measure_attention(spec)
    assert row["shape"] == "2 x 128, 2/1 x 32" and "failed" not in row
    assert all(0 < row[name] < 0.01 for name in ("error", "of dq", "of dk", "of dv"))
    # No kernel of cuDNN's without a GPU: one line, and the others go on.
    (row,) = kernels.measure_attention(spec | {"program": "cudnn"})
    assert row["failed"] and "\n" not in row["failed"] and "ms" not in row


def test_programs_on_a_gpu_are_rows_or_say_why_not(beside):
    import gpu

    spec = {"part": "matmul", "program": "jax", "quick": True}
    assert gpu.run(spec, 1.0) == [{"failed": "left out, there was no time"}]
    (row,) = gpu.run({"part": "train", "quick": False, "model": "none", "program": "sft"}, 100.0)
    assert row["failed"].startswith("1: KeyError: 'none'")
    rates = [("a", "sft", 6.0), ("a", "peer", 2.0), ("a", "peer", 3.0), ("b", "sft", 1.0)]
    rows = [{"part": "train", "shape": s, "program": p, "tokens/s": r} for s, p, r in rates]
    assert [(r.name, r.value) for r in gpu.ratios_of(rows)] == [("sft / peer, a", 2.0)]


@pytest.mark.slow
def test_everything_of_the_gpu_benchmark_runs(tmp_path, beside):
    import kernels

    settings = {"JAX_PLATFORMS": "cpu", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1", "PYTHONPATH": str(ROOT)}
    words = [sys.executable, str(BENCHMARKS / "gpu.py"), "--quick", "--json", str(tmp_path / "gpu.json")]
    done = subprocess.run(words, env=os.environ | settings, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "gpu.json").read_text(encoding="utf-8"))
    failed = {row["program"] for row in found["figures"] if "failed" in row}
    assert failed == set(kernels.KERNELS) - {"blocks"}
    assert {(r["part"], r["program"]) for r in found["figures"] if "failed" not in r} == {
        ("matmul", "jax"),
        ("attention", "blocks"),
        *(("train", name) for name in ("sft", "peer", "qar", "sft blocks")),
        *(("generate", name) for name in ("merged", "sft", "qar", "transformers")),
    }
    assert "qar / transformers, batch 2" in done.stdout
