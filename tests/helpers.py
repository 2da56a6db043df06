"""Small models, settings and batches that several tests share."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax

from qaperso import arrays, step
from qaperso.data.batches import Shape, make_batch
from qaperso.methods import Setting
from qaperso.models import decoder
from qaperso.models.config import DecoderConfig
from qaperso.types import QUERIER, RESPONDER, Batch, Example

Tree = Any
VOCAB, RESPONDERS, QUERIERS, CLUSTERS = 64, 2, 3, 2
SHAPE = Shape(rows=8, length=32, targets=24, dialogues=3)
# One row a dialogue, as unpacked batches have it.
SINGLE = Shape(rows=24, length=12, targets=8, dialogues=1)


def model(**changes: Any) -> DecoderConfig:
    """A decoder of two layers whose sizes 2 and 4 divide."""
    sizes = dict(vocab=VOCAB, embed=16, layers=2, heads=4, kv_heads=2, head_dim=8, mlp=24, eos_ids=(1,))
    return DecoderConfig(**(sizes | changes))


def setting(method: str = "qar", shape: DecoderConfig | None = None, **changes: Any) -> Setting:
    """A run's setting; `changes` are config keys, dotted ones with `__`, such as qar__contrast="in_batch"."""
    config = ml_collections.ConfigDict(
        dict(
            compat="",
            method=method,
            trainable="adapters",
            dtype="float32",
            quantize="",
            remat="full",
            lora=dict(rank=4, alpha=8.0, dropout=0.0),
            qar=dict(
                rank=6,
                contrast="in_batch",
                memory="means",
                bank_size=3,
                decay=0.9,
                head_dim=8,
                weight=0.5,
                temperature=0.5,
                split_layer=0,
                querier_embedding=True,
                drop_row=0.15,
            ),
            pplug=dict(encoder="", history=4, query=5, tokens=2, temperature=0.5, dropout=0.5, differences=False),
            vectors="",
            # A large eps: steps go with the gradient, not with its sign, which rounding decides where it is near zero.
            optimizer=dict(
                lr=0.1, b1=0.9, b2=0.99, eps=0.1, weight_decay=0.1, clip=1.0, warmup=0, final=0.1, spike=0.0
            ),
        )
    )
    config.update_from_flattened_dict({k.replace("__", "."): v for k, v in changes.items()})
    grid = np.indices((RESPONDERS, CLUSTERS, QUERIERS)).reshape(3, -1).astype(np.int32)
    # Row 0 of the querier table is the stranger's.
    classes = {"responder": grid[0], "cluster": grid[1], "querier": grid[2] + 1}
    return Setting(config, shape or model(), queriers=QUERIERS + 1, clusters=CLUSTERS, classes=classes)


def examples(seed: int, count: int = 24, shortest: int = 5, longest: int = 10) -> list[Example]:
    """Random dialogues that run through all classes in turn: some turns of the querier's, then the reply."""
    rng = np.random.default_rng(seed)
    result = []
    for i in range(count):
        n, label = int(rng.integers(shortest, longest + 1)), i % (RESPONDERS * CLUSTERS * QUERIERS)
        reply = int(rng.integers(2, n - 1))
        role = np.where(np.arange(n) < n - reply, QUERIER, RESPONDER).astype(np.int32)
        role[0] = 0
        responder, cluster, querier = np.unravel_index(label, (RESPONDERS, CLUSTERS, QUERIERS))
        tokens = rng.integers(2, VOCAB, n).astype(np.int32)
        ids = dict(querier=int(querier) + 1, responder=int(responder), cluster=int(cluster), text=i, label=label)
        result.append(Example(tokens, role, role == RESPONDER, **ids, index=i))
    return result


def rows_of(items: Sequence[Any], size: int) -> list[list[Any]]:
    """Consecutive items, `size` a row."""
    return [list(items[i : i + size]) for i in range(0, len(items), size)]


def device(tree: Tree) -> Tree:
    """Numpy leaves as JAX arrays."""
    return jax.tree.map(jnp.asarray, tree)


def batch(seed: int, contrast: str = "none", shape: Shape = SHAPE, stranger: float | None = 0.5) -> Batch:
    """A full random batch of numpy arrays, B = shape.rows; a share of dialogues gets the stranger's row."""
    count = shape.rows * shape.dialogues
    flags = None if stranger is None else (np.random.default_rng([seed, 1]).random(count) < stranger).tolist()
    rows = rows_of(examples(seed, count), shape.dialogues)
    return make_batch(rows, shape, None if flags is None else rows_of(flags, shape.dialogues), contrast)


def stack(micro: Sequence[Batch]) -> Batch:
    """Micro-batches as leaves [K, ...]."""
    return jax.tree.map(lambda *x: np.stack(x), *micro)


def drawn(specs: Tree, seed: int) -> Tree:
    """Initial values as declared, by numpy: its generator needs no compiling."""
    rng = np.random.default_rng(seed)

    def leaf(_: str, spec: arrays.ArraySpec) -> jax.Array:
        fixed = {"zeros": 0.0, "ones": 1.0}
        value = (
            fixed[spec.init] * np.ones(spec.shape) if spec.init in fixed else spec.init * rng.normal(size=spec.shape)
        )
        return jnp.asarray(value.astype(spec.dtype))

    return arrays.map_specs(leaf, specs)


def build(run: Setting, method: ModuleType, seed: int = 0) -> tuple[Tree, Tree, Tree]:
    """(trainable, base, memory) at the start of a run; base is {} when it is trained itself."""
    trainable, memory = method.declare(run)
    base = {} if run.config.trainable == "all" else decoder.declare(run.model)
    return drawn(trainable, seed), drawn(base, seed + 1), drawn(memory, seed + 2)


def shaken(tree: Tree, seed: int = 1, size: float = 0.1) -> Tree:
    """Every leaf plus noise, so that nothing is zero, as in the middle of a run."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: jnp.asarray((np.asarray(x) + size * rng.normal(size=x.shape)).astype(x.dtype)), tree)


def stepper(run: Setting, method: ModuleType, optimizer: optax.GradientTransformation, **jit: Any) -> Callable:
    """The jitted step (state, base, batch, key) -> (state, metrics)."""
    return jax.jit(functools.partial(step.train_step, run, method, optimizer), **jit)


def assert_trees_close(ours: Tree, theirs: Tree, atol: float, rtol: float = 0.0) -> None:
    """Equal names, and values to a tolerance; a failure names the leaf."""
    ours, theirs = arrays.flat(ours), arrays.flat(theirs)
    assert set(ours) == set(theirs)
    for name in ours:
        np.testing.assert_allclose(ours[name], theirs[name], rtol=rtol, atol=atol, err_msg=name)


def assert_trees_equal(ours: Tree, theirs: Tree) -> None:
    """Bit for bit, NaNs included."""
    ours, theirs = arrays.flat(ours), arrays.flat(theirs)
    assert set(ours) == set(theirs)
    for name in ours:
        a, b = np.asarray(ours[name]), np.asarray(theirs[name])
        assert a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes(), name
