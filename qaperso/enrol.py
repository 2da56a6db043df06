"""A row for a querier whom training never met, fitted on a few dialogues while everything else stays as it is.

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

from qaperso import generate, losses
from qaperso.arrays import BATCH_AXES
from qaperso.data.batches import sequential
from qaperso.errors import UserError
from qaperso.mesh import put_batch
from qaperso.methods import Setting, base
from qaperso.models import decoder, towers
from qaperso.models.decoder import Adapters
from qaperso.run import Run
from qaperso.types import STRANGER, Batch, Example, Inputs

Tree = Any

STEPS = 40
# Of the first step, in units of how far trained rows lie from the stranger's.
RATE = 0.3
# That a step reads at most: more dialogues take turns, so that a fit of many takes no longer than one of a few.
TOKENS = 1024

_ADAM = optax.scale_by_adam()


def table_of(trainable: Tree) -> Float[Array, "Q D"]:
    """The querier table of a run's trained parameters.

    Raises:
      UserError: its method has none.
    """
    table = trainable.get("tower", {}).get("rows")
    if table is None:
        raise UserError(
            "found no querier rows in this run, expected some to fit one more; train with config.method=qar,"
            " config.qar.querier_embedding=True and without config.compat"
        )
    return table


def spare_row(run: Run, trainable: Tree) -> int:
    """The first row of the table that nobody has.

    Raises:
      UserError: the run has no rows, or all are taken.
    """
    table_of(trainable)
    row = 1 + len(run.registry.queriers)
    if row >= run.registry.rows:
        raise UserError(
            f"found no spare row behind those of {len(run.registry.queriers)} queriers, expected one for somebody new;"
            " train with a higher config.data.spare_rows"
        )
    return row


def with_row(trainable: Tree, row: int, vector: Float[Array, " D"]) -> Tree:
    """The trained parameters with another row; every other row and leaf stays bit for bit.

    Args:
      trainable: of a run with querier rows.
      row: which one.
      vector: its new value.

    Raises:
      UserError: there is no such row.
    """
    table = table_of(trainable)
    if not 0 <= row < len(table):
        raise UserError(f"found row {row}, expected one of the table's {len(table)}; raise config.data.spare_rows")
    return {**trainable, "tower": {**trainable["tower"], "rows": table.at[row].set(vector.astype(table.dtype))}}


def fit_row(
    run: Run, trainable: Tree, examples: Sequence[Example], steps: int = STEPS, lr: float = RATE, seed: int = 0
) -> Float[Array, " D"]:
    """Fits one querier row to dialogues by reply NLL, from the stranger's row and with everything else frozen (ours).

    Adam (Kingma & Ba, arXiv 1412.6980), its rate falling to zero along a cosine. Of the two towers only the specific one sees
    a row, so the general one is run once and each step runs the specific one alone, forward and backward.

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
    table = table_of(trainable)
    if not examples:
        raise UserError("found no dialogue that fits batch.length, expected at least one to fit a row on; give more")
    vector = start = table[STRANGER].astype(jnp.float32)
    known = table[1 : 1 + len(run.registry.queriers)]
    rate = lr * jnp.sqrt(jnp.mean((known - start) ** 2))
    batches = _batches(run, examples)
    each = max(1, TOKENS // batches[0].inputs.tokens.size)
    fixed = dict(setting=run.setting, method=run.method)
    with jax.set_mesh(run.mesh):
        weights = _specific_stream(trainable, run.base, batches[0].inputs, **fixed)
        kept = [_general_stream(trainable, run.base, batch, **fixed) for batch in batches]
        params = run.params_of(trainable)
        state = _ADAM.init(vector)
        for step, chosen in enumerate(_turns(len(batches), min(each, len(batches)), steps, seed)):
            slopes = (
                _nll_and_slope(vector, weights, trainable["tower"], params, batches[i], kept[i], setting=run.setting)[1]
                for i in chosen
            )
            falling = rate * 0.5 * (1 + math.cos(math.pi * step / steps))
            vector, state = _descend(vector, state, sum(slopes), falling)
    return vector


def _batches(run: Run, examples: Sequence[Example]) -> list[Batch]:
    """The examples packed into one row a device, no longer than they need: one program serves any number of them."""
    length = min(run.shape.length, generate.bucket(max(len(e) for e in examples)))
    rows = math.prod(run.mesh.shape[a] for a in BATCH_AXES)
    shape = dataclasses.replace(run.shape, rows=rows, length=length, targets=min(run.shape.targets, length))
    return [put_batch(batch, run.mesh, 0) for batch, _ in sequential(examples, shape)]


def _turns(count: int, each: int, steps: int, seed: int) -> Iterator[list[int]]:
    """Which of `count` batches each step reads: `each` of them, all as often as the others give or take one."""
    rng = np.random.default_rng(seed)
    queue: list[int] = []
    for _ in range(steps):
        while len(queue) < each:
            queue += rng.permutation(count).tolist()
        yield queue[:each]
        del queue[:each]


@flax.struct.dataclass
class _Kept:
    """What no row changes in a batch: the stream where the towers part, and the general one's last states."""

    parting: Any  # float[1, B, S, D]
    general: Any  # float[1, B, T, D], at the predictions


@functools.partial(jax.jit, static_argnames=("setting", "method"))
def _general_stream(trainable: Tree, frozen: Tree, batch: Batch, *, setting: Setting, method: ModuleType) -> _Kept:
    params = trainable.get("base", frozen)
    adapters = method.condition(setting, trainable, batch.inputs)
    split = decoder.split_of(adapters, setting.model)

    def cut(start: int, stop: int) -> tuple[Tree, Tree | None]:
        return jax.tree.map(lambda a: a[start:stop], (params["layers"], adapters.lora))

    x = base.embedded(setting, params, batch.inputs, adapters)
    parting = _through(setting, cut(0, split), batch.inputs, x) if split else x
    last = _through(setting, cut(split, setting.model.layers), batch.inputs, parting)
    return _Kept(parting, _predicting(last, batch))


@functools.partial(jax.jit, static_argnames=("setting", "method"))
def _specific_stream(
    trainable: Tree, frozen: Tree, inputs: Inputs, *, setting: Setting, method: ModuleType
) -> tuple[Tree, Tree | None]:
    """Layers and LoRA of the specific tower alone: a plain decoder whose MLPs are the specific ones."""
    adapters = method.condition(setting, trainable, inputs)
    split = decoder.split_of(adapters, setting.model)
    layers, own = jax.tree.map(lambda a: a[split:], (trainable.get("base", frozen)["layers"], adapters.lora))
    if own is not None:
        # The specific MLPs have no LoRA, which is one of rank 0.
        own = own | {name: {"a": kernel[..., :0], "b": kernel[:, :0]} for name, kernel in adapters.specific.items()}
    return layers | adapters.specific, own


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
        last = _through(setting, weights, batch.inputs, decoder.part(kept.parting, rows)[1:])
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
    mask = decoder.causal_mask(inputs.segment, inputs.attend)
    kept = dict(remat=setting.config.remat)
    return decoder.run({"layers": layers}, x, inputs.position, mask, model, Adapters(lora=own), **kept)


def _predicting(states: Float[Array, "1 B S D"], batch: Batch) -> Float[Array, "1 B T D"]:
    """States of the positions that predict."""
    return jnp.take_along_axis(states, batch.target_index[None, :, :, None], 2)


@jax.jit
def _descend(
    vector: Float[Array, " D"], state: Tree, slope: Float[Array, " D"], rate: Float[Array, ""]
) -> tuple[Float[Array, " D"], Tree]:
    direction, state = _ADAM.update(slope, state)
    return vector - rate * direction, state
