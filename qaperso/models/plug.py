"""PPlug's user embedder: a query and a history of vectors become soft tokens for a frozen language model.

Liu et al., arXiv 2409.11901. With h_i the unit vectors of the history items by a frozen encoder, x the query's unit vector
by a trainable copy of it, I a trainable vector and T a temperature (1 as published):

    w = softmax(x . h_i / T)         P = sum_i w_i MLP(h_i)         soft tokens: [MLP'(I); P]

Ours: vectors enter an MLP times sqrt(E), so that their elements are of size 1 under any encoder, and both MLPs start with
elements of size 1 at their output; P may be several tokens; a history without items gives P = 0.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from qaperso.arrays import ArraySpec, fan_in
from qaperso.data.features import normalise

Tree = Any
# sqrt(E[gelu(z)^2]) of a standard normal z: what the hidden layer's elements are of at first.
GELU_SIZE = 0.6521


def unit(v: Float[Array, "... E"]) -> Float[Array, "... E"]:
    """Vectors of Euclidean length 1; 0 stays 0, and its gradient finite."""
    return v * jax.lax.rsqrt(jnp.maximum((v * v).sum(-1, keepdims=True), 1e-24))


@dataclasses.dataclass(frozen=True, eq=False)
class Bag:
    """An encoder that needs no download: a text is the sum of its tokens' rows of one table.

    The table is the language model's own: its token embeddings less their mean, each times the inverse document
    frequency of its token in the history, 1 + ln((1 + N) / (1 + N_token)). So the vector is the model's own weighted mean
    of words (after Arora et al., ICLR 2017, who take the common direction out).

    Attributes:
      table: float32[V, E].
      tokens: token ids of each of some texts.
    """

    table: np.ndarray
    tokens: Callable[[Sequence[str]], Sequence[Sequence[int]]]

    @property
    def identity(self) -> str:
        """Equal where equal texts get equal vectors."""
        return "bag of tokens sha256:" + hashlib.sha256(np.ascontiguousarray(self.table).tobytes()).hexdigest()

    def embed(self, texts: Sequence[str]) -> np.ndarray:
        """Unit vectors, float32[n, E]; 0 for a text without tokens."""
        result = np.zeros((len(texts), self.table.shape[1]), np.float32)
        for i, ids in enumerate(self.tokens(texts)):
            result[i] = self.table[np.array(ids, int)].sum(0)
        return normalise(result)


def bag(table: np.ndarray, tokens: Callable[[Sequence[str]], Sequence[Sequence[int]]], texts: Sequence[str]) -> Bag:
    """A bag of tokens.

    Args:
      table: the language model's token embeddings, float32[V, E].
      tokens: its token ids of each of some texts.
      texts: whose words are counted.
    """
    count = np.zeros(len(table))
    for ids in tokens(texts):
        count[np.unique(np.array(ids, int))] += 1
    weight = 1 + np.log((1 + len(texts)) / (1 + count))
    return Bag(((table - table.mean(0)) * weight[:, None]).astype(np.float32), tokens)


def declare_bag(vocab: int, dim: int) -> Tree:
    """Declares the trainable copy of a bag's table."""
    return {"table": ArraySpec((vocab, dim), (None, None))}


def encode_bag(params: Tree, tokens: Int[Array, "N S"], present: Bool[Array, "N S"]) -> Float[Array, "N E"]:
    """The sums of tokens' rows; 0 where none is present."""
    return jnp.where(present[..., None], params["table"][tokens], 0).sum(1)


def declare(encoder: Tree, dim: int, embed: int, tokens: int) -> Tree:
    """Declares the user embedder.

    Args:
      encoder: declaration of the trainable copy of the encoder.
      dim: E, of its vectors.
      embed: D, the language model's width, and the MLPs' hidden one.
      tokens: soft tokens that P is.
    """

    def mlp(outputs: int) -> Tree:
        return {
            "hidden": ArraySpec((dim, embed), (None, None), fan_in(dim)),
            "hidden_bias": ArraySpec((embed,), (None,)),
            "out": ArraySpec((embed, outputs), (None, None), fan_in(embed) / GELU_SIZE),
            "out_bias": ArraySpec((outputs,), (None,)),
        }

    return {
        "encoder": encoder,
        "instruction": ArraySpec((dim,), (None,), fan_in(dim)),
        "instruction_mlp": mlp(embed),
        "mlp": mlp(tokens * embed),
    }


def hidden(params: Tree, v: Float[Array, "... E"]) -> Float[Array, "... D"]:
    """The first half of an MLP: GELU(Linear(sqrt(E) v))."""
    return jax.nn.gelu(v * v.shape[-1] ** 0.5 @ params["hidden"] + params["hidden_bias"], approximate=False)


def attend(query: Float[Array, "N E"], history: Float[Array, "N H E"], temperature: float) -> Float[Array, "N H"]:
    """w = softmax(x . h_i / T) over the items that are there (whose vector is not 0); all 0 where none is."""
    there = (history != 0).any(-1)
    score = jnp.where(there, jnp.einsum("ne,nhe->nh", query, history) / temperature, -jnp.inf)
    highest = jax.lax.stop_gradient(jnp.max(score, -1, keepdims=True, initial=-1e30))
    raised = jnp.where(there, jnp.exp(jnp.where(there, score - highest, 0)), 0)
    return raised / jnp.maximum(raised.sum(-1, keepdims=True), 1e-30)


def soft_tokens(
    params: Tree,
    query: Float[Array, "N E"],
    history: Float[Array, "N H E"],
    temperature: float,
    told: Float[Array, "N H E"] | None = None,
) -> Float[Array, "N P D"]:
    """[MLP'(I); P] of each query and history, elements of size 1 at first.

    The MLP's last layer is linear, so it is applied once, to the weighted mean of the hidden states: equal to the mean of
    the MLP's outputs, at a fraction of the cost.

    Args:
      params: the user embedder's.
      query: x, of unit length.
      history: h_i, of unit length or 0: what weighs an item, and where nothing else is given what the MLP reads.
      temperature: of the weights.
      told: ours: what the MLP reads of each item in place of h_i.
    """
    weight = attend(query, history, temperature)
    mean = jnp.einsum("nh,nhd->nd", weight, hidden(params["mlp"], history if told is None else told))
    # The weights sum to 1, or to 0 without history: then nothing is left, the bias included.
    personal = mean @ params["mlp"]["out"] + weight.sum(-1, keepdims=True) * params["mlp"]["out_bias"]
    own = params["instruction_mlp"]
    asked = hidden(own, params["instruction"]) @ own["out"] + own["out_bias"]
    personal = personal.reshape(len(query), -1, asked.shape[-1])
    return jnp.concatenate([jnp.broadcast_to(asked, (len(query), 1, asked.shape[-1])), personal], 1)
