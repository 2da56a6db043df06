"""python benchmarks/faults.py [--trials 20] [--kinds worker coordinator save] [--seed 0] [--json FILE]

Kills processes of supervised runs with SIGKILL at random moments, and holds what the runs end with against a run that
nothing happened to: the same final parameters and the same loss of every step, bit for bit. `make faults` runs this.

worker: the last process; coordinator: the first one, which the others need; save: either, while a checkpoint is being
written. A quarter of the first two kinds falls into starting up, the others into a random step. Then a run is killed and goes
on with another number of processes: its losses agree to 1e-5. Prints how long it took from each kill until a new step was
reported (imports, data, restoring and compiling from a warm cache included), median and worst.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import dataclasses
import itertools
import json
import math
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import common

from qaperso.launch import environment, supervise

KINDS = ("worker", "coordinator", "save")
SPEED = ("tokens_per_second", "mfu", "eta")
TOLERANCE = 1e-5
# Share of the kills of workers and coordinators that fall into starting up.
EARLY = 0.25
CONFIG = """
from qaperso.config import default


def get_config():
    c = default()
    c.model.embed, c.model.layers, c.model.heads, c.model.kv_heads, c.model.mlp = 32, 2, 2, 1, 48
    c.data.per_pair, c.data.clusters = 3, 2
    c.batch.rows, c.batch.length, c.batch.targets, c.batch.dialogues = 4, 96, 64, 2
    c.lora.rank, c.qar.rank, c.qar.head_dim, c.qar.contrast = 2, 4, 8, "prototypes"
    c.optimizer.warmup, c.peak_flops = 2, 1e11
    c.log_every, c.checkpoint_every, c.dev_dialogues, c.keep_latest = 1, 4, 4, 2
    return c
"""


@dataclasses.dataclass
class Kill:
    """What a kill did.

    Attributes:
      kind: one of `KINDS`.
      attempt: which of the run's starts it hit.
      file, step: of the metrics then, see `Crew.step`.
      torn: whether a checkpoint was half written.
      at: when, of `time.monotonic`.
      recovery: seconds until a new step was reported; None where the next kill came first, or no step was left.
    """

    kind: str
    attempt: int
    file: int
    step: int
    torn: bool
    at: float
    recovery: float | None = None


class Crew:
    """Starts the processes of a run's attempts and knows those of the latest one."""

    def __init__(
        self,
        config: Path,
        workdir: Path,
        processes: int,
        settings: Mapping[str, str],
        steps: int,
        overrides: Sequence[str],
    ):
        """`settings` are variables of the processes, `steps` and `overrides` keys of the configuration."""
        self.config, self.processes, self.settings, self.steps = config, processes, dict(settings), steps
        self.overrides = (f"steps={steps}", *overrides)
        self.workdir, self.attempt, self.began = workdir, 0, 0.0
        self.running: list[subprocess.Popen] = []

    def like(self, name: str) -> Crew:
        """A new run of the same kind, in a folder beside this one's."""
        made = copy.copy(self)
        made.workdir, made.attempt, made.running = self.workdir.with_name(name), 0, []
        return made

    @property
    def out(self) -> Path:
        """What all attempts wrote to stdout."""
        return self.workdir.with_suffix(".out")

    @property
    def err(self) -> Path:
        """And to stderr."""
        return self.workdir.with_suffix(".err")

    def start(self, number: int, variables: Mapping[str, str]) -> subprocess.Popen:
        """As `supervise` wants it."""
        if number == 0:
            self.running, self.attempt, self.began = [], self.attempt + 1, time.monotonic()
        words = ["--config", str(self.config), "--workdir", str(self.workdir)]
        words += [f"--config.{text}" for text in self.overrides]
        with self.out.open("ab") as out, self.err.open("ab") as err:
            made = subprocess.Popen(
                [sys.executable, "-m", "qaperso.train", *words],
                env=os.environ | self.settings | variables,
                cwd=common.ROOT,
                stdout=out,
                stderr=err,
            )
        self.running.append(made)
        return made

    def step(self) -> tuple[int, int]:
        """Which file of metrics is there (each start makes a new one), and its last step; zeros without one."""
        path = self.workdir / "metrics.jsonl"
        try:
            file, text = path.stat().st_ino, path.read_text(encoding="utf-8")
        except FileNotFoundError:
            return 0, 0
        # What follows the last line's end is still being written.
        lines = [v for v in map(json.loads, text.split("\n")[:-1]) if "loss" in v]
        return file, lines[-1]["step"] if lines else 0

    def torn(self) -> bool:
        """Whether a checkpoint is half written."""
        return any((self.workdir / "checkpoints").glob("*.orbax-checkpoint-tmp*"))

    def ended(self) -> bool:
        """Whether a process of the latest attempt has ended."""
        return any(p.poll() is not None for p in self.running)


def strike(crew: Crew, kind: str, early: float | None, over: threading.Event, draw: random.Random) -> Kill | None:
    """Kills a process of the run's next attempt, or of this one where it has just begun.

    Args:
      crew: of the run, which goes on in another thread.
      kind: one of `KINDS`.
      early: at so many seconds from the attempt's start; None = at a random step, or within a save.
      over: set when the run has ended.
      draw: of the moment.

    Returns:
      The kill; None where the attempt ended before its moment.
    """
    while len(crew.running) < crew.processes or crew.ended():
        if over.is_set():
            return None
        time.sleep(0.001)
    steps = crew.steps
    wanted = draw.randint(min(crew.step()[1] + 1, steps - 1), steps - 1)

    def due() -> bool:
        if kind == "save":
            return crew.torn()
        return crew.step()[1] >= wanted if early is None else time.monotonic() - crew.began >= early

    while not due():
        if crew.ended() or over.is_set():
            return None
        time.sleep(0.001)
    time.sleep(draw.uniform(0.0, 0.02))
    victim = crew.running[{"worker": -1, "coordinator": 0, "save": draw.randrange(crew.processes)}[kind]]
    victim.kill()
    struck = Kill(kind, crew.attempt, *crew.step(), crew.torn(), time.monotonic())
    return struck if victim.wait() == -signal.SIGKILL else None


def settle(crew: Crew, struck: Kill, over: threading.Event) -> None:
    """Waits until the run has reported a step that is new since a kill."""
    before = None
    while not over.is_set():
        file, step = crew.step()
        if crew.attempt > struck.attempt and file not in (0, struck.file):
            before = step if before is None else before
            if step > before:
                struck.recovery = time.monotonic() - struck.at
                return
        time.sleep(0.002)


def suffer(crew: Crew, kinds: Sequence[str], startup: float, draw: random.Random) -> list[Kill]:
    """Runs a crew to its end while its processes are killed, one after another, in these ways; the kills that came about.

    Raises:
      RuntimeError: the run did not finish.
    """
    found: list[Kill] = []
    over = threading.Event()

    def work() -> None:
        for kind in kinds:
            early = draw.uniform(0.0, startup) if kind != "save" and draw.random() < EARLY else None
            if found and early is None:
                settle(crew, found[-1], over)
            struck = strike(crew, kind, early, over, draw)
            if struck is None:
                return
            found.append(struck)
        if found:
            settle(crew, found[-1], over)

    killer = threading.Thread(target=work)
    killer.start()
    try:
        code = supervise(crew.start, crew.processes, restarts=len(kinds), grace=60.0, pause=0.05)
    finally:
        over.set()
        killer.join()
    if code:
        raise RuntimeError(f"the run ended with {code}:\n{crew.err.read_text(encoding='utf-8')[-3000:]}")
    return found


def outcome(crew: Crew) -> tuple[str, list[dict[str, Any]]]:
    """The last line of a run, with the digest of its parameters, and its metrics without what the clock decides."""
    lines = (crew.workdir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    metrics = [{k: v for k, v in json.loads(line).items() if k not in SPEED} for line in lines]
    return crew.out.read_text(encoding="utf-8").splitlines()[-1], metrics


def difference(ours: Sequence[Mapping[str, Any]], theirs: Sequence[Mapping[str, Any]]) -> float:
    """Largest absolute difference of the losses of two runs' steps; infinite where they have other steps."""
    one, other = ({v["step"]: v["loss"] for v in run if "loss" in v} for run in (ours, theirs))
    if set(one) != set(other):
        return float("inf")
    return max(abs(one[step] - other[step]) for step in one)


def campaign(whole: Crew, kinds: Mapping[str, int], at_once: int, seed: int) -> list[Kill]:
    """Lets a run go through, then kills runs like it until there were so many kills of each kind.

    Args:
      whole: the run that nothing happens to; the others lie beside it.
      kinds: {kind: how often}.
      at_once: kills that one run suffers at most.
      seed: of the moments.

    Raises:
      RuntimeError: a run did not finish, or ended with other numbers.
    """
    draw = random.Random(seed)
    suffer(whole, (), 0.0, draw)
    startup = time.monotonic() - whole.began
    left = [kind for kind, count in kinds.items() for _ in range(count)]
    draw.shuffle(left)
    found: list[Kill] = []
    for run in itertools.count(1):
        if not left:
            return found
        crew = whole.like(f"run{run}")
        hits = suffer(crew, left[:at_once], startup, draw)
        if outcome(crew) != outcome(whole):
            raise RuntimeError(
                f"after {hits} the run in {crew.workdir} ended with {outcome(crew)[0]}, expected {outcome(whole)[0]}"
            )
        if not hits and run > len(found) + 3:
            raise RuntimeError(f"no moment came for {left[:at_once]}")
        for one in hits:
            left.remove(one.kind)
        found += hits
        print(f"run {run}: {len(hits)} kills, {len(left)} to come; it ended as the one left alone", file=sys.stderr)
    raise AssertionError("never reached")


def moved(whole: Crew, processes: int, step: int) -> float:
    """Kills a whole run at a step and goes on with another number of processes; the largest difference of losses."""
    first = whole.like(f"moved{processes}")
    common_part = environment(first.processes)
    for i in range(first.processes):
        first.start(i, common_part | {"JAX_PROCESS_ID": str(i)})
    while first.step()[1] < step and not first.ended():
        time.sleep(0.001)
    for p in first.running:
        p.kill()
        p.wait()
    second = whole.like(first.workdir.name)
    second.processes = processes
    suffer(second, (), 0.0, random.Random(0))
    return difference(outcome(second)[1], outcome(whole)[1])


def measure(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """All figures.

    Raises:
      RuntimeError: a run did not survive.
    """
    config = folder / "tiny.py"
    config.write_text(CONFIG, encoding="utf-8")
    settings = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "", "XDG_CACHE_HOME": str(folder), "OMP_NUM_THREADS": "1"}
    settings |= {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    whole = Crew(config, folder / "whole", 2, settings, options.steps, ())
    found = campaign(whole, dict.fromkeys(options.kinds, options.trials), 10, options.seed)
    figures: dict[str, Any] = {}
    for kind in options.kinds:
        hits = [one for one in found if one.kind == kind]
        times = [one.recovery for one in hits if one.recovery is not None]
        figures[kind] = {
            "kills": len(hits),
            "before the first step": sum(one.step == 0 for one in hits),
            "with a checkpoint half written": sum(one.torn for one in hits),
            "median recovery, s": statistics.median(times) if times else math.nan,
            "worst recovery, s": max(times, default=math.nan),
        }
    gaps = {f"{n} processes": moved(whole, n, options.steps // 2) for n in options.moved}
    if worst := [f"{name}: {gap}" for name, gap in gaps.items() if gap > TOLERANCE]:
        raise RuntimeError(f"losses differ by more than {TOLERANCE} after a change of topology: {worst}")
    return figures | {"largest difference of losses, going on with": gaps}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--trials", type=int, default=20, metavar="N", help="kills of each kind (default %(default)s)")
    parser.add_argument("--kinds", nargs="*", choices=KINDS, default=KINDS, metavar="KIND", help=" ".join(KINDS))
    parser.add_argument("--steps", type=int, default=40, help="of each run (default %(default)s)")
    parser.add_argument("--moved", type=int, nargs="*", default=(1, 4), metavar="N", help="processes to go on with")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="where runs are left; default: a temporary one")
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    with contextlib.ExitStack() as stack:
        folder = options.folder or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        folder.mkdir(parents=True, exist_ok=True)
        figures = measure(folder, options)
    common.report(options, "faults", [], figures)
    return 0


if __name__ == "__main__":
    sys.exit(main())
