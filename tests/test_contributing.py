"""The worked examples of docs/contributing.md, run as they stand there."""

from __future__ import annotations

import collections
import dataclasses
import importlib.util
import json
import pkgutil
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pages
import pytest

from qaperso import methods, prepare, step
from qaperso.data import formats, prepared
from qaperso.errors import UserError
from qaperso.models import decoder, hf
from qaperso.models.config import DecoderConfig

PAGE = pages.ROOT / "docs" / "contributing.md"


def write(folder: Path, title: str) -> Path:
    """The example of that title as a file."""
    path = folder / Path(title).name
    path.write_text(pages.titled(PAGE, title), encoding="utf-8")
    return path


@pytest.fixture
def added(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder in which formats and methods are found as in the package's own."""
    folder = tmp_path / "added"
    folder.mkdir()
    for package in (formats, methods):
        monkeypatch.setattr(package, "__path__", [*package.__path__, str(folder)])
    before = set(sys.modules)
    yield folder
    for name in set(sys.modules) - before:
        if name.endswith((".irc", ".shrunk_rows")):
            del sys.modules[name]


def test_reader(added: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(added, "qaperso/data/formats/irc.py")
    monkeypatch.setattr(formats, "FORMATS", (*formats.FORMATS, "irc"))
    log, output = write(tmp_path, "harbour.log"), tmp_path / "data"
    assert formats.detect(log) == ("irc", "lines of the form DATE TIME <NAME> TEXT")
    words = ["--input", str(log), "--output", str(output), "--dev", "0", "--test", "0", "--clusters", "1"]
    assert prepare.main(words) == 0
    found = {(d.responder, d.querier, d.query, d.reply, d.group) for d in prepared.read(output)}
    assert found == {
        ("noor", "ida", "Is it ready?", "Almost.", "harbour 2021-05-01"),
        ("bram", "noor", "Almost.", "And mine?", "harbour 2021-05-01"),
        ("noor", "bram", "And mine?", "Yours never is.", "harbour 2021-05-01"),
    }
    assert json.loads((output / "stats.json").read_text())["counts"]["system lines"] == 1
    log.write_text("2021-13-01 10:00:01 <ida> Hello\n")
    with pytest.raises(
        UserError, match=r"harbour\.log:1: found '2021-13-01 10:00:01', expected Unix seconds or a date"
    ):
        list(formats.load("irc").read(log, collections.Counter()))


def test_every_method_has_every_function() -> None:
    found = [m.name for m in pkgutil.iter_modules(methods.__path__) if m.name != "base"]
    assert {"qar", "pplug", "dpl"} <= set(found)
    for name in found:
        assert lacking(methods.load(name)) == set(), name


def lacking(method: ModuleType) -> set[str]:
    """What the architecture's table of a method's functions has, and this one has not; one of them is for a few only."""
    section = (PAGE.parent / "architecture.md").read_text(encoding="utf-8").split("## A method")[1].split("\n## ")[0]
    wanted = set(re.findall(r"^\| `(\w+)\(", section, re.MULTILINE)) - {"annotate"}
    assert {"preface", "preface_tokens", "loss"} <= wanted
    return {name for name in wanted if not callable(getattr(method, name, None))}


def test_method(added: Path) -> None:
    write(added, "qaperso/methods/shrunk_rows.py")
    method, setting = methods.load("shrunk_rows"), helpers.setting("shrunk_rows")
    assert lacking(method) == set()
    optimizer, _ = step.make_optimizer(setting.config, 10)
    trainable, base, memory = helpers.build(setting, method)
    assert not trainable["tower"]["rows"].any()
    state = step.init_state(optimizer, helpers.shaken(trainable), memory)
    batch = helpers.batch(0)
    new, found = helpers.stepper(setting, method, optimizer)(state, base, helpers.stack([batch]), jax.random.key(0))
    rows, asked = np.asarray(state.trainable["tower"]["rows"], np.float64), batch.inputs
    apart = np.square(rows[asked.querier] - rows[0]).sum(-1)[asked.present].mean()
    assert found["ridge"] == pytest.approx(apart, rel=1e-5)
    assert found["loss"] == pytest.approx(float(found["lm"]) + 0.1 * apart, rel=1e-5)
    assert all(jax.tree.leaves(jax.tree.map(lambda x: bool((x > 0).all()), new.largest)))


def patched(folder: Path) -> ModuleType:
    """The module of shapes as it is after `git apply mistral.diff`."""
    file = folder / "qaperso" / "models" / "config.py"
    file.parent.mkdir(parents=True)
    file.write_bytes((pages.ROOT / "qaperso" / "models" / "config.py").read_bytes())
    subprocess.run(["git", "apply", str(write(folder, "mistral.diff"))], cwd=folder, check=True)
    spec = importlib.util.spec_from_file_location("patched_config", file)
    module = sys.modules["patched_config"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    del sys.modules["patched_config"]
    return module


def test_model(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    from transformers import MistralConfig, MistralForCausalLM

    sizes = dict(vocab_size=48, hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=40)
    shape = MistralConfig(**sizes, num_key_value_heads=2, sliding_window=None)
    torch.manual_seed(0)
    theirs = MistralForCausalLM(shape).eval()
    theirs.save_pretrained(tmp_path / "model")
    said = json.loads((tmp_path / "model" / "config.json").read_text())
    module = patched(tmp_path)
    config = DecoderConfig(**dataclasses.asdict(module.from_hf(said, "config.json")))
    assert config.family == "mistral"
    params = hf.load(tmp_path / "model", config, jnp.float32)
    tokens = np.random.default_rng(0).integers(0, 48, (2, 20))

    @jax.jit
    def logits(params: dict, tokens: jax.Array) -> jax.Array:
        place, ones = jnp.broadcast_to(jnp.arange(20), tokens.shape), jnp.ones(tokens.shape, jnp.int32)
        hidden = decoder.forward(params, tokens, place, ones, ones > 0, config)
        return decoder.logits(params, hidden, config)

    with torch.no_grad():
        expected = theirs(torch.from_numpy(tokens)).logits.numpy()
    np.testing.assert_allclose(logits(params, tokens), expected, atol=1e-4)
    with pytest.raises(UserError, match=re.escape("c: sliding_window is 4096, supported is null")):
        module.from_hf(said | {"sliding_window": 4096}, "c")
    with pytest.raises(UserError, match="model_type is 'mistral', supported are llama, qwen2, qwen3"):
        hf.load_config(hf.Location("hf", tmp_path / "model"))
