"""Splits by group: what belongs together never stands in two splits."""

from __future__ import annotations

import collections
import dataclasses
import hashlib
import unicodedata
from collections.abc import Mapping, Sequence

from scipy.cluster.hierarchy import DisjointSet

from qaperso.errors import UserError, nearest
from qaperso.types import Dialogue

SPLITS = ("train", "dev", "test")


def split_by_group(dialogues: Sequence[Dialogue], seed: int, dev: float, test: float) -> list[Dialogue]:
    """Gives every dialogue a split, whole groups at a time, across all responders and queriers jointly (ours).

    Groups that hold the same dialogue text (see `check_disjoint`) count as one. Groups are taken in the order of a hash
    of the seed and their name, and each goes to the split that lacks most dialogues; once only as many groups are left
    as there are splits asked for that are still empty, they go to those. Hence, where no split was given:

    - every split asked for gets a group;
    - no split exceeds its share of the dialogues by the size of the largest (joined) group or more, and where every
      share is at least that size, none falls short by more than that size;
    - the result depends on the seed and the set of dialogues only, not on their order.

    Dialogues that carry a split keep it, and so does the rest of their group.

    Args:
      dialogues: at least one.
      seed: of the draw.
      dev, test: fractions of the dialogues, in [0, 1), in sum below 1; the rest is for training.

    Returns:
      The dialogues in their order, each with its split.

    Raises:
      UserError: fractions out of bounds, a given split of another name, a group given two splits, too few groups.
    """
    for name, share in (("dev", dev), ("test", test), ("dev + test", dev + test)):
        if not 0 <= share < 1:
            raise UserError(f"{name}: found {share}, expected a fraction in [0, 1); leave some dialogues for training")
    root = _joined(dialogues)
    given = _given_splits(dialogues, root)
    size = collections.Counter(root[d.group] for d in dialogues)
    share = {"train": 1 - dev - test, "dev": dev, "test": test}
    filled = {split: sum(size[r] for r in given if given[r] == split) for split in SPLITS}
    empty = [split for split in SPLITS if share[split] > 0 and not filled[split]]
    free = sorted((r for r in size if r not in given), key=lambda r: (_draw(seed, r), r))
    if len(free) < len(empty):
        raise UserError(
            f"splits: found {len(free)} groups without a split (those with equal dialogue texts count as one), expected"
            f" at least {len(empty)} to fill {', '.join(empty)}; add groups or set the fraction of a split to 0"
        )
    chosen = dict(given)
    for place, group in enumerate(free):
        empty = [split for split in SPLITS if share[split] > 0 and not filled[split]]
        open_to = empty if len(free) - place <= len(empty) else [split for split in SPLITS if share[split] > 0]
        chosen[group] = max(open_to, key=lambda split: share[split] * len(dialogues) - filled[split])
        filled[chosen[group]] += size[group]
    return [dataclasses.replace(d, split=chosen[root[d.group]]) for d in dialogues]


def check_disjoint(dialogues: Sequence[Dialogue]) -> None:
    """Checks that no group and no dialogue text stands in two splits.

    Two dialogues have the same text if their turns' texts agree one by one after Unicode NFKC, case folding and
    collapsing of white space, whoever speaks them.

    Raises:
      UserError: a dialogue without a split, or two dialogues (both named) that should not be apart.
    """
    by_group: dict[str, Dialogue] = {}
    by_text: dict[str, Dialogue] = {}
    for dialogue in dialogues:
        if _given(dialogue) is None:
            raise UserError(
                f"dialogue {dialogue.id!r}: found no split, expected one of {', '.join(SPLITS)}; split first"
            )
        for what, other in (
            (f"are in group {dialogue.group!r}", by_group.setdefault(dialogue.group, dialogue)),
            ("have the same text", by_text.setdefault(_text_key(dialogue), dialogue)),
        ):
            if other.split != dialogue.split:
                raise UserError(_clash(other, dialogue, what))


def _clash(one: Dialogue, other: Dialogue, what: str) -> str:
    return (
        f"dialogues {one.id!r} and {other.id!r}: found splits {one.split} and {other.split}, expected one, since they"
        f" {what}; give them one split, or clear the given splits so that whole groups are drawn anew"
    )


def _text_key(dialogue: Dialogue) -> str:
    """Equal for dialogues with the same text; a digest, so that large sets need little memory."""
    turns = (" ".join(unicodedata.normalize("NFKC", turn.text).casefold().split()) for turn in dialogue.turns)
    return hashlib.sha256("\n".join(turns).encode("utf-8", "surrogatepass")).hexdigest()


def _draw(seed: int, group: str) -> bytes:
    return hashlib.sha256(f"{seed}:{group}".encode("utf-8", "surrogatepass")).digest()


def _joined(dialogues: Sequence[Dialogue]) -> dict[str, str]:
    """The first name, in sorted order, of all groups that are joined with each group by equal dialogue texts."""
    groups = DisjointSet(d.group for d in dialogues)
    holder: dict[str, str] = {}
    for dialogue in dialogues:
        groups.merge(holder.setdefault(_text_key(dialogue), dialogue.group), dialogue.group)
    return {group: min(subset) for subset in groups.subsets() for group in subset}


def _given(dialogue: Dialogue) -> str | None:
    """The split that the dialogue carries; another name than the known ones is a UserError."""
    if dialogue.split is not None and dialogue.split not in SPLITS:
        expected = "one of " + ", ".join(SPLITS) + nearest(dialogue.split, SPLITS)
        raise UserError(f"dialogue {dialogue.id!r}: found split {dialogue.split!r}, expected {expected}")
    return dialogue.split


def _given_splits(dialogues: Sequence[Dialogue], root: Mapping[str, str]) -> dict[str, str]:
    """The split that each (joined) group was given, if any."""
    first: dict[str, Dialogue] = {}
    for dialogue in dialogues:
        if _given(dialogue) is not None:
            other = first.setdefault(root[dialogue.group], dialogue)
            if other.split != dialogue.split:
                same = other.group == dialogue.group
                groups = f"{other.group!r} and {dialogue.group!r}"
                what = f"are in group {other.group!r}" if same else f"are in groups {groups} that share dialogue texts"
                raise UserError(_clash(other, dialogue, what))
    return {group: dialogue.split for group, dialogue in first.items()}
