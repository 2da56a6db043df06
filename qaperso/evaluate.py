"""python -m qaperso.evaluate --workdir DIR [DIR ...] [--against DIR ...] [--split test]

Scores runs by the checkpoint that was best on dev. Prints one table, a column a run, and a second one of paired differences
to the runs of --against. Every run gets predictions.jsonl, its replies, by which an evaluation that was stopped goes on;
those of --workdir get eval.json, report.html and items.npz, the scores of single dialogues. For another split than test
the files are called NAME_SPLIT. Several processes (`python -m qaperso.launch`) score a run together, spread as it was trained.
Exit codes: 0 done, 2 bad input, 143 stopped by SIGTERM; run again to go on.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax

from qaperso import checkpoint, portable, stopping, writers
from qaperso import config as configs
from qaperso.data import load
from qaperso.data.splits import SPLITS
from qaperso.data.store import Registry, Store, without
from qaperso.errors import STOPPED, UserError, command, leave
from qaperso.eval import compare, gather, measure, overlap, page, predictions, report, unseen
from qaperso.eval.measure import Measured, Wanted
from qaperso.eval.page import Report
from qaperso.mesh import start_runtime
from qaperso.run import open_run, read_record, restore

Tree = Any
Metrics = dict[str, dict[str, Any]]


@dataclasses.dataclass(frozen=True, eq=False)
class Scored:
    """What was found of a run.

    Attributes:
      name: in tables.
      folder, step: of the run and its checkpoint.
      found: all that was measured.
      metrics: each {"value", "low", "high", "n"}, None where there is no number.
      report: its page without the tables, which compare runs; None for a run that gets no page.
    """

    name: str
    folder: Path
    step: int
    found: Measured
    metrics: Metrics
    report: Report | None


def evaluate(folder: Path, name: str, store: Store, split: str, wanted: Wanted, paged: bool) -> Scored:
    """Scores a run on a split of its data.

    Args:
      folder: of the run.
      name: of the run in tables; the step is added.
      store: of its data.
      split: one of `splits.SPLITS`, with at least one dialogue.
      wanted: what is measured.
      paged: whether the run gets a page.
    """
    run = open_run(folder)
    trainable, _, step = restore(run)
    writers.ready(run, trainable)
    found = measure.measure(run, trainable, store, split, step, wanted, predictions.file_of(folder, split))
    for note in found.notes:
        say(f"{folder}: {note}")
    shown = None
    if paged:
        shown = gather.report(run, trainable, store, split, step, found.items, found.records, found.embedded)
        others = gather.asked_by_others(run, store, split)
        if found.records and others.dialogues:
            path = predictions.file_of(folder, split, "across")
            records = predictions.collect(run, found.model, others, split, range(len(others.dialogues)), step, path)
            shown = dataclasses.replace(shown, across=gather.across(store, split, records))
        shown = dataclasses.replace(shown, notes=found.notes, unseen=unseen.gains(found.metrics))
    return Scored(f"{name} @{step}", folder, step, found, report.jsonable(found.metrics), shown)


def say(text: str) -> None:
    """Tells the user, once, however many processes there are."""
    if jax.process_index() == 0:
        print(text, file=sys.stderr)


def store_reader() -> Callable[[Path], Store]:
    """A function from a run's folder to the data that it was trained on, without those whom it forgot since.

    Runs of equal data share it.
    """
    stores: dict[str, Store] = {}

    def read(folder: Path) -> Store:
        record = read_record(folder)
        config = configs.from_json(record["config"])
        forgotten = Registry.from_json(record["registry"]).forgotten
        key = json.dumps([configs.to_json(config)["data"], forgotten], sort_keys=True)
        if key not in stores:
            stores[key] = without(load.load_store(config.data), forgotten)
        return stores[key]

    return read


def check_data(folders: Sequence[Path], against: Sequence[Path], split: str, read: Callable[[Path], Store]) -> None:
    """Makes sure that every run has the split and that those to be compared share it.

    Raises:
      UserError: a run has no dialogue in the split, or others than the run it is compared with.
    """
    for folder in (*folders, *against):
        store = read(folder)
        if not len(store.split(split)):
            found = collections.Counter(d.split for d in store.dialogues)
            there = ", ".join(f"{name} ({found[name]})" for name in SPLITS if found[name])
            raise UserError(
                f"{folder}: its data has no dialogue in the {split} split; give a --split that it has: {there}"
            )
    for ours in folders:
        for theirs in against:
            mine, others = ([s.dialogues[i] for i in s.split(split)] for s in (read(ours), read(theirs)))
            compare.check_same(str(ours), mine, str(theirs), others, split)


def differences(ours: Scored, theirs: Sequence[Scored]) -> dict[str, Metrics]:
    """Paired differences of a run to others, by their names; see `compare.paired`, `overlap.compare`."""
    result = {}
    for other in theirs:
        if ours.found.items.vocabulary != other.found.items.vocabulary:
            say(
                f"{ours.folder} and {other.folder} have different tokenisers: what is counted in nats per token is not "
                "compared"
            )
        gaps = compare.paired(ours.found.items, other.found.items)
        written = {record["id"]: record["reply"] for record in other.found.records}
        both = [record for record in ours.found.records if record["id"] in written]
        if both:
            references, groups = ([record[key] for record in both] for key in ("reference", "group"))
            texts = [record["reply"] for record in both], [written[record["id"]] for record in both]
            gaps |= overlap.compare(references, *texts, groups)
        result[other.name] = report.jsonable(gaps)
    return result


def check_arguments(known: argparse.Namespace) -> tuple[list[Path], list[Path]]:
    """The folders of --workdir and --against; before anything is scored, which takes long.

    Raises:
      UserError: an argument is wrong, or a folder is no run.
    """
    if known.split not in SPLITS:
        raise UserError(f"--split is '{known.split}', expected one of {', '.join(SPLITS)}")
    for option in ("replies", "paired"):
        if (number := getattr(known, option)) is not None and number < 0:
            raise UserError(f"--{option} is {number}, expected 0 or more")
    folders, against = ([portable.find(Path(name)) for name in names] for names in (known.workdir, known.against))
    seen: set[Path] = set()
    for folder in (*folders, *against):
        read_record(folder)
        if folder.resolve() in seen:
            raise UserError(f"'{folder}' is given twice in --workdir and --against; name each run once")
        seen.add(folder.resolve())
    if known.report is not None:
        if len(folders) > 1:
            raise UserError(
                f"--report is one file, but --workdir names {len(folders)} runs with a page each; leave --report out"
            )
        target = Path(known.report)
        if target.is_dir() or not target.parent.is_dir():
            raise UserError(f"--report '{target}' is a folder or lies in none; give a file in a folder that exists")
    return folders, against


def score(known: argparse.Namespace, folders: Sequence[Path], against: Sequence[Path]) -> int:
    """Scores the runs of --workdir, held against those of --against, as the command's other options want it."""
    read = store_reader()
    check_data(folders, against, known.split, read)
    # Runs of one name in two folders are two columns.
    short = [folder.resolve().name for folder in (*folders, *against)]
    names = {f: n if short.count(n) == 1 else str(f) for f, n in zip((*folders, *against), short, strict=True)}

    wanted = Wanted(known.replies, known.awareness, known.paired, known.unseen, known.leakage)
    theirs = [evaluate(f, names[f], read(f), known.split, wanted, paged=False) for f in against]
    ours, found, first = [], {}, jax.process_index() == 0
    suffix = "" if known.split == "test" else f"_{known.split}"
    for folder in folders:
        run = evaluate(folder, names[folder], read(folder), known.split, wanted, paged=True)
        ours.append(run)
        found[run.name] = differences(run, theirs)
        config = read_record(folder)["config"]
        content = {"metrics": run.metrics, "config": config, "step": run.step, "split": known.split}
        content |= {"against": found[run.name]} if theirs else {}
        if first:
            checkpoint.write_json(folder / f"eval{suffix}.json", content)
    if not first:
        return 0
    for run in ours:
        columns = {s.name: s.metrics for s in (run, *(s for s in (*ours, *theirs) if s is not run))}
        compared = {f"{run.name} \u2212 {name}": values for name, values in found[run.name].items()}
        target = Path(known.report) if known.report else run.folder / f"report{suffix}.html"
        page.write(dataclasses.replace(run.report, metrics=columns, against=compared), target)
        say(f"page of {run.name}: {target}")
        compare.save(compare.file_of(run.folder, known.split), run.found.items)

    report.show(f"{known.split} split, 95% intervals", {s.name: s.metrics for s in (*ours, *theirs)})
    if theirs:
        pairs = {f"{a} - {b}": values for a, others in found.items() for b, values in others.items()}
        report.show("paired differences over the same dialogues, 95% intervals", pairs)
    return 0


@command
def main(arguments: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m qaperso.evaluate", description=__doc__, allow_abbrev=False)
    parser.add_argument("--workdir", required=True, nargs="+", metavar="DIR")
    parser.add_argument("--against", default=[], nargs="+", metavar="DIR", help="runs to compare each workdir with")
    parser.add_argument("--split", default="test", metavar="|".join(SPLITS))
    parser.add_argument("--replies", type=int, metavar="N", help="write replies to N dialogues only (default: all)")
    parser.add_argument(
        "--awareness", action="store_true", help="true replies under every kind of other querier; retrieval of queriers"
    )
    parser.add_argument(
        "--paired", type=int, default=0, metavar="N", help="put N queries to several queriers each (default: 0)"
    )
    parser.add_argument("--unseen", action="store_true", help="fit rows of the unseen split's queriers, and score them")
    parser.add_argument("--leakage", action="store_true", help="ask for canary facts as their owners and as others")
    parser.add_argument("--report", metavar="FILE", help="the page of a single workdir (default: DIR/report.html)")
    known = parser.parse_args(arguments)
    folders, against = check_arguments(known)
    start_runtime()
    try:
        with stopping.at_once():
            return score(known, folders, against)
    except stopping.Stopped:
        say("stopped by SIGTERM; replies written so far are kept, run again to go on")
        return leave(STOPPED)


if __name__ == "__main__":
    sys.exit(main())
