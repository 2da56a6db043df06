"""One page on a run: what it is, what it scored, where it fails. A file that needs no other, for any screen and for paper."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from qaperso.errors import UserError
from qaperso.eval import plots
from qaperso.eval.plots import Map, Metric

# What a metric says.
MEANING = {
    "reply_nll": "How unlikely the model finds the true replies, in nats per token (natural logarithm); lower is better.",
    "swap_gap": "How much less likely the true reply becomes when another querier is said to have asked, in nats per token; "
    "0 for a model that does not know who is asking, higher is better.",
    "history_gap": "How much less likely the true reply becomes when another querier's history is read under the true name, in "
    "nats per token; 0 for a model that makes nothing of history, higher is better.",
    "rouge_1": "Words shared with the true reply (F-measure, 0 to 1); higher is better.",
    "rouge_2": "Pairs of neighbouring words shared with the true reply (F-measure, 0 to 1); higher is better.",
    "rouge_l": "Longest sequence of words shared with the true reply (F-measure, 0 to 1); higher is better.",
    "perplexity": "exp of reply_nll: among how many equally likely tokens the true one is hidden; lower is better.",
    "bleu": "Runs of one to four words shared with the true replies, over all replies (0 to 100); higher is better.",
    "chrf": "Runs of one to six characters shared with the true replies (F-measure, 0 to 100); higher is better.",
    "distinct_1": "Different words, of all words of the replies: variety.",
    "distinct_2": "Different pairs of neighbouring words, of all pairs of the replies: variety.",
    "self_bleu": "BLEU of one reply against another of the run (0 to 100); high where replies are all alike.",
    "gap_random": "The swap gap, mean over queriers and over several random other queriers.",
    "gap_nearest": "The swap gap to the querier who is most like the true one; mean over queriers.",
    "gap_masked": "What hiding the querier, name and row, costs the true reply; mean over queriers.",
    "gap_renamed": "What a name that nobody has costs the true reply; mean over queriers.",
    "gap_row": "The swap gap of the querier's row alone, under the true name; mean over queriers.",
    "gap_name": "The swap gap of the name alone, beside the true row; mean over queriers.",
    "retrieval_top1": "How often a dialogue's embedding is nearest to its own querier's centroid, others of the cluster beside.",
    "retrieval_mrr": "The same, as mean of 1 / rank of the querier.",
    "retrieval_chance": "retrieval_top1 of ranks drawn at random.",
    "silhouette": "How much nearer embeddings are to their own querier's than to another's, -1 to 1, within clusters.",
    "identification": "How often a probe that learned from human replies names the querier for whom a reply was written.",
    "identification_gain": "identification, less what the query alone gives away, or chance where that is more.",
    "identification_ceiling": "The same probe on the true replies: no model can be expected to score more.",
    "identification_query": "A probe that sees the query alone.",
    "identification_chance": "Somebody who guesses the querier.",
    "paired_gap": "How far apart replies to different queriers are, less those to the same one, over the same queries.",
    "paired_agreement": "How often, of one query's replies, that to the true querier is nearest to the true reply.",
    "empty_replies": "Share of replies that hold no text; they score 0 wherever overlap is scored.",
    "exact": "Share of replies that are right in every part: address, register, facts and intent; of the town's reviews "
    "length, warmth, order and facts (embedded worlds only).",
    "exact_heldout": "The same over pairs of querier and question that training never saw.",
    "address": "Share of replies that address the querier rightly (embedded town only).",
    "register": "Share of replies in the register that the querier gets (embedded town only).",
    "fact": "Share of replies with the querier's own facts, of those that need one; of reviews, with the item's.",
    "length": "Share of reviews as long as the reviewer's are (the town's reviews only).",
    "warmth": "Share of reviews as warm or cold as the reviewer's are (the town's reviews only).",
    "order": "Share of reviews that begin with what the reviewer begins with, price or make (the town's reviews only).",
} | dict.fromkeys(
    ("exact_chance", "address_chance", "register_chance", "fact_chance")
    + ("length_chance", "warmth_chance", "order_chance"),
    "What somebody scores who knows the question and guesses the querier.",
)


@dataclasses.dataclass(frozen=True)
class Across:
    """One query put by several queriers.

    Attributes:
      query, responder: what is asked, and who answers.
      querier, reference: who really asked it, and the true reply.
      replies: by querier, the model's.
    """

    query: str
    responder: str
    querier: str
    reference: str
    replies: Mapping[str, str]


@dataclasses.dataclass(frozen=True)
class Failure:
    """A dialogue on which a run does badly.

    Attributes:
      id, querier, query, reference: of the dialogue.
      reply: the model's; None where it wrote none.
      value: the score, with its unit.
    """

    id: str
    querier: str
    query: str
    reference: str
    reply: str | None
    value: str


@dataclasses.dataclass(frozen=True)
class Report:
    """What a page shows; a part that is empty has no section.

    Attributes:
      title: of the page.
      summary: label to text: method, base, data, steps, parameters.
      config: (key, value, whether it is not the default).
      notes: sentences on what is not there, and why.
      metrics: by run, each metric {"value", "low", "high", "n"}.
      against: the same for paired differences, by "ours - theirs".
      curves, chosen: see `plots.learning_curves`.
      swap: the swap gap by querier.
      unseen: by how many dialogues a row was fitted on, what it gains for queriers whom training never met.
      maps: embeddings by cluster.
      across: the same query from several queriers.
      clusters: rows of `data.clusters.report`.
      failures: the worst dialogues, by what they are worst in.
      lengths: words of each reply, and of each true one.
    """

    title: str
    summary: Mapping[str, str] = dataclasses.field(default_factory=dict)
    config: Sequence[tuple[str, str, bool]] = ()
    notes: Sequence[str] = ()
    metrics: Mapping[str, Mapping[str, Metric]] = dataclasses.field(default_factory=dict)
    against: Mapping[str, Mapping[str, Metric]] = dataclasses.field(default_factory=dict)
    curves: Mapping[str, Sequence[tuple[int, float]]] = dataclasses.field(default_factory=dict)
    chosen: int | None = None
    swap: Mapping[str, Metric] = dataclasses.field(default_factory=dict)
    unseen: Mapping[int, Metric] = dataclasses.field(default_factory=dict)
    maps: Sequence[Map] = ()
    across: Sequence[Across] = ()
    clusters: Sequence[Mapping[str, Any]] = ()
    failures: Mapping[str, Sequence[Failure]] = dataclasses.field(default_factory=dict)
    lengths: tuple[Sequence[int], Sequence[int]] | None = None


# (id, heading, what must be there for the section to be)
SECTIONS = (
    ("run", "The run", "summary"),
    ("metrics", "Metrics", "metrics"),
    ("against", "Paired differences", "against"),
    ("curves", "Learning curves", "curves"),
    ("swap", "Swap gap by querier", "swap"),
    ("unseen", "Queriers whom training never met", "unseen"),
    ("embeddings", "Embedding maps", "maps"),
    ("across", "The same query, other queriers", "across"),
    ("clusters", "What clusters hold", "clusters"),
    ("failures", "Worst dialogues", "failures"),
    ("lengths", "Lengths of replies", "lengths"),
    ("config", "Configuration", "config"),
)


def render(report: Report) -> str:
    """The page as HTML. Everything is escaped but the plots, which are made of escaped parts."""
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    template = environment.from_string(Path(__file__).with_name("page.html").read_text(encoding="utf-8"))
    present = {name: heading for name, heading, part in SECTIONS if getattr(report, part)}
    drawn = {name: Markup(svg) for name, svg in _plots(report, present).items()}
    helpers = {"rows": _rows, "number": number, "interval": interval, "verdict": verdict}
    return template.render(report=report, present=present, plots=drawn, meaning=MEANING, **helpers)


def write(report: Report, path: Path) -> None:
    """Writes the page, whole or not at all.

    Raises:
      UserError: the file cannot be written.
    """
    partial = path.with_name(path.name + ".partial")
    try:
        partial.write_text(render(report), encoding="utf-8", errors="replace")
        partial.replace(path)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror}); give another --report") from error


def _plots(report: Report, present: Mapping[str, str]) -> dict[str, str]:
    found = {}
    if "curves" in present:
        found["curves"] = plots.learning_curves("curves", report.curves, report.chosen)
    if "swap" in present:
        unit = "swap gap, nats per reply token (dialogues in brackets)"
        found["swap"] = plots.interval_bars("swap", "Swap gap by querier", unit, report.swap)
    if "unseen" in present:
        found["unseen"] = plots.gain_curve("unseen", report.unseen)
    if "embeddings" in present:
        found["embeddings"] = plots.embedding_maps("embeddings", report.maps)
    if "lengths" in present:
        found["lengths"] = plots.length_histogram("lengths", *report.lengths)
    return found


def _rows(columns: Mapping[str, Mapping[str, Metric]]) -> list[str]:
    """Names of the metrics that any column has, in order."""
    return list(dict.fromkeys(name for metrics in columns.values() for name in metrics))


def number(metric: Metric | None) -> str:
    """`0.912`; a dash where there is no value."""
    return "\u2013" if metric is None or _missing(metric["value"]) else f"{metric['value']:.3f}"


def interval(metric: Metric | None) -> str:
    """`0.874 to 0.946, n = 223`; without an interval the n alone; without a value the metric's "note", if it has one."""
    if metric is None or _missing(metric["value"]):
        return str((metric or {}).get("note", ""))
    bounds = "" if _missing(metric["low"]) else f"{metric['low']:.3f} to {metric['high']:.3f}, "
    return f"{bounds}n = {metric['n']}"


def verdict(metric: Metric | None) -> str:
    """Where the interval of a difference lies: "above 0", "below 0", "includes 0"; "" where there is none."""
    if metric is None or _missing(metric["low"]):
        return ""
    return "above 0" if metric["low"] > 0 else "below 0" if metric["high"] < 0 else "includes 0"


def _missing(value: float | int | None) -> bool:
    return value is None or math.isnan(value)
