"""Does the model know who is asking? Measured by taking that knowledge away or swapping it."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from qaperso.data.store import Store
from qaperso.errors import UserError
from qaperso.eval.intervals import bootstrap
from qaperso.eval.scores import reply_nll
from qaperso.run import Run
from qaperso.types import Dialogue, Turn

Tree = Any


def rename(dialogue: Dialogue, querier: str) -> Dialogue:
    """The same words, asked by somebody else."""
    turns = tuple(Turn(querier, t.text) if t.speaker == dialogue.querier else t for t in dialogue.turns)
    return dataclasses.replace(dialogue, querier=querier, turns=turns)


def others(store: Store, dialogues: Sequence[Dialogue], seed: int) -> list[str | None]:
    """For each dialogue a random other querier whom its responder answers in training; None where there is none."""
    rng = np.random.default_rng(seed)
    answered: dict[str, set[str]] = {}
    for d in store.dialogues:
        if d.split == "train":
            answered.setdefault(d.responder, set()).add(d.querier)
    chosen: list[str | None] = []
    for d in dialogues:
        names = sorted(answered.get(d.responder, set()) - {d.querier})
        chosen.append(names[rng.integers(len(names))] if names else None)
    return chosen


def swap(store: Store, split: str, seed: int) -> Store:
    """The store with every dialogue of a split asked by a random other querier: name and row change, words do not.

    Dialogues whose responder answers nobody else leave the split.

    Raises:
      UserError: no dialogue has another querier.
    """
    indices = store.split(split)
    names = others(store, [store.dialogues[i] for i in indices], seed)
    dialogues, row = list(store.dialogues), store.row.copy()
    for i, name in zip(indices, names, strict=True):
        if name is None:
            dialogues[i] = dataclasses.replace(dialogues[i], split="alone")
        else:
            dialogues[i], row[i] = rename(dialogues[i], name), store.registry.row(name)
    if all(name is None for name in names):
        raise UserError(f"no responder of the {split} split answers two queriers in training: nobody to swap with")
    return dataclasses.replace(store, dialogues=tuple(dialogues), row=row)


def swap_gap(run: Run, trainable: Tree, store: Store, split: str, seed: int = 0) -> dict[str, dict[str, float]]:
    """Reply NLL under the true querier, and how much worse it is under a random other one, in nats per token (ours).

    Intervals come from resampling groups. `swap_gap` is 0 for a model that does not know who is asking.
    """
    sums, counts = dialogue_nll(run, trainable, store, split)
    other_sums, other_counts = dialogue_nll(run, trainable, swap(store, split, seed), split)
    scored = counts > 0
    # Another name may be longer, so that a reply no longer fits: such dialogues are not compared.
    both = scored & (counts == other_counts)
    if not both.any():
        raise UserError(f"no dialogue of the {split} split fits batch.length under another querier's name; raise it")
    groups = [[store.dialogues[i].group for i in np.flatnonzero(flags)] for flags in (scored, both)]
    nll = bootstrap(sums[scored], counts[scored], groups[0])
    return {"reply_nll": nll, "swap_gap": bootstrap((other_sums - sums)[both], counts[both], groups[1])}


def dialogue_nll(run: Run, trainable: Tree, store: Store, split: str) -> tuple[np.ndarray, np.ndarray]:
    """NLL of each dialogue's replies in nats and their number of tokens; float64[n], 0 outside the split."""
    examples, _ = run.examples(store, split)
    sums, counts = np.zeros((2, len(store.dialogues)))
    index = [e.index for e in examples]
    for total, found in zip((sums, counts), reply_nll(run, trainable, examples), strict=True):
        np.add.at(total, index, found)
    return sums, counts
