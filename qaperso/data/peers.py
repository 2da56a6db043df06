"""Whom a person is compared with: representatives of the others who met the same item (DPL, arXiv 2503.02450)."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float
from sklearn.cluster import KMeans
from threadpoolctl import threadpool_limits

from qaperso.data.features import SVD_QUERIES, Tfidf, count_terms, fit_tfidf
from qaperso.data.store import Store

# Starts of k-means, the best of which is kept: one may run into a poor partition.
STARTS = 10


def representatives(vectors: Float[np.ndarray, "n d"], count: int, select: str, seed: int) -> list[int]:
    """Up to `count` of the others who stand for all of them.

    Args:
      vectors: row 0 is the person's own record, the other rows are the others'.
      count: n of the paper, at least 1.
      select: "kmeans" = as published: own and others' together in count + 1 clusters, the own one dropped, of each other
        cluster the member nearest to its centroid; "least_similar" = the lowest cosine with the own record; "random" =
        any (the paper's two ablations).
      seed: of k-means++ or of the draw.

    Returns:
      Numbers of rows, 1 or more, rising. Fewer than `count` where there are fewer others, or under k-means where fewer
      differ from each other and from the own record.
    """
    others = len(vectors) - 1
    if others < 1:
        return []
    if select == "random":
        drawn = np.random.default_rng(seed).permutation(others)[:count]
        return sorted(1 + int(i) for i in drawn)
    if select == "least_similar":
        lengths = np.linalg.norm(vectors, axis=1)
        cosine = (vectors[1:] @ vectors[0]) / np.maximum(lengths[1:] * lengths[0], 1e-12)
        return sorted(1 + int(i) for i in np.argsort(cosine, kind="stable")[:count])
    clusters = min(count + 1, len(np.unique(vectors, axis=0)))
    if clusters < 2:
        return []
    with threadpool_limits(1):
        found = KMeans(clusters, n_init=STARTS, random_state=seed).fit(vectors.astype(float))
    chosen = []
    for cluster in set(found.labels_.tolist()) - {int(found.labels_[0])}:
        members = np.flatnonzero(found.labels_ == cluster)
        distance = np.linalg.norm(vectors[members] - found.cluster_centers_[cluster], axis=1)
        chosen.append(int(members[distance.argmin()]))
    return sorted(chosen)


def record_seed(seed: int, name: str) -> int:
    """The seed of a record's own draws, 32 bits: whichever others are looked at, and in whatever order."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode("utf-8", "surrogatepass")).digest()[:4], "little")


# Of the few stores that a process has open.
@functools.lru_cache(maxsize=4)
def reply_features(store: Store) -> Tfidf:
    """TF-IDF and SVD features (`features.fit_tfidf`) of what responders say, fitted on the training split.

    `prepare` makes the like of queries; here it is the replies that are compared.
    """
    replies = [d.reply for d in store.dialogues if d.split == "train"]
    return fit_tfidf(replies[:SVD_QUERIES], count_terms(replies), len(replies), seed=0)


def reply_vectors(store: Store, replies: Sequence[str]) -> Float[np.ndarray, "n d"]:
    """float32[n, d] of replies, rows of length 1; 0 where no word is known."""
    return reply_features(store).vectors(replies)
