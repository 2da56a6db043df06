"""Whom a run's notes ask: an OpenAI-compatible endpoint, or the run's own base."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
from tqdm import tqdm

from qaperso import batching, generate
from qaperso.batching import Batcher, Model
from qaperso.data.text import Encoded, Front, encode_prompt
from qaperso.endpoint import Address, Cache, Completion, Endpoint, Messages, complete_all, digest, from_environment
from qaperso.errors import UserError
from qaperso.generate import Sampling
from qaperso.notes import Writer
from qaperso.reply import decode
from qaperso.run import Run
from qaperso.types import STRANGER, Turn

Tree = Any
# Questions under way at a time, at the endpoint and in the base's slots.
CONCURRENCY, SLOTS = 8, 32


def ready(run: Run, trainable: Tree, concurrency: int = CONCURRENCY) -> None:
    """Gives a run somebody to ask, by `dpl.writer`; nothing for methods that ask nobody. Commands do so before they encode.

    Args:
      run: just opened.
      trainable: its trained values.
      concurrency: questions that an endpoint is asked at a time.

    Raises:
      UserError: there are several hosts, or the environment names no endpoint.
    """
    notes = run.setting.notes
    if notes is None:
        return
    if jax.process_count() > 1:
        raise UserError(
            f"config.method='{run.config.method}' asks a language model on one host; start one process only"
        )
    if run.config.dpl.writer == "endpoint":
        notes.writer = of_endpoint(from_environment(), concurrency)
    else:
        notes.writer = of_base(run, trainable)


def of_endpoint(address: Address, concurrency: int) -> Writer:
    """A writer that asks an endpoint; what it may raise is `endpoint.complete_all`'s."""

    def write(cache: Cache, asked: Sequence[Messages]) -> list[Completion]:
        keys = [digest(address.model, messages) for messages in asked]
        # Connecting takes longer than looking up: most questions of a run have been asked before.
        if missing := [messages for key, messages in zip(keys, asked, strict=True) if cache.get(key) is None]:
            complete_all(Endpoint(address), cache, missing, concurrency)
        return [cache.get(key) for key in keys]

    return write


def of_base(run: Run, trainable: Tree) -> Writer:
    """A writer that is the run's own base, greedy, many questions at a time.

    The weights that reply are a second copy; it is there only while something is asked.
    """
    base, new_tokens = run.record["base"], run.config.dpl.new_tokens
    name = f"{base['name']} {base['sha256']}, {new_tokens} tokens"

    def write(cache: Cache, asked: Sequence[Messages]) -> list[Completion]:
        questions = {digest(name, messages): messages for messages in asked}
        prompts = {key: prompt_of(run, m) for key, m in questions.items() if cache.get(key) is None}
        if prompts:
            _speak(batching.prepare(run, trainable), prompts, new_tokens, cache)
        return [cache.get(digest(name, messages)) for messages in asked]

    return write


def prompt_of(run: Run, messages: Messages) -> Encoded:
    """Tokens of a question to the run's base, up to the header of its answer.

    Raises:
      UserError: it is longer than the base reads.
    """
    length = run.setting.model.max_position - run.config.dpl.new_tokens
    turns = [Turn(m["role"], m["content"]) for m in messages]
    front = Front(tuple(turn for turn in turns if turn.speaker == "system"))
    asked = [turn for turn in turns if turn.speaker != "system"]
    found = encode_prompt(run.tokenizer, run.template, asked, "assistant", length=length, front=front)
    if found is None or found.cut or len(found.tokens) > length:
        raise UserError(
            f"a question of config.method='{run.config.method}' and its answer take more than the {length} tokens that the "
            "base reads; lower dpl.words, dpl.representatives, dpl.new_tokens or prompts.examples"
        )
    return found


def _speak(model: Model, prompts: dict[str, Encoded], new_tokens: int, cache: Cache) -> None:
    """Puts an answer to each prompt into the cache, each as soon as it is whole."""
    # Short ones first: the cache of keys and values is as long as the longest under way.
    order = sorted(prompts, key=lambda key: len(prompts[key].tokens))
    batcher = Batcher(model, min(SLOTS, generate.bucket(len(order), smallest=1)))
    place = {batcher.submit(prompts[key], STRANGER, Sampling(new_tokens)): key for key in order}
    spoken: dict[str, list[int]] = {key: [] for key in order}
    with tqdm(total=len(order), unit="answer", dynamic_ncols=True, disable=None) as bar:
        while batcher.busy:
            for progress in batcher.step(generate.STRIDE):
                key = place[progress.handle]
                spoken[key] += progress.tokens
                if progress.finished:
                    read, written = len(prompts[key].tokens), len(spoken[key])
                    cache.put(key, Completion(decode(model.run, spoken[key]), read, written))
                    bar.update()
