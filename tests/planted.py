"""Planted judges, and replies of which it is known what they prefer."""

from __future__ import annotations

import json
from collections.abc import Callable

from qaperso.eval.judge import Pair

PEOPLE = ("mother", "boss", "rival")


def quoted(text: str) -> dict:
    """What a question quotes."""
    return json.JSONDecoder().raw_decode(text, text.index("\n\n{\n") + 2)[0]


def says(better: Callable[[dict], float]) -> Callable[[str], str]:
    """A judge by a function of what is quoted: more than 0 = A fits better."""

    def reply(text: str) -> str:
        found = better(quoted(text))
        return json.dumps({"verdict": "A" if found > 0 else "B" if found < 0 else "tie"})

    return reply


def true_reply(q: dict) -> float:
    """Prefers the reply that is the known one."""
    return (q["A"] == q["known"]["replied"]) - (q["B"] == q["known"]["replied"])


def longer(q: dict) -> float:
    """Prefers the longer reply."""
    return len(q["A"]) - len(q["B"])


def make_pairs(queries: int = 4) -> list[Pair]:
    """Every query from three people, each of whom is truly answered in another way; ours are the true replies."""
    return [
        Pair(f"d{q}", who, "ann", f"query {q}", f"{who}, yes {q}", f"scene {q}", f"{who}, yes {q}", "i see")
        for q in range(queries)
        for who in PEOPLE
    ]
