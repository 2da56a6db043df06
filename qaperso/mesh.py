"""The device mesh and how arrays get onto it."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import logging
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from qaperso.arrays import BATCH_AXES
from qaperso.errors import UserError

Tree = Any
AXES = ("data", "fsdp", "tensor")


def make_mesh(data: int, fsdp: int, tensor: int) -> Mesh:
    """Mesh ("data", "fsdp", "tensor") over all devices; one size may be -1 = whatever is left.

    Raises:
      UserError: the sizes do not multiply to the number of devices.
    """
    sizes, devices = [data, fsdp, tensor], len(jax.devices())
    if sizes.count(-1) == 1:
        known = math.prod(s for s in sizes if s != -1)
        if known > 0 and devices % known == 0:
            sizes[sizes.index(-1)] = devices // known
    if min(sizes) < 1 or math.prod(sizes) != devices:
        raise UserError(
            f"config.mesh data={data} fsdp={fsdp} tensor={tensor} does not make {devices} devices; "
            "sizes must multiply to that number, one may be -1"
        )
    # Auto: the compiler propagates shardings; make_mesh's default, Explicit, would reject e @ e.T on sharded batches.
    return jax.make_mesh(tuple(sizes), AXES, axis_types=(AxisType.Auto,) * 3)


def batch_sharding(mesh: Mesh, axis: int) -> NamedSharding:
    """Dimension `axis` spread over data x fsdp."""
    return NamedSharding(mesh, PartitionSpec(*[None] * axis, BATCH_AXES))


def put_batch(batch: Tree, mesh: Mesh, axis: int) -> Tree:
    """A host's copy of the whole batch becomes global arrays; each device gets its rows only.

    Args:
      batch: numpy leaves, equal on every host.
      mesh: of the run.
      axis: the dimension of rows (1 under micro-batches).
    """
    sharding = batch_sharding(mesh, axis)
    size = math.prod(mesh.shape[a] for a in BATCH_AXES)

    def leaf(x: np.ndarray) -> jax.Array:
        # Small leaves that do not divide are whole everywhere.
        target = sharding if x.shape[axis] % size == 0 else NamedSharding(mesh, PartitionSpec())
        return jax.make_array_from_callback(x.shape, target, lambda index: x[index])

    return jax.tree.map(leaf, batch)


def host_copy(tree: Tree) -> Tree:
    """Numpy copies of (fully addressable or replicated) arrays."""
    return jax.tree.map(np.asarray, tree)


def start_runtime() -> None:
    """Joins the other processes where a launcher set a coordinator's address, and switches the compile cache on."""
    logging.set_verbosity(logging.ERROR)  # Orbax warns of every folder that it opens to read
    if "JAX_COORDINATOR_ADDRESS" in os.environ:
        jax.distributed.initialize(
            num_processes=int(os.environ["JAX_NUM_PROCESSES"]), process_id=int(os.environ["JAX_PROCESS_ID"])
        )
    if not jax.config.jax_compilation_cache_dir:
        home = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
        jax.config.update("jax_compilation_cache_dir", str(home / "qaperso" / "xla"))
