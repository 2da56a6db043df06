"""Querier rows: one for somebody whom training never met, fitted on a few dialogues while everything else stays as it is.

The row begins as the stranger's. That is what the model answers unknown people with, and where rows are dropped in training
(`qar.drop_row`) what it has learned to answer them with: no dialogue, no step and no gain are then the same thing, and
whatever a fit changes comes from the dialogues it was given. No reply was ever learned under the mean of all rows.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterator, Sequence
from types import ModuleType
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float

from qaperso import losses
from qaperso.arrays import BATCH_AXES
from qaperso.data.batches import sequential
from qaperso.data.store import Registry
from qaperso.errors import UserError
from qaperso.mesh import put_batch
from qaperso.methods import Setting, base
from qaperso.models import decoder, lora, quantized, towers
from qaperso.models.attention import segments
from qaperso.models.decoder import Adapters
from qaperso.people import Person, joined, table_of, with_history
from qaperso.run import Run
from qaperso.types import STRANGER, Batch, Example, Inputs

Tree = Any

STEPS = 40
# Of the first step, in units of how far trained rows lie from the stranger's.
RATE = 0.3
# That a step reads at most: more dialogues take turns, so that a fit of many takes no longer than one of a few.
TOKENS = 1024
# Rows and their predictions are multiples of these, so that a few programs serve fits of any length.
LENGTHS, TARGETS = 32, 16

_ADAM = optax.scale_by_adam()


def spare_row(run: Run, trainable: Tree) -> int:
    """The first row of the table that nobody has.

    Raises:
      UserError: the run has no rows, or all are taken.
    """
    table_of(trainable)
    return free_row(run.registry)


def free_row(registry: Registry) -> int:
    """The first row that nobody has.

    Raises:
      UserError: all are taken.
    """
    row = registry.free_row()
    if row is None:
        raise UserError(
            f"found no free row beside those of {len(registry.known)} queriers, expected one for somebody new; train with a"
            " higher config.data.spare_rows, or forget somebody"
        )
    return row


def heard(run: Run, later: Sequence[Person]) -> Run:
    """The run in which people and what they were enrolled with are known, as `open_run` would open it (ours).

    Args:
      run: opened without those who came after training.
      later: they.

    Returns:
      A run with their names and, where its method reads history, with their dialogues in it. Nothing is fitted, and the rows
      of the table are no part of a run.
    """
    registry = joined(run.registry, later, run.workdir)
    if run.store is None:
        return dataclasses.replace(run, registry=registry, people=tuple(later))
    store = with_history(run.store, registry, later)
    reader = run.reader.over(store) if run.reader else None
    return dataclasses.replace(run, registry=registry, people=tuple(later), store=store, reader=reader)


def fit_row(
    run: Run, trainable: Tree, examples: Sequence[Example], steps: int = STEPS, lr: float = RATE, seed: int = 0
) -> Float[Array, " D"]:
    """Fits one querier row to dialogues by reply NLL, from the stranger's row and with everything else frozen (ours).

    Adam (Kingma & Ba, arXiv 1412.6980), its rate falling to zero along a cosine. Of the two towers only the specific one sees
    a row, so the general one is run once and each step runs the specific one alone, forward and backward, on as much of
    rows and output table as the dialogues need.

    Args:
      run: with querier rows.
      trainable: its trained parameters; not changed.
      examples: of the new querier, as `run.examples` gives them; which row they name does not matter.
      steps: of Adam.
      lr: of the first step, in units of the root mean square by which trained rows differ from the stranger's.
      seed: of the order in which batches take turns where they exceed `TOKENS`.

    Returns:
      The row, float32.

    Raises:
      UserError: the run has no rows, or there is no example.
    """
    return descend(read(run, trainable, examples), steps, lr, seed)


@dataclasses.dataclass(frozen=True, eq=False)
class Read:
    """Dialogues as far as no row has a part in them; made once, for any number of rows.

    Attributes:
      run, trainable: that read them.
      weights: of the stream that has rows.
      batches, kept: the dialogues, see `_Kept`.
    """

    run: Run
    trainable: Tree
    weights: tuple[Tree, Tree | None]
    batches: Sequence[Batch]
    kept: Sequence[_Kept]


def read(run: Run, trainable: Tree, examples: Sequence[Example]) -> Read:
    """Reads dialogues, as `nll` and `descend` take them.

    Raises:
      UserError: the run has no rows, or there is no example.
    """
    table_of(trainable)
    if not examples:
        raise UserError("found no dialogue that fits batch.length, expected at least one to fit a row on; give more")
    batches = _batches(run, examples)
    fixed = dict(setting=run.setting, method=run.method)
    with jax.set_mesh(run.mesh):
        weights = _specific_stream(trainable, run.base, batches[0].inputs, **fixed)
        kept = [_general_stream(trainable, run.base, batch, **fixed) for batch in batches]
    return Read(run, trainable, weights, batches, kept)


def nll(known: Read, vector: Float[Array, " D"]) -> tuple[float, int]:
    """Reply NLL in nats under a row, and the number of tokens, over all dialogues that were read."""
    nats = sum(float(_of_batch(known, i, vector)[0]) for i in range(len(known.batches)))
    return nats, sum(int(batch.weight.sum()) for batch in known.batches)


def descend(known: Read, steps: int = STEPS, lr: float = RATE, seed: int = 0) -> Float[Array, " D"]:
    """`fit_row` on dialogues that were read."""
    table, names = table_of(known.trainable), known.run.registry
    vector = start = table[STRANGER].astype(jnp.float32)
    rows = table[np.array([names.row(name) for name in names.known], int)]
    rate = lr * jnp.sqrt(jnp.mean((rows - start) ** 2))
    state = _ADAM.init(vector)
    for step, i in enumerate(_turns(len(known.batches), steps, seed)):
        _, slope = _of_batch(known, i, vector)
        falling = rate * 0.5 * (1 + math.cos(math.pi * step / steps))
        vector, state = _descend(vector, state, slope, falling)
    return vector


def _of_batch(known: Read, i: int, vector: Float[Array, " D"]) -> tuple[Float[Array, ""], Float[Array, " D"]]:
    run, trainable = known.run, known.trainable
    parts = known.weights, trainable["tower"], run.params_of(trainable), known.batches[i], known.kept[i]
    with jax.set_mesh(run.mesh):
        return _nll_and_slope(vector, *parts, setting=run.setting)


def _batches(run: Run, examples: Sequence[Example]) -> list[Batch]:
    """The examples in batches of equal shape, of `TOKENS` at most where a row is no longer; no row longer than it must be.

    What is packed tightly leaves few predictions unused, of which each costs a product with the whole output table.
    """
    devices = math.prod(run.mesh.shape[a] for a in BATCH_AXES)
    length = min(run.shape.length, _rounded(max(len(e) for e in examples), LENGTHS))
    one = dataclasses.replace(run.shape, rows=1, length=length, targets=min(run.shape.targets, length))
    packed = [batch for batch, _ in sequential(examples, one)]
    count = -(-len(packed) // max(1, TOKENS // length))
    rows = _rounded(-(-len(packed) // count), devices)
    # A row of padding predicts nothing.
    packed += [jax.tree.map(np.zeros_like, packed[0])] * (-len(packed) % rows)
    used = _rounded(max(int(batch.weight.sum()) for batch in packed), TARGETS)
    packed = [
        batch.replace(**{part: getattr(batch, part)[:, :used] for part in ("target_index", "target", "weight")})
        for batch in packed
    ]
    joint = (packed[k : k + rows] for k in range(0, len(packed), rows))
    return [put_batch(jax.tree.map(lambda *x: np.concatenate(x), *part), run.mesh, 0) for part in joint]


def _rounded(number: int, multiple: int) -> int:
    """The next multiple."""
    return -(-number // multiple) * multiple


def _turns(count: int, steps: int, seed: int) -> Iterator[int]:
    """Which of `count` batches each step reads: each as often as the others give or take one, in random order."""
    rng = np.random.default_rng(seed)
    queue: list[int] = []
    for _ in range(steps):
        queue = queue or rng.permutation(count).tolist()
        yield queue.pop()


@flax.struct.dataclass
class _Kept:
    """What no row changes in a batch: the stream that rows are added to, and the general tower's last states."""

    parting: Any  # float[1, B, S, D]
    general: Any  # float[W - 1, B, T, D], at the predictions; nothing where there is one tower


@functools.partial(jax.jit, static_argnames=("setting", "method"))
def _general_stream(trainable: Tree, frozen: Tree, batch: Batch, *, setting: Setting, method: ModuleType) -> _Kept:
    params = trainable.get("base", frozen)
    adapters = method.condition(setting, trainable, batch.inputs)
    split = decoder.split_of(adapters, setting.model)

    def cut(start: int, stop: int) -> tuple[Tree, Tree | None]:
        return jax.tree.map(lambda a: a[start:stop], (params["layers"], adapters.lora))

    x = base.embedded(setting, params, batch.inputs, adapters)
    if adapters.specific is None:
        return _Kept(x, _predicting(x, batch)[:0])
    parting = _through(setting, cut(0, split), batch.inputs, x) if split else x
    last = _through(setting, cut(split, setting.model.layers), batch.inputs, parting)
    return _Kept(parting, _predicting(last, batch))


@functools.partial(jax.jit, static_argnames=("setting", "method"))
def _specific_stream(
    trainable: Tree, frozen: Tree, inputs: Inputs, *, setting: Setting, method: ModuleType
) -> tuple[Tree, Tree | None]:
    """Layers and LoRA of the stream that has rows: a plain decoder, whose MLPs are the specific ones where there are two.

    In float32 LoRA is added into the kernels; see `inference.prepare` for why not in bfloat16, nor into quantised ones.
    """
    adapters = method.condition(setting, trainable, inputs)
    layers, own, specific = trainable.get("base", frozen)["layers"], adapters.lora, adapters.specific
    if specific is not None:
        split = decoder.split_of(adapters, setting.model)
        layers, own = jax.tree.map(lambda a: a[split:], (layers, own))
        layers = layers | specific
        if own is not None:
            # The specific MLPs have no LoRA, which is one of rank 0.
            own = own | {name: {"a": kernel[..., :0], "b": kernel[:, :0]} for name, kernel in specific.items()}
    if own is not None and layers["q"].dtype == jnp.float32 and not quantized.is_quantized(layers["q"]):
        return lora.merge({"layers": layers}, own)["layers"], None
    return layers, own


@functools.partial(jax.jit, static_argnames=("setting",))
def _nll_and_slope(
    vector: Float[Array, " D"],
    weights: tuple[Tree, Tree | None],
    tower: Tree,
    params: Tree,
    batch: Batch,
    kept: _Kept,
    *,
    setting: Setting,
) -> tuple[Float[Array, ""], Float[Array, " D"]]:
    """Reply NLL of a batch under a row, summed over tokens, in nats; and its gradient to the row."""

    def nll(vector: Array) -> Array:
        rows = jnp.where(batch.inputs.segment[..., None] > 0, vector, 0)
        last = _through(setting, weights, batch.inputs, decoder.enter(kept.parting, rows))
        states = jnp.concatenate([kept.general, _predicting(last, batch)])
        hidden = towers.join(tower, params, states, setting.model)
        return losses.cross_entropy(hidden, decoder.head(params), batch.target, batch.weight).sum()

    return jax.value_and_grad(nll)(vector)


def _through(
    setting: Setting, weights: tuple[Tree, Tree | None], inputs: Inputs, x: Float[Array, "1 B S D"]
) -> Float[Array, "1 B S D"]:
    """One stream through stacked layers and their LoRA."""
    layers, own = weights
    model = dataclasses.replace(setting.model, layers=layers["q"].shape[0])
    seen = segments(inputs.segment, inputs.attend)
    # A batch is small: what matmuls give need not be computed again.
    return decoder.run({"layers": layers}, x, inputs.position, seen, model, Adapters(lora=own), remat="dots")


def _predicting(states: Float[Array, "1 B S D"], batch: Batch) -> Float[Array, "1 B T D"]:
    """States of the positions that predict."""
    return jnp.take_along_axis(states, batch.target_index[None, :, :, None], 2)


@jax.jit
def _descend(
    vector: Float[Array, " D"], state: Tree, slope: Float[Array, " D"], rate: Float[Array, ""]
) -> tuple[Float[Array, " D"], Tree]:
    direction, state = _ADAM.update(slope, state)
    return vector - rate * direction, state
