"""The dual tower: a querier-specific stream beside the general one, its norms, heads and querier rows.

QAR (arXiv 2412.11736), with the departures that docs/architecture.md lists. Two ways to join the towers' final states:
`alpha` present: norm(g) + alpha * norm_s(s), alpha zero at first, so training starts from the base model (ours);
`alpha` absent: (norm(g) + norm_s(s)) / 2, as published.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from qaperso.arrays import ArraySpec, fan_in
from qaperso.models import decoder
from qaperso.models.config import DecoderConfig
from qaperso.types import RESPONDER, Inputs

Tree = Any


def declare(config: DecoderConfig, *, layers: int, rank: int, queriers: int, gated: bool) -> Tree:
    """Declares the specific tower.

    Args:
      config: of the base.
      layers: how many of the last layers have two towers.
      rank: of the specific MLPs.
      queriers: number of querier rows, the stranger's included; 0 = no rows (as published).
      gated: join by alpha (starts as the base) or, as published, by the mean.
    """
    n, d = layers, config.embed
    tree = {
        "specific": {
            "gate": ArraySpec((n, d, rank), ("layers", "embed", None), fan_in(d)),
            "up": ArraySpec((n, d, rank), ("layers", "embed", None), fan_in(d)),
            "down": ArraySpec((n, rank, d), ("layers", None, "embed"), fan_in(rank)),
        },
        "norm_s": ArraySpec((d,), (None,), "ones"),
    }
    if gated:
        tree["alpha"] = ArraySpec((d,), (None,), "zeros")
    if queriers:
        tree["rows"] = ArraySpec((queriers, d), (None, "embed"), 0.02)
    return tree


def declare_heads(config: DecoderConfig, clusters: int, dim: int) -> Tree:
    """Declares the norm before the heads, and two linear heads (the two views) for each cluster."""
    d = config.embed
    return {
        "norm_p": ArraySpec((d,), (None,), "ones"),
        "kernel": ArraySpec((2, clusters, d, dim), (None, None, "embed", None), fan_in(d)),
        "bias": ArraySpec((2, clusters, dim), (None, None, None), "zeros"),
    }


def spread(per_dialogue: Array, segment: Int[Array, "B S"]) -> Array:
    """Gives every token its dialogue's value, padding a zero: [B, M, ...] -> [B, S, ...]."""
    padded = jnp.concatenate([jnp.zeros_like(per_dialogue[:, :1]), per_dialogue], 1)
    index = segment.reshape(*segment.shape, *([1] * (per_dialogue.ndim - 2)))
    return jnp.take_along_axis(padded, index, 1)


def querier_rows(rows: Float[Array, "Q D"], inputs: Inputs) -> Float[Array, "B S D"]:
    """The row of the querier that each token's dialogue is conditioned on."""
    return rows[spread(inputs.querier, inputs.segment)]


def join(params: Tree, base: Tree, states: Float[Array, "W B S D"], config: DecoderConfig) -> Float[Array, "B S D"]:
    """Final states for the LM head, from the towers' last layer."""
    general = decoder.rms_norm(states[0], base["norm"], config.norm_eps)
    if states.shape[0] == 1:
        return general
    specific = decoder.rms_norm(states[1], params["norm_s"], config.norm_eps)
    if "alpha" in params:
        return general + params["alpha"].astype(general.dtype) * specific
    return (general + specific) / 2


def pool(
    norm: Float[Array, " D"], state: Float[Array, "B S D"], inputs: Inputs, eps: float
) -> tuple[Float[Array, "B M D"], Int[Array, "B M"]]:
    """Dialogue embeddings: the mean of the normed states over the responder's tokens, and how many there were.

    A dialogue without any gets zeros, not NaN.
    """
    normed = decoder.rms_norm(state, norm, eps).astype(jnp.float32)
    number = jnp.arange(1, inputs.present.shape[1] + 1)
    mine = (inputs.segment[..., None] == number) & (inputs.role == RESPONDER)[..., None]
    count = mine.sum(1)
    total = jnp.einsum("bsm,bsd->bmd", mine.astype(jnp.float32), normed)
    return total / jnp.maximum(count, 1)[..., None], count


def views(
    heads: Tree, pooled: Float[Array, "B M D"], cluster: Int[Array, "B M"]
) -> tuple[Float[Array, "B M P"], Float[Array, "B M P"]]:
    """The two views of each dialogue by the heads of its own cluster; no other head is computed."""
    # One matmul for each cluster in turn would compute every head; gathering kernels moves [B, M, D, P] instead. With
    # far fewer dialogues than D that is the cheaper of the two.
    kernel, bias = heads["kernel"][:, cluster], heads["bias"][:, cluster]
    both = jnp.einsum("bmd,vbmdp->vbmp", pooled, kernel) + bias
    return both[0], both[1]
