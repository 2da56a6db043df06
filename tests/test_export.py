"""Exports: peft and transformers compute what the run computes; a copied folder is the run."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import helpers
import huggingface_hub
import jax
import numpy as np
import pytest
import untrained
from huggingface_hub import errors
from newcomers import lines_of, renamed, replies, town
from tiny import call, contents, finished, one_device, one_mesh  # noqa: F401

from qaperso import chat, enrol, export, forget, generate, people, portable, reply, run
from qaperso.errors import UserError
from qaperso.methods import base
from qaperso.models import decoder, towers
from qaperso.people import Person
from qaperso.run import Run

pytestmark = pytest.mark.usefixtures("one_device")


def exported(name: str, kind: str, target: Path) -> Path:
    """A finished run as a folder."""
    code, out, err = call(export.main, "--workdir", finished(name)[0], "--output", target, "--format", kind)
    assert code == 0 and str(target) in out, err
    return target


def question(opened: Run) -> Any:
    """A prompt of the run."""
    return reply.make_prompt(opened, reply.question(opened, [], "pip", "what do i still owe?", "maren"))


def logits(folder: Path, tokens: np.ndarray) -> np.ndarray:
    """What a run computes after each token of a sequence, float32[n, V]."""
    opened = run.open_run(folder)
    trainable, _, _ = run.restore(opened)
    inputs = helpers.device(generate.pad([dataclasses.replace(question(opened), tokens=tokens)], [0], len(tokens)))
    params, setting = opened.params_of(trainable), opened.setting
    with jax.set_mesh(opened.mesh):
        states = base.states(setting, params, inputs, opened.method.condition(setting, trainable, inputs))
        hidden = towers.join(trainable.get("tower", {}), params, states, setting.model)
        return np.asarray(decoder.logits(params, hidden, setting.model))[0]


def in_torch(model: Any, tokens: np.ndarray) -> np.ndarray:
    """The same by a transformers or peft model."""
    torch = pytest.importorskip("torch")
    with torch.no_grad():
        return model.eval()(torch.tensor(tokens[None].tolist())).logits[0].numpy()


def test_peft_computes_what_the_run_computes(tmp_path: Path) -> None:
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    folder = exported("adapter", "peft", tmp_path / "adapter")
    opened = run.open_run(finished("adapter")[0])
    tokens = question(opened).tokens
    frozen = transformers.AutoModelForCausalLM.from_pretrained(folder / "base")
    plain = in_torch(frozen, tokens)
    found = in_torch(peft.PeftModel.from_pretrained(frozen, str(folder)), tokens)
    expected = logits(finished("adapter")[0], tokens)
    np.testing.assert_allclose(found, expected, atol=2e-5)
    assert np.abs(found - plain).max() > 1e-3
    settings = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    assert (settings["r"], settings["lora_alpha"]) == (opened.config.lora.rank, opened.config.lora.alpha)
    assert len(settings["target_modules"]) == 7 and settings["base_model_name_or_path"] is None
    assert f'from_pretrained("{folder.name}/base")' in (folder / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", ["adapter", "all"])
def test_transformers_computes_what_the_run_computes(name: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    folder = exported(name, "merged", tmp_path / "merged")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    opened = run.open_run(finished(name)[0])
    asked = [{"role": "pip", "content": "what do i still owe?"}]
    for how in ({}, {"responder": "maren"}):
        found = tokenizer.apply_chat_template(asked, add_generation_prompt=True, tokenize=False, **how)
        assert tokenizer.encode(found, add_special_tokens=False) == question(opened).tokens.tolist()
    tokens = question(opened).tokens
    np.testing.assert_allclose(in_torch(model, tokens), logits(finished(name)[0], tokens), atol=2e-5)
    # Its own way of generating gives the run's own reply.
    torch = pytest.importorskip("torch")
    written = model.generate(torch.tensor(tokens[None].tolist()))[0, len(tokens) :]
    said = tokenizer.decode(written, skip_special_tokens=True).strip()
    assert said == replies(opened, run.restore(opened)[0], ["pip"])[0]


def test_a_template_calls_the_responder_by_any_name() -> None:
    jinja2 = pytest.importorskip("jinja2")
    opened, _, _ = untrained.opened(method="prompts")
    who = 'Zoë "Z" \\ 🌸'
    named = dataclasses.replace(opened, registry=dataclasses.replace(opened.registry, responders=(who,)))
    template = jinja2.Environment().from_string(export.chat_template(named))
    found = template.render(messages=[{"role": "pip", "content": "well?"}], add_generation_prompt=True)
    assert who in found and who in template.render(messages=[{"role": who, "content": "well?"}])


def test_rows_of_another_checkpoint_are_told_of_before_they_are_copied(tmp_path: Path) -> None:
    source = Path(shutil.copytree(finished("prototypes")[0], tmp_path / "source"))
    # As if training had gone on since, and found a better checkpoint: the copy could neither be opened nor mended.
    people.write(source, Person("zita", 13, 1, "other weights", np.zeros(4, np.float32), (), {}))
    code, out, err = call(export.main, "--workdir", source, "--output", tmp_path / "copy", "--format", "qaperso")
    assert (code, out) == (2, "") and "'zita' was enrolled on checkpoint 1, and this is checkpoint" in err
    assert f"python -m qaperso.enrol --workdir {source} --again" in err and list(tmp_path.iterdir()) == [source]


def test_a_copied_folder_is_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = Path(shutil.copytree(finished("prototypes")[0], tmp_path / "source"))
    file = lines_of(renamed(town(source, "pip", 1), "zita"), tmp_path / "zita.jsonl")
    assert call(enrol.main, "--workdir", source, "--querier", "zita", "--input", file)[0] == 0
    score = {"metrics": {"reply_nll": {"value": 1.5, "low": 1.25, "high": 1.75, "n": 7}}, "step": 3, "split": "test"}
    (source / "eval.json").write_text(json.dumps(score), encoding="utf-8")
    words = ("--workdir", source, "--output", tmp_path / "first" / "copy", "--format", "qaperso")
    code, _, err = call(export.main, *words)
    assert code == 0, err
    opened = run.open_run(source)
    expected = run.restore(opened)
    # Without the run, and anywhere.
    shutil.move(tmp_path / "first" / "copy", tmp_path / "copy")
    shutil.rmtree(source)
    folder = tmp_path / "copy"
    again = run.open_run(folder)
    found = run.restore(again)
    assert found[2] == expected[2] and jax.tree.structure(found) == jax.tree.structure(expected)
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(one, other)
    assert again.registry == opened.registry and again.registry.row("zita") == 13
    # What they said is not in it; how the run was scored is.
    assert again.people[0].dialogues == () and b"what do i" not in (folder / "enrolled" / "000013.json").read_bytes()
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert "library_name: qaperso" in card and "| reply_nll | 1.500 [1.250, 1.750] | 7 |" in card
    assert ("not of this one" in card) == (found[2] != 3) and "12 queriers, 1 responders" in card

    # By a name of the Hub.
    asked: list[str] = []
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name: asked.append(name) or str(folder))
    code, out, err = call(chat.main, "--workdir", "somebody/copy", "--querier", "zita", "--once", "well?")
    assert (code, err, asked) == (0, "", ["somebody/copy"]) and out.strip()

    def offline(name: str) -> str:
        raise errors.LocalEntryNotFoundError("no connection")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    code, _, err = call(chat.main, "--workdir", "somebody/copy", "--querier", "zita", "--once", "well?")
    assert code == 2 and "could not be had from the Hugging Face Hub (no connection)" in err

    # It holds no state to forget somebody of training in; whoever was enrolled can be forgotten.
    code, _, err = call(forget.main, "--workdir", folder, "--querier", "pip")
    assert code == 2 and "forget them in the run that it was exported from" in err
    assert call(forget.main, "--workdir", folder, "--querier", "zita")[0] == 0
    assert "zita" not in run.open_run(folder).registry.known
    # Another file of weights is noticed.
    path = folder / portable.TRAINABLE
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    code, _, err = call(chat.main, "--workdir", folder, "--querier", "pip", "--once", "well?")
    assert code == 2 and "another sha256" in err and "copy the exported folder again" in err
    path.unlink()
    assert "no such file" in call(chat.main, "--workdir", folder, "--querier", "pip", "--once", "well?")[2]


def test_whatever_keeps_from_the_hub_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    class ProxyError(Exception):
        """As a library below the Hub's has it, which says nothing."""

    def download(name: str) -> str:
        raise ProxyError

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    with pytest.raises(UserError, match=r"could not be had from the Hugging Face Hub \(ProxyError\); check"):
        portable.find(Path("somebody/copy"))


def test_everything_trained_is_a_run_without_a_base(tmp_path: Path) -> None:
    folder = exported("all", "qaperso", tmp_path / "copy")
    assert not (folder / portable.BASE).exists()
    tokens = question(run.open_run(folder)).tokens
    np.testing.assert_array_equal(logits(folder, tokens), logits(finished("all")[0], tokens))
    # It can be a base, like any run.
    assert run._digest(portable.bases.locate(str(folder))) != run._digest(
        portable.bases.locate(str(finished("all")[0]))
    )


def test_what_a_format_cannot_hold(tmp_path: Path) -> None:
    def refused(folder: Path, kind: str, target: Path = tmp_path / "new") -> str:
        code, out, err = call(export.main, "--workdir", folder, "--output", target, "--format", kind)
        assert (code, out) == (2, "") and err.startswith("error: ") and len(err.splitlines()) == 1, err
        return err

    for kind in ("peft", "merged"):
        assert (
            "which no plain decoder has" in (line := refused(finished("qar")[0], kind)) and "--format qaperso" in line
        )
    assert "there is no adapter; write it with --format merged" in refused(finished("all")[0], "peft")
    untrained_run, _, _ = untrained.opened(method="prompts")
    with pytest.raises(UserError, match="config.method='prompts' trains nothing"):
        export.check(untrained_run, {}, "merged")
    with pytest.raises(UserError, match="needs soft too, which peft cannot hold; write it with --format qaperso"):
        export.check(untrained_run, {"lora": {}, "soft": {}}, "peft")
    export.check(untrained_run, {}, "qaperso")
    reading = untrained.changed(untrained_run, prompts__kind="history", data__format="prepared", data__path="some/data")
    with pytest.raises(UserError, match="from the history in 'some/data', which is no part of an export"):
        export.check(reading, {}, "qaperso")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").write_text("mine", encoding="utf-8")
    assert "exists already" in refused(finished("adapter")[0], "merged", tmp_path / "full")
    for place in (".", "..", "/"):
        assert "expected the name of a new folder" in refused(finished("adapter")[0], "merged", Path(place))
    assert "cannot be written" in refused(finished("adapter")[0], "merged", tmp_path / "full" / "x" / "y")
    assert "is no run" in refused(tmp_path / "absent", "merged")
    # Nothing is left behind.
    assert [p.name for p in tmp_path.iterdir()] == ["full"] and len(contents(tmp_path / "full")) == 1
