"""Dialogues of somebody whom a finished run of the town has never met, and what it replies."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qaperso import batching, reply, run
from qaperso.data import load
from qaperso.data.formats import jsonl
from qaperso.generate import Sampling
from qaperso.types import Dialogue, Turn


def renamed(dialogues: Sequence[Dialogue], name: str) -> list[Dialogue]:
    """The same dialogues, asked by somebody else."""
    return [
        dataclasses.replace(
            d, querier=name, turns=tuple(Turn(name if t.speaker == d.querier else t.speaker, t.text) for t in d.turns)
        )
        for d in dialogues
    ]


def lines_of(dialogues: Sequence[Dialogue], path: Path) -> Path:
    """A file of JSON lines."""
    path.write_text("".join(json.dumps(jsonl.to_json(d)) + "\n" for d in dialogues), encoding="utf-8")
    return path


def town(folder: Path, querier: str, count: int) -> list[Dialogue]:
    """What somebody of the town asked in the test split."""
    store = load.load_store(run.open_run(folder).config.data)
    return [d for d in store.dialogues if d.querier == querier and d.split == "test"][:count]


def replies(opened: run.Run, trainable: Any, names: Sequence[str]) -> list[str]:
    """Greedy replies of a run to one question of several queriers."""
    asked = [reply.question(opened, [], name, "what do i still owe?", "maren") for name in names]
    model = batching.prepare(opened, trainable)
    return reply.replies(model, asked, [opened.registry.row(n) for n in names], [Sampling(4)] * len(names))
