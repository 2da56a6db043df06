"""One scanned, rematerialised, pure-function decoder for Llama, Qwen2 and Qwen3, run as one tower or two.

Layout: activations are [towers, B, S, D]. With one tower this is the plain decoder; with two, tower 0 is the general
one and tower 1 the querier-specific one. Both share every layer's attention; only their MLPs differ (arXiv 2412.11736).
"""

from __future__ import annotations

import functools
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from qaperso.arrays import ArraySpec, constrain_batch, fan_in
from qaperso.models import lora
from qaperso.models.config import DecoderConfig

Tree = Any

REMAT = {
    # Recompute everything inside a layer: least memory.
    "full": jax.checkpoint_policies.nothing_saveable,
    # Keep the outputs of matmuls with weights, recompute the rest: a third less arithmetic for more memory.
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


@flax.struct.dataclass
class Adapters:
    """What a method adds to the frozen base; every part may be absent.

    Attributes:
      lora: see `lora.declare`, leading axis L.
      specific: the specific tower's MLPs, {gate [L, D, r], up [L, D, r], down [L, r, D]}; present = two towers.
      rows: float[B, S, D], added to the specific stream where the streams part.
    """

    lora: Tree | None = None
    specific: Tree | None = None
    rows: Any | None = None


def declare(config: DecoderConfig, dtype: Any = jnp.float32) -> Tree:
    """Declares the parameter tree: kernels are [in, out], layers are stacked on a leading axis."""
    n, d, f = config.layers, config.embed, config.mlp
    q, kv = config.heads * config.head_dim, config.kv_heads * config.head_dim

    def kernel(i: int, o: int, axes: tuple) -> ArraySpec:
        return ArraySpec((n, i, o), ("layers", *axes), fan_in(i), dtype)

    layers = {
        "attn_norm": ArraySpec((n, d), ("layers", None), "ones", dtype),
        "q": kernel(d, q, ("embed", "heads")),
        "k": kernel(d, kv, ("embed", "kv_heads")),
        "v": kernel(d, kv, ("embed", "kv_heads")),
        "o": kernel(q, d, ("heads", "embed")),
        "mlp_norm": ArraySpec((n, d), ("layers", None), "ones", dtype),
        "gate": kernel(d, f, ("embed", "mlp")),
        "up": kernel(d, f, ("embed", "mlp")),
        "down": kernel(f, d, ("mlp", "embed")),
    }
    if config.qkv_bias:
        for name, size, axis in (("q", q, "heads"), ("k", kv, "kv_heads"), ("v", kv, "kv_heads")):
            layers[f"{name}_bias"] = ArraySpec((n, size), ("layers", axis), "zeros", dtype)
    if config.qk_norm:
        for name in ("q_norm", "k_norm"):
            layers[name] = ArraySpec((n, config.head_dim), ("layers", None), "ones", dtype)
    tree = {
        "embed": ArraySpec((config.vocab, d), ("vocab", "embed"), 0.02, dtype),
        "layers": layers,
        "norm": ArraySpec((d,), (None,), "ones", dtype),
    }
    if not config.tied:
        tree["head"] = ArraySpec((d, config.vocab), ("embed", "vocab"), fan_in(d), dtype)
    return tree


def rms_norm(x: Float[Array, "... D"], scale: Float[Array, " D"], eps: float) -> Float[Array, "... D"]:
    """Root-mean-square norm (Zhang & Sennrich, arXiv 1910.07467), computed in float32."""
    wide = x.astype(jnp.float32)
    normed = wide * jax.lax.rsqrt(jnp.mean(wide * wide, -1, keepdims=True) + eps)
    return normed.astype(x.dtype) * scale.astype(x.dtype)


def rope_frequencies(config: DecoderConfig) -> np.ndarray:
    """Rotary frequencies float64[head_dim / 2], radians a position, with Llama-3.1 scaling where configured."""
    frequency = config.rope_theta ** (-np.arange(0, config.head_dim, 2) / config.head_dim)
    scaling = config.rope_scaling
    if scaling is None:
        return frequency
    # Whole turns within the original context: many turns stay, few are stretched, between them a linear blend.
    turns = scaling.original_max_position * frequency / (2 * np.pi)
    blend = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    blend = np.clip(blend, 0.0, 1.0)
    return frequency * (blend + (1 - blend) / scaling.factor)


def rope_tables(position: Int[Array, "B S"], config: DecoderConfig) -> Float[Array, "2 B S half"]:
    """Cosines and sines of each position's angles; made once, outside the layer scan."""
    angle = position[..., None].astype(jnp.float32) * jnp.asarray(rope_frequencies(config), jnp.float32)
    return jnp.stack([jnp.cos(angle), jnp.sin(angle)])


def rope(x: Float[Array, "W B S H d"], tables: Float[Array, "2 B S half"]) -> Float[Array, "W B S H d"]:
    """Rotary position embedding (Su et al., arXiv 2104.09864), first half paired with second half."""
    cos, sin = tables[:, :, :, None]
    first, second = jnp.split(x.astype(jnp.float32), 2, -1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], -1).astype(x.dtype)


def causal_mask(segment: Int[Array, "B S"], attend: Bool[Array, "B S"]) -> Bool[Array, "B S S"]:
    """Which tokens each token may see: of the same segment, not later, and with `attend` set."""
    place = jnp.arange(segment.shape[1])
    earlier = place[None, :] <= place[:, None]
    return (segment[:, :, None] == segment[:, None, :]) & attend[:, None, :] & earlier[None]


def attention(
    q: Float[Array, "W B S H d"], k: Float[Array, "W B S K d"], v: Float[Array, "W B S K d"], mask: Bool[Array, "B S S"]
) -> Float[Array, "W B S O"]:
    """Grouped-query attention (Ainslie et al., arXiv 2305.13245), softmax in float32.

    A query that may see no key gets the mean of all values: finite, and nobody reads it.
    """
    towers, b, s, heads, dim = q.shape
    group = q.reshape(towers, b, s, k.shape[3], heads // k.shape[3], dim)
    scores = jnp.einsum("tbskgd,tbckd->tbkgsc", group, k, preferred_element_type=jnp.float32) * dim**-0.5
    scores = jnp.where(mask[None, :, None, None], scores, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, -1).astype(v.dtype)
    return jnp.einsum("tbkgsc,tbckd->tbskgd", weights, v).reshape(towers, b, s, heads * dim)


def swiglu(x: Float[Array, "... D"], gate: Array, up: Array, down: Array) -> Float[Array, "... D"]:
    """down(silu(gate(x)) * up(x)) (Shazeer, arXiv 2002.05202)."""
    return lora.widen(jax.nn.silu(x @ gate) * (x @ up), down)


def layer(
    x: Float[Array, "W B S D"],
    weights: Tree,
    adapters: Adapters,
    tables: Float[Array, "2 B S half"],
    mask: Bool[Array, "B S S"],
    config: DecoderConfig,
    dropout: float = 0.0,
    key: jax.Array | None = None,
) -> Float[Array, "W B S D"]:
    """One layer of one or two towers. `weights` and `adapters` are one layer's slices."""
    towers, b, s, _ = x.shape

    def dense(h: Array, name: str) -> Array:
        y = h @ weights[name].astype(h.dtype)
        if f"{name}_bias" in weights:
            y = y + weights[f"{name}_bias"].astype(h.dtype)
        return y + lora.apply(adapters.lora, name, h, dropout, key)

    def heads(h: Array, name: str, count: int) -> Array:
        y = dense(h, name).reshape(towers, b, s, count, config.head_dim)
        if f"{name}_norm" in weights:
            y = rms_norm(y, weights[f"{name}_norm"], config.norm_eps)
        return y if name == "v" else rope(y, tables)

    h = rms_norm(x, weights["attn_norm"], config.norm_eps)
    q, k, v = heads(h, "q", config.heads), heads(h, "k", config.kv_heads), heads(h, "v", config.kv_heads)
    x = x + dense(attention(q, k, v, mask), "o")

    h = rms_norm(x, weights["mlp_norm"], config.norm_eps)
    general = dense(jax.nn.silu(dense(h[0], "gate")) * dense(h[0], "up"), "down")
    if adapters.specific is None:
        return x + general[None]
    own = {name: w.astype(x.dtype) for name, w in adapters.specific.items()}
    return x + jnp.stack([general, swiglu(h[1], own["gate"], own["up"], own["down"])])


def embed(params: Tree, tokens: Int[Array, "B S"], adapters: Adapters, dtype: Any) -> Float[Array, "W B S D"]:
    """Token embeddings for each tower; the specific one gets the queriers' rows on top."""
    x = params["embed"].astype(dtype)[tokens]
    if adapters.specific is None:
        return x[None]
    return jnp.stack([x, x if adapters.rows is None else x + adapters.rows.astype(dtype)])


def run(
    params: Tree,
    x: Float[Array, "W B S D"],
    position: Int[Array, "B S"],
    mask: Bool[Array, "B S S"],
    config: DecoderConfig,
    adapters: Adapters = Adapters(),
    *,
    remat: str = "full",
    dropout: float = 0.0,
    key: jax.Array | None = None,
) -> Float[Array, "W B S D"]:
    """Runs all layers as one scan.

    Args:
      params: base parameters, see `declare`.
      x: embedded inputs of one or two towers.
      position: within the dialogue.
      mask: which keys each query may see, see `causal_mask`.
      config: the decoder's shape.
      adapters: what the method adds, leading axis L.
      remat: "full" or "dots", what the backward pass recomputes.
      dropout: of LoRA inputs, used when a key is given.
      key: PRNG key.

    Returns:
      Last layer's states of each tower before any final norm.
    """
    tables = rope_tables(position, config)
    keys = None if key is None or not dropout else jax.random.split(key, config.layers)
    stacked = Adapters(adapters.lora, adapters.specific)

    @functools.partial(jax.checkpoint, prevent_cse=False, policy=REMAT[remat])
    def body(x: Array, scanned: tuple) -> tuple:
        weights, own, layer_key = scanned
        return constrain_batch(layer(x, weights, own, tables, mask, config, dropout, layer_key), 1), None

    return jax.lax.scan(body, constrain_batch(x, 1), (params["layers"], stacked, keys))[0]


def head(params: Tree) -> Float[Array, "D V"]:
    """The output kernel: its own, or the transposed embedding when tied."""
    return params["head"] if "head" in params else params["embed"].T


def logits(params: Tree, hidden: Float[Array, "... D"], config: DecoderConfig) -> Float[Array, "... V"]:
    """Float32 logits of final states (after the final norm)."""
    return jnp.matmul(hidden, head(params).astype(hidden.dtype), preferred_element_type=jnp.float32)


def forward(
    params: Tree,
    tokens: Int[Array, "B S"],
    position: Int[Array, "B S"],
    segment: Int[Array, "B S"],
    attend: Bool[Array, "B S"],
    config: DecoderConfig,
) -> Float[Array, "B S D"]:
    """The base model alone: states after the final norm."""
    x = embed(params, tokens, Adapters(), params["embed"].dtype)
    x = run(params, x, position, causal_mask(segment, attend), config)
    return rms_norm(x[0], params["norm"], config.norm_eps)
