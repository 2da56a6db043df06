"""python -m qaperso.annotate --workdir DIR [--split test] [--reply] [--concurrency 8]

Has a language model asked, ahead of evaluation or of serving, all that the method of a run (DPL) wants to know of a split. Who
is asked stands in the run's config: its base, or the endpoint that QAPERSO_API_BASE, QAPERSO_API_MODEL and QAPERSO_API_KEY
name. Prints what was found, calls and tokens. Every answer is kept in DIR/notes.jsonl: a killed command that is run again asks
for nothing twice. With --reply the endpoint writes the replies too, and these are scored: the method as published, with one
model in all stages. DIR/endpoint_replies.jsonl has the replies, DIR/endpoint.json the scores (NAME_SPLIT for another split
than test).
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from qaperso import checkpoint, differences, writers
from qaperso.data.splits import SPLITS
from qaperso.data.text import called
from qaperso.errors import UserError, command
from qaperso.eval import compare, measure, overlap, report
from qaperso.eval.compare import Items
from qaperso.eval.predictions import file_of
from qaperso.mesh import start_runtime
from qaperso.run import Run, open_run, restore
from qaperso.types import QUERIER, RESPONDER, Dialogue, Turn


def replies(run: Run, dialogues: Sequence[Dialogue]) -> list[str]:
    """The writer's own replies, after the prefaces that the base would read (the third stage as published)."""
    names, questions = run.config.data.names, []
    for d in dialogues:
        me = called(d.responder, RESPONDER, names)
        own = [Turn(me if t.speaker == d.responder else called(t.speaker, QUERIER, names), t.text) for t in d.turns]
        questions.append(differences.answer([*run.preface(d), *own], me))
    return [text.strip() for text in run.setting.notes.complete(questions)]


def score(run: Run, dialogues: Sequence[Dialogue], texts: Sequence[str]) -> dict[str, dict[str, Any]]:
    """What evaluation says of replies, as far as it needs no likelihoods."""
    groups = tuple(d.group for d in dialogues)
    items = Items(tuple(d.id for d in dialogues), tuple(d.querier for d in dialogues), groups, {}, "")
    items = dataclasses.replace(items, scores=measure.reply_scores(run, dialogues, items, texts))
    found = compare.metrics(items) | overlap.score([d.reply for d in dialogues], texts, groups)
    if run.config.data.format in ("synthetic", "synthetic_reviews"):
        found |= measure.town_chance(run, dialogues)
    return found


def _write_replies(run: Run, split: str, dialogues: Sequence[Dialogue], facts: Mapping[str, int]) -> None:
    """Writes and scores the endpoint's replies; prints a table."""
    texts, folder = replies(run, dialogues), run.workdir
    lines = [
        json.dumps({"id": d.id, "querier": d.querier, "query": d.query, "reference": d.reply, "reply": text})
        for d, text in zip(dialogues, texts, strict=True)
    ]
    file_of(folder, split, "endpoint_replies").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    metrics = report.jsonable(score(run, dialogues, texts))
    content = {"metrics": metrics, "found": dict(facts), "usage": run.setting.notes.usage(), "split": split}
    checkpoint.write_json(file_of(folder, split, "endpoint").with_suffix(".json"), content)
    report.show(f"{split} split, replies of the endpoint, 95% intervals", {folder.resolve().name: metrics})


@command
def main(arguments: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m qaperso.annotate", description=__doc__, allow_abbrev=False)
    parser.add_argument("--workdir", required=True, metavar="DIR")
    parser.add_argument("--split", default="test", metavar="|".join(SPLITS))
    parser.add_argument("--reply", action="store_true", help="the endpoint replies too, and is scored")
    parser.add_argument("--concurrency", type=int, default=writers.CONCURRENCY, metavar="N", help="questions at a time")
    known = parser.parse_args(arguments)
    if known.split not in SPLITS:
        raise UserError(f"--split is '{known.split}', expected one of {', '.join(SPLITS)}")
    if known.concurrency < 1:
        raise UserError(f"--concurrency is {known.concurrency}, expected 1 or more")
    start_runtime(alone=True)
    run = open_run(Path(known.workdir))
    if run.setting.notes is None:
        raise UserError(f"{known.workdir}: config.method='{run.config.method}' asks no language model; 'dpl' does")
    if known.reply and run.config.dpl.writer != "endpoint":
        raise UserError("--reply has an endpoint reply, but config.dpl.writer='base'; use python -m qaperso.evaluate")
    writers.ready(run, restore(run)[0], known.concurrency)
    dialogues = [run.store.dialogues[i] for i in run.store.split(known.split)]
    if not dialogues:
        raise UserError(f"{known.workdir}: its data has no dialogue in the {known.split} split")
    facts = run.annotate(dialogues)
    if known.reply:
        _write_replies(run, known.split, dialogues, facts)
    print(f"{known.split}: {run.setting.notes.told(facts)}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
