"""Grouped-query attention over packed rows; the backward pass recomputes the weights.

On TPUs it is JAX's splash-attention kernel (`models/splash.py`), on GPUs cuDNN's (`models/flash.py`), elsewhere and for what
neither takes blocks of queries in plain JAX.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int

from qaperso.arrays import platform
from qaperso.models import flash, splash
from qaperso.models.linear import dot

# Queries of a block see the keys up to the block's end only; smaller blocks compute less and start more kernels.
BLOCK = 128
LOW = float(jnp.finfo(jnp.float32).min)
# Batch dimensions of every product here: tower, row, key-value head.
HEADS = ((0, 1, 2), (0, 1, 2))
# Segment of a key that no query sees.
HIDDEN = -1


class Segments(NamedTuple):
    """What decides which keys a query may see: those of its own segment.

    Attributes:
      query: the segment of each token as it looks.
      key: the segment of each token as it is looked at; HIDDEN where nobody may see it.
    """

    query: Int[Array, "B S"]
    key: Int[Array, "B S"]

    def mask(self, rows: slice, columns: slice, causal: bool = True) -> Bool[Array, "B R C"]:
        """Which of the keys in `columns` each query in `rows` may see."""
        same = self.query[:, rows, None] == self.key[:, None, columns]
        place = jnp.arange(self.query.shape[1])
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
    towers, b, s, heads, dim = q.shape
    group = jnp.moveaxis(q.reshape(towers, b, s, k.shape[3], -1, dim), 2, 4)
    out = _attend(group, jnp.moveaxis(k, 2, 3), jnp.moveaxis(v, 2, 3), seen, causal)
    return jnp.moveaxis(out, 4, 2).reshape(towers, b, s, heads * dim)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _attend(
    q: Float[Array, "W B K G S d"],
    k: Float[Array, "W B K S d"],
    v: Float[Array, "W B K S d"],
    seen: Segments,
    causal: bool,
) -> Float[Array, "W B K G S d"]:
    return _forward(q, k, v, seen, causal)[0]


def _blocks(s: int, causal: bool) -> list[tuple[slice, slice]]:
    """Spans of queries, and of the keys that they may see."""
    ends = [min(i + BLOCK, s) for i in range(0, s, BLOCK)]
    return [(slice(i * BLOCK, end), slice(0, end if causal else s)) for i, end in enumerate(ends)]


def _scores(q: Array, k: Array, mask: Array) -> Float[Array, "W B K G S C"]:
    scores = dot(q, k, ((5,), (4,)), HEADS) * q.shape[-1] ** -0.5
    return jnp.where(mask[None, :, None, None], scores, LOW)


def _forward(q: Array, k: Array, v: Array, seen: Segments, causal: bool) -> tuple[Array, tuple]:
    outs, normalisers = [], []
    for own, near in _blocks(q.shape[4], causal):
        scores = _scores(q[..., own, :], k[..., near, :], seen.mask(own, near, causal))
        highest = jnp.max(scores, -1, keepdims=True)
        weights = jnp.exp(scores - highest)
        total = jnp.sum(weights, -1, keepdims=True)
        outs.append((dot(weights.astype(v.dtype), v[..., near, :], ((5,), (3,)), HEADS) / total).astype(q.dtype))
        normalisers.append(highest + jnp.log(total))
    out = checkpoint_name(jnp.concatenate(outs, 4), "attention")
    normaliser = checkpoint_name(jnp.concatenate(normalisers, 4), "attention")
    return out, (q, k, v, seen, out, normaliser)


def _backward(causal: bool, saved: tuple, d: Array) -> tuple[Array, Array, Array, None]:
    q, k, v, seen, out, normaliser = saved
    scale = q.shape[-1] ** -0.5
    delta = jnp.sum(d.astype(jnp.float32) * out.astype(jnp.float32), -1, keepdims=True)
    dqs = []
    dk = jnp.zeros(k.shape, jnp.float32)
    dv = jnp.zeros(v.shape, jnp.float32)
    for own, near in _blocks(q.shape[4], causal):
        mine, keys, values, ds = q[..., own, :], k[..., near, :], v[..., near, :], d[..., own, :]
        weights = jnp.exp(_scores(mine, keys, seen.mask(own, near, causal)) - normaliser[..., own, :])
        slope = dot(ds, values, ((5,), (4,)), HEADS)
        slope = (weights * (slope - delta[..., own, :]) * scale).astype(q.dtype)
        dqs.append(dot(slope, keys, ((5,), (3,)), HEADS, dtype=q.dtype))
        dk = dk.at[..., near, :].add(_turned(mine, slope))
        dv = dv.at[..., near, :].add(_turned(ds, weights.astype(d.dtype)))
    return jnp.concatenate(dqs, 4), dk.astype(k.dtype), dv.astype(v.dtype), None


def _turned(narrow: Float[Array, "W B K G S d"], weights: Float[Array, "W B K G S C"]) -> Float[Array, "W B K C d"]:
    """Sum over groups and queries of weights x narrow.

    The product is transposed, not the weights; behind the barrier the compiler cannot turn it round again.
    """
    return jnp.swapaxes(jax.lax.optimization_barrier(dot(narrow, weights, ((3, 4), (3, 4)), HEADS)), -1, -2)


_attend.defvjp(_forward, _backward)
