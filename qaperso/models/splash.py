"""Attention on TPUs: JAX's splash-attention kernel, which keeps no weights and skips what lies in the future."""

from __future__ import annotations

import functools
from typing import Any

import jax
from jaxtyping import Array, Float, Int

from qaperso.models.spread import spread

# Queries and keys of a block: the largest that divides the row. The kernel's lanes ask for multiples of the smallest.
BLOCKS = (512, 256, 128)


def fits(length: int) -> bool:
    """Whether rows of this length can be cut into the kernel's blocks."""
    return length % BLOCKS[-1] == 0


def attention(
    q: Float[Array, "W B S H d"],
    k: Float[Array, "W B S K d"],
    v: Float[Array, "W B S K d"],
    query: Int[Array, "B S"],
    key: Int[Array, "B S"],
    interpret: bool = False,
) -> Float[Array, "W B S O"]:
    """Causal grouped-query attention within segments, see `attention.attention`; of rows that `fits` accepts.

    Args:
      q, k, v: queries, keys and values.
      query, key: segments of the tokens as they look and as they are looked at.
      interpret: runs the kernel step by step on any device, as tests do.
    """
    return spread(functools.partial(_rows, interpret=interpret), q, k, v, query, key)


def _rows(q: Array, k: Array, v: Array, query: Array, key: Array, *, interpret: bool) -> Float[Array, "W B S H d"]:
    kernel, ids = _kernel(q.shape[3], q.shape[2], interpret)

    def row(q: Array, k: Array, v: Array, query: Array, key: Array) -> Array:
        return kernel(q, k, v, segment_ids=ids(q=query, kv=key))

    by_head = (x.swapaxes(2, 3) for x in (q * q.shape[-1] ** -0.5, k, v))
    over_rows = jax.vmap(row)
    return jax.vmap(over_rows, (0, 0, 0, None, None))(*by_head, query, key).swapaxes(2, 3)


def _kernel(heads: int, length: int, interpret: bool) -> tuple[Any, Any]:
    """The kernel for one row of so many heads and tokens, and its record of segments."""
    # Here, since importing it takes a while and only TPUs need it.
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    block = next(size for size in BLOCKS if length % size == 0)
    names = ("q", "kv", "kv_compute", "q_dkv", "kv_dkv", "kv_dkv_compute", "q_dq", "kv_dq")
    made = kernels.make_splash_mha(
        masks.MultiHeadMask([masks.CausalMask((length, length)) for _ in range(heads)]),
        block_sizes=kernels.BlockSizes(**{f"block_{name}": block for name in names}),
        head_shards=1,
        q_seq_shards=1,
        # As in `attention.by_blocks`: what a layer's rematerialisation may keep.
        residual_checkpoint_name="attention",
        interpret=interpret,
    )
    return made, kernels.SegmentIds
