"""The device mesh and how arrays get onto it."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import logging
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from qaperso.arrays import BATCH_AXES
from qaperso.errors import UserError

Tree = Any
AXES = ("data", "fsdp", "tensor")
# How long a process may be silent until the others give it up. Threads of their own report, so compiling does not count.
HEARTBEAT_SECONDS = 30
# Bytes of an array that are gathered from all hosts at a time.
PART = 2**28


def make_mesh(data: int, fsdp: int, tensor: int, devices: Sequence[Any] | None = None) -> Mesh:
    """Mesh ("data", "fsdp", "tensor") over all devices, or those given; one size may be -1 = whatever is left.

    Raises:
      UserError: the sizes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    sizes, count = [data, fsdp, tensor], len(devices)
    if sizes.count(-1) == 1:
        known = math.prod(s for s in sizes if s != -1)
        if known > 0 and count % known == 0:
            sizes[sizes.index(-1)] = count // known
    if min(sizes) < 1 or math.prod(sizes) != count:
        raise UserError(
            f"config.mesh data={data} fsdp={fsdp} tensor={tensor} does not make {count} devices; "
            "sizes must multiply to that number, one may be -1"
        )
    # Auto: the compiler propagates shardings; make_mesh's default, Explicit, would reject e @ e.T on sharded batches.
    return jax.make_mesh(tuple(sizes), AXES, axis_types=(AxisType.Auto,) * 3, devices=devices)


def mesh_over(sizes: Any, devices: Sequence[Any] | None = None) -> Mesh:
    """The mesh of a configuration over whatever devices there are now, all of them or those given.

    Where its sizes do not make them, parameters stay spread as they were: as much of `tensor` as divides the number; of the
    rest what is a power of two, by which arrays divide, to `fsdp` where the configuration spreads over it; else to `data`.

    Args:
      sizes: config.mesh.
      devices: to lay out.
    """
    devices = jax.devices() if devices is None else devices
    try:
        return make_mesh(sizes.data, sizes.fsdp, sizes.tensor, devices)
    except UserError:
        tensor = math.gcd(max(sizes.tensor, 1), len(devices))
        rest = len(devices) // tensor
        fsdp = rest & -rest if sizes.fsdp != 1 else 1
        return make_mesh(rest // fsdp, fsdp, tensor, devices)


def batch_sharding(mesh: Mesh, axis: int, size: int) -> NamedSharding:
    """Dimension `axis` of that size spread over data x fsdp; small arrays that do not divide are whole everywhere."""
    if size % math.prod(mesh.shape[a] for a in BATCH_AXES):
        return NamedSharding(mesh, PartitionSpec())
    return NamedSharding(mesh, PartitionSpec(*[None] * axis, BATCH_AXES))


def put_batch(batch: Tree, mesh: Mesh, axis: int) -> Tree:
    """A host's copy of the whole batch becomes global arrays; each device gets its rows only.

    Args:
      batch: numpy leaves, equal on every host.
      mesh: of the run.
      axis: the dimension of rows (1 under micro-batches).
    """

    def leaf(x: np.ndarray) -> jax.Array:
        target = batch_sharding(mesh, axis, x.shape[axis])
        return jax.make_array_from_callback(x.shape, target, lambda index: x[index])

    return jax.tree.map(leaf, batch)


def host_copy(tree: Tree) -> Tree:
    """Numpy copies. What is scattered over hosts is gathered a part at a time, for which all of them must ask.

    A part is whole on each device for a moment: PART bytes, or one entry of the first dimension, such as a layer.
    """

    def leaf(x: Any) -> np.ndarray:
        if not isinstance(x, jax.Array) or x.is_fully_addressable or x.is_fully_replicated:
            return np.asarray(x)
        size = max(1, PART * x.shape[0] // x.nbytes) if x.nbytes > PART else len(x)
        parts = [x[i : i + size] for i in range(0, len(x), size)] if size < len(x) else [x]
        return np.concatenate([multihost_utils.process_allgather(part, tiled=True) for part in parts])

    return jax.tree.map(leaf, tree)


def told(data: bytes) -> bytes:
    """What the first process says, on all of them, which must ask together: files may be read at different moments."""
    if jax.process_count() == 1:
        return data
    size = multihost_utils.broadcast_one_to_all(np.asarray(len(data), np.int32))
    mine = np.frombuffer(data, np.uint8) if jax.process_index() == 0 else np.zeros(int(size), np.uint8)
    return np.asarray(multihost_utils.broadcast_one_to_all(mine)).tobytes()


def start_runtime(alone: bool = False) -> None:
    """Joins the other processes where there are any, and switches the compile cache on.

    A launcher says who they are (`JAX_COORDINATOR_ADDRESS`, `JAX_NUM_PROCESSES`, `JAX_PROCESS_ID`, see `qaperso.launch`), or
    only that there are some (`QAPERSO_DISTRIBUTED=1`), and JAX asks the machine: Cloud TPU slices, GKE and SLURM know.

    Args:
      alone: the command is one of a single process.

    Raises:
      UserError: those variables are not all there, or are no numbers; or they are, and the command wants to be alone.
    """
    logging.set_verbosity(logging.ERROR)  # Orbax warns of every folder that it opens to read
    named = "JAX_COORDINATOR_ADDRESS" in os.environ
    if named or os.environ.get("QAPERSO_DISTRIBUTED") == "1":
        if alone:
            variable = "JAX_COORDINATOR_ADDRESS" if named else "QAPERSO_DISTRIBUTED"
            raise UserError(f"{variable} is set, but this command is one process; start it once, without that variable")
        # JAX's own listener would swallow a SIGTERM that comes before training listens.
        jax.config.update("jax_enable_preemption_service", False)
        who = _who() if named else {}
        jax.distributed.initialize(heartbeat_timeout_seconds=HEARTBEAT_SECONDS, **who)
    if not jax.config.jax_compilation_cache_dir:
        home = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
        jax.config.update("jax_compilation_cache_dir", str(home / "qaperso" / "xla"))


def _who() -> dict[str, int]:
    """How many processes there are and which of them this is."""
    found = {}
    for name, variable in (("num_processes", "JAX_NUM_PROCESSES"), ("process_id", "JAX_PROCESS_ID")):
        text = os.environ.get(variable, "")
        if not text.isdecimal():
            raise UserError(
                f"JAX_COORDINATOR_ADDRESS is set, but {variable} is '{text}', expected a number; start processes with "
                "python -m qaperso.launch"
            )
        found[name] = int(text)
    return found
