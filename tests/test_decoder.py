"""The decoder: packing, causality, caching, rematerialisation and rotary scaling give the numbers they should."""

from __future__ import annotations

import functools

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qaperso.data.batches import make_batch
from qaperso.methods import Setting, load
from qaperso.methods import base as method
from qaperso.models import attention, decoder, towers
from qaperso.models.config import FAMILIES, RopeScaling
from qaperso.models.linear import working
from qaperso.types import Batch, Inputs


@functools.cache
def running(name: str) -> tuple[Setting, dict, dict]:
    """A run in its middle (nothing is zero): setting, trainable, base."""
    run = helpers.setting(name, helpers.model(qkv_bias=True, qk_norm=True))
    trainable, base, _ = helpers.build(run, load(name))
    return run, helpers.shaken(trainable), helpers.shaken(base)


@functools.partial(jax.jit, static_argnums=0)
def compute(name: str, trainable: dict, base: dict, inputs: Inputs) -> jax.Array:
    run, _, _ = running(name)
    return method.states(run, base, inputs, load(name).condition(run, trainable, inputs))


def states(name: str, inputs: Inputs) -> jax.Array:
    """Last layer's states [towers, B, S, D] of the run."""
    return compute(name, *running(name)[1:], inputs)


def per_dialogue(name: str, batch: Batch) -> tuple[jax.Array, jax.Array]:
    """Sums of losses and counts of tokens [B, M]."""
    run, trainable, base = running(name)
    hidden = states(name, batch.inputs)
    score = jax.jit(lambda t, b, x, h: method.dialogue_losses(x, method.token_losses(run, t, b, x, h)))
    return score(trainable, base, batch, hidden)


@pytest.mark.parametrize("name", ["sft", "qar"])
def test_packed_rows_are_padded_rows(name: str) -> None:
    dialogues = helpers.examples(0)
    flags = [i % 3 == 0 for i in range(len(dialogues))]
    packed, single = (
        helpers.device(make_batch(helpers.rows_of(dialogues, s.dialogues), s, helpers.rows_of(flags, s.dialogues)))
        for s in (helpers.SHAPE, helpers.SINGLE)
    )
    together, apart = states(name, packed.inputs), states(name, single.inputs)
    assert together.shape[0] == (2 if name == "qar" else 1)
    for i, e in enumerate(dialogues):
        row, number = divmod(i, helpers.SHAPE.dialogues)
        inside = np.asarray(packed.inputs.segment[row] == number + 1)
        np.testing.assert_allclose(together[:, row][:, inside], apart[:, i, : len(e)], rtol=1e-5, atol=1e-5)

    sums, counts = per_dialogue(name, packed)
    own_sums, own_counts = per_dialogue(name, single)
    np.testing.assert_allclose(sums.reshape(-1), own_sums[:, 0], rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(counts.reshape(-1), own_counts[:, 0])
    np.testing.assert_array_equal(counts.reshape(-1), [e.predicted.sum() for e in dialogues])


@pytest.mark.parametrize("name", ["sft", "qar"])
def test_a_later_token_never_changes_an_earlier_output(name: str) -> None:
    inputs = helpers.device(helpers.batch(1).inputs)
    row, place = 2, 14
    assert inputs.segment[row, place] == inputs.segment[row, place + 1] > 1, "inside the second dialogue"
    before = np.asarray(states(name, inputs))
    changed = inputs.tokens.at[row, place].set((inputs.tokens[row, place] + 1) % helpers.VOCAB)
    after = np.asarray(states(name, inputs.replace(tokens=changed)))
    # Padding sees no key and gets a mean over the row, which nobody reads.
    same = (before == after).all((0, 3)) | np.asarray(inputs.segment == 0)
    later = (inputs.segment[row] == inputs.segment[row, place]) & (np.arange(same.shape[1]) >= place)
    np.testing.assert_array_equal(~same[row], later)
    assert same[np.arange(len(same)) != row].all()


def test_masked_keys_are_not_read() -> None:
    inputs = helpers.device(helpers.batch(1).inputs)
    hidden = inputs.replace(attend=inputs.attend.at[0, 2].set(False))
    moved = hidden.replace(tokens=hidden.tokens.at[0, 2].add(1) % helpers.VOCAB)
    a, b = states("sft", hidden), states("sft", moved)
    differs = (a != b).any((0, 3)) & (inputs.segment > 0)
    assert differs[0, 2] and int(differs.sum()) == 1
    assert (states("sft", inputs) != a).any()


def test_left_padding_changes_nothing() -> None:
    e, pad = helpers.examples(2, 1)[0], 5
    plain = helpers.device(make_batch([[e]], helpers.Shape(1, len(e), 8, 1)).inputs)

    def padded(x: jax.Array) -> jax.Array:
        return jnp.pad(x, ((0, 0), (pad, 0))) if x.shape[1] == len(e) else x

    shifted = jax.tree.map(padded, plain)
    assert not shifted.attend[:, :pad].any() and not shifted.segment[:, :pad].any()
    ours = states("qar", shifted)
    np.testing.assert_allclose(ours[:, :, pad:], states("qar", plain), rtol=1e-5, atol=1e-5)
    assert jnp.isfinite(ours).all(), "a query without keys is finite"


def test_mask_by_hand() -> None:
    segment, attend = jnp.asarray([[1, 1, 2, 2, 0]]), jnp.asarray([[True, True, True, False, False]])
    expected = [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [0, 0, 1, 0, 0], [0, 0, 1, 0, 0], [0, 0, 0, 0, 0]]
    np.testing.assert_array_equal(decoder.causal_mask(segment, attend)[0], np.array(expected, bool))


@pytest.fixture(scope="module")
def gradients() -> dict[str, dict]:
    """Gradients of the loss of QAR, everything trained, by what the backward pass recomputes."""
    found = {}
    for remat in decoder.REMAT:
        run = helpers.setting("qar", trainable="all", remat=remat, qar__contrast="none")
        qar = load("qar")
        params = helpers.shaken(helpers.build(run, qar)[0])
        batch = helpers.device(helpers.batch(3))

        def total(params: dict, run: Setting = run, batch: Batch = batch) -> jax.Array:
            sums, _ = load("qar").loss(run, params, params["base"], batch, {}, None)
            return sums["lm"] / 100

        found[remat] = jax.jit(jax.grad(total))(params)
    return found


def test_rematerialisation_does_not_change_gradients(gradients: dict[str, dict]) -> None:
    helpers.assert_trees_close(gradients["dots"], gradients["full"], atol=1e-6, rtol=1e-5)
    assert all((g != 0).any() for g in jax.tree.leaves(gradients["full"]))


@pytest.mark.parametrize("split", [0, 1])
def test_the_scan_is_layer_by_layer(split: int) -> None:
    """Below `split_layer` there is one stream; above it two, which begin equal but for the querier's row."""
    run = helpers.setting("qar", qar__split_layer=split)
    trainable, base, _ = helpers.build(run, load("qar"))
    trainable = helpers.shaken(trainable)
    inputs = helpers.device(helpers.batch(4).inputs)
    adapters = load("qar").condition(run, trainable, inputs)
    assert decoder.split_of(adapters, run.model) == split
    x = decoder.embed(base, inputs.tokens, jnp.float32)
    seen = attention.segments(inputs.segment, inputs.attend)
    tables = decoder.rope_tables(inputs.position, run.model)
    one = jax.jit(lambda x, w, own: decoder.layer(x, w, own, tables, seen, run.model))
    for i in range(run.model.layers):
        x = decoder.part(x, adapters.rows) if i == split else x
        weights, narrow = jax.tree.map(lambda w, i=i: w[i], (base["layers"], adapters.lora))
        specific = jax.tree.map(lambda w, i=i: w[i - split], adapters.specific) if i >= split else None
        x = one(x, weights, decoder.Adapters(narrow, specific))
    assert jnp.abs(x[0] - x[1]).max() > 1e-3
    np.testing.assert_allclose(x, method.states(run, base, inputs, adapters), rtol=1e-5, atol=1e-5)


def test_layers_of_a_frozen_base_are_looked_up_where_they_lie() -> None:
    """Part of a stack would be a copy of it: with `split_layer` a second base in memory."""
    run = helpers.setting("qar", qar__split_layer=1)
    trainable, base, _ = helpers.build(run, load("qar"))
    inputs = helpers.device(helpers.batch(4).inputs)
    step = jax.grad(lambda t: method.states(run, base, inputs, load("qar").condition(run, t, inputs)).sum())
    lines = jax.jit(step).lower(trainable).as_text().splitlines()
    cut = {line.rpartition("->")[2].strip() for line in lines if "stablehlo.slice" in line}
    stacks = {name: x.shape for name, x in base["layers"].items() if x.ndim == 3}
    assert run.model.layers == 2 and len(stacks) == 7 and cut
    for name, (_, i, o) in stacks.items():
        assert f"tensor<1x{i}x{o}xf32>" not in cut, name


def test_llama3_rotary_scaling_by_hand() -> None:
    """theta = 500000, head_dim = 8: frequencies theta^(-i/4) = 1, 0.0376060, 0.00141421, 0.0000531830.

    Wavelengths 2 pi / f are 6.28, 167.1, 4442.9 and 118142.6. With factor 8, low 1, high 4 and original length 8192
    those below 8192 / 4 = 2048 stay, those above 8192 / 1 are divided by 8, and between them
    smooth = (8192 / 4442.88 - 1) / (4 - 1) = 0.281282, so that f becomes 0.718718 f / 8 + 0.281282 f = 0.371122 f.
    """
    scaling = RopeScaling(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position=8192)
    config = helpers.model(rope_theta=500000.0, rope_scaling=scaling)
    expected = [1.0, 0.0376060, 0.00141421 * 0.371122, 0.0000531830 / 8]
    np.testing.assert_allclose(decoder.rope_frequencies(config), expected, rtol=5e-6)
    plain = decoder.rope_frequencies(helpers.model(rope_theta=500000.0))
    np.testing.assert_allclose(plain, [1.0, 0.0376060, 0.00141421, 0.0000531830], rtol=5e-6)


def test_rotation_by_hand() -> None:
    # A quarter turn takes (first, second) to (-second, first); the pairs are (0, 2) and (1, 3).
    x = jnp.asarray([1.0, 2.0, 3.0, 4.0]).reshape(1, 1, 1, 1, 4)
    angle = jnp.asarray([[[np.pi / 2, 0.0]]])
    turned = decoder.rope(x, jnp.stack([jnp.cos(angle), jnp.sin(angle)]))
    np.testing.assert_allclose(turned.reshape(-1), [-3, 2, 1, 4], atol=1e-6)


def test_attention_depends_on_distances_only() -> None:
    inputs = helpers.device(helpers.batch(5).inputs)
    moved = inputs.replace(position=inputs.position + 7)
    np.testing.assert_allclose(states("qar", moved), states("qar", inputs), rtol=1e-4, atol=1e-4)
    stretched = inputs.replace(position=inputs.position * 2)
    assert jnp.abs(states("qar", stretched) - states("qar", inputs)).max() > 1e-2


def test_bfloat16_is_close_to_float32() -> None:
    # bfloat16 has 8 bits of mantissa: 2^-8 = 0.4% a rounding, a few dozen roundings in two layers.
    run, trainable, base = running("qar")
    half = helpers.setting("qar", run.model, dtype="bfloat16")
    inputs = helpers.device(helpers.batch(6).inputs)

    @jax.jit
    def narrow(trainable: dict, base: dict) -> tuple[jax.Array, jax.Array]:
        hidden = method.states(half, base, inputs, load("qar").condition(half, trainable, inputs))
        joined = towers.join(trainable["tower"], base, hidden, run.model)
        return hidden, decoder.logits(base, joined, run.model)

    ours, scores = narrow(trainable, jax.tree.map(lambda x: x.astype(jnp.bfloat16), base))
    assert ours.dtype == working("bfloat16") and scores.dtype == jnp.float32
    real, theirs = np.asarray(inputs.segment > 0), np.asarray(states("qar", inputs))
    error = np.linalg.norm((np.asarray(ours, np.float32) - theirs)[:, real])
    assert 0 < error < 0.03 * np.linalg.norm(theirs[:, real])


@pytest.mark.parametrize("family", FAMILIES)
def test_declared_trees(family: str) -> None:
    config = helpers.model(family=family, **FAMILIES[family], tied=family == "qwen3")
    params = decoder.declare(config, jnp.bfloat16)
    extra = {"qwen2": {"q_bias", "k_bias", "v_bias"}, "qwen3": {"q_norm", "k_norm"}, "llama": set()}[family]
    kernels = {"q", "k", "v", "o", "gate", "up", "down"}
    assert set(params["layers"]) == kernels | {"attn_norm", "mlp_norm"} | extra
    assert ("head" in params) == (not config.tied)
    assert params["layers"]["k"].shape == (2, 16, 16) and params["layers"]["q"].shape == (2, 16, 32)
    assert {s.dtype for s in jax.tree.leaves(params, is_leaf=lambda x: hasattr(x, "init"))} == {jnp.bfloat16}


def test_tied_head_is_the_embedding() -> None:
    embedding, hidden = jnp.arange(6.0).reshape(3, 2), jnp.asarray([[1.0, 10.0]])
    np.testing.assert_array_equal(
        decoder.logits({"embed": embedding}, hidden, helpers.model(tied=True)), [[10, 32, 54]]
    )
    own = {"embed": embedding, "head": -embedding.T}
    np.testing.assert_array_equal(decoder.logits(own, hidden, helpers.model()), [[-10, -32, -54]])


def test_forward_is_the_base_alone() -> None:
    run, _, base = running("sft")
    inputs = helpers.device(helpers.batch(7).inputs)
    ours = decoder.forward(base, inputs.tokens, inputs.position, inputs.segment, inputs.attend, run.model)
    theirs = towers.join({}, base, method.states(run, base, inputs, decoder.Adapters()), run.model)
    np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)
