"""python benchmarks/generation.py [--batch 1 8 32] [--prompt 64] [--new 64] [--rounds 5] [--json FILE] [--quick]

How fast prompts are read and replies are drawn: plain LoRA merged (`sft`), the two towers (`qar`), and the generation of
`transformers` with the same weights, by eager or scaled-dot-product attention, whichever is faster. Shape of
SmolLM2-135M, random weights, float32, greedy, all prompts of one length; the runs take turns. Times of `transformers` are
those of a call for one new token (reading the prompts) and of what a call for all of them takes longer (drawing).
"""

from __future__ import annotations

import argparse
import functools
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import common
import jax
import numpy as np
from common import Ratio, compare
from ours import SMOLLM2, TINY

from qaperso import arrays, batching, config, generate, methods
from qaperso.batching import Batcher, Model
from qaperso.data.store import Registry
from qaperso.data.text import Encoded, Template
from qaperso.generate import Sampling
from qaperso.mesh import make_mesh, start_runtime
from qaperso.models import decoder, hf
from qaperso.models.config import DecoderConfig
from qaperso.run import Run

Tree = Any
# Seconds to read the prompts, and to draw every token of the replies after the first.
Times = tuple[float, float]
# How many times as many tokens a second as `transformers` a batch is to draw.
TARGETS = {1: 1.2}
TARGET = 2.0


def make_model(method: str, shape: DecoderConfig, base: Tree, dtype: str = "float32", bare: bool = False) -> Model:
    """A run of a method that learned nothing yet, ready to reply; `bare` of what the method adds."""
    chosen = config.default()
    chosen.unlock()
    chosen.method, chosen.dtype = method, dtype
    classes = dict.fromkeys(("responder", "querier", "cluster"), np.zeros(1, np.int32))
    setting = methods.Setting(chosen, shape, queriers=32, clusters=1, classes=classes)
    module = methods.load(method)
    trainable = {} if bare else arrays.initialise(module.declare(setting)[0], jax.random.key(1))
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


def load_peers(
    shape: DecoderConfig, base: Tree, kinds: Sequence[str], dtype: str = "float32", device: str = "cpu"
) -> dict[str, Any]:
    """The same weights in torch, a model for each kind of attention."""
    import torch
    from transformers import AutoModelForCausalLM

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model"
        hf.save(path, base, shape)
        load = functools.partial(AutoModelForCausalLM.from_pretrained, path, dtype=getattr(torch, dtype))
        return {kind: load(attn_implementation=kind).to(device).eval() for kind in kinds}


def time_peer(model: Any, prompts: np.ndarray, new: int) -> Times:
    """One call for a token, one for all."""
    import torch

    ids = torch.tensor(prompts, dtype=torch.long, device=model.device)

    def call(count: int) -> float:
        start = time.perf_counter()
        with torch.inference_mode():
            fixed = dict(do_sample=False, pad_token_id=0, attention_mask=torch.ones_like(ids))
            found = model.generate(ids, max_new_tokens=count, min_new_tokens=count, **fixed).cpu()
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


def measure(options: argparse.Namespace) -> tuple[list[Ratio], dict[str, Any]]:
    """A ratio of drawing for each size of batch, and figures: tokens a second, median, least and most."""
    shape, prompt, new = (TINY, 8, 4) if options.quick else (SMOLLM2, options.prompt, options.new)
    base = arrays.initialise(decoder.declare(shape), jax.random.key(0))
    models = {name: make_model(name, shape, base) for name in ("sft", "qar")}
    figures: dict[str, Any] = {}
    lacking = common.missing("torch")
    if lacking:
        print(f"generation: peer {lacking}")
    peers = {} if lacking else load_peers(shape, base, ("eager", "sdpa"))
    del base
    ratios: list[Ratio] = []
    for count in (1, 2) if options.quick else options.batch:
        prompts = np.random.default_rng(count).integers(0, shape.vocab, (count, prompt), np.int32)
        runs = {name: (lambda m=model, p=prompts: time_ours(m, p, new)) for name, model in models.items()}
        runs |= {name: (lambda m=model, p=prompts: time_peer(m, p, new)) for name, model in peers.items()}
        rates = {}
        for name, times in take_turns(runs, options.rounds).items():
            read, rates[name] = ([count * n / t[i] for t in times] for i, n in ((0, prompt), (1, new - 1)))
            for kind, found in (("read", read), ("drawn", rates[name])):
                figures.setdefault(f"{name}, batch {count}", {})[f"{kind}, tokens/s"] = statistics.median(found)
                figures[f"{name}, batch {count}"] |= {f"{kind} from": min(found), f"{kind} to": max(found)}
        if peers:
            best = max(peers, key=lambda name: statistics.median(rates[name]))
            name = f"tokens drawn a second, sft / transformers ({best}), batch {count}"
            ratios.append(compare(name, rates["sft"], rates[best], TARGETS.get(count, TARGET), ">="))
    return ratios, figures


def main() -> None:
    parser = common.parser(__doc__, rounds=5)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--prompt", type=int, default=64, help="tokens of each prompt")
    parser.add_argument("--new", type=int, default=64, help="tokens of each reply")
    options = parser.parse_args()
    common.begin(options)
    start_runtime()
    common.report(options, "generation", *measure(options))


if __name__ == "__main__":
    main()
