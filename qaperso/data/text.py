"""From turns to tokens: the chat template with role spans.

Every piece of a turn (name, separator, text) is tokenised on its own, so that tokens never straddle a span and the
tokens of a prompt are a prefix of the tokens of prompt and reply.
"""

from __future__ import annotations

import bisect
import dataclasses
import itertools
from collections.abc import Mapping, Sequence
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


def encode_all(tokenizer: Tokenizer, texts: Sequence[str]) -> list[list[int]]:
    """`encode` of many texts at once."""
    if not texts:
        return []
    return tokenizer(list(texts), add_special_tokens=False, split_special_tokens=True)["input_ids"]


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
        f"({', '.join(LLAMA)}); use a chat model, or add the tokens to its vocabulary and embeddings"
    )


def check_template(template: Template, vocab: int) -> None:
    """Makes sure that a model has embeddings of a template's tokens: a look-up beyond them would give the last one's.

    Args:
      template: of its tokeniser.
      vocab: how many embeddings it has.

    Raises:
      UserError: it has not.
    """
    largest = max((*template.bos, *template.start, *template.between, *template.end, *template.after))
    if largest >= vocab:
        raise UserError(
            f"config.base has a tokeniser whose chat markers go up to id {largest}, and embeddings of ids below {vocab} only; "
            "resize the model's embeddings to its tokeniser and save both"
        )


@dataclasses.dataclass(frozen=True)
class Encoded:
    """Tokens, role and label flags of a sequence or of a prompt; int32[n], int32[n], bool[n].

    `cut` counts the dialogue's tokens that stand in none of its sequences (told by the first of them), `replies` the
    replies that this one predicts. `columns` is what its method looked up, see `types.Example`.
    """

    tokens: np.ndarray
    role: np.ndarray
    predicted: np.ndarray
    cut: int = 0
    replies: int = 0
    columns: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, eq=False)
class Front:
    """What a method puts before the turns that a reply sees.

    Attributes:
      preface: turns that are no part of the dialogue: never labels, all template, speakers called as they are given.
      places: how many soft tokens stand before everything else.
      columns: what the method looked up, see `types.Example`.
    """

    preface: tuple[Turn, ...] = ()
    places: int = 0
    columns: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def key(self) -> tuple[Any, ...]:
        """Equal for equal ones."""
        return self.preface, self.places, tuple((name, np.asarray(x).tobytes()) for name, x in self.columns.items())


def called(speaker: str, role: int, names: str) -> str:
    """What a speaker is called in the text: by name, or "user" and "assistant" where `names` hides it.

    Args:
      speaker: the name.
      role: QUERIER or RESPONDER.
      names: "visible", "responder" = the querier's is hidden, "masked" = both are.
    """
    hidden = {"visible": (), "responder": (QUERIER,), "masked": (QUERIER, RESPONDER)}[names]
    return MASKED[role] if role in hidden else speaker


def turn_size(tokenizer: Tokenizer, template: Template, turn: Turn) -> int:
    """How many tokens a turn takes, markers and speaker included."""
    name, body = encode(tokenizer, turn.speaker), encode(tokenizer, turn.text)
    return len(_turn(template, name, body, TEMPLATE, False))


def scored_turns(turns: Sequence[Turn], responder: str, replies: Sequence[int], labels: str) -> list[int]:
    """The turns that are learned and scored: the given replies (() = the last turn), or all that the responder says.

    Args:
      turns, responder: of the dialogue.
      replies: turns in order.
      labels: "reply" or "all".
    """
    if labels == "all":
        return [i for i, turn in enumerate(turns) if turn.speaker == responder]
    return list(replies) or [len(turns) - 1]


def _turn(template: Template, name: Sequence[int], body: Sequence[int], role: int, label: bool) -> list[tuple]:
    head = [*name, *template.between]
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
    targets: int | None = None,
    replies: Sequence[int] = (),
    context: int = 0,
    labels: str = "reply",
    names: str = "visible",
    fronts: Sequence[Front] = (),
) -> list[Encoded]:
    """Tokens of a dialogue as one sequence, or as few as hold each of its replies once (ours).

    Each sequence ends in a reply and predicts the replies that no earlier one has. It takes as many replies as fit beside
    the `context` turns before the first of them; what room is left goes to still older turns. Where even these turns
    do not fit, the oldest are dropped, never the query (the querier's last turn before the reply) nor what follows it.

    What stands before them is not asked for when turns are laid out: replies see the same turns whatever their fronts are.
    Of a sequence, replies next to each other with equal fronts stay together, others get one each from its first turn on.

    Args:
      tokenizer: of the base.
      template: its chat format.
      turns: the last one is a reply.
      responder: name of the responder; every other speaker is the querier.
      length: at most so many tokens a sequence, fronts not counted.
      targets: at most so many labels a sequence; None = any number.
      replies: the turns that are replies, in order; () = the last.
      context: how many turns the first reply of a sequence sees at least, where they fit.
      labels: "reply" = the replies and their end-of-turns are labels; "all" = every responder turn is a reply.
      names: which speakers go by name, see `called`.
      fronts: what stands before each reply; () = nothing.

    Returns:
      Sequences in the order of their replies; a reply that exceeds the bounds with its query alone is in none.
    """
    scored = scored_turns(turns, responder, replies, labels)
    pieces, spelled, predicted = [], {}, set(scored)
    for i, turn in enumerate(turns):
        role = RESPONDER if turn.speaker == responder else QUERIER
        name = called(turn.speaker, role, names)
        if name not in spelled:
            spelled[name] = encode(tokenizer, name)
        pieces.append(_turn(template, spelled[name], encode(tokenizer, turn.text), role, i in predicted))
    asked = [i for i, turn in enumerate(turns) if turn.speaker != responder]
    parts = _stretches(
        [len(piece) for piece in pieces],
        [sum(label for _, _, label in piece) for piece in pieces],
        [(i, asked[bisect.bisect_left(asked, i) - 1] if asked and asked[0] < i else i) for i in scored],
        length - len(template.bos),
        targets,
        context,
    )
    seen = {i for first, _, last in parts for i in range(first, last + 1)}
    cut = sum(len(piece) for i, piece in enumerate(pieces) if i not in seen)
    bos = [(t, TEMPLATE, False) for t in template.bos]
    fronts = fronts or [Front()] * len(scored)
    result: list[Encoded] = []
    for first, start, last in parts:
        asked_for = [(i, front) for i, front in zip(scored, fronts, strict=True) if start <= i <= last]
        for _, alike in itertools.groupby(asked_for, key=lambda pair: pair[1].key):
            answers, (front, *_) = zip(*alike, strict=True)
            told = [
                _turn(template, encode(tokenizer, turn.speaker), encode(tokenizer, turn.text), TEMPLATE, False)
                for turn in front.preface
            ]
            old = [[(t, role, False) for t, role, _ in piece] for piece in pieces[first : answers[0]]]
            own = pieces[answers[0] : answers[-1] + 1]
            packed = _pack_pieces([bos, *told, *old, *own], 0 if result else cut, len(answers))
            result.append(_reserve(packed, front.places, front.columns))
    return result


def _stretches(
    tokens: Sequence[int],
    labels: Sequence[int],
    replies: Sequence[tuple[int, int]],
    length: int,
    targets: int | None,
    context: int,
) -> list[tuple[int, int, int]]:
    """Which turns make which sequence; see `encode_dialogue`.

    Args:
      tokens, labels: how many each turn has.
      replies: (turn, turn of its query).
      length, targets, context: bounds of a sequence.

    Returns:
      (first turn, first reply, last reply) of each sequence.
    """
    tokens_to, labels_to = ([0, *itertools.accumulate(counts)] for counts in (tokens, labels))
    most = labels_to[-1] if targets is None else targets

    def fits(first: int, start: int, last: int) -> bool:
        within = tokens_to[last + 1] - tokens_to[first] <= length
        return within and labels_to[last + 1] - labels_to[start] <= most

    parts = []
    k = 0
    while k < len(replies):
        start, query = replies[k]
        first, last = min(max(start - context, 0), query), start
        while first < query and not fits(first, start, last):
            first += 1
        k += 1
        if not fits(first, start, last):
            continue
        while k < len(replies) and fits(first, start, replies[k][0]):
            last = replies[k][0]
            k += 1
        while first > 0 and fits(first - 1, start, last):
            first -= 1
        parts.append((first, start, last))
    return parts


def encode_prompt(
    tokenizer: Tokenizer,
    template: Template,
    turns: Sequence[Turn],
    responder: str,
    *,
    length: int,
    names: str = "visible",
    front: Front = Front(),
) -> Encoded | None:
    """Tokens of a prompt: turns, then the header of the responder's reply. Same cuts as `encode_dialogue`.

    Args:
      tokenizer, template, responder, length, names: as there.
      turns: what is said before the reply.
      front: what stands before them.

    Returns:
      None when the query alone exceeds `length`.
    """
    how = dict(length=length, names=names, fronts=[front])
    whole = encode_dialogue(tokenizer, template, [*turns, Turn(responder, "")], responder, **how)
    if not whole:
        return None
    (e,) = whole
    keep = len(e.tokens) - len(template.end) - len(template.after)
    return Encoded(e.tokens[:keep], e.role[:keep], np.zeros(keep, bool), e.cut, columns=e.columns)


def _reserve(e: Encoded, places: int, columns: Mapping[str, Any]) -> Encoded:
    """The sequence behind `places` positions for soft tokens, with what they are made from.

    The positions are template: no label and nobody's words. Their token ids (0) are never read: soft tokens stand there
    instead of embeddings, see `decoder.place`.
    """
    front = np.zeros(places, np.int32)
    return dataclasses.replace(
        e,
        tokens=np.concatenate([front, e.tokens]),
        role=np.concatenate([np.full(places, TEMPLATE, np.int32), e.role]),
        predicted=np.concatenate([front.astype(bool), e.predicted]),
        columns=columns,
    )


def _pack_pieces(pieces: Sequence[list[tuple]], cut: int, replies: int) -> Encoded:
    tokens, role, label = zip(*[t for piece in pieces for t in piece], strict=True)
    return Encoded(np.array(tokens, np.int32), np.array(role, np.int32), np.array(label, bool), cut, replies)
