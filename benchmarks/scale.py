"""python benchmarks/scale.py [--only TEXT ...] [--page]

Plans each configuration of a real size on the chips it was tuned for, a process each, and writes docs/evidence/scale.json and
docs/scale.md. A plan takes one to some minutes of one core, and needs the compilers: pip install 'qaperso[tpu]'.
`--only` plans again what has one of these texts in its name and keeps the other rows; `--page` writes the page alone.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from qaperso import config as configs

ROOT = Path(__file__).resolve().parent.parent
RECORD, PAGE = ROOT / "docs" / "evidence" / "scale.json", ROOT / "docs" / "scale.md"
# What each variant's chips are called as a topology. A v5p is named by its TensorCores, of which a chip has two.
TOPOLOGIES = {
    "v5e-16": "v5e:4x4",
    "v5e-256": "v5e:16x16",
    "v5p-128": "v5p:4x4x4",
    "v6e-64": "v6e:8x8",
}
CONFIGS = ("qar_llama3_8b", "qar_llama3_70b", "qar_qwen2_5_7b", "qar_qwen3_8b")
GIB = 2**30
HEAD = """# Scale

What the train step of each configuration is predicted to need and to reach on chips that it was compiled for ahead of time.
Written by `python benchmarks/scale.py`; one row again: `python -m qaperso.plan --config CONFIG --topology TOPOLOGY`. **Nothing here
was measured on an accelerator.** Memory, FLOPs and communication are the compiler's own of the real program; time is a roofline's, with
two constants fitted on two published runs, which predicts two others within 20% (`qaperso/roofline.py`, docs/architecture.md).

MFU counts 4 FLOPs for a frozen kernel's entry and token, 6 for a trained one's, and nothing for attention's scores, for what the second
tower computes again with the same kernel, or for what is recomputed. "bound" is what takes the largest part of the step.

| config | topology | fits | peak GiB a chip | rows x length | remat | step s | tokens/s a chip | MFU | bound |
|---|---|---|---|---|---|---|---|---|---|
"""


def rows() -> list[tuple[str, str]]:
    """(config with variant, topology) of every plan."""
    found = []
    for name in CONFIGS:
        found += [(f"configs/{name}.py:{v}", TOPOLOGIES[v]) for v in configs.variants(ROOT / "configs" / f"{name}.py")]
    return found


def plan(config: str, topology: str) -> dict[str, Any]:
    """One plan's record, or {"failed": its message}."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "plan.json"
        words = ["-m", "qaperso.plan", "--config", config, "--topology", topology, "--json", str(file)]
        done = subprocess.run([sys.executable, *words], cwd=ROOT, stderr=subprocess.PIPE, text=True)
        if not file.is_file():
            return {"failed": done.stderr.strip().splitlines()[-1]}
        return json.loads(file.read_text(encoding="utf-8"))


def line(config: str, topology: str, found: dict[str, Any]) -> str:
    """A row of the table."""
    c = configs.load(ROOT / config)
    name = config.removeprefix("configs/").replace(".py:", ":")
    if "failed" in found:
        return f"| {name} | {topology} | not planned: {found['failed']} |" + " |" * 7
    cells = [
        name,
        topology,
        "yes" if found["fits"] else "no",
        f"{found['peak_bytes'] / GIB:.1f} of {found['hbm_bytes'] // GIB}",
    ]
    cells += [f"{c.batch.rows} x {c.batch.length}", c.remat]
    if found["fits"]:
        cells += [
            f"{found['step_seconds']:.2f}",
            f"{found['tokens_per_second']:,.0f}",
            f"{found['mfu']:.1%}",
            found["bound"],
        ]
    else:
        cells += ["", "", "", "memory"]
    return "| " + " | ".join(cells) + " |"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", default=[], metavar="TEXT", help="of these alone")
    parser.add_argument("--page", action="store_true", help="plans nothing")
    options = parser.parse_args()
    record = json.loads(RECORD.read_text(encoding="utf-8")) if RECORD.is_file() else {}
    for config, topology in [] if options.page else rows():
        if options.only and not any(text in config for text in options.only):
            continue
        record[config] = plan(config, topology)
        RECORD.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        print(line(config, topology, record[config]), flush=True)
    lines = [line(config, topology, record[config]) for config, topology in rows() if config in record]
    PAGE.write_text(HEAD + "\n".join(lines) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
