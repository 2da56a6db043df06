"""Collects what finished runs measured: python tests/evidence.py NAME WORKDIR... writes docs/evidence/NAME.json."""

from __future__ import annotations

import json
import os
import platform
import sys
from pathlib import Path

FOLDER = Path(__file__).parents[1] / "docs" / "evidence"
CURVE = ("lm", "contrast", "dev_nll")


def collect(workdir: Path) -> dict:
    """Command, seed, curves and scores of one run, from its own files."""
    record = json.loads((workdir / "run.json").read_text(encoding="utf-8"))
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    scores = json.loads((workdir / "eval.json").read_text(encoding="utf-8"))
    curves = {name: [[v["step"], round(v[name], 4)] for v in lines if name in v] for name in CURVE}
    # A run is named after its config; paths of a machine stay out.
    path = record["config"]["data"]["path"]
    data = f" --config.data.path=data/{Path(path).name}" if path else ""
    return {
        "command": f"python -m qaperso.train --config configs/{workdir.name}.py --workdir runs/{workdir.name}{data}",
        "seed": record["config"]["seed"],
        "steps": record["config"]["steps"],
        "checkpoint": scores["step"],
        "curves": {name: curve for name, curve in curves.items() if curve},
        "metrics": scores["metrics"],
    }


def write(name: str, workdirs: list[Path]) -> dict:
    """Writes docs/evidence/NAME.json and returns what it holds."""
    import jax

    machine = {"cores": os.cpu_count(), "machine": platform.machine(), "jax": jax.__version__}
    data = {"machine": machine, "runs": {w.name: collect(w) for w in workdirs}}
    FOLDER.mkdir(parents=True, exist_ok=True)
    (FOLDER / f"{name}.json").write_text(json.dumps(data) + "\n", encoding="utf-8")
    return data


if __name__ == "__main__":
    write(sys.argv[1], [Path(w) for w in sys.argv[2:]])
