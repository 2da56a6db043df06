"""The decoder for replies: one or two towers over a cache, with weights arranged once for it.

Computes what `decoder.run` computes without dropout and gradients (tests compare the two), from other arrays:

- projections that read the same input are one kernel, q|k|v and gate|up: fewer and wider matmuls;
- every layer has arrays of its own: a stack would be cut into copies at each token on back ends that do not fuse the
  slice into the matmul (CPU), which is three times the memory traffic of reading the weights;
- kernels lie as [out, in], so that XLA's CPU back end can have them first in their products, where few rows are
  multiplied faster (docs/log.md);
- values lie as [towers, B, KV, C, head_dim] and keys with the last two turned round, so that both products of attention
  read them where they are, and a new token is written in place.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from qaperso.arrays import constrain_batch, in_turn, platform
from qaperso.models import decoder, lora, quantized, towers
from qaperso.models.config import DecoderConfig
from qaperso.models.decoder import Adapters
from qaperso.models.linear import kernel_first, matmul, product, working

Tree = Any
# Keys [towers, B, KV, head_dim, C] and values [towers, B, KV, C, head_dim] of a layer; a cache has a pair for every layer.
Pair = tuple[jax.Array, jax.Array]
Cache = tuple[Pair, ...]

# Projections that read the same input.
FUSED = {"qkv": ("q", "k", "v"), "o": ("o",), "gate_up": ("gate", "up"), "down": ("down",)}
NORMS = ("attn_norm", "mlp_norm", "q_norm", "k_norm")


def prepare(base: Tree, adapters: Adapters, tower: Tree, config: DecoderConfig, dtype: Any) -> Tree:
    """Arranges parameters for inference.

    In float32 LoRA is added into the kernels. In bfloat16 it stays beside them: a kernel has 8 bits, so whatever
    training added that is below 1/256 of an element would be rounded away, all of it where the base itself is bfloat16. Beside
    a quantised base it stays too, which keeps its few bits.

    Args:
      base: see `decoder.declare`.
      adapters: LoRA (scaled) and the specific tower's MLPs; rows belong to a request and are not used.
      tower: what joins the towers, {} for one tower; see `towers.join`.
      config: the decoder's shape.
      dtype: of weights, activations and cache.

    Returns:
      {embed, norm, table?, tower: {norm_s, alpha?}, layers: [{qkv, o, gate_up, down, norms, biases, ...} of each layer]}.
    """
    side = adapters.lora
    quantised = any(map(quantized.is_quantized, quantized.leaves(base)))
    if side is not None and dtype == jnp.float32 and not quantised:
        base, side = lora.merge(base, side), None
    stacked = base["layers"]
    layers = {name: stacked[name] for name in NORMS if name in stacked}
    for name, parts in FUSED.items():
        layers[name] = _turned(jax.tree.map(lambda *x: jnp.concatenate(x, -1), *[stacked[p] for p in parts]))
        if side is not None:
            layers[f"{name}_a"] = _turned(jnp.concatenate([side[p]["a"] for p in parts], -1))
            layers[f"{name}_b"] = _turned(jax.vmap(jax.scipy.linalg.block_diag)(*[side[p]["b"] for p in parts]))
    if "q_bias" in stacked:
        layers["qkv_bias"] = jnp.concatenate([stacked[f"{p}_bias"] for p in FUSED["qkv"]], -1)
    weights = {name: base[name] for name in ("embed", "norm")}
    if "head" in base:
        weights["table"] = decoder.head(base)
    weights["tower"] = {name: tower[name] for name in ("norm_s", "alpha") if name in tower}
    weights["layers"] = [jax.tree.map(lambda x, i=i: x[i], layers) for i in range(config.layers)]
    if (own := adapters.specific) is not None:
        two = {"own_gate_up": _turned(jnp.concatenate([own["gate"], own["up"]], -1)), "own_down": _turned(own["down"])}
        for i, one in enumerate(weights["layers"][decoder.split_of(adapters, config) :]):
            one |= jax.tree.map(lambda x, i=i: x[i], two)
    return jax.tree.map(lambda x: x.astype(dtype), weights, is_leaf=quantized.is_quantized)


def _turned(kernel: Any) -> Any:
    """[..., in, out] as [..., out, in]; a quantised one stays as it is, with its scales by output."""
    return kernel if quantized.is_quantized(kernel) else jnp.swapaxes(kernel, -1, -2)


def count_towers(one: Tree) -> int:
    """2 where a layer has a specific MLP, else 1."""
    return 1 + ("own_down" in one)


def empty_cache(weights: Tree, config: DecoderConfig, batch: int, length: int) -> Cache:
    """A cache of `length` places, in the dtype of activations."""

    def empty(one: Tree, *places: int) -> jax.Array:
        return jnp.zeros((count_towers(one), batch, config.kv_heads, *places), working(weights["embed"].dtype))

    dim = config.head_dim
    return tuple((empty(one, dim, length), empty(one, length, dim)) for one in weights["layers"])


def attention(
    q: Float[Array, "W B S H d"], k: Float[Array, "W B K d C"], v: Float[Array, "W B K C d"], mask: Bool[Array, "B S C"]
) -> Float[Array, "W B S O"]:
    """Grouped-query attention on keys and values laid out as in the cache; no causal block is skipped."""
    w, b, s, heads, dim = q.shape
    group = jnp.moveaxis(q.reshape(w, b, s, k.shape[2], heads // k.shape[2], dim), 3, 2)
    # Not einsum, which may put the cache first: XLA's CPU back end then turns all of it round at every token.
    among = ((0, 1, 2), (0, 1, 2))
    scores = jax.lax.dot_general(group, k, (((5,), (3,)), among), preferred_element_type=jnp.float32) * dim**-0.5
    scores = jnp.where(mask[None, :, None, :, None], scores, jnp.finfo(jnp.float32).min)
    probability = jax.nn.softmax(scores, -1).astype(v.dtype)
    seen = jax.lax.dot_general(probability, v, (((5,), (3,)), among))
    return jnp.moveaxis(seen, 2, 3).reshape(w, b, s, heads * dim)


def write(pair: Pair, new: Pair, place: Int[Array, " B"]) -> Pair:
    """Puts one token's keys and values, C = 1, at each row's own place, which must be within the cache."""

    def put(old: Array, token: Array, axis: int) -> Array:
        at = [slice(None)] * old.ndim
        at[1], at[axis] = jnp.arange(len(place)), place
        # Indices apart from each other come first in what they index.
        one = jnp.moveaxis(token.squeeze(axis), 1, 0).astype(old.dtype)
        # Twice the same: of a single update XLA's CPU back end makes two, each with copies of the whole cache.
        if len(place) == 1:
            at[1], at[axis], one = (jnp.concatenate([x, x]) for x in (at[1], at[axis], one))
        return old.at[tuple(at)].set(one, mode="promise_in_bounds", unique_indices=len(place) > 1)

    return put(pair[0], new[0], 4), put(pair[1], new[1], 3)


# A program of its own, so that it is traced once and not for every layer.
@functools.partial(jax.jit, static_argnames=("config",))
def layer(
    x: Float[Array, "W B S D"],
    weights: Tree,
    tables: Float[Array, "2 B S half"],
    mask: Bool[Array, "B S C"],
    config: DecoderConfig,
    pair: Pair | None = None,
    place: Int[Array, " B"] | None = None,
) -> tuple[Float[Array, "W B S D"], Pair]:
    """One layer; with a cached pair the one new token of each row is added to it first, at its place.

    Returns:
      The states, and the keys and values that were attended to.
    """
    towers, b, s, _ = x.shape
    # Where the features of a product lie: before all else on CPUs, whose kernels come first.
    side = 0 if platform() == "cpu" else -1

    def times(kernel: Any, h: Array, axis: int) -> Array:
        """A kernel's product with h, whose features lie at `axis`."""
        if quantized.is_quantized(kernel):
            return jnp.moveaxis(matmul(jnp.moveaxis(h, axis, -1), quantized.plain(kernel)), -1, side)
        if side:
            return product(h, kernel, ((axis % h.ndim,), (1,)), h.dtype)
        return kernel_first(kernel, h, axis, h.dtype)

    def dense(h: Array, name: str, axis: int = -1) -> Array:
        y = times(weights[name], h, axis)
        if f"{name}_a" in weights:
            y = y + times(weights[f"{name}_b"], times(weights[f"{name}_a"], h, axis), side)
        return y

    def last(y: Array) -> Array:
        """Features last. Without the barrier the compiler would turn the product round again."""
        return y if side else jnp.moveaxis(jax.lax.optimization_barrier(y), 0, -1)

    def normed(h: Array, name: str) -> Array:
        return decoder.rms_norm(h, weights[name], config.norm_eps) if name in weights else h

    def swiglu(h: Array, wide: str, narrow: str) -> Array:
        gate, up = jnp.split(dense(h, wide), 2, side)
        return last(dense(jax.nn.silu(gate) * up, narrow, side))

    together = last(dense(normed(x, "attn_norm"), "qkv"))
    if "qkv_bias" in weights:
        together = together + weights["qkv_bias"].astype(together.dtype)
    together = together.reshape(towers, b, s, -1, config.head_dim)
    q, k, v = jnp.split(together, [config.heads, config.heads + config.kv_heads], 3)
    q, k = decoder.rope(normed(q, "q_norm"), tables), decoder.rope(normed(k, "k_norm"), tables)
    new = jnp.moveaxis(k, 2, 4), jnp.moveaxis(v, 2, 3)
    pair = new if pair is None else write(pair, new, place)
    x = x + last(dense(attention(q, *pair, mask), "o"))

    h = normed(x, "mlp_norm")
    general = swiglu(h[0], "gate_up", "down")
    x = x + (general[None] if towers == 1 else jnp.stack([general, swiglu(h[1], "own_gate_up", "own_down")]))
    return constrain_batch(x, 1), pair


def _enter(weights: Tree, x: Float[Array, "1 B S D"], rows: Float[Array, "B S D"] | None) -> Float[Array, "1 B S D"]:
    return decoder.enter(x, rows) if count_towers(weights["layers"][-1]) == 1 else x


def prefill(
    weights: Tree,
    tokens: Int[Array, "B S"],
    position: Int[Array, "B S"],
    mask: Bool[Array, "B S S"],
    rows: Float[Array, "B S D"] | None,
    config: DecoderConfig,
    soft: Float[Array, "B P D"] | None = None,
) -> tuple[Float[Array, "W B S D"], Cache]:
    """Reads prompts.

    Args:
      weights: from `prepare`.
      tokens, position: of the prompts.
      mask: which tokens each token may see, see `decoder.causal_mask`.
      rows: of the queriers, where the method has such.
      config: the decoder's shape.
      soft: soft tokens for the first P places, where the method has such; one prompt a row then.

    Returns:
      Last layer's states of each tower before any final norm, and the keys and values of every layer.
    """
    tables = decoder.rope_tables(position, config)
    x = decoder.embed(weights, tokens, working(weights["embed"].dtype))
    if soft is not None:
        x = jnp.concatenate([soft[None].astype(x.dtype), x[:, :, soft.shape[1] :]], 2)
    x = _enter(weights, x, rows)
    cache = []
    for one in weights["layers"]:
        x = decoder.part(x, rows) if count_towers(one) > x.shape[0] else x
        x, one = in_turn(x, one)
        x, pair = layer(x, one, tables, mask, config)
        cache.append(pair)
    return x, tuple(cache)


def logits(weights: Tree, hidden: Float[Array, "B D"]) -> Float[Array, "B V"]:
    """`decoder.logits` of a few rows. Behind the barrier the compiler leaves the table first."""
    return jax.lax.optimization_barrier(kernel_first(weights.get("table", weights["embed"]), hidden, 1)).T


def decode(
    weights: Tree,
    cache: Cache,
    token: Int[Array, " B"],
    position: Int[Array, " B"],
    place: Int[Array, " B"],
    visible: Bool[Array, "B C"],
    rows: Float[Array, "B D"] | None,
    config: DecoderConfig,
) -> tuple[Float[Array, "B V"], Cache]:
    """Reads one token of each row.

    Args:
      weights: from `prepare`.
      cache: of C places; donate it, so that it is written in place.
      token, position: of each row.
      place: where in the cache the token goes; a row's place is its own.
      visible: the places that the token sees; its own should be among them.
      rows: of the queriers, where the method has such.
      config: the decoder's shape.

    Returns:
      Float32 logits of the next token, and the cache with this one.
    """
    tables = decoder.rope_tables(position[:, None], config)
    rows = None if rows is None else rows[:, None]
    x = _enter(weights, decoder.embed(weights, token[:, None], working(weights["embed"].dtype)), rows)
    found = []
    for one, pair in zip(weights["layers"], cache, strict=True):
        x = decoder.part(x, rows) if count_towers(one) > x.shape[0] else x
        x, one = in_turn(x, one)
        x, pair = layer(x, one, tables, visible[:, None], config, pair, place)
        found.append(pair)
    hidden = towers.join(weights["tower"], weights, x, config)
    return logits(weights, hidden[:, 0]), tuple(found)
