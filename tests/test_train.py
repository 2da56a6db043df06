"""The training loop: step 0, what stops a run, earlier runs as bases, scores and replies of a trained run."""

from __future__ import annotations

import json
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_trees_equal
from tiny import PROTOTYPES, QAR, SFT, SFT_ALL, TINY, arguments, call, contents, finished, one_device, record, trained  # noqa: F401

from qaperso import batching, chat, checkpoint, evaluate, metrics, run, step, train
from qaperso import config as configs

pytestmark = pytest.mark.usefixtures("one_device")


def test_untrained_qar_is_its_base():
    """The towers and LoRA are zero at first, and a random base does not depend on the method."""
    qar, sft = (record(finished(name)[0])[0] for name in ("qar", "adapter"))
    assert qar["step"] == sft["step"] == 0
    assert qar["dev_nll"] == pytest.approx(sft["dev_nll"], abs=1e-5)
    assert record(finished("qar")[0])[-1]["dev_nll"] != pytest.approx(qar["dev_nll"], abs=1e-5)


def test_final_line_is_loss_and_hash_of_what_was_saved():
    folder, out = finished("qar")
    trainable, _, number = run.restore(run.open_run(folder), 8)
    loss = [v["loss"] for v in record(folder) if "loss" in v][-1]
    assert number == 8
    assert out == f"final step=8 loss={loss!r} params=sha256:{step.params_hash(jax.device_get(trainable))}\n"


def test_the_checkpoint_best_on_dev_is_what_is_opened(tmp_path, monkeypatch):
    values = iter([9.0, 3.0, 1.0, 2.0])  # of steps 0, 3, 6 and 8
    monkeypatch.setattr(train, "validate", lambda *_: {checkpoint.METRIC: next(values)})
    trained(TINY, tmp_path / "run", *SFT, "keep_latest=1")
    assert checkpoint.steps(tmp_path / "run" / "checkpoints") == {6: 1.0, 8: 2.0}
    opened = run.open_run(tmp_path / "run")
    best, _, number = run.restore(opened)
    assert number == 6
    assert_trees_equal(best, run.restore(opened, 6)[0])


def test_numbers_that_are_not_finite_stop_the_run(tmp_path):
    """The first update has a learning rate of 0 and the second ruins the parameters; later ones are left out."""
    folder = tmp_path / "run"
    words = arguments(TINY, folder, *SFT_ALL, "optimizer.lr=1e30", "max_skipped=2")
    code, out, err = call(train.main, *words)
    assert (code, out) == (2, "")
    bad = [line for line in err.splitlines() if "the update was left out (not finite: " in line]
    number = int(bad[-1].split()[1].rstrip(":"))
    assert len(bad) == 3
    last = err.splitlines()[-1]
    assert last.startswith(
        f"error: 3 updates were left out, more than max_skipped=2, the last at step {number} (not finite: "
    )
    with np.load(folder / f"bad_batch_{number}.npz") as saved:
        assert saved["inputs/tokens"].shape == (1, 4, 96) and saved["inputs/tokens"].any()
        assert saved["target"].shape == (1, 4, 64)


def test_a_parameter_that_never_learns_stops_the_run(tmp_path, monkeypatch):
    """A contrast that weighs nothing gives the heads no gradient."""
    monkeypatch.setattr(step, "DEAD_PARAMETER_STEPS", 4)
    code, out, err = call(train.main, *arguments(TINY, tmp_path / "run", *PROTOTYPES, "qar.weight=0.0"))
    assert (code, out) == (2, "")
    last = err.splitlines()[-1]
    assert last.startswith("error: no gradient reached heads/bias, heads/kernel, heads/norm_p in the first 4 steps")


@pytest.mark.parametrize("method", [PROTOTYPES, QAR])
def test_a_plan_that_contrasts_nobody_stops_before_anything_is_written(tmp_path, method):
    """Only dialogues without their row are contrasted, and here are none."""
    code, out, err = call(train.main, *arguments(TINY, tmp_path / "run", *method, "qar.drop_row=0.0"))
    assert (code, out) == (2, "") and not (tmp_path / "run").exists()
    last = err.splitlines()[-1]
    assert last.startswith("error: nobody would be contrasted in the first 1000 steps: ")
    assert "config.qar.drop_row=0.0" in last


@pytest.mark.usefixtures("one_device")
def test_heads_are_looked_at_once_somebody_has_been_contrasted(tmp_path, monkeypatch):
    """Where that is late, a run whose heads have had no gradient so far goes on."""
    monkeypatch.setattr(step, "DEAD_PARAMETER_STEPS", 1)
    words = (*QAR, "qar.drop_row=0.1", "batch.rows=2", "batch.queriers=0", "seed=0")
    opened, store = run.new_run(configs.load(TINY, words), tmp_path / "run")
    task = train.task_of(opened, store)
    watched = task.watched
    batches = [jax.tree.map(lambda x: jnp.asarray(x[0]), task.make(number)) for number in range(watched)]
    anchors = [float(opened.method.counts(opened.setting, b, {})["contrast"]) for b in batches]
    assert watched > 1 and not any(anchors[:-1]) and anchors[-1]


def test_logging_and_peak(tmp_path, monkeypatch):
    monkeypatch.setattr(metrics, "measure_peak", lambda dtype: 1e9)
    trained(TINY, tmp_path / "run", *SFT, "log_every=3", "peak_flops=0.0")
    lines = record(tmp_path / "run")
    assert [v["step"] for v in lines if "loss" in v] == [3, 6, 8]
    # Step n uses the schedule at n - 1: two steps of warm-up from 0, then a cosine down to a tenth at step 8.
    cosine = [0.1 + 0.9 * (1 + math.cos(math.pi * (n - 3) / 6)) / 2 for n in (3, 6, 8)]
    found = [v["learning_rate"] for v in lines if "loss" in v]
    assert found == pytest.approx([0.05 * c for c in cosine], rel=1e-5)


def test_evaluate_writes_scores_replies_and_a_page(tmp_path, monkeypatch):
    folder, other = finished("qar")[0], finished("adapter")[0]
    before = contents(folder), contents(other)
    words = ("--workdir", folder, "--against", other, "--split", "dev", "--replies", "2")
    code, out, err = call(evaluate.main, *words)
    assert code == 0, err
    assert "dev split, 95% intervals" in out and "paired differences" in out
    made = {"eval_dev.json", "items_dev.npz", "predictions_dev.jsonl", "across_dev.jsonl", "report_dev.html"}
    assert set(contents(folder)) - set(before[0]) == made
    assert set(contents(other)) - set(before[1]) == {"predictions_dev.jsonl"}
    data = json.loads((folder / "eval_dev.json").read_text(encoding="utf-8"))
    assert data["split"] == "dev" and data["step"] in checkpoint.steps(folder / "checkpoints")
    assert 0 <= data["metrics"]["rouge_l"]["value"] <= 1 and data["metrics"]["rouge_l"]["n"] == 2
    assert data["metrics"]["perplexity"]["value"] == pytest.approx(math.exp(data["metrics"]["reply_nll"]["value"]))
    identification = data["metrics"]["identification"]
    assert identification["value"] is None and "replies to queriers" in identification["note"]
    assert "paired_gap" not in data["metrics"]
    ((name, against),) = data["against"].items()
    assert name.startswith("adapter @") and against["reply_nll"]["n"] == data["metrics"]["reply_nll"]["n"]
    assert against["reply_nll"]["low"] < against["reply_nll"]["value"] < against["reply_nll"]["high"]
    page = (folder / "report_dev.html").read_text(encoding="utf-8")
    sections = re.findall(r'<section id="(\w+)">', page)
    expected = "run metrics against curves swap embeddings across clusters failures lengths config"
    assert sections == expected.split() and all(n in page for n in (name, "reply_nll", f"qar @{data['step']}"))
    # Replies that are there are not written again, and all else comes out the same.
    first = contents(folder)
    monkeypatch.setattr(batching, "prepare", None)
    code, again, err = call(evaluate.main, *words, "--report", tmp_path / "page.html")
    assert code == 0 and again == out, err
    assert contents(folder) == first and (tmp_path / "page.html").read_text(encoding="utf-8") == page
    for file in made:
        (folder / file).unlink()
    (other / "predictions_dev.jsonl").unlink()
    assert (contents(folder), contents(other)) == before


def test_chat_answers():
    folder = finished("qar")[0]
    before = contents(folder)
    querier = json.loads((folder / "run.json").read_text(encoding="utf-8"))["registry"]["queriers"][0]
    words = ("--workdir", folder, "--once", "Are you open?", "--querier", querier)
    code, out, _ = call(chat.main, *words)
    assert code == 0 and out.endswith("\n") and out.count("\n") == 1
    code, out, _ = call(chat.main, *words, "stranger")
    assert code == 0 and querier in out and "stranger" in out
    assert contents(folder) == before
