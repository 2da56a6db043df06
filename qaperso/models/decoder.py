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

from qaperso.arrays import ArraySpec, constrain_batch, fan_in, gather_kernel, gather_small
from qaperso.models import lora, quantized
from qaperso.models.attention import Segments, attention, segments
from qaperso.models.config import DecoderConfig
from qaperso.models.linear import bits, matmul, narrower, product, unbits, working

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
      specific: the specific tower's MLPs of the last N layers, {gate [N, D, r], up [N, D, r], down [N, r, D]}; present =
        two towers in these.
      rows: float[B, S, D], added to the specific stream where the streams part; without one, to the embeddings.
      soft: float[B, M, P, D], soft tokens: they stand in the place of the embeddings of each dialogue's first P tokens.
    """

    lora: Tree | None = None
    specific: Tree | None = None
    rows: Any | None = None
    soft: Any | None = None


def declare(config: DecoderConfig, dtype: Any = jnp.float32) -> Tree:
    """Declares the parameter tree: kernels are [in, out], layers are stacked on a leading axis.

    Kernels of a frozen base may be quantised, see `quantized.declare`.
    """
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
    """Which keys each query may see: same segment, not later, allowed.

    Args:
      segment: of the tokens.
      attend: keys that may be attended to at all.
    """
    return segments(segment, attend).mask(slice(None), slice(None))


def swiglu(x: Float[Array, "... D"], gate: Array, up: Array, down: Array) -> Float[Array, "... D"]:
    """down(silu(gate(x)) * up(x)) (Shazeer, arXiv 2002.05202), gate and up as one matmul."""
    both = checkpoint_name(matmul(x, jnp.concatenate([gate, up], 1)), "kernel")
    return matmul(jax.nn.silu(both[..., : gate.shape[1]]) * both[..., gate.shape[1] :], down)


def layer(
    x: Float[Array, "W B S D"],
    weights: Tree,
    adapters: Adapters,
    tables: Float[Array, "2 B S half"],
    seen: Segments,
    config: DecoderConfig,
    dropout: float = 0.0,
    key: jax.Array | None = None,
) -> Float[Array, "W B S D"]:
    """One layer of one or two towers. `weights` and `adapters` are one layer's slices."""
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
    q, k, v = (y.astype(narrower(y, weights["o"])) for y in (q, k, v))
    x = x + dense(attention(q, k, v, seen).astype(x.dtype), "o")[0]

    h = rms_norm(x, weights["mlp_norm"], config.norm_eps)
    gate, up = dense(h[0], "gate", "up")
    general = dense(jax.nn.silu(gate) * up, "down")[0]
    if adapters.specific is None:
        return x + general[None]
    return x + jnp.stack([general, swiglu(h[1], **adapters.specific)])


def embed(params: Tree, tokens: Int[Array, "B S"], dtype: Any) -> Float[Array, "1 B S D"]:
    """Token embeddings, as one stream."""
    return unbits(bits(params["embed"])[tokens]).astype(dtype)[None]


def place(
    x: Float[Array, "1 B S D"],
    soft: Float[Array, "B M P D"] | None,
    segment: Int[Array, "B S"],
    position: Int[Array, "B S"],
) -> Float[Array, "1 B S D"]:
    """The embeddings with a dialogue's soft tokens at its first P positions, which were reserved for them.

    Args:
      x: embeddings.
      soft: of the m-th dialogue of each row; None = there are none.
      segment: 1..M, 0 = padding.
      position: within the dialogue.
    """
    if soft is None:
        return x
    b, m, p, d = soft.shape
    index = jnp.clip((segment - 1) * p + position, 0, m * p - 1)
    own = jnp.take_along_axis(soft.reshape(b, m * p, d), index[..., None], 1)
    there = (segment > 0) & (position < p)
    return jnp.where(there[None, :, :, None], own[None].astype(x.dtype), x)


def enter(x: Float[Array, "1 B S D"], rows: Float[Array, "B S D"] | None) -> Float[Array, "1 B S D"]:
    """The embeddings of a model of one tower, with the queriers' rows on top."""
    return x if rows is None else x + rows.astype(x.dtype)


def part(x: Float[Array, "1 B S D"], rows: Float[Array, "B S D"] | None) -> Float[Array, "2 B S D"]:
    """Two streams of one; the specific one gets the queriers' rows on top."""
    return jnp.concatenate([x, x if rows is None else x + rows.astype(x.dtype)])


def split_of(adapters: Adapters, config: DecoderConfig) -> int:
    """The first layer that has two towers; `config.layers` where none has."""
    return config.layers - (0 if adapters.specific is None else adapters.specific["gate"].shape[0])


def run(
    params: Tree,
    x: Float[Array, "1 B S D"],
    position: Int[Array, "B S"],
    seen: Segments,
    config: DecoderConfig,
    adapters: Adapters = Adapters(),
    *,
    remat: str = "full",
    dropout: float = 0.0,
    key: jax.Array | None = None,
) -> Float[Array, "W B S D"]:
    """Runs all layers: those of one stream as one scan, those of two as another.

    Args:
      params: base parameters, see `declare`.
      x: embedded inputs.
      position: within the dialogue.
      seen: which keys each query may see, see `attention.segments`.
      config: the decoder's shape.
      adapters: what the method adds.
      remat: "full" or "dots", what the backward pass recomputes.
      dropout: of LoRA inputs, used when a key is given.
      key: PRNG key.

    Returns:
      Last layer's states of each tower before any final norm.
    """
    tables = rope_tables(position, config)
    keys = None if key is None or not dropout else jax.random.split(key, config.layers)
    axes = {name: spec.axes[1:] for name, spec in declare(config)["layers"].items()}

    stack = jax.tree.map(bits, params["layers"])
    # Part of a stack would be a copy of it. Beside LoRA the base is frozen, and layers are looked up in the whole; a gradient would
    # be summed over the whole for each.
    look_up = adapters.lora is not None

    @functools.partial(jax.checkpoint, prevent_cse=False, policy=REMAT[remat])
    def body(x: Array, scanned: tuple) -> tuple:
        weights, own, layer_key = scanned
        if look_up:
            weights = jax.tree.map(lambda a: jax.lax.dynamic_index_in_dim(a, scanned[0], keepdims=False), stack)
        # One layer's kernels at a time are whole and plain, here and again in the backward pass; bits are what travels.
        weights = {
            name: jax.tree.map(lambda x, a=axes[name]: unbits(gather_kernel(x, a)), w) for name, w in weights.items()
        }
        weights = quantized.plain(weights)
        x = layer(x, weights, gather_small(own), tables, seen, config, dropout, layer_key)
        return constrain_batch(x, 1), None

    def through(x: Array, start: int, stop: int, specific: Tree | None) -> Array:
        weights = jnp.arange(config.layers) if look_up else stack
        weights, own, layer_keys = jax.tree.map(lambda a: a[start:stop], (weights, adapters.lora, keys))
        return jax.lax.scan(body, constrain_batch(x, 1), (weights, Adapters(own, specific), layer_keys))[0]

    split = split_of(adapters, config)
    if split == config.layers:
        return through(enter(x, adapters.rows), 0, split, None)
    x = through(x, 0, split, None) if split else x
    return through(part(x, adapters.rows), split, config.layers, adapters.specific)


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
    x = embed(params, tokens, working(params["embed"].dtype))
    x = run(params, x, position, segments(segment, attend), config)
    return rms_norm(x[0], params["norm"], config.norm_eps)
