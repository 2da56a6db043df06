"""Matrix products whose sums, forward and backward, are float32 whatever the operands are."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from qaperso.arrays import platform


def dot(a: Array, b: Array, contract: tuple, batch: tuple = ((), ()), dtype: Any = None) -> Array:
    """`lax.dot_general` with float32 sums, the result in `dtype` (float32 by default).

    The sums are asked for, not left to the compiler: XLA's CPU back end has fast bfloat16 kernels (AMX, AVX-512) for
    this form only; a product that gives bfloat16 at once runs slower than float32 (measured in docs/log.md).
    """
    found = jax.lax.dot_general(a, b, (contract, batch), preferred_element_type=jnp.float32)
    return found if dtype is None else found.astype(dtype)


def working(dtype: Any) -> Any:
    """Dtype of activations where kernels have `dtype`: the same, but float32 on CPUs.

    XLA's CPU back end has bfloat16 products and nothing else in bfloat16: it would convert before and after each sum, and
    whole stacks of layers to read one.
    """
    return jnp.dtype(jnp.float32 if platform() == "cpu" else dtype)


def bits(x: Array) -> Array:
    """A frozen bfloat16 array as uint16, to be sliced on CPUs without being converted first; others as they are."""
    plain = x.dtype != jnp.bfloat16 or platform() != "cpu"
    return x if plain else jax.lax.bitcast_convert_type(x, jnp.uint16)


def unbits(x: Array) -> Array:
    """The inverse of `bits`."""
    return jax.lax.bitcast_convert_type(x, jnp.bfloat16) if x.dtype == jnp.uint16 else x


def narrower(a: Array, b: Array) -> Any:
    """The dtype of the two that has fewer bits."""
    return min(a.dtype, b.dtype, key=lambda t: t.itemsize)


def product(a: Array, b: Array, contract: tuple, dtype: Any = None) -> Array:
    """`dot` in the narrower dtype of the two."""
    narrow = narrower(a, b)
    return dot(a.astype(narrow), b.astype(narrow), contract, dtype=dtype)


def kernel_first(kernel: Float[Array, "O I"], x: Array, axis: int, dtype: Any = None) -> Array:
    """A kernel's `product` with x, whose features lie at `axis`; the result's lie first, then x's other dimensions.

    So XLA's CPU back end multiplies a few rows faster, where nothing lets it turn the product round. A single row in bfloat16 takes
    it twice as long as two: it has no fast kernel for a vector (docs/log.md).
    """
    axis %= x.ndim
    if platform() != "cpu" or x.size > x.shape[axis] or narrower(kernel, x) != jnp.bfloat16:
        return product(kernel, x, ((1,), (axis,)), dtype)
    twice = jnp.concatenate([x, x], 0 if axis else 1)
    return jax.lax.optimization_barrier(product(kernel, twice, ((1,), (axis,)), dtype))[:, :1]


@jax.custom_vjp
def matmul(x: Float[Array, "... I"], kernel: Float[Array, "I O"]) -> Float[Array, "... O"]:
    """x @ kernel in the narrower dtype of the two, the result in x's.

    JAX's own gradient would multiply a float32 cotangent with a bfloat16 kernel, as float32. Here the backward pass
    multiplies in the same dtype as the forward pass, the kernel's gradient keeps float32 sums, and of its two factors
    the narrower is the one that is transposed: XLA's CPU back end transposes element by element, with whatever is fused
    into the factor.
    """
    return product(x, kernel, ((x.ndim - 1,), (0,)), x.dtype)


def _forward(x: Array, kernel: Array) -> tuple[Array, tuple[Array, Array]]:
    return matmul(x, kernel), (x, kernel)


def _backward(saved: tuple[Array, Array], d: Array) -> tuple[Array, Array]:
    x, kernel = saved
    last, lead = x.ndim - 1, tuple(range(x.ndim - 1))
    dx = product(d, kernel, ((last,), (1,)), x.dtype)
    if kernel.shape[0] <= kernel.shape[1]:
        return dx, product(x, d, (lead, lead), kernel.dtype)
    # Behind the barrier the compiler cannot turn the product round again.
    return dx, jax.lax.optimization_barrier(product(d, x, (lead, lead), kernel.dtype)).T


matmul.defvjp(_forward, _backward)
