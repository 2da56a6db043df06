"""Attention on GPUs: cuDNN's fused kernel by way of JAX, which keeps no weights and skips what lies in the future."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from qaperso.models.spread import spread

# The widest head of the kernel on Ampere, the oldest chips that it runs on.
WIDEST = 128
AMPERE = 8


def fits(q: Float[Array, "W B S H d"]) -> bool:
    """Whether the kernel takes such queries: 16 bits, an even length (of its mask), heads of whole words."""
    return q.dtype.itemsize == 2 and q.shape[2] % 2 == 0 and q.shape[4] % 8 == 0 and q.shape[4] <= WIDEST and _capable()


@functools.cache
def _capable() -> bool:
    """Whether the kernel runs on every GPU here. AMD's say something like "gfx942" of what they can do.

    Where there is none a program is compiled for GPUs that are not here (`aot.py`); of those of `chips.py` all can.
    """
    try:
        devices = jax.local_devices(backend="gpu")
    except RuntimeError:
        return True
    found = (str(device.compute_capability).split(".")[0] for device in devices)
    return all(major.isdecimal() and int(major) >= AMPERE for major in found)


def attention(
    q: Float[Array, "W B S H d"],
    k: Float[Array, "W B S K d"],
    v: Float[Array, "W B S K d"],
    query: Int[Array, "B S"],
    key: Int[Array, "B S"],
    implementation: str = "cudnn",
) -> Float[Array, "W B S O"]:
    """Causal grouped-query attention within segments, see `attention.attention`; of queries that `fits` accepts.

    Nothing of it has a name for rematerialisation: the kernel's sums stay inside JAX, so its forward pass runs again
    wherever a layer's does, and gives its result with them.

    Args:
      q, k, v: queries, keys and values.
      query, key: segments of the tokens as they look and as they are looked at.
      implementation: of `jax.nn.dot_product_attention`; "xla" computes the same on any device, for tests.
    """
    return spread(functools.partial(_rows, implementation=implementation), q, k, v, query, key)


def _rows(q: Array, k: Array, v: Array, query: Array, key: Array, *, implementation: str) -> Float[Array, "W B S H d"]:
    # Towers become heads, which share one mask: query head h of tower w still reads key-value head h // (H / K) of its own.
    towers = q.shape[0]
    q, k, v = (jnp.moveaxis(x, 0, 2).reshape(*x.shape[1:3], -1, x.shape[4]) for x in (q, k, v))
    mask = query[:, None, :, None] == key[:, None, None, :]
    out = jax.nn.dot_product_attention(q, k, v, mask=mask, is_causal=True, implementation=implementation)
    return jnp.moveaxis(out.reshape(*out.shape[:2], towers, -1, out.shape[3]), 2, 0)
