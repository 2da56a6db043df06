"""python benchmarks/layout.py --data DIR [DIR ...] [--json FILE] [--quick] [--dtype DTYPE]

Useful tokens per second: what the layout of batches is worth. Useful are the tokens that are learned, each reply's once.

Data sets are those of python -m qaperso.prepare, tokenised as SmolLM2 does; where people have ids for names (chitchat)
the names are masked. Values of weights are random. On every side LoRA of rank 16 on seven projections, no dropout, AdamW.

- packed: batches as configs/qar_smollm2.py has them, the contrast plan for QAR and for sft. Rows of the length that is fastest
  for a data set: longer ones show fewer turns twice and leave fewer replies out, shorter ones need less attention.
- published (arXiv 2412.11736): for every reply its window of up to six turns as a sequence of its own, padded to 592
  tokens, four a batch, loss and logits at every position; the same QAR step otherwise, on as many devices.
- peer: transformers + peft on the same windows, padded to the longest of their batch, the loss on the reply only. It gets
  its own best of float32 and bfloat16 (with adapters of either), of eager and sdpa attention, of batches of 4 and 8 (16 took
  20 GB), shuffled or sorted by length within pools of 50 batches; chosen by trials on a batch of middling size.

Ours has the dtype of its config. With --dtype everybody has that one. Everybody has the same cores and a process of its own;
all take turns, of two steps each, of which the second counts. The rounds' batches are spread evenly over an epoch (the
peer's by size). A program's rate is what it was timed at, positions per second, times the exact number of learned tokens
per position of the whole epoch, so that it does not depend on which batches were drawn.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import common
import jax
import numpy as np
import ours
import packing
import peer
from common import ROOT, Ratio, Worker, compare

from qaperso import config as configs
from qaperso.data.batches import make_batch, plan_batch
from qaperso.data.plan import Shape
from qaperso.methods import Setting
from qaperso.types import Batch, Example

# Dialogues of large data sets that are used: tokenising all would take longer than measuring.
LIMIT = 400
BATCH_SIZES = (4, 8)
POOL = 50
# Batches that are tried, packed; the published layout has as many rows as the first.
SHAPES = (Shape(4, 256, 224, 8), Shape(2, 512, 448, 16), Shape(2, 1024, 896, 32))
# QAR packed / published, by the format of the data set.
TARGETS = {"chitchat": 5.5}
TARGET = 7.0


@dataclasses.dataclass(frozen=True, eq=False)
class Epoch:
    """A way to lay an epoch out, and batches drawn evenly from it.

    Attributes:
      batches: as the program reads them.
      positions: grid positions of each of `batches`, padding included.
      useful: learned tokens per position of the whole epoch.
    """

    batches: list[Any]
    positions: list[int]
    useful: float

    def rate(self, number: int, seconds: float) -> float:
        """Useful tokens per second of a step on batch `number`."""
        return self.positions[number] / seconds * self.useful


def evenly(count: int, drawn: int) -> list[int]:
    """`drawn` numbers below `count`, in the middles of equal parts."""
    return [int((i + 0.5) * count / drawn) for i in range(drawn)]


@dataclasses.dataclass(frozen=True, eq=False)
class Packed:
    """How dialogues are packed: into batches of which shape, how many sequences, how many tokens they have and how many of these
    are learned, how many replies are too long; an epoch a method."""

    shape: Shape
    sequences: int
    tokens: int
    learned: int
    left_out: int
    epochs: dict[str, Epoch]


def packed_epoch(corpus: packing.Corpus, examples: Sequence[Example], method: str, drawn: int) -> Epoch:
    """Batches as training makes them."""
    config, plan = corpus.config, corpus.plan(examples)
    count = packing.micro_batches(plan)
    learned = sum(plan.targets[p.example] for n in range(count) for row in plan.rows(n) for p in row)
    rule = (1, config.qar.drop_row, config.qar.contrast) if method == "qar" else (1, None, "none")
    batches = [plan_batch(plan, examples, n, *rule) for n in evenly(count, drawn)]
    size = plan.shape.rows * plan.shape.length
    return Epoch(batches, [size] * drawn, learned / (count * size))


def published_epoch(windows: Sequence[Example], shape: Shape, config: Any, drawn: int) -> Epoch:
    """A window a row."""
    order = np.random.default_rng(0).permutation(len(windows))
    count = len(order) // shape.rows
    learned = sum(int(windows[i].predicted[1:].sum()) for i in order[: count * shape.rows])
    batches = []
    for number in evenly(count, drawn):
        rows = [[windows[i]] for i in order[number * shape.rows :][: shape.rows]]
        dropped = np.random.default_rng([0, number]).random((shape.rows, 1)) < config.qar.drop_row
        batches.append(everywhere(make_batch(rows, shape, dropped.tolist(), config.qar.contrast)))
    size = shape.rows * shape.length
    return Epoch(batches, [size] * drawn, learned / (count * size))


def everywhere(batch: Batch) -> Batch:
    """The same predictions, with logits at every position and next to no weight at the others; leaves [1, ...]."""
    tokens = batch.inputs.tokens
    # Where there is none the loss computes nothing.
    weight = np.full(tokens.shape, 1e-9, np.float32)
    for r, c in np.argwhere(batch.weight > 0):
        weight[r, batch.target_index[r, c]] = 1
    index = np.broadcast_to(np.arange(tokens.shape[1], dtype=np.int32), tokens.shape)
    found = batch.replace(target_index=index.copy(), target=np.roll(tokens, -1, 1), weight=weight)
    return jax.tree.map(lambda x: x[None], found)


def padded_epoch(windows: Sequence[Example], size: int, by_length: bool, drawn: int) -> Epoch:
    """Windows padded to the longest of their batch, shuffled, or sorted by length within pools."""
    order = np.random.default_rng(0).permutation(len(windows)).tolist()
    if by_length:
        pool = size * POOL
        pools = [order[i : i + pool] for i in range(0, len(order), pool)]
        order = [i for pool in pools for i in sorted(pool, key=lambda i: -len(windows[i]))]
    groups = [order[i : i + size] for i in range(0, len(order) - size + 1, size)] or [order]
    positions = [len(g) * max(len(windows[i]) for i in g) for g in groups]
    learned = sum(int(windows[i].predicted[1:].sum()) for g in groups for i in g)
    by_size = sorted(range(len(groups)), key=positions.__getitem__)
    chosen = [by_size[i] for i in evenly(len(groups), drawn)]
    batches = [
        peer.padded([windows[i].tokens for i in groups[n]], [windows[i].predicted for i in groups[n]]) for n in chosen
    ]
    return Epoch(batches, [positions[n] for n in chosen], learned / sum(positions))


def data_config(data: Path) -> tuple[str, Any]:
    """The format that a prepared data set was read from, and configs/qar_smollm2.py for it."""
    config = configs.load(ROOT / "configs" / "qar_smollm2.py")
    config.data.path = str(data)
    kind = json.loads((data / "stats.json").read_text(encoding="utf-8"))["format"]["name"]
    config.data.names = "masked" if kind == "chitchat" else "visible"
    return kind, config


class Bench:
    """A data set and what is run on it."""

    def __init__(self, options: argparse.Namespace, data: Path | None):
        """`data` is a prepared data set, None = the embedded town (quick)."""
        self.options = options
        if data:
            self.kind, config = data_config(data)
        else:
            self.kind, config = "town", configs.load(ROOT / "configs" / "quickstart.py")
            config.base, config.qar.contrast = "random", "prototypes"
        config.dtype = options.dtype or config.dtype
        self.config, b, rows = config, config.batch, SHAPES[0].rows
        self.shapes = (Shape(rows, b.length, b.targets, b.dialogues),) if options.quick else SHAPES
        self.corpus = self.corpus_in(self.shapes[0])
        length = 2 * b.length if options.quick else packing.PUBLISHED
        self.published = Shape(rows, length, length, 1)
        self.model = ours.TINY if options.quick else ours.SMOLLM2
        assert len(self.corpus.tokenizer) <= self.model.vocab

    def config_in(self, shape: Shape) -> Any:
        """The config with batches of a shape."""
        config = self.config.copy_and_resolve_references()
        config.batch.rows, config.batch.length = shape.rows, shape.length
        config.batch.targets, config.batch.dialogues = shape.targets, shape.dialogues
        return config

    def corpus_in(self, shape: Shape) -> packing.Corpus:
        """The dialogues, for batches of a shape."""
        return packing.Corpus(self.config_in(shape), 40 if self.options.quick else LIMIT)

    def packed(self, shape: Shape) -> Packed:
        """Batches of a shape."""
        corpus = self.corpus_in(shape)
        examples, left_out = corpus.packed()
        epochs = {method: packed_epoch(corpus, examples, method, self.options.rounds) for method in ("qar", "sft")}
        tokens, learned = sum(map(len, examples)), sum(int(e.predicted[1:].sum()) for e in examples)
        return Packed(shape, len(examples), tokens, learned, left_out, epochs)

    def ours(self, method: str, epoch: Epoch, shape: Shape, devices: int) -> Worker:
        config, store = self.config_in(shape), self.corpus.store
        config.method = method
        clusters = 1 + int(store.cluster.max())
        setting = Setting(config, self.model, store.registry.rows, clusters, store.classes)
        return ours.worker(setting, epoch.batches, devices)

    def peer(self, batches: list[Any], attention: str, dtype: str, adapters: str, warm_up: int) -> Worker:
        settings = dict(attention=attention, dtype=dtype, adapters=adapters, threads=self.options.threads)
        more = dict(lora=self.config.lora, lr=self.config.optimizer.lr, warm_up=[warm_up])
        return peer.worker(self.model, batches, **settings, **more)


def measure(options: argparse.Namespace, data: Path | None) -> tuple[list[Ratio], dict[str, Any]]:
    """Ratios and figures of one data set."""
    bench, rounds = Bench(options, data), options.rounds
    windows = bench.corpus.windows(bench.published.length)
    epochs = {"qar published layout": published_epoch(windows, bench.published, bench.config, rounds)}
    figures: dict[str, Any] = {
        "dtype": bench.config.dtype,
        "dialogues": len(bench.corpus.train),
        "windows": len(windows),
        "real tokens a position, published layout": sum(map(len, windows)) / (bench.published.length * len(windows)),
    }
    workers: dict[str, Worker] = {}
    # The peer first: while its settings are tried it takes the most memory of all.
    lacking, offset = common.missing("torch", "peft"), 0
    if lacking:
        print(f"layout: peer {lacking}")
        figures["peer"] = lacking
    else:
        workers["peer"], epochs["peer"], offset = open_peer(bench, windows, figures)
    packed, devices, workers["qar packed"] = open_packed(bench, figures)
    epochs |= {f"{method} packed": epoch for method, epoch in packed.epochs.items()}
    name = "qar published layout"
    workers[name] = bench.ours("qar", epochs[name], bench.published, devices)
    if not lacking:
        workers["sft packed"] = bench.ours("sft", epochs["sft packed"], packed.shape, devices)
    seconds: dict[str, list[float]] = {name: [] for name in workers}
    for number in range(rounds):
        for name, worker in workers.items():
            batch = number + (offset if name == "peer" else 0)
            seconds[name] += worker.seconds([batch, batch])[1:]
    rates = {name: [epochs[name].rate(n, s) for n, s in enumerate(found)] for name, found in seconds.items()}
    for name, worker in workers.items():
        figures[name] = {
            "useful tokens/s": statistics.median(rates[name]),
            "positions/s": statistics.median(p / s for p, s in zip(epochs[name].positions, seconds[name], strict=True)),
            "useful tokens a position": epochs[name].useful,
            "step seconds": statistics.median(seconds[name]),
            "peak rss GB": worker.rss / 1e9,
        }
        worker.close()
    label = f"{bench.kind}, {bench.config.dtype}"
    target = TARGETS.get(bench.kind, TARGET)
    pair = rates["qar packed"], rates["qar published layout"]
    ratios = [compare(f"{label}: qar packed / published layout", *pair, target, ">=")]
    if "peer" in rates:
        for method, target in (("sft", 2.0), ("qar", 1.5)):
            pair = rates[f"{method} packed"], rates["peer"]
            ratios.append(compare(f"{label}: {method} packed / transformers+peft windows", *pair, target, ">="))
    return ratios, figures


def open_packed(bench: Bench, figures: dict[str, Any]) -> tuple[Packed, int, Worker]:
    """QAR on batches of the shape, and on as many devices, as learn most a second in a trial: both, and the worker."""
    middle = bench.options.rounds // 2
    makers, made = {}, {}
    for found in map(bench.packed, bench.shapes):
        for devices in bench.options.devices:
            name = f"{found.shape.rows} x {found.shape.length}, {devices} devices"
            made[name] = found, devices
            makers[name] = lambda p=found, d=devices: bench.ours("qar", p.epochs["qar"], p.shape, d)
        figures[f"of {found.shape.rows} x {found.shape.length}"] = {
            "useful tokens a position": found.epochs["qar"].useful,
            "sequences": found.sequences,
            "tokens": found.tokens,
            "learned tokens": found.learned,
            "replies left out": found.left_out,
        }
    trying = iter(made.values())

    def trial(worker: Worker) -> float:
        """Seconds a useful token; candidates come in order."""
        epoch = next(trying)[0].epochs["qar"]
        return 1 / epoch.rate(middle, min(worker.seconds([middle, middle])))

    chosen, worker, trials = common.fastest(makers, trial)
    figures["packed"] = {"chosen": chosen} | {f"{k}, useful tokens/s in a trial": 1 / v for k, v in trials.items()}
    return *made[chosen], worker


def open_peer(bench: Bench, windows: Sequence[Example], figures: dict[str, Any]) -> tuple[Worker, Epoch, int]:
    """The peer with the settings that are best for it: worker, epoch, and where that epoch's batches begin."""
    options, rounds = bench.options, bench.options.rounds
    layouts = {
        f"batches of {size}, {'sorted in pools' if by_length else 'shuffled'}": padded_epoch(
            windows, size, by_length, rounds
        )
        for size in (BATCH_SIZES[:1] if options.quick else BATCH_SIZES)
        for by_length in (False, True)
    }
    batches = [batch for epoch in layouts.values() for batch in epoch.batches]
    middle = rounds // 2
    attentions = options.attention[:1] if options.quick else options.attention
    wanted = options.dtype or ("float32" if options.quick else "")
    dtypes = [(t, k) for t, k in peer.DTYPES if t == wanted or not wanted]
    makers = {
        f"{a}, {t}, {k} adapters": (lambda a=a, t=t, k=k: bench.peer(batches, a, t, k, middle))
        for a in attentions
        for t, k in dtypes
    }
    kind, worker, trials = common.fastest(makers, lambda w: min(w.seconds([middle, middle])))
    found = {f"trial seconds, {k}": v for k, v in trials.items()}
    speeds = {}
    for number, (name, epoch) in enumerate(layouts.items()):
        (seconds,) = worker.seconds([number * rounds + middle])
        speeds[name] = epoch.rate(middle, seconds)
        found[f"{name}, useful tokens/s in a trial"] = speeds[name]
    best = max(speeds, key=speeds.__getitem__)
    figures["peer settings"] = {"chosen": f"{best}, {kind}"} | found
    return worker, layouts[best], list(layouts).index(best) * rounds


def main() -> None:
    parser = common.parser(__doc__, rounds=6)
    parser.add_argument("--data", type=Path, nargs="*", default=[], metavar="DIR", help="prepared data sets")
    parser.add_argument("--devices", type=int, nargs="+", default=[1, 2], help="what the CPU may be cut into")
    parser.add_argument("--attention", nargs="+", default=["eager", "sdpa"], help="of the peer")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="of everybody")
    options = parser.parse_args()
    common.begin(options)
    if options.quick:
        options.devices = options.devices[:1]
    if not options.data and not options.quick:
        print("layout: no data set given, nothing is measured; --data DIR of python -m qaperso.prepare")
    ratios, figures = [], {}
    for data in options.data or ([None] if options.quick else []):
        found, figures[data.name if data else "town"] = measure(options, data)
        ratios += found
    common.report(options, "layout", ratios, figures)


if __name__ == "__main__":
    main()
