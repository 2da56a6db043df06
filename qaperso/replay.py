"""python -m qaperso.replay --workdir DIR --batch FILE [--config.key=value ...]

Computes an update again that training left out: goes on from the newest checkpoint before it, as training did, and says what
the saved batch gives there: losses, and the gradient leaf by leaf. Nothing is written. Exit codes: 0 done, 2 bad input.
"""

from __future__ import annotations

import argparse
import functools
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Float

from qaperso import arrays, checkpoint, claim, step
from qaperso import config as configs
from qaperso.data import batches
from qaperso.errors import UserError, command
from qaperso.mesh import put_batch, start_runtime
from qaperso.run import CHECKPOINTS, Run, initialise, new_run, read_record
from qaperso.step import TrainState
from qaperso.train import batch_maker
from qaperso.types import Batch

Tree = Any


def replay(workdir: Path, path: Path, overrides: Sequence[str]) -> int:
    """Prints what a batch that training saved gives. Returns the exit code."""
    # 1. The run as it was trained, and its state at the newest checkpoint before the batch's step.
    leaves, number, recorded = batches.load_batch(path)
    config = configs.changed(configs.from_json(read_record(workdir)["config"]), overrides)
    if not 1 <= number <= config.steps:
        raise UserError(f"{path} is of step {number}, but {workdir} has {config.steps} steps; give its own --workdir")
    run, store = new_run(config, workdir)
    claim.check(run)
    optimizer, _ = step.make_optimizer(config, config.steps)
    state, advance = step.start(run.setting, run.method, optimizer, *initialise(run), run.mesh)
    state, start = newest_before(workdir / CHECKPOINTS, number, state)

    # 2. The steps between, as training made them; then the saved batch.
    make, key = batch_maker(run, run.examples(store, "train")[0]), jax.random.key(config.seed)
    with jax.set_mesh(run.mesh):
        for earlier in range(start, number - 1):
            state, _ = advance(state, run.base, put_batch(make(earlier), run.mesh, 1), key)
        batch, differ = refilled(make(number - 1), leaves, path)
        place = jax.tree.map(lambda x: x.sharding, state.trainable)
        look = functools.partial(look_into, run, place=place)
        look = jax.jit(look, out_shardings=NamedSharding(run.mesh, PartitionSpec()))
        found, parts = jax.device_get(look(state, run.base, put_batch(batch, run.mesh, 1), key))
    if jax.process_index() == 0:
        as_given = f"not what the data gives now ({', '.join(differ)})" if differ else "what the data gives"
        print(f"step {number}, from checkpoint {start}; its batch is {as_given}\n")
        print(f"{'':<36}{'recorded':>16}{'again':>16}")
        for name, value in sorted(found.items()):
            print(f"{name:<36}{recorded.get(name, math.nan):>16.7g}{value:>16.7g}")
        print(f"\n{'gradient of':<36}{'norm':>16}{'not finite':>16}{'of its leaf':>16}")
        for name, (norm, bad, ill) in sorted(parts.items(), key=lambda part: (-part[1][1], -part[1][0])):
            print(f"{name:<36}{norm:>16.7g}{bad:>16,.0f}{ill:>16,.0f}")
    return 0


def newest_before(folder: Path, number: int, state: TrainState) -> tuple[TrainState, int]:
    """The state of the newest checkpoint before a step, and its step; the given first state and 0 where there is none.

    Raises:
      UserError: it is damaged, or of another configuration.
    """
    start = max((s for s in checkpoint.steps(folder) if s < number), default=0)
    if not start:
        return state, 0
    try:
        return checkpoint.state_of(folder, start, state), start
    except checkpoint.Damaged as error:
        raise UserError(
            f"{error}; bring a copy of {folder / str(start)} back, or move it away to begin earlier"
        ) from error


def refilled(batch: Batch, leaves: Mapping[str, np.ndarray], path: Path) -> tuple[Batch, list[str]]:
    """The saved leaves as a batch, and the names of those that differ from the given batch's.

    Raises:
      UserError: they have other names, shapes or dtypes than the batch's.
    """
    wanted = arrays.flat(batch)
    for name in sorted(wanted.keys() | leaves.keys()):
        ours, theirs = (f"{x[name].dtype}{list(x[name].shape)}" if name in x else "absent" for x in (leaves, wanted))
        if ours != theirs:
            raise UserError(
                f"{path}: '{name}' is {ours}, the run's batches have {theirs}; give the batch's own --workdir"
            )
    differ = [name for name, x in wanted.items() if x.tobytes() != leaves[name].tobytes()]
    return jax.tree.unflatten(jax.tree.structure(batch), [leaves[name] for name in wanted]), differ


def look_into(
    run: Run, state: TrainState, base: Tree, batch: Batch, key: jax.Array, place: Tree
) -> tuple[dict[str, Float[Array, ""]], dict[str, Float[Array, " 3"]]]:
    """What a step computes before it decides; arguments as of `step.gradients`.

    Returns:
      Losses, norm of the gradient, its limit where there is one; and for each trainable leaf the norm of its gradient, how
      many numbers of that are not finite, and how many of its own.
    """
    gradient, found, _ = step.gradients(run.setting, run.method, state, base, batch, key, place)
    limit = optax.tree.get(state.optimizer, "norm_limit")
    found |= {"grad_norm": optax.tree.norm(gradient)} | ({} if limit is None else {"norm_limit": limit})
    own = arrays.flat(state.trainable)
    return found, {
        name: jnp.stack([optax.tree.norm(g), (~jnp.isfinite(g)).sum(), (~jnp.isfinite(own[name])).sum()])
        for name, g in arrays.flat(gradient).items()
    }


@command
def main(arguments: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m qaperso.replay", description=__doc__, allow_abbrev=False)
    parser.add_argument("--workdir", required=True, metavar="DIR", help="of the run")
    parser.add_argument("--batch", required=True, metavar="FILE", help="bad_batch_STEP.npz, which training wrote")
    known, rest = parser.parse_known_args(arguments)
    overrides = configs.overrides(rest, "--workdir, --batch")
    start_runtime()
    return replay(Path(known.workdir), Path(known.batch), overrides)


if __name__ == "__main__":
    sys.exit(main())
