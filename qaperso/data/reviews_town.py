"""The embedded world's reviews: the town's people write about the same goods, each in a style of their own.

What is said of an item is the item's (price, make, colour) and stands in the request; how it is said is the reviewer's: long or
short, warm or cold, price or make first. So the right review is known, and so is what sets a reviewer apart from another one
on the same item. World and texts are ours; the records have the shape of `qaperso.data.formats.reviews`.
"""

from __future__ import annotations

import dataclasses
import itertools
import random
import re
from collections.abc import Mapping, Sequence

from qaperso.data.formats.reviews import RESPONDER, request
from qaperso.data.town import RESIDENTS
from qaperso.errors import UserError
from qaperso.types import Dialogue, Turn

GOODS = ("lantern", "kettle", "rope", "boots", "anchor", "basket", "compass", "candle", "barrel", "blanket", "mirror")
GOODS += ("hammer", "ladder", "saddle", "whistle", "teapot")
# Only one person reviews this.
ODDITY = "harpoon"
# What there is to say of an item.
FACTS: Mapping[str, tuple[str, ...]] = {
    "price": ("cheap", "fair", "dear"),
    "make": ("sturdy", "decent", "flimsy"),
    "colour": ("red", "blue", "green"),
}
RATINGS = {"sturdy": 5.0, "decent": 3.0, "flimsy": 1.0}
# The two sides of each style.
STYLES: Mapping[str, tuple[str, str]] = {
    "length": ("short", "long"),
    "warmth": ("warm", "cold"),
    "order": ("price", "make"),
}
_OPENING = {"warm": "what a joy to write this", "cold": "this is a report"}
_CLOSING = {"warm": "my thanks to the makers", "cold": "that is all"}
_SAID = {"price": "the price is {price}", "make": "the make is {make}"}
_MORE = ("i used it every day of the week", "the colour is {colour} and so is my door")
# Reviews of each person, the last two for dev and test.
REVIEWS = 9
_DAY = 86400.0


@dataclasses.dataclass(frozen=True)
class Reviewer:
    """Somebody of the town, and a side of each of `STYLES`."""

    name: str
    style: Mapping[str, str]


@dataclasses.dataclass(frozen=True)
class World:
    """The reviews of one seed.

    Attributes:
      reviewers: who writes.
      facts: of each item, a value of each of `FACTS`.
      reviewed: by person the items in the order of their reviews.
    """

    reviewers: tuple[Reviewer, ...]
    facts: Mapping[str, Mapping[str, str]]
    reviewed: Mapping[str, tuple[str, ...]]


def make_world(seed: int) -> World:
    """Draws styles, items' facts and who reviews what; every style is somebody's."""
    rng = random.Random(f"reviews/{seed}")
    styles = [dict(zip(STYLES, sides, strict=True)) for sides in itertools.product(*STYLES.values())]
    more = rng.sample(styles, len(RESIDENTS) - len(styles))
    drawn = rng.sample([*styles, *more], len(RESIDENTS))
    people = tuple(Reviewer(r.name, style) for r, style in zip(RESIDENTS, drawn, strict=True))
    facts = {item: {kind: rng.choice(values) for kind, values in FACTS.items()} for item in (*GOODS, ODDITY)}
    reviewed = {person.name: tuple(rng.sample(GOODS, REVIEWS)) for person in people}
    alone = people[0].name
    reviewed[alone] = (ODDITY, *reviewed[alone][1:])
    return World(people, facts, reviewed)


def true_review(style: Mapping[str, str], facts: Mapping[str, str]) -> str:
    """The one right review of an item with these facts in this style."""
    second = "make" if style["order"] == "price" else "price"
    more = _MORE if style["length"] == "long" else ()
    said = (_OPENING[style["warmth"]], _SAID[style["order"]], _SAID[second], *more, _CLOSING[style["warmth"]])
    return " ".join(f"{sentence.format_map(facts)}." for sentence in said)


def make_reviews(world: World) -> list[Dialogue]:
    """The reviews of a world, `REVIEWS` by each person: of each the last is for test, the one before for dev.

    Reviews for test are later than all for dev, and these later than all for training.

    Returns:
      Dialogues by person, then time. `fields`: "item", "item_title", "description", "rating", "title", and the ground
      truth, "style" and "facts".
    """
    found = []
    for number, person in enumerate(world.reviewers):
        for place, item in enumerate(world.reviewed[person.name]):
            facts = world.facts[item]
            fields = {
                "item": item,
                "item_title": item,
                "description": ", ".join(f"{kind} {value}" for kind, value in facts.items()),
                "rating": RATINGS[facts["make"]],
                "title": f"{facts['make']} {item}",
                "style": dict(person.style),
                "facts": dict(facts),
            }
            turns = Turn(person.name, request(fields)), Turn(RESPONDER, true_review(person.style, facts))
            name = f"{person.name}/{item}"
            found.append(
                Dialogue(
                    id=f"reviews-{name}",
                    responder=RESPONDER,
                    querier=person.name,
                    turns=turns,
                    group=name,
                    time=_DAY * (place * len(world.reviewers) + number),
                    split={REVIEWS - 2: "dev", REVIEWS - 1: "test"}.get(place, "train"),
                    fields=fields,
                )
            )
    return found


def score_review(dialogue: Dialogue, review: str) -> dict[str, float]:
    """Scores a review against the ground truth in `dialogue.fields` (ours); blind to case, spacing and punctuation.

    Returns:
      0.0 or 1.0 for each of
        "length": its number of words is nearer to that of the right review than to that of the other length;
        "warmth": opening and closing of the right warmth are there, and none of the other one;
        "order": price and make are both mentioned, the right one first;
        "fact": price and make are those of the item, and no other is there;
        "exact": all of the above.

    Raises:
      UserError: the dialogue has no ground truth.
    """
    style, facts = _truth(dialogue)
    said = words_of(review)
    text = f" {' '.join(said)} "
    sizes = {side: len(words_of(true_review(style | {"length": side}, facts))) for side in STYLES["length"]}
    phrases = {side: (_OPENING[side], _CLOSING[side]) for side in STYLES["warmth"]}
    first = {kind: said.index(kind) for kind in _SAID if kind in said}
    scores = {
        "length": bool(said) and min(sizes, key=lambda side: abs(sizes[side] - len(said))) == style["length"],
        "warmth": all((f" {p} " in text) == (side == style["warmth"]) for side, ps in phrases.items() for p in ps),
        "order": len(first) == 2 and min(first, key=first.__getitem__) == style["order"],
        "fact": all({v for v in FACTS[kind] if v in said} == {facts[kind]} for kind in _SAID),
    }
    scores["exact"] = all(scores.values())
    return {name: float(value) for name, value in scores.items()}


def chance(world: World, dialogues: Sequence[Dialogue]) -> dict[str, float]:
    """What somebody scores who knows the items and all styles, and draws one of the reviewers' at random (ours).

    Computed, not sampled: for each dialogue the mean over all reviewers' styles.

    Raises:
      UserError: there are no dialogues, or one has no ground truth.
    """
    if not dialogues:
        raise UserError("chance needs at least one dialogue, found none")
    rows = [score_review(d, true_review(p.style, _truth(d)[1])) for d in dialogues for p in world.reviewers]
    return {name: sum(row[name] for row in rows) / len(rows) for name in rows[0]}


def _truth(dialogue: Dialogue) -> tuple[Mapping[str, str], Mapping[str, str]]:
    if not {"style", "facts"} <= set(dialogue.fields):
        raise UserError(f"dialogue '{dialogue.id}' has no field 'style': score only the embedded world's reviews")
    return dialogue.fields["style"], dialogue.fields["facts"]


def words_of(text: str) -> list[str]:
    """The words of a text in lower case."""
    return re.findall(r"[^\W_]+", text.lower())


def words() -> list[str]:
    """Every word and punctuation mark that any world's turns and names are made of, sorted."""
    every = {kind: " ".join(values) for kind, values in FACTS.items()}
    styles = [dict(zip(STYLES, sides, strict=True)) for sides in itertools.product(*STYLES.values())]
    fields = {"item": "", "description": ", ".join(FACTS)}
    texts = [*(true_review(style, every) for style in styles), request(fields), *GOODS, ODDITY, RESPONDER]
    texts += [r.name for r in RESIDENTS]
    return sorted({token for text in texts for token in re.findall(r"\w+|[^\w\s]+", text)})
