"""Forgetting: the querier's numbers are gone from every file, everybody else's are the same to the last bit."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from newcomers import lines_of, renamed, replies, town
from tiny import TINY, arguments, call, contents, finished, one_device  # noqa: F401

from qaperso import arrays, chat, checkpoint, enrol, erase, evaluate, forget, people, run, train
from qaperso import config as configs
from qaperso.data import load
from qaperso.eval import scores
from qaperso.step import TrainState

pytestmark = pytest.mark.usefixtures("one_device")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A run with rows and prototypes, to be changed."""
    return Path(shutil.copytree(finished("prototypes")[0], tmp_path / "run"))


def states(folder: Path) -> dict[int, TrainState]:
    """The training state of each checkpoint."""
    opened = run.open_run(folder, enrolled=False)
    like, steps = erase.abstract_state(opened), checkpoint.steps(folder / run.CHECKPOINTS)
    return {number: checkpoint.state_of(folder / run.CHECKPOINTS, number, like) for number in steps}


def likelihoods(opened: run.Run, trainable: Any, without: str) -> np.ndarray:
    """NLL of the test replies to everybody but one."""
    store = load.load_store(opened.config.data)
    row = store.registry.row(without)
    examples = [e for e in opened.examples(store, "test")[0] if e.querier != row]
    return scores.reply_nll(opened, trainable, examples)[0]


def nothing_known(*_: Any) -> forget.Evidence:
    """Instead of what takes long to measure."""
    return forget.Evidence(0, 0, {}, [])


def holding(folder: Path, name: str) -> list[str]:
    """Files in which a name stands; the tokeniser's words are the town's, and numbers (`d` of a checkpoint) may spell it by chance."""
    files = (p for p in folder.rglob("*") if p.is_file() and not {"tokenizer", "d"} & set(p.parts))
    return [p.relative_to(folder).as_posix() for p in files if name.encode() in p.read_bytes()]


def test_somebody_of_training_is_forgotten_and_nobody_else_is_changed(folder: Path, tmp_path: Path) -> None:
    for name in ("predictions.jsonl", "report_dev.html", "items.npz"):
        (folder / name).write_text("pip said", encoding="utf-8")
    (folder / "notes.txt").write_text("nothing", encoding="utf-8")
    file = lines_of(renamed(town(folder, "voss", 1), "zita"), tmp_path / "zita.jsonl")
    assert call(enrol.main, "--workdir", folder, "--querier", "zita", "--input", file)[0] == 0
    opened, old = run.open_run(folder), states(folder)
    row, names = opened.registry.row("pip"), [n for n in opened.registry.known if n != "pip"]
    trainable = run.restore(opened)[0]
    nll, said = likelihoods(opened, trainable, "pip"), replies(opened, trainable, names)
    classes = np.flatnonzero(np.array(opened.record["classes"]["querier"]) == row).tolist()
    assert len(classes) and holding(folder, "pip")

    code, out, err = call(forget.main, "--workdir", folder, "--querier", "pip")
    assert code == 0, err
    # Outputs of everybody else, of the one who came later too, to the last bit.
    again = run.open_run(folder)
    assert again.registry.known == tuple(names) and again.registry.forgotten == (row,)
    assert [again.registry.row(name) for name in names] == [opened.registry.row(name) for name in names]
    # The same programs, which need not be compiled again, on what the run has now.
    changed = run.restore(again)[0]
    np.testing.assert_array_equal(likelihoods(opened, changed, "pip"), nll)
    assert replies(opened, changed, names) == said
    # Every checkpoint: their numbers are gone, all others are as they were.
    new = states(folder)
    assert new.keys() == old.keys() and len(new) > 1
    for number, state in new.items():
        table = np.asarray(state.trainable["tower"]["rows"])
        np.testing.assert_array_equal(table[row], table[0])
        assert erase.digest_of_others(state, row, classes) == erase.digest_of_others(old[number], row, classes)
        moments = [x for k, x in arrays.flat(state.optimizer).items() if k.endswith("tower/rows")]
        assert len(moments) == 2 and not any(np.asarray(x)[row].any() for x in moments)
        assert any(np.asarray(x).any() for x in moments)
        prototypes = {
            k: np.moveaxis(np.asarray(v), -1 if k == "counts" else 1, 0) for k, v in state.memory["prototypes"].items()
        }
        assert not any(value[classes].any() for value in prototypes.values())
        assert any(value.any() for value in prototypes.values())
    assert (checkpoint.steps(folder / run.CHECKPOINTS)) == checkpoint.steps(finished("prototypes")[0] / run.CHECKPOINTS)

    # The name is in no file; the receipt can be checked by who knows it.
    assert not holding(folder, "pip") and (folder / "notes.txt").exists()
    (place,) = (folder / "forgotten").iterdir()
    receipt = json.loads(place.read_text(encoding="utf-8"))
    assert load.is_named("pip", [receipt["who"]]) and not load.is_named("voss", [receipt["who"]])
    assert receipt["row"] == row and receipt["was"] == "trained" and receipt["removed"]["classes"] == len(classes)
    assert set(receipt["removed"]["files"]) == {"predictions.jsonl", "report_dev.html", "items.npz"}
    after = receipt["files"]["after"]
    assert {k: v for k, v in forget._digests(folder).items()} == after and receipt["files"][
        "before"
    ].keys() != after.keys()
    assert receipt["files"]["before"]["run.json"] != after["run.json"]
    # What remains is measured, and said.
    found = receipt["measured"]["metrics"]
    for key in ("forgotten_swap_gap_before", "forgotten_swap_gap", "forgotten_row_gain", "leak_exposure_owner"):
        assert found[key]["n"] > 0 and key in out
    store = load.load_store(opened.config.data)
    count = sum(d.querier == "pip" for d in store.dialogues)
    assert receipt["removed"]["dialogues"] == count and f"still has {count} dialogues of theirs" in out
    assert "only training anew without them takes that away" in out

    # What evaluates the run does not read them; nobody can ask as them, or train on.
    less = evaluate.store_reader()(folder)
    assert not any(d.querier == "pip" for d in less.dialogues) and len(less.dialogues) == len(store.dialogues) - count
    code, _, err = call(chat.main, "--workdir", folder, "--querier", "pip", "--once", "well?")
    assert code == 2 and "querier 'pip' is not known to this run" in err
    code, _, err = call(forget.main, "--workdir", folder, "--querier", "pip")
    assert code == 2 and "querier 'pip' is not known to this run" in err
    code, _, err = call(train.main, *arguments(TINY, folder, "method=qar", "qar.contrast=prototypes"))
    assert code == 2 and "somebody was forgotten in this run" in err and "--retrain NEW" in err
    # Their row is free for somebody else.
    file = lines_of(renamed(town(folder, "voss", 1), "rita"), tmp_path / "rita.jsonl")
    assert call(enrol.main, "--workdir", folder, "--querier", "rita", "--input", file)[0] == 0
    assert run.open_run(folder).registry.row("rita") == row


def test_somebody_enrolled_is_forgotten(folder: Path, tmp_path: Path) -> None:
    (folder / "notes.jsonl").write_text("", encoding="utf-8")
    before = contents(folder)
    file = lines_of(renamed(town(folder, "pip", 1), "zita"), tmp_path / "zita.jsonl")
    assert call(enrol.main, "--workdir", folder, "--querier", "zita", "--input", file)[0] == 0
    code, out, err = call(forget.main, "--workdir", folder, "--querier", "zita")
    assert code == 0 and "no number of theirs was ever learned" in out, err
    # Nobody can tell whom a language model wrote of.
    assert "'notes.jsonl' keeps what a language model wrote about queriers" in out
    now = contents(folder)
    assert {k: v for k, v in now.items() if k in before} == before and not holding(folder, "zita")
    assert {k.split("/")[0] for k in set(now) - set(before)} == {"enrolled", "forgotten", people.LOCK}
    assert not list((folder / "enrolled").iterdir()) and run.open_run(folder).registry.free_row() == 13
    code, _, err = call(forget.main, "--workdir", folder, "--retrain", tmp_path / "new")
    assert code == 2 and "no receipt of somebody forgotten who was in training" in err


def test_training_anew_leaves_out_all_who_were_forgotten(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(forget, "evidence_of", nothing_known)
    asked = []
    monkeypatch.setattr(train, "train", lambda config, target: asked.append((config, target)) or 143)
    for words in (("--querier", "pip"), ("--querier", "voss", "--retrain", tmp_path / "new")):
        code, out, err = call(forget.main, "--workdir", folder, *words)
    assert code == 143 and out.startswith("forgot 'voss', who was trained; removed: the name; the row"), err
    ((config, target),) = asked
    assert target == tmp_path / "new" and len(config.data.without) == 2
    old = run.open_run(folder).config
    assert configs.differences(old, config) == [f"data.without: () -> {config.data.without!r}"]
    assert not any(name in str(config.data.without) for name in ("pip", "voss"))
    whole = {d.querier for d in load.load_dialogues(old.data)}
    assert {d.querier for d in load.load_dialogues(config.data)} == whole - {"pip", "voss"}


@pytest.mark.slow
def test_a_run_trained_anew_has_never_met_them(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(finished("adapter")[0], tmp_path / "run"))
    code, out, err = call(forget.main, "--workdir", folder, "--querier", "pip", "--retrain", tmp_path / "new")
    assert code == 0 and "The run has no querier rows" in out and "final step=8" in out, err
    # Nothing of theirs was in these checkpoints apart from what all share.
    assert {k: v for k, v in contents(folder).items() if k.startswith(run.CHECKPOINTS)} == {
        k: v for k, v in contents(finished("adapter")[0]).items() if k.startswith(run.CHECKPOINTS)
    }
    new = run.open_run(tmp_path / "new")
    assert "pip" not in new.registry.known and len(new.registry.known) == 11 and not new.registry.forgotten
    assert not any(d.querier == "pip" for d in load.load_dialogues(new.config.data))
    assert not holding(tmp_path / "new", "pip")


def test_what_was_cut_off_is_done_again(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forget, "evidence_of", nothing_known)
    write, opened = checkpoint.write_json, run.open_run(folder)
    row = opened.registry.row("pip")

    def killed(path: Path, data: Any) -> None:
        if path.name == run.RECORD:
            raise KeyboardInterrupt
        write(path, data)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "write_json", killed)
        with pytest.raises(KeyboardInterrupt):
            forget.forget(folder, "pip")
    # Whoever opens it in between gets a whole run that knows the name, with a stranger's row.
    table = run.restore(run.open_run(folder))[0]["tower"]["rows"]
    np.testing.assert_array_equal(table[row], table[0])
    # As if the folders had been half exchanged, too.
    (folder / run.CHECKPOINTS).rename(folder / erase.NEW)
    shutil.copytree(folder / erase.NEW, folder / erase.OLD)
    receipt, _ = forget.forget(folder, "pip")
    assert receipt["row"] == row and not holding(folder, "pip")
    assert not any((folder / name).exists() for name in (erase.NEW, erase.OLD, erase.PARTIAL))


def test_a_number_that_changed_stops_it(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    honest = erase.erase

    def careless(state: TrainState, row: int, classes: Any) -> TrainState:
        state = honest(state, row, classes)
        lora = {
            **state.trainable["lora"],
            "q": {**state.trainable["lora"]["q"], "a": state.trainable["lora"]["q"]["a"] * 2},
        }
        return state.replace(trainable={**state.trainable, "lora": lora})

    before = contents(folder / run.CHECKPOINTS)
    monkeypatch.setattr(erase, "erase", careless)
    with pytest.raises(RuntimeError, match="did not come back as it was written"):
        erase.rewrite(run.open_run(folder), 3, [0])
    assert contents(folder / run.CHECKPOINTS) == before
    erase.mend(folder)
    assert not (folder / erase.PARTIAL).exists()


def test_what_cannot_be_forgotten(folder: Path) -> None:
    before = contents(folder)
    for words, part in (
        (("--querier", "pipp"), "did you mean 'pip'?"),
        (("--querier", "stranger"), "nobody to forget"),
        ((), "give --querier NAME, --retrain NEW, or both"),
        (("--retrain", folder / "new"), "no receipt"),
    ):
        code, out, err = call(forget.main, "--workdir", folder, *words)
        assert (code, out) == (2, "") and err.startswith("error: ") and part in err
    assert {k: v for k, v in contents(folder).items() if k != people.LOCK} == before
    code, _, err = call(forget.main, "--workdir", folder / "absent", "--querier", "pip")
    assert code == 2 and "is no run" in err
