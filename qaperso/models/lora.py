"""Low-rank adapters (Hu et al., arXiv 2106.09685) on the seven projections of a decoder."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from qaperso.arrays import ArraySpec, fan_in
from qaperso.models.config import DecoderConfig
from qaperso.models.linear import matmul

Tree = Any
TARGETS = ("q", "k", "v", "o", "gate", "up", "down")


def declare(config: DecoderConfig, rank: int) -> Tree:
    """{target: {a [L, in, r], b [L, r, out]}}; b starts at zero, so the model starts as the base.

    The scale alpha / r is not a parameter: see `scaled`.
    """
    q, kv = config.heads * config.head_dim, config.kv_heads * config.head_dim
    d, f, n = config.embed, config.mlp, config.layers
    sizes = {
        "q": (d, q, "embed", "heads"),
        "k": (d, kv, "embed", "kv_heads"),
        "v": (d, kv, "embed", "kv_heads"),
        "o": (q, d, "heads", "embed"),
        "gate": (d, f, "embed", "mlp"),
        "up": (d, f, "embed", "mlp"),
        "down": (f, d, "mlp", "embed"),
    }
    return {
        name: {
            "a": ArraySpec((n, i, rank), ("layers", i_axis, None), fan_in(i)),
            "b": ArraySpec((n, rank, o), ("layers", None, o_axis), "zeros"),
        }
        for name, (i, o, i_axis, o_axis) in sizes.items()
    }


def scaled(tree: Tree, alpha: float, rank: int) -> Tree:
    """Folds the scale alpha / rank into every b, once, outside the layer scan."""
    return {name: {"a": ab["a"], "b": ab["b"] * (alpha / rank)} for name, ab in tree.items()}


def project(
    tree: Tree | None,
    kernels: Mapping[str, Float[Array, "I O"]],
    x: Float[Array, "... I"],
    dropout: float = 0.0,
    key: jax.Array | None = None,
) -> dict[str, Float[Array, "... O"]]:
    """x @ kernel + dropout(x) @ a @ b for several kernels of one input. No key, no dropout.

    All a are one matmul and drop the same inputs. The rate is rounded to 1/256: one random byte an element costs a
    quarter of the four that a float takes.

    Args:
      tree: one layer's adapters, see `declare`; None = none.
      kernels: {target: kernel}.
      x: their input.
      dropout: rate.
      key: PRNG key of the layer.
    """
    found = {name: matmul(x, kernel) for name, kernel in kernels.items()}
    if tree is not None:
        dropped = x if key is None else _drop(x, dropout, jax.random.fold_in(key, TARGETS.index(next(iter(kernels)))))
        down = [tree[name]["a"] for name in kernels]
        narrow = checkpoint_name(matmul(dropped, jnp.concatenate(down, 1)), "kernel")
        parts = jnp.split(narrow, np.cumsum([a.shape[1] for a in down])[:-1], -1)
        found = {name: y + matmul(h, tree[name]["b"]) for (name, y), h in zip(found.items(), parts, strict=True)}
    return {name: checkpoint_name(y, "kernel") for name, y in found.items()}


def _drop(x: Float[Array, "... I"], rate: float, key: jax.Array) -> Float[Array, "... I"]:
    if not rate:
        return x
    dropped = max(1, round(rate * 256))
    # Bits are drawn as words and cut into bytes: drawing bytes would hash once for each. A word's four bytes are for elements
    # a quarter apart: for neighbours TPUs would write words, copies and bytes to memory.
    words = jax.random.bits(key, (*x.shape[:-1], -(-x.shape[-1] // 4)))
    kept = jnp.concatenate([(words >> shift) & 255 >= dropped for shift in (0, 8, 16, 24)], -1)[..., : x.shape[-1]]
    return jnp.where(kept, x * (256 / (256 - dropped)), 0)


def merge(params: Tree, tree: Tree) -> Tree:
    """Base parameters with (scaled) adapters added into the kernels, summed in float32 (bf16 sums change outputs)."""
    layers = dict(params["layers"])
    for name, ab in tree.items():
        kernel = layers[name]
        delta = jnp.einsum("lir,lro->lio", ab["a"].astype(jnp.float32), ab["b"].astype(jnp.float32))
        layers[name] = (kernel.astype(jnp.float32) + delta).astype(kernel.dtype)
    return {**params, "layers": layers}
