"""python -m qaperso.evaluate --workdir DIR [DIR ...] [--against DIR ...] [--split test]

Scores runs by the checkpoint that was best on dev. Prints one table, a column a run, and a second one of paired differences
to the runs of --against. Every run gets predictions.jsonl, its replies, by which an evaluation that was stopped goes on;
those of --workdir get eval.json, report.html and items.npz, the scores of single dialogues. For another split than test
the files are called NAME_SPLIT.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import hashlib
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from qaperso import checkpoint
from qaperso import config as configs
from qaperso.data import load, synthetic
from qaperso.data.splits import SPLITS
from qaperso.data.store import Store
from qaperso.errors import UserError, command
from qaperso.eval import awareness, compare, gather, page, predictions, report, scores
from qaperso.eval.compare import Items
from qaperso.eval.page import Report
from qaperso.mesh import start_runtime
from qaperso.run import Run, open_run, read_record, restore
from qaperso.types import Dialogue

Tree = Any
Metrics = dict[str, dict[str, float | None]]
Columns = tuple[np.ndarray, np.ndarray]


@dataclasses.dataclass(frozen=True, eq=False)
class Scored:
    """What was found of a run.

    Attributes:
      name: in tables.
      folder, step: of the run and its checkpoint.
      items: scores of single dialogues.
      metrics: each {"value", "low", "high", "n"}, None where there is no number.
      report: its page without the tables, which compare runs; None for a run that gets no page.
    """

    name: str
    folder: Path
    step: int
    items: Items
    metrics: Metrics
    report: Report | None


def evaluate(folder: Path, name: str, store: Store, split: str, replies: int | None, paged: bool) -> Scored:
    """Scores a run on a split of its data.

    Args:
      folder: of the run.
      name: of the run in tables; the step is added.
      store: of its data.
      split: one of `splits.SPLITS`, with at least one dialogue.
      replies: write replies to so many dialogues, evenly spread over the split; None = all.
      paged: whether the run gets a page.
    """
    run = open_run(folder)
    trainable, _, step = restore(run)
    items = likelihoods(run, trainable, store, split)
    indices = answerable(run, store, split, items, replies)
    found: list[predictions.Record] = []
    metrics: Metrics = {}
    if indices:
        path = predictions.file_of(folder, split)
        found = predictions.collect(run, trainable, store, split, indices, step, path)
        dialogues = [store.dialogues[i] for i in indices]
        items = dataclasses.replace(items, scores={**items.scores, **reply_scores(run, dialogues, items, found)})
        if run.config.data.format == "synthetic":
            metrics = town_chance(run, dialogues)
    notes = what_is_missing(items, split)
    for note in notes:
        print(f"{folder}: {note}", file=sys.stderr)
    shown = None
    if paged:
        shown = gather.report(run, trainable, store, split, step, items, found)
        others = gather.asked_by_others(run, store, split)
        if found and others.dialogues:
            path = predictions.file_of(folder, split, "across")
            records = predictions.collect(run, trainable, others, split, range(len(others.dialogues)), step, path)
            shown = dataclasses.replace(shown, across=gather.across(store, split, records))
        shown = dataclasses.replace(shown, notes=notes)
    metrics = report.jsonable(compare.metrics(items) | metrics)
    return Scored(f"{name} @{step}", folder, step, items, metrics, shown)


def likelihoods(run: Run, trainable: Tree, store: Store, split: str) -> Items:
    """Reply NLL and swap gap of each of a split's dialogues; no swap gap where there is nobody to swap with."""
    places = store.split(split)
    dialogues = [store.dialogues[i] for i in places]
    sums, counts = (x[places] for x in awareness.dialogue_nll(run, trainable, store, split))
    found = {"reply_nll": (sums, counts)}
    if any(name is not None for name in awareness.others(store, dialogues, 0)):
        swapped = awareness.swap(store, split, 0)
        other_sums, other_counts = (x[places] for x in awareness.dialogue_nll(run, trainable, swapped, split))
        # Another name may be longer, so that a reply no longer fits: such dialogues are not compared.
        same = counts == other_counts
        found["swap_gap"] = np.where(same, other_sums - sums, 0.0), np.where(same, counts, 0.0)
    vocabulary = json.dumps(run.tokenizer.get_vocab(), sort_keys=True)
    return Items(
        tuple(d.id for d in dialogues),
        tuple(d.querier for d in dialogues),
        tuple(d.group for d in dialogues),
        found,
        hashlib.sha256(vocabulary.encode()).hexdigest(),
    )


def answerable(run: Run, store: Store, split: str, items: Items, replies: int | None) -> list[int]:
    """Dialogues that get replies: `replies` of the split, evenly spread, without those too long for a row."""
    places = store.split(split)
    chosen = np.arange(len(places))
    if replies is not None and replies < len(places):
        chosen = np.linspace(0, len(places) - 1, replies).round().astype(int)
    scored = items.scores["reply_nll"][1] > 0
    return [int(places[n]) for n in chosen if scored[n] and predictions.fits(run, store.dialogues[places[n]])]


def reply_scores(
    run: Run, dialogues: Sequence[Dialogue], items: Items, found: Sequence[predictions.Record]
) -> dict[str, Columns]:
    """Scores of replies: by metric, numerators and denominators for all of a split's dialogues, see `compare.Items`.

    Args:
      run: whose replies these are.
      dialogues: that were answered.
      items: of the whole split.
      found: the replies to the dialogues.
    """
    place = {name: n for n, name in enumerate(items.ids)}
    where = [place[d.id] for d in dialogues]
    texts = [record["reply"] for record in found]

    def column(values: Sequence[float] | np.ndarray, keep: Sequence[bool] | None = None) -> Columns:
        kept = np.ones(len(where), bool) if keep is None else np.array(keep, bool)
        sums, counts = np.zeros((2, len(place)))
        sums[where], counts[where] = np.where(kept, values, 0.0), kept
        return sums, counts

    result = {"empty_replies": column([float(not text.strip()) for text in texts])}
    result |= {name: column(values) for name, values in scores.rouge([d.reply for d in dialogues], texts).items()}
    if run.config.data.format == "synthetic":
        town = [synthetic.score_reply(d, text) for d, text in zip(dialogues, texts, strict=True)]
        for part in ("exact", "address", "register", "fact"):
            result[part] = column([t.get(part, 0.0) for t in town], [part in t for t in town])
        held_out = [d.fields["held_out"] for d in dialogues]
        if any(held_out):
            result["exact_heldout"] = column([t["exact"] for t in town], held_out)
    return result


def town_chance(run: Run, dialogues: Sequence[Dialogue]) -> Metrics:
    """What the embedded world's exact scores are by chance: computed, not sampled, so low and high are the value."""
    world = synthetic.make_world(run.config.data.seed)
    found = synthetic.chance(world, dialogues)
    return {f"{part}_chance": {"value": v, "low": v, "high": v, "n": len(dialogues)} for part, v in found.items()}


def what_is_missing(items: Items, split: str) -> list[str]:
    """Sentences on dialogues and scores that are not there, and on replies without text."""
    notes = []
    total, scored = len(items.ids), int((items.scores["reply_nll"][1] > 0).sum())
    if scored < total:
        notes.append(f"{total - scored} of {total} dialogues do not fit batch.length and are not scored.")
    if "swap_gap" not in items.scores:
        notes.append(
            f"No swap gap: no responder of the {split} split answers a second querier in training, so there is nobody to "
            "swap with."
        )
    empty, written = items.scores.get("empty_replies", (np.zeros(1), np.zeros(1)))
    if empty.sum():
        notes.append(f"{int(empty.sum())} of {int(written.sum())} replies hold no text.")
    return notes


def store_reader() -> Callable[[Path], Store]:
    """A function from a run's folder to the data that it was trained on; runs of equal data share it."""
    stores: dict[str, Store] = {}

    def read(folder: Path) -> Store:
        config = configs.from_json(read_record(folder)["config"])
        key = json.dumps(configs.to_json(config)["data"], sort_keys=True)
        if key not in stores:
            stores[key] = load.load_store(config.data)
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
    """Paired differences of a run to others, by their names."""
    for other in theirs:
        if ours.items.vocabulary != other.items.vocabulary:
            print(
                f"{ours.folder} and {other.folder} have different tokenisers: what is counted in nats per token is not "
                "compared",
                file=sys.stderr,
            )
    return {other.name: report.jsonable(compare.paired(ours.items, other.items)) for other in theirs}


def check_arguments(known: argparse.Namespace) -> tuple[list[Path], list[Path]]:
    """The folders of --workdir and --against; before anything is scored, which takes long.

    Raises:
      UserError: an argument is wrong, or a folder is no run.
    """
    if known.split not in SPLITS:
        raise UserError(f"--split is '{known.split}', expected one of {', '.join(SPLITS)}")
    if known.replies is not None and known.replies < 0:
        raise UserError(f"--replies is {known.replies}, expected 0 or more")
    folders, against = ([Path(name) for name in names] for names in (known.workdir, known.against))
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


@command
def main(arguments: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m qaperso.evaluate", description=__doc__, allow_abbrev=False)
    parser.add_argument("--workdir", required=True, nargs="+", metavar="DIR")
    parser.add_argument("--against", default=[], nargs="+", metavar="DIR", help="runs to compare each workdir with")
    parser.add_argument("--split", default="test", metavar="|".join(SPLITS))
    parser.add_argument("--replies", type=int, metavar="N", help="write replies to N dialogues only (default: all)")
    parser.add_argument("--report", metavar="FILE", help="the page of a single workdir (default: DIR/report.html)")
    known = parser.parse_args(arguments)
    folders, against = check_arguments(known)
    start_runtime()
    read = store_reader()
    check_data(folders, against, known.split, read)
    # Runs of one name in two folders are two columns.
    short = [folder.resolve().name for folder in (*folders, *against)]
    names = {f: n if short.count(n) == 1 else str(f) for f, n in zip((*folders, *against), short, strict=True)}

    theirs = [evaluate(f, names[f], read(f), known.split, known.replies, paged=False) for f in against]
    ours, found = [], {}
    suffix = "" if known.split == "test" else f"_{known.split}"
    for folder in folders:
        run = evaluate(folder, names[folder], read(folder), known.split, known.replies, paged=True)
        ours.append(run)
        found[run.name] = differences(run, theirs)
        config = read_record(folder)["config"]
        content = {"metrics": run.metrics, "config": config, "step": run.step, "split": known.split}
        content |= {"against": found[run.name]} if theirs else {}
        checkpoint.write_json(folder / f"eval{suffix}.json", content)
    for run in ours:
        columns = {s.name: s.metrics for s in (run, *(s for s in (*ours, *theirs) if s is not run))}
        compared = {f"{run.name} \u2212 {name}": values for name, values in found[run.name].items()}
        target = Path(known.report) if known.report else run.folder / f"report{suffix}.html"
        page.write(dataclasses.replace(run.report, metrics=columns, against=compared), target)
        print(f"page of {run.name}: {target}", file=sys.stderr)
        compare.save(run.folder / f"items{suffix}.npz", run.items)

    report.show(f"{known.split} split, 95% intervals", {s.name: s.metrics for s in (*ours, *theirs)})
    if theirs:
        pairs = {f"{a} - {b}": values for a, others in found.items() for b, values in others.items()}
        report.show("paired differences over the same dialogues, 95% intervals", pairs)
    return 0


if __name__ == "__main__":
    sys.exit(main())
