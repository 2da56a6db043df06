"""The training loop: step 0, what stops a run, earlier runs as bases, scores and replies of a trained run."""

from __future__ import annotations

import json
from pathlib import Path

import jax
import numpy as np
import pytest
from helpers import assert_trees_equal
from runs import QAR, SFT, SFT_ALL, arguments, call, config_file, contents, one_device, record, trained  # noqa: F401

from qaperso import chat, checkpoint, evaluate, metrics, run, step, train
from qaperso.data import load
from qaperso.eval import scores

pytestmark = pytest.mark.usefixtures("one_device")


@pytest.fixture(scope="module")
def folders(tmp_path_factory, config_file) -> dict[str, Path]:  # noqa: F811
    """One finished run of each method, three steps long."""
    root = tmp_path_factory.mktemp("runs")
    for name, overrides in (("all", SFT_ALL), ("adapter", (*SFT, "optimizer.lr=0.05")), ("qar", QAR)):
        trained(config_file, root / name, *overrides, "steps=3")
    return {path.name: path for path in root.iterdir()}


def dev_nll(opened: run.Run, trainable) -> np.ndarray:
    """NLL of eight dev dialogues."""
    dev, _ = opened.examples(load.load_store(opened.config.data), "dev", 8)
    return scores.reply_nll(opened, trainable, dev)[0]


def test_untrained_qar_is_its_base(folders):
    """The towers and LoRA are zero at first, and a random base does not depend on the method."""
    qar, sft = (record(folders[name])[0] for name in ("qar", "adapter"))
    assert qar["step"] == sft["step"] == 0
    assert qar["dev_nll"] == pytest.approx(sft["dev_nll"], abs=1e-5)
    assert record(folders["qar"])[-1]["dev_nll"] != pytest.approx(qar["dev_nll"], abs=1e-5)


def test_final_line_is_loss_and_hash_of_what_was_saved(folders, config_file):  # noqa: F811
    out = trained(config_file, folders["qar"], *QAR, "steps=3")
    opened = run.open_run(folders["qar"])
    trainable, _, number = run.restore(opened, 3)
    loss = [v["loss"] for v in record(folders["qar"]) if "loss" in v][-1]
    assert number == 3
    assert out == f"final step=3 loss={loss!r} params=sha256:{step.params_hash(jax.device_get(trainable))}\n"


def test_record_holds_config_and_data(folders):
    data = json.loads((folders["qar"] / "run.json").read_text(encoding="utf-8"))
    assert data["config"]["method"] == "qar" and data["config"]["steps"] == 3
    assert data["base"] == {"name": "random", "path": "", "sha256": "random"}
    assert len(data["registry"]["queriers"]) == 12 and data["clusters"] == 2
    assert not list(folders["qar"].glob("*.partial"))


@pytest.mark.parametrize("name", ["all", "adapter"])
def test_a_run_as_base_starts_where_that_run_ended(folders, config_file, tmp_path, name):  # noqa: F811
    """With trainable = "all" its decoder, with adapters the decoder with LoRA merged in."""
    earlier = run.open_run(folders[name])
    trained_before, _, _ = run.restore(earlier)
    config = train.configs.load(config_file, [*SFT, f"base={folders[name]}"])
    new, _ = run.new_run(config, tmp_path / "never written")
    trainable, _ = run.initialise(new)
    untrained, _ = run.initialise(earlier)
    np.testing.assert_allclose(dev_nll(new, trainable), dev_nll(earlier, trained_before), rtol=1e-5)
    assert not np.allclose(dev_nll(new, trainable), dev_nll(earlier, untrained), rtol=1e-3)
    assert not (tmp_path / "never written").exists()


def test_a_run_of_two_towers_is_no_base(folders, config_file, tmp_path):  # noqa: F811
    words = arguments(config_file, tmp_path / "run", *SFT, f"base={folders['qar']}")
    code, out, err = call(train.main, *words)
    assert (code, out) == (2, "") and err.startswith("error: config.base")
    assert "is a run with two towers" in err and not (tmp_path / "run").exists()


def test_a_base_that_was_trained_on_is_noticed(folders, config_file, tmp_path):  # noqa: F811
    trained(config_file, tmp_path / "base", *SFT_ALL, "steps=2")
    trained(config_file, tmp_path / "run", *SFT, f"base={tmp_path / 'base'}", "steps=1")
    record_file = tmp_path / "base" / "run.json"
    data = json.loads(record_file.read_text(encoding="utf-8"))
    data["config"]["seed"] = 5
    checkpoint.write_json(record_file, data)
    code, _, err = call(evaluate.main, "--workdir", tmp_path / "run")
    assert code == 2 and "has changed since training" in err


def test_the_checkpoint_best_on_dev_is_what_is_opened(config_file, tmp_path, monkeypatch):  # noqa: F811
    values = iter([9.0, 3.0, 1.0, 2.0])
    monkeypatch.setattr(train, "validate", lambda *_: {checkpoint.METRIC: next(values)})
    words = (*SFT, "steps=3", "checkpoint_every=1", "keep_latest=1")
    trained(config_file, tmp_path / "run", *words)
    assert checkpoint.steps(tmp_path / "run" / "checkpoints") == {2: 1.0, 3: 2.0}
    opened = run.open_run(tmp_path / "run")
    best, _, number = run.restore(opened)
    assert number == 2
    assert_trees_equal(best, run.restore(opened, 2)[0])


def test_numbers_that_are_not_finite_stop_the_run(config_file, tmp_path):  # noqa: F811
    """The first update has a learning rate of 0 and the second ruins the parameters; later ones are left out."""
    folder = tmp_path / "run"
    words = arguments(config_file, folder, *SFT_ALL, "optimizer.lr=1e30", "max_skipped=2")
    code, out, err = call(train.main, *words)
    assert (code, out) == (2, "")
    bad = [line for line in err.splitlines() if "is not finite; the update was left out" in line]
    number = int(bad[-1].split()[1].rstrip(":"))
    assert len(bad) == 3
    last = err.splitlines()[-1]
    assert last.startswith("error: 3 updates had a loss or gradient that is not finite, more than max_skipped=2")
    with np.load(folder / f"bad_batch_{number}.npz") as saved:
        assert saved["inputs/tokens"].shape == (1, 4, 96) and saved["inputs/tokens"].any()
        assert saved["target"].shape == (1, 4, 64)


def test_a_parameter_that_never_learns_stops_the_run(config_file, tmp_path):  # noqa: F811
    """A cluster for nearly every query: no class ever meets another querier's, so the heads get no gradient."""
    overrides = (*QAR, "qar.contrast=prototypes", "qar.drop_row=0.0", "steps=21", "checkpoint_every=21")
    code, out, err = call(train.main, *arguments(config_file, tmp_path / "run", *overrides))
    assert (code, out) == (2, "")
    last = err.splitlines()[-1]
    assert last.startswith("error: no gradient reached heads/bias, heads/kernel")
    assert "in the first 20 steps" in last


def test_logging_and_peak(config_file, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setattr(metrics, "measure_peak", lambda dtype: 1e9)
    trained(config_file, tmp_path / "run", *SFT, "steps=3", "log_every=2", "peak_flops=0.0", "data.dev=0.1")
    lines = record(tmp_path / "run")
    assert [v["step"] for v in lines if "loss" in v] == [2, 3]
    # Linear to the peak in two steps: the rate of step n is the schedule at n - 1.
    assert [v["learning_rate"] for v in lines if "loss" in v] == pytest.approx([0.5e-3, 1e-3])


def test_evaluate_writes_one_file_a_split_and_chat_answers(folders):
    before = contents(folders["qar"])
    code, out, err = call(evaluate.main, "--workdir", folders["qar"], "--split", "dev", "--replies", "2")
    assert code == 0, err
    new = set(contents(folders["qar"])) - set(before)
    assert new == {"eval_dev.json"}
    data = json.loads((folders["qar"] / "eval_dev.json").read_text(encoding="utf-8"))
    assert data["split"] == "dev" and data["step"] == 3
    assert 0 <= data["metrics"]["rouge_l"]["value"] <= 1
    querier = json.loads((folders["qar"] / "run.json").read_text(encoding="utf-8"))["registry"]["queriers"][0]
    words = ("--workdir", folders["qar"], "--once", "Are you open?", "--querier", querier)
    first, again = call(chat.main, *words), call(chat.main, *words)
    assert first == again and first[0] == 0 and first[1].endswith("\n")
    code, out, _ = call(chat.main, *words, "stranger")
    assert code == 0 and querier in out and "stranger" in out
    (folders["qar"] / "eval_dev.json").unlink()
    assert contents(folders["qar"]) == before
