"""Tiny runs that were never trained: of the embedded world, or of any setting."""

from __future__ import annotations

import copy
import dataclasses
import functools
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import helpers
import jax
import numpy as np
import pytest
from jax.sharding import AxisType

from qaperso import batching, methods
from qaperso import config as configs
from qaperso import run as runs
from qaperso.data.store import Registry, Store
from qaperso.data.text import Encoded, Template
from qaperso.mesh import AXES
from qaperso.methods import Setting
from qaperso.models import decoder
from qaperso.models.config import DecoderConfig
from qaperso.run import Run

Tree = Any


def mesh(count: int = 1) -> jax.sharding.Mesh:
    """The first `count` of the fake devices, all on the data axis."""
    return jax.make_mesh((count, 1, 1), AXES, axis_types=(AxisType.Auto,) * 3, devices=jax.devices()[:count])


def bare(setting: Setting, method: ModuleType, base: Tree, devices: int = 1) -> Run:
    """A run of a setting without data, tokeniser or folder."""
    nobody, nothing = Registry((), ()), Template((), (), (), (), ())
    return Run(Path(), setting, method, mesh(devices), nobody, None, nothing, base, {})


@functools.cache
def small(name: str, eos: tuple[int, ...] = (), devices: int = 1) -> SimpleNamespace:
    """A method's model with nothing at its neutral start: alpha, rows and LoRA are not zero."""
    method = methods.load(name)
    setting = helpers.setting(name, helpers.model(eos_ids=eos), qar__contrast="none")
    trainable, base, _ = helpers.build(setting, method)
    trainable, base = helpers.shaken(trainable, size=0.3), helpers.shaken(base, 2, size=0.3)
    model = batching.prepare(bare(setting, method, base, devices), trainable)
    made = dict(setting=setting, method=method, trainable=trainable, base=base, config=setting.model, model=model)
    return SimpleNamespace(**made)


def prompt(tokens: int, seed: int) -> Encoded:
    """A prompt of random tokens."""
    ids = np.random.default_rng(seed).integers(2, helpers.VOCAB, tokens).astype(np.int32)
    return Encoded(ids, np.ones(tokens, np.int32), np.zeros(tokens, bool))


@functools.cache
def opened(**changes: Any) -> tuple[Run, Store, Tree]:
    """A run on the first device, its data and trainable values in which nothing is zero; nobody may change them.

    The base has two layers of width 32 and values that numpy drew. `changes` are config keys, `__` for their dots.
    """
    c = configs.default()
    c.model.update(embed=32, layers=2, heads=2, kv_heads=1, mlp=48)
    c.data.update(per_pair=3, clusters=2)
    c.batch.update(rows=4, length=128, targets=64, dialogues=3)
    c.lora.update(rank=4, alpha=4.0, dropout=0.0)
    c.qar.update(rank=4, head_dim=8)
    c.update_from_flattened_dict({k.replace("__", "."): v for k, v in changes.items()})

    def weights(location: Any, model: DecoderConfig, *rest: Any) -> Tree:
        return helpers.shaken(helpers.drawn(decoder.declare(model), 0), 1, 0.2)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runs, "make_mesh", lambda *_: mesh())
        patch.setattr(runs, "load_weights", weights)
        run, store = runs.new_run(c, Path("never written"))
    return run, store, helpers.shaken(helpers.drawn(runs.declare(run)[0], 2), 3, 0.2)


def changed(run: Run, **changes: Any) -> Run:
    """The run with other config keys, where they change neither data nor parameters."""
    config = copy.deepcopy(run.config)
    config.update_from_flattened_dict({k.replace("__", "."): v for k, v in changes.items()})
    return dataclasses.replace(run, setting=dataclasses.replace(run.setting, config=config))


def of_queriers(store: Store, *names: str) -> Store:
    """What these queriers ask, with all numbers as they were."""
    kept = np.array([i for i, d in enumerate(store.dialogues) if d.querier in names])
    columns = {key: getattr(store, key)[kept] for key in ("row", "responder", "cluster", "text", "label")}
    return dataclasses.replace(store, dialogues=tuple(store.dialogues[i] for i in kept), **columns)
