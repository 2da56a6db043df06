"""python -m qaperso.enrol --workdir DIR --querier NAME --input PATH [PATH ...] [--responder NAME]
python -m qaperso.enrol --workdir DIR --again

Makes somebody known to a run from a few dialogues in which it answers them, of any format that `prepare` reads. Only a row of
their own is fitted; the checkpoints stay as they are, byte for byte. What was learned is in DIR/enrolled, a file a person.
--again fits the rows of all who were enrolled anew, after training went on. Exit codes: 0 done, 2 bad input.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from qaperso import people, rows
from qaperso.data import formats, shards
from qaperso.data.formats.common import as_name
from qaperso.data.store import STRANGER_NAME, Registry
from qaperso.errors import UserError, command, nearest
from qaperso.mesh import start_runtime
from qaperso.people import Person
from qaperso.run import Run, open_run, restore
from qaperso.types import STRANGER, Dialogue, Example

Tree = Any

# Seconds of silence after which a conversation begins anew, as `prepare` has it by default.
SILENCE = 6 * 3600.0
# So many dialogues are enough to hold some of them out, at most this share.
ENOUGH, HELD_OUT = 5, 1 / 3


def read_dialogues(paths: Sequence[Path], responders: Sequence[str], kind: str | None = None) -> list[Dialogue]:
    """The dialogues of files or folders in which some responders answer, read and cut as `prepare` does it.

    Args:
      paths: each of any format.
      responders: whose replies are kept.
      kind: the format of all; None = found out.

    Raises:
      UserError: nothing there, no known format, or a file that is not as its format has it.
    """
    dialogues = []
    with tempfile.TemporaryDirectory() as folder:
        for number, path in enumerate(paths):
            work = Path(folder, str(number))
            work.mkdir()
            reading = shards.Reading(kind or formats.detect(path)[0], tuple(responders), silence=SILENCE)
            for task in shards.read_tasks(reading, [path], work):
                shards.read_shard(task)
                dialogues += shards.saved(task.target)
    return dialogues


def of_querier(dialogues: Sequence[Dialogue], name: str, responders: Sequence[str], where: str) -> list[Dialogue]:
    """The dialogues in which one of the responders answers the querier.

    Raises:
      UserError: there is none.
    """
    own = [d for d in dialogues if d.querier == name and d.responder in responders]
    if not own:
        asking = {d.querier for d in dialogues if d.responder in responders}
        said = ", ".join(f"'{r}'" for r in responders[:4]) + (", ..." if len(responders) > 4 else "")
        raise UserError(
            f"{where}: found no dialogue in which {said} answers '{name}', expected at least one"
            + (
                nearest(name, asking)
                if asking
                else "; nobody is answered there: is the responder called so in the file?"
            )
        )
    return own


def hold_out(dialogues: Sequence[Dialogue]) -> tuple[list[Dialogue], list[Dialogue]]:
    """Dialogues to learn from, and those of the last group to score, as far as there are enough (ours).

    Held out is the newest group, or where no times are known the last, that is no more than a third of all; none where
    there are fewer than five dialogues, or no such group.
    """
    order = sorted(dialogues, key=lambda d: -np.inf if d.time is None else d.time)
    groups = dict.fromkeys(d.group for d in reversed(order))
    sizes = {group: sum(d.group == group for d in order) for group in groups}
    small = [group for group in groups if sizes[group] <= HELD_OUT * len(order)]
    if len(order) < ENOUGH or not small:
        return list(dialogues), []
    return [d for d in dialogues if d.group != small[0]], [d for d in dialogues if d.group == small[0]]


def encode(run: Run, dialogues: Sequence[Dialogue]) -> tuple[list[Example], int]:
    """Sequences of dialogues, and how many of their replies are in none, as too long for a row."""
    number = {name: i for i, name in enumerate(run.registry.responders)}
    examples, replies = [], sum(max(len(d.replies), 1) for d in dialogues)
    for i, d in enumerate(dialogues):
        # What the contrast reads is not there.
        ids = dict(querier=STRANGER, responder=number[d.responder], cluster=0, text=i, label=-1, index=i)
        for e in run.encode(d):
            examples.append(Example(e.tokens, e.role, e.predicted, **ids, cut=e.cut, columns=e.columns))
            replies -= e.replies
    return examples, replies


def enrol(run: Run, trainable: Tree, step: int, name: str, dialogues: Sequence[Dialogue]) -> Person:
    """Fits a row to somebody new; nothing is written, and `run` and `trainable` stay as they are.

    Args:
      run: opened without those who came after training.
      trainable: of its checkpoint.
      step: of that checkpoint.
      name: of the querier.
      dialogues: in which they are answered by responders of the run.

    Returns:
      The person in the run's first free row. `found` has "seconds"; "learned", "held_out" and "left_out", numbers of dialogues
      and, the last, of replies that are too long; and, where a row was fitted, "given" and "unheard" (None where nothing is held
      out): {"before", "after": reply NLL in nats a token under the stranger's row and the new one, "tokens"}. A run whose
      method has no rows and reads history gets the dialogues alone, a vector of None.

    Raises:
      UserError: the method has neither rows nor history, no row is free, or no dialogue fits.
    """
    start = time.monotonic()
    fitted = "rows" in trainable.get("tower", {}) or run.store is None
    row = rows.spare_row(run, trainable) if fitted else rows.free_row(run.registry)
    person = Person(name, row, step, "", None, people.numbered(dialogues, row), {})
    if run.store is not None:
        # Each dialogue sees the others as its history.
        run = rows.heard(run, [person])
    learned, unheard = hold_out(person.dialogues) if fitted else (person.dialogues, [])
    examples, left_out = encode(run, learned)
    found: dict[str, Any] = {"learned": len(learned), "held_out": len(unheard), "left_out": left_out}
    if fitted:
        given = rows.read(run, trainable, examples)
        vector = rows.descend(given)
        if not np.isfinite(vector).all():
            raise UserError(
                f"the row fitted for '{name}' is not finite; are this run's weights sound? evaluate it first"
            )
        found["given"] = _figures(given, trainable, vector)
        scored, _ = encode(run, unheard)
        found["unheard"] = _figures(rows.read(run, trainable, scored), trainable, vector) if scored else None
        person = dataclasses.replace(person, weights=people.digest(trainable), vector=np.asarray(vector))
    return dataclasses.replace(person, found=found | {"seconds": round(time.monotonic() - start, 1)})


def _figures(known: rows.Read, trainable: Tree, vector: Any) -> dict[str, float]:
    before, tokens = rows.nll(known, people.table_of(trainable)[STRANGER])
    after, _ = rows.nll(known, vector)
    return {"before": before / tokens, "after": after / tokens, "tokens": tokens}


def add(workdir: Path, registry: Registry, person: Person) -> Person:
    """Writes somebody new down, in the first row that is free by now; returns them as they were written.

    Args:
      workdir: of the run.
      registry: of training.
      person: from `enrol`.

    Raises:
      UserError: the name is taken, no row is free, or the folder cannot be written.
    """
    with people.locked(workdir):
        now = people.joined(registry, people.read(workdir), workdir)
        check_name(now, person.name)
        row = rows.free_row(now)
        person = dataclasses.replace(person, row=row, dialogues=people.numbered(person.dialogues, row))
        people.write(workdir, person)
    return person


def check_name(registry: Registry, name: str) -> None:
    """Makes sure that somebody new can be called so.

    Raises:
      UserError: somebody is called so already.
    """
    if name == STRANGER_NAME:
        raise UserError(f"--querier '{name}' is what everybody unknown is called; give another name")
    if name in registry.known:
        raise UserError(
            f"--querier '{name}' is known to this run already; forget them first with python -m qaperso.forget, or give another"
            " name"
        )


def enrol_again(workdir: Path) -> list[Person]:
    """Fits the rows of all who were enrolled anew, on the run's present checkpoint.

    Raises:
      UserError: nobody was enrolled, or somebody's dialogues were not kept.
    """
    run = open_run(workdir, enrolled=False)
    trainable, _, step = restore(run)
    with people.locked(run.workdir):
        found = people.read(run.workdir)
        if not found:
            raise UserError(f"{workdir}: found nobody who was enrolled, expected somebody to enrol again")
        again = []
        for person in found:
            if not person.dialogues:
                raise UserError(
                    f"{workdir}: the dialogues of '{person.name}' were not kept; forget and enrol them anew"
                )
            fresh = enrol(run, trainable, step, person.name, person.dialogues)
            again.append(dataclasses.replace(fresh, row=person.row, dialogues=person.dialogues))
        for person in again:
            people.write(run.workdir, person)
    return again


def summary(person: Person, workdir: Path) -> str:
    """What a person wants to see at the end."""
    found = person.found
    lines = [
        f"enrolled '{person.name}' in row {person.row} of {workdir}: {found['learned']} dialogues"
        f", {found['held_out']} held out, {found['left_out']} replies left out as too long, {found['seconds']:.1f} s"
    ]
    for key, what in (("given", "learned"), ("unheard", "held out")):
        if figures := found.get(key):
            change = f"{figures['before']:.3f} -> {figures['after']:.3f} nats per token"
            worse = figures["after"] > figures["before"]
            note = "; worse than a stranger: more dialogues may help" if worse else ""
            lines.append(f"{what}: {change} over {figures['tokens']} tokens{note}")
    if person.vector is None:
        lines.append(
            "no row was fitted: this run's method knows queriers by their history, which has these dialogues now"
        )
    return "\n".join(lines)


@command
def main(arguments: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m qaperso.enrol", description=__doc__, allow_abbrev=False)
    parser.add_argument("--workdir", required=True, metavar="DIR")
    parser.add_argument("--querier", metavar="NAME", help="as the dialogues call them")
    parser.add_argument("--input", nargs="+", metavar="PATH", help="files or folders of dialogues")
    parser.add_argument(
        "--responder", metavar="NAME", help="whose replies to learn from; default: all whom the run has"
    )
    parser.add_argument("--format", metavar="NAME", help=f"one of {', '.join(formats.FORMATS)}; default: found out")
    parser.add_argument("--again", action="store_true", help="fit the rows of all who were enrolled anew")
    known = parser.parse_args(arguments)
    workdir = Path(known.workdir)
    if known.again:
        if known.querier or known.input:
            raise UserError(
                "--again is for all who were enrolled, from what was kept of them; leave --querier and --input out"
            )
        start_runtime(alone=True)
        print("\n".join(summary(person, workdir) for person in enrol_again(workdir)))
        return 0
    if not known.querier or not known.input:
        raise UserError("somebody new needs --querier NAME and --input PATH, or give --again")
    name = as_name(known.querier, "--querier")
    start_runtime(alone=True)
    run = open_run(workdir, enrolled=False)
    now = people.joined(run.registry, people.read(run.workdir), run.workdir)
    check_name(now, name)
    rows.free_row(now)
    responders = run.registry.responders
    if known.responder is not None and known.responder not in responders:
        raise UserError(
            f"--responder '{known.responder}' is not known to this run{nearest(known.responder, responders)}"
        )
    asked = responders if known.responder is None else (known.responder,)
    paths = [Path(path) for path in known.input]
    dialogues = of_querier(read_dialogues(paths, asked, known.format), name, asked, ", ".join(known.input))
    trainable, _, step = restore(run)
    person = enrol(run, trainable, step, name, dialogues)
    print(summary(add(run.workdir, run.registry, person), workdir))
    return 0


if __name__ == "__main__":
    sys.exit(main())
