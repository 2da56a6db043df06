"""Runs: their record, opening them again, and earlier runs as bases."""

from __future__ import annotations

import json
import shutil
from typing import Any

import helpers
import numpy as np
import pytest
from tiny import SFT, TINY, arguments, call, finished, one_device, trained  # noqa: F401

from qaperso import checkpoint, run, train
from qaperso import config as configs
from qaperso.data import load
from qaperso.errors import UserError
from qaperso.eval import scores
from qaperso.models.base import Location
from qaperso.models.tokenizer import word_tokenizer

pytestmark = pytest.mark.usefixtures("one_device")


def dev_nll(opened: run.Run, trainable: Any) -> np.ndarray:
    """NLL of eight dev dialogues."""
    dev, _ = opened.examples(load.load_store(opened.config.data), "dev", 8)
    return scores.reply_nll(opened, trainable, dev)[0]


def test_markers_beyond_the_embeddings_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """As of a tokeniser that chat tokens were added to, without the model's embeddings: a look-up gives the last one's."""
    tokenizer, config = word_tokenizer(["aye"]), configs.default()
    # Its markers have ids up to 3, the newline's.
    monkeypatch.setattr(run.hf, "load_config", lambda _: helpers.model(vocab=4))
    assert run._model(config, Location("hf"), tokenizer).eos_ids == (2, 1)
    monkeypatch.setattr(run.hf, "load_config", lambda _: helpers.model(vocab=3))
    with pytest.raises(UserError, match="go up to id 3, and embeddings of ids below 3 only; resize"):
        run._model(config, Location("hf"), tokenizer)


def test_record_holds_config_and_data():
    folder = finished("qar")[0]
    data = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    assert data["config"]["method"] == "qar" and data["config"]["steps"] == 8
    assert data["base"] == {"name": "random", "path": "", "sha256": "random"}
    assert len(data["registry"]["queriers"]) == 12 and data["clusters"] == 2
    assert not list(folder.glob("*.partial"))


@pytest.mark.parametrize("name", ["all", "adapter"])
def test_a_run_as_base_starts_where_that_run_ended(tmp_path, name):
    """With trainable = "all" its decoder, with adapters the decoder with LoRA merged in."""
    earlier = run.open_run(finished(name)[0])
    trained_before, _, _ = run.restore(earlier)
    config = configs.load(TINY, [*SFT, f"base={finished(name)[0]}"])
    new, _ = run.new_run(config, tmp_path / "never written")
    trainable, _ = run.initialise(new)
    untrained, _ = run.initialise(earlier)
    np.testing.assert_allclose(dev_nll(new, trainable), dev_nll(earlier, trained_before), rtol=1e-5)
    assert not np.allclose(dev_nll(new, trainable), dev_nll(earlier, untrained), rtol=1e-3)
    assert not (tmp_path / "never written").exists()


def test_a_run_of_two_towers_is_no_base(tmp_path):
    words = arguments(TINY, tmp_path / "run", *SFT, f"base={finished('qar')[0]}")
    code, out, err = call(train.main, *words)
    assert (code, out) == (2, "") and err.startswith("error: config.base")
    assert "is a run with two towers" in err and not (tmp_path / "run").exists()


def test_a_base_that_changed_is_noticed(tmp_path):
    shutil.copytree(finished("all")[0], tmp_path / "base")
    trained(TINY, tmp_path / "run", *SFT, f"base={tmp_path / 'base'}")
    run.open_run(tmp_path / "run")
    record_file = tmp_path / "base" / "run.json"
    data = json.loads(record_file.read_text(encoding="utf-8"))
    data["config"]["seed"] = 5
    checkpoint.write_json(record_file, data)
    with pytest.raises(UserError, match="its base '.*' has changed since training"):
        run.open_run(tmp_path / "run")
