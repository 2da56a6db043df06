"""QAR: a general and a querier-specific tower, and contrast between queriers within query clusters (arXiv 2412.11736).

With compat = "paper" the published numerics: towers averaged, no querier rows, empty prototypes as candidates, the
contrastive loss clipped to [0, 10], and heads that a LoRA run never trains.

Where `config.pplug.encoder` names an encoder, PPlug's soft tokens stand before each dialogue (ours; see `methods/pplug.py`). A
stranger has no history: what is contrasted, and found again in retrieval, has seen neither row nor history.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from qaperso import losses
from qaperso.data import contrast
from qaperso.errors import UserError
from qaperso.methods import Setting, base, pplug
from qaperso.methods.base import preface
from qaperso.methods.pplug import reader, reads_history
from qaperso.models import towers
from qaperso.models.decoder import Adapters
from qaperso.types import STRANGER, Batch, Inputs

Tree = Any
PAPER_CLIP = 10.0


def declare(setting: Setting) -> tuple[Tree, Tree]:
    """LoRA (or the whole base), the specific tower, the heads; the prototype memory where the contrast uses one.

    Raises:
      UserError: no layer is left for two towers, or there is a history but no row to drop it with.
    """
    config, qar = setting.config, setting.config.qar
    paper = config.compat == "paper"
    params, memory = base.declare(setting)
    queriers = setting.queriers if qar.querier_embedding and not paper else 0
    layers = setting.model.layers - qar.split_layer
    if layers < 1:
        raise UserError(
            f"config.qar.split_layer={qar.split_layer} leaves no layer of the base's {setting.model.layers} with two "
            f"towers; it may be at most {setting.model.layers - 1}"
        )
    if pplug.reads_history(setting):
        if not queriers and qar.contrast != "none":
            raise UserError(
                "config.pplug.encoder with config.method='qar' needs qar.querier_embedding=True or qar.contrast='none': "
                "an embedding that has seen the querier's history could satisfy the contrast by copying it"
            )
        params |= pplug.declare_plug(setting)
    params["tower"] = towers.declare(setting.model, layers=layers, rank=qar.rank, queriers=queriers, gated=not paper)
    if qar.contrast == "none":
        return params, memory
    heads = towers.declare_heads(setting.model, setting.clusters, qar.head_dim)
    if paper and config.trainable == "adapters":
        # As published: a module name does not match, so the heads stay at their random values for ever.
        params["heads"] = {"norm_p": heads.pop("norm_p")}
        memory["heads"] = heads
    else:
        params["heads"] = heads
    if qar.contrast == "prototypes":
        classes = len(setting.classes["cluster"])
        memory["prototypes"] = losses.declare_memory(qar.memory, classes, qar.head_dim, qar.bank_size)
    return params, memory


def condition(setting: Setting, params: Tree, inputs: Inputs) -> Adapters:
    """The general tower's LoRA, the specific tower's MLPs, the row of each dialogue's querier, and PPlug's soft tokens."""
    tower = params["tower"]
    rows = towers.querier_rows(tower["rows"], inputs) if "rows" in tower else None
    soft = pplug.soft(setting, params, _without_strangers(inputs))
    return base.condition(setting, params, inputs).replace(specific=tower["specific"], rows=rows, soft=soft)


def _without_strangers(inputs: Inputs) -> Inputs:
    """The inputs without the history of dialogues that have the stranger's row."""
    if not inputs.columns:
        return inputs
    known = (jnp.asarray(inputs.querier) != STRANGER)[..., None, None]
    return inputs.replace(columns={**inputs.columns, "history": jnp.where(known, inputs.columns["history"], 0)})


def weights(setting: Setting) -> dict[str, float]:
    """LM, plus the contrast with its configured weight."""
    if setting.config.qar.contrast == "none":
        return {"lm": 1.0}
    return {"lm": 1.0, "contrast": setting.config.qar.weight}


def counts(setting: Setting, batch: Batch, memory: Tree) -> dict[str, Float[Array, ""]]:
    """Predicted tokens; anchors of the contrast."""
    result = base.counts(setting, batch, memory)
    if setting.config.qar.contrast != "none":
        if setting.config.qar.contrast == "in_batch":
            masks = batch.contrast.positives, batch.contrast.candidates
        else:
            masks = _class_masks(setting, batch, memory)
        result["contrast"] = contrast.anchors(*masks).sum().astype(jnp.float32)
    return result


def loss(
    setting: Setting, params: Tree, base_params: Tree, batch: Batch, memory: Tree, key: jax.Array | None
) -> tuple[dict[str, Float[Array, ""]], Tree]:
    """LM and contrast numerators; the views and classes that the memory is to hold."""
    qar = setting.config.qar
    batch = batch.replace(inputs=pplug.forget(setting, batch.inputs, key))
    embedded = _pin_padding(setting, base_params) if setting.config.compat == "paper" else base_params
    hidden = base.states(setting, embedded, batch.inputs, condition(setting, params, batch.inputs), key)
    result = {"lm": base.token_losses(setting, params, base_params, batch, hidden).sum()}
    if qar.contrast == "none":
        return result, {}
    pooled, _ = embeddings(setting, params, batch.inputs, hidden)
    heads = params["heads"] | memory.get("heads", {})
    views = [v.reshape(-1, qar.head_dim) for v in towers.views(heads, pooled, batch.inputs.cluster)]
    if qar.contrast == "in_batch":
        masks = batch.contrast.positives, batch.contrast.candidates
        result["contrast"] = losses.in_batch(*views, *masks, qar.temperature)
        return result, {}
    means, filled = losses.read_memory(memory["prototypes"])
    masks = _class_masks(setting, batch, memory)
    if setting.config.compat == "paper":
        # An empty prototype is a constant direction and stays a candidate.
        means = jnp.where(filled[None, :, None], means, 1e-6)
    total = losses.prototype(tuple(views), means, *masks, qar.temperature)
    if setting.config.compat == "paper":
        total = jnp.clip(total, 0.0, PAPER_CLIP * contrast.anchors(*masks).sum())
    result["contrast"] = total
    return result, {"views": jnp.stack(views), "label": batch.contrast.label.reshape(-1)}


def remember(setting: Setting, memory: Tree, update: Tree) -> Tree:
    """Writes the step's views into the prototype memory; it was read before, so the order of dialogues is the batch's."""
    if "prototypes" not in memory:
        return memory
    views = jnp.moveaxis(update["views"], 0, 1).reshape(2, -1, update["views"].shape[-1])
    prototypes = losses.write_memory(memory["prototypes"], views, update["label"].reshape(-1), setting.config.qar.decay)
    return {**memory, "prototypes": prototypes}


def embeddings(
    setting: Setting, params: Tree, inputs: Inputs, states: Float[Array, "W B S D"]
) -> tuple[Float[Array, "B M D"], Int[Array, "B M"]] | None:
    """Mean normed specific states over the responder's tokens; None for a run without contrast."""
    if "heads" not in params:
        return None
    return towers.pool(params["heads"]["norm_p"], states[1], inputs, setting.model.norm_eps)


def _pin_padding(setting: Setting, base_params: Tree) -> Tree:
    """As published, the embedding of the padding token (which is end-of-turn) gets no gradient from look-ups."""
    embed, pad = base_params["embed"], setting.model.eos_ids[0]
    return {**base_params, "embed": embed.at[pad].set(jax.lax.stop_gradient(embed[pad]))}


def _class_masks(setting: Setting, batch: Batch, memory: Tree) -> tuple[Bool[Array, "N C"], Bool[Array, "N C"]]:
    """Positive and candidate classes of each dialogue. A class with no members yet is no candidate (paper: it is)."""
    classes = {k: jnp.asarray(v) for k, v in setting.classes.items()}
    label = batch.contrast.label.reshape(-1)
    own = jnp.maximum(label, 0)
    rows = {k: classes[k][own] for k in ("responder", "cluster")}
    rows["querier"] = jnp.where(label >= 0, classes["querier"][own], -1)
    rows |= {"text": jnp.zeros_like(label), "index": jnp.arange(label.size)}
    count = classes["querier"].shape[0]
    columns = classes | {"text": jnp.full(count, -1), "index": jnp.full(count, -1)}
    positives, candidates = contrast.contrast_masks(rows, columns)
    if setting.config.compat != "paper":
        _, filled = losses.read_memory(memory["prototypes"])
        positives, candidates = positives & filled, candidates & filled
    return positives, candidates
