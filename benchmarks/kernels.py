"""Attention within segments on GPUs, by cuDNN's kernel and in blocks, for `gpu.py`."""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from common import attempt, spread
from ours import timed

from qaperso.models import attention, flash
from qaperso.models.attention import Segments

KERNELS = ("cudnn", "blocks")
# Rows, length, heads, key-value heads, width of a head.
SHAPES = ((16, 256, 9, 3, 64), (8, 2048, 32, 8, 128), (2, 8192, 32, 8, 128))
# Where the dialogues of a row end, as shares of it; padding follows.
ENDS = (0.15, 0.4, 0.55, 0.95)


def attend(name: str, seen: Segments, q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """A kernel's causal attention: q [B, S, H, d], k and v [B, S, K, d] give [B, S, H, d]."""
    if name == "blocks":
        return attention.by_blocks(q[None], k[None], v[None], seen)[0].reshape(q.shape)
    return flash.attention(q[None], k[None], v[None], *seen, implementation=name)[0].reshape(q.shape)


@functools.partial(jax.jit, static_argnums=0)
def value_and_gradients(name: str, seen: Segments, slope: jax.Array, *qkv: jax.Array) -> tuple[jax.Array, ...]:
    """A kernel's result, 0 where nobody reads it, and what q, k and v get of the slope."""
    real = (seen.query > 0)[..., None, None]
    out, back = jax.vjp(functools.partial(attend, name, seen), *qkv)
    return jnp.where(real, out, 0), *back(jnp.where(real, slope, 0))


def measure_attention(spec: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """One kernel on every shape."""
    for b, s, h, kv, d in ((2, 128, 2, 1, 32),) if spec["quick"] else SHAPES:

        def work(b=b, s=s, h=h, kv=kv, d=d) -> dict[str, Any]:
            keys = jax.random.split(jax.random.key(0), 4)
            given = [
                jax.random.normal(key, (b, s, n, d), jnp.bfloat16) for key, n in zip(keys, (h, h, kv, kv), strict=True)
            ]
            number = np.searchsorted(np.array(ENDS) * s, np.arange(s), "right") + 1
            segment = jnp.tile(jnp.asarray(np.where(number > len(ENDS), 0, number), jnp.int32), (b, 1))
            seen = attention.segments(segment, segment > 0)
            run = functools.partial(value_and_gradients, spec["program"], seen, *given)
            start = time.perf_counter()
            found = jax.block_until_ready(run())
            first = time.perf_counter() - start
            seconds = timed(run, spec["rounds"] + 10)
            # Its head alone, by every score at once.
            heads = [slice(0, 1 if x.shape[2] == kv else h // kv) for x in given]
            with jax.default_matmul_precision("highest"):
                alone = [x[:1, :, own].astype(jnp.float32) for x, own in zip(given, heads, strict=True)]
                right = value_and_gradients("xla", jax.tree.map(lambda x: x[:1], seen), *alone)
            own = [x[:1, :, : y.shape[2]].astype(jnp.float32) for x, y in zip(found, right, strict=True)]
            errors = [float(jnp.linalg.norm(x - y) / jnp.linalg.norm(y)) for x, y in zip(own, right, strict=True)]
            # Seven matmuls, of whose S x S a causal mask leaves half.
            rate = 7 * b * s * s * h * d / statistics.median(seconds) / 1e12
            names = ("error", "of dq", "of dk", "of dv")
            return spread(seconds) | {"causal TFLOP/s": rate, "first s": first} | dict(zip(names, errors, strict=True))

        yield attempt(f"{b} x {s}, {h}/{kv} x {d}", work)
