"""Bad input is one line on stderr that begins with "error: ", exit code 2, and nothing written."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from helpers import drawn
from tiny import CONFIG, SFT, arguments, call, contents, one_device  # noqa: F401
from tiny import finished as finish

from qaperso import chat, evaluate, prepare, run, train
from qaperso.mesh import make_mesh
from qaperso.models import decoder, hf
from qaperso.models.config import DecoderConfig

pytestmark = pytest.mark.usefixtures("one_device")


def refused(main, *words) -> str:
    """The one line of a refused command."""
    code, out, err = call(main, *words)
    assert code == 2 and out == ""
    lines = err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), err
    return lines[0].removeprefix("error: ")


@pytest.fixture
def folder(tmp_path):
    """A folder with the tiny configuration, that must look the same after the test."""
    (tmp_path / "tiny.py").write_text(CONFIG, encoding="utf-8")
    yield tmp_path


def refuse_training(folder: Path, *overrides: str, config: str = "tiny.py", workdir: str = "run") -> str:
    """The line, after checking that the folder is as it was."""
    before = contents(folder)
    line = refused(train.main, *arguments(folder / config, folder / workdir, *overrides))
    assert contents(folder) == before
    return line


@pytest.fixture
def finished() -> Path:
    """A finished run of plain LoRA; to be left as it is."""
    return finish("adapter")[0]


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        (["lora.rnak=4"], ["unknown key 'config.lora.rnak'", "did you mean 'lora.rank'?"]),
        (["method=qra"], ["config.method is 'qra'", "did you mean 'qar'?"]),
        (["steps"], ["'--config.steps' has no value"]),
        (["base=no/such/base"], ["base 'no/such/base'", "no such file or folder"]),
        (["base=package:absent/x.gguf"], ["package 'absent' is not installed"]),
        (["data.format=prepared"], ["data.format='prepared' needs a folder; give --config.data.path=DIR"]),
        (["data.format=prepared", "data.path=no/such"], ["'no/such' is no prepared data set: it has no prepared.json"]),
        (["model.heads=3"], ["config.model: heads=3 must divide embed=32"]),
        (["data.clusters=5000"], ["data.clusters=5000", "distinct queries", "lower data.clusters"]),
        (["batch.length=8"], ["fits batch.length=8", "raise them"]),
    ],
    ids=lambda value: value[0] if len(value[0]) < 30 else "",
)
def test_configurations(folder, overrides, parts):
    line = refuse_training(folder, *overrides)
    assert all(part in line for part in parts), line


def test_mesh_and_sharding(folder, monkeypatch):
    monkeypatch.setattr(run, "make_mesh", make_mesh)
    assert "config.mesh data=3 fsdp=1 tensor=1 does not make 8 devices" in refuse_training(folder, "mesh.data=3")
    assert "does not make 8 devices" in refuse_training(folder, "mesh.fsdp=-1")
    line = refuse_training(folder, "batch.rows=12")
    assert "batch.rows=12 is not a multiple of the 8 devices" in line
    line = refuse_training(folder, "batch.rows=8", "sharding=((':embed$', 'model'),)")
    assert "sharding rule ':embed$' names mesh axis 'model'; the mesh has ('data', 'fsdp', 'tensor')" in line
    line = refuse_training(folder, "batch.rows=8", "sharding=(('(', 'data'),)")
    assert "sharding rule '(' is not a regular expression" in line


def test_config_files_and_arguments(folder):
    assert "tny.py' is not a file; did you mean 'tiny.py'?" in refuse_training(folder, config="tny.py")
    (folder / "odd.py").write_text("x = 1\n")
    assert "odd.py' defines no get_config()" in refuse_training(folder, config="odd.py")
    line = refused(train.main, *arguments(folder / "tiny.py", folder / "run"), "--confg.steps=3")
    assert line.startswith("unknown argument '--confg.steps=3'; options are --config, --workdir")
    line = refused(train.main, *arguments(folder / "tiny.py", folder / "run"), "--config.steps=3", "4")
    assert line.startswith("unknown argument '4'")
    assert not (folder / "run").exists()


@pytest.mark.parametrize("main", [train.main, evaluate.main, chat.main])
def test_missing_arguments_are_exit_code_two(main, capsys):
    with pytest.raises(SystemExit) as stop:
        main([])
    assert stop.value.code == 2
    assert "the following arguments are required" in capsys.readouterr().err


def test_a_random_base_speaks_the_embedded_world_only(folder, tmp_path_factory):
    output = tmp_path_factory.mktemp("data") / "out"
    scenes = [
        {"group": f"g{i}", "turns": [{"speaker": s, "text": f"{s} {i}"} for s in ("Ann", "Bob")]} for i in range(9)
    ]
    (output.parent / "in.jsonl").write_text("".join(json.dumps(scene) + "\n" for scene in scenes), encoding="utf-8")
    words = ("--input", output.parent / "in.jsonl", "--output", output, "--clusters", "1")
    assert call(prepare.main, *words)[0] == 0
    line = refuse_training(folder, "data.format=prepared", f"data.path={output}", "data.clusters=0")
    assert "config.base='random' has a tokeniser for the embedded world only" in line


def test_base_of_other_shapes_or_broken(folder, finished):
    path = folder / "base"
    small = DecoderConfig(vocab=32, embed=16, layers=1, heads=2, kv_heads=1, head_dim=8, mlp=24, eos_ids=(1,))
    hf.save(path, drawn(decoder.declare(small), 0), small)
    shutil.copytree(finished / "tokenizer", path, dirs_exist_ok=True)
    words = (f"base={path}",)
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, "intermediate_size": 48}))
    line = refuse_training(folder, *words)
    assert "has shape" in line and "from the configuration" in line
    (path / "config.json").write_text(json.dumps(config))
    weights = path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-7])
    assert "model.safetensors: not a whole safetensors file" in refuse_training(folder, *words)
    (path / "config.json").write_text("{")
    assert "config.json: not JSON" in refuse_training(folder, *words)
    weights.unlink()
    assert "expected config.json and *.safetensors (a model)" in refuse_training(folder, *words)


def test_workdirs_that_are_not_this_run(folder, finished):
    shutil.copytree(finished, folder / "run")
    line = refuse_training(folder, *SFT, "optimizer.lr=0.5")
    assert "is the workdir of another config (optimizer.lr: 0.05 -> 0.5)" in line
    (folder / "foreign").mkdir()
    (folder / "foreign" / "thesis.txt").write_text("years of work")
    words = SFT
    assert "exists and is not a run's folder" in refuse_training(folder, *words, workdir="foreign")
    assert "exists and is not a run's folder" in refuse_training(folder, *words, workdir="tiny.py")
    assert "cannot be made" in refuse_training(folder, *words, workdir="tiny.py/run")


def test_broken_record(folder, finished):
    shutil.copytree(finished, folder / "run")
    words = SFT
    (folder / "run" / "run.json").write_text('{"config": ')
    assert "run.json is broken" in refuse_training(folder, *words)
    (folder / "run" / "run.json").write_text("[]")
    assert "run.json has no 'config'" in refuse_training(folder, *words)


def test_data_that_changed_since(folder, finished):
    shutil.copytree(finished, folder / "run")
    path = folder / "run" / "run.json"
    data = json.loads(path.read_text(encoding="utf-8"))
    data["registry"]["queriers"][0] = "Nobody"
    path.write_text(json.dumps(data), encoding="utf-8")
    line = refuse_training(folder, *SFT)
    assert "the queriers changed since this run began" in line


def test_unknown_people_and_splits(finished):
    before = contents(finished)
    asks = ("--workdir", finished, "--once", "Are you open?", "--querier")
    name = run.read_record(finished)["registry"]["queriers"][0]
    assert f"did you mean '{name}'?" in refused(chat.main, *asks, name + "x")
    line = refused(chat.main, *asks, "stranger", "--responder", "Nobody at all")
    assert line.startswith("responder 'Nobody at all' is not known to this run")
    assert "--once is empty" in refused(chat.main, "--workdir", finished, "--querier", name, "--once", " ")
    assert "--top-p is 0.0" in refused(chat.main, *asks, name, "--top-p", "0")
    assert "--temperature is -1.0" in refused(chat.main, *asks, name, "--temperature", "-1")
    assert "--max-new-tokens is 0" in refused(chat.main, *asks, name, "--max-new-tokens", "0")
    line = refused(evaluate.main, "--workdir", finished, "--split", "tset")
    assert line == "--split is 'tset', expected one of train, dev, test, unseen"
    assert "--replies is -1" in refused(evaluate.main, "--workdir", finished, "--replies", "-1")
    assert contents(finished) == before


def test_what_evaluate_is_told(folder, finished):
    before = contents(finished)
    line = refused(evaluate.main, "--workdir", finished, "--split", "unseen")
    assert "its data has no dialogue in the unseen split; give a --split that it has: train (" in line
    line = refused(evaluate.main, "--workdir", finished, "--against", finished.parent / "." / finished.name)
    assert "is given twice in --workdir and --against" in line
    shutil.copytree(finished, folder / "run")
    other = folder / "run"
    line = refused(evaluate.main, "--workdir", finished, other, "--report", folder / "page.html")
    assert "--report is one file, but --workdir names 2 runs" in line
    for target in (folder, folder / "absent" / "page.html"):
        assert "is a folder or lies in none" in refused(evaluate.main, "--workdir", finished, "--report", target)
    # The embedded world of another seed has other dialogues.
    data = json.loads((other / "run.json").read_text(encoding="utf-8"))
    data["config"]["data"]["seed"] = 1
    (other / "run.json").write_text(json.dumps(data), encoding="utf-8")
    line = refused(evaluate.main, "--workdir", finished, "--against", other)
    assert "do not share the test split" in line and "such as 'town-0-" in line
    assert contents(finished) == before and not (folder / "page.html").exists()


def test_predictions_that_are_corrupt(folder, finished):
    shutil.copytree(finished, folder / "run")
    path = folder / "run" / "predictions_dev.jsonl"
    path.write_text('{"id": "a"}\n', encoding="utf-8")
    before = contents(folder)
    line = refused(evaluate.main, "--workdir", folder / "run", "--split", "dev", "--replies", "1")
    assert line.startswith(f"{path}, line 1: 'split' is nothing, expected str") and "delete the line" in line
    assert contents(folder) == before


def test_folders_that_are_no_run(folder, finished):
    before = contents(folder), contents(finished)
    for path in (folder, folder / "absent", folder / "tiny.py"):
        assert "is no run: it has no run.json" in refused(chat.main, "--workdir", path, "--querier", "x")
        assert "is no run: it has no run.json" in refused(evaluate.main, "--workdir", finished, path)
    assert (contents(folder), contents(finished)) == before


def test_a_run_without_a_checkpoint(folder, finished):
    shutil.copytree(finished, folder / "run")
    shutil.rmtree(folder / "run" / "checkpoints")
    before = contents(folder)
    line = refused(chat.main, "--workdir", folder / "run", "--querier", "stranger", "--once", "Are you open?")
    assert "holds no complete checkpoint; train the run first" in line
    assert contents(folder) == before


def test_weights_of_another_declaration(folder, finished):
    shutil.copytree(finished, folder / "run")
    path = folder / "run" / "run.json"
    data = json.loads(path.read_text(encoding="utf-8"))
    data["config"]["lora"]["rank"] = 3
    path.write_text(json.dumps(data), encoding="utf-8")
    line = refused(chat.main, "--workdir", folder / "run", "--querier", "stranger", "--once", "Are you open?")
    assert "trainable: 'lora/down/a' is" in line
