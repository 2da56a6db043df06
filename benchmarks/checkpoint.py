"""python benchmarks/checkpoint.py [--json FILE] [--quick] [--folder DIR]

Speed of checkpoints through qaperso.checkpoint.Writer: GB/s of a save until it is complete and of a restore, and how long
the training loop stands still for a save that goes on beside it.

The state is that of a decoder whose parameters are all trained (31 million, with two moments each 0.37 GB), its step one
of 4 x 128 tokens. The stall: the seconds for which `save` holds the loop, and how much longer eight steps take from the
start of a save than eight steps without one; the two kinds of loop take turns. Files go to --folder, by default to the
system's temporary one, and are read back from wherever the system has them, memory most likely.
"""

from __future__ import annotations

import argparse
import dataclasses
import shutil
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import common
import jax
import ours
from train import KEPT, config_of

from qaperso.checkpoint import Writer
from qaperso.data.plan import Shape
from qaperso.mesh import start_runtime

STEPS = 8
MODEL = dataclasses.replace(ours.SMOLLM2, vocab=8192, embed=512, layers=8, heads=8, kv_heads=4, mlp=1536)


def loop(program: ours.Program, batch: Any, steps: int) -> float:
    """Seconds of some steps."""
    start = time.perf_counter()
    for _ in range(steps):
        program.advance(batch)
    jax.block_until_ready(program.state)
    return time.perf_counter() - start


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """All figures."""
    steps = 2 if options.quick else STEPS
    model = ours.TINY if options.quick else MODEL
    shape = Shape(1, 16, 16, 1) if options.quick else Shape(4, 128, 128, 1)
    config = config_of("sft", "float32", KEPT, shape)
    config.trainable = "all"
    batch = ours.full_batch(shape, model.vocab, "none")
    program = ours.Program(ours.setting_of(config, model), batch)
    loop(program, batch, steps)
    size = sum(x.nbytes for x in jax.tree.leaves(program.state))
    found: dict[str, list[float]] = {name: [] for name in ("save", "restore", "held", "alone", "beside a save")}
    for number in range(options.rounds):
        folder = Path(tempfile.mkdtemp(dir=options.folder))
        try:
            writer = Writer(folder / "a", 1, 0)
            start = time.perf_counter()
            writer.save(1, program.state, None)
            writer.close()
            found["save"].append(time.perf_counter() - start)
            writer = Writer(folder / "a", 1, 0)
            start = time.perf_counter()
            jax.block_until_ready(writer.restore(program.state)[0])
            found["restore"].append(time.perf_counter() - start)
            writer.close()
            found["alone"].append(loop(program, batch, steps))
            writer = Writer(folder / "b", 1, 0)
            start = time.perf_counter()
            writer.save(number, program.state, None)
            held = time.perf_counter() - start
            found["held"].append(held)
            found["beside a save"].append(held + loop(program, batch, steps))
            writer.close()
        finally:
            shutil.rmtree(folder)
    middle = {name: statistics.median(values) for name, values in found.items()}
    stalls = [a - b for a, b in zip(found["beside a save"], found["alone"], strict=True)]
    return {
        "state GB": size / 1e9,
        "save GB/s": size / middle["save"] / 1e9,
        "restore GB/s": size / middle["restore"] / 1e9,
        "save holds the loop, ms": 1e3 * middle["held"],
        "stall of the loop in all, ms": 1e3 * statistics.median(stalls),
        "stall from, ms": 1e3 * min(stalls),
        "stall to, ms": 1e3 * max(stalls),
        "step without a save, ms": 1e3 * middle["alone"] / steps,
        "peak rss GB": common.peak_rss() / 1e9,
    }


def main() -> None:
    parser = common.parser(__doc__, rounds=5)
    parser.add_argument("--folder", type=Path, help="on the disk to be measured")
    options = parser.parse_args()
    common.begin(options)
    start_runtime()
    common.report(options, "checkpoint", [], measure(options))


if __name__ == "__main__":
    main()
