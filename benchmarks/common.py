"""What the benchmarks share: ratios and their table, facts of the machine, and programs in processes of their own.

Nothing here imports jax or torch: `pin` has to come before either starts its threads.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import gc
import json
import os
import pickle
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "torch", "transformers", "peft")


@dataclasses.dataclass(frozen=True)
class Ratio:
    """One measured ratio and what it should be.

    Attributes:
      name: what is divided by what.
      value: the ratio of the medians.
      spread: smallest and largest ratio of a pair of neighbouring rounds.
      target: what it is held against.
      sense: ">=" or "<=".
    """

    name: str
    value: float
    spread: tuple[float, float]
    target: float
    sense: str

    @property
    def holds(self) -> bool:
        """Whether the value is on the right side of the target."""
        return self.value >= self.target if self.sense == ">=" else self.value <= self.target


def compare(name: str, over: Sequence[float], under: Sequence[float], target: float, sense: str) -> Ratio:
    """The ratio of two programs that took turns: `over[i]` and `under[i]` are neighbours in time."""
    pairs = [a / b for a, b in zip(over, under, strict=True)]
    return Ratio(name, statistics.median(over) / statistics.median(under), (min(pairs), max(pairs)), target, sense)


def single(name: str, value: float, target: float, sense: str) -> Ratio:
    """A figure that does not vary, such as bytes that a compiler has planned."""
    return Ratio(name, value, (value, value), target, sense)


def parser(description: str | None, rounds: int) -> argparse.ArgumentParser:
    """The options that every benchmark has."""
    made = argparse.ArgumentParser(
        description=description, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("--json", type=Path, metavar="FILE", help="where ratios and figures are written")
    made.add_argument("--quick", action="store_true", help="tiny shapes and two rounds: whether it runs, not how fast")
    made.add_argument(
        "--rounds", type=int, default=rounds, help="how often each program is timed (default %(default)s)"
    )
    made.add_argument("--threads", type=int, default=2, help="cores that everything is held to (default %(default)s)")
    return made


def begin(options: argparse.Namespace) -> None:
    """Holds this process and those that it starts to `options.threads` cores; a quick run has two rounds."""
    if options.quick:
        options.rounds = 2
    options.threads = pin(options.threads)


def pin(threads: int) -> int:
    """Keeps to the first cores that are free to use, as many as there are; how many that is."""
    if not hasattr(os, "sched_setaffinity"):  # not Linux
        return min(threads, os.cpu_count() or 1)
    cores = sorted(os.sched_getaffinity(0))[:threads]
    os.sched_setaffinity(0, cores)
    os.environ["OMP_NUM_THREADS"] = str(len(cores))
    return len(cores)


def report(options: argparse.Namespace, title: str, ratios: Sequence[Ratio], figures: Mapping[str, Any]) -> None:
    """Prints a benchmark's tables and writes its file."""
    console = Console(width=None if sys.stdout.isatty() else 160)
    shown = Table("figure", "value", title=f"{title}: figures")
    for name, value in flat(figures):
        shown.add_row(name, f"{value:,.4g}" if isinstance(value, float) else escape(str(value)))
    console.print(shown)
    if ratios:
        console.print(table(f"{title}: ratios", ratios))
    if options.json:
        found = {"ratios": [dataclasses.asdict(r) for r in ratios], "figures": figures}
        options.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def table(title: str, ratios: Sequence[Ratio]) -> Table:
    """Every ratio beside its spread and target."""
    shown = Table(title=title)
    shown.add_column("ratio", overflow="fold")
    for column in ("value", "spread", "target", "holds"):
        shown.add_column(column, justify="right", no_wrap=True)
    for r in ratios:
        spread = "" if r.spread[0] == r.spread[1] else f"{r.spread[0]:.3g} to {r.spread[1]:.3g}"
        shown.add_row(escape(r.name), f"{r.value:.3g}", spread, f"{r.sense} {r.target:g}", "yes" if r.holds else "NO")
    return shown


def flat(figures: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted name, value) of nested figures."""
    for name, value in figures.items():
        if isinstance(value, Mapping):
            yield from flat(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def facts() -> dict[str, Any]:
    """What a figure depends on: machine, libraries, commit, date."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    named = {k.strip(): v.strip() for k, _, v in (line.partition(":") for line in lines)}
    have = {}
    for name in PACKAGES:
        try:
            have[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            have[name] = None
    return {
        "cpu": named.get("model name", platform.processor()),
        # The name alone says little under a hypervisor.
        "cpu_family_model": f"{named.get('cpu family', '')}/{named.get('model', '')}",
        "vectors": sorted(f for f in named.get("flags", "").split() if f.startswith(("avx2", "avx512", "amx"))),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
        "python": platform.python_version(),
        **have,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": _git("rev-parse", "HEAD") + ("-changed" if _git("status", "--porcelain", "-uno") else ""),
    }


def _git(*words: str) -> str:
    try:
        return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def missing(*packages: str) -> str:
    """A line that names the first package that is not installed; "" where all are."""
    for name in packages:
        try:
            metadata.version(name)
        except metadata.PackageNotFoundError:
            return f"left out: {name} is not installed; pip install '.[bench]'"
    return ""


def peak_rss() -> int:
    """Largest resident memory of this process so far, bytes."""
    found = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return found if sys.platform == "darwin" else found * 1024


def spread(seconds: Sequence[float]) -> dict[str, float]:
    """Median, least and most in milliseconds."""
    return {"ms": 1e3 * statistics.median(seconds), "from": 1e3 * min(seconds), "to": 1e3 * max(seconds)}


def attempt(shape: str, work: Callable[[], Mapping[str, Any]]) -> dict[str, Any]:
    """What a piece of work on a shape measured, or why it failed, in a line."""
    gc.collect()
    try:
        return {"shape": shape, **work()}
    except Exception as error:  # whatever a kernel or an allocator raises, the others go on
        return {"shape": shape, "failed": f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]}


class Worker:
    """A program in a process of its own, so that its thread pools and memory disturb no other; it works when asked to.

    `script` is a file beside this one that calls `serve`.
    """

    def __init__(self, script: str, spec: Mapping[str, Any], environment: Mapping[str, str] | None = None):
        """Starts the program and waits until it is ready.

        Args:
          script: file name.
          spec: what to run, for the script's `build`; anything that pickles.
          environment: variables besides the usual ones.
        """
        settings = {
            # Otherwise a second compilation is a look-up on disk.
            "JAX_ENABLE_COMPILATION_CACHE": "false",
            "JAX_PLATFORMS": "cpu",
            "HF_HUB_OFFLINE": "1",
        }
        with tempfile.NamedTemporaryFile(suffix=".pickle") as file:
            pickle.dump(dict(spec), file)
            file.flush()
            self.name = script
            self._process = subprocess.Popen(
                [sys.executable, str(HERE / script), file.name],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                env=os.environ | settings | dict(environment or {}),
            )
            self.facts = self._read()
        self.rss = 0

    def _read(self) -> dict[str, Any]:
        line = self._process.stdout.readline()
        if not line:
            sys.exit(f"error: {self.name} stopped with {self._process.wait()}")
        return json.loads(line)

    def ask(self, work: str, **parts: Any) -> Any:
        """Has the program do one piece of work and gives its answer."""
        self._process.stdin.write(json.dumps({"work": work} | parts) + "\n")
        self._process.stdin.flush()
        answer = self._read()
        self.rss = answer["rss"]
        return answer["answer"]

    def seconds(self, numbers: Sequence[int]) -> list[float]:
        """Seconds of the steps on these batches, one after another."""
        return self.ask("steps", numbers=list(numbers))

    def close(self) -> None:
        """Ends the program."""
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()


def serve(build: Callable[[dict[str, Any]], tuple[dict[str, Any], Mapping[str, Callable[..., Any]]]]) -> None:
    """The other end of a `Worker`: builds what the spec asks for, then answers until its input ends.

    Args:
      build: spec -> (facts for `Worker.facts`, {work: function of its parts}).
    """
    # Whatever libraries print goes to stderr; answers have a stream of their own.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    spec = pickle.loads(Path(sys.argv[1]).read_bytes())
    found, works = build(spec)
    print(json.dumps(found), file=answers, flush=True)
    for line in sys.stdin:
        parts = json.loads(line)
        answer = works[parts.pop("work")](**parts)
        print(json.dumps({"answer": answer, "rss": peak_rss()}), file=answers, flush=True)


def fastest(
    makers: Mapping[str, Callable[[], Worker]], trial: Callable[[Worker], float]
) -> tuple[str, Worker, dict[str, float]]:
    """Starts candidates one after another and keeps the one whose trial takes least; there is no trial of a single one.

    Returns:
      Its name, the worker, still running, and every trial.
    """
    best, kept, trials = "", None, {}
    for name, make in makers.items():
        worker = make()
        if len(makers) > 1:
            trials[name] = trial(worker)
        if kept is None or trials[name] < trials[best]:
            if kept is not None:
                kept.close()
            best, kept = name, worker
        else:
            worker.close()
    assert kept is not None
    return best, kept, trials
