"""Can the querier be told from the specific tower's embedding of a dialogue, by a model that was not told who asks?

All dialogues are read with the stranger's row, since an embedding that has seen the querier's own could copy it; and once
with names visible, once masked, since names stand in the text. Queriers are compared within (responder, cluster), as the
contrast does (arXiv 2412.11736); the measures are ours but for the silhouette (Rousseeuw, 1987).
"""

from __future__ import annotations

import collections
import dataclasses
import functools
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Float, Int
from sklearn.metrics import silhouette_samples

from qaperso.data import load, paper
from qaperso.data.batches import sequential
from qaperso.data.store import Store
from qaperso.eval.awareness import encoder
from qaperso.eval.intervals import LEVEL, macro
from qaperso.eval.scores import scoring_shape
from qaperso.mesh import host_copy, put_batch
from qaperso.methods import Setting, base
from qaperso.run import Run
from qaperso.types import STRANGER, Batch

Tree = Any
Metrics = dict[str, dict[str, float]]

# Training dialogues of a class that make its centroid, at most.
EACH = 16


@dataclasses.dataclass(frozen=True, eq=False)
class Embedded:
    """Embeddings of n dialogues and whose they are.

    Attributes:
      vectors: float64[n, D].
      index: int64[n], places in the store.
      querier, responder, group: str[n], names.
      cluster: int64[n].
    """

    vectors: np.ndarray
    index: np.ndarray
    querier: np.ndarray
    responder: np.ndarray
    group: np.ndarray
    cluster: np.ndarray


@dataclasses.dataclass(frozen=True, eq=False)
class Retrieval:
    """What was measured.

    Attributes:
      metrics: those of `scores`, and with names masked the same under `NAME_masked`, but for chance.
      train, test: what they were computed from, {"visible": ..., "masked": ...}; {} for a run without embeddings.
      absent: {metric: why it is not there}.
    """

    metrics: Metrics
    train: dict[str, Embedded]
    test: dict[str, Embedded]
    absent: dict[str, str]


def measure(run: Run, trainable: Tree, store: Store, split: str) -> Retrieval:
    """Retrieval of the queriers of a split by the centroids of training.

    Raises:
      UserError: no dialogue of the split fits a row.
    """
    train, test, metrics = {}, {}, {}
    known = centroid_dialogues(store, split)
    for names, suffix in (("visible", ""), ("masked", "_masked")):
        found = embed(run, trainable, store, store.split(split), names)
        if found is None:
            reason = "the run was trained without contrast: it has no dialogue embeddings"
            return Retrieval({}, {}, {}, {"retrieval_top1": reason, "silhouette": reason})
        test[names], train[names] = found, embed(run, trainable, store, known, names)
        for name, metric in scores(train[names], test[names]).items():
            if not (suffix and name.endswith("chance")):
                metrics[name + suffix] = metric
    absent = {}
    if split == "train":
        absent["retrieval_top1"] = "the train split's own dialogues make the centroids"
    elif "retrieval_top1" not in metrics:
        absent["retrieval_top1"] = (
            f"no dialogue of the {split} split has a responder and cluster in which training has its querier and another"
        )
    if "silhouette" not in metrics:
        absent["silhouette"] = f"no responder and cluster of the {split} split has two queriers, one of them twice"
    return Retrieval(metrics, train, test, absent)


def scores(train: Embedded, test: Embedded, level: float = LEVEL) -> Metrics:
    """How well the nearest centroid tells who asked; means over queriers, intervals that resample queriers and groups.

    For each dialogue the queriers whom training has in its responder and cluster are ranked by the Euclidean distance from
    the mean of their embeddings there; counted are dialogues with two such queriers or more, the true one among them.
    Those at the same distance share their ranks.

    - `retrieval_top1`: how often the true querier is first;
    - `retrieval_mrr`: mean of 1 / rank;
    - `retrieval_chance`, `retrieval_mrr_chance`: the same for ranks drawn at random, on average;
    - `silhouette`: of the split's own embeddings by querier, over responders and clusters with two queriers or more; from
      -1 to 1, 0 for whoever has one dialogue there.

    Returns:
      Without the first four where no dialogue counts, without the last where no cluster does.
    """
    found = {name: np.full(len(test.index), np.nan) for name in ("top1", "mrr", "chance", "mrr_chance")}
    silhouette = np.full(len(test.index), np.nan)
    for mine, members in _cells(train, test):
        ranked = _ranks(train, test, mine, members)
        if ranked is not None:
            rows, columns = ranked
            for name, values in columns.items():
                found[name][rows] = values
        if 2 <= len(set(test.querier[mine].tolist())) < len(mine):
            silhouette[mine] = silhouette_samples(test.vectors[mine], test.querier[mine])
    metrics = {f"retrieval_{name}": _macro(values, test, level) for name, values in found.items()}
    metrics["silhouette"] = _macro(silhouette, test, level)
    for name in ("retrieval_chance", "retrieval_mrr_chance"):
        metrics[name] |= {"low": metrics[name]["value"], "high": metrics[name]["value"]}
    return {name: metric for name, metric in metrics.items() if metric["n"]}


def _cells(train: Embedded, test: Embedded) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The places of each (responder, cluster) of the test side, and those of the same one on the training side."""
    for responder, cluster in sorted(set(zip(test.responder.tolist(), test.cluster.tolist(), strict=True))):
        mine, members = (
            np.flatnonzero((side.responder == responder) & (side.cluster == cluster)) for side in (test, train)
        )
        yield mine, members


def _ranks(
    train: Embedded, test: Embedded, mine: np.ndarray, members: np.ndarray
) -> tuple[np.ndarray, dict[str, np.ndarray]] | None:
    """The places of those of `mine` that can be retrieved, and what each of them scores; None where nobody can be."""
    names = np.array(sorted(set(train.querier[members].tolist())), object)
    rows = mine[np.isin(test.querier[mine].astype(str), names.astype(str))]
    if len(names) < 2 or not len(rows):
        return None
    centroids = np.stack([train.vectors[members[train.querier[members] == name]].mean(0) for name in names])
    distance = np.stack([np.square(centroids - vector).sum(1) for vector in test.vectors[rows]])
    own = distance[test.querier[rows][:, None] == names][:, None]
    nearer, tied = (distance < own).sum(1), (distance == own).sum(1)
    # Sums of 1 / rank, so that the mean over tied ranks is a difference.
    harmonic = np.concatenate([[0.0], np.cumsum(1 / np.arange(1, len(names) + 1))])
    chance, mrr_chance = (np.full(len(rows), total / len(names)) for total in (1.0, harmonic[-1]))
    mrr = (harmonic[nearer + tied] - harmonic[nearer]) / tied
    return rows, {"top1": (nearer == 0) / tied, "mrr": mrr, "chance": chance, "mrr_chance": mrr_chance}


def _macro(values: np.ndarray, points: Embedded, level: float) -> dict[str, float]:
    """The mean over queriers of the values that are there."""
    there = ~np.isnan(values)
    who, where = points.querier[there].tolist(), points.group[there].tolist()
    if not who:
        return {"value": float("nan"), "low": float("nan"), "high": float("nan"), "n": 0}
    return macro(values[there], np.ones(len(who)), who, where, level=level)


def centroid_dialogues(store: Store, split: str) -> np.ndarray:
    """Training dialogues of the responders and clusters of a split, int64[m]: EACH of a class at most, evenly spread.

    None for the training split: its dialogues would be compared with themselves.
    """
    wanted = {(store.responder[i], store.cluster[i]) for i in store.split(split) if split != "train"}
    classes = collections.defaultdict(list)
    for i in store.split("train"):
        if (store.responder[i], store.cluster[i]) in wanted:
            classes[int(store.label[i])].append(int(i))
    chosen = []
    for members in classes.values():
        count = min(EACH, len(members))
        chosen += [members[k * len(members) // count] for k in range(count)]
    return np.array(sorted(chosen), np.int64)


def embed(run: Run, trainable: Tree, store: Store, indices: np.ndarray, names: str) -> Embedded | None:
    """Dialogue embeddings of the dialogues at `indices`, asked by strangers; without those that do not fit a row.

    Those of a dialogue of several sequences are averaged by their numbers of responder tokens.

    Args:
      names: "visible" or "masked".

    Returns:
      None for a run without embeddings.

    Raises:
      UserError: none of the dialogues fits a row.
    """
    unmet = dataclasses.replace(store, row=np.full_like(store.row, STRANGER))
    examples, _ = load.encode_split(unmet, indices, encoder(run, names), run.shape)
    vectors, counts = np.zeros((len(examples), run.setting.model.embed)), np.zeros(len(examples))
    with jax.set_mesh(run.mesh):
        for batch, rows in sequential(examples, scoring_shape(run)):
            if run.config.compat == "paper":
                batch = paper.as_published(batch, run.setting.model.eos_ids[0])
            found = batch_embeddings(run.setting, run.method, trainable, run.base, put_batch(batch, run.mesh, 0))
            if found is None:
                return None
            pooled, number = host_copy(found)
            for r, row in enumerate(rows):
                vectors[row], counts[row] = pooled[r, : len(row)], number[r, : len(row)]
    index, member = np.unique(np.array([e.index for e in examples], np.int64), return_inverse=True)
    total, tokens = np.zeros((len(index), vectors.shape[1])), np.bincount(member, counts, len(index))
    np.add.at(total, member, vectors * counts[:, None])
    index, total, tokens = (x[tokens > 0] for x in (index, total, tokens))
    named = {
        key: np.array([getattr(store.dialogues[i], key) for i in index], object)
        for key in ("querier", "responder", "group")
    }
    return Embedded(total / tokens[:, None], index, **named, cluster=store.cluster[index].astype(np.int64))


@functools.partial(jax.jit, static_argnums=(0, 1))
def batch_embeddings(
    setting: Setting, method: ModuleType, trainable: Tree, frozen: Tree, batch: Batch
) -> tuple[Float[Array, "B M D"], Int[Array, "B M"]] | None:
    """The method's embeddings of a batch's dialogues and their numbers of responder tokens, None where it has none."""
    params = trainable.get("base", frozen)
    states = base.states(setting, params, batch.inputs, method.condition(setting, trainable, batch.inputs))
    return method.embeddings(setting, trainable, batch.inputs, states)
