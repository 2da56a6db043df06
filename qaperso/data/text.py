"""From turns to tokens: the chat template with role spans.

Every piece of a turn (name, separator, text) is tokenised on its own, so that tokens never straddle a span and the
tokens of a prompt are a prefix of the tokens of prompt and reply.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from qaperso.errors import UserError
from qaperso.types import QUERIER, RESPONDER, TEMPLATE, Turn

Tokenizer = Any
MASKED = {RESPONDER: "assistant", QUERIER: "user"}
LLAMA = ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")


@dataclasses.dataclass(frozen=True)
class Template:
    """A chat format: bos (start name between text end after)*, each a tuple of token ids."""

    bos: tuple[int, ...]
    start: tuple[int, ...]
    between: tuple[int, ...]
    end: tuple[int, ...]
    after: tuple[int, ...]


def encode(tokenizer: Tokenizer, text: str) -> list[int]:
    """Token ids of plain text; what looks like a special token in it is text too, so nobody can forge a turn."""
    return tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)


def template_of(tokenizer: Tokenizer) -> Template:
    """The template whose special tokens the tokeniser has: ChatML (Qwen, SmolLM) or Llama 3's headers.

    Raises:
      UserError: it has neither.
    """
    vocabulary = tokenizer.get_vocab()
    if "<|im_start|>" in vocabulary and "<|im_end|>" in vocabulary:
        newline = tuple(encode(tokenizer, "\n"))
        return Template((), (vocabulary["<|im_start|>"],), newline, (vocabulary["<|im_end|>"],), newline)
    if all(token in vocabulary for token in LLAMA):
        between = (vocabulary["<|end_header_id|>"], *encode(tokenizer, "\n\n"))
        bos = (vocabulary["<|begin_of_text|>"],)
        return Template(bos, (vocabulary["<|start_header_id|>"],), between, (vocabulary["<|eot_id|>"],), ())
    raise UserError(
        "config.base has a tokeniser with neither ChatML (<|im_start|>, <|im_end|>) nor Llama-3 header tokens "
        f"({', '.join(LLAMA)}); use a chat model, or add the tokens to its vocabulary"
    )


@dataclasses.dataclass(frozen=True)
class Encoded:
    """Tokens, role and label flags of a dialogue or of a prompt; int32[n], int32[n], bool[n]. `cut` counts tokens."""

    tokens: np.ndarray
    role: np.ndarray
    predicted: np.ndarray
    cut: int = 0


def _turn(tokenizer: Tokenizer, template: Template, name: str, text: str, role: int, label: bool) -> list[tuple]:
    head = [*encode(tokenizer, name), *template.between]
    body = encode(tokenizer, text)
    return (
        [(t, TEMPLATE, False) for t in template.start]
        + [(t, role, False) for t in head]
        + [(t, role, label) for t in body]
        + [(t, TEMPLATE, label) for t in template.end]
        + [(t, TEMPLATE, False) for t in template.after]
    )


def encode_dialogue(
    tokenizer: Tokenizer,
    template: Template,
    turns: Sequence[Turn],
    responder: str,
    *,
    length: int,
    labels: str = "reply",
    names: str = "visible",
) -> Encoded | None:
    """Tokens of a dialogue that ends in the responder's reply.

    Args:
      tokenizer: of the base.
      template: its chat format.
      turns: the last one is the reply.
      responder: name of the responder; every other speaker is the querier.
      length: at most so many tokens; the oldest turns are dropped first, never the query (the querier's last turn)
        nor what follows it.
      labels: "reply" = the reply and its end-of-turn; "all" = every responder turn and its end-of-turn.
      names: "visible" or "masked" (speakers become "user" and "assistant").

    Returns:
      None when query and reply alone exceed `length`.
    """
    query = max((i for i, turn in enumerate(turns) if turn.speaker != responder), default=len(turns) - 1)
    pieces = []
    for i, turn in enumerate(turns):
        role = RESPONDER if turn.speaker == responder else QUERIER
        name = MASKED[role] if names == "masked" else turn.speaker
        label = role == RESPONDER and (labels == "all" or i == len(turns) - 1)
        pieces.append(_turn(tokenizer, template, name, turn.text, role, label))
    first = cut = 0
    while sum(map(len, pieces[first:])) + len(template.bos) > length:
        if first == query:
            return None
        cut += len(pieces[first])
        first += 1
    return _pack_pieces([[(t, TEMPLATE, False) for t in template.bos], *pieces[first:]], cut)


def encode_prompt(
    tokenizer: Tokenizer,
    template: Template,
    turns: Sequence[Turn],
    responder: str,
    *,
    length: int,
    names: str = "visible",
) -> Encoded | None:
    """Tokens of a prompt: turns, then the header of the responder's reply. Same cuts as `encode_dialogue`."""
    whole = encode_dialogue(
        tokenizer, template, [*turns, Turn(responder, "")], responder, length=length, labels="reply", names=names
    )
    if whole is None:
        return None
    keep = len(whole.tokens) - len(template.end) - len(template.after)
    return Encoded(whole.tokens[:keep], whole.role[:keep], np.zeros(keep, bool), whole.cut)


def _pack_pieces(pieces: Sequence[list[tuple]], cut: int) -> Encoded:
    tokens, role, label = zip(*[t for piece in pieces for t in piece], strict=True)
    return Encoded(np.array(tokens, np.int32), np.array(role, np.int32), np.array(label, bool), cut)
