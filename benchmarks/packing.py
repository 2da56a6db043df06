"""python benchmarks/packing.py --config configs/x.py [--config.key=value ...]

How much of a batch is real tokens, and how many anchors meet a partner: the run's plan beside plain shuffling, and the
published layout (arXiv 2412.11736: a window of turns for every reply, each padded to 592 tokens) for comparison.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from qaperso import config as configs
from qaperso.data import load, synthetic
from qaperso.data.plan import Plan, Shape, statistics
from qaperso.data.store import Store
from qaperso.data.text import Encoded, encode_dialogue, template_of
from qaperso.models import base as bases
from qaperso.models.tokenizer import load_tokenizer, word_tokenizer
from qaperso.types import Dialogue, Example

PUBLISHED = 592
WINDOW = 6


def windows(dialogue: Dialogue) -> list[Dialogue]:
    """One dialogue a reply, as the published extraction makes them: the reply and up to five turns before it."""
    replies = dialogue.replies or (len(dialogue.turns) - 1,)
    parts = [dialogue.turns[max(0, r + 1 - WINDOW) : r + 1] for r in replies]
    return [dataclasses.replace(dialogue, turns=turns, replies=()) for turns in parts]


def micro_batches(plan: Plan) -> int:
    """How many micro-batches hold the first epoch but for its last, which it shares with the next."""
    epochs = ({p.epoch for row in plan.rows(n) for p in row} for n in itertools.count())
    return max(sum(1 for _ in itertools.takewhile(lambda found: found == {0}, epochs)), 1)


class Corpus:
    """The dialogues of a configuration as sequences, packed and in windows."""

    def __init__(self, config: Any, limit: int | None = None):
        """Reads the data of a config; at most `limit` dialogues of the training split are used, drawn evenly."""
        location = bases.locate(config.base)
        words = location.kind == "random"
        self.tokenizer = word_tokenizer(synthetic.words()) if words else load_tokenizer(location)
        self.template = template_of(self.tokenizer)
        self.config = config
        batch = config.batch
        self.shape = Shape(batch.rows, batch.length, batch.targets, batch.dialogues)
        self.store: Store = load.load_store(config.data)
        self.train = self.store.split("train")
        if limit and limit < len(self.train):
            self.train = np.sort(np.random.default_rng(0).choice(self.train, limit, replace=False))

    def _encode(self, d: Dialogue, **more: Any) -> list[Encoded]:
        return encode_dialogue(
            self.tokenizer, self.template, d.turns, d.responder, names=self.config.data.names, **more
        )

    def packed(self) -> tuple[list[Example], int]:
        """What a run trains on, and how many replies are left out as too long."""
        data = self.config.data
        bounds = dict(length=self.shape.length, targets=self.shape.targets, context=data.context, labels=data.labels)

        def encode(d: Dialogue) -> list[Encoded]:
            return self._encode(d, replies=d.replies, **bounds)

        return load.encode_split(self.store, self.train, encode, self.shape)

    def windows(self, length: int = PUBLISHED) -> list[Example]:
        """A sequence for each reply: its window, at most `length` tokens."""

        def encode(d: Dialogue) -> list[Encoded]:
            return [e for w in windows(d) for e in self._encode(w, length=length)]

        return load.encode_split(self.store, self.train, encode, Shape(1, length, length, 1))[0]

    def plan(self, examples: Sequence[Example], queriers: int | None = None) -> Plan:
        """The run's plan; queriers = 0 is plain shuffling."""
        batch = self.config.batch
        queriers = batch.queriers if queriers is None else queriers
        return Plan(examples, self.shape, self.config.seed, queriers, batch.per_querier)


def measure(config: Any) -> dict[str, Any]:
    """All figures of a configuration's training split."""
    corpus = Corpus(config)
    examples, left_out = corpus.packed()
    alone = [len(e) for e in corpus.windows()]
    found: dict[str, Any] = {
        "dialogues": len(corpus.train),
        "sequences": len(examples),
        "tokens": sum(map(len, examples)),
        "replies left out": left_out,
        "window tokens": sum(alone),
        "published layout": sum(alone) / (PUBLISHED * len(alone)),
    }
    return found | plans(corpus, examples)


def plans(corpus: Corpus, examples: Sequence[Example]) -> dict[str, Any]:
    """What the first epoch's micro-batches hold under the contrast plan and under plain shuffling."""
    found: dict[str, Any] = {}
    for name, queriers in (("contrast plan", corpus.config.batch.queriers), ("plain shuffling", 0)):
        plan = corpus.plan(examples, queriers)
        start = time.perf_counter()
        count = micro_batches(plan)
        seconds = time.perf_counter() - start
        found[name] = statistics(plan, examples, count) | {"micro-batches": count, "seconds": seconds}
    return found


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--config", required=True)
    known, rest = parser.parse_known_args(arguments)
    print(json.dumps(measure(configs.load(Path(known.config), [r.removeprefix("--config.") for r in rest])), indent=1))


if __name__ == "__main__":
    main(sys.argv[1:])
