"""The same query to everybody: what is asked, how replies are compared, and effects that are known beforehand."""

from __future__ import annotations

import functools
import itertools
import random
from collections.abc import Callable, Sequence
from pathlib import Path

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
import untrained
from tiny import call

from qaperso import batching, evaluate
from qaperso.data import synthetic
from qaperso.data.store import Store, make_store
from qaperso.eval import measure, paired, report
from qaperso.eval.paired import Asked
from qaperso.generate import Sampling
from qaperso.run import Run
from qaperso.types import Dialogue, Turn

LEVEL = 0.999
GREEDY = Sampling(new_tokens=8)
COUNT, QUERIERS = 60, 6


@functools.cache
def town() -> tuple[synthetic.World, Store]:
    world = synthetic.make_world(0)
    dialogues = synthetic.make_dialogues(world)
    return world, make_store(dialogues, np.zeros(len(dialogues), np.int32))


class Recorder:
    """A generator that notes what it was asked; its replies are numbers."""

    def __init__(self) -> None:
        self.calls: list[tuple[Dialogue, int, Sampling]] = []

    def __call__(self, dialogues: Sequence[Dialogue], rows: Sequence[int], how: Sequence[Sampling]) -> list[str]:
        self.calls += zip(dialogues, rows, how, strict=True)
        return [str(i) for i in range(len(dialogues))]


def anyway(dialogue: Dialogue) -> bool:
    return True


def test_what_is_asked() -> None:
    world, store = town()
    generate = Recorder()
    found = paired.ask(generate, anyway, store, store.split("test"), 7, GREEDY, queriers=4, draws=3, seed=5)
    assert len(found) == 7 and len(generate.calls) == 7 * 4 * 3
    replies = iter(generate.calls)
    number = itertools.count()
    for asked in found:
        (whole,) = [d for d in store.dialogues if d.id == asked.dialogue.id]
        assert asked.queriers[0] == whole.querier and len(set(asked.queriers)) == 4
        assert set(asked.queriers) <= {person.name for person in world.people}
        for name, texts in zip(asked.queriers, asked.replies, strict=True):
            assert texts == tuple(str(next(number)) for _ in range(3))
            for _ in range(3):
                dialogue, row, how = next(replies)
                # The words of the query, nothing before it, another name and row.
                assert dialogue.turns == (Turn(name, whole.query), Turn(whole.responder, whole.reply))
                assert (dialogue.querier, row) == (name, store.registry.row(name))
                assert (how.new_tokens, how.temperature, how.top_p) == (8, paired.TEMPERATURE, 1.0)
    assert any(len(d.turns) > 2 for d in store.dialogues if d.id in {a.dialogue.id for a in found})
    assert len({how.seed for _, _, how in generate.calls}) == len(generate.calls)


def test_queries_are_evenly_spread_and_draws_their_own() -> None:
    _, store = town()
    indices, ask = store.split("test"), functools.partial(paired.ask, fits=anyway, store=store, how=GREEDY)
    few, many = Recorder(), Recorder()
    found = ask(few, indices=indices, count=3)
    assert [a.dialogue.id for a in found] == [
        store.dialogues[indices[i]].id for i in (0, round((len(indices) - 1) / 2), -1)
    ]
    everything = ask(many, indices=indices, count=10**6, queriers=12)
    assert len(everything) == len(indices) and {len(a.queriers) for a in everything} == {12}
    seeds = {(d.id, d.querier): how.seed for d, _, how in many.calls}
    assert all(seeds[d.id, d.querier] == how.seed for d, _, how in few.calls[1::2])
    assert ask(Recorder(), indices=indices, count=3) == found
    assert ask(Recorder(), indices=indices, count=3, seed=1) != found


def test_the_run_s_own_temperature() -> None:
    _, store = town()
    generate = Recorder()
    paired.ask(generate, anyway, store, store.split("dev"), 2, Sampling(8, 1.3, 0.9, seed=4))
    assert {(how.temperature, how.top_p) for _, _, how in generate.calls} == {(1.3, 0.9)}


def test_a_query_that_does_not_fit_for_somebody_is_left_out() -> None:
    _, store = town()
    generate = Recorder()
    found = paired.ask(
        generate, lambda d: d.querier != "tilda", store, store.split("test"), 40, GREEDY, queriers=3, draws=2
    )
    assert 10 < len(found) < 40 and all("tilda" not in a.queriers for a in found)
    assert len(generate.calls) == len(found) * 6 and found[-1].replies[-1][-1] == str(len(generate.calls) - 1)


def test_distance_by_hand() -> None:
    # "abc" and "abd" share 2 of 3 characters, 1 of 2 pairs, no triple.
    assert paired.distance("abc", "abd") == pytest.approx(1 - (2 / 3 + 1 / 2) / 3)
    # Precision 1 for 1 and 2 characters, recall 2/4 and 1/3; blanks do not count.
    precision, recall = 1.0, (2 / 4 + 1 / 3) / 2
    assert paired.distance("ab", "ab c d") == pytest.approx(1 - 2 * precision * recall / (precision + recall))
    assert paired.distance("", "") == paired.distance("same", "same") == 0
    assert paired.distance("", "a") == paired.distance("xy", "ab") == 1


@hypothesis.settings(deadline=None, max_examples=60)
@hypothesis.given(a=st.text("abc d", max_size=12), b=st.text("abc d", max_size=12))
def test_distance_is_symmetric(a: str, b: str) -> None:
    assert paired.distance(a, b) == paired.distance(b, a)
    assert 0 <= paired.distance(a, b) <= 1


def one(replies: Sequence[Sequence[str]], truth: str = "abc", group: str = "g") -> Asked:
    names = tuple(f"name{i}" for i in range(len(replies)))
    dialogue = Dialogue("x", "cy", names[0], (Turn(names[0], "so?"), Turn("cy", truth)), group)
    return Asked(dialogue, names, tuple(map(tuple, replies)))


def test_measures_by_hand() -> None:
    d = paired.distance("abc", "abd")
    found = paired.measure(one([("abc", "abd"), ("xy", "xy"), ("xy", "abc")]), ())
    # Pairs of different queriers: (0, 1) four that share nothing, (0, 2) 1, 0, 1, d and (1, 2) 0, 1, 0, 1.
    between, within = (4 + 2 + d + 2) / 12, (d + 0 + 1) / 3
    # First draws: only the true one is near. Second draws: "abc" to somebody else is nearer than "abd".
    assert found == pytest.approx(
        {
            "paired_between": between,
            "paired_within": within,
            "paired_gap": between - within,
            "paired_agreement": 0.5,
            "paired_agreement_chance": 1 / 3,
        }
    )
    # Equally near: one of them is picked.
    tied = paired.measure(one([("abd", "zz"), ("abd", "zz"), ("zz", "zz")]), ())
    assert tied["paired_agreement"] == pytest.approx((1 / 2 + 1 / 3) / 2)


def test_saying_a_name_is_no_difference() -> None:
    replies = [("Yes, Ann", "yes, ann"), ("yes, Bob", "yes, BOB")]
    assert paired.measure(one(replies), {"ann", "bob"})["paired_between"] == 0
    assert paired.measure(one(replies), ())["paired_between"] > 0


def test_means_over_queries() -> None:
    near, far = one([("a", "a"), ("a", "a")]), one([("a", "a"), ("b", "b")], group="h")
    found = paired.metrics([near, far, far], ())
    assert found["paired_between"]["value"] == found["paired_gap"]["value"] == pytest.approx(2 / 3)
    # Groups are resampled: two of the three queries are of one.
    assert (found["paired_gap"]["low"], found["paired_gap"]["high"], found["paired_gap"]["n"]) == (0, 1, 3)
    assert found["paired_within"]["value"] == 0


Say = Callable[[synthetic.World, Dialogue, random.Random], str]


def planted(say: Say) -> dict[str, dict[str, float]]:
    """The measures of a fake generator on the town; its draws depend on their seeds."""
    world, store = town()

    def generate(dialogues: Sequence[Dialogue], rows: Sequence[int], how: Sequence[Sampling]) -> list[str]:
        return [say(world, d, random.Random(s.seed)) for d, s in zip(dialogues, how, strict=True)]

    answers = paired.ask(generate, anyway, store, store.split("test"), COUNT, GREEDY, QUERIERS)
    assert len(answers) == COUNT
    return paired.metrics(answers, (), LEVEL)


def right(world: synthetic.World, dialogue: Dialogue, rng: random.Random) -> str:
    return synthetic.true_reply(world, dialogue.fields["intent"], dialogue.querier)


def to_anybody(world: synthetic.World, dialogue: Dialogue, rng: random.Random) -> str:
    return synthetic.true_reply(world, dialogue.fields["intent"], rng.choice(world.people).name)


def to_the_first(world: synthetic.World, dialogue: Dialogue, rng: random.Random) -> str:
    return synthetic.true_reply(world, dialogue.fields["intent"], world.people[0].name)


def to_shuffled(world: synthetic.World, dialogue: Dialogue, rng: random.Random) -> str:
    """Everybody is answered as somebody else or themselves, by an order of its own for each query."""
    names = [person.name for person in world.people]
    order = random.Random(dialogue.id).sample(names, len(names))
    return synthetic.true_reply(world, dialogue.fields["intent"], order[names.index(dialogue.querier)])


def test_the_oracle_reaches_the_maximum() -> None:
    world, store = town()
    found = planted(right)
    assert found["paired_agreement"]["value"] == found["paired_agreement"]["low"] == 1
    assert found["paired_agreement_chance"]["value"] == pytest.approx(1 / QUERIERS)
    assert found["paired_within"]["value"] == 0
    # What the true replies differ by is all that there is to be found.
    expected = []
    for _, dialogue, names in paired.choose(store, store.split("test"), COUNT, QUERIERS, 0):
        truths = [synthetic.true_reply(world, dialogue.fields["intent"], name) for name in names]
        expected.append(np.mean([paired.distance(a, b) for a, b in itertools.combinations(truths, 2)]))
    assert found["paired_gap"]["value"] == pytest.approx(np.mean(expected))
    assert found["paired_gap"]["low"] > 0.2


def test_who_ignores_the_querier_has_no_gap() -> None:
    found = planted(to_anybody)
    gap, agreement = found["paired_gap"], found["paired_agreement"]
    assert gap["low"] <= 0 <= gap["high"] < 0.1
    assert found["paired_within"]["value"] > 0.2
    assert agreement["low"] <= 1 / QUERIERS <= agreement["high"] < 0.5


def test_one_reply_for_all_has_no_gap_at_all() -> None:
    found = planted(to_the_first)
    assert found["paired_between"]["value"] == found["paired_gap"]["value"] == found["paired_gap"]["high"] == 0
    assert found["paired_agreement"]["value"] == pytest.approx(1 / QUERIERS)


def test_shuffled_labels_have_a_gap_and_no_agreement() -> None:
    found = planted(to_shuffled)
    assert found["paired_gap"]["low"] > 0.2
    assert found["paired_agreement"]["low"] <= 1 / QUERIERS <= found["paired_agreement"]["high"] < 0.5


def notes(found: dict[str, dict]) -> set[str]:
    assert tuple(found) == paired.NAMES and all(metric["value"] is None for metric in found.values())
    assert all(report.cell(metric) == metric["note"] for metric in report.jsonable(found).values())
    return {metric["note"] for metric in found.values()}


def test_empty_replies() -> None:
    assert notes(paired.metrics([one([("", " "), ("", "\n")])], ())) == {"all 4 replies are empty"}
    # One of them is something: an empty reply and another share nothing.
    assert paired.metrics([one([("", ""), ("a", "a")])], ())["paired_gap"]["value"] == 1


def test_nobody_to_compare_with() -> None:
    def said(number: int, querier: str, split: str, responder: str = "cy") -> Dialogue:
        turns = (Turn(querier, "so?"), Turn(responder, "well"))
        return Dialogue(f"{number}", responder, querier, turns, f"{number}", split=split)

    unasked = Dialogue("u", "cy", "ann", (Turn("cy", "well"),), "u", split="dev")
    lone = [said(0, "ann", "train"), said(1, "ann", "test"), said(2, "new", "test"), said(3, "ann", "test", "dee")]
    store = make_store([*lone, unasked], np.zeros(5, np.int32))
    both = make_store([*lone, said(4, "bob", "train"), unasked], np.zeros(6, np.int32))
    for data, split, count in ((store, "test", 0), (store, "unseen", 0), (both, "test", 1), (both, "dev", 0)):
        generate = Recorder()
        found = paired.ask(generate, anyway, data, data.split(split), 10, GREEDY)
        assert len(found) == count and len(generate.calls) == 4 * count
        if not found:
            assert notes(paired.metrics(found, ())) == {
                "no query of somebody whom a responder answers in training beside somebody else"
            }


def test_the_same_queries_are_put_to_several(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, store, trainable = untrained.opened(method="qar", qar__contrast="none")
    run = untrained.changed(run, generate__max_new_tokens=4)
    made: list[Run] = []
    prepare = batching.prepare
    monkeypatch.setattr(batching, "prepare", lambda *parts: made.append(parts[0]) or prepare(*parts))
    wanted = measure.Wanted(replies=1, paired=2)
    found = measure.measure(run, trainable, store, "dev", 1, wanted, tmp_path / "replies.jsonl").metrics
    assert found["paired_gap"]["n"] == 2 and 0 < found["paired_within"]["value"] <= 1
    assert found["paired_agreement_chance"]["value"] == 1 / 8
    # Whatever asks for replies, the model is made ready once.
    assert made == [run]


def test_a_negative_number_of_queries_is_refused() -> None:
    code, _, err = call(evaluate.main, "--workdir", "nowhere", "--paired", "-1")
    assert (code, err) == (2, "error: --paired is -1, expected 0 or more\n")
