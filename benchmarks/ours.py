"""qaperso's training step as a program of its own, for `common.Worker`; and the shapes that are measured."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable
from typing import Any

import common
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from qaperso import arrays, methods, step
from qaperso import config as configs
from qaperso.data.batches import make_batch
from qaperso.data.plan import Shape
from qaperso.mesh import make_mesh, put_batch, start_runtime
from qaperso.methods import Setting
from qaperso.models import decoder
from qaperso.models.config import DecoderConfig
from qaperso.types import QUERIER, RESPONDER, Batch, Example

Tree = Any
# SmolLM2-135M-Instruct's config.json. Speed does not depend on the values of weights, so they are drawn.
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
    eos_ids=(2,),
)
TINY = dataclasses.replace(SMOLLM2, vocab=512, embed=64, layers=4, heads=2, kv_heads=1, head_dim=32, mlp=96)


def setting_of(config: Any, model: DecoderConfig, queriers: int = 24, clusters: int = 4) -> Setting:
    """A setting in which every querier asks one responder in every cluster."""
    grid = np.indices((clusters, queriers)).reshape(2, -1).astype(np.int32)
    classes = {"responder": np.zeros_like(grid[0]), "cluster": grid[0], "querier": grid[1] + 1}
    return Setting(config, model, queriers + 1, clusters, classes)


def full_batch(shape: Shape, vocab: int, contrast: str, seed: int = 0) -> Batch:
    """Rows of one dialogue each that fills them and of which every token is predicted; leaves [1, ...].

    Two dialogues of each class, all of one cluster and as from strangers, so that the contrast has anchors.
    """
    rng = np.random.default_rng(seed)
    role = np.where(np.arange(shape.length) < shape.length // 2, QUERIER, RESPONDER).astype(np.int32)
    rows = []
    for i in range(shape.rows):
        tokens = rng.integers(3, vocab, shape.length).astype(np.int32)
        who = dict(querier=1 + i // 2, responder=0, cluster=0, text=i, label=i // 2, index=i)
        rows.append([Example(tokens, role, np.ones(shape.length, bool), **who)])
    batch = make_batch(rows, shape, [[True]] * shape.rows, contrast)
    return jax.tree.map(lambda x: x[None], batch)


def timed(call: Callable[[], Any], count: int) -> list[float]:
    """Seconds of `count` calls, each waited for, after two that warm up."""
    found = []
    for _ in range(2 + count):
        start = time.perf_counter()
        jax.block_until_ready(call())
        found.append(time.perf_counter() - start)
    return found[2:]


class Program:
    """State, base and compiled step of a setting, as `python -m qaperso.train` makes them."""

    def __init__(self, setting: Setting, batch: Batch):
        """Draws every value and compiles the step.

        Args:
          setting: of the run.
          batch: one of those that will come, leaves [K, ...].
        """
        config = setting.config
        method = methods.load(config.method)
        self.mesh = make_mesh(config.mesh.data, config.mesh.fsdp, config.mesh.tensor)
        everything = config.trainable == "all"
        self.base = {} if everything else self._draw(decoder.declare(setting.model, jnp.dtype(config.dtype)), config)
        trainable, memory = (self._draw(specs, config) for specs in method.declare(setting))
        optimizer, _ = step.make_optimizer(config, 1000)
        self.state, self._advance = step.start(setting, method, optimizer, trainable, memory, self.mesh)
        self._key = jax.random.key(config.seed)
        self._example = batch
        start = time.perf_counter()
        with jax.set_mesh(self.mesh):
            lowered = self._advance.lower(self.state, self.base, self.put(batch), self._key)
            traced = time.perf_counter()
            self.compiled = lowered.compile()
        self.trace_seconds, self.compile_seconds = traced - start, time.perf_counter() - traced

    def _draw(self, specs: Tree, config: Any) -> Tree:
        # A million values by numpy, over and over on the devices where that is not enough: speed does not depend on them, the
        # declared draw would have to be compiled, and billions would take minutes.
        values = np.random.default_rng(config.seed).standard_normal(1 << 20, np.float32)

        def leaf(spec: arrays.ArraySpec, place: NamedSharding) -> jax.Array:
            if spec.init in ("zeros", "ones"):
                return jax.device_put(np.full(spec.shape, 0 if spec.init == "zeros" else 1, spec.dtype), place)
            size, drawn = math.prod(spec.shape), (spec.init * values).astype(spec.dtype)
            if size <= len(drawn):
                return jax.device_put(drawn[:size].reshape(spec.shape), place)
            repeat = jax.jit(lambda x: jnp.tile(x, -(-size // len(x)))[:size].reshape(spec.shape), out_shardings=place)
            return repeat(drawn)

        place = arrays.shardings(specs, self.mesh, config.sharding)
        return jax.tree.map(leaf, specs, place, is_leaf=arrays.is_spec)

    def put(self, batch: Batch) -> Batch:
        """The batch on the devices."""
        return put_batch(batch, self.mesh, 1)

    def advance(self, batch: Batch) -> dict[str, jax.Array]:
        """One step, not waited for; its metrics."""
        with jax.set_mesh(self.mesh):
            self.state, metrics = self.compiled(self.state, self.base, self.put(batch), self._key)
        return metrics

    def compile_again(self) -> dict[str, float]:
        """Seconds to trace and to compile the step with nothing remembered."""
        jax.clear_caches()
        batch = self.put(self._example)
        start = time.perf_counter()
        with jax.set_mesh(self.mesh):
            lowered = self._advance.lower(self.state, self.base, batch, self._key)
            traced = time.perf_counter()
            lowered.compile()
        return {"trace": traced - start, "compile": time.perf_counter() - traced}

    def memory(self) -> dict[str, int]:
        """Bytes that XLA has planned for a step, on one device: arguments and temporaries."""
        plan = self.compiled.memory_analysis()
        return {"arguments": plan.argument_size_in_bytes, "temporaries": plan.temp_size_in_bytes}


def build(spec: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """For `common.serve`.

    Args:
      spec: setting: Setting with the config as JSON; batches: what steps read, in turn; devices: how many the CPU is
        cut into, None = as qaperso starts it.
    """
    start_runtime()
    if spec["devices"]:
        jax.config.update("jax_num_cpu_devices", spec["devices"])
    stored: Setting = spec["setting"]
    setting = dataclasses.replace(stored, config=configs.from_json(stored.config))
    batches = spec["batches"]
    program = Program(setting, batches[0])

    def steps(numbers: list[int]) -> list[float]:
        found = []
        for number in numbers:
            start = time.perf_counter()
            jax.block_until_ready(program.advance(batches[number % len(batches)]))
            jax.block_until_ready(program.state)
            found.append(time.perf_counter() - start)
        return found

    def peak(dtype: str, size: int) -> float:
        from qaperso.metrics import measure_peak

        return measure_peak(dtype, size)

    facts = {
        "devices": jax.device_count(),
        "trace_seconds": program.trace_seconds,
        "compile_seconds": program.compile_seconds,
        **program.memory(),
        "flops_a_position": sum(step.step_flops(program.state.trainable, program.base)),
        "trainable": sum(x.size for x in jax.tree.leaves(program.state.trainable)),
    }
    return facts, {"steps": steps, "peak": peak, "compile": program.compile_again}


def worker(setting: Setting, batches: list[Batch], devices: int | None) -> common.Worker:
    """Starts a program for these batches; two steps of warm-up are done."""
    stored = dataclasses.replace(setting, config=configs.to_json(setting.config))
    made = common.Worker("ours.py", {"setting": stored, "batches": batches, "devices": devices})
    made.seconds([0, 0])
    return made


if __name__ == "__main__":
    common.serve(build)
