"""For whom was a reply written: what probes may read, whom they name, and effects that are known beforehand."""

from __future__ import annotations

import collections
import functools
import random
from collections.abc import Sequence

import numpy as np
import pytest

from qaperso.data import synthetic
from qaperso.data.store import Store, make_store
from qaperso.eval import awareness, identify, report
from qaperso.types import Dialogue, Turn

LEVEL = 0.999
NAMES = frozenset({"prince", "hal", "ann", "三"})


def store_of(dialogues: Sequence[Dialogue]) -> Store:
    return make_store(dialogues, np.zeros(len(dialogues), np.int32))


@functools.cache
def town() -> tuple[synthetic.World, Store]:
    world = synthetic.make_world(0)
    return world, store_of(synthetic.make_dialogues(world))


def judged(store: Store, written: Sequence[str]) -> dict[str, dict]:
    return identify.metrics(identify.judge(store, store.split("test"), written), LEVEL)


def asked(store: Store) -> list[Dialogue]:
    return [store.dialogues[i] for i in store.split("test")]


@functools.cache
def oracle() -> dict[str, dict]:
    world, store = town()
    return judged(store, [synthetic.true_reply(world, d.fields["intent"], d.querier) for d in asked(store)])


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("Yes, my lord.", "yes."),
        ("My lord, I go.", " i go."),
        ("Good Prince Hal, come; Hal laughs", " come;  laughs"),
        ("Ay, good my lord; well, sweet friends!", "ay; well!"),
        ("Hal's ale, Ann, is good, my dear.", "'s ale, is good."),
        ("I saw my lord, the old king", "i saw my lord, the old king"),
        ("Well, good. My, my!", "well, good. my, my!"),
        ("三，你好，张三。", "你好，张。"),
        ("My lord!", ""),
        ("", ""),
    ],
)
def test_names_and_vocatives_are_taken_out(text: str, left: str) -> None:
    assert identify.strip(text, NAMES) == left


def test_names_alone_are_taken_out() -> None:
    assert identify.without_names("Good Hal, come; hallow'd be ANN-lord", NAMES) == "good , come; hallow'd be -lord"


def test_words_of_all_names() -> None:
    talk = Dialogue("x", "Prince Hal", "Ann", (Turn("Ann", "hi"), Turn("Prince Hal", "ho")), "g")
    assert identify.names([talk]) == {"prince", "hal", "ann"}
    aside = Dialogue("y", "白三", "Ann", (Turn("First Lord", "hi"), Turn("白三", "ho")), "g")
    assert identify.names([talk, aside]) == {"prince", "hal", "ann", "first", "lord", "白", "三"}


def test_every_reply_with_its_query() -> None:
    turns = (Turn("cy", "a"), Turn("ann", "b"), Turn("cy", "c"), Turn("ann", "d"), Turn("ann", "e"), Turn("cy", "f"))
    whole = Dialogue("x", "cy", "ann", turns, "g", replies=(0, 2, 5))
    assert identify.exchanges(whole) == [("", "a"), ("b", "c"), ("e", "f")]
    assert identify.exchanges(Dialogue("x", "cy", "ann", turns, "g")) == [("e", "f")]


def test_a_probe_by_hand() -> None:
    texts, labels = ["red apple", "red pear", "blue sky", "blue sea", "blue ink"], ["a", "a", "b", "b", "b"]
    others = ["red wine", "blue wine", "zzz", "", "red pear and blue sky and blue sea"]
    assert identify.probe(texts, labels, others) == ["a", "b", None, None, "b"]
    assert identify.probe(["", "!?"], ["a", "b"], ["red", ""]) == [None, None]


# Hand-made people: cy says "alpha" to ann and "beta" to bob. Dee is not in the test split, eve had too few replies.
def talk(
    number: int, querier: str, reply: str, split: str, query: str = "what now?", responder: str = "cy"
) -> Dialogue:
    turns = (Turn(querier, query), Turn(responder, reply))
    return Dialogue(f"{split}{number}", responder, querier, turns, f"{split}{number}", split=split)


WORDS = {"ann": "alpha", "bob": "beta", "dee": "gamma", "eve": "delta"}


def people(query: dict[str, str] | None = None, test: dict[str, int] | None = None) -> list[Dialogue]:
    """Ten replies of training each, `test` replies to score; a querier's query is of the dict's word."""
    plan = [("train", {"ann": 10, "bob": 10, "dee": 10, "eve": identify.LEAST - 1})]
    plan.append(("test", test or {"ann": 30, "bob": 10, "eve": 5}))
    found = []
    for split, counts in plan:
        for name, count in counts.items():
            asks = (query or {}).get(name, "what now")
            found += [talk(len(found) + i, name, f"{WORDS[name]} {i}", split, f"{asks}?") for i in range(count)]
    return found


def answered(dialogues: Sequence[Dialogue], replies: dict[str, list[str]]) -> tuple[Store, identify.Verdicts]:
    """The verdicts where the test dialogues of a querier are answered by the replies in turn."""
    store = store_of(dialogues)
    left = {name: iter(texts) for name, texts in replies.items()}
    written = [next(left.get(d.querier, iter(())), "nothing of this") for d in asked(store)]
    return store, identify.judge(store, store.split("test"), written)


def test_shares_by_hand() -> None:
    replies = {"ann": ["alpha"] * 20 + [""] * 10, "bob": ["alpha"] * 6 + ["beta"] * 4, "eve": ["delta"] * 5}
    _, verdicts = answered(people(), replies)
    found = identify.metrics(verdicts)
    # Of ann's 20 are right and 10 are guesses among two, of bob's 4 of 10.
    assert found["identification"]["value"] == pytest.approx((25 / 30 + 4 / 10) / 2)
    assert found["identification_ceiling"]["value"] == 1
    # All queries are equal: whatever the probe says of them is right of one of the two.
    assert found["identification_query"]["value"] == found["identification_chance"]["value"] == 0.5
    gain, value = found["identification_gain"], found["identification"]["value"]
    assert gain["value"] == pytest.approx(value - 0.5) and gain["low"] < gain["value"] < gain["high"]
    assert [found[name]["n"] for name in found] == [2] * 5
    assert verdicts.empty == 10


def test_what_the_query_gives_away_is_no_gain() -> None:
    replies = {"ann": ["alpha"] * 15 + ["beta"] * 15, "bob": ["beta"] * 10}
    _, verdicts = answered(people(query=WORDS), replies)
    found = identify.metrics(verdicts)
    assert found["identification_query"]["value"] == 1
    assert found["identification"]["value"] == 0.75
    assert found["identification_gain"]["value"] == -0.25


def test_each_responder_has_a_probe_of_its_own() -> None:
    """What cy says to ann, fay says to bob."""
    swapped = {"ann": WORDS["bob"], "bob": WORDS["ann"]}
    other = [
        talk(len(split) * 1000 + 100 * (name == "ann") + i, name, f"{word} {i}", split, responder="fay")
        for split in ("train", "test")
        for name, word in swapped.items()
        for i in range(10)
    ]
    store = store_of([*people(), *other])
    verdicts = identify.judge(store, store.split("test"), [d.reply for d in asked(store)])
    found = identify.metrics(verdicts)
    assert found["identification"] == found["identification_ceiling"]
    assert (found["identification"]["value"], found["identification"]["n"]) == (1.0, 4)
    assert verdicts.right("reply").all() and collections.Counter(verdicts.responder) == {"cy": 40, "fay": 20}


def test_the_oracle_reaches_the_ceiling() -> None:
    world, store = town()
    found = oracle()
    assert found["identification"] == found["identification_ceiling"]
    assert found["identification"]["value"] > 0.9
    assert found["identification_chance"]["value"] == pytest.approx(1 / len(world.people))
    assert found["identification_gain"]["low"] > 0.7


@pytest.mark.parametrize("to", ["anybody", "the first", "nobody"])
def test_who_ignores_the_querier_gains_nothing(to: str) -> None:
    world, store = town()
    names = [person.name for person in world.people]
    rng = random.Random(3)
    written = []
    for d in asked(store):
        name = rng.choice(names) if to == "anybody" else names[0]
        written.append(d.query if to == "nobody" else synthetic.true_reply(world, d.fields["intent"], name))
    found = judged(store, written)
    gain, chance = found["identification_gain"], 1 / len(names)
    assert gain["low"] <= 0 <= gain["high"]
    assert found["identification"]["low"] <= chance <= found["identification"]["high"]
    # The same interval is far from what is there to be gained.
    assert gain["high"] < 0.5 < oracle()["identification_gain"]["low"]


def test_shuffled_replies_are_chance() -> None:
    world, store = town()
    written = [d.reply for d in asked(store)]
    random.Random(1).shuffle(written)
    found = judged(store, written)["identification"]
    assert found["low"] <= 1 / len(world.people) <= found["high"] < 0.3


def test_shuffled_labels_have_no_power() -> None:
    world, store = town()
    train = [i for i, d in enumerate(store.dialogues) if d.split == "train"]
    labels = [store.dialogues[i].querier for i in train]
    random.Random(2).shuffle(labels)
    dialogues = list(store.dialogues)
    for i, name in zip(train, labels, strict=True):
        dialogues[i] = awareness.rename(dialogues[i], name)
    shuffled = store_of(dialogues)
    found = judged(shuffled, [d.reply for d in asked(shuffled)])
    ceiling, chance = found["identification_ceiling"], 1 / len(world.people)
    assert ceiling["low"] <= chance <= ceiling["high"] < 0.3
    for name in ("identification", "identification_gain"):
        assert found[name]["value"] is None and found[name]["note"].startswith("no power: ceiling 0.")
        assert report.cell(found[name]) == report.cell(report.jsonable(found)[name]) == found[name]["note"]


def absent(found: dict[str, dict]) -> set[str]:
    """The one note of what is absent; there is nothing but what needs no generated replies."""
    missing = {name: metric for name, metric in found.items() if metric["value"] is None}
    assert missing.keys() == {"identification", "identification_gain"}
    return {metric["note"] for metric in missing.values()}


def test_empty_replies() -> None:
    _, verdicts = answered(people(), {name: ["", " \n"] * 30 for name in WORDS})
    assert absent(identify.metrics(verdicts)) == {"all 40 replies are empty"}
    # They point to nobody: neither right nor wrong.
    assert (verdicts.right("reply") == 0.5).all()
    assert set(verdicts.said["reply"]) == {None}


@pytest.mark.parametrize(
    ("test", "count"),
    [({"ann": 40}, 0), ({"ann": 40, "eve": 40}, 0), ({"ann": 1, "bob": 1}, 2), ({"eve": 3}, 0)],
    ids=["one querier", "one with lessons", "few replies", "too few lessons"],
)
def test_nobody_to_choose_from(test: dict[str, int], count: int) -> None:
    store = store_of(people(test=test))
    found = identify.metrics(identify.judge(store, store.split("test"), ["alpha"] * len(store.split("test"))))
    assert absent(found) == {
        f"{count} replies to queriers with 5 or more in training, where a responder has two; 20 needed"
    }


def test_a_querier_with_one_reply_counts_as_much_as_one_with_many() -> None:
    _, verdicts = answered(people(test={"ann": 40, "bob": 1}), {"ann": ["alpha"] * 40, "bob": ["alpha"]})
    assert identify.metrics(verdicts)["identification"]["value"] == 0.5


def test_no_replies_at_all() -> None:
    store = store_of(people())
    assert len(absent(identify.metrics(identify.judge(store, [], [])))) == 1
