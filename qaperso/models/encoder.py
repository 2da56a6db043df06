"""Sentence encoders: BERT-type models from the folders that sentence-transformers writes, as pure functions.

One vector a text. Post-norm layers with absolute positions (Devlin et al., arXiv 1810.04805), pooled as Reimers &
Gurevych do (arXiv 1908.10084). All in float32, with exact float32 matmuls on every kind of device.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding
from jaxtyping import Array, Bool, Float, Int
from tokenizers import Tokenizer

from qaperso.arrays import BATCH_AXES, ArraySpec, fan_in, flat, is_spec
from qaperso.errors import UserError
from qaperso.models.attention import Segments, attention, segments
from qaperso.models.base import locate

Tree = Any

# Path in the tree -> (name in the file, whether the file holds the transpose). "{}" is the layer.
_LAYER = "encoder.layer.{}."
_DENSE = {
    **{x: f"attention.self.{name}" for x, name in (("q", "query"), ("k", "key"), ("v", "value"))},
    "o": "attention.output.dense",
    "up": "intermediate.dense",
    "down": "output.dense",
}
_NORMS = {"attn_norm": "attention.output.LayerNorm", "mlp_norm": "output.LayerNorm"}
NAMES: dict[str, tuple[str, bool]] = {
    "tokens": ("embeddings.word_embeddings.weight", False),
    "positions": ("embeddings.position_embeddings.weight", False),
    "types": ("embeddings.token_type_embeddings.weight", False),
    "norm": ("embeddings.LayerNorm.weight", False),
    "norm_bias": ("embeddings.LayerNorm.bias", False),
    **{f"layers/{path}": (f"{_LAYER}{name}.weight", path in _DENSE) for path, name in (_DENSE | _NORMS).items()},
    **{f"layers/{path}_bias": (f"{_LAYER}{name}.bias", False) for path, name in (_DENSE | _NORMS).items()},
}

# Heads of pre-training, which no sentence vector passes through, and a buffer of old versions of transformers.
IGNORED = re.compile(r"pooler\.|cls\.|embeddings\.position_ids$")

# Keys of config.json with the one value that is computed here; all but the first may be absent.
_EXPECTED = {"model_type": "bert", "hidden_act": "gelu", "position_embedding_type": "absolute", "is_decoder": False}
_FIELDS = ("vocab", "embed", "layers", "heads", "mlp", "positions", "types")
_KEYS = """vocab_size hidden_size num_hidden_layers num_attention_heads intermediate_size max_position_embeddings
type_vocab_size""".split()

# Texts that are tokenised and sorted into buckets at a time.
_BLOCK = 16_384
_SHORTEST = 16


@dataclasses.dataclass(frozen=True)
class EncoderConfig:
    """Shape of a BERT-type encoder and what is done with its states; hashable, so it can be static under jit.

    Attributes:
      pooling: "mean" of the states of all tokens, or "cls", the first token's.
      normalise: whether vectors get Euclidean length 1.
      max_length: in tokens, special ones included; longer texts are cut.
      lower: whether texts are put in lower case before they are tokenised.
    """

    vocab: int
    embed: int
    layers: int
    heads: int
    mlp: int
    positions: int
    types: int
    norm_eps: float
    pooling: str
    normalise: bool
    max_length: int
    lower: bool


@dataclasses.dataclass(frozen=True, eq=False)
class Encoder:
    """A loaded encoder.

    Attributes:
      name: the location it was loaded from.
      config: its shape.
      params: as `declare(config)` declares them.
      tokenizer: adds the special tokens and cuts to `config.max_length`.
    """

    name: str
    config: EncoderConfig
    params: Tree
    tokenizer: Tokenizer

    def embed(self, texts: Sequence[str], batch: int = 64, mesh: Mesh | None = None) -> np.ndarray:
        """Vectors of texts, float32[n, embed].

        Texts are padded to the next power of two of their length in tokens (16 at least, `max_length` at most) and
        run `batch` at a time, so that few shapes compile. A text's vector depends on the others by rounding at most.

        Args:
          texts: with the prefix the model was trained with, if any ("query: " for E5).
          batch: texts a step, rounded up to a multiple of the mesh's batch axes; 1 for a single query.
          mesh: spreads the rows over its axes "data" and "fsdp"; every process gets all vectors.
        """
        rows = NamedSharding(mesh, PartitionSpec(BATCH_AXES)) if mesh else None
        params = put(self.params, NamedSharding(mesh, PartitionSpec())) if mesh else self.params
        shards = math.prod(mesh.shape[axis] for axis in BATCH_AXES) if mesh else 1
        size = math.ceil(batch / shards) * shards
        run = _program(self.config, mesh)
        result = np.zeros((len(texts), self.config.embed), np.float32)
        for start in range(0, len(texts), _BLOCK):
            block = [t.lower() if self.config.lower else t for t in texts[start : start + _BLOCK]]
            ids = [encoding.ids for encoding in self.tokenizer.encode_batch(block)]
            pending = []
            for length, members in buckets([len(i) for i in ids], self.config.max_length).items():
                for first in range(0, len(members), size):
                    part = members[first : first + size]
                    inputs = padded([ids[i] for i in part], size, length)
                    # Attention gives each device of the mesh in force its own rows.
                    with jax.set_mesh(mesh) if mesh else contextlib.nullcontext():
                        pending.append((part, run(params, *(inputs if rows is None else put(inputs, rows)))))
            for part, vectors in pending:
                result[start + np.array(part)] = np.asarray(vectors)[: len(part)]
        return result


def declare(config: EncoderConfig) -> Tree:
    """Declares the parameter tree: kernels are [in, out], layers are stacked on a leading axis."""
    n, d, f = config.layers, config.embed, config.mlp
    layers: dict[str, ArraySpec] = {}
    for name in _DENSE:
        i, o = (d, f) if name == "up" else (f, d) if name == "down" else (d, d)
        layers[name] = ArraySpec((n, i, o), ("layers", None, None), fan_in(i))
        layers[f"{name}_bias"] = ArraySpec((n, o), ("layers", None))
    for name in _NORMS:
        layers[name] = ArraySpec((n, d), ("layers", None), "ones")
        layers[f"{name}_bias"] = ArraySpec((n, d), ("layers", None))
    return {
        "tokens": ArraySpec((config.vocab, d), (None, None), 0.02),
        "positions": ArraySpec((config.positions, d), (None, None), 0.02),
        "types": ArraySpec((config.types, d), (None, None), 0.02),
        "norm": ArraySpec((d,), (None,), "ones"),
        "norm_bias": ArraySpec((d,), (None,)),
        "layers": layers,
    }


def layer_norm(
    x: Float[Array, "... D"], scale: Float[Array, " D"], bias: Float[Array, " D"], eps: float
) -> Float[Array, "... D"]:
    """Layer normalisation (Ba et al., arXiv 1607.06450)."""
    centred = x - x.mean(-1, keepdims=True)
    return centred * jax.lax.rsqrt(jnp.mean(centred * centred, -1, keepdims=True) + eps) * scale + bias


def layer(x: Float[Array, "B S D"], weights: Tree, seen: Segments, config: EncoderConfig) -> Float[Array, "B S D"]:
    """One post-norm layer; `weights` are one layer's slices."""
    b, s, d = x.shape

    def dense(h: Array, name: str) -> Array:
        return h @ weights[name] + weights[f"{name}_bias"]

    def norm(h: Array, name: str) -> Array:
        return layer_norm(h, weights[name], weights[f"{name}_bias"], config.norm_eps)

    q, k, v = (dense(x, name).reshape(1, b, s, config.heads, d // config.heads) for name in "qkv")
    x = norm(x + dense(attention(q, k, v, seen, causal=False)[0], "o"), "attn_norm")
    # The exact GELU: the tanh form differs by up to 5e-4 a layer.
    return norm(x + dense(jax.nn.gelu(dense(x, "up"), approximate=False), "down"), "mlp_norm")


def encode(
    params: Tree, tokens: Int[Array, "B S"], present: Bool[Array, "B S"], config: EncoderConfig
) -> Float[Array, "B D"]:
    """Sentence vectors of token ids, special ones included, padded on the right.

    `present` is False where padded; a row of padding alone gets a vector that means nothing.
    """
    with jax.default_matmul_precision("highest"):
        x = params["tokens"][tokens] + params["positions"][: tokens.shape[1]] + params["types"][0]
        x = layer_norm(x, params["norm"], params["norm_bias"], config.norm_eps)
        # One segment, padding included: it sees what is there, and nobody sees it.
        seen = segments(jnp.ones_like(tokens), present)
        x, _ = jax.lax.scan(lambda h, weights: (layer(h, weights, seen, config), None), x, params["layers"])
    if config.pooling == "cls":
        pooled = x[:, 0]
    else:
        pooled = (x * present[..., None]).sum(1) / jnp.maximum(present.sum(1), 1)[:, None]
    if not config.normalise:
        return pooled
    return pooled / jnp.maximum(jnp.linalg.norm(pooled, axis=-1, keepdims=True), 1e-12)


def load_encoder(location: str | Path) -> Encoder:
    """Loads an encoder from a folder in the layout of sentence-transformers.

    `modules.json` says what follows the transformer: a Pooling module ("mean" or "cls", by its config.json) and
    possibly a Normalize module. A folder without `modules.json` gets what sentence-transformers gives it: the mean,
    not normalised. `max_length` is that of `sentence_bert_config.json`, else of `tokenizer_config.json`, and the number
    of positions at most.

    Args:
      location: a folder, `package:NAME/FILE` or `organisation/name` on the Hugging Face Hub; see `base.locate`.

    Raises:
      UserError: nothing there, a file missing or damaged, or a model that is not supported.
    """
    name = str(location)
    try:
        found = locate(name)
    except UserError as error:
        raise UserError(f"encoder {str(error).removeprefix('base ')}") from error
    if found.kind != "hf" or found.path is None:
        raise UserError(f"encoder '{name}': of kind '{found.kind}', expected a folder of config.json and safetensors")
    config = _read_config(found.path, name)
    return Encoder(name, config, _read_params(found.path, config), _read_tokenizer(found.path, config))


@functools.lru_cache(maxsize=8)
def _program(config: EncoderConfig, mesh: Mesh | None) -> Any:
    """`encode` compiled: params whole, rows spread, vectors whole on every device of the mesh."""
    run = functools.partial(encode, config=config)
    if mesh is None:
        return jax.jit(run)
    whole, rows = NamedSharding(mesh, PartitionSpec()), NamedSharding(mesh, PartitionSpec(BATCH_AXES))
    return jax.jit(run, in_shardings=(whole, rows, rows), out_shardings=whole)


def put(tree: Tree, sharding: Sharding) -> Tree:
    """Global arrays from copies that every process has."""

    def leaf(x: Any) -> jax.Array:
        host = np.asarray(x)
        return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])

    return jax.tree.map(leaf, tree)


def buckets(lengths: Sequence[int], longest: int) -> dict[int, list[int]]:
    """{padded length: indices of the texts}, shortest first."""
    result: dict[int, list[int]] = {}
    for i, length in enumerate(lengths):
        padded = min(max(_SHORTEST, 1 << max(length - 1, 0).bit_length()), longest)
        result.setdefault(padded, []).append(i)
    return dict(sorted(result.items()))


def padded(ids: Sequence[Sequence[int]], size: int, length: int) -> tuple[np.ndarray, np.ndarray]:
    """(tokens int32[size, length], present bool[size, length])."""
    tokens, present = np.zeros((size, length), np.int32), np.zeros((size, length), bool)
    for row, own in enumerate(ids):
        tokens[row, : len(own)], present[row, : len(own)] = own, True
    return tokens, present


def _read_json(path: Path, kind: type) -> Any:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: no readable JSON: {error}; save or download the encoder again") from error
    if not isinstance(value, kind):
        raise UserError(f"{path}: holds a {type(value).__name__}, expected a {kind.__name__}; save the encoder again")
    return value


def _optional(path: Path) -> Mapping[str, Any]:
    return _read_json(path, dict) if path.is_file() else {}


def _read_config(folder: Path, name: str) -> EncoderConfig:
    path = folder / "config.json"
    raw = _read_json(path, dict)
    for key, expected in _EXPECTED.items():
        found = raw.get(key)
        if found != expected and (found is not None or key == "model_type"):
            raise UserError(f"{path}: {key} is {found!r}, supported is {expected!r}; choose a BERT-type encoder")
    known = {"max_position_embeddings": 512, "type_vocab_size": 2} | raw
    sizes = {field: known.get(key) for field, key in zip(_FIELDS, _KEYS, strict=True)}
    for key, size in zip(_KEYS, sizes.values(), strict=True):
        if type(size) is not int or size < 1:
            raise UserError(f"{path}: {key} is {size!r}, expected an integer above 0; is it an encoder's?")
    embed, heads, positions = sizes["embed"], sizes["heads"], sizes["positions"]
    if embed % heads:
        raise UserError(f"{path}: hidden_size is {embed}, expected a multiple of num_attention_heads {heads}")
    settings = _optional(folder / "sentence_bert_config.json")
    longest = settings.get("max_seq_length") or _optional(folder / "tokenizer_config.json").get("model_max_length")
    if longest is not None and (not isinstance(longest, int | float) or longest < 3):
        raise UserError(
            f"{folder}: max_seq_length is {longest!r}, expected an integer above 2 (two are special tokens)"
        )
    pooling, normalise = _read_modules(folder, name)
    return EncoderConfig(
        **sizes,
        norm_eps=float(raw.get("layer_norm_eps", 1e-12)),
        pooling=pooling,
        normalise=normalise,
        # "No limit" is written as an integer of thirty digits.
        max_length=positions if longest is None else min(positions, int(longest)),
        lower=bool(settings.get("do_lower_case", False)),
    )


def _read_modules(folder: Path, name: str) -> tuple[str, bool]:
    """(pooling, normalise) from modules.json and the pooling module's config.json."""
    path = folder / "modules.json"
    if not path.is_file():
        return "mean", False
    modules = _read_json(path, list)
    kinds = [str(m.get("type")).rsplit(".", 1)[-1] if isinstance(m, dict) else str(m) for m in modules]
    if kinds not in (["Transformer", "Pooling"], ["Transformer", "Pooling", "Normalize"]):
        raise UserError(
            f"{path}: modules {', '.join(kinds) or 'none'}; supported are Transformer, Pooling and possibly Normalize, "
            "in this order; choose such an encoder"
        )
    if modules[0].get("path"):
        raise UserError(f"{path}: the Transformer is in {modules[0]['path']!r}, expected it in the folder itself")
    file = _module_file(folder, name, f"{modules[1].get('path')}/config.json")
    settings = _read_json(file, dict)
    if "pooling_mode" in settings:
        modes = [str(settings["pooling_mode"])]
    else:
        flags = {"pooling_mode_mean_tokens": True} | settings
        on = [key for key, value in flags.items() if key.startswith("pooling_mode_") and value]
        modes = [key.removeprefix("pooling_mode_").removesuffix("_tokens").removesuffix("_token") for key in on]
    if modes not in (["mean"], ["cls"]):
        raise UserError(f"{file}: pooling {' + '.join(modes) or 'none'}, supported is either mean or cls")
    return modes[0], len(kinds) == 3


def _module_file(folder: Path, name: str, file: str) -> Path:
    """A module's file; `locate` downloads the top folder of a model on the Hub only, so it is fetched from there."""
    if (folder / file).is_file() or name.startswith("package:") or Path(name).expanduser().exists():
        return folder / file
    import huggingface_hub

    try:
        return Path(huggingface_hub.hf_hub_download(name, file))
    except Exception as error:  # The connection, the server or the disk fails with errors of several libraries.
        raise UserError(f"encoder '{name}': downloading {file} from the Hugging Face Hub failed: {error}") from error


def _read_tokenizer(folder: Path, config: EncoderConfig) -> Tokenizer:
    path = folder / "tokenizer.json"
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # The tokenizers library raises bare Exception.
        raise UserError(f"{path}: the tokenizer cannot be read: {error}; save it again") from error
    size = tokenizer.get_vocab_size()
    if size > config.vocab:
        raise UserError(f"{path}: {size} tokens, expected at most vocab_size {config.vocab}; is it another model's?")
    # The file may hold another length and fixed padding: all-MiniLM-L6-v2's does.
    tokenizer.enable_truncation(config.max_length)
    tokenizer.no_padding()
    return tokenizer


def _read_params(folder: Path, config: EncoderConfig) -> Tree:
    """Fills the declared tree from model.safetensors; strict both ways."""
    from safetensors import SafetensorError, safe_open

    path, specs = folder / "model.safetensors", declare(config)
    try:
        with safe_open(path, "np") as file:
            names = {key.removeprefix("bert."): key for key in file.keys()}
            tensors = {name: file.get_tensor(key) for name, key in names.items() if not IGNORED.match(name)}
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: not a whole safetensors file: {error}; save or download it again") from error
    arrays = []
    for leaf, spec in flat(specs, is_leaf=is_spec).items():
        template, transposed = NAMES[leaf]
        stacked = "{}" in template
        shape, parts = spec.shape[1:] if stacked else spec.shape, []
        for i in range(spec.shape[0] if stacked else 1):
            tensor = tensors.pop(template.format(i), None)
            expected = shape[::-1] if transposed else shape
            if tensor is None or tensor.shape != expected:
                found = "missing" if tensor is None else f"of shape {tensor.shape}"
                raise UserError(
                    f"{path}: tensor '{template.format(i)}' is {found}, expected one of shape {expected}; do config.json"
                    " and the weights belong together?"
                )
            parts.append((tensor.T if transposed else tensor).astype(np.float32))
        arrays.append(jnp.asarray(np.stack(parts) if stacked else parts[0]))
    if tensors:
        raise UserError(f"{path}: unknown tensor '{min(tensors)}', expected only those of a BERT encoder")
    return jax.tree.unflatten(jax.tree.structure(specs, is_leaf=is_spec), arrays)
