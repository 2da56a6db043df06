"""Vectors of queries: the words of a query weighted by TF-IDF and projected by a truncated SVD.

Whatever fits the vectors is drawn and counted a shard at a time and merged, with results that do not depend on how the
data was cut into shards or in which order they come. A query's vector does not depend on the other queries, to the last
bit: no matrix product here goes through BLAS, whose rounding changes with the number of rows and of threads.
"""

from __future__ import annotations

import collections
import dataclasses
import hashlib
import heapq
import itertools
import math
import re
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import scipy.sparse
from sklearn.decomposition import TruncatedSVD
from threadpoolctl import threadpool_limits

from qaperso.errors import UserError, nearest
from qaperso.types import Dialogue

TURNS = ("last", "all")
DIMS = 100
VOCABULARY = 20_000
SVD_QUERIES = 50_000

# Any run of word characters is a word, those of one letter too; Chinese and Japanese, which put no blanks between
# words, are taken by the character.
_HAN_KANA = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
WORD = re.compile(rf"[{_HAN_KANA}]|[^\W{_HAN_KANA}]+")


def query_text(dialogue: Dialogue, turns: str = "last") -> str:
    """What a dialogue asks: the querier's last turn, or all the querier's turns joined by newlines.

    Args:
      dialogue: "" results when the querier says nothing in it.
      turns: "last" or "all".

    Raises:
      UserError: `turns` is neither.
    """
    if turns not in TURNS:
        raise UserError(f"query turns: found {turns!r}, expected 'last' or 'all'{nearest(turns, TURNS)}")
    if turns == "last":
        return dialogue.query
    return "\n".join(t.text for t in dialogue.turns[:-1] if t.speaker == dialogue.querier)


def words(text: str) -> list[str]:
    """The words of a text in lower case; none where it holds only punctuation or emoji."""
    return WORD.findall(text.lower())


def count_terms(texts: Iterable[str]) -> collections.Counter[str]:
    """In how many of the texts each word occurs; the counts of shards add up to those of the whole."""
    counts: collections.Counter[str] = collections.Counter()
    for text in texts:
        counts.update(set(words(text)))
    return counts


def draw_queries(dialogues: Iterable[Dialogue], limit: int, seed: int, turns: str = "last") -> list[tuple[bytes, str]]:
    """A uniform sample of a shard's training queries, to be joined with those of other shards.

    The dialogues with the smallest digests of seed and id are drawn (bottom-k sampling), so that the sample of the
    whole is the sample of the shards' samples.

    Args:
      dialogues: with splits; only those for training are drawn.
      limit: of the sample's size.
      seed: of the draw.
      turns: see `query_text`.

    Returns:
      (digest, query) in ascending order.
    """

    def pair(dialogue: Dialogue) -> tuple[bytes, str]:
        name = f"{seed}:{dialogue.id}".encode("utf-8", "surrogatepass")
        return hashlib.blake2b(name, digest_size=16).digest(), query_text(dialogue, turns)

    return heapq.nsmallest(limit, (pair(d) for d in dialogues if d.split == "train"))


def merge_draws(parts: Iterable[Sequence[tuple[bytes, str]]], limit: int) -> list[tuple[bytes, str]]:
    """The sample of the whole from the shards' samples, each drawn with this limit or a higher one."""
    return heapq.nsmallest(limit, itertools.chain.from_iterable(parts))


def normalise(vectors: np.ndarray) -> np.ndarray:
    """Rows of Euclidean length 1, float32[n, d]; a row that is 0 but for rounding becomes 0."""
    rows = np.ascontiguousarray(vectors, np.float32)
    lengths = np.sqrt((rows * rows).sum(1, keepdims=True))
    return np.where(lengths > 1e-6, rows / np.maximum(lengths, 1e-6), np.float32(0))


@dataclasses.dataclass(frozen=True, eq=False)
class Tfidf:
    """Fitted TF-IDF features.

    Attributes:
      terms: the vocabulary, V words in sorted order.
      idf: float32[V].
      projection: float32[V, d], onto the leading right singular vectors.
    """

    terms: tuple[str, ...]
    idf: np.ndarray
    projection: np.ndarray

    def weights(self, texts: Sequence[str]) -> scipy.sparse.csr_matrix:
        """float32[n, V]: (1 + ln tf) idf, rows of length 1; a row is 0 where no word is in the vocabulary."""
        return _weights(texts, {term: i for i, term in enumerate(self.terms)}, self.idf)

    def vectors(self, texts: Sequence[str]) -> np.ndarray:
        """float32[n, d], rows of length 1 or 0; each row depends on its own text only, bit for bit."""
        # The product of a sparse and a dense matrix is a plain loop over the entries of each row.
        return normalise(self.weights(texts) @ self.projection)


def fit_tfidf(
    texts: Sequence[str],
    counts: Mapping[str, int],
    documents: int,
    seed: int,
    dims: int = DIMS,
    size: int = VOCABULARY,
    min_count: int = 1,
) -> Tfidf:
    """Fits the features (latent semantic analysis, Deerwester et al. 1990) on one thread.

    Args:
      texts: of training queries, in an order that does not depend on the shards (see `draw_queries`); the SVD is
        fitted on the first SVD_QUERIES.
      counts: in how many training queries each word occurs, see `count_terms`.
      documents: the number of training queries.
      seed: of the randomised SVD.
      dims: of the vectors; fewer where there are fewer words or texts. No more words than this: no projection.
      size: of the vocabulary: the words of the most queries, of equally frequent ones the first in sorted order.
      min_count: words that occur in fewer queries are left out.

    Returns:
      The features, with idf = 1 + ln((1 + documents) / (1 + count)).
    """
    frequent = heapq.nsmallest(size, ((-n, term) for term, n in counts.items() if n >= min_count))
    terms = tuple(sorted(term for _, term in frequent))
    idf = np.array([1 + math.log((1 + documents) / (1 + counts[term])) for term in terms], np.float32)
    if len(terms) <= dims:
        return Tfidf(terms, idf, np.eye(len(terms), dtype=np.float32))
    matrix = _weights(texts[:SVD_QUERIES], {term: i for i, term in enumerate(terms)}, idf)
    with threadpool_limits(1):
        svd = TruncatedSVD(min(dims, matrix.shape[0]), n_iter=7, random_state=seed).fit(matrix)
    return Tfidf(terms, idf, np.ascontiguousarray(svd.components_.T, np.float32))


def _weights(texts: Sequence[str], place: Mapping[str, int], idf: np.ndarray) -> scipy.sparse.csr_matrix:
    indices: list[int] = []
    values: list[float] = []
    starts = [0]
    for text in texts:
        known = sorted(collections.Counter(place[w] for w in words(text) if w in place).items())
        row = [(1 + math.log(n)) * float(idf[i]) for i, n in known]
        length = math.sqrt(sum(value * value for value in row))
        indices += [i for i, _ in known]
        values += [value / length for value in row]
        starts.append(len(indices))
    return scipy.sparse.csr_matrix((np.array(values, np.float32), indices, starts), (len(texts), len(place)))
