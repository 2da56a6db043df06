"""python tests/survivor.py FOLDER TRIALS: benchmarks/faults.py with runs that start at once and train next to nothing.

The processes are forked from this one, which has imported everything and never begun with JAX. They join each other, lock the
folder, restore, save, write metrics and leave like those of `qaperso.train`, by the same modules; only the model is another.
"""

from __future__ import annotations

import collections
import functools
import json
import os
import signal
import sys
import time
from collections.abc import Mapping
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))

import faults  # noqa: E402
import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
import optax  # noqa: E402
from jax.sharding import NamedSharding, PartitionSpec  # noqa: E402

from qaperso import step  # noqa: E402
from qaperso.checkpoint import Writer  # noqa: E402
from qaperso.errors import STOPPED, command  # noqa: E402
from qaperso.mesh import make_mesh, put_batch, start_runtime  # noqa: E402
from qaperso.metrics import MetricsWriter  # noqa: E402
from qaperso.stopping import StopSignal  # noqa: E402
from qaperso.storage import locked, plainly  # noqa: E402

EVERY = 5
OPTIMIZER = optax.adam(0.05)


@functools.partial(jax.jit, donate_argnums=0)
def advance(state: step.TrainState, batch: np.ndarray) -> tuple[step.TrainState, jax.Array]:
    """A step of fitting a matrix."""

    def loss(params: dict) -> jax.Array:
        return jnp.mean((batch @ params["kernel"] - jnp.roll(batch, 1, -1)) ** 2)

    value, gradient = jax.value_and_grad(loss)(state.trainable)
    updates, moments = OPTIMIZER.update(gradient, state.optimizer)
    return state.replace(
        step=state.step + 1, trainable=optax.apply_updates(state.trainable, updates), optimizer=moments
    ), value


@command
def main(workdir: Path, steps: int) -> int:
    """One process of a run."""
    start_runtime()
    mesh, first = make_mesh(-1, 1, 1), jax.process_index() == 0
    workdir.mkdir(exist_ok=True)
    with locked(workdir) if first else plainly(workdir):
        place = NamedSharding(mesh, PartitionSpec())
        made = step.init_state(OPTIMIZER, {"kernel": np.zeros((8, 8), np.float32)}, {})
        state = jax.tree.map(
            lambda x: jax.make_array_from_callback(x.shape, place, lambda i, x=x: np.asarray(x)[i]), made
        )
        writer = Writer(workdir / "checkpoints", 2, 0)
        state, start = writer.restore(state)
        metrics = MetricsWriter(workdir, start) if first else None
        with jax.set_mesh(mesh), StopSignal(mesh) as stop:
            for number in range(start + 1, steps + 1):
                batch = np.random.default_rng(number).normal(size=(1, 4, 8)).astype(np.float32)
                state, loss = advance(state, put_batch(batch, mesh, 1))
                if first:
                    metrics.write(number, {"loss": float(loss)})
                if number % EVERY == 0 or number == steps:
                    writer.save(number, state, None)
                elif stop.agreed():
                    writer.save(number, state, None)
                    writer.close()
                    return STOPPED
                time.sleep(0.005)
        writer.close()
        digest = step.params_hash(state.trainable)
        if first:
            metrics.close()
            print(f"final step={steps} params=sha256:{digest}", flush=True)
    return 0


class Forked:
    """A forked process, with what `supervise` asks of one."""

    def __init__(self, pid: int):
        self.pid, self.returncode = pid, None

    def poll(self) -> int | None:
        """Exit code, negative for a signal; None while it goes on. Called by two threads."""
        if self.returncode is None:
            try:
                pid, status = os.waitpid(self.pid, os.WNOHANG)
            except ChildProcessError:  # the other thread was quicker, and is about to say so
                return None
            if pid:
                self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode

    def wait(self) -> int:
        """Waits for the exit code."""
        while self.poll() is None:
            time.sleep(0.001)
        return self.returncode

    def send_signal(self, number: int) -> None:
        """To a process that goes on."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """With SIGKILL."""
        self.send_signal(signal.SIGKILL)


class Forks(faults.Crew):
    """Starts a run's processes by forking."""

    def start(self, number: int, variables: Mapping[str, str]) -> Forked:
        """As `supervise` wants it."""
        if number == 0:
            self.running, self.attempt, self.began = [], self.attempt + 1, time.monotonic()
        pid = os.fork()
        if pid == 0:
            for stream, path in ((1, self.out), (2, self.err)):
                os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
            for name in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
                signal.signal(name, signal.SIG_DFL)
            for name in ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"):
                os.environ.pop(name, None)
            os.environ.update(variables)
            code = 1
            try:
                code = main(self.workdir, self.steps)
                if code in (0, STOPPED) and jax.distributed.is_initialized():
                    jax.distributed.shutdown()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)
        made = Forked(pid)
        self.running.append(made)
        return made


if __name__ == "__main__":
    folder, trials = Path(sys.argv[1]), int(sys.argv[2])
    whole = Forks(folder, folder / "whole", 2, {}, 60, ())
    found = faults.campaign(whole, dict.fromkeys(faults.KINDS, trials), at_once=10, seed=trials)
    gap = faults.moved(whole, 1, 20)
    report = {"kinds": collections.Counter(one.kind for one in found), "torn": sum(one.torn for one in found)}
    times = [one.recovery for one in found if one.recovery is not None]
    print(json.dumps(report | {"recovery": times, "gap": gap}))
