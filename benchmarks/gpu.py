"""python benchmarks/gpu.py [--parts attention train generate] [--minutes 5] [--json FILE] [--quick]

Speed on one GPU: attention's kernels, training steps beside transformers + peft, replies beside transformers.

Every program has a process of its own that has the GPU to itself. What fails is a line that says why; what would begin after
--minutes is left out. Weights and tokens are random: speed does not depend on them. --quick: tiny shapes, on any device.

- attention: value and gradients of causal attention in bfloat16 within four dialogues a row, with errors against float32
  (norm of the difference over the norm, of the first row's first key-value head).
- train: LoRA of rank 16 on seven projections of a bfloat16 base, every position predicted. Ours recomputes no matmul and the
  peer (sdpa) nothing, where that fits; the peer's adapters are of either dtype. `sft blocks` has no kernel for attention.
- mfu: FLOPs of all matmuls that forward and backward pass need, each once (`train.step_work`), over the matmul that this
  GPU reached, and over what an H100's data sheet has.
- generate: tokens drawn a second, greedily, by `merged` (a plain decoder), `sft` (adapters beside its kernels) and `qar`.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import common
import generation
import jax
import jax.numpy as jnp
import numpy as np
import ours
import peer
from common import Ratio, attempt, spread
from kernels import KERNELS, measure_attention
from ours import timed
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from train import config_of, step_work

from qaperso import arrays, methods, step
from qaperso.chips import CHIPS
from qaperso.data.plan import Shape
from qaperso.models import decoder, flash, linear
from qaperso.models.shapes import PUBLISHED

Row = dict[str, Any]
GB, TERA = 1e9, 1e12
DATA_SHEET = CHIPS["h100"].flops
PARTS = ("attention", "train", "generate")
MODELS = {"Llama-3.1-8B": PUBLISHED["meta-llama/Llama-3.1-8B-Instruct"], "SmolLM2-135M": ours.SMOLLM2}
# Rows and lengths, ascending: the most that a process ever used is then what its last program used.
ROWS = {"SmolLM2-135M": ((4, 256), (32, 256), (16, 2048)), "Llama-3.1-8B": ((4, 2048),)}
LIMIT = 120  # seconds of one program
BATCHES = (1, 8, 32, 128)
ENVIRONMENT = {
    "JAX_ENABLE_COMPILATION_CACHE": "false",
    "HF_HUB_OFFLINE": "1",
    "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
    "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.93",
}


def measure_matmul(spec: Row) -> Iterator[Row]:
    """A square bfloat16 matmul of drawn values, alone and as the model has it: float32 sums, then bfloat16."""
    size = 128 if spec["quick"] else 8192
    x = jax.random.normal(jax.random.key(0), (size, size), jnp.bfloat16)
    for name, function in (("alone", jnp.matmul), ("in a model", linear.matmul)):
        seconds = timed(functools.partial(jax.jit(function), x, x), 20)
        yield spread(seconds) | {
            "shape": f"{size} cubed, {name}",
            "TFLOP/s": 2 * size**3 / statistics.median(seconds) / TERA,
        }


def measure_steps(spec: Row) -> Iterator[Row]:
    """Training steps of one program."""
    name, program = spec["model"], spec["program"]
    model, sizes = (ours.TINY, ((4, 32),)) if spec["quick"] else (MODELS[name], ROWS[name])
    for rows, length in sizes:
        shape = Shape(rows, length, length, 1)
        method, *without = ("sft" if program == "peer" else program).split()
        if without:
            flash.fits = lambda q: False
        config = config_of(method, "bfloat16", "dots", shape)
        setting = ours.setting_of(config, model)
        position = sum(step.step_flops(methods.load(method).declare(setting)[0], decoder.declare(model)))
        flops = step_work(model, shape, config.lora.rank, position, model.layers if method == "qar" else 0)
        measure = time_peer if program == "peer" else time_ours
        for choices in measure.choices:
            found = []
            for choice in choices:
                row = attempt(
                    f"{name} {rows} x {length}", functools.partial(measure, setting, shape, choice, spec["rounds"])
                )
                if "ms" in row:
                    rate = 1e3 * flops / row["ms"]
                    row |= {"tokens/s": 1e3 * rows * length / row["ms"], "mfu": rate / TERA / spec["peak"]}
                    row["mfu of 989"] = rate / DATA_SHEET
                found.append(row | {"with": choice})
                yield found[-1]
            if any("ms" in row for row in found):
                break


def time_ours(setting: methods.Setting, shape: Shape, remat: str, count: int) -> Row:
    """Steps of ours."""
    setting.config.remat = remat
    contrast = "none" if setting.config.method == "sft" else "prototypes"
    batch = ours.full_batch(shape, setting.model.vocab, contrast)
    program = ours.Program(setting, batch)
    seconds = timed(lambda: (program.advance(batch), program.state), count)
    used = (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use", 0)
    planned = sum(program.memory().values())
    return spread(seconds) | {"peak GB": used / GB, "planned GB": planned / GB, "compile s": program.compile_seconds}


def time_peer(setting: methods.Setting, shape: Shape, choice: str, count: int) -> Row:
    """Steps of transformers + peft on as many tokens."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    tokens = np.random.default_rng(0).integers(3, setting.model.vocab, (shape.rows, shape.length))
    config, (adapters, *more) = setting.config, choice.split()
    spec = dict(model=setting.model, batches=[peer.padded(tokens, tokens >= 0)], attention="sdpa", dtype="bfloat16")
    spec |= dict(rank=config.lora.rank, alpha=config.lora.alpha, lr=config.optimizer.lr, threads=os.cpu_count())
    _, works = peer.build(spec | dict(device=device, adapters=adapters, checkpointing=bool(more)))
    seconds = works["steps"]([0] * (2 + count))[2:]
    return spread(seconds) | {"peak GB": torch.cuda.max_memory_allocated() / GB if device == "cuda" else 0.0}


# What is tried, and what instead where none of it fits.
time_ours.choices = (("dots",), ("full",))
time_peer.choices = (("bfloat16", "float32"), ("bfloat16 checkpointing", "float32 checkpointing"))


def measure_replies(spec: Row) -> Iterator[Row]:
    """Tokens drawn a second by one program."""
    shape, batches, prompt, new = (ours.TINY, (1, 2), 8, 4) if spec["quick"] else (ours.SMOLLM2, BATCHES, 64, 64)
    base = arrays.initialise(decoder.declare(shape, jnp.bfloat16), jax.random.key(0))
    if spec["program"] == "transformers":
        import torch

        device = "cuda" if torch.cuda.is_available() else "cpu"
        model, run = generation.load_peers(shape, base, ("sdpa",), "bfloat16", device)["sdpa"], generation.time_peer
    else:
        bare = spec["program"] == "merged"
        method = "sft" if bare else spec["program"]
        model, run = generation.make_model(method, shape, base, "bfloat16", bare), generation.time_ours
    for count in batches:
        prompts = np.random.default_rng(count).integers(0, shape.vocab, (count, prompt), np.int32)

        def work(count=count, prompts=prompts) -> Row:
            runs = {"": lambda: run(model, prompts, new)}
            times = generation.take_turns(runs, min(spec["rounds"], 3))[""]
            rates = sorted(count * (new - 1) / drawn for _, drawn in times)
            found = {"tokens/s": statistics.median(rates), "from": rates[0], "to": rates[-1]}
            return found | {"read, tokens/s": statistics.median(count * prompt / reading for reading, _ in times)}

        yield attempt(f"batch {count}", work)


MEASURES = dict(zip(PARTS, (measure_attention, measure_steps, measure_replies), strict=True), matmul=measure_matmul)


def programs(parts: Sequence[str], models: Sequence[str]) -> Iterator[Row]:
    """What has a process of its own, in the order of their turns."""
    yield {"part": "matmul", "program": "jax"}
    if "attention" in parts:
        yield from ({"part": "attention", "program": name} for name in KERNELS)
    if "train" in parts:
        for model in models:
            yield from (
                {"part": "train", "program": name, "model": model} for name in ("sft", "peer", "qar", "sft blocks")
            )
    if "generate" in parts:
        yield from ({"part": "generate", "program": name} for name in ("merged", "sft", "qar", "transformers"))


def run(spec: Row, seconds: float) -> list[Row]:
    """Rows of one program, which is ended after so many seconds."""
    seconds = min(seconds, LIMIT)
    if seconds < 5:
        return [{"failed": "left out, there was no time"}]
    with tempfile.TemporaryDirectory() as folder:
        rows, said = Path(folder) / "rows", Path(folder) / "said"
        rows.touch()
        with said.open("w") as log:
            words = [sys.executable, __file__, "--spec", json.dumps(spec), "--into", str(rows)]
            process = subprocess.Popen(words, env=os.environ | ENVIRONMENT, stdout=log, stderr=log)
            try:
                code = process.wait(seconds)
            except subprocess.TimeoutExpired:
                process.kill()
                code = f"ended after {seconds:.0f} s; exit code {process.wait()}"
        found = [json.loads(line) for line in rows.read_text().splitlines()]
        if code:
            words = said.read_text(errors="replace").strip().splitlines()
            found.append({"failed": f"{code}: {words[-1] if words else ''}"[:300]})
        return found


def ratios_of(rows: Sequence[Row]) -> list[Ratio]:
    """How many times as fast as the blocks, as the peer and as transformers."""
    rates: dict[tuple, float] = {}
    for row in rows:
        for measure in ("causal TFLOP/s", "tokens/s"):
            if measure in row:
                key = (row["part"], row["shape"], row["program"])
                rates[key] = max(rates.get(key, 0.0), row[measure])
    against = {"attention": "blocks", "train": "peer", "generate": "transformers"}
    found = []
    for (part, shape, program), rate in rates.items():
        other = rates.get((part, shape, against[part]))
        if other and program != against[part]:
            found.append(common.single(f"{program} / {against[part]}, {shape}", rate / other, 1.0, ">="))
    return found


def show(part: str, rows: Sequence[Row], console: Console) -> None:
    """A table of what was measured, and below it what was not."""
    good = [row for row in rows if "failed" not in row]
    names = list(dict.fromkeys(name for row in good for name in row if name != "part"))
    shown = Table(*names, title=part, box=None)
    for row in good:
        cells = (row.get(name, "") for name in names)
        shown.add_row(*(f"{x:.4g}" if isinstance(x, float) else escape(str(x)) for x in cells))
    if good:
        console.print(shown)
    for row in rows:
        if "failed" in row:
            named = " ".join(str(row[name]) for name in ("part", "program", "model", "shape", "with") if name in row)
            print(f"{named}: {row['failed']}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="where ratios and figures are written")
    parser.add_argument(
        "--quick", action="store_true", help="tiny shapes and two rounds: whether it runs, not how fast"
    )
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="of these alone")
    parser.add_argument("--rounds", type=int, default=8, help="steps that are timed (default %(default)s)")
    parser.add_argument("--minutes", type=float, default=5.0, help="no longer than these (default %(default)s)")
    parser.add_argument("--spec", type=json.loads, help=argparse.SUPPRESS)
    parser.add_argument("--into", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.spec:
        with options.into.open("w") as file:
            for row in MEASURES[options.spec["part"]](options.spec):
                print(json.dumps(row), file=file, flush=True)
        return
    deadline = time.monotonic() + 60 * options.minutes
    fixed: Row = {"quick": options.quick, "rounds": 2 if options.quick else options.rounds, "peak": DATA_SHEET / TERA}
    rows: list[Row] = []
    for spec in programs(options.parts, tuple(MODELS)[: 1 if options.quick else None]):
        start = time.monotonic()
        found = run(spec | fixed, deadline - start)
        fixed["peak"] = found[0].get("TFLOP/s", fixed["peak"]) if spec["part"] == "matmul" else fixed["peak"]
        rows += [{name: spec[name] for name in ("part", "program") if name in spec} | row for row in found]
        bad = sum("failed" in row for row in found)
        print(*spec.values(), f"{time.monotonic() - start:.0f} s, {len(found)} rows, {bad} failed", flush=True)
    console = Console(width=200)
    for part in ("matmul", *options.parts):
        show(part, [row for row in rows if row["part"] == part], console)
    ratios = ratios_of(rows)
    console.print(common.table("ratios", ratios))
    if options.json:
        found = {"machine": common.facts(), "ratios": [vars(r) for r in ratios], "figures": rows}
        options.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
