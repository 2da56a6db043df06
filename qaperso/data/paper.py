"""How the published implementation (arXiv 2412.11736) lays dialogues out: for compat = "paper" only.

It differs from `data/text.py` in that leading responder turns are dropped in training, the end is cut off and not the
beginning, markers of every turn are labels, and padding shares its token with end-of-turn, so that real end-of-turn
tokens are never attended to.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from qaperso.data.store import Store
from qaperso.data.text import Encoded, Template, Tokenizer, encode
from qaperso.types import QUERIER, RESPONDER, TEMPLATE, Batch, Turn

Piece = list[tuple[int, int, bool]]


def _turn(tokenizer: Tokenizer, template: Template, name: str, text: str, role: int) -> Piece:
    head = [*encode(tokenizer, name), *template.between]
    return (
        [(t, TEMPLATE, True) for t in template.start]
        + [(t, role, False) for t in head]
        + [(t, role, role == RESPONDER) for t in encode(tokenizer, text)]
        + [(t, TEMPLATE, True) for t in (*template.end, *template.after)]
    )


def _dialogue(
    tokenizer: Tokenizer, template: Template, turns: Sequence[Turn], responder: str, system: str | None
) -> list[Piece]:
    pieces = [[(t, TEMPLATE, False) for t in template.bos]]
    if system is not None:
        pieces.append(_turn(tokenizer, template, "system", system, TEMPLATE))
    for turn in turns:
        role = RESPONDER if turn.speaker == responder else QUERIER
        pieces.append(_turn(tokenizer, template, turn.speaker, turn.text, role))
    return pieces


def _encoded(pieces: Sequence[Piece], length: int) -> Encoded:
    flat = [t for piece in pieces for t in piece]
    tokens, role, label = (np.array(column) for column in zip(*flat[:length], strict=True))
    return Encoded(tokens.astype(np.int32), role.astype(np.int32), label.astype(bool), max(len(flat) - length, 0))


def encode_train(
    tokenizer: Tokenizer,
    template: Template,
    turns: Sequence[Turn],
    responder: str,
    length: int,
    system: str | None = None,
) -> Encoded:
    """A training dialogue: from the querier's first turn on, cut off at `length` tokens."""
    first = next((i for i, t in enumerate(turns) if t.speaker != responder), 0)
    return _encoded(_dialogue(tokenizer, template, turns[first:], responder, system), length)


def encode_eval(
    tokenizer: Tokenizer,
    template: Template,
    turns: Sequence[Turn],
    responder: str,
    length: int,
    system: str | None = None,
) -> tuple[Encoded, np.ndarray]:
    """The prompt up to the header of the last reply, cut off at `length`, and the reply's tokens int32[n]."""
    pieces = _dialogue(tokenizer, template, [*turns[:-1], Turn(responder, "")], responder, system)
    pieces[-1] = pieces[-1][: len(pieces[-1]) - len(template.end) - len(template.after)]
    return _encoded(pieces, length), np.array(encode(tokenizer, turns[-1].text)[:length], np.int32)


def class_grid(store: Store) -> Store:
    """Every cluster has a class for each querier of a responder and two that stay empty, as published."""
    responders, clusters = len(store.registry.responders), int(store.cluster.max()) + 1
    queriers = len(store.registry.queriers) + 2
    grid = np.indices((responders, clusters, queriers)).reshape(3, -1).astype(np.int32)
    classes = {"responder": grid[0], "querier": grid[2] + 1, "cluster": grid[1]}
    label = (store.responder * clusters + store.cluster) * queriers + store.row - 1
    return dataclasses.replace(store, classes=classes, label=np.where(store.row > 0, label, -1).astype(np.int32))


def as_published(batch: Batch, pad: int) -> Batch:
    """Turns a batch with one dialogue a row into what the published model sees: padding is whatever equals `pad`."""
    inputs = batch.inputs
    tokens = np.where(inputs.segment > 0, inputs.tokens, pad)
    everywhere = np.ones_like(tokens)
    position = np.broadcast_to(np.arange(tokens.shape[-1], dtype=np.int32), tokens.shape)
    return batch.replace(
        inputs=inputs.replace(tokens=tokens, segment=everywhere, position=position, attend=tokens != pad)
    )


def generation_positions(attend: np.ndarray) -> np.ndarray:
    """Positions the published generation uses, int32[B, S]: attended keys counted from 0, and 1 where masked."""
    counted: Any = np.cumsum(attend, -1) - 1
    return np.where(attend, counted, 1).astype(np.int32)
