"""python benchmarks/train.py [--json FILE] [--quick] [--devices 1 2] [--attention eager sdpa]

Speed and memory of a training step on the CPU, beside transformers + peft.

Everybody computes the same: SmolLM2-135M's shapes, LoRA of rank 16 on seven projections, no dropout, AdamW on the
adapters, 4 rows of 256 tokens, each row one dialogue that fills it, logits and loss at every position. QAR has its second
tower and its contrast besides. Values are random: speed does not depend on them. Every program has a process of its own
and works alone; those of one dtype are alive together (all at once would fill 24 GB, and steps then wait for pages) and take
turns, held to the same cores, after two steps of warm-up. A turn is four steps, of which the last counts: training has steps
before each, and after another program's the first ones get their memory from the system anew (docs/log.md). Compile caches are off.

- ours: the step that qaperso.train runs, config as in configs/qar_smollm2.py. Of --devices (one device with all
  threads, or several with a share each and a share of the rows) the fastest.
- peer: the faster of eager and sdpa attention; in bfloat16 also of float32 and bfloat16 adapters. It does not clip
  gradients, which ours does.
- MFU: FLOPs of all matmuls that forward and backward pass need, each once (qaperso.step.step_flops, attention's scores under
  a causal mask, and what QAR's second tower multiplies again), over the fastest square matmul that anybody here did in the
  same run and dtype: ours on one device or several, or torch's.
- memory: what XLA plans for a QAR step on one device, and the resident peak of each process.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
from collections.abc import Mapping
from typing import Any

import common
import ours
import peer
from common import ROOT, Ratio, Worker, compare

from qaperso import config as configs
from qaperso.data.plan import Shape
from qaperso.models.config import DecoderConfig
from qaperso.types import Batch

GB = 1e9
# Steps of a turn.
TURN = 4
DTYPES = ("float32", "bfloat16")


def config_of(method: str, dtype: str, remat: str, shape: Shape, split: int = 0) -> Any:
    """configs/qar_smollm2.py with these values; `split` layers below the towers' parting."""
    config = configs.load(ROOT / "configs" / "qar_smollm2.py")
    config.method, config.dtype, config.remat = method, dtype, remat
    config.qar.contrast = "prototypes"  # of both kinds the one whose cost does not depend on who meets whom
    config.batch.rows, config.batch.length = shape.rows, shape.length
    config.batch.targets, config.batch.dialogues = shape.targets, shape.dialogues
    config.qar.split_layer = split
    return config


# The remat setting that recomputes no matmul.
KEPT = "dots"


@dataclasses.dataclass(frozen=True)
class Choices:
    """Settings of ours: devices, and the layers below the towers' parting."""

    devices: int
    split: int


class Bench:
    """What is measured, and how it is started."""

    def __init__(self, options: argparse.Namespace):
        self.options = options
        self.model: DecoderConfig = ours.TINY if options.quick else ours.SMOLLM2
        rows, length = (4, 32) if options.quick else (4, 256)
        self.shape = Shape(rows, length, length, 1)
        self.batches: dict[str, Batch] = {
            method: ours.full_batch(self.shape, self.model.vocab, contrast)
            for method, contrast in (("sft", "none"), ("qar", "prototypes"))
        }
        tokens = self.batches["sft"].inputs.tokens[0]
        self.rows = peer.padded(tokens, [row >= 0 for row in tokens])
        self.tokens = rows * length
        self.lora_rank: int = config_of("sft", "float32", "full", self.shape).lora.rank

    def ours(self, method: str, dtype: str, devices: int, split: int = 0, remat: str = KEPT) -> Worker:
        config = config_of(method, dtype, remat, self.shape, split)
        return ours.worker(ours.setting_of(config, self.model), [self.batches[method]], devices)

    def peer(self, attention: str, dtype: str, adapters: str) -> Worker:
        config = config_of("sft", dtype, "full", self.shape)
        settings = dict(attention=attention, dtype=dtype, adapters=adapters, threads=self.options.threads)
        return peer.worker(self.model, [self.rows], lora=config.lora, lr=config.optimizer.lr, **settings)

    def flops(self, worker: Worker, method: str, split: int = 0) -> float:
        """FLOPs of a step: all matmuls of forward and backward pass, each once."""
        second = self.model.layers - split if method == "qar" else 0
        return step_work(self.model, self.shape, self.lora_rank, worker.facts["flops_a_position"], second)


def step_work(model: DecoderConfig, shape: Shape, rank: int, position: float, second: int) -> float:
    """FLOPs of a step on rows of one dialogue each: all matmuls of forward and backward pass, each once.

    Args:
      model, shape: what is multiplied with what; every position is predicted.
      rank: of LoRA.
      position: FLOPs of one position, see `qaperso.step.step_flops`.
      second: layers that have a second tower.
    """
    attending = model.heads * model.head_dim
    # Scores and values, of whose S x S a causal mask leaves half: two matmuls forward, four backward.
    scores = 6 * 2 * (model.layers + second) * attending * shape.length / 2
    # Frozen kernels have one matmul backward, LoRA's two.
    kv = model.kv_heads * model.head_dim
    kernels = 2 * model.embed * (attending + kv)
    adapters = rank * (2 * (model.embed + attending) + 2 * (model.embed + kv))
    tower = second * (4 * kernels + 6 * adapters)
    return shape.rows * shape.length * (position + scores + tower)


def trial(worker: Worker) -> float:
    """Seconds of the faster of two steps."""
    return min(worker.seconds([0, 0]))


def measure(options: argparse.Namespace) -> tuple[list[Ratio], dict[str, Any]]:
    """All ratios and figures."""
    bench = Bench(options)
    figures: dict[str, Any] = {"tokens a step": bench.tokens, "threads": options.threads}
    choices: Choices | None = None
    workers: dict[str, Worker] = {}
    peaks: dict[str, list[float]] = {}
    seconds: dict[str, list[float]] = {}
    for dtype in DTYPES[:1] if options.quick else DTYPES:
        choices, opened = open_some(bench, dtype, choices, figures)
        seconds |= {name: [] for name in opened}
        peaks[dtype] = []
        for number in range(options.rounds):
            for name, worker in opened.items():
                seconds[name] += worker.seconds([number] * TURN)[-1:]
            peaks[dtype].append(peak_of(opened, dtype, options.quick))
        for worker in opened.values():
            worker.close()
        workers |= opened
    assert choices is not None
    for name, worker in workers.items():
        mine = seconds[name]
        figures[name] = {
            "tokens/s": bench.tokens / statistics.median(mine),
            "step seconds": statistics.median(mine),
            "step seconds from": min(mine),
            "step seconds to": max(mine),
            "peak rss GB": worker.rss / GB,
        }
        if "arguments" in worker.facts:
            planned = worker.facts["arguments"] + worker.facts["temporaries"]
            figures[name]["arguments + temporaries GB, all devices"] = planned * worker.facts["devices"] / GB
        figures[name] |= {
            k: v for k, v in worker.facts.items() if k in ("trace_seconds", "compile_seconds", "devices", "adapters")
        }
    figures["matmul peak GFLOP/s"] = {dtype: statistics.median(found) / 1e9 for dtype, found in peaks.items()}
    ratios = speed_ratios(bench, workers, seconds, peaks, figures, choices)
    ratios += memory_ratios(bench, figures)
    return ratios, figures


def open_some(
    bench: Bench, dtype: str, choices: Choices | None, figures: dict[str, Any]
) -> tuple[Choices, dict[str, Worker]]:
    """Starts every program of a dtype with the settings that are fastest for it; puts into `figures` which and why.

    Args:
      bench: what is measured.
      dtype: of the programs.
      choices: settings of ours; None = to be tried out.
      figures: added to.
    """
    options, workers = bench.options, {}
    if choices is None:
        wanted = options.devices[:1] if options.quick else options.devices
        candidates = {str(d): (lambda d=d: bench.ours("sft", dtype, d)) for d in wanted}
        chosen, workers[f"sft {dtype}"], trials = common.fastest(candidates, trial)
        choices = Choices(int(chosen), 2 * bench.model.layers // 3)  # as configs/qar_smollm2_split.py
        figures["ours"] = {"devices": chosen} | {f"trial seconds, {k} devices": v for k, v in trials.items()}
    else:
        workers[f"sft {dtype}"] = bench.ours("sft", dtype, choices.devices)
    workers[f"qar {dtype}"] = bench.ours("qar", dtype, choices.devices)
    if dtype == "float32":
        workers[f"qar split {dtype}"] = bench.ours("qar", dtype, choices.devices, split=choices.split)
    left_out = common.missing("torch", "peft")
    if left_out:
        print(f"train: peer {left_out}")
        figures["peer"] = left_out
        return choices, workers
    attentions = options.attention[:1] if options.quick else options.attention
    adapters = [k for t, k in peer.DTYPES if t == dtype]
    makers = {f"{a}, {k} adapters": (lambda a=a, k=k: bench.peer(a, dtype, k)) for a in attentions for k in adapters}
    chosen, workers[f"peer {dtype}"], trials = common.fastest(makers, trial)
    tried = {"settings": chosen} | {f"trial seconds, {k}": v for k, v in trials.items()}
    figures["peer"] = figures.get("peer", {}) | {dtype: tried}
    return choices, workers


def peak_of(workers: Mapping[str, Worker], dtype: str, quick: bool) -> float:
    """FLOP/s of the fastest matmul by ours or torch, now."""
    askable = [w for name, w in workers.items() if name in (f"sft {dtype}", f"peer {dtype}")]
    return max(w.ask("peak", dtype=dtype, size=size) for w in askable for size in ((64,) if quick else (1024, 2048)))


def speed_ratios(
    bench: Bench,
    workers: Mapping[str, Worker],
    seconds: Mapping[str, list[float]],
    peaks: Mapping[str, list[float]],
    figures: dict[str, Any],
    choices: Choices,
) -> list[Ratio]:
    """Ratios of times, and of FLOPs to the peak."""
    rates = {name: [bench.tokens / s for s in found] for name, found in seconds.items()}

    def best(kind: str) -> str:
        return max(
            (n for n in rates if n.startswith(kind) and "split" not in n), key=lambda n: statistics.median(rates[n])
        )

    ratios = []
    if "peer float32" in rates:
        ratios.append(
            compare(
                "sft / transformers+peft, tokens/s, float32", rates["sft float32"], rates["peer float32"], 1.4, ">="
            )
        )
        mine, theirs = best("sft"), best("peer")
        ratios.append(compare(f"{mine} / {theirs}, tokens/s, best dtypes", rates[mine], rates[theirs], 1.0, ">="))
        medians = [statistics.median(rates[name]) for name in ("qar float32", "peer float32")]
        figures["qar / peer, tokens/s, float32"] = medians[0] / medians[1]
    for name, worker in workers.items():
        method, dtype = name.split()[0], name.split()[-1]
        if method == "peer":
            continue
        flops = bench.flops(worker, method, choices.split if "split" in name else 0)
        found = compare(f"{name} mfu", [flops / s for s in seconds[name]], peaks[dtype], 0.55, ">=")
        figures[name]["mfu"] = found.value
        if name == "sft float32":
            ratios.append(found)
    ratios.append(compare("qar / sft, step time, float32", seconds["qar float32"], seconds["sft float32"], 1.35, "<="))
    name = f"qar with split_layer {choices.split} / sft, step time, float32"
    ratios.append(compare(name, seconds["qar split float32"], seconds["sft float32"], 1.15, "<="))
    return ratios


def memory_ratios(bench: Bench, figures: dict[str, Any]) -> list[Ratio]:
    """What XLA plans for a QAR step in float32 on one device, and the peak of a process that does nothing else."""
    ratios = []
    for remat, target in ((KEPT, 4.0), ("full", 1.5))[: 1 if bench.options.quick else 2]:
        worker = bench.ours("qar", "float32", 1, remat=remat)
        facts, seconds = worker.facts, trial(worker)
        worker.close()
        plan = facts["arguments"] + facts["temporaries"]
        figures[f"qar memory, remat {remat}"] = {
            "arguments GB": facts["arguments"] / GB,
            "temporaries GB": facts["temporaries"] / GB,
            "peak rss GB": worker.rss / GB,
            "step seconds, one device": seconds,
            "compile_seconds": facts["compile_seconds"],
        }
        ratios.append(common.single(f"qar arguments + temporaries, GB, remat {remat}", plan / GB, target, "<="))
    return ratios


def main() -> None:
    parser = common.parser(__doc__, rounds=7)
    parser.add_argument("--devices", type=int, nargs="+", default=[1, 2], help="what the CPU may be cut into")
    parser.add_argument("--attention", nargs="+", default=["eager", "sdpa"], help="of the peer")
    options = parser.parse_args()
    common.begin(options)
    common.report(options, "train", *measure(options))


if __name__ == "__main__":
    main()
