"""What an evaluation says: a table on the terminal and a JSON file."""

from __future__ import annotations

import math
from collections.abc import Mapping

from rich.console import Console
from rich.table import Table

Metrics = Mapping[str, Mapping[str, float]]


def table(title: str, columns: Mapping[str, Metrics]) -> Table:
    """Metrics by row, runs by column; each cell is the value with its interval."""
    result = Table(title=title)
    result.add_column("metric")
    for name in columns:
        result.add_column(name, justify="right")
    names = list(dict.fromkeys(name for metrics in columns.values() for name in metrics))
    for name in names:
        result.add_row(name, *(cell(metrics.get(name)) for metrics in columns.values()))
    return result


def cell(metric: Mapping[str, float] | None) -> str:
    """`0.912 [0.874, 0.946] n=223`."""
    if metric is None:
        return "-"
    low, high = metric["low"], metric["high"]
    interval = "" if low is None or math.isnan(low) else f" [{low:.3f}, {high:.3f}]"
    return f"{metric['value']:.3f}{interval} n={metric['n']}"


def show(title: str, columns: Mapping[str, Metrics]) -> None:
    """Prints the table."""
    console = Console()
    console.print(table(title, columns), width=None if console.is_terminal else 120)


def jsonable(metrics: Metrics) -> dict[str, dict[str, float | None]]:
    """NaN becomes null, as JSON has no NaN."""
    return {
        name: {k: None if isinstance(v, float) and math.isnan(v) else v for k, v in metric.items()}
        for name, metric in metrics.items()
    }
