"""python benchmarks/contrast.py [--json FILE] [--quick]

What the contrastive loss costs for N dialogues: seconds of value and gradient, the temporaries that XLA plans for it, and
the seconds in which the host makes the masks of a batch. Dimension 64; classes of 4 dialogues in clusters of 8 queriers.
`in_batch` compares N with N; `prototypes` compares N with the means of the N / 4 classes. Sizes take turns.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import common
import jax
import jax.numpy as jnp
import numpy as np

from qaperso import losses
from qaperso.data.contrast import contrast_masks
from qaperso.mesh import start_runtime

SIZES = (256, 512, 1024, 2048, 4096)
DIM, EACH, QUERIERS = 64, 4, 8
TEMPERATURE = 0.1


def keys_of(count: int) -> dict[str, np.ndarray]:
    """Ids of `count` dialogues for `contrast_masks`."""
    each = np.arange(count)
    querier = each // EACH
    ids = {"querier": querier, "responder": np.zeros_like(each), "cluster": querier // QUERIERS}
    return ids | {"text": each, "index": each}


def class_keys(count: int) -> dict[str, np.ndarray]:
    """Ids of the classes of `keys_of(count)`."""
    querier = np.arange(count // EACH)
    ids = {"querier": querier, "responder": np.zeros_like(querier), "cluster": querier // QUERIERS}
    return ids | {"text": np.full_like(querier, -1), "index": np.full_like(querier, -1)}


def programs(count: int) -> dict[str, tuple[Callable[[], Any], int]]:
    """{loss: (compiled value and gradient, its temporaries in bytes)}."""
    keys = jax.random.split(jax.random.key(0), 3)
    views = [jax.random.normal(k, (count, DIM)) for k in keys[:2]]
    means = jax.random.normal(keys[2], (2, count // EACH, DIM))
    rows = keys_of(count)
    pairs = [jnp.asarray(mask) for mask in contrast_masks(rows, rows)]
    classes = [jnp.asarray(mask) for mask in contrast_masks(rows, class_keys(count))]

    def in_batch(a: jax.Array, b: jax.Array, *masks: jax.Array) -> jax.Array:
        return losses.in_batch(a, b, *masks, TEMPERATURE)

    def prototypes(a: jax.Array, b: jax.Array, *masks: jax.Array) -> jax.Array:
        return losses.prototype((a, b), means, *masks, TEMPERATURE)

    made = {}
    for loss, masks in ((in_batch, pairs), (prototypes, classes)):
        arguments = (*views, *masks)
        compiled = jax.jit(jax.value_and_grad(loss, argnums=(0, 1))).lower(*arguments).compile()
        run = lambda c=compiled, x=arguments: jax.block_until_ready(c(*x))  # noqa: E731
        made[loss.__name__] = (run, compiled.memory_analysis().temp_size_in_bytes)
    return made


def seconds_of(function: Callable[[], Any]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Figures by loss and N."""
    sizes = (16, 32) if options.quick else SIZES
    works: dict[tuple[str, int], Callable[[], Any]] = {}
    figures: dict[str, Any] = {}
    for count in sizes:
        for name, (run, temporaries) in programs(count).items():
            run()
            works[name, count] = run
            figures.setdefault(name, {})[f"temporaries MB, N={count}"] = temporaries / 1e6
        works["masks on the host", count] = lambda rows=keys_of(count): contrast_masks(rows, rows)
    found: dict[tuple[str, int], list[float]] = {key: [] for key in works}
    for _ in range(options.rounds):
        for key, work in works.items():
            found[key].append(seconds_of(work))
    for (name, count), values in found.items():
        figures.setdefault(name, {})[f"ms, N={count}"] = 1e3 * statistics.median(values)
    figures["peak rss GB"] = common.peak_rss() / 1e9
    return figures


def main() -> None:
    options = common.parser(__doc__, rounds=7).parse_args()
    common.begin(options)
    start_runtime()
    common.report(options, "contrast", [], measure(options))


if __name__ == "__main__":
    main()
