"""python benchmarks/generation.py [--batch 1 8 32] [--prompt 64] [--new 64] [--rounds 5] [--json FILE] [--quick]

How fast prompts are read and replies are drawn: plain LoRA merged (`sft`), the two towers (`qar`), and the generation of
`transformers` with the same weights, by eager or scaled-dot-product attention, whichever is faster. Shape of
SmolLM2-135M, random weights, float32, greedy, all prompts of one length; the runs take turns. Times of `transformers` are
those of a call for one new token (reading the prompts) and of what a call for all of them takes longer (drawing).
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from qaperso import arrays, batching, config, generate, methods
from qaperso.batching import Batcher, Model
from qaperso.data.store import Registry
from qaperso.data.text import Encoded, Template
from qaperso.generate import Sampling
from qaperso.mesh import make_mesh
from qaperso.models import decoder, hf
from qaperso.models.config import DecoderConfig
from qaperso.run import Run

Tree = Any
# Seconds to read the prompts, and to draw every token of the replies after the first.
Times = tuple[float, float]
SMOLLM2 = DecoderConfig(
    vocab=49152,
    embed=576,
    layers=30,
    heads=9,
    kv_heads=3,
    head_dim=64,
    mlp=1536,
    tied=True,
    rope_theta=100000.0,
    norm_eps=1e-5,
)
TINY = dataclasses.replace(SMOLLM2, vocab=64, embed=32, layers=2, heads=4, kv_heads=2, head_dim=8, mlp=48)
# How many times as many tokens a second as `transformers` a batch is to draw.
TARGETS = {1: 1.2}
TARGET = 2.0


def make_model(method: str, shape: DecoderConfig, base: Tree) -> Model:
    """A run of a method that learned nothing yet, ready to reply."""
    chosen = config.default()
    chosen.unlock()
    chosen.method = method
    classes = dict.fromkeys(("responder", "querier", "cluster"), np.zeros(1, np.int32))
    setting = methods.Setting(chosen, shape, queriers=32, clusters=1, classes=classes)
    module = methods.load(method)
    trainable = arrays.initialise(module.declare(setting)[0], jax.random.key(1))
    nobody, nothing = Registry((), ()), Template((), (), (), (), ())
    run = Run(Path(), setting, module, make_mesh(-1, 1, 1), nobody, None, nothing, base, {})
    return batching.prepare(run, trainable)


def time_ours(model: Model, prompts: np.ndarray, new: int) -> Times:
    """One generation of a full batch."""
    batcher = Batcher(model, len(prompts))
    for i, tokens in enumerate(prompts):
        prompt = Encoded(tokens, np.ones_like(tokens), np.zeros(len(tokens), bool))
        batcher.submit(prompt, i % 32, Sampling(new))
    start = time.perf_counter()
    # The first token is part of reading, as it is for `transformers`.
    batcher.step()
    read = time.perf_counter()
    while batcher.busy:
        batcher.step(generate.STRIDE)
    return read - start, time.perf_counter() - read


def load_peers(shape: DecoderConfig, base: Tree) -> dict[str, Any]:
    """The same weights in torch, a model for each kind of attention."""
    import torch
    from transformers import AutoModelForCausalLM

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model"
        hf.save(path, base, shape)
        load = AutoModelForCausalLM.from_pretrained
        return {k: load(path, dtype=torch.float32, attn_implementation=k).eval() for k in ("eager", "sdpa")}


def time_peer(model: Any, prompts: np.ndarray, new: int) -> Times:
    """One call for a token, one for all."""
    import torch

    ids = torch.tensor(prompts, dtype=torch.long)

    def call(count: int) -> float:
        start = time.perf_counter()
        with torch.inference_mode():
            fixed = dict(do_sample=False, pad_token_id=0, attention_mask=torch.ones_like(ids))
            found = model.generate(ids, max_new_tokens=count, min_new_tokens=count, **fixed)
        assert found.shape[1] == ids.shape[1] + count
        return time.perf_counter() - start

    read = call(1)
    return read, call(new) - read


def take_turns(runs: dict[str, Callable[[], Times]], rounds: int) -> dict[str, list[Times]]:
    """Every run once to warm up, then `rounds` times in turn."""
    for run in runs.values():
        run()
    found: dict[str, list[Times]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            found[name].append(run())
    return found


def measure(
    batches: Sequence[int] = (1, 8, 32),
    prompt: int = 64,
    new: int = 64,
    rounds: int = 5,
    shape: DecoderConfig = SMOLLM2,
) -> dict[str, Any]:
    """All figures.

    Args:
      batches: numbers of prompts that are answered at a time.
      prompt, new: tokens of each prompt and reply.
      rounds: timed runs of each.
      shape: of the base.

    Returns:
      {"ratios": [{name, value, spread, target, sense}], "figures": {name: {"read" and "draw": tokens a second, median,
      "read_spread", "draw_spread": [least, most]}}}. A ratio is of drawing; its spread is over rounds.
    """
    base = arrays.initialise(decoder.declare(shape), jax.random.key(0))
    models = {name: make_model(name, shape, base) for name in ("sft", "qar")}
    peers = load_peers(shape, base)
    del base
    ratios: list[dict[str, Any]] = []
    figures: dict[str, dict[str, Any]] = {}
    for count in batches:
        prompts = np.random.default_rng(count).integers(0, shape.vocab, (count, prompt), np.int32)
        runs = {name: (lambda m=model, p=prompts: time_ours(m, p, new)) for name, model in models.items()}
        runs |= {name: (lambda m=model, p=prompts: time_peer(m, p, new)) for name, model in peers.items()}
        rates = {}
        for name, times in take_turns(runs, rounds).items():
            read, draw = ([count * n / t[i] for t in times] for i, n in ((0, prompt), (1, new - 1)))
            rates[name] = draw
            figures[f"{name}, batch {count}"] = {
                "read": statistics.median(read),
                "read_spread": [min(read), max(read)],
                "draw": statistics.median(draw),
                "draw_spread": [min(draw), max(draw)],
            }
        best = max(peers, key=lambda name: statistics.median(rates[name]))
        each = [a / b for a, b in zip(rates["sft"], rates[best], strict=True)]
        ratios.append(
            {
                "name": f"tokens drawn a second, sft / transformers ({best}), batch {count}",
                "value": statistics.median(each),
                "spread": [min(each), max(each)],
                "target": TARGETS.get(count, TARGET),
                "sense": ">=",
            }
        )
    return {"ratios": ratios, "figures": figures}


def main(arguments: Sequence[str]) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--prompt", type=int, default=64)
    parser.add_argument("--new", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--quick", action="store_true", help="tiny shapes and one round: whether it runs, not how fast")
    known = parser.parse_args(arguments)
    quick = ((1, 2), 8, 4, 1, TINY)
    found = measure(*quick) if known.quick else measure(known.batch, known.prompt, known.new, known.rounds)
    print(f"tokens a second, median of {known.rounds} [least, most]; prompts of {known.prompt}, replies of {known.new}")
    print(f"{'':20}{'read':>24}{'drawn':>24}")
    for name, f in found["figures"].items():
        cells = (f"{f[k]:.0f} [{f[f'{k}_spread'][0]:.0f}, {f[f'{k}_spread'][1]:.0f}]" for k in ("read", "draw"))
        print(f"{name:20}" + "".join(f"{cell:>24}" for cell in cells))
    for r in found["ratios"]:
        print(f"{r['name']}: {r['value']:.2f} [{r['spread'][0]:.2f}, {r['spread'][1]:.2f}], target {r['target']}")
    if known.json:
        known.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
