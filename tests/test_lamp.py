"""LaMP's metrics: what counts as an answer, scikit-learn's figures, and the reader's dialogues."""

from __future__ import annotations

import collections
import dataclasses
import json
import math
from pathlib import Path

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
import untrained
from sklearn.metrics import accuracy_score, f1_score, mean_absolute_error, root_mean_squared_error

from qaperso import batching, reply
from qaperso.data.formats import lamp as reader
from qaperso.errors import UserError
from qaperso.eval import lamp, measure, overlap
from qaperso.types import Dialogue, Turn

TAGS = ["sci-fi", "comedy", "dark comedy", "based on a book"]
ASK = {
    1: 'For an author who has written the paper with the title "A", which reference is related? Just answer with [1] or'
    ' [2] without explanation. [1]: "B" [2]: "C"',
    2: "Which tag does this movie relate to among the following tags? Just answer with the tag name without further"
    f" explanation. tags: [{', '.join(TAGS)}] description: A whale.",
    3: "What is the score of the following review on a scale of 1 to 5? just answer with 1, 2, 3, 4, or 5 without"
    " further explanation. review: Fine.",
    4: "Generate a headline for the following article: Fog.",
}


def asked(task: int, true: list[str]) -> list[Dialogue]:
    """Dialogues of a task with these true answers."""
    name, people = f"LaMP_{task}", [f"user {i}" for i in range(len(true))]
    return [
        Dialogue(f"{i}", name, who, (Turn(who, ASK[task]), Turn(name, text)), f"{i}", fields={"task": name})
        for i, (who, text) in enumerate(zip(people, true, strict=True))
    ]


def values(task: int, true: list[str], replies: list[str]) -> dict[str, float]:
    """The metrics' values, without the task in their names."""
    found = lamp.score(asked(task, true), replies)
    return {name.removeprefix(f"lamp_{task}_"): metric["value"] for name, metric in found.items()}


@pytest.mark.parametrize(
    ("task", "true", "replies", "right", "unparsed"),
    [
        (1, "[1]", ["[1]", "1", " [1].\n", '"[1]"', "\n\n[1]\nbecause it is"], True, 0),
        (1, "[1]", ["[2]", "2"], False, 0),
        (1, "[1]", ["", "[3]", "[1] or [2]", "The answer is [1]", "[12]", "one"], False, 1),
        (2, "dark comedy", ["dark comedy", "Dark  Comedy.", "'dark comedy'", "- dark comedy"], True, 0),
        (2, "dark comedy", ["comedy", "Sci-Fi", "based on a book"], False, 0),
        (2, "dark comedy", ["", "?", "dark", "comedy, sci-fi", "dark comedies", "a dark comedy"], False, 1),
    ],
)
def test_what_is_a_label(task: int, true: str, replies: list[str], right: bool, unparsed: int) -> None:
    for text in replies:
        found = values(task, [true], [text])
        assert (found["accuracy"], found["unparsed"]) == (float(right), unparsed), text


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        *[(x, 4.0) for x in ("4", " 4.", "**4**", "4.0", '"4"', "+4", "4/")],
        ("2.5", 2.5),
        ("1.", 1.0),
        *[(x, None) for x in ("", "four", "-4", "- 4", "0", "5.5", "6", "45", "4/5", "4 stars", "4 5", "nan", "4e0")],
    ],
)
def test_what_is_a_rating(text: str, expected: float | None) -> None:
    assert lamp.rating(text) == expected


def test_what_is_no_rating_is_as_wrong_as_can_be() -> None:
    # True 1, 2, 3, 4, 5: off by 4, 3, 2, 3, 4.
    found = values(3, ["1", "2", "3", "4", "5"], ["?"] * 5)
    assert found == pytest.approx({"mae": 16 / 5, "rmse": math.sqrt(54 / 5), "unparsed": 1})
    found = values(3, ["1", "5"], ["2", "great\n5"])
    assert found == pytest.approx({"mae": 5 / 2, "rmse": math.sqrt(17 / 2), "unparsed": 1 / 2})
    with pytest.raises(UserError, match="0: the true score is 'good', expected a number from 1 to 5"):
        lamp.score(asked(3, ["good"]), ["3"])


@hypothesis.settings(deadline=None, max_examples=25)
@hypothesis.given(
    st.lists(st.tuples(st.sampled_from(TAGS), st.sampled_from([*TAGS, "what?"])), min_size=1, max_size=20)
)
def test_labels_score_as_scikit_learn_says(given: list[tuple[str, str]]) -> None:
    true, replies = map(list, zip(*given, strict=True))
    found = values(2, true, replies)
    present = sorted((set(true) | set(replies)) - {"what?"})
    assert found["accuracy"] == pytest.approx(accuracy_score(true, replies))
    assert found["macro_f1"] == pytest.approx(f1_score(true, replies, labels=present, average="macro", zero_division=0))
    assert found["unparsed"] == pytest.approx(replies.count("what?") / len(replies))


@hypothesis.settings(deadline=None, max_examples=25)
@hypothesis.given(st.lists(st.tuples(st.integers(1, 5), st.floats(1, 5)), min_size=1, max_size=20))
def test_ratings_score_as_scikit_learn_says(given: list[tuple[int, float]]) -> None:
    true, said = zip(*given, strict=True)
    said = [round(x, 3) for x in said]
    found = values(3, list(map(str, true)), [f"{x:.3f}" for x in said])
    assert found["mae"] == pytest.approx(mean_absolute_error(true, said))
    assert found["rmse"] == pytest.approx(root_mean_squared_error(true, said))
    assert found["unparsed"] == 0


def test_the_interval_of_macro_f1_recomputes_it() -> None:
    rng = np.random.default_rng(0)
    true, replies = rng.choice(TAGS[:3], 30).tolist(), rng.choice([*TAGS[:3], "what?"], 30).tolist()
    found = lamp.score(asked(2, true), replies)["lamp_2_macro_f1"]
    drawn, names = [], sorted(map(str, range(30)))
    for pick in np.random.default_rng(0).integers(30, size=(2000, 30)):
        members = [int(names[g]) for g in pick]
        a, b = [true[i] for i in members], [replies[i] for i in members]
        hits = [2 * sum(x == y == t for x, y in zip(a, b, strict=True)) for t in TAGS[:3]]
        both = [a.count(t) + b.count(t) for t in TAGS[:3]]
        drawn.append(np.mean([h / n for h, n in zip(hits, both, strict=True) if n]))
    assert [found["low"], found["high"]] == pytest.approx(np.quantile(drawn, [0.025, 0.975]).tolist())


def test_tasks_are_scored_apart() -> None:
    dialogues = asked(4, ["Late, late ferry", "Grey day"]) + asked(1, ["[1]"]) + asked(3, ["5"])
    dialogues.append(dataclasses.replace(dialogues[0], fields={"task": "abstract_generation"}))
    replies = ["late ferry", "A grey day", "[2]", "3", "late ferry"]
    found = lamp.score(dialogues, replies)
    expected = {"lamp_1_accuracy": 1, "lamp_1_macro_f1": 1, "lamp_1_unparsed": 1, "lamp_3_mae": 1, "lamp_3_rmse": 1}
    expected |= {"lamp_3_unparsed": 1, "lamp_4_rouge_1": 2, "lamp_4_rouge_l": 2}
    assert {name: metric["n"] for name, metric in found.items()} == expected
    rouge = overlap.rouge(["Late, late ferry", "Grey day"], replies[:2])
    assert found["lamp_4_rouge_1"]["value"] == rouge["rouge_1"].mean() == pytest.approx(0.8)
    assert found["lamp_3_rmse"]["value"] == 2
    assert lamp.score(dialogues[-1:], ["late ferry"]) == {} == lamp.score([], [])


@pytest.mark.parametrize(("task", "gold", "name"), [(2, "comedy", "LaMP_2M"), (3, 5, "LaMP_3"), (1, "[2]", "lamp 1")])
def test_dialogues_of_the_reader_are_known(tmp_path: Path, task: int, gold: str | int, name: str) -> None:
    path = tmp_path / "dev_questions.json"
    path.write_text(json.dumps([{"id": "1", "input": ASK[task], "profile": []}]), encoding="utf-8")
    golds = {"task": name, "golds": [{"id": "1", "output": gold}]}
    (tmp_path / "dev_outputs.json").write_text(json.dumps(golds), encoding="utf-8")
    dialogues = list(reader.read(path, collections.Counter()))
    right, wrong = (lamp.score(dialogues, [text]) for text in (str(gold), "1"))
    measure = f"lamp_{task}_" + ("mae" if task == 3 else "accuracy")
    assert (right[measure]["value"], wrong[measure]["value"]) == ((0, 4) if task == 3 else (1, 0))
    # An offered label is an answer though it is true of no dialogue.
    assert wrong[f"lamp_{task}_unparsed"]["value"] == (task == 2)
    assert lamp.listed(dialogues) == ([" " * (i > 0) + tag for i, tag in enumerate(TAGS)] if task == 2 else [])


def test_they_are_measured_beside_perplexity(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    run, store, trainable = untrained.opened(method="sft")
    tasks = [dataclasses.replace(d, fields={**d.fields, "task": "LaMP_4"}) for d in store.dialogues]
    monkeypatch.setattr(batching, "prepare", lambda *_: None)
    monkeypatch.setattr(reply, "replies", lambda model, dialogues, *_: [d.query for d in dialogues])
    store = dataclasses.replace(store, dialogues=tuple(tasks))
    found = measure.measure(
        run, trainable, store, "dev", 1, measure.Wanted(replies=4), tmp_path / "replies.jsonl"
    ).metrics
    assert found["lamp_4_rouge_1"] == found["rouge_1"] and found["rouge_1"]["n"] == 4
    assert {"rouge_l", "bleu", "chrf", "distinct_1", "distinct_2", "self_bleu"} <= set(found)
    for key in ("value", "low", "high"):
        assert found["perplexity"][key] == pytest.approx(math.exp(found["reply_nll"][key]))
    assert found["perplexity"]["n"] == found["reply_nll"]["n"]
