"""Takes one querier out of a run's checkpoints: their row, its optimiser moments, the prototypes of their classes.

Every other number stays bit for bit, which is checked before the new checkpoints take the place of the old ones. That is done by
renaming folders; `mend` finishes what a kill in between left.
"""

from __future__ import annotations

import functools
import hashlib
import shutil
from collections.abc import Collection
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qaperso import arrays, checkpoint, losses, step
from qaperso.data import prepared
from qaperso.run import CHECKPOINTS, Run, declare
from qaperso.step import TrainState
from qaperso.types import STRANGER

Tree = Any
# Beside the checkpoints while they are written anew: not whole yet; whole; and the old ones.
PARTIAL, NEW, OLD = (f"{CHECKPOINTS}.{name}" for name in ("partial", "new", "old"))


def erase(state: TrainState, row: int, classes: Collection[int]) -> TrainState:
    """The state without what belongs to one querier.

    Args:
      state: of training.
      row: of the querier; it becomes the stranger's.
      classes: numbers of the classes of the querier, whose prototypes become empty.

    Returns:
      The state; the optimiser's moments of the row are 0. Of a method without rows or prototypes it is the same.
    """

    def moments(path: tuple, x: Any) -> Any:
        # Adam's two moments have the shape of what they belong to, the table.
        return x.at[row].set(0) if arrays.path_name(path).endswith("tower/rows") and x.ndim == 2 else x

    trainable, memory = state.trainable, state.memory
    if "rows" in trainable.get("tower", {}):
        table = trainable["tower"]["rows"]
        trainable = {**trainable, "tower": {**trainable["tower"], "rows": table.at[row].set(table[STRANGER])}}
    if "prototypes" in memory and classes:
        chosen = np.array(sorted(classes), np.int32)
        memory = {**memory, "prototypes": losses.clear_memory(memory["prototypes"], chosen)}
    optimizer = jax.tree_util.tree_map_with_path(moments, state.optimizer)
    return state.replace(trainable=trainable, memory=memory, optimizer=optimizer)


def digest_of_others(state: TrainState, row: int, classes: Collection[int]) -> str:
    """sha256 of every number of a state that `erase` is to leave alone."""
    digest = hashlib.sha256()
    for name, leaf in sorted(arrays.flat(state).items()):
        value, axis = np.asarray(leaf), None
        if name.endswith("tower/rows") and value.ndim == 2:
            value = np.delete(value, row, 0)
        elif "prototypes/" in name:
            axis = 0 if name.endswith(("counts", "written")) else 1
            value = np.delete(value, sorted(classes), axis)
        digest.update(f"{name} {value.dtype} {value.shape}\n".encode())
        digest.update(np.ascontiguousarray(value).tobytes())
    return digest.hexdigest()


def abstract_state(run: Run) -> TrainState:
    """Shapes and shardings of the run's training state."""

    def like(specs: Tree) -> Tree:
        place = arrays.shardings(specs, run.mesh, run.config.sharding)
        return jax.tree.map(
            lambda s, p: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=p), arrays.abstract(specs), place
        )

    trainable, memory = map(like, declare(run))
    optimizer, _ = step.make_optimizer(run.config, run.config.steps)
    spread = step.state_shardings(optimizer, trainable, memory, run.mesh)
    shape = jax.eval_shape(functools.partial(step.init_state, optimizer), trainable, memory)
    return jax.tree.map(lambda s, p: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=p), shape, spread)


def rewrite(run: Run, row: int, classes: Collection[int]) -> dict[int, str]:
    """Writes all of the run's checkpoints anew without one querier, and puts them in the place of the old ones.

    Returns:
      {step: `digest_of_others`, the same before and after}.

    Raises:
      RuntimeError: a number of somebody else's changed; the old checkpoints are still in place.
    """
    folder = run.workdir
    mend(folder)
    metrics, like, others = checkpoint.steps(folder / CHECKPOINTS), abstract_state(run), {}
    new = checkpoint.Writer(folder / PARTIAL, len(metrics), 0)
    for number, nll in sorted(metrics.items()):
        state = checkpoint.state_of(folder / CHECKPOINTS, number, like)
        others[number] = digest_of_others(state, row, classes)
        new.save(number, erase(state, row, classes), None if nll is None else {checkpoint.METRIC: nll})
    new.close()
    for number, before in others.items():
        state = checkpoint.state_of(folder / PARTIAL, number, like)
        if digest_of_others(state, row, classes) != before or not _is_gone(state, row):
            raise RuntimeError(f"{folder / PARTIAL}: checkpoint {number} did not come back as it was written")
    (folder / PARTIAL).rename(folder / NEW)
    (folder / CHECKPOINTS).rename(folder / OLD)
    mend(folder)
    # What was put aside as damaged may still hold the row.
    for damaged in folder.glob("damaged_*"):
        shutil.rmtree(damaged)
    return others


def _is_gone(state: TrainState, row: int) -> bool:
    table = state.trainable.get("tower", {}).get("rows")
    return table is None or bool(jnp.array_equal(table[row], table[STRANGER]))


def mend(folder: Path) -> None:
    """Finishes or undoes an exchange of checkpoints that was cut off; to be called before they are read for `rewrite`."""
    if (folder / NEW).exists() and not (folder / CHECKPOINTS).exists():
        (folder / NEW).rename(folder / CHECKPOINTS)
    for left in (PARTIAL, NEW, OLD):
        if (folder / left).exists():
            shutil.rmtree(folder / left)


def digests(folder: Path) -> dict[str, str]:
    """{path within the folder: sha256} of all its files."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): prepared.digest(path) for path in sorted(files)}
