"""The town's reviews: every right review is known, and so is who differs how from whom."""

from __future__ import annotations

import collections
import itertools
import re

import pytest

from qaperso.data import load, reviews_town
from qaperso.data.reviews_town import ODDITY, STYLES, World, make_reviews, make_world, score_review, true_review
from qaperso.errors import UserError
from qaperso.types import Dialogue, Turn


@pytest.fixture(scope="module", params=[0, 7])
def world(request: pytest.FixtureRequest) -> World:
    return make_world(request.param)


def test_every_style_is_somebody_s(world: World) -> None:
    found = collections.Counter(tuple(person.style.values()) for person in world.reviewers)
    assert set(found) == set(itertools.product(*STYLES.values())) and sum(found.values()) == 12
    assert make_world(0) == make_world(0) != make_world(1)


def test_splits_and_times(world: World) -> None:
    dialogues = make_reviews(world)
    assert collections.Counter(d.split for d in dialogues) == {"train": 84, "dev": 12, "test": 12}
    times = {s: [d.time for d in dialogues if d.split == s] for s in ("train", "dev", "test")}
    assert max(times["train"]) < min(times["dev"]) and max(times["dev"]) < min(times["test"])
    assert (
        len({d.time for d in dialogues}) == len({d.group for d in dialogues}) == len({d.id for d in dialogues}) == 108
    )


def test_items_are_shared_but_for_one(world: World) -> None:
    by_item = collections.defaultdict(set)
    for d in make_reviews(world):
        if d.split == "train":
            by_item[d.fields["item"]].add(d.querier)
    assert len(by_item[ODDITY]) == 1 and min(len(who) for item, who in by_item.items() if item != ODDITY) >= 2


def test_the_request_gives_the_item_and_nobody_away(world: World) -> None:
    for d in make_reviews(world):
        facts = d.fields["facts"]
        asked = f"Write my review of this item.\nItem: {d.fields['item']}\nDescription: "
        assert d.query == asked + f"price {facts['price']}, make {facts['make']}, colour {facts['colour']}"
        assert d.reply == true_review(d.fields["style"], facts)
        assert d.fields["title"] not in d.query


def of(style: dict[str, str], **facts: str) -> Dialogue:
    facts = {"price": "fair", "make": "sturdy", "colour": "red"} | facts
    turns = Turn("ann", "?"), Turn("reviewer", true_review(style, facts))
    return Dialogue("d", "reviewer", "ann", turns, "g", fields={"style": style, "facts": facts})


TERSE = {"length": "short", "warmth": "warm", "order": "price"}


def test_scores() -> None:
    d = of(TERSE)
    assert d.reply == "what a joy to write this. the price is fair. the make is sturdy. my thanks to the makers."
    assert set(score_review(d, d.reply.upper()).values()) == {1.0}
    for kind, (one, other) in STYLES.items():
        changed = TERSE | {kind: other if TERSE[kind] == one else one}
        expected = {name: float(name not in (kind, "exact")) for name in (*STYLES, "fact", "exact")}
        assert score_review(d, true_review(changed, d.fields["facts"])) == expected
    wrong = true_review(TERSE, d.fields["facts"] | {"price": "dear"})
    assert score_review(d, wrong) == dict.fromkeys(STYLES, 1.0) | {"fact": 0.0, "exact": 0.0}
    assert score_review(d, "") == {"length": 0.0, "warmth": 0.0, "order": 0.0, "fact": 0.0, "exact": 0.0}
    both = score_review(d, d.reply + " that is all.")
    assert both["warmth"] == both["exact"] == 0.0 and both["order"] == 1.0


def test_chance(world: World) -> None:
    test = [d for d in make_reviews(world) if d.split == "test"]
    found = reviews_town.chance(world, test)
    alike = [
        [float(all(p.style[k] == d.fields["style"][k] for k in kinds)) for d in test for p in world.reviewers]
        for kinds in (("length",), ("warmth",), ("order",), tuple(STYLES))
    ]
    expected = [sum(row) / len(row) for row in alike]
    assert [found[k] for k in ("length", "warmth", "order", "exact")] == pytest.approx(expected)
    assert found["fact"] == 1.0 and found["exact"] < 0.2
    with pytest.raises(UserError, match="at least one dialogue"):
        reviews_town.chance(world, [])
    with pytest.raises(UserError, match="no field 'style'"):
        reviews_town.chance(world, [Dialogue("x", "r", "q", (Turn("r", "a"),), "g")])


def test_words_cover_all_worlds(world: World) -> None:
    known = set(reviews_town.words())
    said = {t for d in make_reviews(world) for turn in d.turns for t in re.findall(r"\w+|[^\w\s]+", turn.text)}
    names = {d.querier for d in make_reviews(world)} | {"reviewer"}
    assert said | names <= known


def test_it_is_a_format_of_the_configuration() -> None:
    from qaperso import config as configs

    c = configs.default()
    c.data.update(format="synthetic_reviews", clusters=1)
    store = load.load_store(c.data)
    assert store.dialogues == tuple(make_reviews(make_world(0))) and len(store.registry.queriers) == 12
    assert load.words(c.data) == reviews_town.words() != load.words(configs.default().data)
