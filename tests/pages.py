"""What the pages show: blocks of code with their sections and titles, and the commands in them."""

from __future__ import annotations

import argparse
import ast
import dataclasses
import functools
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
FENCE = re.compile(r'^```(\w+)(?: title="([^"]*)")?\n(.*?)^```$', re.M | re.S)


@dataclasses.dataclass(frozen=True)
class Block:
    """A fenced block: the headings above it, its language, its title ("" = none), its text."""

    section: str
    language: str
    title: str
    text: str


def blocks(page: Path) -> list[Block]:
    """The fenced blocks of a page."""
    text = page.read_text(encoding="utf-8")
    found = []
    for match in FENCE.finditer(text):
        # Headings, not comments within other blocks.
        before = FENCE.sub("", text[: match.start()])
        section = re.findall(r"^#+ (.*)$", before, re.M)[-1]
        found.append(Block(section, match[1], match[2] or "", match[3]))
    return found


def titled(page: Path, title: str) -> str:
    """The text of the block of that title."""
    return next(block.text for block in blocks(page) if block.title == title)


@functools.cache
def parser(command: str) -> argparse.ArgumentParser:
    """The parser of `python -m qaperso.COMMAND`, as its source declares it: importing every command takes half a minute."""
    tree = ast.parse((ROOT / "qaperso" / f"{command}.py").read_text(encoding="utf-8"))
    made = argparse.ArgumentParser(prog=f"python -m qaperso.{command}", allow_abbrev=False)
    kinds = {"int": int, "float": float}
    for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
        if getattr(call.func, "attr", getattr(call.func, "id", "")) in ("add_argument", "add") and call.args:
            name = getattr(call.args[0], "value", "")
            if isinstance(name, str) and name.startswith("--"):
                given = {k.arg: k.value for k in call.keywords}
                told = {k: ast.literal_eval(given[k]) for k in ("nargs", "action", "required") if k in given}
                if isinstance(kind := given.get("type"), ast.Name) and kind.id in kinds:
                    told["type"] = kinds[kind.id]
                made.add_argument(name, **told)
    return made


def options(command: str) -> set[str]:
    """`--name` of every option of a command."""
    return {name for name in parser(command)._option_string_actions if name.startswith("--")}
