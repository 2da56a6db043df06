"""Programs compiled from shapes: for fake CPU devices, what they hold; for a TPU topology, that they compile."""

from __future__ import annotations

import dataclasses
import importlib.util
import math
import re

import helpers
import jax
import jax.numpy as jnp
import pytest
from jax.sharding import Mesh

from qaperso import aot, arrays, chips, hlo, mesh, step
from qaperso import config as configs
from qaperso.errors import UserError
from qaperso.methods import Setting, load
from qaperso.models.config import DecoderConfig

GIB = 2**30
NO_LIBTPU = importlib.util.find_spec("libtpu") is None
NO_CUDA = importlib.util.find_spec("jax_cuda13_plugin") is None
NO_CUDNN = NO_CUDA or importlib.util.find_spec("nvidia") is None or importlib.util.find_spec("nvidia.cudnn") is None
# Sizes that nothing else has, so that shapes tell what an array is: 5 layers, 4096 words.
MODEL = DecoderConfig(vocab=4096, embed=64, layers=5, heads=4, kv_heads=2, head_dim=32, mlp=96)
# Heads wider than kernels of attention on GPUs take: blocks in plain JAX are the same everywhere.
PLAIN = dataclasses.replace(MODEL, head_dim=256)


def setting(**changes: object) -> Setting:
    c = configs.default()
    c.dtype = "bfloat16"
    c.data.clusters = 3
    c.batch.update(rows=16, length=48, targets=24, dialogues=2)
    c.qar.update(rank=8, head_dim=16)
    c.lora.update(rank=4)
    c.mesh.update(data=1, fsdp=-1)
    c.update_from_flattened_dict({k.replace("__", "."): v for k, v in changes.items()})
    return aot.make_setting(c, MODEL, queriers=7)


def compiled(run: Setting, made: Mesh) -> aot.Compiled:
    return aot.compile_program(aot.train_program(run, made), made)


def kernels(run: Setting) -> int:
    """Entries of all kernels of the base's layers."""
    base = arrays.flat(aot.declared(run)[2], arrays.is_spec)
    return sum(math.prod(s.shape) for name, s in base.items() if name.startswith("layers/") and len(s.shape) == 3)


def check_collectives(found: aot.Compiled) -> None:
    """Weights are gathered a layer at a time, and logits nowhere."""
    gathered = [a for c in found.cost.collectives if c.kind == "all-gather" for a in c.arrays]
    assert gathered and not [a for a in gathered if len(a.dims) > 2 and a.dims[0] == MODEL.layers]
    assert not [a for a in gathered if MODEL.vocab in a.dims and math.prod(a.dims) > MODEL.vocab * MODEL.embed]


def test_shapes_are_those_of_a_real_run() -> None:
    run = setting(qar__contrast="prototypes")
    made = mesh.make_mesh(2, 4, 1)
    program = aot.train_program(run, made)
    state, base, batch, key = program.arguments
    method = load("qar")
    optimizer, _ = step.make_optimizer(run.config, run.config.steps)
    trainable, memory = (
        jax.device_put(helpers.drawn(tree, 0), arrays.shardings(tree, made, run.config.sharding))
        for tree in method.declare(run)
    )
    real, _ = step.start(run, method, optimizer, trainable, memory, made)
    assert jax.tree.structure(state) == jax.tree.structure(real)
    for ours, theirs in zip(jax.tree.leaves(state), jax.tree.leaves(real), strict=True):
        assert (ours.shape, ours.dtype, ours.sharding) == (theirs.shape, theirs.dtype, theirs.sharding)
    assert {x.dtype for x in jax.tree.leaves(base)} == {jnp.dtype("bfloat16")}
    assert batch.inputs.tokens.shape == (1, 16, 48)
    assert batch.inputs.tokens.sharding == mesh.batch_sharding(made, 1, 16)
    assert key.dtype == jax.random.key(0).dtype


@pytest.mark.parametrize(
    "message, bytes",
    [
        ("RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 23.50G of 15.75G hbm. Exceeded", 23.5 * GIB),
        ("Used 1.5T of 15.75G hbm", 1.5 * 2**40),
        ("INTERNAL: Mosaic failed to compile", None),
        ("Ran out of memory in memory space vmem. Used 1.2M of 1.0M vmem", None),
    ],
)
def test_how_much_memory_would_have_been_needed(message: str, bytes: float | None) -> None:
    assert aot.needed(message) == bytes


@pytest.mark.parametrize("name, extra", [("v5e:4x4", "tpu"), ("h100:8", "cuda")])
def test_a_compiler_that_is_not_there_is_named(name: str, extra: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def none(*_: object, **__: object) -> None:
        raise RuntimeError("JAX support not installed")

    monkeypatch.setattr(aot.topologies, "get_topology_desc", none)
    with pytest.raises(
        UserError, match=f"'{name}': JAX support not installed; name one .* pip install 'qaperso\\[{extra}\\]'"
    ):
        aot.devices(chips.topology(name))


@pytest.mark.skipif(NO_LIBTPU, reason="needs libtpu: pip install 'qaperso[tpu]'")
def test_a_step_compiles_for_four_chips() -> None:
    made, run = mesh.make_mesh(1, 4, 1, aot.devices(chips.topology("v5e:2x2"))), setting(method="sft")
    found = compiled(run, made)
    assert found.fits and 0 < found.peak < GIB
    # What runs on TPUs is bfloat16: CPUs would have float32 activations.
    assert re.search(r"bf16\[[\d,]*\]\S* (convolution|fusion)\(", found.text)
    assert {c.kind for c in found.cost.collectives} <= set(hlo.COLLECTIVES)
    check_collectives(found)
    assert found.cost.flops > 4 * kernels(run) * 16 * 48 / 4


@pytest.mark.skipif(NO_LIBTPU, reason="needs libtpu: pip install 'qaperso[tpu]'")
def test_replies_gather_a_layer_at_a_time() -> None:
    """A device never holds the whole model: in a loop over tokens the compiler would gather it before the loop."""
    made = mesh.make_mesh(1, 4, 1, aot.devices(chips.topology("v5e:2x2")))
    wide = dataclasses.replace(MODEL, embed=1024, mlp=4096, layers=6, heads=8, head_dim=128)
    program = aot.generate_programs(dataclasses.replace(setting(method="sft"), model=wide), made)["decode"]
    weights = program.arguments[0]
    whole = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(weights["layers"]))
    assert aot.compile_program(program, made).temporaries < 0.2 * whole


def test_a_cache_lies_where_its_heads_are_made() -> None:
    made = mesh.make_mesh(2, 2, 2)
    programs = aot.generate_programs(setting(method="qar"), made)
    slots = programs["decode"].arguments[1]
    for x in jax.tree.leaves(slots.cache):
        w, b, heads, *rest = x.shape
        assert x.sharding.shard_shape(x.shape) == (w, b // 4, heads // 2, *rest)
    length = slots.attend.shape[1]
    found = aot.compile_program(programs["decode"], made)
    gathered = [a.dims for c in found.cost.collectives if c.kind == "all-gather" for a in c.arrays]
    assert gathered and not [dims for dims in gathered if length in dims and len(dims) > 2]


def test_products_that_triton_does_not_take_are_cublas() -> None:
    class Lowered:
        def compile(self, options: dict[str, bool] | None = None) -> dict[str, bool]:
            if options is None:
                raise jax.errors.JaxRuntimeError("INTERNAL: Couldn't find output tile sizes that satisfy hlo: %dot")
            return options

    assert aot._compile(Lowered()) == {"xla_gpu_enable_triton_gemm": False}


def test_a_library_that_is_not_there_is_named() -> None:
    @jax.jit
    def function() -> None:
        raise RuntimeError("cuDNN not found.")

    with pytest.raises(UserError, match=r"cuDNN's: cuDNN not found\. pip install 'qaperso\[cuda\]'"):
        aot.compile_program(aot.Program(function, ()), mesh.make_mesh(1, 8, 1))


NEEDS_CUDA = pytest.mark.skipif(
    NO_CUDA, reason="needs jax-cuda13-plugin, nvidia-cuda-nvcc and nvidia-nvvm: pip install 'qaperso[cuda]'"
)


@NEEDS_CUDA
def test_a_step_for_a_gpu_does_the_work_that_it_does_anywhere() -> None:
    run = dataclasses.replace(setting(method="sft"), model=PLAIN)
    found = compiled(run, mesh.make_mesh(1, 1, 1, aot.devices(chips.topology("h100:1"))))
    assert found.fits and 0 < found.peak < GIB and "gemm" in found.text
    here = compiled(run, mesh.make_mesh(1, 1, 1, jax.devices()[:1]))
    assert found.cost.flops == here.cost.flops > 4 * kernels(run) * 16 * 48


@NEEDS_CUDA
@pytest.mark.slow
def test_a_step_for_gpus_gathers_a_layer_at_a_time() -> None:
    check_collectives(
        compiled(setting(batch__length=47), mesh.make_mesh(1, 4, 1, aot.devices(chips.topology("h100:4"))))
    )


@pytest.mark.slow
@pytest.mark.skipif(NO_CUDNN, reason="needs jax-cuda13-plugin and nvidia-cudnn-cu13: pip install 'qaperso[cuda]'")
def test_attention_of_a_step_for_gpus_is_cudnns_and_counts() -> None:
    run = setting(method="sft")
    found = compiled(run, mesh.make_mesh(1, 1, 1, aot.devices(chips.topology("h100:1"))))
    here = compiled(run, mesh.make_mesh(1, 1, 1, jax.devices()[:1]))
    assert "__cudnn$fmha" in found.text
    # Of nine products of queries and keys, two forward, two again and five backward, the half counts; blocks compute eight of so
    # short a row whole.
    product = MODEL.layers * 2.0 * 16 * MODEL.heads * 48**2 * MODEL.head_dim
    assert here.cost.flops - found.cost.flops == (8 - 9 / 2) * product
