"""What a run still knows of a querier whose row was taken away: measured, not promised (ours)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from qaperso import batching
from qaperso.data.store import Store, evenly
from qaperso.errors import UserError
from qaperso.eval import awareness, leakage
from qaperso.eval.awareness import Asked
from qaperso.eval.intervals import bootstrap
from qaperso.run import Run

Tree = Any
Metrics = dict[str, dict[str, float]]

# Dialogues that are scored at most.
LIMIT = 48
# In this order: what was not trained on says what is known, what was trained on may have been learned by heart.
SPLITS = ("test", "dev", "train")


def swap_gaps(run: Run, before: Tree, after: Tree, store: Store, name: str, seed: int = 0) -> tuple[str, Metrics]:
    """How much worse somebody's true replies become when another is said to ask, with their row and without it.

    Args:
      run: that knows the querier.
      before: its trained parameters.
      after: the same with another value in the querier's row.
      store: of its data, with the querier.
      name: of the querier.
      seed: of who the others are.

    Returns:
      The split whose dialogues were scored; and in nats per token `forgotten_swap_gap_before`, `forgotten_swap_gap`, the reply NLL
      under another querier's name and row less that under their own name and the row that they have then; and
      `forgotten_row_gain`, by how much their row lowered the NLL. Intervals resample groups.

    Raises:
      UserError: none of their replies can be scored, or the responder answers nobody else.
    """
    own = {split: [i for i in store.split(split) if store.dialogues[i].querier == name] for split in SPLITS}
    split = next((split for split in SPLITS if own[split]), None)
    if split is None:
        raise UserError(f"found no dialogue of '{name}' in the run's data, expected some to measure with")
    places = np.array(own[split])[evenly(len(own[split]), LIMIT)]
    dialogues = [store.dialogues[i] for i in places]
    others = awareness.others(store, dialogues, seed)
    kept = [k for k, other in enumerate(others) if other is not None]
    if not kept:
        raise UserError(f"found nobody else whom the responders of '{name}' answer, expected somebody to compare with")
    true = [Asked(int(places[k]), dialogues[k], run.registry.row(name)) for k in kept]
    swapped = [
        Asked(int(places[k]), awareness.rename(dialogues[k], others[k]), run.registry.row(others[k])) for k in kept
    ]
    groups = [dialogues[k].group for k in kept]
    ahead, behind = (awareness.likelihoods(run, trainable, store)([*true, *swapped]) for trainable in (before, after))
    count = len(kept)
    counts = behind[1][:count]
    if not counts.sum():
        raise UserError(f"found no reply to '{name}' that fits batch.length, expected some to measure with")
    return split, {
        "forgotten_swap_gap_before": _mean(ahead[0][count:] - ahead[0][:count], counts, ahead[1][count:], groups),
        "forgotten_swap_gap": _mean(behind[0][count:] - behind[0][:count], counts, behind[1][count:], groups),
        "forgotten_row_gain": _mean(behind[0][:count] - ahead[0][:count], counts, counts, groups),
    }


def _mean(gaps: np.ndarray, counts: np.ndarray, others: np.ndarray, groups: Sequence[str]) -> dict[str, float]:
    """Per token, over replies that fit a row under both names."""
    fits = (counts > 0) & (others == counts)
    return bootstrap(gaps[fits], counts[fits], [group for group, fit in zip(groups, fits, strict=True) if fit])


def exposures(run: Run, after: Tree, store: Store, name: str) -> Metrics:
    """`leakage.measure` of the canary facts of one querier, after their row was taken away.

    Raises:
      UserError: the data has none of theirs, or nobody else to ask for them.
    """
    found = [
        canary for split in ("test", "train") for canary in leakage.find(run, store, split) if canary.owner == name
    ]
    if not found:
        raise UserError(f"found no canary of '{name}' in the run's data")
    # One question for each fact, of the test split where it is asked there.
    first = {canary.value: canary for canary in reversed(found)}
    model = batching.prepare(run, after)
    return leakage.measure(list(first.values()), *leakage.instruments(run, after, lambda: model))
