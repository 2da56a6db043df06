"""Losses as sums and counts, and the prototype memory.

Every loss gives a numerator; the step divides by a count that does not depend on parameters, so that K micro-batches
give the gradient of one batch.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from qaperso.arrays import BATCH_AXES, ArraySpec, divides, platform
from qaperso.data.contrast import Keys, contrast_masks
from qaperso.models.linear import bits, product, unbits

Tree = Any
# Predictions of a row whose logits exist at a time.
CHUNK = 128
# Anchors, and candidates, whose scores exist at a time.
TILE = 512


@jax.custom_vjp
def cross_entropy(
    hidden: Float[Array, "B T D"], table: Float[Array, "V D"], target: Int[Array, "B T"], weight: Float[Array, "B T"]
) -> Float[Array, "B T"]:
    """Weighted negative log-likelihood of each target, in nats, of logits hidden @ table.T.

    Logits of a chunk of predictions exist at a time, [B, T, V] never; their gradient to `hidden` is made while they do
    (the idea of fused linear cross-entropy, Hsu et al., arXiv 2410.10989). On CPUs a chunk without weight is not
    computed: a row has room for more predictions than most rows make, and those it makes come first. Elsewhere that is left to be
    measured: many rows on many devices rarely leave a chunk without any.
    """

    def one(chunk: tuple) -> Array:
        hidden, target, weight = chunk
        return _exponentials(hidden, table, target)[2] * weight

    return _join(_each(one, hidden, target, weight), hidden.shape[1])


def _each(one: Callable[[tuple], Tree], *rows: Array) -> Tree:
    """What `one` makes of each chunk of rows [B, T, ...]; on CPUs zeros where the last of them, their weight, is all zero."""
    chunks = tuple(map(_cut, rows))
    if platform() != "cpu":
        return jax.lax.map(one, chunks)
    nothing = jax.tree.map(jnp.zeros_like, jax.eval_shape(one, tuple(x[0] for x in chunks)))
    weighed = (chunks[-1] != 0).any((1, 2))
    return jax.lax.map(lambda x: jax.lax.cond(x[0], one, lambda _: nothing, x[1]), (weighed, chunks))


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

    loss, slope = (_join(x, hidden.shape[1]) for x in _each(one, hidden, target, weight))
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
    view: Float[Array, "N P"], other: Float[Array, "K P"], rows: Keys, columns: Keys, temperature: float
) -> Float[Array, ""]:
    """Sum over anchors of the mean over positives of -log softmax over candidates of cos / temperature.

    The mean over positives stands outside the log (Khosla et al., arXiv 2004.11362, eq. 2). Scores and masks of a tile of
    anchors and a tile of candidates exist at a time, those of all never, forward and backward (the idea of Cheng et al.,
    arXiv 2410.17243). Under a mesh each device has the anchors of its own rows, and all candidates.

    Args:
      view, other: representations of anchors and of candidates.
      rows, columns: their keys, which say who is a positive and who a candidate, see `contrast_masks`.
      temperature: what cosines are divided by.
    """
    each = functools.partial(_anchor_losses, temperature)
    return _by_rows(each, (normalise(view), rows), (normalise(other), columns)).sum()


def count_anchors(rows: Keys, columns: Keys) -> Float[Array, ""]:
    """How many rows have a positive and a negative among the columns: the denominator of `info_nce`."""
    return _by_rows(_are_anchors, rows, columns).sum().astype(jnp.float32)


def _are_anchors(rows: Keys, columns: Keys) -> Bool[Array, " N"]:
    def one(rows: Keys) -> Array:
        def add(found: tuple, columns: Keys) -> tuple[tuple, None]:
            positives, candidates = contrast_masks(columns, rows)
            return (found[0] | positives.any(0), found[1] | (candidates & ~positives).any(0)), None

        nothing = jnp.zeros_like(rows["querier"], bool)
        (positive, negative), _ = jax.lax.scan(add, (nothing, nothing), _tiles(columns))
        return positive & negative

    return _whole(jax.lax.map(one, _tiles(rows)), rows["querier"].size)


def _by_rows(each: Callable[[Tree, Tree], Array], anchored: Tree, others: Tree) -> Array:
    """each(anchored, others), a value for each of N anchors; where a mesh is in force, by every device for its own."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or not divides(mesh, BATCH_AXES, jax.tree.leaves(anchored)[0].shape[0]):
        return each(anchored, others)

    def own(anchored: Tree, others: Tree) -> Array:
        # The gradient to what all devices share is the sum of theirs.
        return each(anchored, jax.tree.map(lambda x: jax.lax.pcast(x, BATCH_AXES, to="varying"), others))

    rows = PartitionSpec(BATCH_AXES)
    return jax.shard_map(own, in_specs=(rows, PartitionSpec()), out_specs=rows)(anchored, others)


def _tiles(tree: Tree) -> Tree:
    """Leaves [N, ...] as tiles of equal size, [n, c, ...]; what is added is zero, or of nobody."""

    def leaf(x: Array) -> Array:
        count = -(-x.shape[0] // TILE)
        size = -(-x.shape[0] // count)
        fill = 0 if jnp.issubdtype(x.dtype, jnp.floating) else -1
        x = jnp.pad(x, [(0, count * size - x.shape[0])] + [(0, 0)] * (x.ndim - 1), constant_values=fill)
        return x.reshape(count, size, *x.shape[1:])

    return jax.tree.map(leaf, tree)


def _whole(x: Array, size: int) -> Array:
    """The inverse of `_tiles`, of one array."""
    return x.reshape(-1, *x.shape[2:])[:size]


def _compared(temperature: float, anchored: tuple[Array, Keys], others: tuple[Array, Keys]) -> tuple[Array, ...]:
    """Of a tile of anchors and one of candidates: scores, and who is a positive and who a candidate, each [candidates, anchors].

    Sums over candidates run over the first dimension, which CPUs do for many anchors at once; the masks are symmetric.
    """
    return others[0] @ anchored[0].T / temperature, *contrast_masks(others[1], anchored[1])


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _anchor_losses(temperature: float, anchored: tuple[Array, Keys], others: tuple[Array, Keys]) -> Float[Array, " N"]:
    """The loss of each anchor, 0 where a row is none; representations have unit length."""
    return _anchor_losses_forward(temperature, anchored, others)[0]


def _anchor_losses_forward(temperature: float, anchored: tuple, others: tuple) -> tuple[Array, tuple]:
    def one(anchored: tuple) -> tuple[Array, Array, Array]:
        zero = jnp.zeros_like(anchored[0][:, 0])
        low = jnp.full_like(zero, jnp.finfo(zero.dtype).min)

        def add(sums: tuple, others: tuple) -> tuple[tuple, None]:
            highest, total, near, positive, negative = sums
            scores, positives, candidates = _compared(temperature, anchored, others)
            scored = jnp.where(candidates, scores, low)
            top = jnp.maximum(highest, scored.max(0))
            total = total * jnp.exp(highest - top) + jnp.exp(scored - top).sum(0)
            near += jnp.where(positives, scores, 0).sum(0)
            negatives = (candidates & ~positives).sum(0)
            return (top, total, near, positive + positives.sum(0), negative + negatives), None

        (highest, total, near, positive, negative), _ = jax.lax.scan(add, (low, zero, zero, zero, zero), tiles)
        # Without a candidate all scores are as low as can be, and so is the normaliser; such a row has no share.
        log_z = highest + jnp.log(total)
        share = jnp.where((positive > 0) & (negative > 0), 1 / jnp.maximum(positive, 1), 0)
        return jnp.where(share > 0, log_z - near * share, 0), log_z, share

    tiles = _tiles(others)
    loss, log_z, share = jax.lax.map(one, _tiles(anchored))
    return _whole(loss, anchored[0].shape[0]), (anchored, others, log_z, share)


def _anchor_losses_backward(temperature: float, saved: tuple, d: Float[Array, " N"]) -> tuple[tuple, tuple]:
    anchored, others, log_z, share = saved

    def one(to_others: Array, given: tuple) -> tuple[Array, Array]:
        anchored, log_z, share, d = given
        whole, each = (x / temperature for x in (jnp.where(share > 0, d, 0), d * share))

        def add(to_view: Array, others: tuple) -> tuple[Array, Array]:
            scores, positives, candidates = _compared(temperature, anchored, others)
            chosen = jnp.exp(jnp.where(candidates, scores - log_z, -jnp.inf))
            slope = whole * chosen - each * positives
            return to_view + slope.T @ others[0], slope @ anchored[0]

        to_view, more = jax.lax.scan(add, jnp.zeros_like(anchored[0]), tiles)
        return to_others + more, to_view

    tiles = _tiles(others)
    to_others, to_view = jax.lax.scan(one, jnp.zeros_like(tiles[0]), (_tiles(anchored), log_z, share, _tiles(d)))
    return (_whole(to_view, anchored[0].shape[0]), None), (_whole(to_others, others[0].shape[0]), None)


_anchor_losses.defvjp(_anchor_losses_forward, _anchor_losses_backward)


def normalise(x: Float[Array, "... P"]) -> Float[Array, "... P"]:
    """Unit length; a zero vector stays zero and has a finite gradient."""
    square = jnp.sum(x * x, -1, keepdims=True)
    return jnp.where(square > 0, x * jax.lax.rsqrt(jnp.where(square > 0, square, 1.0)), 0.0)


def in_batch(
    views: tuple[Float[Array, "N P"], Float[Array, "N P"]], keys: Keys, temperature: float
) -> Float[Array, ""]:
    """Supervised InfoNCE between the two views of a batch, averaged over both directions; a sum over anchors."""
    forth = info_nce(views[0], views[1], keys, keys, temperature)
    back = info_nce(views[1], views[0], keys, keys, temperature)
    return (forth + back) / 2


def prototype(
    views: tuple[Float[Array, "N P"], Float[Array, "N P"]],
    means: Float[Array, "2 C P"],
    rows: Keys,
    columns: Keys,
    temperature: float,
) -> Float[Array, ""]:
    """Cross-entropy of each view against class prototypes of the other view (arXiv 2412.11736); a sum over anchors.

    No gradient flows into prototypes. Averaged over both directions. `rows` are the keys of dialogues, `columns` of classes.
    """
    means = jax.lax.stop_gradient(means)
    forth = info_nce(views[0], means[1], rows, columns, temperature)
    back = info_nce(views[1], means[0], rows, columns, temperature)
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

        def add(found: tuple, tile: tuple) -> tuple[tuple, None]:
            label, views = tile
            hot = jax.nn.one_hot(label, memory["counts"].shape[0])  # -1 gives zeros
            return (found[0] + hot.sum(0), found[1] + jnp.einsum("nc,nvp->vcp", hot, views)), None

        tiles = _tiles((label, jnp.moveaxis(views, 0, 1)))
        (new, more), _ = jax.lax.scan(add, jax.tree.map(jnp.zeros_like, (memory["counts"], memory["sums"])), tiles)
        keep = jnp.where(new > 0, decay, 1.0)
        sums = memory["sums"] * keep[None, :, None] + more
        return {"sums": sums, "counts": memory["counts"] * keep + new}
    entries, written = memory["entries"], memory["written"]
    classes, size = entries.shape[1:3]
    # How many of its class come before and after each: its place in the order of classes, less where its class begins.
    order = jnp.argsort(label, stable=True)
    place, ordered = jnp.argsort(order), label[order]
    before = place - jnp.searchsorted(ordered, label, side="left")
    after = jnp.searchsorted(ordered, label, side="right") - 1 - place
    kept = (label >= 0) & (after < size)
    place = (written[jnp.maximum(label, 0)] + before) % size
    # Out-of-range classes are dropped by the scatter.
    row = jnp.where(kept, label, classes)
    entries = entries.at[:, row, place].set(views, mode="drop")
    written = written.at[jnp.where(label >= 0, label, classes)].add(1, mode="drop")
    return {"entries": entries, "written": written}
