"""Generation on the device: a fixed number of slots, each with a request of its own, that draw tokens together.

What a slot draws depends on its request only: greedy tokens on the prompt, sampled ones also on the request's seed and on
how many it has drawn; never on the slot or on who else is there. `batching.py` decides on the host who gets a slot.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Int, UInt

from qaperso.arrays import BATCH_AXES, divides
from qaperso.data.batches import columns_of
from qaperso.data.text import Encoded
from qaperso.models import decoder, inference
from qaperso.models.config import DecoderConfig
from qaperso.models.inference import Cache
from qaperso.types import Inputs

Tree = Any
# Most tokens a slot draws before the host hears of them.
STRIDE = 16


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How a reply is drawn; temperature 0 is greedy. Equal requests with equal seeds get equal replies."""

    new_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0


@flax.struct.dataclass
class Slots:
    """B requests under way.

    Attributes:
      cache: of C places a slot.
      attend: bool[B, C], places that may be attended to once they are written.
      rows: float[B, D], the queriers' rows; None where the method has none.
      token: int32[B], the last token of prompt or reply, which the model has not read yet.
      position: int32[B], its position.
      place: int32[B], its place in the cache.
      number: int32[B], tokens drawn so far.
      limit: int32[B], tokens to draw at most.
      active: bool[B]; a slot that is not draws nothing and may be given away.
      temperature, top_p: float32[B].
      seed: uint32[B].
    """

    cache: Any
    attend: Any
    rows: Any
    token: Any
    position: Any
    place: Any
    number: Any
    limit: Any
    active: Any
    temperature: Any
    top_p: Any
    seed: Any


@flax.struct.dataclass
class Request:
    """What prompts and their requests put into slots; n of them, [n] or [n, ...] each, host arrays but for `rows` and `soft`."""

    inputs: Inputs
    rows: Any  # float[n, S, D] or None
    limit: Any
    temperature: Any
    top_p: Any
    seed: Any
    soft: Any = None  # float[n, P, D] or None


def pad(prompts: Sequence[Encoded], rows: Sequence[int], length: int) -> Inputs:
    """One prompt a row, padded at its end to `length`.

    Args:
      prompts: 1 to `length` tokens each.
      rows: the querier row of each prompt.
      length: of the arrays.
    """
    b = len(prompts)
    grid = {name: np.zeros((b, length), np.int32) for name in ("tokens", "segment", "position", "role")}
    for r, p in enumerate(prompts):
        n = len(p.tokens)
        grid["tokens"][r, :n], grid["role"][r, :n] = p.tokens, p.role
        grid["segment"][r, :n], grid["position"][r, :n] = 1, np.arange(n)
    zeros = np.zeros((b, 1), np.int32)
    querier = np.asarray(rows, np.int32)[:, None]
    return Inputs(
        **grid,
        attend=grid["segment"] > 0,
        querier=querier,
        responder=zeros,
        cluster=zeros,
        present=np.ones((b, 1), bool),
        columns=columns_of([[p.columns] for p in prompts], b, 1),
    )


def bucket(length: int, smallest: int = 32) -> int:
    """The next power of two: few lengths, few compilations."""
    return max(smallest, 1 << (length - 1).bit_length())


def nucleus(scaled: Float[Array, "B V"], top_p: Float[Array, " B"]) -> Float[Array, "B V"]:
    """Leaves the smallest set of tokens whose probability reaches top_p (nucleus sampling, Holtzman et al., arXiv
    1904.09751); the others get -inf. At least the likeliest stays, and of tokens as likely as the last one all.

    A token stays where what is likelier than it is below top_p. The least such probability is found by halving, 31
    sums instead of a sort of the vocabulary: non-negative floats are ordered as their bits are.
    """
    probability = jax.nn.softmax(scaled, -1)
    bits = jax.lax.bitcast_convert_type(probability, jnp.int32)
    wanted = jnp.maximum(top_p, 1e-9)

    def halve(_: Array, bounds: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = bounds
        middle = low + (high - low) // 2
        above = jnp.where(bits > middle[:, None], probability, 0).sum(-1)
        return jnp.where(above < wanted, low, middle), jnp.where(above < wanted, middle, high)

    # Nothing is likelier than probability 1; everything is than what is below 0.
    low, high = jnp.full_like(bits[:, 0], -1), jnp.full_like(bits[:, 0], jnp.float32(1).view(jnp.int32))
    _, least = jax.lax.fori_loop(0, 31, halve, (low, high))
    return jnp.where((bits >= least[:, None]) | (top_p >= 1)[:, None], scaled, -jnp.inf)


def likeliest(logits: Float[Array, "B V"]) -> Int[Array, " B"]:
    """The index of each row's largest logit, of equal ones the first: that of its largest part, and where in that part.

    XLA's CPU back end reads a row by one thread, and parts by all.
    """
    b, v = logits.shape
    parts = logits.reshape(b, -1, max(n for n in range(1, 513) if v % n == 0))
    part = jnp.argmax(parts.max(-1), -1)
    within = jnp.argmax(jnp.take_along_axis(parts, part[:, None, None], 1)[:, 0], -1)
    return (part * parts.shape[2] + within).astype(jnp.int32)


def sample(
    logits: Float[Array, "B V"],
    temperature: Float[Array, " B"],
    top_p: Float[Array, " B"],
    seed: UInt[Array, " B"],
    number: Int[Array, " B"],
) -> Int[Array, " B"]:
    """Next tokens, each from its own row, temperature, top_p, seed and number of tokens drawn before.

    Temperature 0 is greedy; where every row is, nothing is drawn, and no nucleus is looked for where no row wants one.
    """
    greedy = likeliest(logits)

    def draw() -> Array:
        scaled = logits / jnp.maximum(temperature, 1e-6)[:, None]
        kept = jax.lax.cond((top_p < 1).any(), nucleus, lambda x, _: x, scaled, top_p)
        keys = jax.vmap(lambda s, n: jax.random.fold_in(jax.random.key(s), n))(seed, number)
        return jax.vmap(jax.random.categorical)(keys, kept).astype(jnp.int32)

    drawn = jax.lax.cond((temperature > 0).any(), draw, lambda: greedy)
    return jnp.where(temperature > 0, drawn, greedy)


def _spread(slots: Slots) -> Slots:
    """Keeps slots over the batch axes of the mesh in force and their cache's heads over its tensor axis, or whole where these
    do not divide them.

    Said of every result, since programs that leave it to the compiler could each choose, and compile twice.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return slots
    axis = BATCH_AXES if divides(mesh, BATCH_AXES, slots.token.shape[0]) else None
    # In the cache towers come before slots, and behind them heads, which lie where the kernels that make them do.
    heads = "tensor" if divides(mesh, ("tensor",), slots.cache[0][0].shape[2]) else None
    cached, other = PartitionSpec(None, axis, heads), PartitionSpec(axis)
    return jax.tree.map(lambda x: jax.lax.with_sharding_constraint(x, cached if x.ndim == 5 else other), slots)


def _everywhere(x: Array) -> Array:
    """The same array, whole on each device of the mesh in force."""
    return x if jax.sharding.get_abstract_mesh().empty else jax.lax.with_sharding_constraint(x, PartitionSpec())


@functools.partial(jax.jit, static_argnames=("config", "count", "length", "rows"))
def empty_slots(weights: Tree, *, config: DecoderConfig, count: int, length: int, rows: bool) -> Slots:
    """`count` free slots of `length` places; `rows` where queriers have rows."""
    integer, real = jnp.zeros(count, jnp.int32), jnp.zeros(count)
    return _spread(
        Slots(
            cache=inference.empty_cache(weights, config, count, length),
            attend=jnp.zeros((count, length), bool),
            rows=jnp.zeros((count, config.embed), weights["embed"].dtype) if rows else None,
            **dict.fromkeys(("token", "position", "place", "number", "limit"), integer),
            active=jnp.zeros(count, bool),
            temperature=real,
            top_p=real,
            seed=integer.astype(jnp.uint32),
        )
    )


@functools.partial(jax.jit, static_argnames=("length",))
def resize(slots: Slots, *, length: int) -> Slots:
    """The slots with `length` places each; what lay beyond is gone."""

    def fit(x: Array, axis: int) -> Array:
        pads = [(0, 0, 0)] * x.ndim
        pads[axis] = (0, length - x.shape[axis], 0)
        return jax.lax.pad(x, jnp.zeros((), x.dtype), pads)

    cache = tuple((fit(keys, 4), fit(values, 3)) for keys, values in slots.cache)
    return _spread(slots.replace(cache=cache, attend=fit(slots.attend, 1)))


@functools.partial(jax.jit, static_argnames=("config",))
def prefill(weights: Tree, inputs: Inputs, rows: Any, soft: Any = None, *, config: DecoderConfig) -> Cache:
    """Keys and values of padded prompts; their lengths do not matter, only that of the arrays."""
    mask = decoder.causal_mask(inputs.segment, inputs.attend)
    _, cache = inference.prefill(weights, inputs.tokens, inputs.position, mask, rows, config, soft)
    return cache


@functools.partial(jax.jit, donate_argnames="slots")
def insert(slots: Slots, which: Int[Array, " n"], request: Request, cache: Cache) -> Slots:
    """Puts n requests into slots.

    Args:
      slots: donated, with as many places as the longest prompt and its reply need.
      which: the slot of each request; the same slot may be named again with the same request.
      request: the last token of each prompt becomes the slot's unread token, so that the first token of a reply is
        drawn as all others are.
      cache: from `prefill`.
    """
    inputs = request.inputs
    n, length = inputs.tokens.shape
    end = length - 1 - jnp.argmax(inputs.segment[:, ::-1] > 0, 1)
    at_end = lambda x: x[jnp.arange(n), end]  # noqa: E731
    room = slots.attend.shape[1] - length

    def put(old: Array, new: Array) -> Array:
        for i in range(n):
            old = jax.lax.dynamic_update_slice(old, new[:, i : i + 1].astype(old.dtype), (0, which[i], 0, 0, 0))
        return old

    values = dict(
        attend=jnp.pad(inputs.attend, ((0, 0), (0, room)), constant_values=True)
        | (jnp.arange(slots.attend.shape[1]) > end[:, None]),
        token=at_end(inputs.tokens),
        position=at_end(inputs.position),
        place=end,
        number=jnp.zeros(n, jnp.int32),
        limit=request.limit,
        active=jnp.ones(n, bool),
        temperature=request.temperature,
        top_p=request.top_p,
        seed=request.seed,
    )
    if slots.rows is not None:
        values["rows"] = at_end(request.rows)
    changed = {k: getattr(slots, k).at[which].set(v.astype(getattr(slots, k).dtype)) for k, v in values.items()}
    return _spread(slots.replace(cache=jax.tree.map(put, slots.cache, cache), **changed))


@functools.partial(jax.jit, donate_argnames="slots")
def release(slots: Slots, which: Int[Any, ""]) -> Slots:
    """Takes the request out of a slot."""
    return _spread(slots.replace(active=slots.active.at[which].set(False)))


@functools.partial(jax.jit, static_argnames=("config",), donate_argnames="slots")
def advance(
    weights: Tree, slots: Slots, tokens: Int[Any, ""], *, config: DecoderConfig
) -> tuple[Slots, tuple[Int[Array, "B STRIDE"], Bool[Array, " B"]]]:
    """Draws up to `tokens` (at most STRIDE) for every active slot; ends early when one of them has its last.

    Args:
      weights: from `inference.prepare`.
      slots: donated.
      tokens: how many.
      config: of the decoder; a reply ends at any of its eos_ids.

    Returns:
      The slots; and for the hosts, each of which has all of it: the tokens drawn in order, end-of-turn included, -1 where
      there is none, and who is still active.
    """
    eos = jnp.asarray(config.eos_ids or (-1,), jnp.int32)
    before = slots.active
    out = jnp.full((before.shape[0], STRIDE), -1, jnp.int32)

    def body(carry: tuple[Slots, Array, Array]) -> tuple[Slots, Array, Array]:
        s, out, step = carry
        visible = s.attend & (jnp.arange(s.attend.shape[1]) <= s.place[:, None])
        logits, cache = inference.decode(weights, s.cache, s.token, s.position, s.place, visible, s.rows, config)
        # A slot that is free must not make the others wait for draws.
        drawn = sample(logits, jnp.where(before, s.temperature, 0), s.top_p, s.seed, s.number)
        one = before.astype(jnp.int32)
        number = s.number + one
        s = s.replace(
            cache=cache,
            token=drawn,
            position=s.position + one,
            place=s.place + one,
            number=number,
            active=before & ~jnp.isin(drawn, eos) & (number < s.limit),
        )
        out = jax.lax.dynamic_update_index_in_dim(out, jnp.where(before, drawn, -1), step, 1)
        return _spread(s), out, step + 1

    def going(carry: tuple[Slots, Array, Array]) -> Array:
        s, _, step = carry
        return before.any() & (s.active == before).all() & (step < tokens)

    slots, out, _ = jax.lax.while_loop(going, body, (slots, out, jnp.int32(0)))
    return slots, (_everywhere(out), _everywhere(slots.active))
