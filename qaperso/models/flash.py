"""Attention on GPUs: cuDNN's fused kernel by way of JAX, which keeps no weights and skips what lies in the future."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from qaperso.arrays import BATCH_AXES, divides

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
    wherever a layer's does, and gives its result with them. Under a mesh each device is given its rows and, where the axis
    "tensor" divides the key-value heads, its heads.

    Args:
      q, k, v: queries, keys and values.
      query, key: segments of the tokens as they look and as they are looked at.
      implementation: of `jax.nn.dot_product_attention`; "xla" computes the same on any device, for tests.
    """
    towers, b, s, heads, dim = q.shape
    run = functools.partial(_rows, implementation=implementation)
    mesh = jax.sharding.get_abstract_mesh()
    if not mesh.empty:
        rows = BATCH_AXES if divides(mesh, BATCH_AXES, b) else None
        split = PartitionSpec(None, rows, None, "tensor" if divides(mesh, ("tensor",), k.shape[3]) else None, None)
        run = jax.shard_map(
            run, in_specs=(split, split, split, *[PartitionSpec(rows, None)] * 2), out_specs=split, check_vma=False
        )
    return run(q, k, v, query, key).reshape(towers, b, s, heads * dim)


def _rows(q: Array, k: Array, v: Array, query: Array, key: Array, *, implementation: str) -> Float[Array, "W B S H d"]:
    # Towers become heads, which share one mask: query head h of tower w still reads key-value head h // (H / K) of its own.
    towers = q.shape[0]
    q, k, v = (jnp.moveaxis(x, 0, 2).reshape(*x.shape[1:3], -1, x.shape[4]) for x in (q, k, v))
    mask = query[:, None, :, None] == key[:, None, None, :]
    out = jax.nn.dot_product_attention(q, k, v, mask=mask, is_causal=True, implementation=implementation)
    return jnp.moveaxis(out.reshape(*out.shape[:2], towers, -1, out.shape[3]), 2, 0)
