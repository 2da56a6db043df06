"""Blockwise attention against all scores at once, with its gradients."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qaperso.models.attention import BLOCK, attention
from qaperso.models.decoder import causal_mask

W, B, H, KV, DIM = 2, 2, 6, 2, 8


def plain(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array) -> jax.Array:
    """Every score at once; JAX's own gradient."""
    k, v = (jnp.repeat(x, H // KV, 3) for x in (k, v))
    scores = jnp.einsum("wbshd,wbchd->wbhsc", q, k, preferred_element_type=jnp.float32) * DIM**-0.5
    weights = jax.nn.softmax(jnp.where(mask[None, :, None], scores, jnp.finfo(jnp.float32).min), -1)
    out = jnp.einsum("wbhsc,wbchd->wbshd", weights.astype(v.dtype), v)
    return out.reshape(*out.shape[:3], -1)


def inputs(s: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    keys = jax.random.split(jax.random.key(s), 3)
    sizes = (W, B, s, H, DIM), (W, B, s, KV, DIM), (W, B, s, KV, DIM)
    return tuple(jax.random.normal(key, size) for key, size in zip(keys, sizes, strict=True))


def packed(s: int) -> jax.Array:
    """Three dialogues of different lengths in each row; the first row ends in padding."""
    segment = np.zeros((B, s), np.int32)
    for row, (first, second, third) in enumerate([(s // 3, s // 2, s - s // 8), (s // 5, s // 4, s)]):
        segment[row, :first], segment[row, first:second], segment[row, second:third] = 1, 2, 3
    return causal_mask(jnp.asarray(segment), jnp.asarray(segment > 0))


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("s", [8, BLOCK, BLOCK + 1, 3 * BLOCK - 40])
def test_blocks_are_the_whole_with_its_gradients(s: int, causal: bool) -> None:
    q, k, v = inputs(s)
    mask = packed(s) if causal else packed(s) | packed(s).mT
    # Padding sees no key; what it gives differs, is finite, and nobody reads it.
    real = mask.any(-1)[None, :, :, None]

    def total(function, q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        return jnp.sum(jnp.sin(jnp.where(real, function(q, k, v, mask), 0)))

    blocks = functools.partial(attention, causal=causal)
    ours, expected = blocks(q, k, v, mask), plain(q, k, v, mask)
    np.testing.assert_allclose(jnp.where(real, ours, 0), jnp.where(real, expected, 0), rtol=1e-5, atol=1e-5)
    assert jnp.isfinite(ours).all()
    own, wanted = (jax.jit(jax.grad(lambda *a, f=f: total(f, *a), (0, 1, 2)))(q, k, v) for f in (blocks, plain))
    for gradient, right in zip(own, wanted, strict=True):
        np.testing.assert_allclose(gradient, right, rtol=1e-4, atol=2e-5)


def test_bfloat16_is_close_and_its_gradients_exist() -> None:
    q, k, v = inputs(BLOCK + 8)
    mask = packed(BLOCK + 8) | jnp.eye(BLOCK + 8, dtype=bool)
    half = tuple(x.astype(jnp.bfloat16) for x in (q, k, v))
    # Results lie around 1; operands are rounded by 2^-9 and summed over 8 products.
    np.testing.assert_allclose(np.asarray(attention(*half, mask), np.float32), attention(q, k, v, mask), atol=0.05)

    def total(*x: jax.Array) -> jax.Array:
        return attention(*x, mask).astype(jnp.float32).sum()

    own, wanted = (jax.jit(jax.grad(total, (0, 1, 2)))(*x) for x in (half, (q, k, v)))
    for gradient, right in zip(own, wanted, strict=True):
        assert gradient.dtype == jnp.bfloat16
        error = np.linalg.norm(np.asarray(gradient, np.float32) - right)
        assert error < 0.03 * np.linalg.norm(right)
