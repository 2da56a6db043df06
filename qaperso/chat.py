"""python -m qaperso.chat --workdir DIR --querier NAME [NAME ...] [--once TEXT] [--history FILE]

Talks to a run as somebody it knows, or as "stranger". Several queriers ask the same and are answered side by side. With a method
that reads history (`config.pplug`) also as anybody whose dialogues are in FILE: nothing is trained for them.
"""

from __future__ import annotations

import argparse
import collections
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from qaperso import reply
from qaperso.batching import Model, prepare
from qaperso.data.formats import jsonl
from qaperso.errors import UserError, command, nearest
from qaperso.generate import Sampling
from qaperso.mesh import start_runtime
from qaperso.run import Run, open_run, restore
from qaperso.types import STRANGER, Turn


def answer_one(
    model: Model, history: list[Turn], querier: str, row: int, text: str, responder: str, how: Sampling
) -> None:
    """Streams one reply to the terminal and adds query and reply to the history."""
    run, pieces = model.run, []
    asked = reply.question(run, history, querier, text, responder)
    for piece in reply.stream(model, asked, row, how):
        print(piece, end="", flush=True)
        pieces.append(piece)
    print()
    history += [Turn(querier, text), Turn(responder, "".join(pieces))]


def answer_all(model: Model, rows: Mapping[str, int], text: str, responder: str, how: Sampling) -> None:
    """One query of several queriers, answered side by side."""
    asked = [reply.question(model.run, [], q, text, responder) for q in rows]
    found = reply.replies(model, asked, list(rows.values()), [how] * len(asked))
    # Text, since what people say may look like markup.
    table = Table(title=Text(text), show_lines=True)
    table.add_column("querier")
    table.add_column(Text(f"{responder} replies"))
    for querier, said in zip(rows, found, strict=True):
        table.add_row(Text(querier), Text(said))
    Console().print(table)


@command
def main(arguments: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m qaperso.chat", description=__doc__, allow_abbrev=False)
    parser.add_argument("--workdir", required=True, metavar="DIR")
    parser.add_argument("--querier", required=True, nargs="+", metavar="NAME", help='"stranger" = nobody it knows')
    parser.add_argument("--responder", metavar="NAME", help="needed where the run has several")
    parser.add_argument("--once", metavar="TEXT", help="ask this and leave")
    parser.add_argument("--history", metavar="FILE", help="jsonl dialogues that took place since training")
    parser.add_argument("--temperature", type=float)
    parser.add_argument("--top-p", type=float)
    parser.add_argument("--max-new-tokens", type=int)
    parser.add_argument("--seed", type=int, default=0)
    known = parser.parse_args(arguments)
    _check_sampling(known)
    start_runtime()
    run = open_run(Path(known.workdir))
    told = take_in(run, Path(known.history)) if known.history else set()
    # Whoever has a history but no row is a stranger to whatever else the model learned of people.
    names = run.registry.queriers
    rows = {q: STRANGER if q in told and q not in names else run.registry.row(q) for q in known.querier}
    responder = _responder(run, known.responder)
    if len(known.querier) > 1 and known.once is None:
        raise UserError("several queriers are answered side by side to one query; give it with --once TEXT")
    if known.once is not None and not known.once.strip():
        raise UserError("--once is empty; give the text of a query")
    model = prepare(run, restore(run)[0])
    run = model.run  # without the base, whose memory is free again
    g = run.config.generate
    how = Sampling(
        known.max_new_tokens or g.max_new_tokens,
        g.temperature if known.temperature is None else known.temperature,
        g.top_p if known.top_p is None else known.top_p,
        known.seed,
    )
    if known.once is not None:
        if len(known.querier) > 1:
            answer_all(model, rows, known.once, responder, how)
        else:
            answer_one(model, [], known.querier[0], rows[known.querier[0]], known.once, responder, how)
        return 0
    history: list[Turn] = []
    prompt = f"{known.querier[0]}> " if sys.stdin.isatty() else ""
    while True:
        try:
            text = input(prompt).strip()
        except (EOFError, KeyboardInterrupt):
            return 0
        if text:
            answer_one(model, history, known.querier[0], rows[known.querier[0]], text, responder, how)


def take_in(run: Run, path: Path) -> set[str]:
    """Makes dialogues that took place since training history of the run; the names of their queriers.

    Raises:
      UserError: the file cannot be read, or the run's method keeps no history.
    """
    if run.reader is None:
        raise UserError(
            f"--history: config.method='{run.config.method}' of this run keeps no history; use one trained with "
            "config.pplug.encoder set"
        )
    dialogues = list(jsonl.read(path, collections.Counter()))
    for dialogue in dialogues:
        run.reader.add(dialogue)
    return {d.querier for d in dialogues}


def _check_sampling(known: argparse.Namespace) -> None:
    if known.temperature is not None and not known.temperature >= 0:
        raise UserError(f"--temperature is {known.temperature}, expected 0 (greedy) or more")
    if known.top_p is not None and not 0 < known.top_p <= 1:
        raise UserError(f"--top-p is {known.top_p}, expected more than 0, at most 1")
    if known.max_new_tokens is not None and known.max_new_tokens < 1:
        raise UserError(f"--max-new-tokens is {known.max_new_tokens}, expected 1 or more")


def _responder(run: Run, name: str | None) -> str:
    names = run.registry.responders
    if name is None and len(names) > 1:
        raise UserError(f"the run has {len(names)} responders; choose one with --responder{nearest('', names)}")
    if name is not None and name not in names:
        raise UserError(f"responder '{name}' is not known to this run{nearest(name, names)}")
    return name or names[0]


if __name__ == "__main__":
    sys.exit(main())
