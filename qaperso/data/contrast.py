"""Who is compared with whom: one pure function for a whole batch on the host and for prototypes on the device."""

from __future__ import annotations

from typing import Any

from jaxtyping import Bool, Shaped


def contrast_masks(
    rows: dict[str, Shaped[Any, " N"]], columns: dict[str, Shaped[Any, " K"]]
) -> tuple[Bool[Any, "N K"], Bool[Any, "N K"]]:
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


def anchors(positives: Bool[Any, "N K"], candidates: Bool[Any, "N K"]) -> Bool[Any, " N"]:
    """Rows with a positive and a negative: without a negative the term is constant."""
    return positives.any(1) & (candidates & ~positives).any(1)
