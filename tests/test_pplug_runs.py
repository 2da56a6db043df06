"""PPlug from command to command: the embedded town, and LaMP's tasks from files in the benchmark's layout."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import helpers
import numpy as np
import pytest
from tiny import TINY, arguments, call, one_device, record, trained  # noqa: F401

from qaperso import chat, enrol, evaluate, forget, prepare, rows, run, train
from qaperso.data import load
from qaperso.data.formats import jsonl
from qaperso.eval import awareness
from qaperso.models import decoder, hf
from qaperso.models import tokenizer as tokenizers
from qaperso.models.config import DecoderConfig
from qaperso.people import Person
from qaperso.types import Dialogue, Turn

PLUG = ("method=pplug", "pplug.encoder=base", "pplug.history=16", "pplug.query=16", "pplug.temperature=0.1")
PLACES = "harbour lighthouse pier ferry market tower bridge garden mill quay".split()
MOODS = "calm stormy bright foggy".split()


def metrics(folder: Path, split: str = "test") -> dict[str, Any]:
    return json.loads((folder / f"eval{'' if split == 'test' else '_' + split}.json").read_text())["metrics"]


@pytest.mark.usefixtures("one_device")
def test_train_evaluate_and_chat(tmp_path: Path) -> None:
    folder, cache = tmp_path / "run", tmp_path / "vectors"
    words = arguments(TINY, folder, *PLUG, f"vectors={cache}")
    code, out, err = call(train.main, *words)
    assert code == 0 and "final step=8" in out, err
    line = next(line for line in err.splitlines() if line.startswith("history: "))
    assert "by 'base'" in line and " bytes a querier and responder" in line and " 0 of them new" not in line
    losses = [r["loss"] for r in record(folder) if "loss" in r]
    assert len(losses) == 8 and all(np.isfinite(losses))
    # The embedder and nothing else has a checkpoint; the vectors are not made again.
    opened = run.open_run(folder)
    assert set(run.restore(opened)[0]) == {"plug"} and " 0 of them new" in opened.reader.summary()
    assert call(train.main, *words)[0] == 0 and [r["loss"] for r in record(folder) if "loss" in r] == losses

    code, out, err = call(evaluate.main, "--workdir", folder, "--replies", 2)
    assert code == 0 and "history_gap" in out, err
    found = metrics(folder)
    assert {"reply_nll", "history_gap", "exact"} <= set(found) and found["history_gap"]["low"] is not None
    assert "history is read under the true name" in (folder / "report.html").read_text()

    # Somebody the run has never met, by their dialogues alone.
    turns = (Turn("zoe", "is there any bread?"), Turn("maren", "ahoy, zoe: aye. fair winds."))
    told = tmp_path / "zoe.jsonl"
    told.write_text(json.dumps(jsonl.to_json(Dialogue("z", "maren", "zoe", turns, "z"))) + "\n")
    asks = ("--workdir", folder, "--querier", "zoe", "--once", "is there any bread?")
    assert "querier 'zoe' is not known" in call(chat.main, *asks)[2]
    code, out, err = call(enrol.main, "--workdir", folder, "--querier", "zoe", "--input", told)
    assert code == 0 and "no row was fitted" in out, err
    assert call(chat.main, *asks)[0] == 0
    asked = Dialogue("n", "maren", "zoe", (turns[0], Turn("maren", "")), "n")
    now = run.open_run(folder).columns(asked)["history"].index
    assert len(now) == 1 and not len(opened.columns(asked)["history"].index)
    code, out, err = call(forget.main, "--workdir", folder, "--querier", "zoe")
    assert code == 0 and f"'{cache}' keeps vectors" in " ".join(out.split()), out + err
    assert "querier 'zoe' is not known" in call(chat.main, *asks)[2]
    # The same dialogue, taken in by a run that is open.
    zoe = Person("zoe", rows.free_row(opened.registry), 0, "", None, (Dialogue("z", "maren", "zoe", turns, "z"),), {})
    assert len(rows.heard(opened, [zoe]).columns(asked)["history"].index) == 1
    # It is no base for another run.
    code, _, err = call(train.main, *arguments(TINY, tmp_path / "other", "method=sft", f"base={folder}"))
    assert code == 2 and "user embedder" in err


@pytest.mark.slow
@pytest.mark.usefixtures("one_device")
def test_qar_with_soft_tokens_trains(tmp_path: Path) -> None:
    trained(TINY, tmp_path / "run", "method=qar", *PLUG[1:])
    opened = run.open_run(tmp_path / "run")
    assert {"plug", "tower", "lora", "heads"} == set(run.restore(opened)[0])


def text(i: int, seed: int) -> str:
    return f"the {PLACES[(3 * i + seed) % 10]} was {MOODS[(i + seed) % 4]} near the {PLACES[(7 * i + 2 * seed + 1) % 10]} on day {i}"


def question(task: int, i: int) -> tuple[str, list[dict[str, Any]], str]:
    """Input, profile and gold output of user i; all that is not the benchmark's instruction is ours."""
    said = [text(10 * i + k, task) for k in range(4)]
    title = [f"{PLACES[(i + k) % 10]} {MOODS[k % 4]}" for k in range(4)]
    plain = [{"id": str(k), "text": said[k], "title": title[k]} for k in range(3)]
    if task == 1:
        ask = (
            f'For an author who has written the paper with the title "{title[3]}", which reference is related? Just answer with [1]'
            f' or [2] without explanation. [1]: "{title[0]}" [2]: "{title[1]}"'
        )
        return ask, [{"id": str(k), "title": title[k], "abstract": said[k]} for k in range(3)], f"[{1 + i % 2}]"
    if task == 2:
        ask = "Which tag does this movie relate to among the following tags? Just answer with the tag name without further"
        tags = ", ".join(MOODS)
        profile = [{"id": str(k), "description": said[k], "tag": MOODS[k]} for k in range(3)]
        return f"{ask} explanation. tags: [{tags}] description: {said[3]}", profile, MOODS[i % 4]
    if task == 3:
        ask = (
            "What is the score of the following review on a scale of 1 to 5? just answer with 1, 2, 3, 4, or 5 without"
        )
        profile = [{"id": str(k), "text": said[k], "score": str(1 + k), "date": f"2020-0{k + 1}-01"} for k in range(3)]
        return f"{ask} further explanation. review: {said[3]}", profile, str(1 + i % 5)
    if task == 4:
        return f"Generate a headline for the following article: {said[3]}", plain, title[3]
    if task == 5:
        profile = [{"id": str(k), "abstract": said[k], "title": title[k]} for k in range(3)]
        return f"Generate a title for the following abstract of a paper: {said[3]}", profile, title[3]
    ask = "Paraphrase the following tweet without any explanation before or after it:"
    return f"{ask} {said[3]}", [{"id": str(k), "text": said[k]} for k in range(3)], f"o {said[3]}"


TASKS = (1, 2, 3, 4, 5, 7)


def write_lamp(folder: Path) -> None:
    """Six tasks with training and development questions, a user each, as the benchmark lays its files out."""
    for task in TASKS:
        (folder / f"LaMP_{task}").mkdir(parents=True)
        for split, users in (("train", range(6)), ("dev", range(6, 9))):
            asked, golds = [], []
            for i in users:
                ask, profile, gold = question(task, i)
                name = f"{task}{i}"
                asked.append({"id": name, "input": ask, "profile": profile})
                golds.append({"id": name, "output": gold})
            where = folder / f"LaMP_{task}"
            (where / f"{split}_questions.json").write_text(json.dumps(asked))
            (where / f"{split}_outputs.json").write_text(json.dumps({"task": f"LaMP_{task}", "golds": golds}))


def write_base(folder: Path) -> None:
    """A tiny model whose tokeniser knows the words of the questions."""
    asked = [part for task in TASKS for i in range(9) for part in (question(task, i)[0], question(task, i)[2])]
    tokenizer = tokenizers.word_tokenizer(
        [*asked, "user LaMP_1 LaMP_2 LaMP_3 LaMP_4 LaMP_5 LaMP_7 assistant", *map(str, range(100))]
    )
    model = DecoderConfig(len(tokenizer), 32, 2, 2, 1, 16, 48, tied=True, eos_ids=(2,))
    hf.save(folder, helpers.drawn(decoder.declare(model), 0), model)
    tokenizers.save_tokenizer(tokenizer, folder)


@pytest.mark.usefixtures("one_device")
def test_lamp_s_tasks_from_files_to_metrics(tmp_path: Path) -> None:
    write_lamp(tmp_path / "lamp")
    write_base(tmp_path / "base")
    data, folder = tmp_path / "data", tmp_path / "run"
    code, out, err = call(
        prepare.main, "--input", tmp_path / "lamp", "--output", data, "--clusters", "1", "--duplicates", 0, "--test", 0
    )
    assert code == 0, err
    keys = ("data.format=prepared", f"data.path={data}", "data.clusters=0", f"base={tmp_path / 'base'}")
    more = (
        "batch.length=160",
        "batch.targets=96",
        "batch.queriers=0",
        "pplug.query=48",
        "steps=4",
        "checkpoint_every=4",
    )
    trained(TINY, folder, *(p for p in PLUG if "query" not in p), *keys, *more)
    code, out, err = call(evaluate.main, "--workdir", folder, "--split", "dev")
    assert code == 0, err
    found = metrics(folder, "dev")
    for task in TASKS:
        names = {"accuracy", "macro_f1"} if task < 3 else {"mae", "rmse"} if task == 3 else {"rouge_1", "rouge_l"}
        for name in names:
            assert found[f"lamp_{task}_{name}"]["n"] == 3, name
            assert np.isfinite(found[f"lamp_{task}_{name}"]["value"])
    # The users of dev were never met; their profiles are read, and somebody else's do worse or better, but not the same.
    opened = run.open_run(folder)
    store = load.load_store(opened.config.data)
    asked = next(d for d in store.dialogues if d.split == "dev" and d.responder == "LaMP_3")
    assert asked.querier not in opened.registry.queriers
    column = opened.columns(asked)["history"]
    texts = [f"{entry['query']}\n{entry['reply']}" for entry in asked.fields["history"]]
    np.testing.assert_array_equal(column.index, column.source.find(texts))
    ids = opened.tokenizer.encode(asked.fields["query"], add_special_tokens=False)
    assert opened.columns(asked)["query"][: len(ids)].tolist() == ids
    other = next(d for d in store.dialogues if d.split == "train" and d.responder == "LaMP_3")
    swapped = opened.columns(awareness.rename(asked, other.querier))
    # What a user of training asked is their history, too, to every question but itself; it has no date.
    own = opened.columns(other)["history"].index
    told = swapped["history"].source.find([f"{other.query}\n{other.reply}"])
    np.testing.assert_array_equal(swapped["history"].index, [*told, *own])
    assert found["history_gap"]["n"] == 18 and found["history_gap"]["value"] != 0
