"""Low-rank adapters: identity at the start, merging, dropout."""

from __future__ import annotations

import functools

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qaperso.methods import Setting, sft
from qaperso.methods import base as method
from qaperso.models import attention, decoder, lora
from qaperso.types import Inputs

DIM = 16


@functools.partial(jax.jit, static_argnums=0)
def states(run: Setting, trainable: dict, base: dict, inputs: Inputs, key: jax.Array | None = None) -> jax.Array:
    return method.states(run, base, inputs, sft.condition(run, trainable, inputs), key)


def test_starts_as_the_base_and_merging_is_applying() -> None:
    run = helpers.setting("sft", helpers.model(qkv_bias=True))
    trainable, base, _ = helpers.build(run, sft)
    base = helpers.shaken(base)
    inputs = helpers.device(helpers.batch(0).inputs)

    def compute(trainable: dict, base: dict) -> jax.Array:
        return states(run, trainable, base, inputs)

    plain = compute({}, base)
    np.testing.assert_array_equal(compute(trainable, base), plain)

    trained = helpers.shaken(trainable)
    adapted = compute(trained, base)
    # Every one of the seven adapters matters, so that merging all of them is shown.
    for name in lora.TARGETS:
        without = {"lora": trained["lora"] | {name: trainable["lora"][name]}}
        assert jnp.abs(compute(without, base) - adapted).max() > 1e-3, name
    merged = lora.merge(base, lora.scaled(trained["lora"], run.config.lora.alpha, run.config.lora.rank))
    np.testing.assert_allclose(compute({}, merged), adapted, rtol=1e-5, atol=1e-5)
    assert merged["layers"]["attn_norm"] is base["layers"]["attn_norm"]


def test_scale_is_alpha_over_rank() -> None:
    tree = {"q": {"a": jnp.ones((1, DIM, 4)), "b": jnp.full((1, 4, 2), 3.0)}}
    scaled = lora.scaled(tree, 8.0, 4)
    np.testing.assert_array_equal(scaled["q"]["b"], jnp.full((1, 4, 2), 6.0))
    np.testing.assert_array_equal(scaled["q"]["a"], tree["q"]["a"])


def test_merging_sums_in_float32() -> None:
    # In bfloat16, 1 + 2^-9 is 1: a hundred such products must not vanish one by one.
    base = {"layers": {"q": jnp.ones((1, 2, 2), jnp.bfloat16)}}
    tree = {"q": {"a": jnp.full((1, 2, 128), 2.0**-9, jnp.bfloat16), "b": jnp.ones((1, 128, 2), jnp.bfloat16)}}
    merged = lora.merge(base, tree)["layers"]["q"]
    assert merged.dtype == jnp.bfloat16 and (merged == 1.25).all()


def identity() -> dict:
    """One layer's adapters that give back what they are given: the dropout mask shows in the output."""
    return {name: {"a": jnp.eye(DIM), "b": jnp.eye(DIM)} for name in lora.TARGETS}


def adapted(name: str, x: jax.Array, dropout: float = 0.0, key: jax.Array | None = None) -> jax.Array:
    """What the adapter alone gives."""
    return lora.project(identity(), {name: jnp.zeros((DIM, DIM))}, x, dropout, key)[name]


def test_no_adapter_and_no_key() -> None:
    x = jax.random.normal(jax.random.key(0), (3, DIM))
    np.testing.assert_array_equal(lora.project(None, {"q": 2 * jnp.eye(DIM)}, x)["q"], 2 * x)
    np.testing.assert_array_equal(adapted("q", x, 0.5), x)
    np.testing.assert_array_equal(adapted("q", x, 0.0, jax.random.key(1)), x)


def test_kernels_of_one_input_are_projected_as_each_alone() -> None:
    keys = jax.random.split(jax.random.key(0), 8)
    x = jax.random.normal(keys[0], (5, DIM))
    sizes = {"q": 9, "k": 5, "v": 7}
    kernels = {name: jax.random.normal(k, (DIM, o)) for k, (name, o) in zip(keys[1:4], sizes.items(), strict=True)}
    tree = {
        name: {"a": jax.random.normal(k, (DIM, 3)), "b": jax.random.normal(k, (3, sizes[name]))}
        for k, name in zip(keys[4:7], sizes, strict=True)
    }
    for name, y in lora.project(tree, kernels, x).items():
        plain = x @ kernels[name] + x @ tree[name]["a"] @ tree[name]["b"]
        np.testing.assert_allclose(y, plain, rtol=1e-4, atol=1e-4)


def test_dropout_keeps_the_expectation() -> None:
    x = jax.random.uniform(jax.random.key(0), (DIM,), minval=1.0, maxval=2.0)
    keys = jax.random.split(jax.random.key(1), 4000)
    out = jax.vmap(lambda k: adapted("up", x, 0.25, k))(keys)
    # An element is either dropped or scaled up, and a quarter are dropped.
    np.testing.assert_allclose(jnp.where(out == 0, 0, out - x / 0.75), 0, atol=1e-6)
    # The mean of 4,000 draws has a standard error of x * sqrt(0.25 / 0.75 / 4000) < 0.02; 64 elements within 5 of it.
    np.testing.assert_allclose(out.mean(0), x, atol=0.1)
    assert abs(float((out == 0).mean()) - 0.25) < 0.01


@pytest.mark.parametrize("width", [2, 10, DIM])
def test_elements_are_dropped_independently(width: int) -> None:
    """Bytes of one word are for elements a quarter apart, these included; widths that 4 does not divide leave some over."""
    tree = {"q": {"a": jnp.eye(width), "b": jnp.eye(width)}}
    x = jnp.ones((4096, width))
    out = lora.project(tree, {"q": jnp.zeros((width, width))}, x, 0.25, jax.random.key(2))["q"]
    kept = np.asarray(out) != 0
    # Standard errors are sqrt(3 / 16 / 4096) = 0.0068 of a rate and 1 / sqrt(4096) = 0.016 of a correlation.
    np.testing.assert_allclose(kept.mean(0), 0.75, atol=0.03)
    np.testing.assert_allclose(np.corrcoef(kept.T), np.eye(width), atol=0.08)


def test_dropout_differs_between_inputs_and_keys() -> None:
    x, key = jnp.ones((8, DIM)), jax.random.key(5)
    first = ("q", "o", "gate", "down")  # of the four inputs of a layer
    masks = {name: np.asarray(adapted(name, x, 0.5, key)) for name in first}
    for i, name in enumerate(first):
        np.testing.assert_array_equal(masks[name], adapted(name, x, 0.5, key))
        assert all((masks[name] != masks[other]).any() for other in first[:i])
    assert (masks["q"] != adapted("q", x, 0.5, jax.random.key(6))).any()


def test_a_key_switches_dropout_on_in_the_decoder() -> None:
    run = helpers.setting("sft", lora__dropout=0.5)
    trainable, base, _ = helpers.build(run, sft)
    trained, inputs = helpers.shaken(trainable), helpers.device(helpers.batch(0).inputs)

    def compute(key: jax.Array) -> jax.Array:
        return states(run, trained, base, inputs, key)

    evaluated = states(run, trained, base, inputs)
    again, other = compute(jax.random.key(0)), compute(jax.random.key(1))
    np.testing.assert_array_equal(again, compute(jax.random.key(0)))
    assert jnp.abs(again - other).max() > 1e-3 and jnp.abs(again - evaluated).max() > 1e-3
    off = helpers.setting("sft")
    np.testing.assert_array_equal(states(off, trained, base, inputs, jax.random.key(0)), evaluated)


def test_layers_drop_different_elements(monkeypatch: pytest.MonkeyPatch) -> None:
    config, seen = helpers.model(), []

    real = lora.project

    def spy(tree: dict | None, kernels: dict, x: jax.Array, dropout: float, key: jax.Array) -> dict:
        jax.debug.callback(lambda k: seen.append(tuple(np.ravel(k))), jax.random.key_data(key))
        return real(tree, kernels, x, dropout, key)

    monkeypatch.setattr(lora, "project", spy)
    base = helpers.build(helpers.setting("sft", config), sft)[1]
    inputs = helpers.device(helpers.batch(0).inputs)
    x = decoder.embed(base, inputs.tokens, jnp.float32)
    within = attention.segments(inputs.segment, inputs.attend)
    jax.block_until_ready(decoder.run(base, x, inputs.position, within, config, dropout=0.5, key=jax.random.key(0)))
    jax.effects_barrier()
    # The four inputs of a layer share its key (and fold their own number in); no two layers share one.
    assert len(seen) == 4 * config.layers and len(set(seen)) == config.layers
