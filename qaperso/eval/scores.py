"""Likelihood of the true replies."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Float

from qaperso.arrays import BATCH_AXES
from qaperso.data import paper
from qaperso.data.batches import sequential
from qaperso.data.plan import Shape
from qaperso.mesh import host_copy, put_batch
from qaperso.methods import Setting, base
from qaperso.run import Run
from qaperso.types import Batch, Example

Tree = Any


@functools.partial(jax.jit, static_argnums=(0, 1))
def batch_nll(
    setting: Setting, method: ModuleType, trainable: Tree, frozen: Tree, batch: Batch
) -> tuple[Float[Array, "B M"], Float[Array, "B M"]]:
    """Negative log-likelihood in nats and number of predicted tokens of each dialogue of a batch."""
    params = trainable.get("base", frozen)
    states = base.states(setting, params, batch.inputs, method.condition(setting, trainable, batch.inputs))
    return base.dialogue_losses(batch, base.token_losses(setting, trainable, params, batch, states))


def scoring_shape(run: Run) -> Shape:
    """Bounds of the batches that a run is scored in: those of training, with rows that the devices divide evenly."""
    devices = math.prod(run.mesh.shape[a] for a in BATCH_AXES)
    return dataclasses.replace(run.shape, rows=-(-run.shape.rows // devices) * devices)


def reply_nll(run: Run, trainable: Tree, examples: Sequence[Example]) -> tuple[np.ndarray, np.ndarray]:
    """Reply NLL of each example in nats, float64[n], and its number of tokens."""
    sums, counts = np.zeros(len(examples)), np.zeros(len(examples))
    with jax.set_mesh(run.mesh):
        for batch, rows in sequential(examples, scoring_shape(run)):
            if run.config.compat == "paper":
                batch = paper.as_published(batch, run.setting.model.eos_ids[0])
            found = batch_nll(run.setting, run.method, trainable, run.base, put_batch(batch, run.mesh, 0))
            total, number = host_copy(found)
            for r, row in enumerate(rows):
                sums[row], counts[row] = total[r, : len(row)], number[r, : len(row)]
    return sums, counts
