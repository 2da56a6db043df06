"""Quantised kernels: what qwix makes of them, what a step computes and holds, what replies compute."""

from __future__ import annotations

import functools
import re
from typing import Any

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import qwix
from jax.sharding import PartitionSpec
from scipy.stats import norm

from qaperso import aot, arrays, mesh, plan
from qaperso import config as configs
from qaperso.errors import UserError
from qaperso.models import decoder, inference, lora, quantized
from qaperso.models.attention import segments
from qaperso.models.lora import TARGETS
from qaperso.models.quantized import Quantized
from qaperso.types import Batch

Tree = Any
KINDS = ("int8", "nf4")
RULES = ((":embed$", "fsdp"), (":(heads|kv_heads|mlp|vocab)$", "tensor"))
# Deep, so that a stack that is made plain as a whole would be seen among the temporaries.
MODEL = helpers.model(embed=64, layers=12, mlp=512)


def by_hand(kernel: Quantized) -> np.ndarray:
    """The kernel, from tables."""
    level, scale = np.asarray(kernel.values), np.asarray(kernel.scale)
    if level.dtype == np.uint8:
        level = np.array(quantized.NF4, np.float32)[unpacked(level)]
    return np.float32(level) * np.repeat(scale, kernel.shape[-2] // scale.shape[-2], -2)


def unpacked(pairs: Any) -> np.ndarray:
    """Indices of levels, two of a byte one after the other."""
    pairs = np.asarray(pairs)
    return np.stack([pairs % 16, pairs // 16], -2).reshape(*pairs.shape[:-2], -1, pairs.shape[-1])


def kind_of(name: str) -> str:
    """Attention's kernels are in nf4 here, the others in int8."""
    return "nf4" if name in "qkvo" else "int8"


def mixed(specs: Tree) -> Tree:
    """The declarations of such a decoder."""
    both = {kind: quantized.declare(specs, kind)["layers"] for kind in KINDS}
    return {**specs, "layers": {**specs["layers"], **{name: both[kind_of(name)][name] for name in TARGETS}}}


def shrunk(tree: Tree) -> Tree:
    """Such a decoder of a plain one."""
    kernels = {name: tree["layers"][name] for name in TARGETS}
    found = jax.jit(lambda x: {name: quantized.quantize(x[name], kind_of(name)) for name in TARGETS})(kernels)
    return {**tree, "layers": {**tree["layers"], **found}}


def loss(own: Tree, base: Tree, batch: Batch) -> jax.Array:
    """The mean over every token but the first of its negative log-likelihood, in nats."""
    inputs = batch.inputs
    seen, adapters = segments(inputs.segment, inputs.attend), decoder.Adapters(lora=own)
    x = decoder.embed(base, inputs.tokens, jnp.float32)
    x = decoder.run(base, x, inputs.position, seen, MODEL, adapters, remat="dots")
    logits = decoder.logits(base, decoder.rms_norm(x[0, :, :-1], base["norm"], MODEL.norm_eps), MODEL)
    return -jnp.take_along_axis(jax.nn.log_softmax(logits), inputs.tokens[:, 1:, None], 2).mean()


@pytest.mark.parametrize("kind", KINDS)
def test_levels_are_those_of_qwix(kind: str) -> None:
    rng = np.random.default_rng(0)
    kernel = rng.normal(0, 0.1, (3, 96, 40)).astype(np.float32)
    kernel[1, :, 7] = 0
    found = jax.jit(functools.partial(quantized.quantize, kind=kind))(kernel)
    block = 32 if kind == "nf4" else 96
    back = np.asarray(quantized.dequantize(found))
    codes = jnp.asarray(unpacked(found.values), jnp.uint4) if kind == "nf4" else found.values
    theirs = qwix.QArray(codes, found.scale, None, "nf4" if kind == "nf4" else jnp.int8)
    np.testing.assert_array_equal(back, jax.jit(qwix.dequantize)(theirs))
    np.testing.assert_array_equal(back, by_hand(found))
    assert found.scale.shape == (3, 96 // block, 40) and found.dtype == kernel.dtype
    # No further off than half the widest gap between levels, in units of a scale; and some are nearly that far.
    widest = 0.5 if kind == "int8" else max(np.diff(quantized.NF4)) / 2
    error = np.abs(back - kernel) / np.repeat(np.asarray(found.scale), block, 1)
    assert 0.9 * widest < error.max() <= widest * 1.0001
    assert not back[1, :, 7].any()


def test_levels_of_nf4_are_quantiles() -> None:
    """Equal shares of a normal distribution on either side of 0 (appendix E of arXiv 2305.14314)."""
    edge = 0.9677083
    above, below = norm.ppf(np.linspace(edge, 0.5, 9)[:-1]), -norm.ppf(np.linspace(edge, 0.5, 8)[:-1])
    np.testing.assert_allclose(quantized.NF4, sorted([*above, 0.0, *below]) / above.max(), atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_declared_as_made(kind: str) -> None:
    specs = decoder.declare(MODEL, jnp.bfloat16)
    declared = quantized.declare(specs, kind)
    kernels = {name: jax.ShapeDtypeStruct(specs["layers"][name].shape, jnp.bfloat16) for name in TARGETS}
    made = jax.eval_shape(functools.partial(quantized.compress, kind=kind), {"layers": kernels})["layers"]
    assert {name: arrays.abstract(declared)["layers"][name] for name in TARGETS} == made
    # Nothing else is touched.
    rest = [x for x in quantized.leaves(arrays.abstract(declared)) if not quantized.is_quantized(x)]
    assert {x.dtype for x in rest} == {jnp.dtype(jnp.bfloat16)} and len(rest) == 2 + 2 + 1
    assert {x.values.dtype for x in made.values()} == {jnp.dtype(jnp.uint8 if kind == "nf4" else jnp.int8)}
    assert quantized.declare(specs, "") is specs


def test_parts_are_spread_as_their_kernel() -> None:
    made = mesh.make_mesh(2, 2, 2)
    specs = decoder.declare(helpers.model(embed=64, mlp=128))
    place = arrays.shardings(quantized.declare(specs, "nf4"), made, RULES)["layers"]
    assert place["down"].values.spec == PartitionSpec(None, "tensor", "fsdp")
    # Two blocks for two devices; one block, which stays whole.
    assert place["down"].scale.spec == PartitionSpec(None, "tensor", "fsdp")
    assert place["gate"].scale.spec == PartitionSpec(None, None, "tensor")
    # Rules name the kernel, whatever it is made of.
    own = arrays.shardings(quantized.declare(specs, "int8"), made, (("^layers/q:embed$", "fsdp"),))["layers"]
    assert own["q"].values.spec == PartitionSpec(None, "fsdp", None) and own["k"].values.spec == PartitionSpec(
        *[None] * 3
    )


def test_inputs_that_come_in_no_blocks() -> None:
    odd = decoder.declare(helpers.model(mlp=36))
    with pytest.raises(UserError, match="blocks of 16 inputs or more, .* 'down' has 36: choose 'int8' or another base"):
        quantized.declare(odd, "nf4")
    assert quantized.declare(odd, "int8")["layers"]["down"].scale.shape == (2, 1, 16)


def test_a_base_that_is_trained_is_not_quantised() -> None:
    with pytest.raises(UserError, match="config.quantize='nf4' needs trainable='adapters'"):
        configs.load("configs/quickstart.py", ["quantize=nf4", "trainable=all"])


def test_a_step_over_few_bits() -> None:
    """Loss and gradient are those of plain arrays, spread or not; the program holds few bits and one plain layer."""
    own = helpers.shaken(helpers.drawn(lora.declare(MODEL, 4), 1), size=0.02)
    base = helpers.drawn(decoder.declare(MODEL), 0)
    few = shrunk(base)
    plain = jax.tree.map(lambda x: by_hand(x) if quantized.is_quantized(x) else x, few, is_leaf=quantized.is_quantized)
    batch = helpers.batch(3)
    slope = jax.jit(jax.value_and_grad(loss))
    expected, theirs = slope(own, helpers.device(plain), batch)
    # Quantising has cost something, and not much.
    assert 1e-6 < abs(float(expected - slope(own, base, batch)[0])) < 0.15

    made = mesh.make_mesh(2, 2, 2)
    place = functools.partial(arrays.shardings, mesh=made, rules=RULES)
    spread = jax.device_put(few, place(mixed(decoder.declare(MODEL))))
    given = jax.device_put(own, place(lora.declare(MODEL, 4))), spread, mesh.put_batch(batch, made, 0)
    with jax.set_mesh(made):
        program = slope.lower(*given).compile()
        found, gradient = program(*given)
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    for name, leaf in arrays.flat(theirs).items():
        size = np.abs(leaf).max()
        assert size > 0
        np.testing.assert_allclose(arrays.flat(gradient)[name], leaf, rtol=0, atol=1e-5 * size, err_msg=name)

    held = {name: spread["layers"][name].values.nbytes / spread["layers"][name].size for name in TARGETS}
    assert held == {name: {"nf4": 0.5, "int8": 1.0}[kind_of(name)] for name in TARGETS}
    parameters, everything = (
        sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(tree)) for tree in (given[:2], given)
    )
    # What the loss does not look at, of the batch, is no argument.
    assert parameters <= program.memory_analysis().argument_size_in_bytes <= everything
    # Stacks of floats are LoRA's, of rank 4, and scales; never kernels, nor a device's part of them.
    stacks = [tuple(map(int, dims.split(","))) for dims in re.findall(r"f32\[(12,\d+,\d+)\]", program.as_text())]
    assert stacks and all(min(dims[1:]) <= 4 for dims in stacks)


def test_replies_compute_what_training_computes() -> None:
    shape = helpers.model(embed=64, mlp=128)
    base, own = (
        shrunk(helpers.drawn(decoder.declare(shape), 0)),
        helpers.shaken(helpers.drawn(lora.declare(shape, 4), 1)),
    )
    inputs, adapters = helpers.device(helpers.batch(1).inputs), decoder.Adapters(lora=own)

    @jax.jit
    def both(base: Tree) -> tuple[jax.Array, jax.Array]:
        weights = inference.prepare(base, adapters, {}, shape, jnp.float32)
        assert all(quantized.is_quantized(one[name]) for one in weights["layers"] for name in inference.FUSED)
        mask = decoder.causal_mask(inputs.segment, inputs.attend)
        ours, _ = inference.prefill(weights, inputs.tokens, inputs.position, mask, None, shape)
        x = decoder.embed(base, inputs.tokens, jnp.float32)
        return ours, decoder.run(base, x, inputs.position, segments(inputs.segment, inputs.attend), shape, adapters)

    ours, theirs = (np.asarray(x)[0, np.asarray(inputs.segment > 0)] for x in both(base))
    np.testing.assert_allclose(ours, theirs, atol=1e-4)


def test_a_plan_counts_few_bits() -> None:
    c = configs.load("configs/qar_smollm2_nf4.py", ["base=random", "data.clusters=2"])
    run = aot.make_setting(c, MODEL, queriers=3)
    _, _, frozen = aot.parameters(run, mesh.make_mesh(1, 4, 2))
    gate = frozen["layers"]["gate"]
    assert (gate.values.dtype, gate.values.shape, gate.scale.shape) == (jnp.uint8, (12, 32, 512), (12, 1, 512))
    assert gate.values.sharding.spec == PartitionSpec(None, "fsdp", "tensor")
    # What is useful work does not depend on what kernels are kept in.
    whole = aot.make_setting(configs.load("configs/qar_smollm2.py", ["data.clusters=2"]), MODEL, queriers=3)
    assert plan.useful(run, "train", 0) == plan.useful(whole, "train", 0)
