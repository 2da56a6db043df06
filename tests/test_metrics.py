"""The record of a run, and speeds."""

from __future__ import annotations

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qaperso import metrics


def test_cut_back_keeps_earlier_steps_and_drops_a_torn_line(tmp_path):
    path = tmp_path / "metrics.jsonl"
    lines = [json.dumps({"step": n, "loss": n / 3}) for n in (1, 2, 2, 3)]
    path.write_text("\n".join(lines) + '\n{"step": 2, "lo', encoding="utf-8")
    metrics.cut_back(path, 2)
    assert path.read_text(encoding="utf-8").splitlines() == lines[:3]
    metrics.cut_back(path, 0)
    assert path.read_text(encoding="utf-8") == ""
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]
    metrics.cut_back(tmp_path / "absent.jsonl", 2)
    assert not (tmp_path / "absent.jsonl").exists()


def test_writer_continues_after_its_start(tmp_path):
    for start, steps in ((0, (1, 2, 3)), (2, (3, 4))):
        writer = metrics.MetricsWriter(tmp_path, start)
        for n in steps:
            writer.write(n, {"loss": n + start / 10})
        writer.close()
    lines = (tmp_path / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line) for line in lines] == [
        {"step": 1, "loss": 1.0},
        {"step": 2, "loss": 2.0},
        {"step": 3, "loss": 3.2},
        {"step": 4, "loss": 4.2},
    ]
    assert any((tmp_path / "tensorboard").iterdir())


@given(st.floats(allow_nan=False))
def test_lines_keep_every_bit_of_a_float(value):
    assert json.loads(json.dumps({"step": 1, "loss": value}))["loss"] == value


def test_meter_by_hand(monkeypatch):
    clock = iter([10.0, 12.0, 17.0])
    monkeypatch.setattr(metrics.time, "perf_counter", lambda: next(clock))
    meter = metrics.Meter((6.0, 48.0), peak_flops=1200.0, steps=30)
    meter.count(100.0, 10.0)
    meter.count(60.0, 0.0)
    first = meter.report(10)
    # 160 tokens and 10 predictions in 2 s.
    assert first["tokens_per_second"] == 80 and first["mfu"] == pytest.approx(0.6) and math.isnan(first["eta"])
    meter.count(50.0, 0.0)
    # 5 steps in 5 s, 15 to go.
    assert meter.report(15) == {"tokens_per_second": 10.0, "mfu": pytest.approx(0.05), "eta": 15.0}


def test_progress_off_a_terminal_is_a_line_a_report(capsys):
    progress = metrics.Progress(0, 20)
    progress.show(5, {"loss": 1.25, "lm": 1.0, "grad_norm": 3.0, "tokens_per_second": 1234.0, "mfu": 0.25, "eta": 61.0})
    progress.show(5, {"dev_nll": 0.5})
    progress.close()
    assert capsys.readouterr().err.splitlines() == [
        "step 5/20 loss=1.2500 lm=1.0000 1,234 tokens/s mfu=25.0% eta=1m01s",
        "step 5/20 dev_nll=0.5000",
    ]
