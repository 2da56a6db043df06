"""Vectors of texts by whatever model is at hand: a sentence encoder, or the mean state of a language model."""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from qaperso.arrays import BATCH_AXES
from qaperso.data.text import encode
from qaperso.errors import UserError
from qaperso.models import decoder, hf
from qaperso.models.base import Location, locate
from qaperso.models.config import DecoderConfig
from qaperso.models.encoder import buckets, load_encoder, padded, put
from qaperso.models.tokenizer import load_tokenizer

Tree = Any
Embed = Callable[[Sequence[str]], np.ndarray]

# A query's first tokens say what it is about; rows of a step.
LONGEST, ROWS = 256, 32


def load_embedder(name: str, mesh: Mesh) -> Embed:
    """A function of n texts that gives float32[n, d], its rows spread over the mesh.

    Args:
      name: a sentence encoder (`load_encoder`), or any base model that is a folder, a file or a Hub name (`base.locate`).
      mesh: of the devices.

    Raises:
      UserError: nothing there, or nothing that can be read.
    """
    try:
        location = locate(name)
    except UserError as error:
        raise UserError(f"--encoder: {error}") from error
    if location.kind in ("random", "workdir"):
        raise UserError(
            f"--encoder '{name}': of kind '{location.kind}', expected a sentence encoder or a language model"
        )
    if _is_encoder(location):
        return functools.partial(load_encoder(name).embed, mesh=mesh)
    model = hf.load_config(location)
    params = put(hf.load_params(location, model, jnp.float32), NamedSharding(mesh, PartitionSpec()))
    tokenizer = load_tokenizer(location)
    return functools.partial(_embed, functools.partial(encode, tokenizer), params, model, mesh)


def _is_encoder(location: Location) -> bool:
    path = location.path / "config.json" if location.kind == "hf" and location.path else None
    if path is None or not path.is_file():
        return False
    try:
        return json.loads(path.read_text(encoding="utf-8")).get("model_type") == "bert"
    except (ValueError, AttributeError):
        return False  # the reader of models says what is wrong with it


def mean_state(
    params: Tree, tokens: Int[Array, "B S"], present: Bool[Array, "B S"], config: DecoderConfig
) -> Float[Array, "B D"]:
    """The mean of a decoder's final states over the tokens that are there, of length 1; 0 where there is none."""
    position = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    states = decoder.forward(params, tokens, position, present.astype(jnp.int32), present, config)
    mean = jnp.where(present[..., None], states, 0).sum(1)
    return mean / jnp.maximum(jnp.linalg.norm(mean, axis=-1, keepdims=True), 1e-12)


def _embed(
    tokens_of: Callable[[str], Sequence[int]], params: Tree, config: DecoderConfig, mesh: Mesh, texts: Sequence[str]
) -> np.ndarray:
    rows = NamedSharding(mesh, PartitionSpec(BATCH_AXES))
    shards = math.prod(mesh.shape[axis] for axis in BATCH_AXES)
    size = math.ceil(ROWS / shards) * shards
    run = jax.jit(functools.partial(mean_state, config=config), out_shardings=NamedSharding(mesh, PartitionSpec()))
    ids = [tokens_of(text)[:LONGEST] for text in texts]
    result = np.zeros((len(texts), config.embed), np.float32)
    for length, members in buckets([len(i) for i in ids], LONGEST).items():
        for first in range(0, len(members), size):
            part = members[first : first + size]
            inputs = put(padded([ids[i] for i in part], size, length), rows)
            with jax.set_mesh(mesh):
                result[part] = np.asarray(run(params, *inputs))[: len(part)]
    return result
