"""python benchmarks/pipeline.py [--data DIR ...] [--json FILE] [--quick]

The way from dialogues to batches on the host: dialogues per second that become tokens, seconds of planning an epoch,
tokens per second that become batches, how full the batches are, and whether a step ever waits for its batch.

The embedded town (configs/quickstart.py on a random base) and each of --data (configs/qar_smollm2.py; at most 400 dialogues).
Waiting is measured in a loop like that of qaperso.train: a Grain thread makes batches ahead, the step is QAR's with random
weights in the shapes of the quickstart's base or of SmolLM2-135M. "waited" is the time in which the loop had no batch, of all
its time; on a CPU the thread and the step share the cores, so this is the worst case.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import time
from pathlib import Path
from typing import Any

import common
import jax
import ours
import packing
from common import Ratio
from layout import LIMIT, data_config

from qaperso import config as configs
from qaperso.data import batches
from qaperso.mesh import start_runtime
from qaperso.methods import Setting

# Steps of the loop; of SmolLM2 each takes seconds.
STEPS = {"town": 40}
MOST_STEPS = 4
WAIT = 0.02


def town_config() -> Any:
    """The quickstart's, without the run that it starts from."""
    config = configs.load(common.ROOT / "configs" / "quickstart.py")
    config.base = "random"
    return config


def town_model(vocab: int) -> Any:
    """Shapes of the quickstart's base."""
    m = configs.load(common.ROOT / "configs" / "quickstart_base.py").model
    shape = dict(embed=m.embed, layers=m.layers, heads=m.heads, kv_heads=m.kv_heads, mlp=m.mlp)
    return dataclasses.replace(ours.SMOLLM2, vocab=vocab, head_dim=m.embed // m.heads, **shape)


def measure(options: argparse.Namespace, name: str, config: Any) -> tuple[list[Ratio], dict[str, Any]]:
    """Figures of one data set."""
    town = name == "town"
    corpus = packing.Corpus(config, 60 if options.quick else None if town else LIMIT)
    start = time.perf_counter()
    examples, left_out = corpus.packed()
    encoding = time.perf_counter() - start
    found = packing.plans(corpus, examples)
    plan = corpus.plan(examples)
    rule = (1, config.qar.drop_row, config.qar.contrast)
    making, tokens = [], []
    for number in range(min(found["contrast plan"]["micro-batches"], 100)):
        plan.rows(number)  # planned above, once an epoch: here only the arrays
        start = time.perf_counter()
        batch = batches.plan_batch(plan, examples, number, *rule)
        making.append(time.perf_counter() - start)
        tokens.append(int((batch.inputs.segment > 0).sum()))
    figures = {
        "dialogues": len(corpus.train),
        "sequences": len(examples),
        "replies left out": left_out,
        "dialogues/s tokenised": len(corpus.train) / encoding,
        "tokens/s tokenised": sum(map(len, examples)) / encoding,
        "ms to make a batch": 1e3 * statistics.median(making),
        "tokens/s made into batches": sum(tokens) / sum(making),
        "peak rss GB": common.peak_rss() / 1e9,
    } | found
    if options.quick:
        return [], figures
    model = town_model(len(corpus.tokenizer)) if town else ours.SMOLLM2
    steps = STEPS.get(name, MOST_STEPS)
    waits, total = wait(corpus, examples, model, steps)
    figures |= {"steps": steps, "ms a step": 1e3 * total / steps, "ms waited for a batch at most": 1e3 * max(waits)}
    shares = [w / (total / steps) for w in waits]
    ratio = Ratio(f"{name}: waited for batches / loop", sum(waits) / total, (min(shares), max(shares)), WAIT, "<=")
    return [ratio], figures


def wait(corpus: packing.Corpus, examples: Any, model: Any, steps: int) -> tuple[list[float], float]:
    """Seconds waited for each batch, and of the loop in all."""
    config, store = corpus.config, corpus.store
    setting = Setting(config, model, store.registry.rows, 1 + int(store.cluster.max()), store.classes)
    plan, rule = corpus.plan(examples), (1, config.qar.drop_row, config.qar.contrast)
    feed = batches.stream(lambda number: batches.plan_batch(plan, examples, number, *rule), 0, steps + 2)
    program = ours.Program(setting, next(feed))
    program.advance(next(feed))
    jax.block_until_ready(program.state)
    waits, start = [], time.perf_counter()
    pending: Any = None
    for _ in range(steps):
        asked = time.perf_counter()
        batch = next(feed)
        waits.append(time.perf_counter() - asked)
        fresh = program.advance(batch)
        # As in training, the metrics of the step before are fetched here.
        jax.device_get(pending)
        pending = fresh
    jax.block_until_ready(program.state)
    return waits, time.perf_counter() - start


def main() -> None:
    parser = common.parser(__doc__, rounds=1)
    parser.add_argument("--data", type=Path, nargs="*", default=[], metavar="DIR", help="prepared data sets")
    options = parser.parse_args()
    common.begin(options)
    start_runtime()
    ratios, figures = [], {}
    configurations = {"town": town_config()} | {d.name: data_config(d)[1] for d in options.data}
    for name, config in configurations.items():
        found, figures[name] = measure(options, name, config)
        ratios += found
    common.report(options, "pipeline", ratios, figures)


if __name__ == "__main__":
    main()
