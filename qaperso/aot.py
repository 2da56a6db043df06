"""The programs of a run, compiled ahead of time for chips that are not there, from shapes alone.

The step, its shardings and its inputs are made by the functions that training itself uses; only the arrays are missing.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from qaperso import arrays, batching, generate, hlo, methods, step
from qaperso.chips import Topology
from qaperso.data.batches import make_batch
from qaperso.data.plan import Shape
from qaperso.data.text import Encoded
from qaperso.errors import UserError
from qaperso.mesh import batch_sharding, make_mesh
from qaperso.methods import Setting
from qaperso.models import decoder, quantized
from qaperso.models.config import DecoderConfig

Tree = Any
# Query clusters where the configuration leaves them to the data.
CLUSTERS = 16
UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


@dataclasses.dataclass(frozen=True, eq=False)
class Program:
    """A jitted function and what it is called with: shapes with shardings in place of arrays."""

    function: Callable
    arguments: tuple
    static: dict[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Compiled:
    """What the compiler said of a program, for one device.

    Attributes:
      fits: whether it compiled; a program that needs more memory than there is does not.
      arguments, temporaries, peak: bytes; where it does not fit only the peak is known.
      cost: what it does; None where it does not fit.
      text: the optimised HLO; "" where it does not fit.
    """

    fits: bool
    arguments: float
    temporaries: float
    peak: float
    cost: hlo.Cost | None = dataclasses.field(repr=False)
    text: str = dataclasses.field(repr=False)


def devices(topology: Topology) -> Sequence[Any]:
    """Devices to compile for.

    Raises:
      UserError: the compiler for these chips is not installed, or does not know the topology.
    """
    # A compiler alone takes no chip from anybody, and there is no metadata server to ask.
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("TPU_MIN_LOG_LEVEL", "3")
    extra = "cuda" if topology.target else "tpu"
    try:
        found = topologies.get_topology_desc(topology.name, extra, **topology.target)
    except Exception as error:  # jaxlib and libtpu raise errors of several kinds.
        raise UserError(
            f"no compiler for topology '{topology.name}': {str(error).splitlines()[0]}; "
            f"name one that these chips come in, or, where the compiler is missing, pip install 'qaperso[{extra}]'"
        ) from error
    return found.devices


def make_setting(config: Any, model: DecoderConfig, queriers: int) -> Setting:
    """A run's setting for data of so many queriers, each of whom asks about every cluster."""
    clusters = config.data.clusters or CLUSTERS
    grid = np.indices((clusters, queriers)).reshape(2, -1).astype(np.int32)
    classes = {"responder": np.zeros_like(grid[0]), "cluster": grid[0], "querier": grid[1] + 1}
    return Setting(config, model, queriers + 1 + config.data.spare_rows, clusters, classes)


def mesh_of(config: Any, found: Sequence[Any]) -> Mesh:
    """The configuration's mesh over these devices."""
    return make_mesh(config.mesh.data, config.mesh.fsdp, config.mesh.tensor, found)


def _placed(specs: Tree, mesh: Mesh, rules: arrays.Rules) -> Tree:
    place = arrays.shardings(specs, mesh, rules)
    return jax.tree.map(_at, arrays.abstract(specs), place)


def _at(x: Any, place: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place)


def declared(setting: Setting) -> tuple[Tree, Tree, Tree]:
    """Declarations of (trainable, memory, frozen base)."""
    config = setting.config
    trainable, memory = methods.load(config.method).declare(setting)
    if config.trainable == "all":
        return trainable, memory, {}
    return (
        trainable,
        memory,
        quantized.declare(decoder.declare(setting.model, jnp.dtype(config.dtype)), config.quantize),
    )


def parameters(setting: Setting, mesh: Mesh) -> tuple[Tree, Tree, Tree]:
    """Shapes of (trainable, memory, frozen base), on the mesh."""
    return tuple(_placed(tree, mesh, setting.config.sharding) for tree in declared(setting))


def train_program(setting: Setting, mesh: Mesh) -> Program:
    """The train step of a run."""
    config, method = setting.config, methods.load(setting.config.method)
    trainable, memory, base = parameters(setting, mesh)
    optimizer, _ = step.make_optimizer(config, config.steps)
    spread = step.state_shardings(optimizer, trainable, memory, mesh)
    state = jax.eval_shape(functools.partial(step.init_state, optimizer), trainable, memory)
    state = jax.tree.map(_at, state, spread)
    key = jax.eval_shape(lambda: jax.random.key(0))
    key = _at(key, NamedSharding(mesh, PartitionSpec()))
    return Program(step.program(setting, method, optimizer, spread), (state, base, _batch(setting, mesh), key))


def _batch(setting: Setting, mesh: Mesh) -> Tree:
    config = setting.config
    b = config.batch
    contrast = config.qar.contrast if config.method == "qar" else "none"
    empty = make_batch([], Shape(b.rows, b.length, b.targets, b.dialogues), None, contrast)

    def leaf(x: np.ndarray) -> jax.ShapeDtypeStruct:
        shape = (b.accumulate, *x.shape)
        return jax.ShapeDtypeStruct(shape, x.dtype, sharding=batch_sharding(mesh, 1, shape[1]))

    return jax.tree.map(leaf, empty)


def generate_programs(setting: Setting, mesh: Mesh) -> dict[str, Program]:
    """Decoding a token for `batch.rows` requests at once, and reading a prompt of `batch.length` tokens on each device."""
    config, model = setting.config, setting.model
    trainable, _, base = parameters(setting, mesh)
    base = trainable.pop("base", base)
    fixed = dict(setting=setting, method=methods.load(config.method), dtype=jnp.dtype(config.dtype))
    weights = result(Program(batching.arrange, (trainable, base), fixed), mesh)
    prompt = generate.bucket(config.batch.length)
    length = generate.bucket(prompt + config.generate.max_new_tokens)
    rows = "rows" in trainable.get("tower", {})
    shape = dict(config=model, count=config.batch.rows, length=length, rows=rows)
    slots = result(Program(generate.empty_slots, (weights,), shape), mesh)
    together = mesh.shape["data"] * mesh.shape["fsdp"]
    one = Encoded(np.zeros(1, np.int32), np.zeros(1, np.int32), np.zeros(1, bool))
    inputs = generate.pad([one] * together, [0] * together, prompt)
    inputs = jax.tree.map(lambda x: _at(x, batch_sharding(mesh, 0, together)), inputs)
    own = jax.ShapeDtypeStruct((together, prompt, model.embed), jnp.float32, sharding=batch_sharding(mesh, 0, together))
    whole = NamedSharding(mesh, PartitionSpec())
    tokens = jax.ShapeDtypeStruct((), jnp.int32, sharding=whole)
    return {
        "decode": Program(generate.advance, (weights, slots, tokens), {"config": model}),
        "prefill": Program(generate.prefill, (weights, inputs, own if rows else None, None), {"config": model}),
    }


def result(program: Program, mesh: Mesh) -> Tree:
    """What a program gives: shapes, and the shardings that the compiler chose."""
    with jax.set_mesh(mesh):
        compiled = program.function.lower(*program.arguments, **program.static).compile()
    return jax.tree.map(_at, compiled.out_info, compiled.output_shardings)


def compile_program(program: Program, mesh: Mesh) -> Compiled:
    """Compiles a program for the mesh's devices.

    Raises:
      UserError: the compiler fails for another reason than memory, or a library that a kernel is of is missing.
    """
    with jax.set_mesh(mesh):
        try:
            lowered = program.function.lower(*program.arguments, **program.static)
        except RuntimeError as error:
            if "cuDNN" not in str(error):
                raise
            raise UserError(f"attention on GPUs is cuDNN's: {error} pip install 'qaperso[cuda]'") from error
        try:
            compiled = _compile(lowered)
        except jax.errors.JaxRuntimeError as error:
            used = needed(str(error))
            if used is None:
                raise UserError(f"the program does not compile: {str(error).splitlines()[0]}") from error
            return Compiled(False, 0.0, 0.0, used, None, "")
    memory, text = compiled.memory_analysis(), compiled.as_text()
    arguments, temporaries = float(memory.argument_size_in_bytes), float(memory.temp_size_in_bytes)
    # Results that take the place of donated arguments need no room of their own.
    own = memory.output_size_in_bytes - memory.alias_size_in_bytes
    return Compiled(True, arguments, temporaries, arguments + own + temporaries, hlo.cost(text), text)


def _compile(lowered: Any) -> Any:
    """Compiles; where no GPU times kernels of Triton, the first choice does not take every product: then cuBLAS has them all."""
    try:
        return lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if "output tile sizes" not in str(error):
            raise
        return lowered.compile({"xla_gpu_enable_triton_gemm": False})


def needed(message: str) -> float | None:
    """Bytes of memory that a program which does not compile would have used; None where that is not why it failed."""
    found = re.search(r"Used ([\d.]+)([KMGT]?) of [\d.]+[KMGT]? hbm", message)
    return float(found[1]) * UNITS[found[2]] if found else None
