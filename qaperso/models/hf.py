"""Base weights in and out: Hugging Face folders of safetensors (read and written) and GGUF files (read).

One table says which tensor of a file is which array of the tree that `decoder.declare` declares. It serves both
directions, and both are strict: every declared array must be filled, and every tensor of the file must be used.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import math
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qaperso.arrays import ArraySpec, Index, flat, is_spec, placed
from qaperso.errors import UserError, nearest
from qaperso.models import decoder, gguf, quantized
from qaperso.models.base import Location, Tensor
from qaperso.models.config import DecoderConfig, from_hf, to_hf, token_ids
from qaperso.models.quantized import Quantized

Tree = Any

# Path in the tree -> (name in the file, whether the file holds the transpose). "{}" is the layer.
NAMES: dict[str, tuple[str, bool]] = {
    "embed": ("model.embed_tokens.weight", False),
    "norm": ("model.norm.weight", False),
    "head": ("lm_head.weight", True),
    "layers/attn_norm": ("model.layers.{}.input_layernorm.weight", False),
    "layers/mlp_norm": ("model.layers.{}.post_attention_layernorm.weight", False),
    "layers/q_norm": ("model.layers.{}.self_attn.q_norm.weight", False),
    "layers/k_norm": ("model.layers.{}.self_attn.k_norm.weight", False),
    **{f"layers/{x}": (f"model.layers.{{}}.self_attn.{x}_proj.weight", True) for x in "qkvo"},
    **{f"layers/{x}_bias": (f"model.layers.{{}}.self_attn.{x}_proj.bias", False) for x in "qkv"},
    **{f"layers/{x}": (f"model.layers.{{}}.mlp.{x}_proj.weight", True) for x in ("gate", "up", "down")},
}

# Buffers that old versions of transformers saved: they follow from the configuration.
IGNORED = re.compile(r"rotary_emb\.inv_freq$")

_FLOATS = ("F64", "F32", "F16", "BF16")


def load_config(location: Location) -> DecoderConfig:
    """Reads the shape of the model at a location of kind "hf" or "gguf".

    The end-of-text ids of `generation_config.json`, where there is one, are added to those of `config.json`: chat
    models often list the end of a turn only there.

    Raises:
      UserError: nothing to read there, or a model that is not supported.
    """
    path = _weights_path(location)
    if location.kind == "gguf":
        return gguf.read_config(path)
    config = from_hf(_read_json(path / "config.json"), str(path / "config.json"))
    generation = path / "generation_config.json"
    if not generation.is_file():
        return config
    more = token_ids(_read_json(generation).get("eos_token_id"), "eos_token_id", str(generation))
    return dataclasses.replace(config, eos_ids=tuple(dict.fromkeys((*config.eos_ids, *more))))


def load_params(
    location: Location, config: DecoderConfig, dtype: Any, shardings: Tree | None = None, quantize: str = ""
) -> Tree:
    """Loads base weights from a location of kind "hf" or "gguf"; see `load`."""
    path = _weights_path(location)
    if location.kind == "gguf":
        return assemble(gguf.tensors(path), config, dtype, shardings, str(path), quantize)
    return load(path, config, dtype, shardings, quantize)


def load(path: Path, config: DecoderConfig, dtype: Any, shardings: Tree | None = None, quantize: str = "") -> Tree:
    """Loads a folder of safetensors as the tree that `decoder.declare(config, dtype)` declares.

    Args:
      path: folder with model.safetensors, or model.safetensors.index.json and the files it names.
      config: the model's shape.
      dtype: of the arrays, whatever the files hold (float64, float32, float16 or bfloat16).
      shardings: a NamedSharding for each array; the default device otherwise.
      quantize: see `quantized.declare`, which then declares the tree.

    Raises:
      UserError: a file is missing or damaged; a tensor is missing, unknown or of another shape.
    """
    return assemble(_safetensors(path), config, dtype, shardings, str(path), quantize)


def assemble(
    tensors: Mapping[str, Tensor],
    config: DecoderConfig,
    dtype: Any,
    shardings: Tree | None,
    where: str,
    quantize: str = "",
) -> Tree:
    """Stacks named tensors into the declared tree, straight into the shards that this process has.

    A shard is filled on the host, layer by layer, and put on its devices before the next one is begun; of a tensor that part
    is read which the shard takes. So beside the result the host holds one stacked shard, and one layer's part of it. What is
    to be quantised goes to the devices a layer at a time, where it is rounded and written into its stack: then it is one
    layer's shard, and the devices hold one plain kernel beside the result.

    Args:
      tensors: by the names that transformers gives them.
      config, dtype, shardings, quantize: see `load`.
      where: file or folder, for error messages.
    """
    specs = quantized.declare(decoder.declare(config, dtype), quantize)
    leaves = flat(specs, is_leaf=_is_one)
    shapes = dict(_expected(leaves))
    _check(tensors, shapes, where, config.tied)
    places = quantized.leaves(shardings) if shardings is not None else [None] * len(leaves)
    found = [_array(tensors, *leaf, place) for leaf, place in zip(leaves.items(), places, strict=True)]
    return jax.tree.unflatten(jax.tree.structure(specs, is_leaf=_is_one), found)


def save(
    path: Path, tree: Tree, config: DecoderConfig, dtype: Any = jnp.float32, max_shard_bytes: int = 5_000_000_000
) -> None:
    """Writes a model folder that `transformers` loads: config.json and safetensors.

    The folder appears under its name only when it is whole.

    Args:
      path: the new folder; its parent is made if need be.
      tree: parameters as `decoder.declare(config)` declares them, of any float type.
      config: the model's shape.
      dtype: of the tensors in the files.
      max_shard_bytes: weights are split into files of at most this size (a larger single tensor gets its own file).

    Raises:
      UserError: the folder exists and is not empty, or cannot be written.
      ValueError: the tree is not what the configuration declares.
    """
    path = Path(path)
    specs, leaves = flat(decoder.declare(config), is_leaf=is_spec), flat(tree)
    if {p: s.shape for p, s in specs.items()} != {p: a.shape for p, a in leaves.items()}:
        raise ValueError(f"the tree {sorted(leaves)} is not what the configuration declares: {sorted(specs)}")
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise UserError(f"{path}: exists already, expected a new or empty folder; choose another name or remove it")
    partial = path.parent / f".{path.name}.{os.getpid()}.partial"
    try:
        partial.mkdir(parents=True)
        _write(partial, leaves, specs, config, jnp.dtype(dtype), max_shard_bytes)
        os.replace(partial, path)
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def fingerprint(location: Location) -> str:
    """Sha256, in hex, of the bytes of the weight files in order of their names; "random" where there are none.

    For a single file this is what `sha256sum` prints.
    """
    if location.kind == "random":
        return "random"
    path = _weights_path(location)
    digest = hashlib.sha256()
    for file in [path] if location.kind == "gguf" else _files(path):
        with open(file, "rb") as stream:
            while chunk := stream.read(1 << 22):
                digest.update(chunk)
    return digest.hexdigest()


def _weights_path(location: Location) -> Path:
    if location.kind not in ("hf", "gguf") or location.path is None:
        raise UserError(f"base of kind '{location.kind}': no weight files there, expected a model folder or .gguf file")
    return location.path


def _is_one(x: Any) -> bool:
    return is_spec(x) or quantized.is_quantized(x)


def _array(tensors: Mapping[str, Tensor], path: str, spec: ArraySpec | Quantized, place: Any) -> jax.Array | Quantized:
    """One declared array of the tensors that it is made of."""
    name, transposed = NAMES[path]
    layers = [tensors[one] for one, _ in _named(path, spec)]

    def read(layer: int, index: Index) -> np.ndarray:
        value = layers[layer].read(*(index[::-1] if transposed else index))
        return (value.T if transposed else value).astype(spec.dtype, copy=False)

    def part(index: Index) -> np.ndarray:
        if "{}" not in name:
            return read(0, index)
        host = np.empty([one.stop - one.start for one in index], spec.dtype)
        for i, layer in enumerate(range(index[0].start, index[0].stop)):
            host[i] = read(layer, index[1:])
        return host

    return quantized.filled(spec, place, read) if quantized.is_quantized(spec) else placed(part, spec.shape, place)


def _named(path: str, spec: ArraySpec | Quantized) -> list[tuple[str, tuple[int, ...]]]:
    """The tensors that make up one declared array, with their shapes in the file."""
    template, transposed = NAMES[path]
    if "{}" not in template:
        return [(template, spec.shape[::-1] if transposed else spec.shape)]
    shape = spec.shape[1:]
    return [(template.format(i), shape[::-1] if transposed else shape) for i in range(spec.shape[0])]


def _expected(leaves: Mapping[str, ArraySpec | Quantized]) -> list[tuple[str, tuple[int, ...]]]:
    return [pair for path, spec in leaves.items() for pair in _named(path, spec)]


def _check(tensors: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]], where: str, tied: bool) -> None:
    """Raises UserError unless the tensors are exactly the expected ones."""
    missing = [name for name in shapes if name not in tensors]
    unexpected = [name for name in tensors if name not in shapes and not IGNORED.search(name)]
    head, embed = NAMES["head"][0], NAMES["embed"][0]
    if tied and head in unexpected and embed in tensors:
        if not _equal(tensors[head], tensors[embed]):
            raise UserError(
                f"{where}: {head} differs from {embed} although tie_word_embeddings is true, expected equal tensors; "
                "set tie_word_embeddings to false in config.json"
            )
        unexpected.remove(head)
    if missing == [head]:
        raise UserError(
            f"{where}: no tensor '{head}', expected one of shape {shapes[head]} since tie_word_embeddings is not true; "
            "if the model's head is its embedding, set it to true in config.json"
        )
    if missing:
        hint = nearest(missing[0], unexpected) if unexpected else ""
        raise UserError(
            f"{where}: {_count(missing, 'missing')}, expected shape {shapes[missing[0]]} for the first{hint}"
        )
    if unexpected:
        found = tensors[unexpected[0]].shape
        raise UserError(
            f"{where}: {_count(unexpected, 'unknown')}, the first of shape {found}; expected only tensors of the model "
            "in config.json: is it another model's?"
        )
    for name, shape in shapes.items():
        if tensors[name].shape != shape:
            raise UserError(
                f"{where}: tensor '{name}' has shape {tensors[name].shape}, expected {shape} from the configuration"
            )


def _equal(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are equal, some rows at a time."""
    # safetensors knows no slice that ends behind the tensor.
    rows = [slice(start, min(start + 4096, a.shape[0])) for start in range(0, a.shape[0], 4096)]
    return a.shape == b.shape and all(np.array_equal(a.read(part), b.read(part)) for part in rows)


def _count(names: list[str], what: str) -> str:
    shown = ", ".join(f"'{name}'" for name in names[:3]) + (", ..." if len(names) > 3 else "")
    return f"{len(names)} tensor{'s' if len(names) > 1 else ''} {what}: {shown}"


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}; expected a JSON file of a model folder") from error
    except ValueError as error:
        raise UserError(f"{path}: not JSON: {error}; download or save the model again") from error
    if not isinstance(value, dict):
        raise UserError(f"{path}: holds a {type(value).__name__}, expected a JSON object")
    return value


def _files(path: Path) -> list[Path]:
    """The safetensors files of a model folder, by name."""
    index = path / "model.safetensors.index.json"
    if not index.is_file():
        single = path / "model.safetensors"
        if not single.is_file():
            raise UserError(f"{path}: neither model.safetensors nor model.safetensors.index.json, expected one of them")
        return [single]
    weight_map = _read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f"{index}: no weight_map, expected one from tensor names to files; download the model again")
    files = [path / name for name in sorted(set(map(str, weight_map.values())))]
    absent = [file.name for file in files if not file.is_file()]
    if absent:
        raise UserError(f"{index}: names {', '.join(absent)}, not found beside it; download the model again")
    return files


def _safetensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a folder, unread."""
    from safetensors import SafetensorError, safe_open

    tensors: dict[str, Tensor] = {}
    for file in _files(path):
        try:
            handle = safe_open(file, "np")
            for name in sorted(handle.keys()):
                part = handle.get_slice(name)
                if part.get_dtype() not in _FLOATS and not IGNORED.search(name):
                    raise UserError(
                        f"{file}: tensor '{name}' is of type {part.get_dtype()}, expected one of {', '.join(_FLOATS)}; "
                        "choose weights that are not quantised"
                    )
                tensors[name] = Tensor(tuple(part.get_shape()), functools.partial(_read, handle, name))
        except (SafetensorError, OSError) as error:
            raise UserError(f"{file}: not a whole safetensors file: {error}; download or save it again") from error
    return tensors


def _read(handle: Any, name: str, *index: slice) -> np.ndarray:
    return handle.get_slice(name)[index] if index else handle.get_tensor(name)


def _write(
    folder: Path,
    leaves: Mapping[str, Any],
    specs: Mapping[str, ArraySpec],
    config: DecoderConfig,
    dtype: np.dtype,
    max_shard_bytes: int,
) -> None:
    """Writes config.json, the weight files and, if there are several, their index."""
    from safetensors.numpy import save_file

    shards: list[list[tuple[str, str, int]]] = [[]]
    sizes = [0]
    for path, spec in specs.items():
        for i, (name, shape) in enumerate(_named(path, spec)):
            size = math.prod(shape) * dtype.itemsize
            if shards[-1] and sizes[-1] + size > max_shard_bytes:
                shards.append([])
                sizes.append(0)
            shards[-1].append((name, path, i))
            sizes[-1] += size

    def value(path: str, i: int) -> np.ndarray:
        template, transposed = NAMES[path]
        array = np.asarray(leaves[path][i] if "{}" in template else leaves[path]).astype(dtype)
        return np.ascontiguousarray(array.T if transposed else array)

    weight_map = {}
    for number, shard in enumerate(shards, 1):
        one = len(shards) == 1
        file = "model.safetensors" if one else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        # transformers refuses files whose metadata does not name a framework.
        save_file({name: value(path, i) for name, path, i in shard}, folder / file, metadata={"format": "pt"})
        weight_map |= {name: file for name, _, _ in shard}
    if len(shards) > 1:
        index = {"metadata": {"total_size": sum(sizes)}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2), encoding="utf-8")
    text = json.dumps({**to_hf(config), "dtype": dtype.name}, indent=2)
    (folder / "config.json").write_text(text + "\n", encoding="utf-8")
