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
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int

from qaperso.arrays import ArraySpec, constrain_batch, fan_in
from qaperso.models import lora
from qaperso.models.attention import attention
from qaperso.models.config import DecoderConfig
from qaperso.models.linear import bits, matmul, product, unbits, working

Tree = Any

REMAT = {
    # Recompute everything inside a layer: least memory.
    "full": jax.checkpoint_policies.nothing_saveable,
    # Keep what matmuls with kernels and attention give, recompute norms, rotations and gates: no matmul runs twice.
    "dots": jax.checkpoint_policies.save_only_these_names("kernel", "attention"),
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


@flax.struct.dataclass
class Cache:
    """Keys and values of every layer and tower: [L, towers, B, C, KV, head_dim]."""

    k: jax.Array
    v: jax.Array


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


def causal_mask(
    segment: Int[Array, "B S"], attend: Bool[Array, "B C"], keys: Int[Array, "B C"] | None = None, start: Any = 0
) -> Bool[Array, "B S C"]:
    """Which keys each query may see: same segment, not later, allowed.

    Args:
      segment: of the queries, which stand at places start .. start + S - 1 of the row.
      attend: keys that may be attended to at all.
      keys: segments of the keys; the queries' own by default.
      start: place of the first query.
    """
    keys = segment if keys is None else keys
    place = start + jnp.arange(segment.shape[1])
    earlier = jnp.arange(keys.shape[1])[None, :] <= place[:, None]
    return (segment[:, :, None] == keys[:, None, :]) & attend[:, None, :] & earlier[None]


def swiglu(x: Float[Array, "... D"], gate: Array, up: Array, down: Array) -> Float[Array, "... D"]:
    """down(silu(gate(x)) * up(x)) (Shazeer, arXiv 2002.05202), gate and up as one matmul."""
    both = checkpoint_name(matmul(x, jnp.concatenate([gate, up], 1)), "kernel")
    return matmul(jax.nn.silu(both[..., : gate.shape[1]]) * both[..., gate.shape[1] :], down)


def layer(
    x: Float[Array, "W B S D"],
    weights: Tree,
    adapters: Adapters,
    tables: Float[Array, "2 B S half"],
    mask: Bool[Array, "B S C"],
    config: DecoderConfig,
    dropout: float = 0.0,
    key: jax.Array | None = None,
    cache: Cache | None = None,
    start: Any = 0,
) -> tuple[Float[Array, "W B S D"], Cache | None]:
    """One layer of one or two towers. `weights`, `adapters` and `cache` are one layer's slices."""
    towers, b, s, _ = x.shape

    def dense(h: Array, *names: str) -> list[Array]:
        """Projections of one input."""
        found = lora.project(adapters.lora, {name: weights[name] for name in names}, h, dropout, key)
        bias = {name: weights[f"{name}_bias"] for name in names if f"{name}_bias" in weights}
        return [y + bias[name].astype(y.dtype) if name in bias else y for name, y in found.items()]

    def heads(y: Array, name: str) -> Array:
        y = y.reshape(towers, b, s, -1, config.head_dim)
        if f"{name}_norm" in weights:
            y = rms_norm(y, weights[f"{name}_norm"], config.norm_eps)
        return y if name == "v" else rope(y, tables)

    h = rms_norm(x, weights["attn_norm"], config.norm_eps)
    q, k, v = (heads(y, name) for y, name in zip(dense(h, "q", "k", "v"), "qkv", strict=True))
    if cache is not None:
        k = jax.lax.dynamic_update_slice_in_dim(cache.k, k.astype(cache.k.dtype), start, 2)
        v = jax.lax.dynamic_update_slice_in_dim(cache.v, v.astype(cache.v.dtype), start, 2)
        cache = Cache(k, v)
    q, k, v = (y.astype(weights["o"].dtype) for y in (q, k, v))
    x = x + dense(attention(q, k, v, mask).astype(x.dtype), "o")[0]

    h = rms_norm(x, weights["mlp_norm"], config.norm_eps)
    gate, up = dense(h[0], "gate", "up")
    general = dense(jax.nn.silu(gate) * up, "down")[0]
    if adapters.specific is None:
        return x + general[None], cache
    return x + jnp.stack([general, swiglu(h[1], **adapters.specific)]), cache


def embed(params: Tree, tokens: Int[Array, "B S"], adapters: Adapters, dtype: Any) -> Float[Array, "W B S D"]:
    """Token embeddings for each tower; the specific one gets the queriers' rows on top."""
    x = unbits(bits(params["embed"])[tokens]).astype(dtype)
    if adapters.specific is None:
        return x[None]
    return jnp.stack([x, x if adapters.rows is None else x + adapters.rows.astype(dtype)])


def run(
    params: Tree,
    x: Float[Array, "W B S D"],
    position: Int[Array, "B S"],
    mask: Bool[Array, "B S C"],
    config: DecoderConfig,
    adapters: Adapters = Adapters(),
    *,
    remat: str = "full",
    dropout: float = 0.0,
    key: jax.Array | None = None,
    cache: Cache | None = None,
    start: Any = 0,
) -> tuple[Float[Array, "W B S D"], Cache | None]:
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
      cache: to decode with, C places; the queries are written to places `start` and following.
      start: place of the first query in the cache.

    Returns:
      Last layer's states of each tower before any final norm, and the cache after the queries.
    """
    tables = rope_tables(position, config)
    keys = None if key is None or not dropout else jax.random.split(key, config.layers)
    stacked = Adapters(adapters.lora, adapters.specific)

    @functools.partial(jax.checkpoint, prevent_cse=False, policy=REMAT[remat])
    def body(x: Array, scanned: tuple) -> tuple:
        weights, own, layer_key, layer_cache = scanned
        weights = jax.tree.map(unbits, weights)
        x, layer_cache = layer(x, weights, own, tables, mask, config, dropout, layer_key, layer_cache, start)
        return constrain_batch(x, 1), layer_cache

    return jax.lax.scan(body, constrain_batch(x, 1), (jax.tree.map(bits, params["layers"]), stacked, keys, cache))


def empty_cache(config: DecoderConfig, towers: int, batch: int, length: int, dtype: Any) -> Cache:
    """A cache of `length` places."""
    shape = (config.layers, towers, batch, length, config.kv_heads, config.head_dim)
    return Cache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype))


def head(params: Tree) -> Float[Array, "V D"]:
    """The output table: the embedding when tied, else the transposed output kernel."""
    return params["head"].T if "head" in params else params["embed"]


def logits(params: Tree, hidden: Float[Array, "... D"], config: DecoderConfig) -> Float[Array, "... V"]:
    """Float32 logits of final states (after the final norm)."""
    return product(hidden, head(params), ((hidden.ndim - 1,), (1,)))


def forward(
    params: Tree,
    tokens: Int[Array, "B S"],
    position: Int[Array, "B S"],
    segment: Int[Array, "B S"],
    attend: Bool[Array, "B S"],
    config: DecoderConfig,
) -> Float[Array, "B S D"]:
    """The base model alone: states after the final norm."""
    x = embed(params, tokens, Adapters(), working(params["embed"].dtype))
    x, _ = run(params, x, position, causal_mask(segment, attend), config)
    return rms_norm(x[0], params["norm"], config.norm_eps)
