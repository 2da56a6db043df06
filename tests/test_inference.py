"""Weights arranged for replies compute what the decoder computes, merged or not, token by token or at once."""

from __future__ import annotations

import functools
from typing import Any

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qaperso.methods import Setting, load
from qaperso.methods import base as method
from qaperso.models import decoder, inference, lora, towers
from qaperso.models.decoder import Adapters
from qaperso.types import Inputs

Tree = Any
# Every array that a family may have, and none of them.
SHAPES = {"all": dict(qkv_bias=True, qk_norm=True), "tied": dict(tied=True)}


@functools.cache
def case(name: str, shape: str = "all", **changes: Any) -> tuple[Setting, Tree, Tree]:
    """A run in its middle (nothing is zero): setting, trainable, base."""
    setting = helpers.setting(name, helpers.model(**SHAPES[shape]), qar__contrast="none", **changes)
    trainable, base, _ = helpers.build(setting, load(name))
    return setting, helpers.shaken(trainable, size=0.3), helpers.shaken(base, 2, size=0.3)


def prepared(name: str, setting: Setting, trainable: Tree, base: Tree, inputs: Inputs) -> tuple[Tree, Adapters]:
    """The weights, and the adapters they were made of."""
    adapters = load(name).condition(setting, trainable, inputs)
    params, dtype = trainable.get("base", base), jnp.dtype(setting.config.dtype)
    arrange = jax.jit(lambda b, a, t: inference.prepare(b, a, t, setting.model, dtype))
    return arrange(params, adapters, trainable.get("tower", {})), adapters


def both(name: str, setting: Setting, trainable: Tree, base: Tree, inputs: Inputs) -> tuple[np.ndarray, np.ndarray]:
    """Logits [B, S, V] as the weights for replies give them, and as training computes them."""
    weights, adapters = prepared(name, setting, trainable, base, inputs)

    @jax.jit
    def ours(weights: Tree) -> jax.Array:
        mask = decoder.causal_mask(inputs.segment, inputs.attend)
        x, _ = inference.prefill(weights, inputs.tokens, inputs.position, mask, adapters.rows, setting.model)
        hidden = towers.join(weights["tower"], weights, x, setting.model)
        return inference.logits(weights, hidden.reshape(-1, hidden.shape[2])).reshape(*hidden.shape[:2], -1)

    @jax.jit
    def theirs(trainable: Tree, base: Tree) -> jax.Array:
        params = trainable.get("base", base)
        x = method.states(setting, params, inputs, load(name).condition(setting, trainable, inputs))
        return decoder.logits(params, towers.join(trainable.get("tower", {}), params, x, setting.model), setting.model)

    return np.asarray(ours(weights)), np.asarray(theirs(trainable, base))


@pytest.mark.parametrize(
    ("name", "shape", "split"), [("sft", "tied", 0), ("qar", "all", 0), ("qar", "all", 1), ("sft_rows", "tied", 0)]
)
def test_merged_logits_are_unmerged_logits(name: str, shape: str, split: int) -> None:
    setting, trainable, base = case(name, shape, qar__split_layer=split)
    inputs = helpers.device(helpers.batch(1).inputs)
    ours, theirs = both(name, setting, trainable, base, inputs)
    real = np.asarray(inputs.segment > 0)
    assert np.abs(ours - theirs)[real].max() <= 1e-4
    assert (ours.argmax(-1) == theirs.argmax(-1))[real].all()
    # The adapters matter, or this shows nothing.
    bare, _ = both(name, setting, {**trainable, "lora": jax.tree.map(jnp.zeros_like, trainable["lora"])}, base, inputs)
    assert np.abs(bare - ours)[real].max() > 0.1


@pytest.mark.parametrize("changes", [{}, {"dtype": "bfloat16"}], ids=["merged", "beside"])
def test_accelerators_compute_the_same(changes: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """There activations come first in products, kernels on CPUs alone."""
    setting, trainable, base = case("qar", "all", qar__split_layer=1, **changes)
    inputs = helpers.device(helpers.batch(1).inputs)
    first, _ = both("qar", setting, trainable, base, inputs)
    with monkeypatch.context() as elsewhere:
        elsewhere.setattr(inference, "platform", lambda: "gpu")
        jax.clear_caches()
        ours, _ = both("qar", setting, trainable, base, inputs)
    jax.clear_caches()
    real = np.asarray(inputs.segment > 0)
    assert np.abs(ours - first)[real].max() <= (0.2 if changes else 1e-4) and np.abs(first[real]).max() > 1


@pytest.mark.parametrize("name", ["sft", "qar"])
def test_a_base_that_is_trained_has_nothing_to_merge(name: str) -> None:
    setting, trainable, _ = case(name, "all", trainable="all")
    inputs = helpers.device(helpers.batch(1).inputs)
    ours, theirs = both(name, setting, trainable, {}, inputs)
    assert "lora" not in trainable and np.abs(ours - theirs)[np.asarray(inputs.segment > 0)].max() <= 1e-4


def test_in_bfloat16_adapters_stay_beside_the_kernels() -> None:
    """What training adds is often below 1/256 of a kernel's elements: merged into bfloat16 it is gone."""
    setting, trainable, base = case("sft", "all", dtype="bfloat16")
    narrow = jax.tree.map(lambda x: x.astype(jnp.bfloat16), base)
    small = {"lora": {k: {"a": ab["a"], "b": ab["b"] * 1e-4} for k, ab in trainable["lora"].items()}}
    inputs = helpers.device(helpers.batch(1).inputs)
    scaled = method.condition(setting, small, inputs).lora
    merged = lora.merge(narrow, scaled)
    for parts in inference.FUSED.values():
        for p in parts:
            kept = np.asarray(merged["layers"][p] != narrow["layers"][p])
            assert kept.mean() < 0.1, f"most of what was learned of {p} is lost"
    weights, _ = prepared("sft", setting, small, narrow, inputs)
    for i, layer in enumerate(weights["layers"]):
        for name, parts in inference.FUSED.items():
            expect = jnp.concatenate([narrow["layers"][p][i] for p in parts], -1)
            np.testing.assert_array_equal(layer[name], expect.T)
            delta = [scaled[p]["a"][i] @ scaled[p]["b"][i] for p in parts]
            found = (layer[f"{name}_b"].astype(jnp.float32) @ layer[f"{name}_a"].astype(jnp.float32)).T
            # Two roundings to 8 bits for each product.
            np.testing.assert_allclose(found, jnp.concatenate(delta, -1), atol=0.02 * float(jnp.abs(found).max()))
    # And the whole: as close to float32 as training's own forward pass in bfloat16 is.
    wide = helpers.setting("sft", setting.model, qar__contrast="none")
    exact, _ = both("sft", wide, trainable, jax.tree.map(lambda x: x.astype(jnp.float32), narrow), inputs)
    ours, theirs = both("sft", setting, trainable, narrow, inputs)
    real = np.asarray(inputs.segment > 0)
    error = lambda x: np.linalg.norm((np.asarray(x, np.float32) - exact)[real])  # noqa: E731
    assert ours.dtype == np.float32 and 0 < error(ours) < 1.5 * error(theirs)


@pytest.mark.parametrize(("name", "split"), [("sft", 0), ("qar", 0), ("qar", 1), ("sft_rows", 0)])
def test_token_by_token_is_all_at_once(name: str, split: int) -> None:
    """Rows of three lengths, each at its own place; the cache has room to spare."""
    setting, trainable, base = case(name, "all", qar__split_layer=split)
    inputs = helpers.device(helpers.batch(2, shape=helpers.SINGLE).inputs)
    inputs = jax.tree.map(lambda x: x[:3], inputs)
    lengths = np.asarray((inputs.segment > 0).sum(1))
    assert len(set(lengths.tolist())) > 1
    expect, _ = both(name, setting, trainable, base, inputs)
    weights, adapters = prepared(name, setting, trainable, base, inputs)
    config, room = setting.model, inputs.tokens.shape[1] + 3
    cache = inference.empty_cache(weights, config, 3, room)
    start = np.array([0, 2, 1])

    @jax.jit
    def step(cache: Any, place: jax.Array, at: jax.Array) -> tuple:
        pick = lambda x: jnp.take_along_axis(x, at[:, None], 1)[:, 0]  # noqa: E731
        visible = (jnp.arange(room) >= start[:, None]) & (jnp.arange(room) <= place[:, None])
        rows = None if adapters.rows is None else adapters.rows[jnp.arange(3), at]
        token, position = pick(inputs.tokens), pick(inputs.position)
        return inference.decode(weights, cache, token, position, place, visible, rows, config)

    for t in range(lengths.max()):
        at = jnp.asarray(np.minimum(t, lengths - 1))
        logits, cache = step(cache, at + start, at)
        for r in range(3):
            np.testing.assert_allclose(logits[r], expect[r, at[r]], rtol=1e-4, atol=1e-4)
    k = np.asarray(cache[0][0])
    for r, (first, n) in enumerate(zip(start, lengths, strict=True)):
        written = (k[:, r] != 0).any((0, 1, 2))
        assert written.tolist() == [first <= c < first + n for c in range(room)]


@pytest.mark.parametrize("places", [[4, 0, 2], [3]])
def test_each_row_is_written_at_its_own_place(places: list[int]) -> None:
    n = len(places)
    old = jnp.zeros((2, n, 2, 5, 4))
    new = jnp.arange(2 * n * 2 * 4, dtype=jnp.float32).reshape(2, n, 2, 1, 4) + 1
    turned = lambda x: jnp.swapaxes(x, 3, 4)  # noqa: E731
    k, v = inference.write((turned(old), old - 1), (turned(new), -new), jnp.asarray(places))
    expect = np.zeros((2, n, 2, 5, 4), np.float32)
    for row, place in enumerate(places):
        expect[:, row, :, place] = new[:, row, :, 0]
    np.testing.assert_array_equal(turned(k), expect)
    np.testing.assert_array_equal(v, np.where(expect, -expect, -1))
