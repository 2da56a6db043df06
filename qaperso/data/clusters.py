"""Query clusters: contrast compares queriers only where they asked similar things."""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np
from sklearn.cluster import KMeans
from sklearn.feature_extraction.text import TfidfVectorizer

from qaperso.errors import UserError
from qaperso.types import Dialogue


def assign(dialogues: Sequence[Dialogue], count: int, seed: int) -> np.ndarray:
    """Cluster of each dialogue's query, int32[n]; TF-IDF of words and k-means, fitted on the training split only.

    Args:
      dialogues: with splits.
      count: how many clusters; 0 = as given by the data (`fields["cluster_id"]`).
      seed: of k-means.

    Raises:
      UserError: count is 0 and a dialogue has no cluster, or there are fewer distinct queries than clusters.
    """
    if count == 0:
        for d in dialogues:
            if "cluster_id" not in d.fields:
                raise UserError(
                    f"data.clusters=0 takes clusters from the data, but dialogue '{d.id}' has no cluster_id"
                )
        return np.array([d.fields["cluster_id"] for d in dialogues], np.int32)
    train = [d.query for d in dialogues if d.split == "train"]
    distinct = {query for query in train if re.search(r"\w", query)}
    if len(distinct) < count:
        raise UserError(
            f"data.clusters={count}, but the training split has {len(distinct)} distinct queries with a word in them; "
            "lower data.clusters"
        )
    # Any run of word characters is a word: the default pattern would drop "I" and "a", and all of "你 好".
    vectoriser = TfidfVectorizer(sublinear_tf=True, token_pattern=r"(?u)\w+", max_features=20_000)
    features = vectoriser.fit_transform(train)
    kmeans = KMeans(count, n_init=4, random_state=seed).fit(features)
    return kmeans.predict(vectoriser.transform([d.query for d in dialogues])).astype(np.int32)
