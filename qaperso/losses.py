"""Losses as sums and counts, and the prototype memory.

Every loss gives a numerator; the step divides by a count that does not depend on parameters, so that K micro-batches
give the gradient of one batch.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from qaperso.arrays import ArraySpec
from qaperso.data.contrast import anchors
from qaperso.models.linear import bits, product, unbits

Tree = Any
# Predictions of a row whose logits exist at a time.
CHUNK = 128


@jax.custom_vjp
def cross_entropy(
    hidden: Float[Array, "B T D"], table: Float[Array, "V D"], target: Int[Array, "B T"], weight: Float[Array, "B T"]
) -> Float[Array, "B T"]:
    """Weighted negative log-likelihood of each target, in nats, of logits hidden @ table.T.

    Logits of a chunk of predictions exist at a time, [B, T, V] never; their gradient to `hidden` is made while they do
    (the idea of fused linear cross-entropy, Hsu et al., arXiv 2410.10989).
    """
    chunks = tuple(map(_cut, (hidden, target, weight)))
    found = jax.lax.map(lambda chunk: _exponentials(chunk[0], table, chunk[1])[2] * chunk[2], chunks)
    return _join(found, hidden.shape[1])


def _cut(x: Array) -> Array:
    """[B, T, ...] as chunks of equal size, [n, B, c, ...]; what is added is zero."""
    t = x.shape[1]
    count = -(-t // CHUNK)
    size = -(-t // count)
    x = jnp.pad(x, [(0, 0), (0, count * size - t)] + [(0, 0)] * (x.ndim - 2))
    return jnp.moveaxis(x.reshape(x.shape[0], count, size, *x.shape[2:]), 1, 0)


def _join(x: Array, t: int) -> Array:
    """The inverse of `_cut`."""
    x = jnp.moveaxis(x, 0, 1)
    return x.reshape(x.shape[0], -1, *x.shape[3:])[:, :t]


def _exponentials(hidden: Array, table: Array, target: Array) -> tuple[Array, Array, Array]:
    """Of a chunk: exp(logits - highest) [B, c, V], their sums [B, c, 1], and losses [B, c]."""
    logits = product(hidden, table, ((2,), (1,)))
    highest = jnp.max(logits, -1, keepdims=True)
    own = jnp.take_along_axis(logits, target[..., None], -1)
    # The barrier has them computed once, not in each of their uses.
    raised = jax.lax.optimization_barrier(jnp.exp(logits - highest))
    total = raised.sum(-1, keepdims=True)
    return raised, total, (highest + jnp.log(total) - own)[..., 0]


def _cross_entropy_forward(hidden: Array, table: Array, target: Array, weight: Array) -> tuple[Array, tuple]:
    def one(chunk: tuple) -> tuple[Array, Array]:
        hidden, target, weight = chunk
        raised, total, loss = _exponentials(hidden, table, target)
        # softmax @ table - table[target], divided where it is narrow.
        slope = product(raised, table, ((2,), (0,))) / total - unbits(bits(table)[target])
        return loss * weight, (slope * weight[..., None]).astype(hidden.dtype)

    found = jax.lax.map(one, tuple(map(_cut, (hidden, target, weight))))
    loss, slope = (_join(x, hidden.shape[1]) for x in found)
    return loss, (hidden, table, target, weight, slope)


def _cross_entropy_backward(saved: tuple, d: Float[Array, "B T"]) -> tuple[Array, Array, None, None]:
    hidden, table, target, weight, slope = saved

    def add(to_table: Array, chunk: tuple) -> tuple[Array, None]:
        hidden, target, weight = chunk
        raised, total, _ = _exponentials(hidden, table, target)
        hot = jnp.arange(table.shape[0]) == target[..., None]
        return to_table + product((raised / total - hot) * weight[..., None], hidden, ((0, 1), (0, 1))), None

    # Where the table is frozen nothing reads this, and the compiler drops it.
    chunks = tuple(map(_cut, (hidden, target, weight * d)))
    to_table, _ = jax.lax.scan(add, jnp.zeros(table.shape, jnp.float32), chunks)
    return slope * d[..., None].astype(slope.dtype), to_table.astype(table.dtype), None, None


cross_entropy.defvjp(_cross_entropy_forward, _cross_entropy_backward)


def info_nce(
    view: Float[Array, "N P"],
    other: Float[Array, "K P"],
    positives: Bool[Array, "N K"],
    candidates: Bool[Array, "N K"],
    temperature: float,
) -> Float[Array, ""]:
    """Sum over anchors of the mean over positives of -log softmax over candidates of cos / temperature.

    The mean over positives stands outside the log (Khosla et al., arXiv 2004.11362, eq. 2).
    """
    scores = normalise(view) @ normalise(other).T / temperature
    low = jnp.finfo(scores.dtype).min
    log_z = jax.nn.logsumexp(jnp.where(candidates, scores, low), 1, keepdims=True)
    per_anchor = jnp.where(positives, log_z - scores, 0).sum(1) / jnp.maximum(positives.sum(1), 1)
    return jnp.where(anchors(positives, candidates), per_anchor, 0).sum()


def normalise(x: Float[Array, "... P"]) -> Float[Array, "... P"]:
    """Unit length; a zero vector stays zero and has a finite gradient."""
    square = jnp.sum(x * x, -1, keepdims=True)
    return jnp.where(square > 0, x * jax.lax.rsqrt(jnp.where(square > 0, square, 1.0)), 0.0)


def in_batch(
    view1: Float[Array, "N P"],
    view2: Float[Array, "N P"],
    positives: Bool[Array, "N N"],
    candidates: Bool[Array, "N N"],
    temperature: float,
) -> Float[Array, ""]:
    """Supervised InfoNCE between the two views of a batch, averaged over both directions; a sum over anchors."""
    forth = info_nce(view1, view2, positives, candidates, temperature)
    back = info_nce(view2, view1, positives, candidates, temperature)
    return (forth + back) / 2


def prototype(
    views: tuple[Float[Array, "N P"], Float[Array, "N P"]],
    means: Float[Array, "2 C P"],
    positives: Bool[Array, "N C"],
    candidates: Bool[Array, "N C"],
    temperature: float,
) -> Float[Array, ""]:
    """Cross-entropy of each view against class prototypes of the other view (arXiv 2412.11736); a sum over anchors.

    No gradient flows into prototypes. Averaged over both directions.
    """
    means = jax.lax.stop_gradient(means)
    forth = info_nce(views[0], means[1], positives, candidates, temperature)
    back = info_nce(views[1], means[0], positives, candidates, temperature)
    return (forth + back) / 2


# The prototype memory: one entry per class in each view. "means" keeps decayed sums and counts; "bank" keeps the last K
# views of each class, first in, first out (as published).


def declare_memory(kind: str, classes: int, dim: int, size: int) -> Tree:
    """Declares an empty memory of kind "means" or "bank" (`size` entries a class)."""
    if kind == "means":
        return {
            "sums": ArraySpec((2, classes, dim), (None, "classes", None)),
            "counts": ArraySpec((classes,), ("classes",)),
        }
    return {
        "entries": ArraySpec((2, classes, size, dim), (None, "classes", None, None)),
        "written": ArraySpec((classes,), ("classes",), dtype=jnp.int32),
    }


def read_memory(memory: Tree) -> tuple[Float[Array, "2 C P"], Bool[Array, " C"]]:
    """Class means in each view, and which classes have members; an empty class has mean zero."""
    if "sums" in memory:
        counts = memory["counts"]
        return memory["sums"] / jnp.where(counts > 0, counts, 1)[None, :, None], counts > 0
    entries, written = memory["entries"], memory["written"]
    held = jnp.minimum(written, entries.shape[2])
    return entries.sum(2) / jnp.maximum(held, 1)[None, :, None], written > 0


def clear_memory(memory: Tree, classes: Int[np.ndarray, " n"]) -> Tree:
    """The memory with some classes as empty as at first, and all others bit for bit."""
    axis = {"sums": 1, "counts": 0, "entries": 1, "written": 0}

    def clear(name: str, x: Array) -> Array:
        return x.at[classes].set(0) if axis[name] == 0 else x.at[:, classes].set(0)

    return {name: clear(name, x) for name, x in memory.items()}


def write_memory(memory: Tree, views: Float[Array, "2 N P"], label: Int[Array, " N"], decay: float = 1.0) -> Tree:
    """Adds a batch's views to their classes; dialogues labelled -1 are left out.

    means: a class with new members keeps `decay` of what it held. bank: several entries of one class in a batch get
    places of their own in order; of more than K the last K stay.
    """
    views = jax.lax.stop_gradient(views)
    if "sums" in memory:
        hot = jax.nn.one_hot(label, memory["counts"].shape[0])  # -1 gives zeros
        new = hot.sum(0)
        keep = jnp.where(new > 0, decay, 1.0)
        sums = memory["sums"] * keep[None, :, None] + jnp.einsum("nc,vnp->vcp", hot, views)
        return {"sums": sums, "counts": memory["counts"] * keep + new}
    entries, written = memory["entries"], memory["written"]
    classes, size = entries.shape[1:3]
    same = (label[:, None] == label[None, :]) & (label >= 0)[:, None]
    before = jnp.tril(same, -1).sum(1)
    after = jnp.triu(same, 1).sum(1)
    kept = (label >= 0) & (after < size)
    place = (written[jnp.maximum(label, 0)] + before) % size
    # Out-of-range classes are dropped by the scatter.
    row = jnp.where(kept, label, classes)
    entries = entries.at[:, row, place].set(views, mode="drop")
    written = written.at[jnp.where(label >= 0, label, classes)].add(1, mode="drop")
    return {"entries": entries, "written": written}
