"""Products with float32 sums against plain ones, in every form that the stack uses."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qaperso.models.linear import bits, kernel_first, matmul, narrower, product, unbits, working


def normal(seed: int, *shape: int, dtype: type = jnp.float32) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape, dtype)


@pytest.mark.parametrize("sizes", [(5, 7), (7, 5), (64, 3), (3, 64), (32, 32)])
@pytest.mark.parametrize("lead", [(), (4,), (2, 3, 4)])
def test_matmul_is_the_plain_product_with_its_gradients(sizes: tuple[int, int], lead: tuple[int, ...]) -> None:
    x, kernel, weight = normal(0, *lead, sizes[0]), normal(1, *sizes), normal(2, *lead, sizes[1])
    np.testing.assert_allclose(matmul(x, kernel), x @ kernel, rtol=1e-5, atol=1e-5)
    own = jax.jit(jax.grad(lambda x, kernel: (matmul(x, kernel) * weight).sum(), (0, 1)))(x, kernel)
    wanted = jax.grad(lambda x, kernel: ((x @ kernel) * weight).sum(), (0, 1))(x, kernel)
    for gradient, right in zip(own, wanted, strict=True):
        np.testing.assert_allclose(gradient, right, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kinds", [("float32", "bfloat16"), ("bfloat16", "float32"), ("bfloat16", "bfloat16")])
@pytest.mark.parametrize("sizes", [(48, 16), (16, 48), (1, 8), (8, 1)])
def test_mixed_operands_keep_their_dtypes_and_are_close(kinds: tuple[str, str], sizes: tuple[int, int]) -> None:
    # Every one of these products has to exist on this back end; CPUs have bfloat16 kernels for some forms only.
    x, kernel = normal(0, 2, 20, sizes[0], dtype=kinds[0]), normal(1, *sizes, dtype=kinds[1])
    y, pull = jax.jit(lambda x, kernel: jax.vjp(matmul, x, kernel))(x, kernel)
    slopes = jax.jit(lambda pull, y: pull(jnp.ones_like(y)))(pull, y)
    assert (y.dtype, *(s.dtype for s in slopes)) == (kinds[0], *kinds)
    wide = tuple(a.astype(jnp.float32) for a in (x, kernel))
    expected, right = jax.vjp(jnp.matmul, *wide)
    for ours, theirs in zip((y, *slopes), (expected, *right(jnp.ones_like(expected))), strict=True):
        error = np.linalg.norm(np.asarray(ours, np.float32) - theirs)
        assert error < 0.02 * np.linalg.norm(theirs) + 1e-6


def test_sums_are_float32() -> None:
    # 1 + 512 * 2^-9 = 2; with sums in bfloat16 every addition of 2^-9 to 1 would be lost.
    x = jnp.concatenate([jnp.ones((1, 1)), jnp.full((1, 512), 2.0**-9)], 1).astype(jnp.bfloat16)
    ones = jnp.ones((513, 1), jnp.bfloat16)
    assert product(x, ones, ((1,), (0,)))[0, 0] == 2.0
    assert matmul(x, ones)[0, 0] == 2.0


def test_bits_keep_every_value() -> None:
    half = normal(3, 100, dtype=jnp.bfloat16)
    np.testing.assert_array_equal(unbits(bits(half)), half)
    assert unbits(bits(half)).dtype == jnp.bfloat16
    single = normal(3, 100)
    assert bits(single) is single and unbits(single) is single


def test_activations_on_cpus_are_float32() -> None:
    expected = jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16
    assert working("bfloat16") == expected and working(jnp.bfloat16) == expected
    assert working("float32") == jnp.float32


def test_the_narrower_dtype_wins() -> None:
    wide, half = jnp.zeros(1), jnp.zeros(1, jnp.bfloat16)
    assert [narrower(a, b) for a, b in ((wide, half), (half, wide), (wide, wide))] == [
        "bfloat16",
        "bfloat16",
        "float32",
    ]


@pytest.mark.parametrize("rows", [(1, 1), (2, 1), (3, 5)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("axis", [-1, 0])
def test_the_kernel_first_is_the_same_product(rows: tuple[int, int], dtype: str, axis: int) -> None:
    kernel, x = normal(0, 48, 16, dtype=dtype), normal(1, *rows, 16)
    expected = np.moveaxis(np.asarray(matmul(x, kernel.T)), -1, 0)
    found = jax.jit(lambda k, x: kernel_first(k, x, axis, x.dtype))(kernel, jnp.moveaxis(x, -1, axis))
    assert found.dtype == x.dtype
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
