"""python -m qaperso.judge --workdir A --against B [--split test] [--limit N] [--concurrency 8]

Lets a language model compare the replies of two runs that qaperso.evaluate has left in A/predictions.jsonl and
B/predictions.jsonl (predictions_SPLIT.jsonl for another split than test). QAPERSO_API_BASE, QAPERSO_API_MODEL and
QAPERSO_API_KEY in the environment say which OpenAI-compatible endpoint is asked. Prints a table and writes A/judge_B.json
(for the test split) or A/judge_B_SPLIT.json. Every answer is kept in A/judge_answers.jsonl: a killed command that is run
again asks for nothing twice.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from qaperso import checkpoint
from qaperso.data.splits import SPLITS
from qaperso.data.store import evenly
from qaperso.endpoint import Cache, Completion, Endpoint, Messages, complete_all, digest, from_environment
from qaperso.errors import UserError, command
from qaperso.eval import report
from qaperso.eval.judge import join, judge, read_predictions
from qaperso.eval.predictions import file_of

ANSWERS = "judge_answers.jsonl"


def usage(answers: Mapping[str, Completion], prices: tuple[float, float] | None) -> dict[str, int | float | None]:
    """Calls, tokens and cost of the answers a result rests on, whenever they were given.

    Args:
      answers: by question.
      prices: of a million prompt and of a million completion tokens; cost is None without.
    """
    prompt = sum(a.prompt_tokens for a in answers.values())
    completion = sum(a.completion_tokens for a in answers.values())
    cost = None if prices is None else (prompt * prices[0] + completion * prices[1]) / 1e6
    return {"calls": len(answers), "prompt_tokens": prompt, "completion_tokens": completion, "cost": cost}


@command
def main(arguments: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m qaperso.judge", description=__doc__, allow_abbrev=False)
    parser.add_argument("--workdir", required=True, metavar="A")
    parser.add_argument("--against", required=True, metavar="B")
    parser.add_argument("--split", default="test", metavar="|".join(SPLITS))
    parser.add_argument("--limit", type=int, metavar="N", help="judge N pairs, evenly spread (default: all)")
    parser.add_argument("--concurrency", type=int, default=8, metavar="N", help="questions under way at a time")
    parser.add_argument("--price-in", type=float, metavar="X", help="of a million prompt tokens")
    parser.add_argument("--price-out", type=float, metavar="X", help="of a million completion tokens")
    known = parser.parse_args(arguments)
    prices = _check(known)
    address = from_environment()
    workdir, against = Path(known.workdir), Path(known.against)
    ending = "" if known.split == "test" else f"_{known.split}"
    ours, theirs = (read_predictions(file_of(f, known.split), known.split) for f in (workdir, against))
    pairs = join(ours, theirs)
    pairs = [pairs[i] for i in evenly(len(pairs), known.limit)]
    endpoint, cache = Endpoint(address), Cache(workdir / ANSWERS)
    before, answers = len(cache), {}

    def complete(questions: Sequence[Messages]) -> list[str]:
        answers.update(complete_all(endpoint, cache, questions, known.concurrency))
        return [answers[digest(address.model, messages)].text for messages in questions]

    try:
        metrics = report.jsonable(judge(pairs, complete))
    finally:
        cache.close()
    used, step, other = usage(answers, prices), _step(ours), _step(theirs)
    content = {"metrics": metrics, "usage": used, "model": address.model, "step": step, "split": known.split}
    name = against.resolve().name
    checkpoint.write_json(workdir / f"judge_{name}{ending}.json", content | {"against": name, "against_step": other})
    title = f"{known.split} split, judged by {address.model}, 95% intervals"
    report.show(title, {f"{workdir.resolve().name} @{step} against {name} @{other}": metrics})
    cost = "" if used["cost"] is None else f", cost {used['cost']:.4f}"
    made = len(cache) - before
    print(
        f"{used['calls']} calls, {made} of them made now: {used['prompt_tokens']:,} prompt and "
        f"{used['completion_tokens']:,} completion tokens{cost}"
    )
    return 0


def _check(known: argparse.Namespace) -> tuple[float, float] | None:
    """Refuses options that cannot be meant; returns the prices."""
    if known.split not in SPLITS:
        raise UserError(f"--split is '{known.split}', expected one of {', '.join(SPLITS)}")
    for name in ("limit", "concurrency"):
        value = getattr(known, name)
        if value is not None and value < 1:
            raise UserError(f"--{name} is {value}, expected 1 or more")
    prices = known.price_in, known.price_out
    if prices == (None, None):
        return None
    for name, price in zip(("--price-in", "--price-out"), prices, strict=True):
        if price is None:
            raise UserError(f"{name} is not given, the other price is; give both")
        if not (math.isfinite(price) and price >= 0):
            raise UserError(f"{name} is {price}, expected 0 or more per million tokens")
    return prices


def _step(replies: Mapping[tuple[str, str], Mapping]) -> int:
    """The checkpoint that replied."""
    return next(iter(replies.values()))["step"]


if __name__ == "__main__":
    sys.exit(main())
