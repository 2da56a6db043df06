"""Low-rank adapters (Hu et al., arXiv 2106.09685) on the seven projections of a decoder."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from qaperso.arrays import ArraySpec, fan_in
from qaperso.models.config import DecoderConfig

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


@jax.custom_vjp
def widen(h: Float[Array, "... r"], b: Float[Array, "r O"]) -> Float[Array, "... O"]:
    """h @ b for a narrow h.

    JAX computes b's gradient as (d^T h)^T, which makes XLA's CPU back end transpose the wide d, with whatever is fused
    into it, element by element. Here it is h^T d: only the narrow h is transposed (measured in docs/log.md).
    """
    return h @ b


def _widen_forward(h: Array, b: Array) -> tuple[Array, tuple[Array, Array]]:
    return h @ b, (h, b)


def _widen_backward(saved: tuple[Array, Array], d: Array) -> tuple[Array, Array]:
    h, b = saved
    return d @ b.T, jnp.einsum("...r,...o->ro", h, d)


widen.defvjp(_widen_forward, _widen_backward)


def apply(
    tree: Tree | None, name: str, x: Float[Array, "... I"], dropout: float = 0.0, key: jax.Array | None = None
) -> Float[Array, "... O"] | float:
    """dropout(x) @ a @ b of one layer's adapter, 0.0 when there is none. No key, no dropout.

    The rate is rounded to 1/256: one random byte an element costs a quarter of the four that a float takes.
    """
    if tree is None:
        return 0.0
    if key is not None and dropout:
        dropped = max(1, round(dropout * 256))
        # Bits are drawn as words and cut into bytes: drawing bytes would hash once for each.
        words = jax.random.bits(jax.random.fold_in(key, TARGETS.index(name)), (*x.shape[:-1], -(-x.shape[-1] // 4)))
        draw = jax.lax.bitcast_convert_type(words, jnp.uint8).reshape(*x.shape[:-1], -1)[..., : x.shape[-1]]
        x = jnp.where(draw >= dropped, x * (256 / (256 - dropped)), 0)
    return widen(x @ tree[name]["a"].astype(x.dtype), tree[name]["b"].astype(x.dtype))


def merge(params: Tree, tree: Tree) -> Tree:
    """Base parameters with (scaled) adapters added into the kernels, summed in float32 (bf16 sums change outputs)."""
    layers = dict(params["layers"])
    for name, ab in tree.items():
        kernel = layers[name]
        delta = jnp.einsum("lir,lro->lio", ab["a"].astype(jnp.float32), ab["b"].astype(jnp.float32))
        layers[name] = (kernel.astype(jnp.float32) + delta).astype(kernel.dtype)
    return {**params, "layers": layers}
