"""Weights of the published implementation: its names go to our arrays, and nothing is left over or made up."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import helpers
import jax
import numpy as np
import pytest
import untrained
from safetensors.numpy import save_file

from qaperso import export, run
from qaperso.errors import UserError
from qaperso.models import published
from qaperso.run import Run

Tree = Any


def paper() -> tuple[Run, Tree, Tree]:
    """A run in the published numerics, trainable and memory values."""
    opened, _, trainable = untrained.opened(
        method="qar", compat="paper", qar__contrast="prototypes", batch__dialogues=1
    )
    memory = helpers.shaken(helpers.drawn(run.declare(opened)[1], 5), 6)
    return opened, trainable, memory


def state_dict(trainable: Tree, heads: Tree) -> dict[str, np.ndarray]:
    """The published implementation's names for a LoRA run, as peft wraps them."""
    wrap, found = "base_model.model.", {}
    for target, ab in trainable["lora"].items():
        block = "self_attn" if target in "qkvo" else "mlp"
        for part, letter in (("a", "A"), ("b", "B")):
            for i, value in enumerate(ab[part]):
                found[f"{wrap}model.layers.{i}.{block}.{target}_proj.lora_{letter}.default.weight"] = value.T
    for name, stack in trainable["tower"]["specific"].items():
        for i, value in enumerate(stack):
            found[f"{wrap}model.layers.{i}.mlp_specific.{name}_proj_low_rank.weight"] = value.T
    found[f"{wrap}model.norm_specific.weight"] = trainable["tower"]["norm_s"]
    found[f"{wrap}model.norm_role_proj.modules_to_save.default.weight"] = trainable["heads"]["norm_p"]
    for view in (0, 1):
        for cluster, (kernel, bias) in enumerate(zip(heads["kernel"][view], heads["bias"][view], strict=True)):
            found[f"{wrap}role_proj_v{view + 1}.{cluster}.weight"] = kernel.T
            found[f"{wrap}role_proj_v{view + 1}.{cluster}.bias"] = bias
    found["role_avg_v1"] = np.zeros(3, np.float32)
    return {name: np.ascontiguousarray(value) for name, value in found.items()}


def test_its_weights_take_the_place_of_a_run_s_own() -> None:
    _, trainable, memory = paper()
    own, heads = helpers.shaken(trainable, 8), helpers.shaken(memory["heads"], 9)
    found = published.tree(state_dict(own, heads))
    new, kept = published.take(found, trainable, memory, "file")
    helpers.assert_trees_equal(new, own)
    helpers.assert_trees_equal(kept["heads"], heads)
    helpers.assert_trees_equal(kept["prototypes"], memory["prototypes"])


def test_what_is_missing_or_too_much_is_named() -> None:
    _, trainable, memory = paper()
    tensors = state_dict(trainable, memory["heads"])

    def refused(changes: dict[str, np.ndarray | None]) -> str:
        changed = {k: v for k, v in {**tensors, **changes}.items() if v is not None}
        with pytest.raises(UserError) as error:
            published.take(published.tree(changed), trainable, memory, "file")
        return str(error.value)

    norm = "base_model.model.model.norm_specific.weight"
    assert "file: 'tower/norm_s' is absent" in refused({norm: None})
    assert "file: 'tower/norm_s' is (3,), this run has (32,)" in refused({norm: np.zeros(3, np.float32)})
    assert "a tensor 'model.norm_other.weight'" in refused({"model.norm_other.weight": np.zeros(3, np.float32)})
    plain = {**trainable, "tower": {k: v for k, v in trainable["tower"].items() if k != "norm_s"}}
    with pytest.raises(UserError, match="this run has no 'tower/norm_s'"):
        published.take(published.tree(tensors), plain, memory, "file")
    # A base may be in the file, and is the run's own all the same.
    published.take(
        published.tree({**tensors, "model.norm.weight": np.zeros(32, np.float32)}), trainable, memory, "file"
    )


def test_an_exported_run_has_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened, trainable, memory = paper()
    own = helpers.shaken(trainable, 8)
    save_file(state_dict(own, memory["heads"]), tmp_path / "state.safetensors")
    (tmp_path / "run").mkdir()
    source = dataclasses.replace(opened, workdir=tmp_path / "run")
    monkeypatch.setattr(export, "open_run", lambda *_, **__: source)
    monkeypatch.setattr(export, "restore", lambda _: (trainable, memory, 3))
    words = ["--workdir", "x", "--output", str(tmp_path / "new"), "--format", "qaperso", "--published"]
    assert export.main([*words, str(tmp_path / "absent")]) == 2
    assert export.main([*words, str(tmp_path / "state.safetensors")]) == 0
    monkeypatch.setattr(run, "make_mesh", lambda *_: untrained.mesh())
    found, kept, step = run.restore(run.open_run(tmp_path / "new"))
    helpers.assert_trees_equal(found, own)
    helpers.assert_trees_equal(kept, memory)
    assert step == 3 and jax.tree.structure(found) == jax.tree.structure(own)
    source = dataclasses.replace(untrained.changed(opened, compat=""), workdir=tmp_path / "run")
    assert export.main([*words[:3], str(tmp_path / "other"), *words[4:], str(tmp_path / "state.safetensors")]) == 2
