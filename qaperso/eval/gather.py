"""What a page on a run shows, gathered from the run, its data, its files and its scores."""

from __future__ import annotations

import collections
import dataclasses
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from sklearn.decomposition import PCA
from sklearn.manifold import TSNE
from threadpoolctl import threadpool_limits

from qaperso import config as configs
from qaperso import people, reply
from qaperso.data import clusters, features
from qaperso.data.store import STRANGER_NAME, Registry, Store, evenly
from qaperso.eval import awareness, compare
from qaperso.eval.compare import Items
from qaperso.eval.page import Across, Failure, Report
from qaperso.eval.plots import Map
from qaperso.eval.predictions import Record
from qaperso.eval.retrieval import Embedded
from qaperso.mesh import host_copy
from qaperso.models import quantized
from qaperso.run import Run

Tree = Any
CURVES = ("loss", "lm", "contrast", "dev_nll")
# Points of a curve and of a map, clusters that are mapped, training queries that are looked at, and dialogues shown.
CURVE_POINTS, MAP_POINTS, MAPS, QUERIES, WORST = 1000, 400, 8, 20_000, 6
# t-SNE of fewer points than this shows nothing that PCA does not.
TSNE_POINTS = 30
QUESTIONS, ASKERS = 4, 6
EXAMPLES = 4


def report(
    run: Run,
    trainable: Tree,
    store: Store,
    split: str,
    step: int,
    items: Items,
    records: Sequence[Record],
    embedded: Embedded | None,
) -> Report:
    """All of a page but the tables of metrics, which compare runs.

    Args:
      run, trainable, step: what was scored, and of which checkpoint.
      store, split: on what.
      items: scores of its dialogues.
      records: of `predictions.collect`, of the split's dialogues or some of them.
      embedded: the split's dialogues, with names visible; None where the method has no embeddings.
    """
    curves = read_curves(run.workdir / "metrics.jsonl")
    lengths = tuple([len(features.words(r[key])) for r in records] for key in ("reply", "reference"))
    return Report(
        title=f"{run.workdir.resolve().name}: {split} split",
        summary=summary(run, trainable, store, split, step),
        config=changed_keys(run.config),
        curves=curves,
        chosen=step if curves else None,
        swap=compare.by_querier(items, "swap_gap"),
        maps=maps(store, embedded.vectors, embedded.index) if embedded else (),
        clusters=cluster_rows(store),
        failures=failures(store, split, items, records),
        lengths=lengths if records else None,
    )


def summary(run: Run, trainable: Tree, store: Store, split: str, step: int) -> dict[str, str]:
    """What was trained, on what, and how large it is."""
    config, names = run.config, run.registry
    count = collections.Counter(d.split for d in store.dialogues)
    trained, frozen = (sum(x.size for x in quantized.leaves(tree)) for tree in (trainable, run.base))
    g = config.generate
    drawn = f"temperature {g.temperature:g}, top-p {g.top_p:g}" if g.temperature else "greedy"
    return {
        "method": config.method + (f" (compat {config.compat})" if config.compat else ""),
        "base": f"{config.base} (sha256 {run.record['base']['sha256'][:12]})",
        "data": config.data.path or config.data.format,
        "dialogues": ", ".join(f"{n:,} {name}" for name, n in sorted(count.items(), key=lambda x: str(x[0]))),
        "people": f"queriers: {len(names.known)}, responders: {len(names.responders)}, clusters: {run.setting.clusters}",
        "names in the text": config.data.names,
        "scored": f"{split} split, checkpoint of step {step:,} of {config.steps:,}",
        "parameters": f"{trained:,} trained, {frozen:,} frozen",
        "replies": f"{drawn}, at most {g.max_new_tokens} tokens",
        "seed": str(config.seed),
    }


def changed_keys(config: Any) -> list[tuple[str, str, bool]]:
    """Every key of a configuration with its value and whether that is not the default."""
    default = configs.default()
    values = ((key, configs.get(config, key)) for key in configs.keys(config))
    return [(key, str(value), value != configs.get(default, key)) for key, value in values]


def read_curves(path: Path) -> dict[str, list[tuple[int, float]]]:
    """Losses by step from a run's metrics.jsonl, thinned to CURVE_POINTS; {} where there is none.

    Lines that a kill cut off are left out, as `metrics.cut_back` would.
    """
    found: dict[str, list[tuple[int, float]]] = {}
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
        try:
            values = json.loads(line)
            new = {name: (values["step"], values[name]) for name in CURVES if math.isfinite(values.get(name, math.nan))}
        except (ValueError, KeyError, TypeError, AttributeError):
            continue
        for name, point in new.items():
            found.setdefault(name, []).append(point)
    return {name: points[:: -(-len(points) // CURVE_POINTS)] for name, points in found.items()}


def maps(store: Store, vectors: np.ndarray, index: np.ndarray) -> list[Map]:
    """The largest clusters' embeddings in the plane; a cluster of a single querier or of few dialogues has no map.

    Args:
      store: of the data.
      vectors, index: of `retrieval.Embedded`.
    """
    found = []
    cluster = store.cluster[index]
    for number, _ in collections.Counter(cluster.tolist()).most_common():
        (own,) = np.nonzero(cluster == number)
        own = own[evenly(len(own), MAP_POINTS)]
        queriers = [store.dialogues[i].querier for i in index[own]]
        # Points that are all the same have no map, nor have fewer than a handful.
        if len(own) >= 5 and len(set(queriers)) > 1 and np.ptp(vectors[own], 0).any():
            found.append(Map(number, *project(vectors[own]), queriers))
    return found[:MAPS]


def querier_places(run: Run, trainable: Tree) -> dict[str, list[float]]:
    """Where the rows of the stranger and of all queriers lie, [x, y] by name, in the plane of those whom training knew.

    Raises:
      UserError: the method has no rows.
    """
    table, trained = host_copy(people.table_of(trainable)), Registry.from_json(run.record["registry"])
    plane = people.Plane(table[: 1 + len(trained.queriers)])
    names = (STRANGER_NAME, *run.registry.known)
    return {name: plane.place(table[run.registry.row(name)]) for name in names}


def project(vectors: np.ndarray) -> tuple[str, np.ndarray]:
    """Points in the plane, float[n, 2], and how they were made: t-SNE (van der Maaten and Hinton, 2008), PCA for few."""
    with threadpool_limits(1):
        if len(vectors) < TSNE_POINTS:
            return "PCA", PCA(2, random_state=0).fit_transform(vectors)
        perplexity = min(30.0, (len(vectors) - 1) / 3)
        return "t-SNE", TSNE(2, perplexity=perplexity, init="pca", random_state=0).fit_transform(vectors)


def cluster_rows(store: Store) -> list[dict[str, Any]]:
    """Rows of `clusters.report` for the training queries (QUERIES of them, evenly spread), without empty clusters.

    The centre of a cluster is the mean of its queries' TF-IDF vectors, whatever the clusters were made of.
    """
    places = store.split("train", QUERIES)
    texts = [features.query_text(store.dialogues[i]) for i in places]
    tfidf = features.fit_tfidf(texts, features.count_terms(texts), len(texts), 0)
    vectors = tfidf.vectors(texts)
    numbers = sorted(set(store.cluster[places].tolist()))
    tallies = []
    for number in numbers:
        (own,) = np.nonzero(store.cluster[places] == number)
        distance = np.square(vectors[own] - vectors[own].mean(0)).sum(1).tolist()
        nearest = sorted((d, text) for text, d in {texts[i]: d for i, d in zip(own, distance, strict=True)}.items())
        queriers = frozenset(store.dialogues[places[i]].querier for i in own)
        terms = features.count_terms(texts[i] for i in own)
        tallies.append(clusters.Tally(len(own), queriers, terms, tuple(nearest[:EXAMPLES])))
    rows = clusters.report(tallies)
    return [row | {"cluster": number} for number, row in zip(numbers, rows, strict=True)]


def failures(store: Store, split: str, items: Items, records: Sequence[Record]) -> dict[str, list[Failure]]:
    """The WORST dialogues by likelihood of the true reply, and by overlap with it."""
    written = {record["id"]: record["reply"] for record in records}
    dialogues = {store.dialogues[i].id: store.dialogues[i] for i in store.split(split)}
    kinds = {
        "Least likely true replies": ("reply_nll", -1, "{:.2f} nats per token"),
        "Least like the true reply": ("rouge_l", 1, "ROUGE-L {:.2f}"),
    }
    found = {}
    for title, (name, sign, unit) in kinds.items():
        sums, counts = items.scores.get(name, (np.zeros(0), np.zeros(0)))
        (scored,) = np.nonzero(counts)
        values = sums[scored] / counts[scored]
        worst = scored[np.argsort(sign * values, kind="stable")[:WORST]]
        rows = []
        for i in worst:
            d = dialogues[items.ids[i]]
            value = unit.format(sums[i] / counts[i])
            rows.append(Failure(d.id, d.querier, d.query, d.reply, written.get(d.id), value))
        if rows:
            found[title] = rows
    return found


def asked_by_others(run: Run, store: Store, split: str) -> Store:
    """A store of nothing but QUESTIONS of the split's dialogues, each asked by up to ASKERS queriers.

    Ids are `DIALOGUE <- QUERIER`. The true querier comes first, then those whom the responder answers most in training.
    Dialogues with the fewest turns are taken, since earlier turns may give away who really asked; of these an even spread.
    """
    answered: dict[str, collections.Counter[str]] = {}
    for d in store.dialogues:
        if d.split == "train":
            answered.setdefault(d.responder, collections.Counter())[d.querier] += 1

    def askers(place: int) -> list[str]:
        d = store.dialogues[place]
        most = sorted(answered.get(d.responder, {}).items(), key=lambda pair: (-pair[1], pair[0]))
        return [d.querier, *(name for name, _ in most if name != d.querier)][:ASKERS]

    places = [i for i in store.split(split).tolist() if len(askers(i)) > 1 and store.dialogues[i].query.strip()]
    places.sort(key=lambda i: len(store.dialogues[i].turns))
    shortest = [i for i in places if len(store.dialogues[i].turns) == len(store.dialogues[places[0]].turns)]
    places = shortest if len(shortest) >= QUESTIONS else places
    places = [places[i] for i in evenly(len(places), QUESTIONS)]
    dialogues, rows, origin, asked = [], [], [], []
    for place, name in ((i, q) for i in places for q in askers(i)):
        old = store.dialogues[place]
        asked.append((place, name, dataclasses.replace(awareness.rename(old, name), id=f"{old.id} <- {name}")))
    run.annotate([dataclasses.replace(new, replies=()) for _, _, new in asked])
    for place, name, new in asked:
        old = store.dialogues[place]
        if reply.fits(run, new):
            dialogues.append(new)
            rows.append(int(store.row[place]) if name == old.querier else store.registry.row(name))
            origin.append(place)
    columns = {k: getattr(store, k)[np.array(origin, int)] for k in ("responder", "cluster", "text", "label")}
    return dataclasses.replace(store, dialogues=tuple(dialogues), row=np.array(rows, np.int32), **columns)


def across(store: Store, split: str, records: Sequence[Record]) -> list[Across]:
    """Replies to the dialogues of `asked_by_others`, by query.

    Args:
      store, split: of the data.
      records: of `predictions.collect`.
    """
    dialogues = {store.dialogues[i].id: store.dialogues[i] for i in store.split(split)}
    by_query: dict[str, dict[str, str]] = {}
    for record in records:
        name = record["id"].removesuffix(f" <- {record['querier']}")
        by_query.setdefault(name, {})[record["querier"]] = record["reply"]
    return [
        Across(d.query, d.responder, d.querier, d.reply, replies)
        for d, replies in ((dialogues[name], replies) for name, replies in by_query.items())
    ]
