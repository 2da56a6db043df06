"""Checkpoints: everything needed to continue bit for bit, and nothing of the frozen base."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import AnyPreservationPolicy, BestN, LatestN

from qaperso import arrays
from qaperso.errors import UserError
from qaperso.step import TrainState

Tree = Any
METRIC = "dev_nll"
ITEMS = ("trainable", "optimizer", "memory", "data")


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
    """Saves a run's states asynchronously; keeps the latest ones and those best on dev."""

    def __init__(self, folder: Path, keep_latest: int, keep_best: int):
        self._manager = _open(folder, keep_latest, keep_best)

    def latest(self) -> int | None:
        """Step of the newest complete checkpoint."""
        return self._manager.latest_step()

    def save(self, step: int, state: TrainState, metrics: Mapping[str, float] | None) -> None:
        """Starts saving; a step that is already there is left alone."""
        if step in self._manager.all_steps():
            return
        saved = {name: ocp.args.StandardSave(tree) for name, tree in _items(state).items() if jax.tree.leaves(tree)}
        data = ocp.args.JsonSave({"step": step})
        # force: the caller decides when; otherwise orbax would skip steps it has not been told of.
        self._manager.save(step, args=ocp.args.Composite(**saved, data=data), metrics=metrics, force=True)

    def restore(self, step: int, like: TrainState) -> TrainState:
        """The state saved at a step, on the devices and shardings of `like`."""
        return _restore(self._manager, step, like)

    def close(self) -> None:
        """Waits for saves under way."""
        self._manager.wait_until_finished()
        self._manager.close()


def _restore(manager: ocp.CheckpointManager, step: int, like: TrainState) -> TrainState:
    wanted = {name: tree for name, tree in _items(like).items() if jax.tree.leaves(tree)}
    for name, tree in wanted.items():
        _compare(manager.directory / str(step) / name, tree, f"checkpoint {step}, {name}")
    args = {name: ocp.args.StandardRestore(_abstract(tree)) for name, tree in wanted.items()}
    found = manager.restore(step, args=ocp.args.Composite(**args))
    progress = found["optimizer"]
    memory = found["memory"] if "memory" in wanted else like.memory
    return TrainState(
        progress["step"], found["trainable"], progress["optimizer"], memory, progress["largest"], progress["skipped"]
    )


def _abstract(tree: Tree) -> Tree:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=getattr(x, "sharding", None)), tree)


def _compare(folder: Any, tree: Tree, what: str) -> None:
    """Orbax restores what it finds: compare names, shapes and dtypes first."""
    with ocp.StandardCheckpointer() as reader:
        metadata = reader.metadata(folder).item_metadata
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
    """Trainable and memory trees of a step, shaped and sharded like the given (abstract) trees."""
    wanted = {"trainable": trainable, "memory": memory}
    wanted = {name: tree for name, tree in wanted.items() if jax.tree.leaves(tree)}
    if not wanted:
        return trainable, memory
    with _open(folder, read_only=True) as manager:
        for name, tree in wanted.items():
            _compare(manager.directory / str(step) / name, tree, f"checkpoint {step}, {name}")
        args = {name: ocp.args.StandardRestore(_abstract(tree)) for name, tree in wanted.items()}
        found = manager.restore(step, args=ocp.args.Composite(**args))
    return found.get("trainable", trainable), found.get("memory", memory)


def write_json(path: Path, data: Any) -> None:
    """Writes a file whole or not at all."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(data, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    partial.replace(path)
