"""Reads GGUF files of Llama, Qwen2 and Qwen3 models: configuration, metadata and dequantised tensors.

The format is that of ggml (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md), read by the `gguf` package.
"""

from __future__ import annotations

import functools
import os
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from qaperso.errors import UserError
from qaperso.models.base import Tensor
from qaperso.models.config import FAMILIES, DecoderConfig, RopeScaling

# Tensor names of ggml -> those of transformers. "{}" is the layer.
_GLOBAL = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_ROPE_FACTORS = "rope_freqs.weight"


def metadata(path: Path) -> dict[str, Any]:
    """The file's key-value pairs.

    Raises:
      UserError: no GGUF file, or a damaged one.
    """
    return {key: field.contents() for key, field in _reader(path).fields.items()}


def read_config(path: Path) -> DecoderConfig:
    """Reads the model's shape from the metadata.

    Raises:
      UserError: a key is missing, or asks for something that the decoder does not compute.
    """
    reader = _reader(path)
    arch = _field(path, "general.architecture", str)
    if arch not in FAMILIES:
        raise UserError(f"{path}: general.architecture is '{arch}', supported are {', '.join(FAMILIES)}")
    heads = _field(path, f"{arch}.attention.head_count", int)
    embed = _field(path, f"{arch}.embedding_length", int)
    head_dim = _field(path, f"{arch}.attention.key_length", int, embed // heads)
    rotary = _field(path, f"{arch}.rope.dimension_count", int, head_dim)
    if rotary != head_dim:
        raise UserError(f"{path}: {arch}.rope.dimension_count is {rotary}, supported is the head's size {head_dim}")
    for key, default in (("expert_count", 0), ("attention.sliding_window", 0), ("rope.scaling.type", "none")):
        value = _field(path, f"{arch}.{key}", type(default), default)
        if value != default:
            raise UserError(f"{path}: {arch}.{key} is {value!r}, supported is {default!r}: choose another model")
    shapes = {tensor.name: tensor.shape for tensor in reader.tensors}
    if "token_embd.weight" not in shapes:
        raise UserError(f"{path}: no tensor 'token_embd.weight', expected the embedding; is the file a language model?")
    theta = float(_field(path, f"{arch}.rope.freq_base", float, 10000.0))
    end = [_field(path, f"tokenizer.ggml.{key}_token_id", int, -1) for key in ("eos", "eot")]
    bos = _field(path, "tokenizer.ggml.bos_token_id", int, -1)
    return DecoderConfig(
        vocab=int(shapes["token_embd.weight"][1]),
        embed=embed,
        layers=_field(path, f"{arch}.block_count", int),
        heads=heads,
        kv_heads=_field(path, f"{arch}.attention.head_count_kv", int, heads),
        head_dim=head_dim,
        mlp=_field(path, f"{arch}.feed_forward_length", int),
        family=arch,
        **FAMILIES[arch],
        tied="output.weight" not in shapes,
        rope_theta=theta,
        rope_scaling=_rope_scaling(path, theta, head_dim),
        # The file holds float32 of what was written as a short decimal: 1e-5 comes back as 9.999999747378752e-06.
        norm_eps=float(f"{_field(path, f'{arch}.attention.layer_norm_rms_epsilon', float):.6g}"),
        max_position=_field(path, f"{arch}.context_length", int),
        bos_id=None if bos < 0 else bos,
        eos_ids=tuple(dict.fromkeys(i for i in end if i >= 0)),
    )


def tensors(path: Path) -> dict[str, Tensor]:
    """All tensors under the names and in the layout of transformers, dequantised to float32 when read.

    Llama files hold the rows of q and k in ggml's order of rotary dimensions; they come back in that of transformers.

    Raises:
      UserError: see `read_config`.
    """
    config = read_config(path)
    rows = {"attn_q": config.heads, "attn_k": config.kv_heads} if config.family == "llama" else {}
    result = {}
    for tensor in _reader(path).tensors:
        if tensor.name == _ROPE_FACTORS:
            continue
        shape = tuple(int(size) for size in reversed(tensor.shape))
        heads = next((count for key, count in rows.items() if tensor.name.endswith(f".{key}.weight")), None)
        result[_translate(tensor.name)] = Tensor(shape, functools.partial(_read, path, tensor, heads))
    return result


def unpermute(weight: Float[np.ndarray, "out in"], heads: int) -> Float[np.ndarray, "out in"]:
    """Reorders each head's rows from pairs of neighbours (ggml) to first half, second half (transformers)."""
    rows, columns = weight.shape
    return weight.reshape(heads, rows // heads // 2, 2, columns).swapaxes(1, 2).reshape(rows, columns)


def _reader(path: Path) -> Any:
    stat = os.stat(path)
    return _cached_reader(str(path), stat.st_mtime_ns, stat.st_size)


# Parsing a vocabulary takes seconds, and configuration, weights and tokenizer are asked for one after the other.
@functools.lru_cache(maxsize=1)
def _cached_reader(path: str, modified: int, size: int) -> Any:
    from gguf import GGUFReader

    try:
        return GGUFReader(path)
    except (ValueError, IndexError, OverflowError, OSError) as error:
        raise UserError(f"{path}: not a whole GGUF file: {error}; download it again") from error


def _field(path: Path, key: str, kind: type, default: Any = None) -> Any:
    """One metadata value of the given type; required unless there is a default."""
    field = _reader(path).get_field(key)
    if field is None:
        if default is None:
            raise UserError(f"{path}: no metadata key '{key}', expected one of type {kind.__name__}")
        return default
    value = field.contents()
    if isinstance(value, list) and value and len(set(value)) == 1:  # One value a layer, all equal.
        value = value[0]
    if not isinstance(value, kind):
        raise UserError(f"{path}: metadata key '{key}' is {value!r}, expected one value of type {kind.__name__}")
    return value


def _translate(name: str) -> str:
    """The name in transformers; unknown names stay as they are."""
    stem, _, suffix = name.rpartition(".")
    if stem in _GLOBAL:
        return f"{_GLOBAL[stem]}.{suffix}"
    block, _, rest = stem.partition(".")
    layer, _, part = rest.partition(".")
    if block == "blk" and part in _LAYER:
        return f"model.layers.{layer}.{_LAYER[part]}.{suffix}"
    return name


def _read(path: Path, tensor: Any, heads: int | None, *index: slice) -> np.ndarray:
    """A part of a tensor, of which all is dequantised."""
    from gguf.quants import dequantize

    try:
        value = dequantize(tensor.data, tensor.tensor_type)
    except NotImplementedError as error:
        raise UserError(
            f"{path}: tensor '{tensor.name}' is quantised as {tensor.tensor_type.name}, which the gguf package cannot "
            "read; choose a file of another quantisation"
        ) from error
    return (value if heads is None else unpermute(value, heads))[index]


def _rope_scaling(path: Path, theta: float, head_dim: int) -> RopeScaling | None:
    """Recovers Llama-3.1 scaling from the tensor of divisors, one for each frequency, that the file has in its place.

    All released models of that kind use low_freq_factor 1, high_freq_factor 4 and an original context of 8192
    (Grattafiori et al., arXiv 2407.21783); the factor is the largest divisor. Divisors that do not follow from these
    are refused.
    """
    found = next((t for t in _reader(path).tensors if t.name == _ROPE_FACTORS), None)
    if found is None:
        return None
    divisors = np.asarray(found.data, np.float32)
    if np.all(divisors == 1):
        return None
    scaling = RopeScaling(float(divisors.max()), 1.0, 4.0, 8192)
    turns = scaling.original_max_position * theta ** (-np.arange(0, head_dim, 2) / head_dim) / (2 * np.pi)
    blend = np.clip((turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor), 0, 1)
    expected = 1 / (blend + (1 - blend) / scaling.factor)
    if divisors.shape != expected.shape or not np.allclose(divisors, expected, rtol=1e-3):
        raise UserError(
            f"{path}: {_ROPE_FACTORS} is not the Llama-3.1 scaling by {scaling.factor:g} of a context of 8192, the only "
            "one supported; use the model's safetensors, whose config.json states the scaling"
        )
    return scaling
