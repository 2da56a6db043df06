"""Generation: cached decoding is the full forward pass, and drawing is what it says."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import helpers
import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import paper
import pytest

from qaperso import generate
from qaperso.data import paper as layout
from qaperso.data.batches import Shape, make_batch
from qaperso.data.text import Encoded
from qaperso.generate import Request
from qaperso.methods import base as base_method
from qaperso.methods import qar, sft
from qaperso.models import decoder, towers
from qaperso.types import Example, Inputs

NEW = 6
LENGTHS, ROWS = (9, 4, 7), (1, 0, 3)


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
        clear()
        yield seen
    clear()


def clear() -> None:
    generate.begin.clear_cache()
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


def case(name: str) -> SimpleNamespace:
    """A model with nothing at its neutral start: alpha, rows and LoRA are not zero. It has no end-of-turn."""
    method = {"sft": sft, "qar": qar}[name]
    setting = helpers.setting(name, helpers.model(eos_ids=()), qar__contrast="none")
    trainable, base, _ = helpers.build(setting, method)
    trainable, base = helpers.shaken(trainable, size=0.3), helpers.shaken(base, 2, size=0.3)
    return SimpleNamespace(setting=setting, method=method, trainable=trainable, base=base, config=setting.model)


@pytest.fixture(scope="module")
def two() -> SimpleNamespace:
    """Two towers."""
    return case("qar")


def prompts() -> list[Encoded]:
    rng = np.random.default_rng(0)
    made = []
    for n in LENGTHS:
        made.append(
            Encoded(rng.integers(2, helpers.VOCAB, n).astype(np.int32), np.ones(n, np.int32), np.zeros(n, bool))
        )
    return made


def ask(m: SimpleNamespace, which: slice = slice(None), length: int = 12, **how: Any) -> Request:
    inputs = helpers.device(generate.left_pad(prompts()[which], ROWS[which], length))
    return Request(inputs, m.method.condition(m.setting, m.trainable, inputs), **how)


def reply(m: SimpleNamespace, request: Request, eos: tuple[int, ...] = ()) -> list[list[int]]:
    config = m.config if not eos else helpers.model(eos_ids=eos)
    kept = dict(config=config, new_tokens=NEW, dtype=jnp.float32)
    return generate.generate(m.trainable, m.base, request, **kept)


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


@pytest.mark.parametrize("name", ["sft", "qar"])
def test_every_cached_step_is_the_full_pass(name: str, drawn_from: list[np.ndarray]) -> None:
    m = case(name)
    found = reply(m, ask(m))
    jax.effects_barrier()
    assert len(drawn_from) == NEW and [len(said) for said in found] == [NEW] * len(LENGTHS)
    whole = [[*prompt.tokens.tolist(), *said[:-1]] for prompt, said in zip(prompts(), found, strict=True)]
    for r, expect in enumerate(full_logits(m, whole, ROWS)):
        close(np.stack(drawn_from)[:, r], expect[-NEW:])
        assert np.argmax(expect[-NEW:], -1).tolist() == found[r]
    if name == "qar":
        # Rows matter, or the comparison above shows less than it says.
        others = full_logits(m, whole, ROWS[::-1])
        assert np.abs(others[0][-NEW:] - np.stack(drawn_from)[:, 0]).max() > 0.1


def test_a_batch_gives_what_each_gives_alone(two: SimpleNamespace) -> None:
    together = reply(two, ask(two))
    assert len({tuple(said) for said in together}) == len(LENGTHS)
    for r in range(len(LENGTHS)):
        # The longest one has no padding now, the others less than before.
        assert reply(two, ask(two, slice(r, r + 1), max(LENGTHS))) == [together[r]]


def test_one_token_at_a_time_is_all_at_once(two: SimpleNamespace) -> None:
    fixed = dict(config=two.config, dtype=jnp.float32)
    request = ask(two, temperature=1.0, top_p=0.9, seed=3)
    state = generate.begin(two.trainable, two.base, request, new_tokens=NEW, **fixed)
    for until in range(1, NEW + 1):
        state = generate.advance(two.trainable, two.base, request, state, until, **fixed)
        assert int(state.number) == until
    assert np.asarray(state.out).tolist() == reply(two, request)


def test_it_stops_where_every_row_has_ended(two: SimpleNamespace) -> None:
    free = reply(two, ask(two))
    eos = (free[0][3], free[1][1], free[2][2])
    ends = [next(i for i, token in enumerate(said) if token in eos) for said in free]
    assert max(ends) < NEW - 1 and len(set(ends)) > 1
    config = helpers.model(eos_ids=eos)
    fixed = dict(config=config, dtype=jnp.float32)
    request = ask(two)
    state = generate.begin(two.trainable, two.base, request, new_tokens=NEW, **fixed)
    state = generate.advance(two.trainable, two.base, request, state, NEW, **fixed)
    assert int(state.number) == max(ends) + 1 and np.asarray(state.done).all()
    for said, end, out in zip(free, ends, np.asarray(state.out), strict=True):
        # Each row ends in the id it drew, whichever of them that is, and holds the first one from there on.
        assert out.tolist() == said[: end + 1] + [eos[0]] * (NEW - end - 1)
    assert reply(two, request, eos) == [said[:end] for said, end in zip(free, ends, strict=True)]


def test_seeds_temperatures_and_nuclei(two: SimpleNamespace) -> None:
    greedy = reply(two, ask(two))
    drawn = [reply(two, ask(two, temperature=1.0, seed=seed)) for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert greedy not in drawn
    for how in ({"temperature": 1.0, "top_p": 1e-3}, {"temperature": 1.0, "top_p": 0.0}, {"temperature": 1e-3}):
        assert reply(two, ask(two, **how, seed=5)) == greedy


def test_only_shapes_compile_anew(two: SimpleNamespace) -> None:
    reply(two, ask(two))
    compiled = generate.begin._cache_size(), generate.advance._cache_size()
    fixed = dict(config=two.config, dtype=jnp.float32)
    for temperature, top_p, seed in ((0.0, 1.0, 0), (1.3, 0.8, 1), (0.7, 0.2, 2**31 - 1)):
        request = ask(two, temperature=temperature, top_p=top_p, seed=seed)
        state = generate.begin(two.trainable, two.base, request, new_tokens=NEW, **fixed)
        for until in (2, NEW):
            state = generate.advance(two.trainable, two.base, request, state, until, **fixed)
    assert (generate.begin._cache_size(), generate.advance._cache_size()) == compiled


@hypothesis.settings(deadline=None, max_examples=60)
@hypothesis.given(
    ranks=st.lists(st.permutations(range(7)), min_size=3, max_size=3),
    gap=st.floats(0.05, 2.0),
    temperature=st.floats(0.2, 3.0),
    top_p=st.floats(0.01, 1.0),
    seed=st.integers(0, 100),
)
def test_the_nucleus_is_the_smallest_set_that_reaches_top_p(ranks, gap, temperature, top_p, seed) -> None:
    logits = np.array(ranks) * gap
    keep = np.zeros(logits.shape, bool)
    for row, kept in zip(logits / temperature, keep, strict=True):
        p = np.exp(row - row.max()) / np.exp(row - row.max()).sum()
        mass = 0.0
        for token in np.argsort(-row):
            # Where rounding decides whether one token more is needed there is nothing to compare.
            hypothesis.assume(mass == 0 or abs(mass - top_p) > 1e-5)
            if mass >= top_p:
                break
            kept[token], mass = True, mass + p[token]
    scaled = logits.astype(np.float32) / np.float32(temperature)
    key = jax.random.key(seed)
    expect = jax.random.categorical(key, jnp.where(keep, scaled, -jnp.inf), -1)
    found = draw(jnp.asarray(logits, jnp.float32), jnp.float32(temperature), jnp.float32(top_p), key)
    assert found.tolist() == expect.tolist()
    assert draw(jnp.asarray(logits, jnp.float32), jnp.float32(0), jnp.float32(top_p), key).tolist() == [
        row.index(6) for row in map(list, ranks)
    ]


draw = jax.jit(lambda *arguments: SAMPLE(*arguments))


def test_frequencies_are_those_of_the_temperature() -> None:
    logits, count = np.array([0.0, 1.0, 2.0, -1.0], np.float32), 4000
    found = draw(jnp.tile(logits, (count, 1)), jnp.float32(1.5), jnp.float32(1.0), jax.random.key(0))
    expect = np.exp(logits / 1.5) / np.exp(logits / 1.5).sum()
    # Four standard deviations of a share of 4000 draws.
    np.testing.assert_allclose(np.bincount(np.asarray(found), minlength=4) / count, expect, atol=0.032)


def test_left_pad_and_bucket() -> None:
    inputs = generate.left_pad(prompts()[1:], ROWS[1:], 8)
    tokens = [p.tokens.tolist() for p in prompts()[1:]]
    assert inputs.tokens.tolist() == [[0] * 4 + tokens[0], [0] + tokens[1]]
    assert inputs.position.tolist() == [[0] * 4 + [0, 1, 2, 3], [0, 0, 1, 2, 3, 4, 5, 6]]
    assert inputs.segment.tolist() == inputs.attend.astype(int).tolist() == [[0] * 4 + [1] * 4, [0] + [1] * 7]
    assert inputs.querier.tolist() == [[0], [3]] and inputs.present.all()
    assert [generate.bucket(n) for n in (1, 32, 33, 64, 65)] == [32, 32, 64, 64, 128]
    assert generate.bucket(3, smallest=2) == 4


@pytest.fixture(scope="module")
def published() -> SimpleNamespace:
    """The recorded generation: weights as in `qwen_full`, towers averaged, prompts padded on the left."""
    setting = paper.setting("qwen_full")
    with np.load(paper.FIXTURES / "qwen_full.npz") as archive:
        trainable = paper.tree({k: archive[k] for k in archive if k.startswith("param0/")}, "param0/")
    with np.load(paper.FIXTURES / "qwen_generate.npz") as archive:
        data = dict(archive)
    mask = data["in/attention_mask"]
    position = layout.generation_positions(mask)
    np.testing.assert_array_equal(position, data["in/position_ids_prefill"])
    inputs = paper.inputs(data["in/input_ids"], mask, data["in/role_pos_ids"], data["in/cluster_ids"], position)
    request = Request(inputs, qar.condition(setting, trainable, inputs))
    return SimpleNamespace(setting=setting, trainable=trainable, data=data, request=request)


def test_the_published_prompt(published: SimpleNamespace) -> None:
    base, config = published.trainable["base"], published.setting.model
    states, _ = jax.jit(lambda r: generate.prefill(base, r, config, 0, jnp.float32))(published.request)
    hidden = towers.join(published.trainable["tower"], base, states, config)
    assert not published.data["in/attention_mask"].all()
    close(decoder.logits(base, hidden, config), published.data["out/prefill_logits"])


def test_the_published_generation(published: SimpleNamespace, drawn_from: list[np.ndarray]) -> None:
    steps = json.loads((paper.FIXTURES / "qwen_generate.json").read_text())["max_new_tokens"]
    fixed = dict(config=published.setting.model, dtype=jnp.float32)
    given = published.trainable, published.trainable["base"], published.request
    state = generate.begin(*given, new_tokens=steps, **fixed)
    state = generate.advance(*given, state, steps, **fixed)
    jax.effects_barrier()
    np.testing.assert_array_equal(state.out, published.data["out/sequences"][:, -steps:])
    close(np.stack(drawn_from, 1), published.data["out/step_logits"][:, : int(state.number)])
