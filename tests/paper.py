"""Reads the recorded numbers of the published implementation into our trees."""

from __future__ import annotations

import json
from pathlib import Path

import jax.numpy as jnp
import ml_collections
import numpy as np

from qaperso.methods import Setting
from qaperso.models import published
from qaperso.models.config import DecoderConfig
from qaperso.types import QUERIER, RESPONDER, Batch, Contrast, Inputs

FIXTURES = Path(__file__).parent / "fixtures"
CLUSTERS, QUERIERS = 10, 7


def tree(arrays: dict, prefix: str) -> dict:
    """Our nested tree of all arrays below `prefix`."""
    return published.tree({name.removeprefix(prefix): arrays[name] for name in arrays if name.startswith(prefix)})


def setting(name: str, rank: int = 16, family: str = "qwen2") -> Setting:
    """The run that the fixture recorded."""
    recorded = json.loads((FIXTURES / f"{name}.json").read_text())
    c, kw = recorded["config"], recorded["model_kwargs"]
    model = DecoderConfig(
        vocab=c["vocab_size"],
        embed=c["hidden_size"],
        layers=c["num_hidden_layers"],
        heads=c["num_attention_heads"],
        kv_heads=c["num_key_value_heads"],
        head_dim=c["hidden_size"] // c["num_attention_heads"],
        mlp=c["intermediate_size"],
        family=family,
        qkv_bias=family == "qwen2",
        rope_theta=c["rope_theta"],
        norm_eps=c["rms_norm_eps"],
        eos_ids=(c["eos_token_id"],),
    )
    lora = recorded["lora"] or {"r": 16, "alpha": 8}
    qar = dict(
        rank=rank,
        contrast="prototypes",
        memory="bank",
        bank_size=kw["K"],
        decay=1.0,
        head_dim=kw["role_proj_dim"],
        weight=kw["lam"],
        temperature=kw["T"],
        split_layer=0,
        querier_embedding=False,
        drop_row=0.0,
    )
    config = ml_collections.ConfigDict(
        dict(
            compat="paper",
            method="qar",
            trainable="adapters" if recorded["lora"] else "all",
            dtype="float32",
            quantize="",
            remat="full",
            lora=dict(rank=lora["r"], alpha=float(lora["alpha"]), dropout=0.0),
            qar=qar,
            pplug=dict(encoder=""),
        )
    )
    grid = np.indices((CLUSTERS, QUERIERS)).reshape(2, -1).astype(np.int32)
    classes = {"responder": np.zeros_like(grid[0]), "cluster": grid[0], "querier": grid[1]}
    return Setting(config, model, queriers=0, clusters=CLUSTERS, classes=classes)


def inputs(ids, mask, role, cluster, position=None) -> Inputs:
    """Inputs of one dialogue a row."""
    b, s = ids.shape
    zeros = np.zeros((b, 1), np.int32)
    roles = np.where(role == 1, RESPONDER, np.where(role > 1, QUERIER, 0)).astype(np.int32)
    position = np.broadcast_to(np.arange(s, dtype=np.int32), (b, s)) if position is None else position
    ones, mask = np.ones((b, s), np.int32), mask.astype(bool)
    cluster = cluster.astype(np.int32)[:, None]
    leaves = ids.astype(np.int32), ones, position, roles, mask, zeros, zeros, cluster, np.ones((b, 1), bool)
    return Inputs(*map(jnp.asarray, leaves))


def batch(arrays: dict, step: int) -> Batch:
    """The recorded batch of a step."""
    get = {
        k: arrays[f"in{step}/{k}"] for k in ("input_ids", "labels", "attention_mask", "role_pos_ids", "role_pair_id")
    }
    cluster = arrays[f"in{step}/cluster_ids"]
    label = get["labels"][:, 1:]
    weight = (label != -100).astype(np.float32)
    index = np.broadcast_to(np.arange(label.shape[1], dtype=np.int32), label.shape)
    classes = (cluster * QUERIERS + get["role_pair_id"] - 2).astype(np.int32)[:, None]
    where = inputs(get["input_ids"], get["attention_mask"], get["role_pos_ids"], cluster)
    rest = map(jnp.asarray, (index, np.maximum(label, 0).astype(np.int32), weight))
    return Batch(where, *rest, Contrast(jnp.asarray(classes), jnp.zeros_like(classes)))
