"""python benchmarks/contrast.py [--json FILE] [--quick]

What the contrastive loss costs for N dialogues, 1,024 to 32,768: the bytes that XLA plans for its value and gradient
(arguments, results and temporaries), and up to 8,192 the seconds. Dimension 64; classes of 4 dialogues in clusters of 8
queriers. `in_batch` compares N with N; `prototypes` compares N with the means of the N / 4 classes. Sizes take turns.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import common
import jax
import numpy as np

from qaperso import losses
from qaperso.data.contrast import class_keys, dialogue_keys
from qaperso.mesh import start_runtime

SIZES = tuple(2**k for k in range(10, 16))
TIMED = 8192
DIM, EACH, QUERIERS = 64, 4, 8
TEMPERATURE = 0.1
KINDS = ("in_batch", "prototypes")


def compiled(kind: str, count: int) -> tuple[Callable[[], Any], float]:
    """Value and gradient of the loss of `count` dialogues: the program, to be called, and the bytes planned for it."""
    keys = jax.random.split(jax.random.key(0), 3)
    views = tuple(jax.random.normal(k, (count, DIM)) for k in keys[:2])
    means = jax.random.normal(keys[2], (2, count // EACH, DIM))
    number = np.arange(count, dtype=np.int32)
    querier = number[: count // EACH]
    classes = {"querier": querier, "responder": np.zeros_like(querier), "cluster": querier // QUERIERS}
    rows, columns = dialogue_keys(number // EACH, number, classes), class_keys(classes)

    def loss(views: tuple[jax.Array, jax.Array], means: jax.Array, rows: dict, columns: dict) -> jax.Array:
        if kind == "in_batch":
            return losses.in_batch(views, rows, TEMPERATURE)
        return losses.prototype(views, means, rows, columns, TEMPERATURE)

    arguments = views, means, rows, columns
    made = jax.jit(jax.value_and_grad(loss)).lower(*arguments).compile()
    plan = made.memory_analysis()
    used = plan.argument_size_in_bytes + plan.output_size_in_bytes + plan.temp_size_in_bytes
    return lambda: jax.block_until_ready(made(*arguments)), float(used)


def seconds_of(function: Callable[[], Any]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def measure(options: argparse.Namespace) -> tuple[list[common.Ratio], dict[str, Any]]:
    """How bytes grow; figures by loss and N."""
    sizes = (1024, 2048) if options.quick else SIZES
    works: dict[tuple[str, int], Callable[[], Any]] = {}
    figures: dict[str, Any] = {kind: {} for kind in KINDS}
    ratios = []
    for kind in KINDS:
        used = {}
        for count in sizes:
            run, used[count] = compiled(kind, count)
            figures[kind][f"MB, N={count}"] = used[count] / 1e6
            if count <= TIMED:
                run()
                works[kind, count] = run
        low, high = sizes[0], sizes[-1]
        name = f"{kind}: bytes, {high} / {low} dialogues"
        ratios.append(common.single(name, used[high] / used[low], high / low, "<="))
    found: dict[tuple[str, int], list[float]] = {key: [] for key in works}
    for _ in range(options.rounds):
        for key, work in works.items():
            found[key].append(seconds_of(work))
    for (kind, count), values in found.items():
        figures[kind][f"ms, N={count}"] = 1e3 * statistics.median(values)
    figures["peak rss GB"] = common.peak_rss() / 1e9
    return ratios, figures


def main() -> None:
    options = common.parser(__doc__, rounds=7).parse_args()
    common.begin(options)
    start_runtime()
    common.report(options, "contrast", *measure(options))


if __name__ == "__main__":
    main()
