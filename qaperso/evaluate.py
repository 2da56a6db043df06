"""python -m qaperso.evaluate --workdir DIR [DIR ...] [--split test]

Scores runs by the checkpoint that was best on dev. Prints one table, a column a run, and writes DIR/eval.json (for the
test split) or DIR/eval_SPLIT.json.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from qaperso import batching, checkpoint, reply
from qaperso.data import load, synthetic
from qaperso.data.splits import SPLITS
from qaperso.data.store import Store
from qaperso.errors import UserError, command
from qaperso.eval import awareness, intervals, leakage, report, scores, unseen
from qaperso.generate import Sampling
from qaperso.mesh import start_runtime
from qaperso.run import Run, open_run, read_record, restore

Tree = Any


def evaluate(run: Run, trainable: Tree, store: Store, split: str, replies: int | None) -> dict[str, dict[str, float]]:
    """All metrics of a run on a split, each {"value", "low", "high", "n"}.

    Args:
      run, trainable: what is scored.
      store: of the run's data.
      split: one of `splits.SPLITS`.
      replies: write replies to so many dialogues, evenly spread over the split; None = all.
    """
    metrics = awareness.swap_gap(run, trainable, store, split)
    indices = store.split(split)
    if replies is not None and replies < len(indices):
        indices = indices[np.linspace(0, len(indices) - 1, replies).round().astype(int)]
    fitting = {e.index for e in run.examples(store, split)[0]}
    indices = np.array([i for i in indices if int(i) in fitting], int)
    if not len(indices):
        return metrics
    dialogues = [store.dialogues[i] for i in indices]
    g = run.config.generate
    # A dialogue's seed is its own, whichever others are asked.
    seeds = [np.random.SeedSequence([run.config.seed, i]).generate_state(1).item() for i in indices]
    samplings = [Sampling(g.max_new_tokens, g.temperature, g.top_p, seed) for seed in seeds]
    model = batching.prepare(run, trainable)
    written = reply.replies(model, dialogues, store.row[indices].tolist(), samplings)
    groups = [d.group for d in dialogues]
    for name, values in scores.rouge([d.reply for d in dialogues], written).items():
        metrics[name] = intervals.bootstrap(values, np.ones(len(values)), groups)
    if run.config.data.format == "synthetic":
        metrics |= town_scores(run, dialogues, written)
    return metrics


def town_scores(run: Run, dialogues: Sequence[Any], written: Sequence[str]) -> dict[str, dict[str, float]]:
    """The embedded world's exact scores: over all dialogues, over held-out (intent, querier) pairs, and chance."""
    found = [synthetic.score_reply(d, text) for d, text in zip(dialogues, written, strict=True)]
    held_out = [d.fields["held_out"] for d in dialogues]

    def mean(part: str, keep: Sequence[bool]) -> dict[str, float]:
        values = [f[part] for f, k in zip(found, keep, strict=True) if k and part in f]
        groups = [d.group for d, f, k in zip(dialogues, found, keep, strict=True) if k and part in f]
        return intervals.bootstrap(np.array(values), np.ones(len(values)), groups)

    everything = [True] * len(found)
    result = {part: mean(part, everything) for part in ("exact", "address", "register", "fact")}
    if any(held_out):
        result["exact_heldout"] = mean("exact", held_out)
    world = synthetic.make_world(run.config.data.seed)
    for part, value in synthetic.chance(world, dialogues).items():
        result[f"{part}_chance"] = {"value": value, "low": value, "high": value, "n": len(dialogues)}
    return result


@command
def main(arguments: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m qaperso.evaluate", description=__doc__, allow_abbrev=False)
    parser.add_argument("--workdir", required=True, nargs="+", metavar="DIR")
    parser.add_argument("--split", default="test", metavar="|".join(SPLITS))
    parser.add_argument("--replies", type=int, metavar="N", help="write replies to N dialogues only (default: all)")
    parser.add_argument("--unseen", action="store_true", help="fit rows of the unseen split's queriers, and score them")
    parser.add_argument("--leakage", action="store_true", help="ask for canary facts as their owners and as others")
    known = parser.parse_args(arguments)
    if known.split not in SPLITS:
        raise UserError(f"--split is '{known.split}', expected one of {', '.join(SPLITS)}")
    if known.replies is not None and known.replies < 0:
        raise UserError(f"--replies is {known.replies}, expected 0 or more")
    for name in known.workdir:  # before the first is scored, which takes long
        read_record(Path(name))
    start_runtime()
    columns = {}
    for name in known.workdir:
        workdir = Path(name)
        run = open_run(workdir)
        trainable, _, step = restore(run)
        store = load.load_store(run.config.data)
        found = evaluate(run, trainable, store, known.split, known.replies)
        found |= unseen.unseen_queriers(run, trainable, store) if known.unseen else {}
        found |= leakage.leakage(run, trainable, store, known.split) if known.leakage else {}
        metrics = report.jsonable(found)
        target = workdir / ("eval.json" if known.split == "test" else f"eval_{known.split}.json")
        content = {"metrics": metrics, "config": run.record["config"], "step": step, "split": known.split}
        checkpoint.write_json(target, content)
        # Runs of one name in two folders are two columns.
        alone = [Path(other).name for other in known.workdir].count(workdir.name) == 1
        columns[f"{workdir.name if alone else name} @{step}"] = metrics
    report.show(f"{known.split} split, 95% intervals", columns)
    return 0


if __name__ == "__main__":
    sys.exit(main())
