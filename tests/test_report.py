"""The table and the JSON file."""

from __future__ import annotations

import io
import json

import pytest
from rich.console import Console

from qaperso.eval import report

NAN = float("nan")
WHOLE = {"value": 0.9124, "low": 0.8741, "high": 0.9456, "n": 223}
POINT = {"value": 1.5, "low": NAN, "high": NAN, "n": 4}
NOTHING = {"value": NAN, "low": NAN, "high": NAN, "n": 0}
NOTE = {"value": None, "low": None, "high": None, "n": 0, "note": "no [power]: 0.1 [0.0, 0.2]"}


def test_cells() -> None:
    assert report.cell(WHOLE) == "0.912 [0.874, 0.946] n=223"
    assert report.cell(POINT) == "1.500 n=4"
    assert report.cell(NOTHING) == report.cell(None) == "-"
    assert report.cell(NOTE) == "no [power]: 0.1 [0.0, 0.2]"
    assert report.cell({"value": -0.25, "low": -0.5, "high": -0.0625, "n": 2}) == "-0.250 [-0.500, -0.062] n=2"


def test_nan_becomes_null_and_is_shown_alike() -> None:
    metrics = {"exact": WHOLE, "alone": POINT, "fact": NOTHING, "why": NOTE}
    plain = json.loads(json.dumps(report.jsonable(metrics), allow_nan=False))
    assert plain["exact"] == WHOLE
    assert plain["alone"] == {"value": 1.5, "low": None, "high": None, "n": 4}
    assert plain["fact"] == {"value": None, "low": None, "high": None, "n": 0}
    assert plain["why"] == NOTE
    assert [report.cell(m) for m in plain.values()] == [report.cell(m) for m in metrics.values()]


def lines(columns: dict) -> list[str]:
    out = io.StringIO()
    Console(file=out, width=120).print(report.table("test [split]", columns))
    return out.getvalue().splitlines()


def test_the_table_has_metrics_by_row_and_runs_by_column() -> None:
    shown = lines(
        {"runs/[a] @5": {"exact": WHOLE, "fact": POINT}, "runs/b @9": {"exact": POINT, "rouge_l": WHOLE, "fact": NOTE}}
    )
    assert "test [split]" in shown[0] and "runs/[a] @5" in shown[2] and "runs/b @9" in shown[2]
    rows = {line.split()[1]: line for line in shown if any(name in line for name in ("exact", "fact", "rouge_l"))}
    assert list(rows) == ["exact", "fact", "rouge_l"]
    assert rows["exact"].index("0.912 [0.874, 0.946] n=223") < rows["exact"].index("1.500 n=4")
    assert rows["exact"].count("n=") == 2 and rows["rouge_l"].split()[3] == "-"
    assert "1.500 n=4" in rows["fact"] and "no [power]: 0.1 [0.0, 0.2]" in rows["fact"]
    assert "0.912 [0.874, 0.946] n=223" in rows["rouge_l"]


def test_show_prints_it(capsys: pytest.CaptureFixture[str]) -> None:
    report.show("dev split", {"run @1": {"reply_nll": WHOLE}})
    assert "0.912 [0.874, 0.946] n=223" in capsys.readouterr().out
