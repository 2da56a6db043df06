"""What an evaluation says: a table on the terminal and a JSON file."""

from __future__ import annotations

import math
from collections.abc import Mapping

from rich.console import Console
from rich.markup import escape
from rich.table import Table

Metric = Mapping[str, float | int | str | None]
Metrics = Mapping[str, Metric]


def table(title: str, columns: Mapping[str, Metrics]) -> Table:
    """Metrics by row, runs by column; each cell is the value with its interval."""
    result = Table(title=escape(title))
    result.add_column("metric")
    for name in columns:
        result.add_column(escape(name), justify="right")
    names = list(dict.fromkeys(name for metrics in columns.values() for name in metrics))
    for name in names:
        result.add_row(name, *(escape(cell(metrics.get(name))) for metrics in columns.values()))
    return result


def cell(metric: Metric | None) -> str:
    """`0.912 [0.874, 0.946] n=223`; where there is no value its note, "-" without one."""
    if metric is None or _missing(metric["value"]):
        return str((metric or {}).get("note", "-"))
    return f"{interval(metric)} n={metric['n']}"


def interval(metric: Metric | None, sign: bool = False) -> str:
    """`0.912 [0.874, 0.946]`, with `sign` `+0.912 [+0.874, +0.946]`; "-" where there is no value."""
    if metric is None or _missing(metric["value"]):
        return "-"
    form = "+.3f" if sign else ".3f"
    bounds = "" if _missing(metric["low"]) else f" [{metric['low']:{form}}, {metric['high']:{form}}]"
    return f"{metric['value']:{form}}{bounds}"


def _missing(value: float | int | str | None) -> bool:
    return value is None or isinstance(value, float) and math.isnan(value)


def show(title: str, columns: Mapping[str, Metrics]) -> None:
    """Prints the table."""
    console = Console()
    console.print(table(title, columns), width=None if console.is_terminal else 120)


def jsonable(metrics: Metrics) -> dict[str, dict[str, float | int | str | None]]:
    """NaN becomes null, as JSON has no NaN; a note stays."""
    return {name: {k: None if _missing(v) else v for k, v in metric.items()} for name, metric in metrics.items()}
