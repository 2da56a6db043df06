"""From an opened run and questions to replies: whole, in batches, or as a stream."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qaperso import generate
from qaperso.data import paper
from qaperso.data.text import Encoded, encode_prompt
from qaperso.errors import UserError
from qaperso.generate import Request
from qaperso.run import Run
from qaperso.types import Dialogue, Turn

Tree = Any


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How replies are drawn; temperature 0 is greedy."""

    new_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0


def make_prompt(run: Run, dialogue: Dialogue) -> Encoded:
    """Tokens of what stands before a dialogue's reply, by the run's method.

    Raises:
      UserError: the query alone is longer than a row.
    """
    turns = run.method.prompt(run.setting, dialogue)
    length, names = run.config.batch.length, run.config.data.names
    how = run.tokenizer, run.template
    e: Encoded | None
    if run.config.compat == "paper":
        e, _ = paper.encode_eval(*how, [*turns, Turn(dialogue.responder, "")], dialogue.responder, length)
        e = None if e.cut else e  # it cuts the end off, where the reply is to stand
    else:
        e = encode_prompt(*how, turns, dialogue.responder, length=length, names=names)
    if e is None:
        raise UserError(f"a query is longer than batch.length={length} tokens: {turns[-1].text[:60]!r}...; shorten it")
    return e


def question(run: Run, history: Sequence[Turn], querier: str, text: str, responder: str) -> Dialogue:
    """A dialogue that waits for its reply."""
    turns = (*history, Turn(querier, text), Turn(responder, ""))
    return Dialogue("question", responder, querier, turns, "question")


def request(run: Run, trainable: Tree, prompts: Sequence[Encoded], rows: Sequence[int], sampling: Sampling) -> Request:
    """Prompts as one left-padded batch, with what the method adds for its queriers."""
    length = generate.bucket(max(len(p.tokens) for p in prompts))
    inputs = generate.left_pad(prompts, rows, length)
    if run.config.compat == "paper":
        attend = inputs.attend & (inputs.tokens != run.setting.model.eos_ids[0])
        inputs = inputs.replace(attend=attend, position=paper.generation_positions(attend))
    inputs = jax.tree.map(jnp.asarray, inputs)
    adapters = run.method.condition(run.setting, trainable, inputs)
    return Request(inputs, adapters, sampling.temperature, sampling.top_p, sampling.seed)


def _fixed(run: Run) -> dict[str, Any]:
    return {"config": run.setting.model, "dtype": jnp.dtype(run.config.dtype)}


def replies(
    run: Run, trainable: Tree, dialogues: Sequence[Dialogue], rows: Sequence[int], sampling: Sampling, batch: int = 32
) -> list[str]:
    """A reply to each dialogue's query, as to the querier of the given row.

    Prompts of like length share a batch; every batch has `batch` rows, so that few shapes are compiled.
    """
    prompts = [make_prompt(run, d) for d in dialogues]
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i].tokens))
    result = [""] * len(prompts)
    for start in range(0, len(order), batch):
        chosen = order[start : start + batch]
        padded = chosen + chosen[-1:] * (batch - len(chosen) if len(order) > batch else 0)
        asked = request(run, trainable, [prompts[i] for i in padded], [rows[i] for i in padded], sampling)
        with jax.set_mesh(run.mesh):
            found = generate.generate(
                trainable, run.params_of(trainable), asked, new_tokens=sampling.new_tokens, **_fixed(run)
            )
        for i, tokens in zip(chosen, found, strict=False):
            result[i] = decode(run, tokens)
    return result


def stream(run: Run, trainable: Tree, dialogue: Dialogue, row: int, sampling: Sampling) -> Iterator[str]:
    """One reply piece by piece; the pieces together are the reply."""
    asked = request(run, trainable, [make_prompt(run, dialogue)], [row], sampling)
    params, fixed, said = run.params_of(trainable), _fixed(run), ""
    with jax.set_mesh(run.mesh):
        state = generate.begin(trainable, params, asked, new_tokens=sampling.new_tokens, **fixed)
    for until in range(1, sampling.new_tokens + 1):
        with jax.set_mesh(run.mesh):
            state = generate.advance(trainable, params, asked, state, until, **fixed)
        number, out, done = (np.asarray(x) for x in (state.number, state.out, state.done))
        text = decode(run, generate.trim(out[:, :number], run.setting.model)[0])
        finished = bool(done.all()) or until == sampling.new_tokens
        # A character may take several tokens: hold back what may still change.
        if finished or not text.endswith("\ufffd"):
            yield text[len(said) :]
            said = text
        if finished:
            return


def decode(run: Run, tokens: Sequence[int]) -> str:
    """Plain text of a reply's tokens."""
    return run.tokenizer.decode(tokens, skip_special_tokens=True).strip()
