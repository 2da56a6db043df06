"""Checkpoints: everything needed to continue bit for bit, and nothing of the frozen base.

A step's folder appears under its name once all of it is written (Orbax). What is read back is held against the configuration
(names, shapes, dtypes) and against checksums of the values that were saved. A step that is damaged is put aside, and
training goes on from the one before.
"""

from __future__ import annotations

import json
import shutil
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils
from jaxtyping import Array, UInt32
from orbax.checkpoint.checkpoint_managers import AnyPreservationPolicy, BestN, LatestN

from qaperso import arrays, storage
from qaperso.errors import UserError
from qaperso.mesh import host_copy
from qaperso.step import TrainState

Tree = Any
METRIC = "dev_nll"
ITEMS = ("trainable", "optimizer", "memory", "data")
CHECKSUMS = "checksums"
# Seconds of waiting for the save before, from which on storage is called slow.
SLOW_SECONDS = 10.0


class Damaged(Exception):
    """A checkpoint is not what was saved."""


def _open(folder: Path, keep_latest: int = 1, keep_best: int = 1, read_only: bool = False) -> ocp.CheckpointManager:
    # best_fn alone would evict the newest checkpoint, so the policy decides what is kept: the newest and the best. But
    # without best_fn metrics are not written at all.
    def score(found: Mapping[str, float]) -> float:
        return found[METRIC]

    best = BestN(get_metric_fn=score, reverse=True, n=keep_best, keep_checkpoints_without_metrics=False)
    policy = AnyPreservationPolicy([LatestN(keep_latest), best])
    options = ocp.CheckpointManagerOptions(
        best_fn=score,
        best_mode="min",
        preservation_policy=None if read_only else policy,
        cleanup_tmp_directories=not read_only,
        read_only=read_only,
        create=not read_only,
    )
    return ocp.CheckpointManager(folder.absolute(), options=options, item_names=ITEMS)


def _items(state: TrainState) -> dict[str, Tree]:
    progress = {"optimizer": state.optimizer, "largest": state.largest, "skipped": state.skipped, "step": state.step}
    return {"trainable": state.trainable, "optimizer": progress, "memory": state.memory}


class Writer:
    """Saves a run's states asynchronously; keeps the latest ones and those best on dev.

    Entered, it is closed at the end and by a UserError, which all hosts come to at the same step. Other errors leave it: they
    may be one host's, and closing would wait for the others.
    """

    def __init__(self, folder: Path, keep_latest: int, keep_best: int):
        self._manager = _open(folder, keep_latest, keep_best)
        self._folder = folder
        self._saving: int | None = None

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: Any) -> None:
        if kind is None or issubclass(kind, UserError):
            self.close()

    def latest(self) -> int | None:
        """Step of the newest complete checkpoint."""
        return self._manager.latest_step()

    def save(self, step: int, state: TrainState, metrics: Mapping[str, float] | None) -> None:
        """Starts saving; a step that is already there is left alone. Waits for the save before, and says so where it is long."""
        start = time.monotonic()
        self._manager.wait_until_finished()
        waited = time.monotonic() - start
        if self._saving is not None and waited > SLOW_SECONDS and jax.process_index() == 0:
            print(
                f"training stood still for {waited:.0f} s until checkpoint {self._saving} was written: {self._folder} is slow; "
                "raise checkpoint_every, or give a --workdir on a faster disk",
                file=sys.stderr,
            )
        if step in self._manager.all_steps():
            return
        items = {name: tree for name, tree in _items(state).items() if jax.tree.leaves(tree)}
        saved = {name: ocp.args.StandardSave(tree) for name, tree in items.items()}
        data = ocp.args.JsonSave({"step": step, CHECKSUMS: checksums(items)})
        # force: the caller decides when; otherwise orbax would skip steps it has not been told of.
        self._manager.save(step, args=ocp.args.Composite(**saved, data=data), metrics=metrics, force=True)
        self._saving = step

    def restore(self, state: TrainState) -> tuple[TrainState, int]:
        """The state of the newest checkpoint that is whole, and its step; the given state and 0 where there is none.

        Newer ones that are damaged are put aside, as `damaged_STEP` beside the checkpoints.

        Args:
          state: has the shapes, dtypes and shardings that are wanted.

        Raises:
          UserError: no checkpoint is whole, or they are of another configuration.
        """
        damaged: dict[int, Damaged] = {}
        for step in sorted(self._manager.all_steps(), reverse=True):
            try:
                found = state_of(self._folder, step, state)
            except Damaged as error:
                damaged[step] = error
                continue
            for bad, error in damaged.items():
                self._put_aside(bad, error, step)
            return found, step
        if damaged:
            step, error = next(iter(damaged.items()))
            raise UserError(
                f"{self._folder}: none of the {len(damaged)} checkpoints is whole (the newest: {error}); bring a copy back, or "
                "give another --workdir to start anew"
            )
        return state, 0

    def _put_aside(self, step: int, error: Damaged, instead: int) -> None:
        place = self._folder.parent / f"damaged_{step}"
        if jax.process_index() == 0:
            print(f"{error}; put aside as {place}, going on from checkpoint {instead}", file=sys.stderr)
            shutil.rmtree(place, ignore_errors=True)
            (self._folder / str(step)).rename(place)
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices(f"put aside {step}")
        self._manager.reload()

    def close(self) -> None:
        """Waits for saves under way."""
        self._manager.wait_until_finished()
        self._manager.close()


def state_of(folder: Path, step: int, state: TrainState) -> TrainState:
    """One checkpoint's state, shaped and sharded like the given (abstract) one.

    Raises:
      UserError: it is of another configuration.
      Damaged: it is not what was saved.
    """
    items = _read(folder / str(step), _items(state), f"checkpoint {step}")
    return TrainState(trainable=items["trainable"], memory=items["memory"], **items["optimizer"])


def checksums(tree: Tree) -> dict[str, str]:
    """A number for each leaf, as 16 hexadecimal digits, which depends on its values and their places but not on shards.

    So what one mesh saved can be checked on any other. Leaves have elements of at most four bytes.
    """
    found = host_copy(_checksums(dict(arrays.flat(tree))))
    return {name: "".join(f"{int(part):08x}" for part in x) for name, x in found.items()}


@jax.jit
def _checksums(leaves: dict[str, Array]) -> dict[str, Array]:
    """All of them in one program. One for each leaf would have many under way at a time, each with sums over all devices,
    in which XLA's CPU back end hangs where several processes have several devices each."""
    return {name: _checksum(x) for name, x in leaves.items()}


def _checksum(x: Array) -> UInt32[Array, " 2"]:
    """Two sums modulo 2**32 over mixed elements; integer sums do not depend on their order (ours)."""
    if x.dtype == bool:
        bits = x.astype(jnp.uint32)
    else:
        bits = jax.lax.bitcast_convert_type(x, jnp.dtype(f"uint{8 * x.dtype.itemsize}")).astype(jnp.uint32)
    place = jnp.zeros(x.shape, jnp.uint32)
    for axis, size in enumerate(x.shape):
        place = place * jnp.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis)
    salts = (0x3C6EF372, 0xA54FF53A)
    return jnp.stack([_mix(_mix(place ^ jnp.uint32(salt)) ^ bits).sum(dtype=jnp.uint32) for salt in salts])


def _mix(x: Array) -> Array:
    """A bijection of 32 bits in which each bit of the input changes half of the output's: lowbias32 of C. Wellons' search
    for such functions, "Prospecting for Hash Functions" (2018)."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x7FEB352D)
    x = (x ^ (x >> 15)) * jnp.uint32(0x846CA68B)
    return x ^ (x >> 16)


def _read(folder: Path, items: Mapping[str, Tree], what: str) -> dict[str, Tree]:
    """Items of a checkpoint, shaped and sharded like the given (abstract) trees; checked. An item without leaves stays as it is.

    Args:
      folder: of the step.
      items: what is wanted.
      what: the checkpoint's name in errors.

    Raises:
      UserError: the configuration declares something else than was saved.
      Damaged: a part is missing, cannot be read, or is not what was saved; on all hosts where one says so.
    """
    wanted = {name: tree for name, tree in items.items() if jax.tree.leaves(tree)}
    problem, found = "", {}
    # Handlers instead of the manager's restore, which has the hosts wait for each other: where one fails, the others would
    # wait for ever.
    try:
        expected = ocp.JsonCheckpointHandler().restore(folder.absolute() / "data").get(CHECKSUMS, {})
        for name, tree in wanted.items():
            _compare(folder.absolute() / name, tree, f"{what}, {name}")
            reader = ocp.StandardCheckpointHandler()
            found[name] = reader.restore(folder.absolute() / name, args=ocp.args.StandardRestore(_abstract(tree)))
    except (OSError, ValueError, KeyError, TypeError) as error:
        if storage.refusal(error):
            raise
        problem = " ".join(str(error).split())[:300] or type(error).__name__
    if not _everywhere(not problem):
        raise Damaged(f"{what} is damaged: {problem or 'another host cannot read it'}")
    # Checkpoints of earlier versions have no checksums.
    for name, value in checksums(found).items() if expected else ():
        if expected.get(name) != value:
            raise Damaged(
                f"{what} is damaged: '{name}' is not what was saved (checksum {value}, was {expected.get(name)})"
            )
    return {name: found.get(name, tree) for name, tree in items.items()}


def _everywhere(flag: bool) -> bool:
    """Whether all hosts say so."""
    if jax.process_count() == 1:
        return flag
    return bool(multihost_utils.process_allgather(np.asarray(flag, np.int32)).all())


def _abstract(tree: Tree) -> Tree:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=getattr(x, "sharding", None)), tree)


def _compare(folder: Path, tree: Tree, what: str) -> None:
    """Orbax restores what it finds: compare names, shapes and dtypes first."""
    metadata = ocp.StandardCheckpointHandler().metadata(folder)
    found = {k: (tuple(v.shape), str(v.dtype)) for k, v in arrays.flat(getattr(metadata, "tree", metadata)).items()}
    expected = {k: (tuple(v.shape), str(v.dtype)) for k, v in arrays.flat(tree).items()}
    for name in sorted(set(found) | set(expected)):
        if found.get(name) != expected.get(name):
            raise UserError(
                f"{what}: '{name}' is {found.get(name, 'absent')}, the configuration declares "
                f"{expected.get(name, 'no such array')}; use the configuration the run was made with"
            )


def steps(folder: Path) -> dict[int, float | None]:
    """Steps of complete checkpoints with their dev metric, None where not validated."""
    if not folder.is_dir():
        return {}
    with _open(folder, read_only=True) as manager:
        return {s: (manager.metrics(s) or {}).get(METRIC) for s in manager.all_steps()}


def choose(folder: Path) -> int:
    """The step best on dev; the latest where none was validated.

    Raises:
      UserError: there is no complete checkpoint.
    """
    found = steps(folder)
    if not found:
        raise UserError(f"'{folder}' holds no complete checkpoint; train the run first")
    validated = {s: m for s, m in found.items() if m is not None}
    return min(validated, key=lambda s: (validated[s], s)) if validated else max(found)


def load_trainable(folder: Path, step: int, trainable: Tree, memory: Tree) -> tuple[Tree, Tree]:
    """Trainable and memory trees of a step, shaped and sharded like the given (abstract) trees.

    Raises:
      UserError: the step is damaged, or of another configuration.
    """
    items = {"trainable": trainable, "memory": memory}
    if not jax.tree.leaves(items):
        return trainable, memory
    try:
        found = _read(folder / str(step), items, f"checkpoint {step}")
    except Damaged as error:
        raise UserError(
            f"{error}; bring a copy of {folder / str(step)} back, or move it away to use another step"
        ) from error
    return found["trainable"], found["memory"]


def write_json(path: Path, data: Any) -> None:
    """Writes a file whole or not at all."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(data, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    partial.replace(path)
