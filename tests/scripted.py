"""A language model that can do what DPL asks of it on the town's reviews, and nothing else: by counting words.

What it says depends on the messages it gets alone. So what was planted arrives in its replies only where retrieval, choice of
others, differences and profile each did their part.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence

from endpoints import Handler

from qaperso.data import reviews_town

# What is said of a side of each style.
SAID = {
    "length": {"short": "terse", "long": "wordy"},
    "warmth": {"warm": "friendly", "cold": "distant"},
    "order": {"price": "price first", "make": "make first"},
}
ASPECT = {"length": "writing", "warmth": "emotional", "order": "semantic"}


def style_of(review: str) -> dict[str, str]:
    """The sides that a review shows."""
    words = reviews_town.words_of(review)
    return {
        "length": "long" if "week" in words else "short",
        "warmth": "warm" if "joy" in words else "cold",
        "order": "price" if words.index("price") < words.index("make") else "make",
    }


def differences(text: str) -> str:
    """The first stage: sides that another reviewer's text does not share."""
    own, *others = (style_of(part) for part in re.split(r"\n## (?:This|Another) reviewer.*\n", text)[1:])
    found = {
        ASPECT[kind]: SAID[kind][side] if any(other[kind] != side for other in others) else "none"
        for kind, side in own.items()
    }
    return json.dumps(found)


def profile(text: str) -> str:
    """The second stage: whatever differences say, once each."""
    fields = [json.loads(line) for line in text.split("\n") if line.startswith('{"writing"')]
    said = dict.fromkeys(value for field in fields for value in field.values() if value != "none")
    return " ".join(f"Is {value}." for value in said)


def reply(messages: Sequence[Mapping[str, str]]) -> str:
    """The third stage: a review of the item that the last message describes, in the style that the instruction tells.

    Where it tells of no side, the one that comes second in `SAID`.
    """
    told = " ".join(m["content"] for m in messages if m["role"] == "system")
    style = {
        kind: next((side for side in sides if sides[side] in told), list(sides)[1]) for kind, sides in SAID.items()
    }
    facts = dict(re.findall(r"(price|make|colour) (\w+)", messages[-1]["content"]))
    return reviews_town.true_review(style, facts)


def answer(messages: Sequence[Mapping[str, str]]) -> str:
    """Whichever stage it is."""
    text = messages[-1]["content"]
    if text.startswith("## Item"):
        return differences(text)
    if text.startswith("## Answer"):
        return re.search(r"\{.*?\}", text.replace("'", '"'), re.DOTALL)[0]
    return profile(text) if text.startswith(("## Difference", "## Record")) else reply(messages)


def respond(handler: Handler) -> None:
    """A step of `endpoints.Server`: an answer."""
    handler.answer(answer(handler.body["messages"]))


def mumble(handler: Handler) -> None:
    """A step: an answer with its fields in a form that only a repair can read; a repair is whole."""
    messages = handler.body["messages"]
    said = answer(messages)
    handler.answer(said if messages[-1]["content"].startswith("## Answer") else said.replace('"', "'"))
