"""python benchmarks/newcomer.py [--source REPOSITORY] [--json FILE] [--screenshot FILE]

Goes the way of somebody who has just heard of qaperso, and times it: clone, set up, `make demo`, start the server, open the page in a real
browser, ask, and read a reply. Everything happens in a new folder with caches of its own, so that nothing is there already; packages come
from wherever pip is set up to get them. Needs Chromium, and Playwright in the Python that runs it; ends with 1 where a step fails.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import common
import serve_load
from playwright.sync_api import Page, Playwright, expect, sync_playwright
from rich.console import Console
from rich.table import Table

NAMES = ("chromium", "chromium-browser", "google-chrome")
# Root has no sandbox, and containers have little shared memory.
OPTIONS = ["--no-sandbox", "--disable-dev-shm-usage"]
SIZE = {"width": 1200, "height": 640}
ASKED, ASKERS = "what do i still owe?", ("tilda", "harald", "anselm", "stranger")


@dataclasses.dataclass
class Clock:
    """Seconds of steps that follow each other."""

    start: float = dataclasses.field(default_factory=time.monotonic)
    seconds: dict[str, float] = dataclasses.field(default_factory=dict)

    def ends(self, step: str) -> None:
        """The step that began with the end of the one before is done."""
        self.seconds[step] = time.monotonic() - self.start - sum(self.seconds.values())
        print(f"{step}: {self.seconds[step]:.1f} s", flush=True)


def browser_path(playwright: Playwright) -> str | None:
    """Where a Chromium is: on PATH, or Playwright's own; None where there is none."""
    path = next(filter(None, map(shutil.which, NAMES)), playwright.chromium.executable_path)
    return path if os.path.exists(path) else None


@contextlib.contextmanager
def serving(folder: Path, environment: Mapping[str, str]) -> Iterator[str]:
    """The demo's model, served by the clone's own Python; gives the address when the first reply can be asked for."""
    words = [".venv/bin/python", "-m", "qaperso.serve", "--workdir", "runs/quickstart", "--port", "0"]
    process = subprocess.Popen(words, cwd=folder, env=environment, stdout=subprocess.PIPE, text=True)
    try:
        line = process.stdout.readline()
        found = re.search(r"http://\S+:(\d+)$", line.strip())
        if not found:
            raise RuntimeError(f"the server did not start: {line!r}")
        serve_load.wait_until_ready(int(found[1]))
        yield found[0]
    finally:
        process.terminate()
        process.wait(timeout=150)


def ask(page: Page, address: str) -> None:
    """Opens the page, asks, and waits until the first word of a reply to somebody whom the model knows can be read."""
    people = "".join(f"&as={name}" for name in ASKERS)
    page.goto(f"{address}/#n=64&t=0{people}")
    page.locator("#query").fill(ASKED)
    page.locator("#query").press("Enter")
    known = page.locator("article", has=page.locator("h2", has_text=ASKERS[0]))
    expect(known.locator(".text")).not_to_be_empty(timeout=60_000)


def shown(page: Page) -> dict[str, str]:
    """The replies that stand on the page, by who is told, when all are written."""
    expect(page.locator("article")).to_have_count(len(ASKERS))
    expect(page.locator(".live")).to_have_count(0, timeout=60_000)
    cards = page.locator("article").all()
    return {card.locator("h2").inner_text(): card.locator(".text").inner_text() for card in cards}


def go(source: str, folder: Path, screenshot: Path | None, clock: Clock) -> dict[str, str]:
    """The whole way; returns the replies that the page shows.

    Args:
      source: what is cloned.
      folder: an empty one.
      screenshot: where the page's picture goes, if anywhere.
      clock: is told when each step ends.

    Raises:
      CalledProcessError, RuntimeError, AssertionError: a step failed.
    """
    clone = folder / "qaperso"
    # Caches of pip and of XLA lie there too. GLIBC_TUNABLES is the Makefile's to set.
    kept = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV", "MAKEFLAGS", "MAKELEVEL")}
    environment = kept | {"XDG_CACHE_HOME": str(folder / "cache"), "PIP_CACHE_DIR": str(folder / "pip")}

    def run(*words: str, where: Path = clone) -> None:
        subprocess.run(words, cwd=where, env=environment, check=True)

    run("git", "clone", "--quiet", source, str(clone), where=folder)
    clock.ends("clone")
    run("make", ".venv/.installed")
    clock.ends("set up (venv, packages)")
    run("make", "demo")
    clock.ends("make demo")
    with serving(clone, environment) as address:
        clock.ends("server ready")
        with sync_playwright() as playwright:
            path = browser_path(playwright)
            if path is None:
                raise RuntimeError(
                    f"no browser: none of {', '.join(NAMES)} is on PATH, nor is playwright's own installed"
                )
            with playwright.chromium.launch(executable_path=path, args=OPTIONS) as browser:
                page = browser.new_page(viewport=SIZE)
                ask(page, address)
                clock.ends("first reply on the page")
                replies = shown(page)
                if screenshot:
                    page.screenshot(path=screenshot)
    return replies


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--source", default=str(common.ROOT), metavar="REPOSITORY", help="default: this one")
    parser.add_argument("--json", type=Path, metavar="FILE", help="where the times are written")
    parser.add_argument("--screenshot", type=Path, metavar="FILE", help="where the page's picture is written")
    options = parser.parse_args()
    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        replies = go(options.source, Path(folder), options.screenshot, clock)
    table = Table("step", "seconds", "since the start", title="from nothing to a reply")
    total = 0.0
    for step, seconds in clock.seconds.items():
        total += seconds
        table.add_row(step, f"{seconds:.1f}", f"{int(total) // 60} min {int(total) % 60:02d} s")
    Console().print(table)
    for who, said in replies.items():
        print(f"{who}: {said}")
    if options.json:
        # What was cloned is what is committed, whatever else lies here.
        words = ["git", "ls-remote", options.source, "HEAD"]
        commit = subprocess.run(words, capture_output=True, text=True, check=True).stdout.split()[0]
        machine = common.facts() | {"commit": commit}
        found: dict[str, Any] = {"seconds": clock.seconds, "total": total, "replies": replies, "machine": machine}
        options.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
