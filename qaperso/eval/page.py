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
    "rouge_1": "Words shared with the true reply (F-measure, 0 to 1); higher is better.",
    "rouge_2": "Pairs of neighbouring words shared with the true reply (F-measure, 0 to 1); higher is better.",
    "rouge_l": "Longest sequence of words shared with the true reply (F-measure, 0 to 1); higher is better.",
    "empty_replies": "Share of replies that hold no text; they score 0 wherever overlap is scored.",
    "exact": "Share of replies that are right in every part: address, register, facts and intent (embedded town only).",
    "exact_heldout": "The same over pairs of querier and question that training never saw.",
    "address": "Share of replies that address the querier rightly (embedded town only).",
    "register": "Share of replies in the register that the querier gets (embedded town only).",
    "fact": "Share of replies with the querier's own facts, of those that need one (embedded town only).",
} | dict.fromkeys(
    ("exact_chance", "address_chance", "register_chance", "fact_chance"),
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
