"""python benchmarks/scaling.py [--json FILE] [--quick]

Whether a step costs in proportion to layers and to tokens, and compiling nothing for layers: one scanned layer is compiled
whatever the number of layers.

A narrow decoder (width 256, vocabulary 2048), QAR as in configs/qar_smollm2.py with LoRA of rank 16, logits at every
position. Layers: 4, 8, 16, 32 at 4 rows of 256 tokens. Tokens: 1, 2, 4, 8 rows of 256 at 8 layers, and, as figures only
since attention is quadratic within a row, rows of 256 to 2048. Every size is a process of its own; they take turns, in
steps and in compiling anew (tracing included, caches cleared).
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
from typing import Any

import common
import ours
from common import Ratio, Worker, compare
from train import KEPT, config_of

from qaperso.data.plan import Shape

LAYERS = (4, 8, 16, 32)
ROWS = (1, 2, 4, 8)
LENGTHS = (256, 512, 1024, 2048)
COMPILATIONS = 5
# Parts of a step that do not grow, and the noise of a shared machine, may add so much.
SLACK = 1.15
NARROW = dataclasses.replace(ours.SMOLLM2, vocab=2048, embed=256, heads=4, kv_heads=2, head_dim=64, mlp=768)


def start(layers: int, rows: int, length: int, quick: bool) -> Worker:
    """A program of this size."""
    model = dataclasses.replace(ours.TINY if quick else NARROW, layers=layers)
    shape = Shape(rows, length, length, 1)
    config = config_of("sft" if quick else "qar", "float32", KEPT, shape)
    batch = ours.full_batch(shape, model.vocab, config.qar.contrast)
    return ours.worker(ours.setting_of(config, model), [batch], 1)


def measure(options: argparse.Namespace) -> tuple[list[Ratio], dict[str, Any]]:
    """All ratios and figures."""
    sizes = {f"{n} layers": (n, 4, 256) for n in LAYERS}
    sizes |= {f"{r * 256} tokens": (8, r, 256) for r in ROWS} | {f"a row of {s}": (8, 1, s) for s in LENGTHS}
    first, last = LAYERS[0], LAYERS[-1]
    few, many = f"{256 * ROWS[0]} tokens", f"{256 * ROWS[-1]} tokens"
    if options.quick:
        sizes = {f"{n} layers": (n, 2, 16) for n in (first, last)}
    workers: dict[tuple[int, int, int], Worker] = {}
    for size in sizes.values():
        if size not in workers:
            workers[size] = start(*size, options.quick)
    steps: dict[tuple[int, int, int], list[float]] = {size: [] for size in workers}
    compiles: dict[tuple[int, int, int], list[float]] = {size: [] for size in workers}
    for _ in range(options.rounds):
        for size, worker in workers.items():
            steps[size] += worker.seconds([0])
    deep = [sizes[f"{n} layers"] for n in LAYERS if f"{n} layers" in sizes]
    for size in deep if options.quick else []:
        compiles[size].append(workers[size].facts["trace_seconds"] + workers[size].facts["compile_seconds"])
    for _ in range(0 if options.quick else COMPILATIONS):
        for size in deep:
            compiles[size].append(sum(workers[size].ask("compile").values()))
    figures: dict[str, Any] = {}
    for name, size in sizes.items():
        figures[name] = {"step seconds": statistics.median(steps[size])}
        figures[name] |= {f"{k} MB": workers[size].facts[k] / 1e6 for k in ("arguments", "temporaries")}
        if size in deep:
            figures[name]["compile seconds"] = statistics.median(compiles[size])
    for worker in workers.values():
        worker.close()
    small, large = deep[0], deep[-1]
    times = last / first
    ratios = [
        compare(f"compile time, {last} / {first} layers", compiles[large], compiles[small], 1.3, "<="),
        compare(f"step time, {last} / {first} layers", steps[large], steps[small], times * SLACK, "<="),
    ]
    if many in sizes:
        pair = steps[sizes[many]], steps[sizes[few]]
        ratios.append(compare(f"step time, {many} / {few}", *pair, ROWS[-1] / ROWS[0] * SLACK, "<="))
    return ratios, figures


def main() -> None:
    options = common.parser(__doc__, rounds=7).parse_args()
    common.begin(options)
    common.report(options, "scaling", *measure(options))


if __name__ == "__main__":
    main()
