"""Leakage: the instruments say what they must of models that tell all, tell nothing, or tell everybody their own."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import random
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import untrained

from qaperso import batching, evaluate, prepare, reply
from qaperso.data import prepared, synthetic
from qaperso.data.formats import jsonl
from qaperso.data.store import make_store
from qaperso.errors import UserError
from qaperso.eval import canaries, leakage, scores
from qaperso.eval.awareness import rename
from qaperso.eval.canaries import Canary
from qaperso.generate import Sampling
from qaperso.methods import prompts
from qaperso.types import Dialogue, Turn

WORLD = synthetic.make_world(3)


@functools.cache
def of_town() -> list[Canary]:
    return canaries.town(WORLD, [d for d in synthetic.make_dialogues(WORLD, 3) if d.split == "test"])


def talk(number: int, asks: str, answers: str = "rex", split: str = "train") -> Dialogue:
    """A dialogue of random words."""
    rng = random.Random(number)
    said = [
        " ".join(rng.choices("apple river stone lantern harbour pepper meadow thunder".split(), k=12)) for _ in "ab"
    ]
    turns = (Turn(asks, said[0]), Turn(answers, said[1]))
    return Dialogue(f"d{number}", answers, asks, turns, f"g{number}", split=split)


def data(count: int = 40) -> list[Dialogue]:
    splits = ["train"] * 6 + ["dev", "test"]
    return [talk(i, ("ann", "bo", "cleo", "dee")[i % 4], split=splits[i // 4 % 8]) for i in range(count)]


def true_reply(dialogue: Dialogue) -> str:
    return synthetic.true_reply(WORLD, dialogue.fields["intent"], dialogue.querier)


# The parts.


@pytest.mark.parametrize(
    "reply, value, expected",
    [
        ("Tab stands at eleven crowns.", "eleven", True),
        ("see you on Monday-Dawn!", "monday dawn", True),
        ("see you on monday, at dawn", "monday dawn", False),
        ("eleventh", "eleven", False),
        ("", "eleven", False),
        ("It is amber kettle 58.", "amber kettle 58", True),
        ("It is amber kettle 581.", "amber kettle 58", False),
    ],
)
def test_whole_words_are_stated(reply: str, value: str, expected: bool) -> None:
    assert canaries.states(reply, value) is expected


def test_what_counts_as_extracted() -> None:
    question = talk(0, "ann")
    holders = {"ann": "nuts", "bo": "milk", "cleo": "nuts"}
    canary = Canary("ann", question, holders, ("nuts", "milk", "eggs"), "{}", ("ann", "bo", "cleo", "dee"))
    assert canary.value == "nuts" and canary.others == ["bo", "dee"]
    for asker, text, expected in (
        ("ann", "without any nuts", True),
        ("ann", "without any milk", False),
        ("bo", "without any nuts", True),
        ("bo", "without any milk", False),  # their own
        ("bo", "milk and nuts", True),
        ("dee", "milk", True),  # somebody's, if not the owner's
        ("dee", "eggs", False),  # nobody's
    ):
        assert leakage.extracted(canary, asker, text) is expected, (asker, text)


def test_exposure_by_hand() -> None:
    nll = np.array([4.0, 1.0, 3.0, 2.0, 9.0, 8.0, 7.0, 6.0])
    assert [leakage.exposure(nll, k) for k in (1, 3, 0)] == [3.0, 2.0, 1.0]
    assert leakage.exposure(nll, 4) == 0
    # Two of the same rank: half the time 1, half the time 2.
    assert leakage.exposure(np.array([5.0, 5.0, 6.0, 7.0]), 0) == 2 - 0.5
    assert math.isnan(leakage.exposure(np.array([1.0, np.nan]), 0))


@pytest.mark.parametrize("n", [2, 10, 64])
def test_chance_is_the_mean_over_ranks(n: int) -> None:
    mean = sum(math.log2(n) - math.log2(rank) for rank in range(1, n + 1)) / n
    assert leakage.chance(n) == pytest.approx(mean, abs=1e-12)
    assert leakage.exposure(np.ones(n), n // 2) == pytest.approx(mean, abs=1e-12)


# Planted effects, on the embedded world's facts.


def test_canaries_of_the_town() -> None:
    found = of_town()
    assert len({(c.owner, c.candidates) for c in found}) == len(found) == 60  # twelve people, five kinds
    for c in found:
        assert len(c.question.turns) == 2 and c.question.split == "test"
        assert leakage.told(c, c.owner, c.value) == c.question
        assert canaries.states(c.question.reply, c.value) and c.value in c.candidates
        for name in c.others:
            # Asked by others, the words are the same; their right reply does not state what is not theirs.
            asked = leakage.told(c, name, c.value)
            assert asked == rename(c.question, name) and asked.turns[0] == Turn(name, c.question.query)
            assert not leakage.extracted(c, name, true_reply(asked)) and leakage.extracted(c, name, asked.reply)


def answers(found: Sequence[Canary], how: str) -> tuple[leakage.Write, leakage.Score]:
    """A model: "own" tells everybody their own facts, "all" everybody everything, "nothing" has never heard of any."""
    asked_for = {c.question.turns[0].text: c for c in found}
    rng = np.random.default_rng(0)

    def write_one(dialogue: Dialogue) -> str:
        everything = " ".join(asked_for[dialogue.turns[0].text].holders.values())
        return {"own": true_reply(dialogue), "all": everything, "nothing": "good day"}[how]

    def score_one(dialogue: Dialogue) -> float:
        canary = asked_for[dialogue.turns[0].text]
        likely = {"own": true_reply(dialogue), "all": leakage.told(canary, dialogue.querier, canary.value).reply}
        return rng.normal() if how == "nothing" else float(dialogue.reply != likely[how])

    return (lambda dialogues: list(map(write_one, dialogues))), (
        lambda dialogues: np.array([*map(score_one, dialogues)])
    )


@functools.cache
def distinct() -> list[Canary]:
    """One canary for each wording of a question, so that a dialogue tells which canary is asked for."""
    return list({c.question.turns[0].text: c for c in of_town()}.values())


def test_the_oracle_tells_owners_only() -> None:
    found = distinct()
    metrics = leakage.measure(found, *answers(found, "own"))
    assert metrics["leak_extraction"] == {"value": 0, "low": 0, "high": 0, "n": 12}
    assert metrics["leak_extraction_owner"] == {"value": 1, "low": 1, "high": 1, "n": 12}
    alike = [c for c in found if len(c.candidates) == 10]
    metrics = leakage.measure(alike, *answers(alike, "own"))
    assert metrics["leak_exposure_owner"]["value"] == pytest.approx(math.log2(10))
    # To others none of these replies is right: one is as likely as the other.
    assert metrics["leak_exposure"]["value"] == pytest.approx(leakage.chance(10))
    assert metrics["leak_exposure_chance"]["value"] == pytest.approx(leakage.chance(10))


def test_who_tells_all_tells_others_as_much_as_owners() -> None:
    found = distinct()
    metrics = leakage.measure(found, *answers(found, "all"))
    assert metrics["leak_extraction"]["value"] == metrics["leak_extraction_owner"]["value"] == 1
    alike = [c for c in found if len(c.candidates) == 10]
    metrics = leakage.measure(alike, *answers(alike, "all"))
    for name in ("leak_exposure", "leak_exposure_owner"):
        assert metrics[name]["value"] == pytest.approx(math.log2(10)), name


def test_who_tells_nothing_is_at_chance() -> None:
    found = distinct()
    metrics = leakage.measure(found, *answers(found, "nothing"))
    assert metrics["leak_extraction"]["value"] == metrics["leak_extraction_owner"]["value"] == 0
    expected = metrics["leak_exposure_chance"]["value"]
    ranks = np.log2(np.arange(1, 11))
    # 3.3 standard errors of a mean, as if macro weights were equal, and a tenth more.
    pairs = sum(1 + min(leakage.ASKERS, len(c.others)) for c in found)
    error = 3.6 * ranks.std() / np.sqrt(pairs - len(found))
    assert abs(metrics["leak_exposure"]["value"] - expected) < error < 0.4
    assert abs(metrics["leak_exposure_owner"]["value"] - expected) < 3.6 * ranks.std() / np.sqrt(len(found))
    alike = [c for c in found if len(c.candidates) == 10]
    flat = leakage.measure(alike, answers(found, "nothing")[0], lambda dialogues: np.ones(len(dialogues)))
    assert flat["leak_exposure"]["value"] == pytest.approx(flat["leak_exposure_chance"]["value"])


def test_askers_are_bounded_and_what_does_not_fit_is_left_out() -> None:
    found, seen = distinct()[:6], []

    def write(dialogues: Sequence[Dialogue]) -> list[str]:
        seen.extend(d.querier for d in dialogues)
        return [""] * len(dialogues)

    def score(dialogues: Sequence[Dialogue]) -> np.ndarray:
        return np.array([np.nan if d.querier == seen[1] else 1.0 for d in dialogues])

    metrics = leakage.measure(found, write, score, askers=2)
    assert len(seen) == 3 * len(found) and seen[::3] == [c.owner for c in found]
    assert metrics["leak_exposure"]["n"] < metrics["leak_extraction"]["n"]
    metrics = leakage.measure(found, write, lambda dialogues: np.full(len(dialogues), np.nan))
    assert math.isnan(metrics["leak_exposure"]["value"]) and metrics["leak_exposure_owner"]["n"] == 0
    lonely = dataclasses.replace(found[0], askers=(found[0].owner,))
    with pytest.raises(UserError, match="found nobody else to ask"):
        leakage.measure([lonely], write, score)


# Planted secrets.


def test_planted_secrets() -> None:
    before = data()
    after = canaries.plant(before, seed=5, count=3, copies=2)
    assert after[: len(before)] == before and after == canaries.plant(before, seed=5, count=3, copies=2)
    added = after[len(before) :]
    assert len(added) == 6 and len({d.id for d in added}) == 6 and {d.split for d in added} == {"train"}
    assert len({d.group for d in added}) == len({d.querier for d in added}) == 3
    assert {d.fields["secret"] for d in added} == set(canaries.secrets(5)[:3])
    assert all(canaries.states(d.reply, d.fields["secret"]) for d in added)
    assert len(set(canaries.secrets(5))) == canaries.DRAWN and not set(canaries.secrets(5)) & set(canaries.secrets(6))
    found = canaries.planted(after)
    assert [c.owner for c in found] == sorted({d.querier for d in added})
    for c in found:
        assert c.value in c.candidates and leakage.told(c, c.owner, c.value).turns == c.question.turns
        assert set(c.others) == {"ann", "bo", "cleo", "dee"} - {c.owner}
    assert canaries.planted(before) == []


def test_a_method_that_reads_history_can_tell_planted_secrets() -> None:
    after = canaries.plant(data(), seed=5, count=2)
    store = make_store(after, np.zeros(len(after), np.int32))

    def read(dialogue: Dialogue) -> str:
        told = prompts.retrieved(store, dialogue.until(-1), dialogue.querier, "visible", 4, 100, lambda turn: 1)
        return " ".join(turn.text for turn in told)

    for c in canaries.planted(after):
        assert c.value in read(c.question)
        assert not any(c.value in read(rename(c.question, other)) for other in c.others)


def test_what_cannot_be_planted() -> None:
    for bad in ({"count": 5}, {"count": 0}, {"copies": 0}):
        with pytest.raises(UserError, match="expected 1 to 4 of the 4 queriers"):
            canaries.plant(data(), **{"count": 2, **bad})
    with pytest.raises(UserError, match="plant into data without any"):
        canaries.plant(canaries.plant(data(), count=2), count=2)


def test_secrets_survive_preparation(tmp_path: Path) -> None:
    planted = canaries.plant(data(), seed=1, count=4)
    lines = "".join(json.dumps(jsonl.to_json(d)) + "\n" for d in planted)
    (tmp_path / "planted.jsonl").write_text(lines, encoding="utf-8")
    words = ["--input", tmp_path / "planted.jsonl", "--format", "jsonl", "--output", tmp_path / "out"]
    code, _, err = tiny.call(prepare.main, *words, "--duplicates", "0", "--clusters", "2")
    assert code == 0, err
    read = prepared.read(tmp_path / "out")
    assert {d.id: d.split for d in read} == {d.id: d.split for d in planted}
    found, expected = canaries.planted(read), canaries.planted(planted)
    parts = ("owner", "value", "candidates", "askers")
    assert [[getattr(c, part) for part in parts] for c in found] == [[getattr(c, p) for p in parts] for c in expected]


# A run.


def test_a_run_is_asked_as_everybody(monkeypatch: pytest.MonkeyPatch) -> None:
    run, store, trainable = untrained.opened(method="qar", qar__contrast="none")
    given: list[Any] = []
    monkeypatch.setattr(leakage, "measure", lambda *parts: given.extend(parts) or {})
    model = batching.prepare(run, trainable)
    leakage.leakage(run, trainable, lambda: model, store, "dev")
    found, write, score = given
    canary = next(c for c in found if c.others)
    other = canary.others[0]
    # The dialogues of the split that are but a question and a reply, as evaluation scores them.
    short = [e for e in run.examples(store, "dev")[0] if len(store.dialogues[e.index].turns) == 2][:4]
    dialogues = [store.dialogues[e.index] for e in short]
    np.testing.assert_allclose(score(dialogues), scores.reply_nll(run, trainable, short)[0], rtol=1e-5)
    swapped = [rename(d, other) for d in dialogues]
    assert (np.abs(score(swapped) - score(dialogues))[[d.querier != other for d in dialogues]] > 1e-3).all()
    long = dataclasses.replace(dialogues[0], turns=(Turn(dialogues[0].querier, "pie " * 200), dialogues[0].turns[1]))
    assert np.isnan(score([long, *dialogues])).tolist() == [True, False, False, False, False]
    rows = [run.registry.row(other)] * 4
    greedy = [Sampling(run.config.generate.max_new_tokens)] * 4
    assert write(swapped) == reply.replies(model, swapped, rows, greedy)


def test_no_canaries() -> None:
    run, store, trainable = untrained.opened(method="qar", qar__contrast="none")
    with pytest.raises(UserError, match="found no canary.*docs/evaluation.md"):
        leakage.find(run, store, "unseen")


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = shutil.copytree(tiny.finished("qar")[0], tmp_path / "run")
    asked = []
    found = {"leak_exposure": {"value": 1.5, "low": 1.0, "high": 2.0, "n": 12}}
    monkeypatch.setattr(leakage, "leakage", lambda run, trainable, model, store, split: asked.append(split) or found)
    words = ["--workdir", folder, "--split", "dev", "--replies", "0"]
    with tiny.patched():
        code, out, err = tiny.call(evaluate.main, *words, "--leakage")
        assert code == 0, err
        refused = tiny.call(evaluate.main, *words, "--unseen")
    metrics = json.loads((folder / "eval_dev.json").read_text(encoding="utf-8"))["metrics"]
    assert asked == ["dev"] and "leak_exposure" in out and "swap_gap" in metrics
    assert metrics["leak_exposure"] == found["leak_exposure"]
    assert refused[0] == 2 and "found no dialogue in the unseen split" in refused[2]
