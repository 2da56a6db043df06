"""python benchmarks/bench.py [--json benchmarks/results.json] [--quick] [--data DIR ...] [--only NAME ...]

Runs every benchmark, one after another, each as a process; joins what they wrote with the machine's facts, after each of them;
prints one table of all ratios, their targets, their spreads and whether they hold. `make bench` runs this. The exit code is 1 where a
benchmark failed to run; a ratio that misses its target is a result.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import common
from common import HERE, Ratio
from rich.console import Console

SCRIPTS = ("train", "layout", "generation", "scaling", "pipeline", "contrast", "checkpoint", "history")
# Those that take data sets.
WITH_DATA = ("layout", "pipeline")


def run(name: str, options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """What one benchmark measured, or {"failed": exit code}."""
    script, result = HERE / f"{name}.py", folder / f"{name}.json"
    words = [sys.executable, str(script), "--json", str(result), *(["--quick"] if options.quick else [])]
    if name in WITH_DATA and options.data:
        words += ["--data", *map(str, options.data)]
    if name == "layout":
        words += ["--dtype", "float32"]  # what its targets are stated for
    start = time.perf_counter()
    code = subprocess.run(words).returncode
    if code or not result.is_file():
        print(f"{name}: failed with {code}")
        return {"failed": code}
    found = json.loads(result.read_text(encoding="utf-8"))
    return {"ratios": found["ratios"], "figures": found["figures"], "seconds": round(time.perf_counter() - start, 1)}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, default=HERE / "results.json", metavar="FILE")
    parser.add_argument("--quick", action="store_true", help="tiny shapes: whether everything runs")
    parser.add_argument("--data", type=Path, nargs="*", default=[], metavar="DIR", help="prepared data sets")
    parser.add_argument("--only", nargs="+", choices=SCRIPTS, default=SCRIPTS, metavar="NAME", help="of these alone")
    options = parser.parse_args()
    results: dict[str, Any] = {"machine": common.facts(), "quick": options.quick, "benchmarks": {}}
    with tempfile.TemporaryDirectory() as folder:
        for name in options.only:
            results["benchmarks"][name] = run(name, options, Path(folder))
            options.json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    ratios = []
    for name, found in results["benchmarks"].items():
        for r in found.get("ratios", []):
            ratios.append(Ratio(f"{name}: {r['name']}", r["value"], tuple(r["spread"]), r["target"], r["sense"]))
    console = Console(width=None if sys.stdout.isatty() else 160)
    machine = results["machine"]
    console.print(f"{machine['cpu']}, {machine['cores']} cores, jax {machine['jax']}, commit {machine['commit'][:12]}")
    console.print(common.table("all ratios", ratios))
    print(f"written to {options.json}")
    return int(any("failed" in found for found in results["benchmarks"].values()))


if __name__ == "__main__":
    sys.exit(main())
