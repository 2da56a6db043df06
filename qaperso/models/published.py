"""Weights of the published implementation of QAR (arXiv 2412.11736): its names for our arrays.

Its state dict is that of a Hugging Face Llama or Qwen2, perhaps wrapped by peft, with a low-rank MLP beside each layer's, two more
norms, and two linear heads for each cluster.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qaperso import arrays
from qaperso.errors import UserError
from qaperso.models.hf import NAMES

Tree = Any
# (path in our tree, layer or view, cluster) of a tensor.
Place = tuple[str, int | None, int | None]

# What peft puts into names.
_WRAPPING = re.compile(r"^base_model\.model\.|\.base_layer(?=\.)|\.modules_to_save\.default(?=\.)|\.default(?=\.)")
_PLAIN = {"model.norm_specific.weight": "tower/norm_s", "model.norm_role_proj.weight": "heads/norm_p"}
_SPECIFIC = re.compile(r"model\.layers\.(\d+)\.mlp_specific\.(gate|up|down)_proj_low_rank\.weight")
_LORA = re.compile(r"model\.layers\.(\d+)\.(?:self_attn|mlp)\.(\w+)_proj\.lora_([AB])\.weight")
_HEAD = re.compile(r"role_proj_v([12])\.(\d+)\.(weight|bias)")
_LAYER = re.compile(r"(model\.layers\.)(\d+)(\..+)")
_BASE = {name: path for path, (name, _) in NAMES.items()}
# Buffers of prototypes, which no reply reads.
_BUFFER = "role_avg"


def place(name: str) -> Place:
    """Where a tensor of the published model belongs.

    Raises:
      UserError: it has no tensor of that name.
    """
    plain = _WRAPPING.sub("", name)
    if m := _HEAD.fullmatch(plain):
        return f"heads/{'kernel' if m[3] == 'weight' else 'bias'}", int(m[1]) - 1, int(m[2])
    if m := _SPECIFIC.fullmatch(plain):
        return f"tower/specific/{m[2]}", int(m[1]), None
    if m := _LORA.fullmatch(plain):
        return f"lora/{m[2]}/{m[3].lower()}", int(m[1]), None
    if plain in _PLAIN:
        return _PLAIN[plain], None, None
    if plain in _BASE:
        return f"base/{_BASE[plain]}", None, None
    if (m := _LAYER.fullmatch(plain)) and f"{m[1]}{{}}{m[3]}" in _BASE:
        return f"base/{_BASE[f'{m[1]}{{}}{m[3]}']}", int(m[2]), None
    raise UserError(
        f"found a tensor '{name}', expected only those of the published QAR model; is it another model's file?"
    )


def tree(tensors: Mapping[str, np.ndarray]) -> Tree:
    """The published model's tensors as our trees `lora`, `tower`, `heads` and `base`, as far as they are there.

    Kernels are transposed to [in, out]; layers, and views and clusters of heads, are stacked.

    Raises:
      UserError: a tensor of another model.
    """
    parts: dict[str, dict[tuple, np.ndarray]] = {}
    for name in tensors:
        if _BUFFER not in name:
            path, first, second = place(name)
            value = tensors[name]
            parts.setdefault(path, {})[first, second] = value.T if value.ndim == 2 and path != "base/embed" else value
    result: dict = {}
    for path, found in parts.items():
        order = sorted(found, key=lambda key: tuple(-1 if i is None else i for i in key))
        value = found[order[0]] if order[0] == (None, None) else np.stack([found[key] for key in order])
        if path in ("heads/kernel", "heads/bias"):
            value = value.reshape(2, -1, *value.shape[1:])
        *folders, leaf = path.split("/")
        node = result
        for folder in folders:
            node = node.setdefault(folder, {})
        node[leaf] = jnp.asarray(value)
    return result


def read(path: Path) -> Tree:
    """`tree` of a file of safetensors.

    Raises:
      UserError: no such file, or one of another kind or model.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        return tree(load_file(path))
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"{path}: found no safetensors file ({error}), expected the published model's state dict"
        ) from error
    except UserError as error:
        raise UserError(f"{path}: {error}") from error


def take(found: Tree, trainable: Tree, memory: Tree, where: str) -> tuple[Tree, Tree]:
    """A run's trainable and memory trees with the published values in the place of its own; prototypes stay as they are.

    Args:
      found: from `tree`. A base is used where it is trained, and else is the run's own.
      trainable, memory: of a run with compat="paper".
      where: file, for messages.

    Raises:
      UserError: a value is missing, is of another shape, or has no place in the run.
    """
    own, values = arrays.flat({"trainable": trainable, "memory": memory}), arrays.flat(found)
    frozen = "base" not in trainable
    new, used = dict(own), set()
    for name, value in own.items():
        path = name.partition("/")[2]
        if path.startswith("prototypes/"):
            continue
        if path not in values or values[path].shape != value.shape:
            what = values[path].shape if path in values else "absent"
            raise UserError(f"{where}: '{path}' is {what}, this run has {value.shape}; give a run of the same shape")
        new[name] = jnp.asarray(values[path], value.dtype)
        used.add(path)
    if rest := sorted(path for path in values if path not in used and not (frozen and path.startswith("base/"))):
        raise UserError(
            f"{where}: this run has no '{rest[0]}'; give a run of the same shape with config.compat='paper'"
        )
    return _nested(new, "trainable", trainable), _nested(new, "memory", memory)


def _nested(values: Mapping[str, Any], part: str, like: Tree) -> Tree:
    return jax.tree.unflatten(jax.tree.structure(like), [values[f"{part}/{path}"] for path in arrays.flat(like)])
