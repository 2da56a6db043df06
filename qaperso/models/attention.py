"""Grouped-query attention over packed rows; the backward pass recomputes the weights.

On TPUs it is JAX's splash-attention kernel (`models/splash.py`), on GPUs cuDNN's (`models/flash.py`), elsewhere and for what
neither takes blocks of queries in plain JAX; on CPUs one key-value head's after another's, so that scores stay in the cache.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int

from qaperso.arrays import platform
from qaperso.models import flash, splash
from qaperso.models.linear import bits, dot, unbits
from qaperso.models.spread import spread

# Queries of a block see the keys up to the block's end only; smaller blocks compute less and start more kernels.
BLOCK = 128
LOW = float(jnp.finfo(jnp.float32).min)
# Scores that a CPU computes at a time: half a megabyte, which its second cache holds.
CACHED = 1 << 17
# Segment of a key that no query sees.
HIDDEN = -1


class Segments(NamedTuple):
    """What decides which keys a query may see: those of its own segment.

    Attributes:
      query: the segment of each token as it looks.
      key: the segment of each token as it is looked at; HIDDEN where nobody may see it.
    """

    query: Int[Array, "*B S"]
    key: Int[Array, "*B S"]

    def mask(self, rows: slice, columns: slice, causal: bool = True) -> Bool[Array, "*B R C"]:
        """Which of the keys in `columns` each query in `rows` may see."""
        same = self.query[..., rows, None] == self.key[..., None, columns]
        place = jnp.arange(self.query.shape[-1])
        return same & (place[columns] <= place[rows, None]) if causal else same


def segments(segment: Int[Array, "B S"], attend: Bool[Array, "B S"]) -> Segments:
    """Of the tokens' segments, and of what may be attended to at all."""
    return Segments(segment, jnp.where(attend, segment, HIDDEN))


def attention(
    q: Float[Array, "W B S H d"],
    k: Float[Array, "W B S K d"],
    v: Float[Array, "W B S K d"],
    seen: Segments,
    causal: bool = True,
) -> Float[Array, "W B S O"]:
    """Grouped-query attention (Ainslie et al., arXiv 2305.13245), softmax in float32.

    Weights are not kept for the backward pass (Dao et al., arXiv 2205.14135). A query that may see no key gets a mean
    of values: finite, and nobody reads it.

    Args:
      q: queries, after the rotary embedding.
      k: keys, after the rotary embedding; query head h reads head h // (H / K).
      v: values.
      seen: which keys each query may see.
      causal: whether a query sees no later key; those behind a block's last query are skipped then.
    """
    if causal and platform() == "tpu" and splash.fits(q.shape[2]):
        return splash.attention(q, k, v, *seen)
    if causal and platform() == "gpu" and flash.fits(q):
        return flash.attention(q, k, v, *seen)
    return by_blocks(q, k, v, seen, causal)


def by_blocks(
    q: Float[Array, "W B S H d"],
    k: Float[Array, "W B S K d"],
    v: Float[Array, "W B S K d"],
    seen: Segments,
    causal: bool = True,
) -> Float[Array, "W B S O"]:
    """`attention` in plain JAX, for any device."""
    return spread(functools.partial(_rows, causal=causal), q, k, v, *seen)


def _rows(q: Array, k: Array, v: Array, query: Array, key: Array, *, causal: bool) -> Float[Array, "W B S H d"]:
    towers, b, s, heads, dim = q.shape
    group = jnp.moveaxis(q.reshape(towers, b, s, k.shape[3], -1, dim), 2, 4)
    seen = Segments(*(jnp.broadcast_to(x[None, :, None], (towers, b, k.shape[3], s)) for x in (query, key)))
    out = _attend(group, jnp.moveaxis(k, 2, 3), jnp.moveaxis(v, 2, 3), seen, causal)
    return jnp.moveaxis(out, 4, 2).reshape(q.shape)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _attend(
    q: Float[Array, "W B K G S d"],
    k: Float[Array, "W B K S d"],
    v: Float[Array, "W B K S d"],
    seen: Segments,
    causal: bool,
) -> Float[Array, "W B K G S d"]:
    return _forward(q, k, v, seen, causal)[0]


def _forward(q: Array, k: Array, v: Array, seen: Segments, causal: bool) -> tuple[Array, tuple]:
    found = _each(functools.partial(_head, causal=causal), q, k, v, seen)
    out, normaliser = (checkpoint_name(x, "attention") for x in found)
    return out, (q, k, v, seen, out, normaliser)


def _backward(causal: bool, saved: tuple, d: Array) -> tuple[Array, Array, Array, None]:
    return *_each(functools.partial(_head_back, causal=causal), *saved, d), None


_attend.defvjp(_forward, _backward)


def _each(work: Callable[..., tuple[Array, ...]], *given: Array | Segments) -> tuple[Array, ...]:
    """A function of one key-value head's arrays, for the heads of all towers and rows: [W, B, K, ...] in and out.

    CPUs take so many at a time as have `CACHED` scores: all at once, each pass over the scores would read them from memory.
    """
    *lead, group, s, _ = given[0].shape
    flat = jax.tree.map(lambda x: x.reshape(-1, *x.shape[3:]), given)
    if platform() != "cpu":
        found = jax.vmap(work)(*flat)
    else:

        def part(x: Any) -> Any:
            return jax.tree.map(bits, work(*jax.tree.map(unbits, x)))

        together = _together(math.prod(lead), group * min(BLOCK, s) * s)
        # As bits: XLA's CPU back end slices and stacks bfloat16 by way of float32.
        given = jax.tree.map(bits, flat)
        # No batches of one: XLA computes those slower than what has no such dimension.
        found = jax.tree.map(unbits, jax.lax.map(part, given, batch_size=together if together > 1 else None))
    return jax.tree.map(lambda x: x.reshape(*lead, *x.shape[1:]), found)


def _together(total: int, scores: int) -> int:
    """How many of `total` heads to compute at a time that have so many scores each: a divisor of it."""
    return max(n for n in range(1, total + 1) if total % n == 0 and n * scores <= max(CACHED, scores))


def _blocks(s: int, causal: bool) -> list[tuple[slice, slice]]:
    """Spans of queries, and of the keys that they may see."""
    ends = [min(i + BLOCK, s) for i in range(0, s, BLOCK)]
    return [(slice(i * BLOCK, end), slice(0, end if causal else s)) for i, end in enumerate(ends)]


def _scores(q: Float[Array, "G R d"], k: Float[Array, "C d"], mask: Bool[Array, "R C"]) -> Float[Array, "G R C"]:
    return jnp.where(mask, dot(q, k, ((2,), (1,))) * q.shape[-1] ** -0.5, LOW)


def _head(
    q: Float[Array, "G S d"], k: Float[Array, "S d"], v: Float[Array, "S d"], seen: Segments, *, causal: bool
) -> tuple[Float[Array, "G S d"], Float[Array, "G S 1"]]:
    """What the queries of a key-value head get, and the logarithms of their weights' sums."""
    outs, normalisers = [], []
    for own, near in _blocks(len(k), causal):
        scores = _scores(q[:, own], k[near], seen.mask(own, near, causal))
        highest = jnp.max(scores, -1, keepdims=True)
        weights = jnp.exp(scores - highest)
        total = jnp.sum(weights, -1, keepdims=True)
        outs.append((dot(weights.astype(v.dtype), v[near], ((2,), (0,))) / total).astype(q.dtype))
        normalisers.append(highest + jnp.log(total))
    return jnp.concatenate(outs, 1), jnp.concatenate(normalisers, 1)


def _head_back(
    q: Float[Array, "G S d"],
    k: Float[Array, "S d"],
    v: Float[Array, "S d"],
    seen: Segments,
    out: Float[Array, "G S d"],
    normaliser: Float[Array, "G S 1"],
    d: Float[Array, "G S d"],
    *,
    causal: bool,
) -> tuple[Float[Array, "G S d"], Float[Array, "S d"], Float[Array, "S d"]]:
    """Gradients of `_head`'s queries, keys and values, from that of its result."""
    scale = q.shape[-1] ** -0.5
    delta = jnp.sum(d.astype(jnp.float32) * out.astype(jnp.float32), -1, keepdims=True)
    dqs = []
    dk = jnp.zeros(k.shape, jnp.float32)
    dv = jnp.zeros(v.shape, jnp.float32)
    for own, near in _blocks(len(k), causal):
        weights = jnp.exp(_scores(q[:, own], k[near], seen.mask(own, near, causal)) - normaliser[:, own])
        slope = weights * (dot(d[:, own], v[near], ((2,), (1,))) - delta[:, own]) * scale
        slope = slope.astype(q.dtype)
        dqs.append(dot(slope, k[near], ((2,), (0,)), dtype=q.dtype))
        dk = dk.at[near].add(_turned(q[:, own], slope))
        dv = dv.at[near].add(_turned(d[:, own], weights.astype(d.dtype)))
    return jnp.concatenate(dqs, 1), dk.astype(k.dtype), dv.astype(v.dtype)


def _turned(narrow: Float[Array, "G R d"], weights: Float[Array, "G R C"]) -> Float[Array, "C d"]:
    """Sum over groups and queries of weights x narrow.

    The product is transposed, not the weights; behind the barrier the compiler cannot turn it round again.
    """
    return jax.lax.optimization_barrier(dot(narrow, weights, ((0, 1), (0, 1)))).T
