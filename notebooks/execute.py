"""python notebooks/execute.py [--steps N] [--runs DIR] [--output FILE]

Runs the notebook from top to bottom in a fresh kernel, as `make notebook` does on a few steps, and fails where a cell does.
With --output the notebook is written with what the cells gave; the one of the repository was made by
`python notebooks/execute.py --runs runs/notebook --output notebooks/qaperso_demo.ipynb`. Exit codes: 0 done, 1 a cell failed or shows what it should not.
"""

from __future__ import annotations

import argparse
import os
import re
import socket
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nbformat

NOTEBOOK = Path(__file__).with_name("qaperso_demo.ipynb")
# Seconds of a cell.
LONGEST = 1800
# Beginnings of paths that are of one machine; a slash within a word, an address or a fraction is none.
PATHS = re.compile(r"(?<![\w./:~-])(?:/(?:home|root|tmp|usr|opt|var|mnt|srv|work|content|Users|private)/|[A-Z]:\\)")


def execute(source: Path, steps: int, runs: str) -> Any:
    """The notebook with new outputs.

    Args:
      source: the notebook.
      steps: of each training; 0 = as the notebook has it.
      runs: where its trained models are kept, from the repository's root.

    Raises:
      CellExecutionError: a cell failed.
    """
    # Looked for here, since whoever only looks through outputs needs no kernel.
    from nbclient import NotebookClient

    os.environ |= {"QAPERSO_NOTEBOOK_STEPS": str(steps), "QAPERSO_NOTEBOOK_RUNS": runs}
    notebook = nbformat.read(source, as_version=4)
    options = dict(timeout=LONGEST, kernel_name="python3", record_timing=False, coalesce_streams=True)
    NotebookClient(notebook, resources={"metadata": {"path": str(source.parent)}}, **options).execute()
    # Which Python it was belongs to the machine, not to the notebook.
    notebook.metadata.language_info = {"name": "python"}
    return notebook


def texts(notebook: Any) -> Iterator[tuple[str, str]]:
    """Every text that a notebook's outputs hold, with the id of its cell."""
    for cell in notebook.cells:
        for output in cell.get("outputs", ()):
            yield from ((cell.id, output[key]) for key in ("text", "ename", "evalue") if key in output)
            yield from ((cell.id, str(data)) for data in output.get("data", {}).values())


def revealing(notebook: Any) -> list[str]:
    """What outputs say of the machine that they were made on, as `CELL: TEXT`: paths from its root, and its name."""
    name = socket.gethostname()
    found = []
    for cell, text in texts(notebook):
        found += [f"{cell}: {text[m.start() : m.start() + 60]!r}" for m in PATHS.finditer(text)]
        found += [f"{cell}: the name of this machine"] if len(name) > 3 and name in text else []
    return found


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument(
        "--steps", type=int, default=0, metavar="N", help="of each training; default: the notebook's own"
    )
    parser.add_argument("--runs", metavar="DIR", help="where models are kept; default: a folder that is removed again")
    parser.add_argument("--output", type=Path, metavar="FILE", help="where the notebook with its outputs is written")
    known = parser.parse_args()
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        notebook = execute(NOTEBOOK, known.steps, known.runs or folder)
    if known.output is None:
        print(f"{NOTEBOOK.name}: {len(notebook.cells)} cells, {time.monotonic() - start:.0f} s")
        return 0
    if found := revealing(notebook):
        print("\n".join(["not written, since outputs show what is this machine's:", *found]), file=sys.stderr)
        return 1
    nbformat.write(notebook, known.output)
    print(f"{known.output}: {len(notebook.cells)} cells, {time.monotonic() - start:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
