"""Batched generation: one prefill, then a while loop that feeds both towers' caches."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from qaperso.data.text import Encoded
from qaperso.models import decoder, towers
from qaperso.models.config import DecoderConfig
from qaperso.models.decoder import Adapters
from qaperso.types import Inputs

Tree = Any


def left_pad(prompts: Sequence[Encoded], rows: Sequence[int], length: int) -> Inputs:
    """One prompt a row, padded on the left to `length`, so that all replies start at the same place.

    Args:
      prompts: at most `length` tokens each.
      rows: the querier row of each prompt.
      length: of the arrays.
    """
    b = len(prompts)
    grid = {name: np.zeros((b, length), np.int32) for name in ("tokens", "segment", "position", "role")}
    for r, p in enumerate(prompts):
        n = len(p.tokens)
        span = slice(length - n, length)
        grid["tokens"][r, span], grid["role"][r, span] = p.tokens, p.role
        grid["segment"][r, span], grid["position"][r, span] = 1, np.arange(n)
    zeros = np.zeros((b, 1), np.int32)
    querier = np.asarray(rows, np.int32)[:, None]
    return Inputs(
        **grid,
        attend=grid["segment"] > 0,
        querier=querier,
        responder=zeros,
        cluster=zeros,
        present=np.ones((b, 1), bool),
    )


def sample(
    logits: Float[Array, "B V"], temperature: Float[Array, ""], top_p: Float[Array, ""], key: jax.Array
) -> Int[Array, " B"]:
    """Next tokens. Temperature 0 is greedy; top_p keeps the smallest set of tokens whose probability reaches it
    (nucleus sampling, Holtzman et al., arXiv 1904.09751)."""
    greedy = jnp.argmax(logits, -1)
    scaled = logits / jnp.maximum(temperature, 1e-6)
    ordered = jnp.sort(scaled, -1)[:, ::-1]
    probability = jax.nn.softmax(ordered, -1)
    before = jnp.cumsum(probability, -1) - probability
    # The likeliest token stays whatever top_p is: nothing comes before it.
    lowest = jnp.min(jnp.where(before < jnp.maximum(top_p, 1e-9), ordered, jnp.inf), -1, keepdims=True)
    drawn = jax.random.categorical(key, jnp.where(scaled < lowest, -jnp.inf, scaled), -1)
    return jnp.where(temperature > 0, drawn, greedy).astype(jnp.int32)


@flax.struct.dataclass
class Decoding:
    """A generation under way.

    Attributes:
      number: int32, tokens drawn so far for each row.
      out: int32[B, N], the tokens drawn; places not reached hold the first eos id.
      done: bool[B], rows that have ended.
      cache: of prompt and drawn tokens.
    """

    number: Any
    out: Any
    done: Any
    cache: decoder.Cache


@flax.struct.dataclass
class Request:
    """What a generation goes by: the prompt, what the method adds for it, and how to draw."""

    inputs: Inputs
    adapters: Adapters
    temperature: Any = 0.0
    top_p: Any = 1.0
    seed: Any = 0


def prefill(
    base: Tree, request: Request, config: DecoderConfig, new_tokens: int, dtype: Any
) -> tuple[Float[Array, "W B S D"], decoder.Cache]:
    """Last layer's states of the prompt, and a cache with room for `new_tokens` more."""
    inputs, adapters = request.inputs, request.adapters
    b, s = inputs.tokens.shape
    cache = decoder.empty_cache(config, 1 if adapters.specific is None else 2, b, s + new_tokens, dtype)
    keys = jnp.pad(inputs.segment, ((0, 0), (0, new_tokens)))
    attend = jnp.pad(inputs.attend, ((0, 0), (0, new_tokens)))
    x = decoder.embed(base, inputs.tokens, adapters, dtype)
    mask = decoder.causal_mask(inputs.segment, attend, keys)
    return decoder.run(base, x, inputs.position, mask, config, adapters, cache=cache)


def _draw(
    params: Tree, base: Tree, request: Request, states: Float[Array, "W B 1 D"], number: Any, config: DecoderConfig
) -> Int[Array, " B"]:
    hidden = towers.join(params.get("tower", {}), base, states, config)
    logits = decoder.logits(base, hidden, config)[:, 0]
    key = jax.random.fold_in(jax.random.key(request.seed), number)
    return sample(logits, jnp.float32(request.temperature), jnp.float32(request.top_p), key)


@functools.partial(jax.jit, static_argnames=("config", "new_tokens", "dtype"))
def begin(
    params: Tree, base: Tree, request: Request, *, config: DecoderConfig, new_tokens: int, dtype: Any
) -> Decoding:
    """Reads the prompts and draws the first token of each reply."""
    states, cache = prefill(base, request, config, new_tokens, dtype)
    first = _draw(params, base, request, states[:, :, -1:], 0, config)
    eos = jnp.asarray(config.eos_ids or (-1,), jnp.int32)
    out = jnp.full((first.shape[0], new_tokens), eos[0], jnp.int32).at[:, 0].set(first)
    return Decoding(jnp.int32(1), out, jnp.isin(first, eos), cache)


@functools.partial(jax.jit, static_argnames=("config", "dtype"), donate_argnames="state")
def advance(
    params: Tree,
    base: Tree,
    request: Request,
    state: Decoding,
    until: Int[Any, ""],
    *,
    config: DecoderConfig,
    dtype: Any,
) -> Decoding:
    """Draws on until every row has ended or has `until` tokens; a stream asks for one more at a time."""
    inputs, adapters = request.inputs, request.adapters
    (b, s), new_tokens = inputs.tokens.shape, state.out.shape[1]
    eos = jnp.asarray(config.eos_ids or (-1,), jnp.int32)
    # Drawn tokens belong to the prompt's dialogue: its segment, and the querier row of its last token.
    keys = jnp.concatenate([inputs.segment, jnp.broadcast_to(inputs.segment[:, -1:], (b, new_tokens))], 1)
    attend = jnp.pad(inputs.attend, ((0, 0), (0, new_tokens)), constant_values=True)
    late = adapters if adapters.rows is None else adapters.replace(rows=adapters.rows[:, -1:])

    def unfinished(state: Decoding) -> Bool[Array, ""]:
        return (state.number < until) & ~state.done.all()

    def body(state: Decoding) -> Decoding:
        place = s + state.number - 1
        token = jax.lax.dynamic_index_in_dim(state.out, state.number - 1, 1)
        mask = decoder.causal_mask(inputs.segment[:, -1:], attend, keys, place)
        x = decoder.embed(base, token, late, dtype)
        position = inputs.position[:, -1:] + state.number
        states, cache = decoder.run(base, x, position, mask, config, late, cache=state.cache, start=place)
        drawn = jnp.where(state.done, eos[0], _draw(params, base, request, states, state.number, config))
        out = jax.lax.dynamic_update_index_in_dim(state.out, drawn, state.number, 1)
        return Decoding(state.number + 1, out, state.done | jnp.isin(drawn, eos), cache)

    return jax.lax.while_loop(unfinished, body, state)


def generate(
    params: Tree, base: Tree, request: Request, *, config: DecoderConfig, new_tokens: int, dtype: Any
) -> list[list[int]]:
    """Replies to left-padded prompts, each without its end-of-turn.

    Args:
      params: of the method; `params["tower"]` joins the towers where there are two.
      base: parameters of the decoder.
      request: inputs from `left_pad`, adapters from the method's `condition`, how to draw.
      config: of the decoder; a reply ends at any of its eos_ids.
      new_tokens: at most so many tokens.
      dtype: of activations and cache.
    """
    state = begin(params, base, request, config=config, new_tokens=new_tokens, dtype=dtype)
    state = advance(params, base, request, state, new_tokens, config=config, dtype=dtype)
    return trim(np.asarray(state.out), config)


def trim(out: np.ndarray, config: DecoderConfig) -> list[list[int]]:
    """Cuts each row int32[B, N] before its first eos id."""
    ended = np.isin(out, config.eos_ids)
    counts = np.where(ended.any(1), ended.argmax(1), out.shape[1])
    return [row[:n].tolist() for row, n in zip(out, counts, strict=True)]


def bucket(length: int, smallest: int = 32) -> int:
    """The next power of two: few prompt lengths, few compilations."""
    return max(smallest, 1 << (length - 1).bit_length())
