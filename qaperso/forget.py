"""python -m qaperso.forget --workdir DIR --querier NAME [--retrain NEW]
python -m qaperso.forget --workdir DIR --retrain NEW

Takes a querier out of a run: row, optimiser moments, prototypes, name, history, and files that quote them. Every other querier is
answered as before, to the last bit. Writes a receipt without the name into DIR/forgotten, with what was measured of what the
shared weights still know. --retrain trains a run anew without all who were forgotten in this one, in NEW: only that takes them
out of shared weights. Exit codes: 0 done, 2 bad input, 143 the training was stopped by SIGTERM after saving.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import hashlib
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from qaperso import checkpoint, erase, people, portable, storage, train
from qaperso import config as configs
from qaperso.data import load, prepared
from qaperso.data.store import NOBODY, STRANGER_NAME, Registry, blank, without
from qaperso.errors import UserError, command
from qaperso.eval import report, residue
from qaperso.mesh import mesh_over, start_runtime
from qaperso.models import base as bases
from qaperso.notes import FILE as NOTES
from qaperso.people import Person
from qaperso.run import CHECKPOINTS, RECORD, Run, open_run, read_record, restore
from qaperso.types import STRANGER, Dialogue

Tree = Any
RECEIPTS = "forgotten"
# Of the receipts below.
LAYOUT = 1
# Files of a run's folder that quote dialogues. `evaluate` and `judge` make them again.
DERIVED = ("predictions*.jsonl", "across*.jsonl", "items*.npz", "report*.html", "judge_*", "bad_batch_*")
# Larger files are not searched for the name.
SEARCHED = 64 * 2**20


@dataclasses.dataclass(frozen=True, eq=False)
class Evidence:
    """What is known of somebody who is forgotten.

    Attributes:
      hidden: how many dialogues of theirs are in the run's data, which the run reads no more.
      named: how many training dialogues of others name them in a text, or have them as responder.
      measured: {"split", "metrics"} of `residue`; {} where nothing could be measured.
      notes: sentences on what could not be, without the name.
    """

    hidden: int
    named: int
    measured: dict[str, Any]
    notes: list[str]


def forget(workdir: Path, name: str) -> tuple[dict[str, Any], Path]:
    """Takes a querier out of a run.

    Args:
      workdir: of the run.
      name: of somebody of the training data, or who was enrolled.

    Returns:
      The receipt, and where it lies.

    Raises:
      UserError: nobody of that name, the run is being trained, or an exported run, which has no training state to take them out of.
    """
    read_record(workdir)
    # Nobody else enrols or forgets somebody meanwhile, and no training writes checkpoints.
    with people.locked(workdir), storage.locked(workdir):
        erase.mend(workdir)
        run = open_run(workdir)
        if name == STRANGER_NAME:
            raise UserError(
                f"'{name}' is what everybody unknown is called, and nobody to forget; give a querier's name"
            )
        row = run.registry.row(name)
        person = next((p for p in run.people if p.name == name), None)
        if person is not None:
            return _forget_enrolled(run, person)
        if portable.is_exported(run.record):
            raise UserError(
                f"{workdir} is an exported run, and '{name}' was in its training; forget them in the run that it was exported"
                " from, and export that again"
            )
        bare = dataclasses.replace(run, people=(), registry=Registry.from_json(run.record["registry"]))
        return _forget_trained(bare, name, row)


def _forget_enrolled(run: Run, person: Person) -> tuple[dict[str, Any], Path]:
    workdir = run.workdir
    path = people.file_of(workdir, person.row)
    before = {path.relative_to(workdir).as_posix(): prepared.digest(path)}
    removed = {
        "row": person.vector is not None,
        "classes": 0,
        "dialogues": len(person.dialogues),
        "files": list(before),
    }
    receipt = _receipt(person.name, person.row, "enrolled", removed)
    receipt["files"] = {"before": before, "after": {}}
    receipt["may_remain"] = [
        "Nothing in the checkpoints: no number of theirs was ever learned from these dialogues.",
        *_kept(run),
        "Exported copies of this run, backups, and the files that the dialogues were read from are not touched.",
    ]
    place = _write(workdir, receipt)
    path.unlink()
    receipt["may_remain"] += _still_named(workdir, person.name)
    return receipt, _write(workdir, receipt, place)


def _forget_trained(run: Run, name: str, row: int) -> tuple[dict[str, Any], Path]:
    workdir, record = run.workdir, run.record
    classes = [i for i, querier in enumerate(record["classes"]["querier"]) if querier == row]
    trainable, memory, step = restore(run)
    has_row = "rows" in trainable.get("tower", {})
    table = trainable["tower"]["rows"] if has_row else None
    after = people.with_row(trainable, row, table[STRANGER]) if has_row else trainable
    evidence = evidence_of(run, trainable, after, name)
    before = _digests(workdir)

    # Whatever is cut off from here on is done again by the same command: the record, which has the name, is written last.
    others: dict[int, str] = {}
    if has_row or "prototypes" in memory:
        others = erase.rewrite(run, row, classes)
    quoting = sorted(path for pattern in DERIVED for path in workdir.glob(pattern) if path.is_file())
    for path in quoting:
        path.unlink()

    registry = Registry.from_json(record["registry"]).called(row, NOBODY)
    blanked = blank({key: np.array(value, np.int32) for key, value in record["classes"].items()}, [row])
    new = record | {
        "registry": registry.to_json(),
        "classes": {key: value.tolist() for key, value in blanked.items()},
    }
    removed = {
        "row": has_row,
        "classes": len(classes),
        "dialogues": evidence.hidden,
        "files": [path.relative_to(workdir).as_posix() for path in quoting],
    }
    receipt = _receipt(name, row, "trained", removed)
    text = json.dumps(new, indent=1, ensure_ascii=False) + "\n"
    receipt["files"] = {
        "before": before,
        "after": _digests(workdir) | {RECORD: hashlib.sha256(text.encode()).hexdigest()},
    }
    receipt["checkpoints"] = {"measured": step, "others_sha256": {str(k): v for k, v in others.items()}}
    receipt["measured"] = evidence.measured
    receipt["may_remain"] = [*evidence.notes, *remainders(run, name, evidence, has_row)]
    receipt["retrain"] = f"python -m qaperso.forget --workdir {workdir} --retrain NEW"
    place = _write(workdir, receipt)
    checkpoint.write_json(workdir / RECORD, new)
    receipt["may_remain"] += _still_named(workdir, name)
    return receipt, _write(workdir, receipt, place)


def evidence_of(run: Run, before: Tree, after: Tree, name: str) -> Evidence:
    """Measures what the run still knows of a querier without their row, and counts where the data has them.

    Args:
      run: that knows the querier.
      before, after: its trained parameters with their row, and with the stranger's in its place.
      name: of the querier.
    """
    notes: list[str] = []

    def note(what: str, error: UserError) -> None:
        notes.append(f"{what} was not measured: {error}.".replace(name, "[the querier]"))

    try:
        store = without(load.load_store(run.config.data), run.registry.forgotten)
    except UserError as error:
        note("What shared weights still know", error)
        return Evidence(0, 0, {}, notes)
    measured: dict[str, Any] = {}
    try:
        split, metrics = residue.swap_gaps(run, before, after, store, name)
        measured = {"split": split, "metrics": report.jsonable(metrics)}
    except UserError as error:
        note("The swap gap", error)
    try:
        metrics = residue.exposures(run, after, store, name)
        measured["metrics"] = measured.get("metrics", {}) | report.jsonable(metrics)
    except UserError as error:
        note("The exposure of canaries", error)
    hidden = sum(d.querier == name for d in store.dialogues)
    named = sum(d.split == "train" and d.querier != name and names(d, name) for d in store.dialogues)
    return Evidence(hidden, named, measured, notes)


def names(dialogue: Dialogue, name: str) -> bool:
    """Whether a dialogue's responder is somebody, or a text names them in whole words, blind to case."""
    form = re.compile(rf"(?<!\w){re.escape(name)}(?!\w)", re.IGNORECASE)
    return dialogue.responder == name or any(form.search(turn.text) for turn in dialogue.turns)


def remainders(run: Run, name: str, evidence: Evidence, has_row: bool) -> list[str]:
    """Sentences on what forgetting does not take away."""
    found = [
        "What all queriers share (LoRA, towers, heads, whatever else was trained) was learned from their dialogues too, and is"
        " unchanged; only training anew without them takes that away."
    ]
    if not has_row:
        by = "their name in the text, which it can still be told"
        by += ", and what they said before, which it reads no more" if run.reader else ""
        found.append(f"The run has no querier rows: it knew them by {by}.")
    found += _kept(run)
    if evidence.hidden:
        where = f"The data set '{run.config.data.path}'" if run.config.data.path else "The embedded world"
        found.append(f"{where} still has {evidence.hidden} dialogues of theirs; this run reads them no more.")
        found.append("The query clusters were fitted on their training queries too.")
    if evidence.named:
        found.append(
            f"{evidence.named} training dialogues of others name them, or have them as responder; those are kept."
        )
    if name in run.registry.responders:
        found.append("They are a responder of this run too, which is not touched.")
    found.append("Exported copies of this run, runs that have it as base, and backups are not touched.")
    return found


def _kept(run: Run) -> list[str]:
    """Sentences on what was made of people's words, and cannot be told apart by person."""
    found = []
    if run.config.vectors:
        found.append(
            f"'{run.config.vectors}' keeps vectors of what they said, without a word of it, and nothing there says whose they are;"
            " delete the folder to be rid of them: what is needed is embedded again."
        )
    if (run.workdir / NOTES).is_file():
        found.append(
            f"'{NOTES}' keeps what a language model wrote about queriers for this run, and nothing there says about whom; delete the"
            " file to be rid of it: what is needed is asked again."
        )
    return found


def _digests(workdir: Path) -> dict[str, str]:
    inside = {f"{CHECKPOINTS}/{path}": sha256 for path, sha256 in erase.digests(workdir / CHECKPOINTS).items()}
    quoting = {path.name: prepared.digest(path) for p in DERIVED for path in sorted(workdir.glob(p)) if path.is_file()}
    return inside | quoting | {RECORD: prepared.digest(workdir / RECORD)}


def _receipt(name: str, row: int, was: str, removed: dict[str, Any]) -> dict[str, Any]:
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    return {"layout": LAYOUT, "who": load.token(name), "time": now, "was": was, "row": row, "removed": removed}


def _write(workdir: Path, receipt: dict[str, Any], path: Path | None = None) -> Path:
    path = path or workdir / RECEIPTS / f"{receipt['who'].split(':')[2][:16]}.json"
    path.parent.mkdir(exist_ok=True)
    checkpoint.write_json(path, receipt)
    return path


def _still_named(workdir: Path, name: str) -> list[str]:
    """A sentence on files of the run's folder in which the letters of the name still stand; none where there is no such."""
    form = re.compile(rb"(?<!\w)" + re.escape(name.encode()) + rb"(?!\w)", re.IGNORECASE)
    files = [
        path
        for path in sorted(workdir.rglob("*"))
        if path.is_file() and CHECKPOINTS not in path.relative_to(workdir).parts and path.stat().st_size <= SEARCHED
    ]
    found = [path.relative_to(workdir).as_posix() for path in files if form.search(path.read_bytes())]
    return (
        [f"The letters of the name stand in {', '.join(found)}, be it for them or for somebody else."] if found else []
    )


def retrain(workdir: Path, target: Path) -> int:
    """Trains a run's configuration anew on its data without all who were forgotten in it; returns the exit code.

    Args:
      workdir: of the run, with receipts.
      target: the new run's folder; training goes on where it stopped.

    Raises:
      UserError: nobody of the training data was forgotten, or what `train` raises.
    """
    record = read_record(workdir)
    receipts = [json.loads(path.read_text(encoding="utf-8")) for path in sorted((workdir / RECEIPTS).glob("*.json"))]
    tokens = tuple(receipt["who"] for receipt in receipts if receipt["was"] == "trained")
    if not tokens:
        raise UserError(
            f"{workdir}: found no receipt of somebody forgotten who was in training, expected some; nothing is to be left out"
        )
    config = configs.from_json(record["config"])
    config.data.without = (*config.data.without, *tokens)
    config.mesh.update(mesh_over(config.mesh).shape)
    try:
        bases.locate(config.base)
    except UserError:
        config.base = str(portable.base_of(workdir, record).path)
    return train.train(config, target)


def summary(receipt: dict[str, Any], path: Path, name: str) -> str:
    """What a person wants to see at the end."""
    removed = receipt["removed"]
    steps = ", ".join(receipt.get("checkpoints", {}).get("others_sha256", {}))
    gone = ["the name", *(["the row"] if removed["row"] else [])]
    gone += [f"{removed['classes']} classes"] if removed["classes"] else []
    gone += [f"files: {', '.join(removed['files'])}"] if removed["files"] else []
    lines = [f"forgot '{name}', who was {receipt['was']}; removed: {'; '.join(gone)}"]
    lines += [f"checkpoints written anew: {steps}; every other number in them is as before"] if steps else []
    lines.append(f"{removed['dialogues']} dialogues of theirs are read no more")
    for key, metric in receipt.get("measured", {}).get("metrics", {}).items():
        lines.append(f"  {key}: {report.cell(metric)}")
    lines += [f"  {sentence}" for sentence in receipt["may_remain"]]
    lines += [f"to train anew without them: {receipt['retrain']}"] if "retrain" in receipt else []
    return "\n".join([*lines, f"receipt: {path}"])


@command
def main(arguments: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m qaperso.forget", description=__doc__, allow_abbrev=False)
    parser.add_argument("--workdir", required=True, metavar="DIR")
    parser.add_argument("--querier", metavar="NAME", help="whom to forget")
    parser.add_argument(
        "--retrain", metavar="NEW", help="folder of a run that is trained anew without all forgotten ones"
    )
    known = parser.parse_args(arguments)
    workdir = Path(known.workdir)
    if not known.querier and not known.retrain:
        raise UserError("give --querier NAME, --retrain NEW, or both")
    start_runtime(alone=True)
    if known.querier:
        print(summary(*forget(workdir, known.querier), known.querier))
    return retrain(workdir, Path(known.retrain)) if known.retrain else 0


if __name__ == "__main__":
    sys.exit(main())
