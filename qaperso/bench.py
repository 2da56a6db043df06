"""python -m qaperso.bench --suite configs/suite_x.py --output DIR [--minutes M] [--jobs N] [--table]

Methods x seeds on the same data. Each cell is a run of its own, trained and evaluated by the commands that anybody would
use, in processes of their own, and left alone where it is done. Then DIR/table.md and DIR/table.json: every method, and how it
differs from its baselines. With --minutes no cell begins after so many, and those under way save and stop. With --jobs
several cells are made at a time, as a GPU with room for them wants it; each then writes DIR/CELL.log. A cell that fails does
not hold up the others; it is named at the end, with exit code 2.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import os
import re
import runpy
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from qaperso import checkpoint
from qaperso import config as configs
from qaperso.data.splits import SPLITS
from qaperso.errors import STOPPED, UserError, command, nearest, running
from qaperso.eval import compare as comparing
from qaperso.eval import intervals, report
from qaperso.eval.compare import Items
from qaperso.run import RECORD, read_record

Metric = dict[str, float]


@dataclasses.dataclass(frozen=True)
class Suite:
    """What is compared.

    Attributes:
      methods: {name: (config file, override, ...)}; `{NAME}` in an override is the folder of that run of `before`.
      seeds: each method is trained with each.
      against: {method: (baseline, ...)}, the methods that a method is compared with.
      metrics: names of metrics with values for each dialogue.
      before: runs that the others start from, trained once.
      evaluate: more options of `python -m qaperso.evaluate`.
      once: methods that train nothing: run with the first seed, and compared with every seed of the others.
      split: that cells are scored on; designs are chosen by "dev".
    """

    methods: Mapping[str, tuple[str, ...]]
    seeds: tuple[int, ...]
    against: Mapping[str, tuple[str, ...]]
    metrics: tuple[str, ...]
    before: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    evaluate: tuple[str, ...] = ()
    once: tuple[str, ...] = ()
    split: str = "test"


def _are(kind: type, value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str) and all(type(x) is kind for x in value)


def _named(value: Any) -> bool:
    return isinstance(value, Mapping) and all(type(k) is str and _are(str, words) for k, words in value.items())


def _runs(value: Any) -> bool:
    return _named(value) and all(value.values())


# What a field of a suite must be: in words, and whether a value is.
_STRINGS = "a tuple of strings, as in ('nll',)", functools.partial(_are, str)
_RUNS = "a dict of tuples of strings, as in {'LoRA': ('configs/sft.py', 'steps=3')}", _runs
FIELDS: Mapping[str, tuple[str, Callable[[Any], bool]]] = {
    "methods": _RUNS,
    "seeds": (
        "a tuple of one or more whole numbers, as in (0, 1, 2)",
        lambda value: _are(int, value) and len(value) > 0,
    ),
    "against": ("a dict of tuples of strings, as in {'QAR': ('LoRA',)}", _named),
    "metrics": _STRINGS,
    "before": _RUNS,
    "evaluate": _STRINGS,
    "once": _STRINGS,
    "split": (f"one of {', '.join(SPLITS)}", lambda value: value in SPLITS),
}


@dataclasses.dataclass(frozen=True)
class Cell:
    """A run of a suite; `method` is "" for one that others start from."""

    method: str
    seed: int
    workdir: Path
    config: str
    overrides: tuple[str, ...]
    split: str = "test"

    @property
    def done(self) -> bool:
        """Whether there is nothing left to do."""
        return (comparing.file_of(self.workdir, self.split) if self.method else self.workdir / "done").exists()


def load_suite(path: Path) -> Suite:
    """Reads `get_suite()` of a Python file: a dict with the fields of `Suite`.

    Raises:
      UserError: no such file or function, an unknown or missing field or one of another type, a baseline that is no
        method, or whatever the file raises.
    """
    if not path.is_file():
        raise UserError(f"suite '{path}' is not a file")
    with running("suite", path):
        made = runpy.run_path(str(path)).get("get_suite")
        if made is None:
            raise UserError(f"suite '{path}' defines no get_suite()")
        given = made()
    if not isinstance(given, Mapping):
        raise UserError(f"suite '{path}': get_suite() returns {given!r}, expected a dict of fields")
    known = {f.name: f for f in dataclasses.fields(Suite)}
    for name in given:
        if name not in known:
            raise UserError(f"suite '{path}' has an unknown field '{name}'{nearest(name, list(known))}")
    needed = {
        n for n, f in known.items() if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
    }
    if lacking := sorted(needed - set(given)):
        raise UserError(f"suite '{path}' has no field '{lacking[0]}'")
    for name, value in given.items():
        expected, fits = FIELDS[name]
        if not fits(value):
            raise UserError(f"suite '{path}': {name} is {value!r}, expected {expected}")
    suite = Suite(**given)
    for name in (*suite.against, *(base for bases in suite.against.values() for base in bases), *suite.once):
        if name not in suite.methods:
            raise UserError(
                f"suite '{path}' names '{name}', which is none of its methods{nearest(name, list(suite.methods))}"
            )
    return suite


def cells(suite: Suite, folder: Path) -> list[Cell]:
    """Every run of a suite in the order they are made: those that others start from, then seed by seed.

    Raises:
      UserError: an override names a run that the suite does not have.
    """
    places = {name: folder / f"before-{_slug(name)}" for name in suite.before}
    found = [Cell("", 0, places[name], words[0], words[1:]) for name, words in suite.before.items()]
    for seed in suite.seeds:
        for method, (config, *overrides) in suite.methods.items():
            if method in suite.once and seed != suite.seeds[0]:
                continue
            filled = [_filled(text, places) for text in overrides]
            place = folder / f"{_slug(method)}-{seed}"
            found.append(Cell(method, seed, place, config, (*filled, f"seed={seed}"), suite.split))
    return found


def _filled(text: str, places: Mapping[str, Path]) -> str:
    try:
        return text.format(**{name: str(place) for name, place in places.items()})
    except (KeyError, IndexError, ValueError) as error:
        raise UserError(
            f"the suite has an override '{text}', in which {{NAME}} must be one of its runs of `before` "
            f"({', '.join(places) or 'it has none'}); write {{{{ and }}}} for braces"
        ) from error


def _slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_")


def check(cell: Cell) -> None:
    """Makes sure that a cell's folder, where it has one, holds a run of the cell's configuration.

    Raises:
      UserError: the suite or a configuration has changed since.
    """
    if (cell.workdir / RECORD).exists():
        old = configs.from_json(read_record(cell.workdir)["config"])
        if changed := configs.differences(old, configs.load(cell.config, cell.overrides)):
            raise UserError(
                f"{cell.workdir} was made with another configuration ({'; '.join(changed[:4])}); give another --output, or "
                "remove that folder to make the cell again"
            )


def run_cell(cell: Cell, options: Sequence[str], deadline: float, log: Path | None = None) -> bool:
    """Trains and evaluates a cell, or goes on with it; False where the deadline (of `time.monotonic`) stopped it.

    Args:
      cell: the run.
      options: of its evaluation.
      deadline: when no more is to be done.
      log: gets what the commands print, which else goes where this program's output goes.

    Raises:
      UserError: a command failed; it has said why.
    """
    overrides = [f"--config.{text}" for text in cell.overrides]
    trained = ["qaperso.train", "--config", cell.config, "--workdir", str(cell.workdir), *overrides]
    if not _command(trained, deadline, log):
        return False
    if not cell.method:
        (cell.workdir / "done").touch()
        return True
    return _command(
        ["qaperso.evaluate", "--workdir", str(cell.workdir), "--split", cell.split, *options], deadline, log
    )


def make(every: Sequence[Cell], options: Sequence[str], deadline: float, jobs: int) -> list[str]:
    """Makes what is missing, `jobs` cells at a time, those that others start from first.

    Returns:
      A line for each cell that failed. The others are made all the same.

    Raises:
      UserError: one that others start from failed.
    """
    stopped = threading.Event()

    def one(cell: Cell) -> str:
        if cell.done or stopped.is_set() or time.monotonic() >= deadline:
            return ""
        log = cell.workdir.with_name(f"{cell.workdir.name}.log") if jobs > 1 else None
        try:
            if not run_cell(cell, options, deadline, log):
                stopped.set()
        except UserError as error:
            return f"{cell.workdir.name}: {error}"
        return ""

    for cell in every:
        if not cell.method and (failed := one(cell)):
            raise UserError(failed)
    with ThreadPoolExecutor(jobs) as pool:
        try:
            return [failed for failed in pool.map(one, [c for c in every if c.method]) if failed]
        except BaseException:
            stopped.set()
            raise


def _command(words: Sequence[str], deadline: float, log: Path | None) -> bool:
    with contextlib.ExitStack() as stack:
        if log is not None:
            log.parent.mkdir(parents=True, exist_ok=True)
        output = None if log is None else stack.enter_context(log.open("ab"))
        process = stack.enter_context(
            subprocess.Popen(
                [sys.executable, "-m", *words], stdout=output, stderr=subprocess.STDOUT if output else None
            )
        )
        try:
            code = process.wait(max(deadline - time.monotonic(), 0) if np.isfinite(deadline) else None)
        except subprocess.TimeoutExpired:
            # It saves, and goes on from there next time.
            process.send_signal(signal.SIGTERM)
            process.wait()
            return False
        except BaseException:
            process.send_signal(signal.SIGTERM)
            process.wait()
            raise
    if code == STOPPED:
        return False
    if code:
        raise UserError(f"'python -m {' '.join(words)}' stopped with exit code {code}; see {log or 'above'}")
    return True


def compare(suite: Suite, found: Mapping[tuple[str, int], Items]) -> dict[str, dict[str, Any]]:
    """Every method's metrics, and their differences to its baselines' on the same seeds and dialogues.

    Args:
      suite: says which.
      found: per-dialogue values of each (method, seed) that is done.

    Returns:
      {method: {"value": {metric: ...}, "difference": {baseline: {metric: ...}}}}. A value is the mean over seeds; intervals
      are for other seeds and other groups of dialogues (`intervals.crossed`), with one seed for other groups alone.
    """
    result: dict[str, dict[str, Any]] = {}
    for method in suite.methods:
        mine = {seed: found[method, seed] for seed in suite.seeds if (method, seed) in found}
        values, differences = {}, {base: {} for base in suite.against.get(method, ())}
        for metric in suite.metrics:
            own = [(seed, x.groups, *x.scores[metric]) for seed, x in mine.items() if metric in x.scores]
            if own:
                values[metric] = _over_seeds(own)
            for base, gaps in differences.items():
                pairs = []
                for seed, x in mine.items():
                    other = found.get((base, suite.seeds[0] if base in suite.once else seed))
                    gap = comparing.difference(x, other, metric) if other else None
                    pairs += [(seed, x.groups, *gap)] if gap is not None else []
                if pairs:
                    gaps[metric] = _over_seeds(pairs)
        result[method] = {"value": values, "difference": differences}
    return result


def _over_seeds(parts: Sequence[tuple[int, Sequence[str], np.ndarray, np.ndarray]]) -> Metric:
    seeds = [str(seed) for seed, groups, _, _ in parts for _ in groups]
    groups = [g for _, groups, _, _ in parts for g in groups]
    return intervals.crossed(*(np.concatenate([p[i] for p in parts]) for i in (2, 3)), seeds, groups)


def markdown(suite: Suite, compared: Mapping[str, Mapping[str, Any]]) -> str:
    """The comparison as Markdown: a row for each method, and under it one for each of its baselines."""
    lines = ["| method | seeds | " + " | ".join(suite.metrics) + " |", "|---|---|" + "---|" * len(suite.metrics)]

    def row(name: str, metrics: Mapping[str, Metric], sign: bool) -> str:
        count = max((m["n"] for m in metrics.values()), default=0)
        return (
            f"| {name} | {count} | " + " | ".join(report.interval(metrics.get(m), sign) for m in suite.metrics) + " |"
        )

    for method, parts in compared.items():
        lines.append(row(method, parts["value"], False))
        lines += [row(f"less {base}", gaps, True) for base, gaps in parts["difference"].items()]
    lines += [
        "",
        "Differences are over the same seeds and dialogues; 95% intervals for other seeds and groups of dialogues "
        "(variance of two crossed effects, Student's t); of one seed, for other groups alone.",
    ]
    return "\n".join(lines) + "\n"


@command
def main(arguments: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m qaperso.bench", description=__doc__, allow_abbrev=False)
    parser.add_argument("--suite", required=True, type=Path, metavar="FILE", help="a Python file with get_suite()")
    parser.add_argument("--output", required=True, type=Path, metavar="DIR", help="where the runs and the table go")
    parser.add_argument("--minutes", type=float, default=float("inf"), metavar="M", help="stop after so many")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="cells that are made at a time (default: 1)")
    parser.add_argument("--table", action="store_true", help="train nothing, only write the table of what is there")
    known = parser.parse_args(arguments)
    suite = load_suite(known.suite)
    every = cells(suite, known.output)
    for cell in every:  # before the first is made, which takes long
        check(cell)
    if known.jobs < 1:
        raise UserError(f"--jobs is {known.jobs}, expected 1 or more")
    if known.jobs > 1:  # JAX would give the first process nearly all of a GPU's memory.
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    deadline = time.monotonic() + 60 * known.minutes
    failed = [] if known.table else make(every, suite.evaluate, deadline, known.jobs)
    measured = [c for c in every if c.method]
    done = {(c.method, c.seed): comparing.load(comparing.file_of(c.workdir, c.split)) for c in measured if c.done}
    if not done:
        raise (
            UserError("; ".join(failed))
            if failed
            else UserError(
                f"no cell of {known.suite} is done in {known.output}; run without --table, or with more --minutes"
            )
        )
    compared = compare(suite, done)
    text = markdown(suite, compared)
    (known.output / "table.md").write_text(text, encoding="utf-8")
    content: dict[str, Any] = {"suite": known.suite.name, "cells": len(done), "of": len(measured), "methods": compared}
    checkpoint.write_json(known.output / "table.json", content)
    print(text)
    print(
        f"{len(done)} of {len(measured)} cells are done; run again for the others"
        if len(done) < len(measured)
        else "all done"
    )
    if failed:
        raise UserError("; ".join(failed))
    return 0


if __name__ == "__main__":
    sys.exit(main())
