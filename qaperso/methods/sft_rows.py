"""A control: plain fine-tuning with a learned row for each querier, added to every token's embedding (ours).

What QAR has beside these rows, a tower of its own and contrast, is what it must beat them by. The stranger's row is learned
as QAR's is, from dialogues that lose theirs (`qar.drop_row`).
"""

from __future__ import annotations

from typing import Any

import jax
from jaxtyping import Array, Float

from qaperso.arrays import ArraySpec
from qaperso.methods import Setting, base
from qaperso.methods.base import (
    counts,
    embeddings,
    joint,
    preface,
    preface_tokens,
    reader,
    reads_history,
    remember,
    weights,
)
from qaperso.models import towers
from qaperso.models.decoder import Adapters
from qaperso.types import Batch, Inputs

Tree = Any


def declare(setting: Setting) -> tuple[Tree, Tree]:
    """LoRA (or the whole base) and the rows, zero at first, so that training starts from the base."""
    params, memory = base.declare(setting)
    rows = ArraySpec((setting.queriers, setting.model.embed), (None, "embed"), "zeros")
    return params | {"tower": {"rows": rows}}, memory


def condition(setting: Setting, params: Tree, inputs: Inputs) -> Adapters:
    """LoRA, and the row of each dialogue's querier."""
    return base.condition(setting, params, inputs).replace(rows=towers.querier_rows(params["tower"]["rows"], inputs))


def loss(
    setting: Setting, params: Tree, base_params: Tree, batch: Batch, memory: Tree, key: jax.Array | None
) -> tuple[dict[str, Float[Array, ""]], Tree]:
    """LM numerator, with the rows; nothing to remember."""
    hidden = base.states(setting, base_params, batch.inputs, condition(setting, params, batch.inputs), key)
    return {"lm": base.token_losses(setting, params, base_params, batch, hidden).sum()}, {}
