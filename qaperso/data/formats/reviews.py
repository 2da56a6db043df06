"""Reviews of items by users, as JSON lines or a JSON list: what DPL (arXiv 2503.02450) compares users by.

A review says `user`, `item` and `text`, and perhaps `rating`, `title`, `time`, `item_title` and `description`, under
these names or those of Amazon Reviews 2014, 2018 and 2023 (amazon-reviews-2023.github.io), Amazon Fine Food or Yelp.
"""

from __future__ import annotations

import collections
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from qaperso.data.formats import as_time, files, parse_rows, shape
from qaperso.data.formats.common import as_name, as_text, fail, show
from qaperso.data.formats.lamp import written
from qaperso.errors import nearest
from qaperso.types import Dialogue, Turn

LINES = True
RESPONDER = "reviewer"

# What a review says, and the keys that say it; the first present one wins. `parent_asin` joins the colours and sizes
# of one product.
KEYS: Mapping[str, tuple[str, ...]] = {
    "user": ("user", "user_id", "reviewerID", "reviewerId", "UserId"),
    "item": ("item", "item_id", "parent_asin", "asin", "business_id", "product_id", "ProductId"),
    "text": ("text", "reviewText", "review_text", "review", "Text"),
    "rating": ("rating", "overall", "stars", "score", "Score"),
    "title": ("title", "summary", "review_title", "Summary"),
    "time": ("time", "timestamp", "unixReviewTime", "date", "Time"),
    "item_title": ("item_title", "product_title"),
    "description": ("description", "item_description"),
}
_REQUIRED = ("user", "item", "text")


def sniff(path: Path, head: str) -> str | None:
    """Why the file looks like reviews, or None."""
    keys = {key.removeprefix("[].") for key in shape(head)}
    names = [next((key for key in KEYS[meaning] if key in keys), None) for meaning in _REQUIRED]
    return f"reviews with the keys {', '.join(names)}" if all(names) else None


def units(path: Path) -> list[Path]:
    """The file, or the folder's *.json, *.jsonl and *.ndjson files at any depth."""
    return files(path, (".json", ".jsonl", ".ndjson"))


def read(
    unit: Path,
    counts: collections.Counter,
    columns: Mapping[str, str] = {},
    start: int = 0,
    stop: int | None = None,
) -> Iterator[Dialogue]:
    """One dialogue a review: the user asks for it by the item; "reviewer" answers by the review.

    Rating and title, which are as much the reviewer's as the text, are not in the request; `dpl.gold` tells them.

    - id: STEM/PLACE, with the file's name without its suffix and the review's byte offset (lines) or index (list).
    - group: USER/ITEM.
    - time: of the review, Unix seconds; see `as_time`.
    - fields: "item", "rating" (a number), "title", "item_title" and "description" as far as the review says them; its
      other keys are left out.

    Args:
      unit: the file.
      counts: gets "empty reviews" (without text, as reviews of pictures or stars only are), which are left out.
      columns: the key that says a thing (a key of `KEYS`), where it has another name.
      start, stop: the part of a file of JSON lines; see `parse_rows`.

    Raises:
      UserError: unreadable file, broken bytes or JSON, missing keys or wrong types, an unknown column, a user called
        "reviewer", no review with text in a whole file.
    """
    for meaning in columns:
        if meaning not in KEYS:
            fail("column", repr(meaning), "what a review says", nearest(meaning, KEYS))
    keys = {meaning: (columns[meaning],) if meaning in columns else names for meaning, names in KEYS.items()}
    stem = as_name(unit.stem, f"{unit}: file name")

    def review(value: Any, number: int, place: str) -> Dialogue:
        return _review(value, keys, f"{stem}/{number}", place)

    some = False
    for dialogue in parse_rows(review, unit, start, stop):
        if dialogue.reply:
            some = True
            yield dialogue
        else:
            counts["empty reviews"] += 1
    if not some and not start and stop is None:
        fail(unit, f"no review with text (under {', '.join(keys['text'])})", "at least one", "; say --column text=KEY")


def _review(value: Any, keys: Mapping[str, tuple[str, ...]], name: str, place: str) -> Dialogue:
    """The dialogue of a review, perhaps with an empty reply."""
    if not isinstance(value, dict):
        fail(place, show(value), "an object", "; write one between { and }")
    said = {meaning: next((key for key in keys[meaning] if value.get(key) is not None), None) for meaning in keys}
    for meaning in ("user", "item"):
        if said[meaning] is None:
            found = "only the keys " + ", ".join(map(repr, list(value)[:12])) if value else "no key"
            expected = f"one that says the {meaning} ({', '.join(keys[meaning])})"
            fail(place, found, expected, f"; say --column {meaning}=KEY")
    at = {meaning: f"{place}: {key}" for meaning, key in said.items()}
    user, item = (as_name(value[said[meaning]], at[meaning]) for meaning in ("user", "item"))
    if user == RESPONDER:
        fail(at["user"], repr(user), "another name than the responder's", "; rename that user")
    fields: dict[str, Any] = {"item": item}
    if said["rating"]:
        fields["rating"] = _rating(value[said["rating"]], at["rating"])
    for meaning in ("title", "item_title", "description"):
        if said[meaning] and (text := written(value[said[meaning]], at[meaning])):
            fields[meaning] = text
    time = as_time(value[said["time"]], at["time"]) if said["time"] else None
    text = as_text(value[said["text"]], at["text"]) if said["text"] else ""
    turns = (Turn(user, request(fields)), Turn(RESPONDER, text))
    return Dialogue(name, RESPONDER, user, turns, f"{user}/{item}", time=time, fields=fields)


def _rating(value: Any, place: str) -> float:
    """A finite number, or the text of one."""
    try:
        if isinstance(value, (int, float, str)) and not isinstance(value, bool) and math.isfinite(float(value)):
            return float(value)
    except (OverflowError, ValueError):
        pass
    fail(place, show(value), "a rating such as 4.0", "; write a number, or drop that key")


def request(fields: Mapping[str, Any]) -> str:
    """What is asked of the reviewer: title and description of the item, as far as `fields` has them."""
    lines = ["Write my review of this item.", f"Item: {fields.get('item_title', fields['item'])}"]
    lines += [f"Description: {fields['description']}"] if "description" in fields else []
    return "\n".join(lines)
