"""Array declarations: shape, dtype, logical axes and initialiser in one place.

Shapes, shardings and initial values of every parameter all come from its one declaration (ours; the idea of a single
declaration per array is common practice in JAX code).
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from qaperso.errors import UserError

Tree = Any
Rules = Sequence[tuple[str, str | None]]
Index = tuple[slice, ...]


@dataclasses.dataclass(frozen=True)
class ArraySpec:
    """Declares one array.

    Attributes:
      shape: dimensions.
      axes: a logical name for each dimension, None = never sharded.
      init: "zeros", "ones", or the standard deviation of a normal distribution.
      dtype: element type.
    """

    shape: tuple[int, ...]
    axes: tuple[str | None, ...]
    init: str | float = "zeros"
    dtype: Any = jnp.float32

    def __post_init__(self):
        if len(self.shape) != len(self.axes):
            raise ValueError(f"shape {self.shape} and axes {self.axes} differ in rank")


def is_spec(x: Any) -> bool:
    """Whether x is a declaration (a leaf of a declaration tree)."""
    return isinstance(x, ArraySpec)


def fan_in(*dims: int) -> float:
    """Standard deviation 1 / sqrt(product of the input dimensions)."""
    return 1.0 / math.sqrt(math.prod(dims))


def path_name(path: tuple) -> str:
    """`layers/q` for a key path of jax.tree_util."""
    return "/".join(str(getattr(k, "key", getattr(k, "name", getattr(k, "idx", k)))) for k in path)


def map_specs(function: Callable[[str, ArraySpec], Any], specs: Tree) -> Tree:
    """Maps function(path, spec) over a tree of declarations."""
    return jax.tree_util.tree_map_with_path(lambda p, s: function(path_name(p), s), specs, is_leaf=is_spec)


def abstract(specs: Tree) -> Tree:
    """The declared tree as jax.ShapeDtypeStruct leaves."""
    return map_specs(lambda _, s: jax.ShapeDtypeStruct(s.shape, s.dtype), specs)


def initialise(specs: Tree, key: jax.Array) -> Tree:
    """Draws initial values. A leaf's value depends on the key and its own path only, not on its neighbours."""

    def leaf(path: str, spec: ArraySpec) -> jax.Array:
        if spec.init in ("zeros", "ones"):
            return jnp.full(spec.shape, 0 if spec.init == "zeros" else 1, spec.dtype)
        number = int.from_bytes(hashlib.sha256(path.encode()).digest()[:4], "little")
        draw = jax.random.normal(jax.random.fold_in(key, number), spec.shape, jnp.float32)
        return (draw * spec.init).astype(spec.dtype)

    return map_specs(leaf, specs)


def shardings(specs: Tree, mesh: Mesh, rules: Rules) -> Tree:
    """NamedShardings from rules of (regex, mesh axis).

    Each dimension is named `path:axis`; the first rule whose regex is found in that name gives its mesh axis. A
    dimension that the mesh axis does not divide, or whose mesh axis an earlier dimension took, stays whole. The parts of a
    quantised kernel go by the kernel's path.

    Raises:
      UserError: a rule names a mesh axis that does not exist, or is no regular expression.
    """
    for pattern, target in rules:
        if target is not None and target not in mesh.axis_names:
            raise UserError(f"sharding rule '{pattern}' names mesh axis '{target}'; the mesh has {mesh.axis_names}")
        try:
            re.compile(pattern)
        except re.error as error:
            raise UserError(f"sharding rule '{pattern}' is not a regular expression: {error}") from error

    def leaf(path: str, spec: ArraySpec) -> NamedSharding:
        taken: list[str | None] = []
        for size, axis in zip(spec.shape, spec.axes, strict=True):
            name = f"{path.removesuffix('/values').removesuffix('/scale')}:{axis}"
            target = None if axis is None else next((t for r, t in rules if re.search(r, name)), None)
            if target is None or target in taken or size % mesh.shape[target]:
                target = None
            taken.append(target)
        return NamedSharding(mesh, PartitionSpec(*taken))

    return map_specs(leaf, specs)


def placed(part: Callable[[Index], np.ndarray], shape: tuple[int, ...], place: NamedSharding | None) -> jax.Array:
    """An array whose parts are made and put on their devices one after the other: the host has one at a time.

    Args:
      part: makes what lies between bounds; asked once for each distinct part that is on a device of this process.
      shape: of the whole.
      place: where the parts go; None = the default device.
    """
    if place is None:
        return jax.block_until_ready(jnp.asarray(part(tuple(slice(0, size) for size in shape))))
    devices: dict[tuple, list] = {}
    for device, index in place.addressable_devices_indices_map(shape).items():
        bounds = tuple(one.indices(size)[:2] for one, size in zip(index, shape, strict=True))
        devices.setdefault(bounds, []).append(device)
    found = []
    for bounds, same in devices.items():
        host = part(tuple(slice(*one) for one in bounds))
        found += [jax.block_until_ready(jax.device_put(host, device)) for device in same]
        del host
        # JAX lets go of what it has copied at its next transfer, which would come when the next part is made already.
        jax.device_put(np.zeros((), np.float32), same[0])
    return jax.make_array_from_single_device_arrays(shape, place, found)


def tree_bytes(specs: Tree) -> int:
    """Bytes of all declared arrays."""
    leaves = jax.tree.leaves(specs, is_leaf=is_spec)
    return sum(math.prod(s.shape) * jnp.dtype(s.dtype).itemsize for s in leaves)


def flat(tree: Tree, is_leaf: Callable | None = None) -> Mapping[str, Any]:
    """{path: leaf} in key order."""
    leaves = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_leaf)[0]
    return {path_name(p): leaf for p, leaf in leaves}


BATCH_AXES = ("data", "fsdp")


def divides(mesh: Mesh | AbstractMesh, axes: Sequence[str], size: int) -> bool:
    """Whether a dimension can be spread evenly over these axes of a mesh."""
    return size % math.prod(mesh.shape[a] for a in axes) == 0


def platform() -> str:
    """What the program being traced is for: "cpu", "gpu" or "tpu"; the mesh in force says so, else JAX's default."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return device.platform if device is not None else jax.default_backend()


def constrain_batch(x: jax.Array, axis: int) -> jax.Array:
    """Keeps dimension `axis` of an activation spread over the batch axes of the mesh in force; no mesh, no effect."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or not divides(mesh, BATCH_AXES, x.shape[axis]):
        return x
    spec = [None] * x.ndim
    spec[axis] = BATCH_AXES
    return jax.lax.with_sharding_constraint(x, PartitionSpec(*spec))


def gather_table(table: jax.Array) -> jax.Array:
    """A table [V, D] whole on each device but for its rows, which stay spread over the mesh's tensor axis.

    Said once, outside the loop over predictions: in it the compiler would gather either the table for each chunk or the
    chunk's logits, whichever is smaller.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return table
    rows = "tensor" if divides(mesh, ("tensor",), table.shape[0]) else None
    return jax.lax.with_sharding_constraint(table, PartitionSpec(rows, None))


def gather_small(tree: Tree) -> Tree:
    """One layer's adapters, whole on each device: the compiler would rather send activations than gather these few."""
    if jax.sharding.get_abstract_mesh().empty:
        return tree
    return jax.tree.map(lambda x: jax.lax.with_sharding_constraint(x, PartitionSpec()), tree)


def in_turn(x: jax.Array, layer: Tree) -> tuple[jax.Array, Tree]:
    """A layer's input and its weights, neither to be touched before both are there.

    Where layers are arrays of their own and spread over fsdp, the compiler would gather all of them before the first, or, in a
    loop over tokens, before the loop: each device would hold the whole model.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.shape["fsdp"] == 1:
        return x, layer
    return jax.lax.optimization_barrier((x, layer))


# Logical names of dimensions that stay spread over the mesh's tensor axis while a layer computes.
WIDE = ("heads", "kv_heads", "mlp")


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def gather_kernel(x: jax.Array, axes: tuple[str | None, ...]) -> jax.Array:
    """A layer's array whole on each device, but for dimensions named in WIDE, which stay spread over the tensor axis.

    Left to itself the compiler hides the gathering behind products with the kernel's parts; on TPUs their float32 sums go
    through memory for every part. The gradient is not gathered.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return x
    spread = (
        "tensor" if a in WIDE and divides(mesh, ("tensor",), n) else None for a, n in zip(axes, x.shape, strict=True)
    )
    return jax.lax.with_sharding_constraint(x, PartitionSpec(*spread))


gather_kernel.defvjp(lambda x, axes: (gather_kernel(x, axes), None), lambda axes, _, d: (d,))
