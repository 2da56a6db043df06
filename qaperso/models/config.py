"""What shape a decoder has, read from a Hugging Face style configuration."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from qaperso.errors import UserError

FAMILIES = {
    "llama": {"qkv_bias": False, "qk_norm": False},
    "qwen2": {"qkv_bias": True, "qk_norm": False},
    "qwen3": {"qkv_bias": False, "qk_norm": True},
}


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """Llama-3.1 rotary scaling (Grattafiori et al., arXiv 2407.21783)."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position: int


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """Shape of a Llama, Qwen2 or Qwen3 decoder; hashable, so it can be static under jit."""

    vocab: int
    embed: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp: int
    family: str = "llama"
    qkv_bias: bool = False
    qk_norm: bool = False
    tied: bool = False
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    norm_eps: float = 1e-6
    max_position: int = 8192
    bos_id: int | None = None
    eos_ids: tuple[int, ...] = ()


# The value transformers assumes where config.json is silent; it is silent about a key only in old or hand-written files.
_DEFAULT_MAX_POSITION = {"llama": 2048, "qwen2": 32768, "qwen3": 32768}
# Biases that a configuration may ask for. Qwen2 models always have q/k/v biases and no other, whatever such a key says;
# Qwen3 ones have no mlp_bias.
_BIASES = {"llama": ("attention_bias", "mlp_bias"), "qwen2": (), "qwen3": ("attention_bias",)}
_REQUIRED = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")


def from_hf(config: Mapping[str, Any], where: str) -> DecoderConfig:
    """Reads a Hugging Face `config.json` of a Llama, Qwen2 or Qwen3 model.

    Args:
      config: the parsed file, as written by transformers 4 (`rope_theta`, `rope_scaling`) or 5 (`rope_parameters`).
      where: the file's name, for error messages.

    Raises:
      UserError: a key is missing or malformed, or asks for something the decoder does not compute.
    """
    family = config.get("model_type")
    if family not in FAMILIES:
        raise UserError(f"{where}: model_type is {family!r}, supported are {', '.join(FAMILIES)}: choose such a model")
    vocab, embed, layers, heads, mlp = (_integer(config, key, where) for key in _REQUIRED)
    kv_heads = _integer(config, "num_key_value_heads", where, heads)
    if heads % kv_heads:
        raise UserError(
            f"{where}: num_attention_heads is {heads}, expected a multiple of num_key_value_heads {kv_heads}"
        )
    # Only Qwen3 has a head size that does not follow from the others when the key is absent.
    head_dim = _integer(config, "head_dim", where, 128 if family == "qwen3" else embed // heads)
    if head_dim % 2:
        raise UserError(f"{where}: head_dim is {head_dim}, expected an even number (rotary embeddings pair dimensions)")
    max_position = _integer(config, "max_position_embeddings", where, _DEFAULT_MAX_POSITION[family])
    _refuse_unsupported(config, family, layers, where)
    theta, scaling = _rope(config, max_position, where)
    return DecoderConfig(
        vocab=vocab,
        embed=embed,
        layers=layers,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        mlp=mlp,
        family=family,
        **FAMILIES[family],
        tied=bool(config.get("tie_word_embeddings", False)),
        rope_theta=theta,
        rope_scaling=scaling,
        norm_eps=_number(config, "rms_norm_eps", where, 1e-6),
        max_position=max_position,
        bos_id=None if config.get("bos_token_id") is None else _integer(config, "bos_token_id", where, least=0),
        eos_ids=token_ids(config.get("eos_token_id"), "eos_token_id", where),
    )


def to_hf(config: DecoderConfig) -> dict[str, Any]:
    """The inverse of `from_hf`: what `config.json` says.

    The rotary settings are written under the names of transformers 5 and, beside them, of transformers 4, so that
    either version reads them.
    """
    rope: dict[str, Any] = {"rope_type": "default"}
    if config.rope_scaling is not None:
        rope = {
            "rope_type": "llama3",
            "factor": config.rope_scaling.factor,
            "low_freq_factor": config.rope_scaling.low_freq_factor,
            "high_freq_factor": config.rope_scaling.high_freq_factor,
            "original_max_position_embeddings": config.rope_scaling.original_max_position,
        }
    eos = list(config.eos_ids)
    return {
        "architectures": [f"{config.family.capitalize()}ForCausalLM"],
        "model_type": config.family,
        "vocab_size": config.vocab,
        "hidden_size": config.embed,
        "intermediate_size": config.mlp,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": config.max_position,
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tied,
        "rope_parameters": {**rope, "rope_theta": config.rope_theta},
        "rope_theta": config.rope_theta,
        "rope_scaling": None if config.rope_scaling is None else rope,
        "bos_token_id": config.bos_id,
        "eos_token_id": None if not eos else eos[0] if len(eos) == 1 else eos,
    }


def token_ids(value: Any, key: str, where: str) -> tuple[int, ...]:
    """Token ids from None, one id or a list of ids.

    Raises:
      UserError: anything else.
    """
    values = [] if value is None else value if isinstance(value, list) else [value]
    if not all(isinstance(v, int) and not isinstance(v, bool) and v >= 0 for v in values):
        raise UserError(f"{where}: {key} is {value!r}, expected a token id, a list of token ids or null")
    return tuple(values)


def _integer(config: Mapping[str, Any], key: str, where: str, default: int | None = None, least: int = 1) -> int:
    value = config.get(key)
    if value is None and default is not None:
        return default
    if value is None:
        raise UserError(f"{where}: no {key}, expected an integer; is this the config.json of a language model?")
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise UserError(f"{where}: {key} is {value!r}, expected an integer of at least {least}")
    return value


def _number(config: Mapping[str, Any], key: str, where: str, default: float | None = None) -> float:
    value = default if config.get(key) is None else config[key]
    if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
        raise UserError(f"{where}: {key} is {value!r}, expected a number above 0")
    return float(value)


def _refuse_unsupported(config: Mapping[str, Any], family: str, layers: int, where: str) -> None:
    """Raises UserError where the file asks for something that the decoder would silently leave out."""
    if config.get("hidden_act", "silu") not in ("silu", "swish"):
        raise UserError(f"{where}: hidden_act is {config['hidden_act']!r}, supported is 'silu'")
    for key in _BIASES[family]:
        if config.get(key):
            raise UserError(f"{where}: {key} is true, supported for {family} is false: choose a model without biases")
    window = config.get("sliding_window", 4096) if config.get("use_sliding_window") else None  # transformers' default
    kinds = config.get("layer_types")
    if family == "llama":
        used = False
    elif kinds is None:
        used = window is not None and config.get("max_window_layers", 28) < layers
    else:
        used = any(kind != "full_attention" for kind in kinds)
    if used:
        key = "use_sliding_window is true" if kinds is None else f"layer_types has {sorted(set(kinds))}"
        raise UserError(f"{where}: {key}, supported is full attention in every layer: choose a model without windows")


def _rope(config: Mapping[str, Any], max_position: int, where: str) -> tuple[float, RopeScaling | None]:
    """Rotary base and scaling; transformers 5 keeps both in `rope_parameters`, 4 in `rope_theta` and `rope_scaling`."""
    key = "rope_parameters" if config.get("rope_parameters") else "rope_scaling"
    rope = config.get(key) or {}
    if not isinstance(rope, Mapping):
        raise UserError(f"{where}: {key} is {rope!r}, expected an object with rope_type")
    theta = _number({"rope_theta": rope.get("rope_theta", config.get("rope_theta"))}, "rope_theta", where, 10000.0)
    partial = rope.get("partial_rotary_factor", config.get("partial_rotary_factor"))
    if partial not in (None, 1):
        raise UserError(f"{where}: partial_rotary_factor is {partial!r}, supported is 1 (all dimensions rotate)")
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return theta, None
    if kind != "llama3":
        raise UserError(f"{where}: {key}.rope_type is {kind!r}, supported are 'default' and 'llama3'")
    at = f"{where}: {key}"
    scaling = RopeScaling(
        factor=_number(rope, "factor", at),
        low_freq_factor=_number(rope, "low_freq_factor", at),
        high_freq_factor=_number(rope, "high_freq_factor", at),
        original_max_position=_integer(rope, "original_max_position_embeddings", at, max_position),
    )
    if not scaling.high_freq_factor > scaling.low_freq_factor:
        raise UserError(f"{at}: high_freq_factor is {scaling.high_freq_factor}, expected above low_freq_factor")
    return theta, scaling
