"""From a model and questions to replies: whole, in batches, or as a stream."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

from qaperso import generate
from qaperso.batching import Batcher, Model
from qaperso.data import paper
from qaperso.data.text import Encoded, encode_prompt
from qaperso.errors import UserError
from qaperso.generate import Sampling
from qaperso.run import Run
from qaperso.types import Dialogue, Turn


def make_prompt(run: Run, dialogue: Dialogue) -> Encoded:
    """Tokens of what stands before a dialogue's last reply, by the run's method.

    Raises:
      UserError: the query alone is longer than a row.
    """
    turns = dialogue.turns[:-1]
    length, names = run.config.batch.length, run.config.data.names
    how = run.tokenizer, run.template
    e: Encoded | None
    if run.config.compat == "paper":
        e, _ = paper.encode_eval(*how, [*turns, Turn(dialogue.responder, "")], dialogue.responder, length)
        e = None if e.cut else e  # it cuts the end off, where the reply is to stand
    else:
        e = encode_prompt(*how, turns, dialogue.responder, length=run.room, names=names, front=run.front(dialogue))
    if e is None:
        kept = "" if run.room == length else f", of which {run.room} are the dialogue's"
        raise UserError(
            f"a query is longer than batch.length={length} tokens{kept}: {turns[-1].text[:60]!r}...; shorten it"
        )
    return e


def fits(run: Run, dialogue: Dialogue) -> bool:
    """Whether `make_prompt` finds room for the dialogue's query."""
    try:
        make_prompt(run, dialogue)
    except UserError:
        return False
    return True


def question(run: Run, history: Sequence[Turn], querier: str, text: str, responder: str) -> Dialogue:
    """A dialogue that waits for its reply."""
    turns = (*history, Turn(querier, text), Turn(responder, ""))
    return Dialogue("question", responder, querier, turns, "question")


def replies(
    model: Model, dialogues: Sequence[Dialogue], rows: Sequence[int], samplings: Sequence[Sampling], batch: int = 32
) -> list[str]:
    """A reply to each dialogue's query, as to the querier of the given row; each is what it would be alone.

    Args:
      model: from `batching.prepare`.
      dialogues: what stands before the last turn is the prompt.
      rows: the querier row of each.
      samplings: how each is drawn. With one seed for all they would share their random numbers.
      batch: at most so many are drawn at a time, a power of two.
    """
    run = model.run
    run.annotate([dataclasses.replace(d, replies=()) for d in dialogues])
    prompts = [make_prompt(run, d) for d in dialogues]
    batcher = Batcher(model, min(batch, generate.bucket(len(prompts), smallest=1)))
    # Short ones first: the cache is as long as the longest under way.
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i].tokens))
    place = {batcher.submit(prompts[i], rows[i], samplings[i]): i for i in order}
    spoken: list[list[int]] = [[] for _ in prompts]
    while batcher.busy:
        for progress in batcher.step(generate.STRIDE):
            spoken[place[progress.handle]] += progress.tokens
    return [decode(run, tokens) for tokens in spoken]


def stream(model: Model, dialogue: Dialogue, row: int, sampling: Sampling) -> Iterator[str]:
    """One reply piece by piece; the pieces together are the reply."""
    for _, piece in streams(model, [dialogue], [row], [sampling]):
        yield piece


def streams(
    model: Model, dialogues: Sequence[Dialogue], rows: Sequence[int], samplings: Sequence[Sampling]
) -> Iterator[tuple[int, str]]:
    """Replies that are written at one time: whose turn it is, by place among the dialogues, and the next piece of that reply.

    Args:
      model, dialogues, rows, samplings: as for `replies`, whose replies the pieces make up.
    """
    run = model.run
    run.annotate([dataclasses.replace(d, replies=()) for d in dialogues])
    batcher = Batcher(model, generate.bucket(len(dialogues), smallest=1))
    prompts = [make_prompt(run, d) for d in dialogues]
    place = {batcher.submit(*each): i for i, each in enumerate(zip(prompts, rows, samplings, strict=True))}
    pieces = [Pieces(run) for _ in prompts]
    while batcher.busy:
        for progress in batcher.step():
            i = place[progress.handle]
            if piece := pieces[i].add(progress.tokens, progress.finished):
                yield i, piece


def answers(
    model: Model, text: str, queriers: Sequence[str], responder: str, sampling: Sampling | None = None
) -> dict[str, str]:
    """What each querier is told when all ask the same, without anything said before.

    Args:
      model: from `batching.prepare`.
      text: the query.
      queriers: names that the run knows, or "stranger".
      responder: who answers.
      sampling: how; None = as the run's configuration has it.

    Raises:
      UserError: a name is not known, or the query fits no row.
    """
    run, g = model.run, model.run.config.generate
    how = sampling or Sampling(g.max_new_tokens, g.temperature, g.top_p)
    asked = [question(run, [], querier, text, responder) for querier in queriers]
    found = replies(model, asked, [run.registry.row(q) for q in queriers], [how] * len(asked))
    return dict(zip(queriers, found, strict=True))


class Pieces:
    """Text of a reply whose tokens come one after the other."""

    def __init__(self, run: Run):
        """Begins a reply of the run's tokeniser."""
        self._run = run
        self._tokens: list[int] = []
        self._said = ""

    def add(self, tokens: Sequence[int], finished: bool) -> str:
        """What can be said now that these tokens are there; "" while a character waits for its other tokens."""
        self._tokens += tokens
        text = decode(self._run, self._tokens)
        if text.endswith("\ufffd") and not finished:
            return ""
        piece, self._said = text[len(self._said) :], text
        return piece


def decode(run: Run, tokens: Sequence[int]) -> str:
    """Plain text of a reply's tokens."""
    return run.tokenizer.decode(tokens, skip_special_tokens=True).strip()
