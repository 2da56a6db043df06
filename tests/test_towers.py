"""The dual tower: identity at the start, querier rows, pooling and heads."""

from __future__ import annotations

import functools

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qaperso import arrays
from qaperso.errors import UserError
from qaperso.methods import Setting, load, qar, sft
from qaperso.methods import base as method
from qaperso.models import decoder, towers
from qaperso.types import RESPONDER, STRANGER, Inputs


@functools.cache
def start(compat: str = "") -> tuple[Setting, dict, dict]:
    """(setting, trainable, base) of a run before its first step."""
    run = helpers.setting("qar", compat=compat)
    trainable, _ = qar.declare(run)
    _, base, _ = helpers.build(run, qar)
    return run, jax.jit(lambda key: arrays.initialise(trainable, key))(jax.random.key(0)), base


@functools.cache
def middle() -> tuple[Setting, dict, dict]:
    """The same run later: nothing is zero."""
    run, trainable, base = start()
    return run, helpers.shaken(trainable), base


@functools.partial(jax.jit, static_argnums=0)
def logits(run: Setting, trainable: dict, base: dict, inputs: Inputs) -> jax.Array:
    hidden = method.states(run, base, inputs, qar.condition(run, trainable, inputs))
    return decoder.logits(base, towers.join(trainable["tower"], base, hidden, run.model), run.model)


def base_logits(base: dict, inputs: Inputs) -> jax.Array:
    run = helpers.setting("sft")

    @jax.jit
    def compute(base: dict) -> jax.Array:
        hidden = method.states(run, base, inputs, sft.condition(run, {}, inputs))
        assert hidden.shape[0] == 1
        return decoder.logits(base, towers.join({}, base, hidden, run.model), run.model)

    return compute(base)


def test_training_starts_from_the_base_for_every_querier() -> None:
    run, trainable, base = start()
    inputs = helpers.device(helpers.batch(0, stranger=None).inputs)
    plain = base_logits(base, inputs)
    assert jnp.abs(plain).max() > 0.5
    for querier in range(run.queriers):
        asked = inputs.replace(querier=jnp.full_like(inputs.querier, querier))
        np.testing.assert_allclose(logits(run, trainable, base, asked), plain, rtol=0, atol=1e-5)
    np.testing.assert_allclose(logits(run, trainable, base, inputs), plain, rtol=0, atol=1e-5)
    # The specific stream is there all the same: with alpha it would show.
    opened = trainable | {"tower": trainable["tower"] | {"alpha": jnp.ones(16)}}
    assert jnp.abs(logits(run, opened, base, inputs) - plain).max() > 1e-2


def test_paper_mode_starts_elsewhere() -> None:
    run, trainable, base = start("paper")
    assert "alpha" not in trainable["tower"] and "rows" not in trainable["tower"]
    inputs = helpers.device(helpers.batch(0).inputs)
    assert jnp.abs(logits(run, trainable, base, inputs) - base_logits(base, inputs)).max() > 1e-2


def test_join_by_hand() -> None:
    config = helpers.model(embed=2, norm_eps=1e-12)
    states = jnp.asarray([[[[3.0, 3.0]]], [[[2.0, -2.0]]]])
    base, norm_s = {"norm": jnp.asarray([1.0, 2.0])}, jnp.asarray([1.0, 3.0])
    mean = towers.join({"norm_s": norm_s}, base, states, config)
    np.testing.assert_allclose(mean, [[[1.0, -0.5]]], rtol=1e-6)
    gated = towers.join({"norm_s": norm_s, "alpha": jnp.asarray([0.5, 0.0])}, base, states, config)
    np.testing.assert_allclose(gated, [[[1.5, 2.0]]], rtol=1e-6)
    np.testing.assert_allclose(towers.join({}, base, states[:1], config), [[[1.0, 2.0]]], rtol=1e-6)


def test_the_querier_changes_its_own_dialogue_only() -> None:
    run, trainable, base = middle()
    inputs = helpers.device(helpers.batch(1, stranger=None).inputs)
    before = logits(run, trainable, base, inputs)
    row, number = 3, 1
    other = (inputs.querier[row, number] + 1) % run.queriers
    after = logits(run, trainable, base, inputs.replace(querier=inputs.querier.at[row, number].set(other)))
    # Padding sees no key and gets a mean over the row, which nobody reads.
    moved = (before != after).any(-1) & (inputs.segment > 0)
    own = jnp.zeros_like(moved).at[row].set(inputs.segment[row] == number + 1)
    np.testing.assert_array_equal(moved, own)
    assert jnp.abs(before - after)[own].max() > 1e-3


def test_without_alpha_the_querier_changes_nothing_yet() -> None:
    run, trainable, base = middle()
    silent = trainable | {"tower": trainable["tower"] | {"alpha": jnp.zeros_like(trainable["tower"]["alpha"])}}
    inputs = helpers.device(helpers.batch(1, stranger=None).inputs)
    asked = inputs.replace(querier=jnp.zeros_like(inputs.querier))
    np.testing.assert_array_equal(logits(run, silent, base, asked), logits(run, silent, base, inputs))


def test_spread_and_rows_by_hand() -> None:
    segment = jnp.asarray([[1, 1, 2, 0], [3, 0, 0, 1]])
    np.testing.assert_array_equal(
        towers.spread(jnp.asarray([[5, 6, 7], [8, 9, 10]]), segment), [[5, 5, 6, 0], [10, 0, 0, 8]]
    )
    vectors = jnp.asarray([[[1.0, 2.0], [3.0, 4.0]]])
    np.testing.assert_array_equal(towers.spread(vectors, jnp.asarray([[2, 0, 1]])), [[[3, 4], [0, 0], [1, 2]]])
    inputs = helpers.device(helpers.batch(0).inputs)
    rows = jnp.arange(4.0)[:, None] * jnp.ones((4, 16))
    given = towers.querier_rows(rows, inputs)[..., 0]
    for r in range(2):
        for s in range(32):
            m = int(inputs.segment[r, s])
            assert given[r, s] == (inputs.querier[r, m - 1] if m else STRANGER)


def test_pool_is_the_mean_over_the_responders_tokens() -> None:
    inputs = helpers.device(helpers.batch(2).inputs)
    norm = 1 + 0.1 * jnp.arange(16.0)
    state = jnp.asarray(np.random.default_rng(0).normal(size=(8, 32, 16)), jnp.float32)
    pooled, count = jax.jit(towers.pool, static_argnums=3)(norm, state, inputs, 1e-6)
    x = np.asarray(state, np.float64)
    normed = x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-6) * np.asarray(norm)
    for r in range(8):
        for m in range(3):
            mine = np.asarray((inputs.segment[r] == m + 1) & (inputs.role[r] == RESPONDER))
            assert count[r, m] == mine.sum() > 0
            np.testing.assert_allclose(pooled[r, m], normed[r, mine].mean(0), rtol=1e-5, atol=1e-5)


def test_a_dialogue_without_responder_tokens_pools_to_zero() -> None:
    run, trainable, base = middle()
    batch = helpers.device(helpers.batch(3, "in_batch", stranger=1.0))
    gone = (batch.inputs.segment == 2) & (jnp.arange(8) == 0)[:, None]
    batch = batch.replace(inputs=batch.inputs.replace(role=jnp.where(gone, 2, batch.inputs.role)))

    def total(trainable: dict) -> tuple[jax.Array, tuple]:
        hidden = method.states(run, base, batch.inputs, qar.condition(run, trainable, batch.inputs))
        sums, update = qar.loss(run, trainable, base, batch, {}, None)
        sums |= qar.joint(run)(*jax.tree.map(lambda x: x[None], (update, batch)))
        return sums["lm"] + sums["contrast"], qar.embeddings(run, trainable, batch.inputs, hidden)

    # With biases of zero its views are zero vectors too, whose direction has no gradient; it is an anchor all the same.
    bare = trainable | {"heads": trainable["heads"] | {"bias": jnp.zeros_like(trainable["heads"]["bias"])}}
    gradient, (pooled, count) = jax.jit(jax.grad(total, has_aux=True))(bare)
    assert count[0, 1] == 0 and (pooled[0, 1] == 0).all()
    assert int((count == 0).sum()) == 1 and jnp.isfinite(pooled).all()
    for name, g in arrays.flat(gradient).items():
        assert jnp.isfinite(g).all() and (g != 0).any(), name


@pytest.mark.parametrize("clusters", [1, 4])
def test_views_are_those_of_each_dialogues_own_cluster(clusters: int) -> None:
    heads = helpers.shaken(helpers.drawn(towers.declare_heads(helpers.model(), clusters, 8), 0))
    rng = np.random.default_rng(1)
    pooled = jnp.asarray(rng.normal(size=(3, 5, 16)), jnp.float32)
    cluster = jnp.asarray(rng.integers(0, clusters, (3, 5)), jnp.int32)
    both = np.asarray(jax.jit(towers.views)(heads, pooled, cluster))
    pooled, cluster, heads = jax.tree.map(np.asarray, (pooled, cluster, heads))
    for v in (0, 1):
        for b in range(3):
            for m in range(5):
                c = int(cluster[b, m])
                expected = pooled[b, m] @ heads["kernel"][v, c] + heads["bias"][v, c]
                np.testing.assert_allclose(both[v][b, m], expected, rtol=1e-5, atol=1e-5)
    assert (both[0] != both[1]).all()


def test_declared_shapes() -> None:
    config = helpers.model()
    shapes = jax.tree.map(
        lambda s: s.shape, arrays.abstract(towers.declare(config, layers=2, rank=3, queriers=5, gated=True))
    )
    specific = {"gate": (2, 16, 3), "up": (2, 16, 3), "down": (2, 3, 16)}
    assert shapes == {"specific": specific, "norm_s": (16,), "alpha": (16,), "rows": (5, 16)}
    assert set(towers.declare(config, layers=2, rank=3, queriers=0, gated=False)) == {"specific", "norm_s"}


def test_some_layer_must_have_two_towers() -> None:
    with pytest.raises(UserError, match=r"config\.qar\.split_layer=2 leaves no layer .* at most 1"):
        helpers.build(helpers.setting("qar", qar__split_layer=2), load("qar"))
