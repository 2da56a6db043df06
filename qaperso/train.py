"""python -m qaperso.train --config configs/x.py --workdir DIR [--config.key=value ...]

Trains, or goes on where the workdir's newest checkpoint stopped. A method that trains nothing is validated and recorded as
it is, with a checkpoint of step 0. Exit codes: 0 done, 2 bad input, 143 stopped by SIGTERM after saving.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from rich.console import Console
from rich.table import Table

from qaperso import arrays, checkpoint, metrics, step, writers
from qaperso import config as configs
from qaperso.claim import claimed
from qaperso.data import batches, contrast, paper
from qaperso.data.plan import Plan
from qaperso.data.store import Store
from qaperso.errors import STOPPED, UserError, command
from qaperso.eval import scores
from qaperso.mesh import put_batch, start_runtime
from qaperso.models import quantized
from qaperso.run import CHECKPOINTS, Run, declare, initialise, new_run
from qaperso.stopping import StopSignal
from qaperso.types import Batch, Example

Tree = Any
# Of how many steps one has to contrast somebody.
LOOKED_AT = 1000


@dataclasses.dataclass(frozen=True, eq=False)
class Task:
    """What a run is trained on.

    Attributes:
      examples: of the training split.
      left_out: replies that are too long.
      make: makes the batch of a step, counted from 0.
      watched: the step after which a trainable without any gradient so far stops the run.
    """

    examples: Sequence[Example]
    left_out: int
    make: Callable[[int], Batch]
    watched: int


def task_of(run: Run, store: Store) -> Task:
    """Reads the training split and looks whether its plan can be trained on.

    Raises:
      UserError: see `watch`.
    """
    examples, left_out = run.examples(store, "train")
    make = batch_maker(run, examples)
    return Task(examples, left_out, make, watch(run, make))


def train(config: Any, workdir: Path) -> int:
    """Trains one run to its last step, from wherever it is. Returns the exit code."""
    # Data, base, and the folder, in that order: bad input is found before anything is written.
    run, store = new_run(config, workdir)
    trains = bool(declare(run)[0])
    task = task_of(run, store) if trains else None
    # What a language model answers is kept in the folder, so a method that asks one has dev encoded once that is claimed.
    asks = run.setting.notes is not None
    dev = [] if asks else run.examples(store, "dev", config.dev_dialogues)[0]
    writers.ready(run, {})
    with claimed(run):
        if asks:
            dev = ask(run, store)
        return keep(run, dev) if task is None else go_on(run, store, task, dev)


def ask(run: Run, store: Store) -> list[Example]:
    """The dev split's examples of a method that asks a language model, whose answers they need; says what was found."""
    facts = run.annotate([store.dialogues[i] for i in store.split("dev", run.config.dev_dialogues)])
    print(f"dev: {run.setting.notes.told(facts)}", file=sys.stderr)
    return run.examples(store, "dev", run.config.dev_dialogues)[0]


def go_on(run: Run, store: Store, task: Task, dev: Sequence[Example]) -> int:
    """Trains from the newest checkpoint, or from the start, to the last step. Returns the exit code.

    Args:
      run: whose folder is claimed.
      store: its data.
      task: what it trains on.
      dev: what is validated on.
    """
    # 1. The step, and its state: new, or the newest whole checkpoint's.
    config, workdir = run.config, run.workdir
    optimizer, schedule = step.make_optimizer(config, config.steps)
    state, advance = step.start(run.setting, run.method, optimizer, *initialise(run), run.mesh)
    writer = checkpoint.Writer(workdir / CHECKPOINTS, config.keep_latest, config.keep_best)
    state, start = writer.restore(state)
    describe(run, state.trainable, store, task, start)

    # 2. Batches of the plan, and who listens.
    feed = batches.stream(task.make, start, config.steps)
    key = jax.random.key(config.seed)
    log = Log(run, state.trainable, start, schedule)
    stop = StopSignal(run.mesh)

    # 3. The loop. Metrics are fetched one step late, so that dispatch never waits for them.
    with jax.set_mesh(run.mesh), stop, writer:
        pending, validated, code = None, {}, 0
        if not start:
            log.write(0, validate(run, state.trainable, dev))
        for number in range(start + 1, config.steps + 1):
            batch = next(feed)
            state, fresh = advance(state, run.base, put_batch(batch, run.mesh, 1), key)
            pending = log.step(pending, (number, fresh, batch))
            if number == task.watched:
                step.check_alive(jax.device_get(state.largest), number)
            last = number == config.steps
            if last or number % config.checkpoint_every == 0:
                pending = log.step(pending, None)
                validated = validate(run, state.trainable, dev)
                log.write(number, validated)
                writer.save(number, state, validated or None)
            if not last and stop.agreed():
                pending = log.step(pending, None)
                writer.save(number, state, None)
                print(f"stopped by SIGTERM at step {number}; saved, run again to go on", file=sys.stderr)
                code = STOPPED
                break
    log.close()
    if code == 0:
        digest = step.params_hash(state.trainable)
    if code == 0 and jax.process_index() == 0:
        print(f"final step={config.steps} loss={log.last_loss(workdir)!r} params=sha256:{digest}")
    return code


def keep(run: Run, dev: Sequence[Example]) -> int:
    """Makes a run of a method that trains nothing: a record, a line of metrics, a checkpoint of step 0; 0, the exit code.

    Where they are there already nothing is done.
    """
    config = run.config
    optimizer, _ = step.make_optimizer(config, config.steps)
    state, _ = step.start(run.setting, run.method, optimizer, *initialise(run), run.mesh)
    writer = checkpoint.Writer(run.workdir / CHECKPOINTS, config.keep_latest, config.keep_best)
    if writer.latest() is None:
        with jax.set_mesh(run.mesh):
            found = validate(run, state.trainable, dev)
        if jax.process_index() == 0:
            record = metrics.MetricsWriter(run.workdir, 0)
            record.write(0, found)
            record.close()
            told = "".join(f" {name}={value:.4f}" for name, value in found.items())
            print(f"config.method='{config.method}' trains nothing; recorded as it is{told}", file=sys.stderr)
        writer.save(0, state, found or None)
    writer.close()
    if jax.process_index() == 0:
        print(f"final step=0 loss=nan params=sha256:{step.params_hash(state.trainable)}")
    return 0


def batch_maker(run: Run, examples: Sequence[Example]) -> Callable[[int], Batch]:
    """What makes the batch of any of the run's steps, counted from 0."""
    config = run.config
    plan = Plan(examples, run.shape, config.seed, config.batch.queriers, config.batch.per_querier)
    rows = "rows" in declare(run)[0].get("tower", {})
    rule = (config.batch.accumulate, config.qar.drop_row if rows else None, contrast_of(config))

    def make(number: int) -> Batch:
        batch = batches.plan_batch(plan, examples, number, *rule)
        return paper.as_published(batch, run.setting.model.eos_ids[0]) if config.compat == "paper" else batch

    return make


def contrast_of(config: Any) -> str:
    """The kind of contrast of a run; "none" for methods without."""
    return config.qar.contrast if config.method == "qar" else "none"


def watch(run: Run, make: Callable[[int], Batch]) -> int:
    """After which step every trainable must have had a gradient: that in which somebody is first contrasted, but the 20th at least.

    Raises:
      UserError: nobody is contrasted in the plan's first steps.
    """
    config = run.config
    kind = contrast_of(config)
    if kind == "none":
        return step.DEAD_PARAMETER_STEPS
    compared = (make(number).contrast for number in range(LOOKED_AT))
    both = ((c.label.reshape(-1), c.text.reshape(-1)) for c in compared)
    first = contrast.first_anchored(both, run.setting.classes, kind == "prototypes")
    if first is None:
        raise UserError(
            f"nobody would be contrasted in the first {LOOKED_AT} steps: that needs dialogues of two queriers with one responder "
            f"and cluster that meet without their rows (config.qar.drop_row={config.qar.drop_row}); raise drop_row, batch.rows "
            "or batch.queriers, prepare with fewer --clusters, or train with config.qar.contrast='none'"
        )
    return max(step.DEAD_PARAMETER_STEPS, first + 1)


def validate(run: Run, trainable: Tree, dev: Sequence[Example]) -> dict[str, float]:
    """Reply NLL on dev, nats per token over all tokens; {} where there is no dev dialogue."""
    if not dev:
        return {}
    sums, counts = scores.reply_nll(run, trainable, dev)
    return {checkpoint.METRIC: float(sums.sum() / counts.sum())}


def why_left_out(values: Mapping[str, float]) -> str:
    """Why a step's update was left out, told by what `step.train_step` reported; "" where it was not."""
    if not values["finite"]:
        return "not finite: " + ", ".join(name for name, value in values.items() if not math.isfinite(value))
    norm, limit = values["grad_norm"], values.get("norm_limit", 0.0)
    return f"a spike: grad_norm {norm:.6g} is above norm_limit {limit:.6g}" if 0 < limit < norm else ""


class Log:
    """Writes what steps report, keeps the batches of updates that were left out, and stops a run that has too many."""

    def __init__(self, run: Run, trainable: Tree, start: int, schedule: Any):
        config = run.config
        self._run, self._schedule = run, schedule
        self._main = jax.process_index() == 0
        peak = config.peak_flops or metrics.measure_peak(config.dtype)
        self._meter = metrics.Meter(step.step_flops(trainable, run.base), peak, config.steps)
        self._progress = metrics.Progress(start, config.steps)
        self._writer = metrics.MetricsWriter(run.workdir, start) if self._main else None

    def step(
        self, pending: tuple[int, Tree, Batch] | None, fresh: tuple[int, Tree, Batch] | None
    ) -> tuple[int, Tree, Batch] | None:
        """Reports the step before; returns what is to be reported next time: a step, its metrics, its batch."""
        if pending is not None:
            number, values = pending[0], {k: float(v) for k, v in jax.device_get(pending[1]).items()}
            self._meter.count(values["tokens"], values["predicted"])
            if why := why_left_out(values):
                self._left_out(number, values, pending[2], why)
            config = self._run.config
            if number % config.log_every == 0 or number == config.steps:
                speed = self._meter.report(number)
                values["learning_rate"] = float(self._schedule(number - 1))
                self.write(number, values | {k: v for k, v in speed.items() if not math.isnan(v)})
        return fresh

    def write(self, number: int, values: dict[str, float]) -> None:
        """One line of metrics."""
        if self._main and values:
            self._writer.write(number, values)
            self._progress.show(number, values)

    def _left_out(self, number: int, values: dict[str, float], batch: Batch, why: str) -> None:
        # No more files than max_skipped + 1: a run that goes on from a checkpoint comes to the same steps again.
        workdir, budget = self._run.workdir, self._run.config.max_skipped
        path = workdir / f"bad_batch_{number}.npz"
        if self._main:
            batches.save_batch(path, batch, number, values)
            print(f"step {number}: the update was left out ({why}); its batch is in {path}", file=sys.stderr)
        if values["skipped"] > budget:
            raise UserError(
                f"{int(values['skipped'])} updates were left out, more than max_skipped={budget}, the last at step {number} "
                f"({why}); look into it with python -m qaperso.replay --workdir {workdir} --batch {path}, then mend the "
                "data or lower optimizer.lr, or raise max_skipped to go on"
            )

    def last_loss(self, workdir: Path) -> float:
        """Loss of the last step, from the record."""
        lines = (workdir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        return next((v["loss"] for v in map(json.loads, reversed(lines)) if "loss" in v), math.nan)

    def close(self) -> None:
        """Flushes everything."""
        self._progress.close()
        if self._writer:
            self._writer.close()


def describe(run: Run, trainable: Tree, store: Store, task: Task, start: int) -> None:
    """Overview of parameters and data, before the first step."""
    # On every host: a mean over shards is a computation of all of them.
    spread = arrays.flat(jax.jit(lambda tree: jax.tree.map(lambda x: jnp.abs(x).mean(), tree))(trainable))
    if jax.process_index() != 0:
        return
    table = Table(title=f"{run.config.method} in {run.workdir}" + (f", going on at step {start}" if start else ""))
    for column in ("trainable", "shape", "values", "mean |x|", "sharding"):
        table.add_column(column, justify="left" if column == "trainable" else "right")
    total = 0
    for name, x in arrays.flat(trainable).items():
        total += x.size
        table.add_row(
            name, "x".join(map(str, x.shape)), f"{x.size:,}", f"{float(spread[name]):.2e}", str(x.sharding.spec)
        )
    frozen = sum(x.size for x in quantized.leaves(run.base))
    console = Console(stderr=True, width=None if sys.stderr.isatty() else 110)
    console.print(table)
    tokens, cut = sum(map(len, task.examples)), sum(e.cut for e in task.examples)
    names = run.registry
    print(
        f"{total:,} trainable and {frozen:,} frozen values; {len(task.examples)} training sequences of {len(names.queriers)} "
        f"queriers and {len(names.responders)} responders, {tokens:,} tokens; {cut:,} tokens of old turns cut, "
        f"{task.left_out} replies left out as too long; mesh {dict(run.mesh.shape)}",
        file=sys.stderr,
    )
    if run.reader:
        print(run.reader.summary(), file=sys.stderr)


@command
def main(arguments: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m qaperso.train", description=__doc__, allow_abbrev=False)
    parser.add_argument("--config", required=True, metavar="FILE", help="a Python file with get_config()")
    parser.add_argument("--workdir", required=True, metavar="DIR", help="where the run lives; resumed when it has one")
    known, rest = parser.parse_known_args(arguments)
    overrides = configs.overrides(rest, "--config, --workdir")
    start_runtime()
    return train(configs.load(known.config, overrides), Path(known.workdir))


if __name__ == "__main__":
    sys.exit(main())
