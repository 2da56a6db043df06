"""Generation: what slots draw is what the full forward pass says, and drawing is what it says."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import helpers
import hypothesis
import hypothesis.extra.numpy
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import paper
import pytest
import untrained

from qaperso import batching, generate
from qaperso.batching import Batcher, Model
from qaperso.data import paper as layout
from qaperso.data.batches import Shape, make_batch
from qaperso.data.text import Encoded
from qaperso.generate import Sampling
from qaperso.methods import base as base_method
from qaperso.methods import qar
from qaperso.models import decoder, inference, towers
from qaperso.types import Example, Inputs

NEW = 6
ROWS = (1, 0, 3)
PROMPTS = [untrained.prompt(n, i) for i, n in enumerate((9, 4, 7))]
SAMPLE = generate.sample


@pytest.fixture(scope="module", autouse=True)
def every_step() -> Iterator[list[np.ndarray]]:
    """The logits [B, V] of every step that is computed. In all of this module, so that little is compiled twice."""
    seen: list[np.ndarray] = []

    def spy(logits: jax.Array, *rest: jax.Array) -> jax.Array:
        jax.debug.callback(lambda x: seen.append(np.array(x)), logits, ordered=True)
        return SAMPLE(logits, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(generate, "sample", spy)
        generate.advance.clear_cache()
        yield seen
    generate.advance.clear_cache()


@pytest.fixture
def drawn_from(every_step: list[np.ndarray]) -> list[np.ndarray]:
    """The logits of every step of this test, in order."""
    jax.effects_barrier()
    every_step.clear()
    return every_step


def close(ours: Any, theirs: Any) -> None:
    """|a - b| <= 1e-4 max|b| + 1e-6."""
    theirs = np.asarray(theirs, np.float64)
    worst = np.abs(np.asarray(ours, np.float64) - theirs).max()
    assert worst <= 1e-4 * np.abs(theirs).max() + 1e-6, worst


def reply(
    model: Model,
    which: Sequence[int] = (0, 1, 2),
    how: Sequence[Sampling] | None = None,
    slots: int = 4,
    tokens: int = generate.STRIDE,
) -> list[list[int]]:
    """What some of the prompts are replied, all of them submitted at once."""
    batcher, found = Batcher(model, slots), {}
    for i, r in enumerate(which):
        sampling = Sampling(NEW) if how is None else how[i]
        found[batcher.submit(PROMPTS[r], ROWS[r], sampling)] = []
    while batcher.busy:
        for progress in batcher.step(tokens):
            found[progress.handle] += progress.tokens
    return list(found.values())


def full_logits(m: SimpleNamespace, tokens: list[list[int]], rows: Sequence[int]) -> list[np.ndarray]:
    """Logits [n, V] of each dialogue by the pass that training makes, all of them packed into one row."""
    ids = dict(responder=0, cluster=0, text=0, label=-1)
    examples = [
        Example(np.array(t, np.int32), np.ones(len(t), np.int32), np.zeros(len(t), bool), querier=row, **ids, index=i)
        for i, (t, row) in enumerate(zip(tokens, rows, strict=True))
    ]
    packed = make_batch([examples], Shape(rows=1, length=sum(map(len, tokens)), targets=1, dialogues=len(tokens)))

    @jax.jit
    def forward(inputs: Inputs) -> jax.Array:
        states = base_method.states(m.setting, m.base, inputs, m.method.condition(m.setting, m.trainable, inputs))
        return decoder.logits(m.base, towers.join(m.trainable.get("tower", {}), m.base, states, m.config), m.config)

    return np.split(forward(helpers.device(packed.inputs))[0], np.cumsum([len(t) for t in tokens])[:-1])


@pytest.mark.parametrize("name", ["sft", "qar", "sft_rows"])
def test_every_cached_step_is_the_full_pass(name: str, drawn_from: list[np.ndarray]) -> None:
    m = untrained.small(name)
    found = reply(m.model)
    jax.effects_barrier()
    assert len(drawn_from) == NEW and [len(said) for said in found] == [NEW] * len(PROMPTS)
    whole = [[*prompt.tokens.tolist(), *said[:-1]] for prompt, said in zip(PROMPTS, found, strict=True)]
    for r, expect in enumerate(full_logits(m, whole, ROWS)):
        close(np.stack(drawn_from)[:, r], expect[-NEW:])
        assert np.argmax(expect[-NEW:], -1).tolist() == found[r]
    if name != "sft":
        # Rows matter, or the comparison above shows less than it says.
        others = full_logits(m, whole, ROWS[::-1])
        assert np.abs(others[0][-NEW:] - np.stack(drawn_from)[:, 0]).max() > 0.1


def test_a_batch_gives_what_each_gives_alone() -> None:
    two = untrained.small("qar").model
    together = reply(two)
    assert len({tuple(said) for said in together}) == len(PROMPTS)
    for r in range(len(PROMPTS)):
        assert reply(two, [r], slots=1) == [together[r]]


def test_one_token_at_a_time_is_all_at_once() -> None:
    two, how = untrained.small("qar").model, [Sampling(NEW, 1.0, 0.9, seed) for seed in range(3)]
    assert reply(two, how=how, tokens=1) == reply(two, how=how)


def test_it_stops_where_every_row_has_ended(drawn_from: list[np.ndarray]) -> None:
    free = reply(untrained.small("qar").model)
    eos = (free[0][3], free[1][1], free[2][2])
    ends = [next(i for i, token in enumerate(said) if token in eos) for said in free]
    assert max(ends) < NEW - 1 and len(set(ends)) > 1
    drawn_from.clear()
    # Each ends in the id it drew, whichever of them that is.
    assert reply(untrained.small("qar", eos).model) == [said[:end] for said, end in zip(free, ends, strict=True)]
    jax.effects_barrier()
    assert len(drawn_from) == max(ends) + 1


def test_seeds_temperatures_and_nuclei() -> None:
    two = untrained.small("qar").model
    greedy = reply(two)

    def all_by(*how: Any) -> list[list[int]]:
        return reply(two, how=[Sampling(NEW, *how)] * 3)

    drawn = [all_by(1.0, 1.0, seed) for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2] and greedy not in drawn
    for how in ((1.0, 1e-3, 5), (1.0, 0.0, 5), (1e-3, 1.0, 5)):
        assert all_by(*how) == greedy


def test_drawing_does_not_depend_on_the_slot_or_the_others() -> None:
    two = untrained.small("qar").model
    how = [Sampling(NEW, 1.2, 0.95, 7), Sampling(NEW), Sampling(NEW, 0.8, 1.0, 2**32 + 3)]
    alone = [reply(two, [r], [how[r]], slots=1)[0] for r in range(3)]
    for order in ([0, 1, 2], [2, 0, 1], [1, 2, 0]):
        found = reply(two, order, [how[r] for r in order])
        assert found == [alone[r] for r in order]
    # One prompt and one seed: one reply, in every slot.
    assert reply(two, [0] * 4, [how[0]] * 4) == [alone[0]] * 4


@hypothesis.settings(deadline=None, max_examples=60)
@hypothesis.given(
    ranks=st.lists(st.permutations(range(7)), min_size=3, max_size=3),
    gap=st.floats(0.05, 2.0),
    temperature=st.floats(0.2, 3.0),
    top_p=st.lists(st.floats(0.01, 1.0), min_size=3, max_size=3),
    seeds=st.lists(st.integers(0, 2**32 - 1), min_size=3, max_size=3),
)
def test_the_nucleus_is_the_smallest_set_that_reaches_top_p(ranks, gap, temperature, top_p, seeds) -> None:
    logits = np.array(ranks) * gap
    keep = np.zeros(logits.shape, bool)
    for row, kept, share in zip(logits / temperature, keep, top_p, strict=True):
        p = np.exp(row - row.max()) / np.exp(row - row.max()).sum()
        mass = 0.0
        for token in np.argsort(-row):
            # Where rounding decides whether one token more is needed there is nothing to compare.
            hypothesis.assume(mass == 0 or abs(mass - share) > 1e-5)
            if mass >= share:
                break
            kept[token], mass = True, mass + p[token]
    scaled = jnp.where(keep, logits.astype(np.float32) / np.float32(temperature), -jnp.inf)
    numbers = np.array([0, 5, 2])
    # Each row has a key of its own, of its seed and its number.
    keys = [jax.random.fold_in(jax.random.key(np.uint32(s)), n) for s, n in zip(seeds, numbers, strict=True)]
    expect = [int(jax.random.categorical(key, row)) for key, row in zip(keys, scaled, strict=True)]
    assert draw(logits, [temperature] * 3, top_p, seeds, numbers).tolist() == expect
    # A greedy row among others.
    mixed = draw(logits, [temperature, 0.0, temperature], top_p, seeds, numbers).tolist()
    assert mixed == [expect[0], list(ranks[1]).index(6), expect[2]]


def draw(logits: Any, temperature: Any, top_p: Any, seed: Any, number: Any) -> jax.Array:
    real = [jnp.asarray(x, jnp.float32) for x in (logits, temperature, top_p)]
    return _draw(*real, jnp.asarray(np.asarray(seed, np.uint32)), jnp.asarray(number, jnp.int32))


_draw = jax.jit(lambda *arguments: SAMPLE(*arguments))


@hypothesis.settings(deadline=None, max_examples=40)
@hypothesis.given(
    hypothesis.extra.numpy.arrays(np.int8, st.tuples(st.integers(1, 3), st.sampled_from([1, 6, 49, 521, 1024])))
)
def test_the_likeliest_is_the_first_of_the_largest(logits: np.ndarray) -> None:
    np.testing.assert_array_equal(generate.likeliest(jnp.asarray(logits, jnp.float32)), logits.argmax(-1))


def test_frequencies_are_those_of_the_temperature() -> None:
    logits, count = np.array([0.0, 1.0, 2.0, -1.0], np.float32), 4000
    rows = np.tile(logits, (count, 1))
    expect = np.exp(logits / 1.5) / np.exp(logits / 1.5).sum()
    # Over seeds, and over the tokens of one reply.
    for seed, number in ((np.arange(count), np.zeros(count)), (np.zeros(count), np.arange(count))):
        found = draw(rows, [1.5] * count, [1.0] * count, seed, number)
        # Four standard deviations of a share of 4000 draws.
        np.testing.assert_allclose(np.bincount(np.asarray(found), minlength=4) / count, expect, atol=0.032)


def test_pad_and_bucket() -> None:
    inputs = generate.pad(PROMPTS[1:], ROWS[1:], 8)
    tokens = [p.tokens.tolist() for p in PROMPTS[1:]]
    assert inputs.tokens.tolist() == [tokens[0] + [0] * 4, tokens[1] + [0]]
    assert inputs.position.tolist() == [[0, 1, 2, 3] + [0] * 4, [0, 1, 2, 3, 4, 5, 6, 0]]
    assert inputs.segment.tolist() == inputs.attend.astype(int).tolist() == [[1] * 4 + [0] * 4, [1] * 7 + [0]]
    assert inputs.querier.tolist() == [[0], [3]] and inputs.present.all()
    assert [generate.bucket(n) for n in (1, 32, 33, 64, 65)] == [32, 32, 64, 64, 128]
    assert [generate.bucket(n, smallest=1) for n in (1, 2, 3)] == [1, 2, 4]


@pytest.fixture(scope="module")
def published() -> SimpleNamespace:
    """The recorded generation: weights as in `qwen_full`, towers averaged, prompts padded on the left."""
    setting = paper.setting("qwen_full")
    with np.load(paper.FIXTURES / "qwen_full.npz") as archive:
        trainable = paper.tree({k: archive[k] for k in archive if k.startswith("param0/")}, "param0/")
    with np.load(paper.FIXTURES / "qwen_generate.npz") as archive:
        data = dict(archive)
    model = batching.prepare(untrained.bare(setting, qar, {}), trainable)
    return SimpleNamespace(setting=setting, model=model, data=data)


def test_the_published_prompt(published: SimpleNamespace) -> None:
    weights, config, data = published.model.weights, published.setting.model, published.data
    mask = data["in/attention_mask"].astype(bool)
    position = layout.generation_positions(mask)
    np.testing.assert_array_equal(position, data["in/position_ids_prefill"])
    ones = jnp.ones(mask.shape, jnp.int32)
    visible = decoder.causal_mask(ones, jnp.asarray(mask))
    states, _ = jax.jit(lambda *x: inference.prefill(weights, *x, None, config))(
        jnp.asarray(data["in/input_ids"], jnp.int32), jnp.asarray(position), visible
    )
    assert not mask.all()
    hidden = towers.join(weights["tower"], weights, states, config)
    found = inference.logits(weights, hidden.reshape(-1, config.embed)).reshape(*mask.shape, -1)
    close(found, data["out/prefill_logits"])


def test_the_published_generation(published: SimpleNamespace, drawn_from: list[np.ndarray]) -> None:
    steps = json.loads((paper.FIXTURES / "qwen_generate.json").read_text())["max_new_tokens"]
    data, eos = published.data, published.setting.model.eos_ids
    batcher = Batcher(published.model, len(data["in/input_ids"]))
    for ids, mask in zip(data["in/input_ids"], data["in/attention_mask"], strict=True):
        ids = ids[np.argmax(mask) :].astype(np.int32)
        batcher.submit(Encoded(ids, np.ones_like(ids), np.zeros(len(ids), bool)), 0, Sampling(steps))
    found: dict[int, list[int]] = {}
    while batcher.busy:
        for progress in batcher.step():
            found.setdefault(progress.handle, []).extend(progress.tokens)
    jax.effects_barrier()
    sequences = data["out/sequences"][:, -steps:]
    for r, said in found.items():
        assert said == [t for t in sequences[r] if t not in eos]
        # What a slot computes after its end is nobody's.
        spoken = min(len(said) + 1, steps)
        close(np.stack(drawn_from, 1)[r, :spoken], data["out/step_logits"][r, :spoken])
