"""Blockwise attention and the kernels of TPUs and GPUs against all scores at once, with their gradients."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

from qaperso import mesh as meshes
from qaperso.models import attention as attending
from qaperso.models import flash, splash
from qaperso.models.attention import BLOCK, Segments, attention, segments

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


def packed(s: int) -> Segments:
    """Three dialogues of different lengths in each row; the first row ends in padding."""
    segment = np.zeros((B, s), np.int32)
    for row, (first, second, third) in enumerate([(s // 3, s // 2, s - s // 8), (s // 5, s // 4, s)]):
        segment[row, :first], segment[row, first:second], segment[row, second:third] = 1, 2, 3
    return segments(jnp.asarray(segment), jnp.asarray(segment > 0))


def check(function: Callable, s: int, causal: bool = True, tolerance: float = 1e-5) -> None:
    """What a function gives, and its gradients, are those of `plain`."""
    q, k, v = inputs(s)
    seen = packed(s)
    mask = seen.mask(slice(None), slice(None), causal)
    # Padding sees no key; what it gives differs, is finite, and nobody reads it.
    real = mask.any(-1)[None, :, :, None]

    def total(function: Callable, given: Any, q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, jax.Array]:
        out = function(q, k, v, given)
        return jnp.sum(jnp.sin(jnp.where(real, out, 0))), out

    both = [
        jax.jit(jax.value_and_grad(functools.partial(total, f, given), (0, 1, 2), has_aux=True))(q, k, v)
        for f, given in ((function, seen), (plain, mask))
    ]
    ((_, ours), own), ((_, expected), wanted) = both
    np.testing.assert_allclose(jnp.where(real, ours, 0), jnp.where(real, expected, 0), rtol=tolerance, atol=tolerance)
    assert jnp.isfinite(ours).all()
    for gradient, right in zip(own, wanted, strict=True):
        np.testing.assert_allclose(gradient, right, rtol=10 * tolerance, atol=2 * tolerance)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("s", [8, BLOCK, BLOCK + 1, 3 * BLOCK - 40])
def test_blocks_are_the_whole_with_its_gradients(s: int, causal: bool) -> None:
    check(functools.partial(attention, causal=causal), s, causal)


@pytest.mark.parametrize("cached, together", [(1, 1), (3 * 136 * 128, 1), (3 * 136 * 128 * 5, 4), (1 << 40, 8)])
def test_heads_are_the_same_however_many_are_computed_at_a_time(
    cached: int, together: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attending, "CACHED", cached)
    assert attending._together(W * B * KV, H // KV * BLOCK * 136) == together
    check(attention, 136)


@pytest.mark.parametrize("shape", [(2, 1, 1), (1, 1, 2), (2, 1, 2), (4, 1, 1)])
def test_blocks_under_a_mesh_are_the_whole(shape: tuple[int, int, int]) -> None:
    devices = jax.devices()[: int(np.prod(shape))]
    with jax.set_mesh(jax.make_mesh(shape, meshes.AXES, axis_types=(AxisType.Auto,) * 3, devices=devices)):
        check(attention, 40)


def interpreted(q: jax.Array, k: jax.Array, v: jax.Array, seen: Segments) -> jax.Array:
    return splash.attention(q, k, v, *seen, interpret=True)


def test_the_tpu_kernel_is_the_whole_with_its_gradients() -> None:
    check(interpreted, 256)


def test_the_tpu_kernel_under_a_mesh() -> None:
    # Each of four devices gets one of two rows and one of two key-value heads.
    made = jax.make_mesh((2, 1, 2), meshes.AXES, axis_types=(AxisType.Auto,) * 3, devices=jax.devices()[:4])
    with jax.set_mesh(made):
        check(interpreted, 128)


def by_xla(q: jax.Array, k: jax.Array, v: jax.Array, seen: Segments) -> jax.Array:
    return flash.attention(q, k, v, *seen, implementation="xla")


@pytest.mark.parametrize("shape", [None, (1, 1, 1), (2, 1, 2), (1, 4, 1)])
def test_the_gpu_kernel_is_asked_for_the_whole(shape: tuple[int, ...] | None) -> None:
    # Alone, on one device, cut in rows and heads; rows that the mesh does not divide are whole everywhere.
    if shape is None:
        return check(by_xla, 40)
    devices = jax.devices()[: int(np.prod(shape))]
    with jax.set_mesh(jax.make_mesh(shape, meshes.AXES, axis_types=(AxisType.Auto,) * 3, devices=devices)):
        check(by_xla, 40)


def test_kernels_are_taken_where_they_run_for_what_they_take(monkeypatch: pytest.MonkeyPatch) -> None:
    taken = []

    def kernel(name: str, q: jax.Array, *_: jax.Array) -> jax.Array:
        taken.append((name, q.shape[2], q.dtype.name))
        return q.reshape(*q.shape[:3], -1)

    monkeypatch.setattr(splash, "attention", functools.partial(kernel, "splash"))
    monkeypatch.setattr(flash, "attention", functools.partial(kernel, "flash"))

    def trace(capable: bool) -> None:
        monkeypatch.setattr(flash, "_capable", lambda: capable)
        for where in ("cpu", "gpu", "tpu"):
            monkeypatch.setattr("qaperso.models.attention.platform", lambda where=where: where)
            for s in (128, 136, 135):
                for dtype in ("float32", "bfloat16"):
                    given = [x.astype(dtype) for x in inputs(s)]
                    jax.eval_shape(lambda *x: attention(*x), *given, packed(s))  # new, so that it is traced anew
                    jax.eval_shape(lambda *x: attention(*x, causal=False), *given, packed(s))

    trace(True)
    on_gpus = [("flash", 128, "bfloat16"), ("flash", 136, "bfloat16")]
    on_tpus = [("splash", 128, "float32"), ("splash", 128, "bfloat16")]
    assert taken == on_gpus + on_tpus
    taken.clear()
    trace(False)
    assert taken == on_tpus


def test_gpus_that_the_kernel_runs_on(monkeypatch: pytest.MonkeyPatch) -> None:
    class Device:
        def __init__(self, can: str):
            self.compute_capability = can

    for found, expected in ((["9.0", "8.0"], True), (["12.1"], True), (["8.6", "7.5"], False), (["gfx942"], False)):
        monkeypatch.setattr(jax, "local_devices", lambda backend, found=found: [Device(can) for can in found])
        assert flash._capable.__wrapped__() is expected
    monkeypatch.undo()
    # None is here: what is planned for can.
    assert flash._capable.__wrapped__()


def test_bfloat16_is_close_and_its_gradients_exist() -> None:
    q, k, v = inputs(BLOCK + 8)
    seen = segments(packed(BLOCK + 8).query, jnp.ones((B, BLOCK + 8), bool))
    jitted = jax.jit(attention)
    half = tuple(x.astype(jnp.bfloat16) for x in (q, k, v))
    # Results lie around 1; operands are rounded by 2^-9 and summed over 8 products.
    np.testing.assert_allclose(np.asarray(jitted(*half, seen), np.float32), jitted(q, k, v, seen), atol=0.05)

    def total(*x: jax.Array) -> jax.Array:
        return attention(*x, seen).astype(jnp.float32).sum()

    own, wanted = (jax.jit(jax.grad(total, (0, 1, 2)))(*x) for x in (half, (q, k, v)))
    for gradient, right in zip(own, wanted, strict=True):
        assert gradient.dtype == jnp.bfloat16
        error = np.linalg.norm(np.asarray(gradient, np.float32) - right)
        assert error < 0.03 * np.linalg.norm(right)
