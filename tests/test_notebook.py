"""The notebook: it is valid, was run, names nothing that is not there, and tells nothing of the machine that it was run on."""

from __future__ import annotations

import ast
import importlib
import re
import sys
import tomllib
from pathlib import Path
from typing import Any

import nbformat
import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "notebooks"))
import execute  # noqa: E402


@pytest.fixture(scope="module")
def notebook() -> Any:
    return nbformat.read(execute.NOTEBOOK, as_version=4)


@pytest.fixture(scope="module")
def project() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def trees(notebook: Any) -> dict[str, ast.Module]:
    """The code cells, parsed, by id."""
    return {cell.id: ast.parse(cell.source) for cell in notebook.cells if cell.cell_type == "code"}


def test_it_is_valid_and_was_run_from_top_to_bottom(notebook: Any) -> None:
    nbformat.validate(notebook)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    outputs = {cell.id: cell.outputs for cell in cells}
    kinds = {name: {output.output_type for output in found} for name, found in outputs.items()}
    assert not [name for name, found in kinds.items() if "error" in found]
    assert {name for name, found in kinds.items() if not found} <= {"parameters", "install"}
    for name in ("curves", "swap", "map", "newcomer"):
        assert any("<svg" in output.get("data", {}).get("image/svg+xml", "") for output in outputs[name])
    # It was run in full, not on a handful of steps.
    assert "STEPS = int(" in next(cell.source for cell in cells if cell.id == "parameters")
    assert "steps: 250 for the base" in str(outputs["device"])
    said = "".join(text for cell, text in execute.texts(notebook) if cell == "scores")
    assert "exact_heldout" in said and "swap_gap" in said


def test_its_outputs_are_of_no_machine(notebook: Any) -> None:
    assert execute.revealing(notebook) == []


@pytest.mark.parametrize("text", ["/home/ida/x", "see '/tmp/a'", "(/root/.cache)", "C:\\Users\\ida", "/Users/ida/run"])
def test_a_path_of_a_machine_is_found(notebook: Any, text: str) -> None:
    output = nbformat.v4.new_output("stream", text=f"page of qar: {text}\n")
    assert (
        len(execute.revealing(nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("1", outputs=[output])]))) == 1
    )
    harmless = nbformat.v4.new_output("stream", text="runs/home/x 3/tmp/ https://x.org/usr/bin a/work/b ../tmp/x")
    assert not execute.revealing(nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("1", outputs=[harmless])]))


def test_every_name_of_the_package_that_it_uses_is_there(notebook: Any) -> None:
    names: dict[str, Any] = {}
    for tree in trees(notebook).values():
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "qaperso":
                for alias in node.names:
                    try:
                        found = importlib.import_module(f"{node.module}.{alias.name}")
                    except ModuleNotFoundError:
                        found = getattr(importlib.import_module(node.module), alias.name)
                    names[alias.asname or alias.name] = found
    used = {
        (node.value.id, node.attr)
        for tree in trees(notebook).values()
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in names
    }
    assert len(used) >= 10
    assert [pair for pair in used if not hasattr(names[pair[0]], pair[1])] == []
    # Configurations and documents that it names are there too.
    text = "\n".join(cell.source for cell in notebook.cells)
    files = set(re.findall(r"(?:configs|docs|notebooks)/\w+\.\w+", text))
    assert len(files) >= 5 and [file for file in files if not (ROOT / file).is_file()] == []


def test_cells_keep_their_names(notebook: Any) -> None:
    ids = [cell.id for cell in notebook.cells]
    assert len(set(ids)) == len(ids)
    # Names that somebody gave, not numbers that a program drew.
    assert all(re.fullmatch(r"[a-z]+(-[a-z]+)*", name) for name in ids)


def test_it_is_where_its_badge_and_the_package_say(notebook: Any, project: dict[str, Any]) -> None:
    address = project["urls"]["Repository"]
    values = {
        target.id: value.value
        for node in trees(notebook)["parameters"].body
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Tuple)
        for target, value in zip(node.targets[0].elts, node.value.elts, strict=True)
    }
    assert values["REPOSITORY"] == address
    place = execute.NOTEBOOK.relative_to(ROOT).as_posix()
    link = f"https://colab.research.google.com/github/{address.removeprefix('https://github.com/')}/blob/{values['REVISION']}/{place}"
    assert link in notebook.cells[0].source and link in (ROOT / "README.md").read_text(encoding="utf-8")


def test_what_it_installs_is_pinned_and_what_the_package_takes(project: dict[str, Any]) -> None:
    lines = (ROOT / "notebooks/constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = {canonicalize_name(n): v for n, _, v in (line.partition("==") for line in lines if "==" in line)}
    for needed in map(Requirement, project["dependencies"]):
        assert needed.specifier.contains(pins[canonicalize_name(needed.name)], prereleases=True), needed
