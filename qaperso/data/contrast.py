"""Who is compared with whom: a pure function of the keys of dialogues and of class prototypes, for any part of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Int, Shaped

# {querier, responder, cluster, text, index: int32}, all of one length; see `contrast_masks`.
Keys = dict[str, Shaped[Any, " _"]]


def dialogue_keys(label: Int[Any, " N"], text: Int[Any, " N"], classes: Mapping[str, Int[np.ndarray, " C"]]) -> Keys:
    """Keys of a batch's dialogues.

    Args:
      label: class of each dialogue; -1 = not contrasted, so nobody's.
      text: id of each dialogue's text, 0 or more.
      classes: {querier, responder, cluster} of each class.
    """
    own = jnp.maximum(label, 0)
    keys = {name: jnp.asarray(value)[own] for name, value in classes.items()}
    keys["querier"] = jnp.where(label >= 0, keys["querier"], -1)
    return keys | {"text": jnp.asarray(text), "index": jnp.arange(label.size, dtype=jnp.int32)}


def class_keys(classes: Mapping[str, Int[np.ndarray, " C"]], held: Bool[Any, " C"] | None = None) -> Keys:
    """Keys of the classes' prototypes; nobody's where `held` says that a class has none."""
    keys = {name: jnp.asarray(value) for name, value in classes.items()}
    if held is not None:
        keys["querier"] = jnp.where(held, keys["querier"], -1)
    none = jnp.full_like(keys["querier"], -1)
    return keys | {"text": none, "index": none}


def contrast_masks(rows: Keys, columns: Keys) -> tuple[Bool[Any, "N K"], Bool[Any, "N K"]]:
    """Which columns are positives and which are candidates of each row (numpy or JAX; ours, after arXiv 2412.11736).

    Args:
      rows, columns: {querier, responder, cluster, text, index: int32[N]}. A negative querier is nobody: no positives,
        no candidates. Equal indices are one dialogue (seen in its two views); an index of -1 (a class prototype) is
        never the row's own.

    Returns:
      positives: same (responder, querier, cluster), and either another text or the dialogue itself.
      candidates: positives, and the other queriers of the same responder and cluster. Copies of the row's own text by
        its own querier are neither: they are as good as itself.
    """
    a = {k: v[:, None] for k, v in rows.items()}
    b = {k: v[None, :] for k, v in columns.items()}
    near = (a["responder"] == b["responder"]) & (a["cluster"] == b["cluster"])
    near = near & (a["querier"] >= 0) & (b["querier"] >= 0)
    same = near & (a["querier"] == b["querier"])
    itself = (a["index"] == b["index"]) & (a["index"] >= 0)
    positives = same & ((a["text"] != b["text"]) | itself)
    return positives, positives | (near & ~same)


def first_anchored(
    batches: Iterable[tuple[Int[np.ndarray, " _"], Int[np.ndarray, " _"]]],
    classes: Mapping[str, Int[np.ndarray, " C"]],
    prototypes: bool,
) -> int | None:
    """The number of the first batch in which a dialogue has a positive and a negative; None where there is no such batch.

    Args:
      batches: label and text of each batch's dialogues, see `dialogue_keys`.
      classes: {querier, responder, cluster} of each class.
      prototypes: compared with those of the classes that earlier batches had, instead of with one another.
    """
    held = np.zeros(len(classes["querier"]), bool)
    for number, (label, text) in enumerate(batches):
        rows = dialogue_keys(label, text, classes)
        positives, candidates = contrast_masks(rows, class_keys(classes, held) if prototypes else rows)
        if (positives.any(1) & (candidates & ~positives).any(1)).any():
            return number
        held[label[label >= 0]] = True
    return None
