"""Attention's kernels under a mesh: the compiler cannot cut a kernel, so each device is given its own rows and heads."""

from __future__ import annotations

from collections.abc import Callable

import jax
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from qaperso.arrays import BATCH_AXES, divides


def spread(
    run: Callable[..., Array],
    q: Float[Array, "W B S H d"],
    k: Float[Array, "W B S K d"],
    v: Float[Array, "W B S K d"],
    query: Int[Array, "B S"],
    key: Int[Array, "B S"],
) -> Float[Array, "W B S O"]:
    """Runs a kernel, which gives `q`'s shape, on each device's rows and, where the axis "tensor" divides the key-value heads, its heads.

    Args:
      run: a function of the other arguments.
      q, k, v: queries, keys and values.
      query, key: segments of the tokens as they look and as they are looked at.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if not mesh.empty:
        rows = BATCH_AXES if divides(mesh, BATCH_AXES, q.shape[1]) else None
        split = PartitionSpec(None, rows, None, "tensor" if divides(mesh, ("tensor",), k.shape[3]) else None, None)
        specs = (split, split, split, *[PartitionSpec(rows, None)] * 2)
        run = jax.shard_map(run, in_specs=specs, out_specs=split, check_vma=False)
    return run(q, k, v, query, key).reshape(*q.shape[:3], -1)
