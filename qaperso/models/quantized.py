"""Frozen kernels kept in 8 or 4 bits, and made plain a layer at a time (QLoRA; Dettmers et al., arXiv 2305.14314).

Only the seven projections of the layers are quantised, as `qwix` does it: "int8" with one scale for each output channel,
"nf4" (16 levels, quantiles of a normal distribution) with one for each block of inputs of an output channel. Norms and
biases are few. The embedding and the output table stay as they are: each step takes the whole output table for its logits,
outside the scan over layers, so that it would be made plain as a whole and save nothing where memory is short.

A `Quantized` stands in the tree of parameters where the kernel would. `qwix.QArray` is not kept: its way back from nf4
flattens the array, which few shardings survive, and looks levels up, which TPUs do one by one; and its uint4 takes a byte a
value wherever JAX does not lay it out anew, so that two are one byte here.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Float

from qaperso.arrays import ArraySpec, Index, placed
from qaperso.errors import UserError
from qaperso.models.lora import TARGETS

Tree = Any
# Inputs that share a scale of nf4 (section 4 there), and the fewest that still save anything worth having.
BLOCK, SMALLEST = 64, 16
# Levels of nf4 (appendix E there).
NF4 = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635),
    *(-0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725),
    *(0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)


@flax.struct.dataclass
class Quantized:
    """A kernel, or a stack of them, in fewer bits; also its declaration or its shardings.

    Attributes:
      values: int8[..., I, O], or uint8[..., I / 2, O], indices into `NF4`: of input 2i in the lower, 2i + 1 in the upper half.
      scale: float32[..., N, O], of I / N inputs each (int8: N = 1); a kernel is level x scale.
      dtype: of the kernel that it stands for.
    """

    values: Any
    scale: Any
    dtype: Any = flax.struct.field(pytree_node=False)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the kernel."""
        *lead, inputs, outputs = self.values.shape
        return *lead, inputs * (1 + (self.values.dtype == jnp.uint8)), outputs

    @property
    def size(self) -> int:
        """Values of the kernel."""
        return math.prod(self.shape)

    def astype(self, dtype: Any) -> Quantized:
        """The same kernel, to be made plain in another dtype."""
        return self.replace(dtype=jnp.dtype(dtype))


def is_quantized(x: Any) -> bool:
    """Whether x is a quantised kernel."""
    return isinstance(x, Quantized)


def leaves(tree: Tree) -> list[Any]:
    """Leaves of a tree, of which a quantised kernel is one."""
    return jax.tree.leaves(tree, is_leaf=is_quantized)


def declare(specs: Tree, kind: str) -> Tree:
    """Declarations of a decoder with quantised kernels; a scale is spread as its kernel is, where it can be.

    Args:
      specs: see `decoder.declare`.
      kind: "int8", "nf4", or "" for the declarations as they are.

    Raises:
      UserError: a kernel's inputs do not come in blocks.
    """
    if not kind:
        return specs

    def one(name: str, spec: ArraySpec) -> Quantized:
        stack, inputs, outputs = spec.shape
        blocks = inputs // _block(inputs) if kind == "nf4" else 1
        if kind == "nf4" and inputs // blocks < SMALLEST:
            raise UserError(
                f"config.quantize='nf4' scales blocks of {SMALLEST} inputs or more, {BLOCK} where they divide; the base's "
                f"'{name}' has {inputs}: choose 'int8' or another base"
            )
        values = ArraySpec(spec.shape, spec.axes, dtype=jnp.int8)
        if kind == "nf4":
            values = ArraySpec((stack, inputs // 2, outputs), spec.axes, dtype=jnp.uint8)
        axes = (spec.axes[0], spec.axes[1] if kind == "nf4" else None, spec.axes[2])
        return Quantized(values, ArraySpec((stack, blocks, outputs), axes, "ones"), jnp.dtype(spec.dtype))

    kernels = {name: one(name, specs["layers"][name]) for name in TARGETS}
    return {**specs, "layers": {**specs["layers"], **kernels}}


def _block(inputs: int) -> int:
    return math.gcd(inputs, BLOCK)


def quantize(kernel: Float[Array, "*N I O"], kind: str) -> Quantized:
    """The nearest levels under scales that the largest magnitudes set.

    Args:
      kernel: or several.
      kind: "int8" or "nf4".
    """
    # Takes most of a second to import, which whoever has a plain base need not wait for.
    import qwix

    inputs = kernel.ndim - 2
    how = {"channelwise_axes": tuple(axis for axis in range(kernel.ndim) if axis != inputs)}
    how |= {"tiled_axes": {inputs: _block(kernel.shape[inputs])}} if kind == "nf4" else {}
    found = qwix.quantize(kernel.astype(jnp.float32), {"int8": jnp.int8, "nf4": "nf4"}[kind], **how)
    values = found.qvalue
    if kind == "nf4":
        halves = values.astype(jnp.uint8).reshape(*values.shape[:-2], -1, 2, values.shape[-1])
        values = halves[..., 0, :] | halves[..., 1, :] << 4
    return Quantized(values, found.scale, jnp.dtype(kernel.dtype))


def filled(spec: Quantized, place: Quantized | None, read: Callable[[int, Index], np.ndarray]) -> Quantized:
    """A stack whose kernels are put on the devices one after the other, quantised there and written into it.

    The host has one shard of one plain kernel at a time, the devices one plain kernel beside the stack.

    Args:
      spec: the stack's declaration.
      place: its shardings; None = the default device.
      read: gives what lies between bounds of a layer's kernel.
    """
    beside = None if place is None else NamedSharding(place.values.mesh, PartitionSpec(*place.values.spec[1:]))
    stack = jax.jit(lambda: jax.tree.map(lambda one: jnp.zeros(one.shape, one.dtype), spec), out_shardings=place)()
    put = _writer(place)
    for layer in range(spec.shape[0]):
        kernel = placed(functools.partial(read, layer), spec.shape[1:], beside)
        stack = jax.block_until_ready(put(stack, kernel, layer))
    return stack


# Kernels of one shape and place share a program.
@functools.cache
def _writer(place: Quantized | None) -> Callable:
    return jax.jit(_put, donate_argnums=0, out_shardings=place)


def _put(stack: Quantized, kernel: Array, layer: Array) -> Quantized:
    one = quantize(kernel, "nf4" if stack.values.dtype == jnp.uint8 else "int8").astype(stack.dtype)
    return jax.tree.map(lambda old, new: jax.lax.dynamic_update_index_in_dim(old, new, layer, 0), stack, one)


def compress(params: Tree, kind: str, place: Tree = None) -> Tree:
    """A decoder's parameters with quantised kernels, one layer's at a time.

    Args:
      params: see `decoder.declare`.
      kind: see `declare`.
      place: shardings of what `declare` declares; None leaves them to the compiler.
    """
    if not kind:
        return params

    def stacks(kernels: Tree) -> Tree:
        return {name: jax.lax.map(functools.partial(quantize, kind=kind), x) for name, x in kernels.items()}

    where = None if place is None else {name: place["layers"][name] for name in TARGETS}
    found = jax.jit(stacks, out_shardings=where)({name: params["layers"][name] for name in TARGETS})
    return {**params, "layers": {**params["layers"], **found}}


def plain(tree: Tree) -> Tree:
    """The tree with every quantised kernel as the array that it stands for."""
    return jax.tree.map(lambda x: dequantize(x) if is_quantized(x) else x, tree, is_leaf=is_quantized)


# Operation by operation, as outside of other programs, it would keep several copies of a stack.
@jax.jit
def dequantize(kernel: Quantized) -> Float[Array, "*N I O"]:
    """The kernel as a plain array; products in float32, rounded to `dtype`."""
    values, (*lead, inputs, outputs) = kernel.values, kernel.shape
    blocks = kernel.scale.shape[-2]
    if values.dtype == jnp.uint8:
        level = jnp.stack([_levels(values), _levels(values >> 4)], -2)
    else:
        level = values.astype(jnp.float32)
    wide = level.reshape(*lead, blocks, inputs // blocks, outputs) * kernel.scale[..., None, :]
    return wide.reshape(kernel.shape).astype(kernel.dtype)


def _levels(index: Array) -> Float[Array, "*N"]:
    """`NF4[index % 16]` by halving the table at each bit: arithmetic that vectorises, where TPUs look elements up one by one."""
    found = list(NF4)
    for bit in range(4):
        odd = (index >> bit) & 1 == 1
        found = [jnp.where(odd, b, a).astype(jnp.float32) for a, b in zip(found[::2], found[1::2], strict=True)]
    return found[0]
