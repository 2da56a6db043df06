"""Splits: what belongs together never stands in two splits.

Dialogues belong together if they are of one group, have the same text, or are near-duplicates (`near`, where given):
their groups are joined, and joined groups go to one split as a whole. The one exception is "unseen", the dialogues of
queriers whom training never meets: what else is in their groups goes to "test".

Each draw comes in two forms: over `Columns`, plain sequences of what it needs, for millions of dialogues; and over
`Dialogue` records.
"""

from __future__ import annotations

import collections
import dataclasses
import hashlib
from collections.abc import Hashable, Mapping, Sequence

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from qaperso.data.duplicates import LEAST, normal_text
from qaperso.errors import UserError, nearest
from qaperso.types import Dialogue

SPLITS = ("train", "dev", "test", "unseen")

# Those that are drawn by share.
_SHARED = SPLITS[:3]


@dataclasses.dataclass(frozen=True)
class Columns:
    """What the draws and the leak check know of n dialogues, each a sequence of length n.

    Attributes:
      ids: for errors.
      groups: what must not straddle a split.
      texts: equal where the dialogues have the same text, such as `text_key` gives.
      queriers: who asks.
      times: seconds since the epoch or None.
      splits: as given or drawn; None where not yet.
      near: equal where dialogues are near-duplicates, such as `duplicates.representatives` gives; None: no two are.
    """

    ids: Sequence[str]
    groups: Sequence[str]
    texts: Sequence[Hashable]
    queriers: Sequence[str]
    times: Sequence[float | None]
    splits: Sequence[str | None]
    near: Sequence[int] | np.ndarray | None = None


def columns(dialogues: Sequence[Dialogue], near: Sequence[int] | np.ndarray | None = None) -> Columns:
    """The columns of dialogue records."""
    return Columns(
        ids=[d.id for d in dialogues],
        groups=[d.group for d in dialogues],
        texts=[text_key(d) for d in dialogues],
        queriers=[d.querier for d in dialogues],
        times=[d.time for d in dialogues],
        splits=[d.split for d in dialogues],
        near=near,
    )


def text_key(dialogue: Dialogue) -> bytes:
    """Equal for dialogues with the same text; a digest, so that large sets need little memory.

    Two dialogues have the same text if their turns' texts agree one by one after Unicode NFKC, case folding and
    collapsing of white space, whoever speaks them. What is shorter than `duplicates.LEAST` characters ("ok?", "sure")
    anybody says any day: it is the same text within its group only, else it would join all groups of a chat.
    """
    turns = "\n".join(normal_text(turn.text) for turn in dialogue.turns)
    said = turns if len(turns) >= LEAST else f"{turns}\n\n{dialogue.group}"
    return hashlib.sha256(said.encode("utf-8", "surrogatepass")).digest()


def split_by_group(
    dialogues: Sequence[Dialogue], seed: int, dev: float, test: float, near: Sequence[int] | np.ndarray | None = None
) -> list[Dialogue]:
    """`draw_by_group` for records: the dialogues in their order, each with its split."""
    return _with_splits(dialogues, draw_by_group(columns(dialogues, near), seed, dev, test))


def split_by_time(
    dialogues: Sequence[Dialogue], dev: float, test: float, near: Sequence[int] | np.ndarray | None = None
) -> list[Dialogue]:
    """`draw_by_time` for records: the dialogues in their order, each with its split."""
    return _with_splits(dialogues, draw_by_time(columns(dialogues, near), dev, test))


def hold_out_queriers(
    dialogues: Sequence[Dialogue], share: float, seed: int, near: Sequence[int] | np.ndarray | None = None
) -> list[Dialogue]:
    """`draw_queriers` for records: the dialogues in their order, with splits where it decides them."""
    return _with_splits(dialogues, draw_queriers(columns(dialogues, near), share, seed))


def check_disjoint(dialogues: Sequence[Dialogue], near: Sequence[int] | np.ndarray | None = None) -> None:
    """`check_columns` for records."""
    check_columns(columns(dialogues, near))


def draw_by_group(columns: Columns, seed: int, dev: float, test: float) -> list[str]:
    """Gives every dialogue a split, whole groups at a time, across all responders and queriers jointly (ours).

    Joined groups (see above) count as one. Groups are taken in the order of a hash of the seed and their name, and each
    goes to the split that lacks most dialogues; once only as many groups are left as there are splits asked for that
    are still empty, they go to those. Hence, where no split was given:

    - every split asked for gets a group;
    - no split exceeds its share of the dialogues by the size of the largest (joined) group or more, and where every
      share is at least that size, none falls short by more than that size;
    - the result depends on the seed and the set of dialogues only, not on their order.

    Dialogues that carry a split keep it, and so does the rest of their group; "unseen" ones keep theirs, count for no
    share, and send the rest of their group to "test".

    Args:
      columns: at least one dialogue.
      seed: of the draw.
      dev, test: fractions of the dialogues, in [0, 1), in sum below 1; the rest is for training.

    Returns:
      A split for each dialogue.

    Raises:
      UserError: fractions out of bounds, a given split of another name, a group given two splits, too few groups.
    """
    share = _shares(dev, test)
    root = _roots(columns)
    size, chosen, filled, free = _given(columns, root, share)
    total = sum(size.values())
    free.sort(key=lambda r: (_draw(seed, r), r))
    for place, group in enumerate(free):
        empty = [split for split in _SHARED if share[split] > 0 and not filled[split]]
        open_to = empty if len(free) - place <= len(empty) else [split for split in _SHARED if share[split] > 0]
        chosen[group] = max(open_to, key=lambda split: share[split] * total - filled[split])
        filled[chosen[group]] += size[group]
    return _spread(columns, root, chosen)


def draw_by_time(columns: Columns, dev: float, test: float) -> list[str]:
    """Gives every dialogue a split, the newest groups to "test", the next to "dev", the rest to "train" (ours).

    A (joined) group is as new as its latest dialogue. "test" and then "dev" take groups from the newest down as long as
    that brings them nearer to their share, and at least one each. So no group of "train" is newer than one of "dev",
    and none of "dev" newer than one of "test"; groups of equal time are taken in the order of their names. Dialogues
    that carry a split keep it as in `draw_by_group`; the order in time holds for the groups that are drawn here.

    Args:
      columns: at least one dialogue.
      dev, test: fractions of the dialogues, in [0, 1), in sum below 1; the rest is for training.

    Returns:
      A split for each dialogue.

    Raises:
      UserError: as in `draw_by_group`, and a group without any time.
    """
    share = _shares(dev, test)
    root = _roots(columns)
    size, chosen, filled, free = _given(columns, root, share)
    total = sum(size.values())
    latest: dict[str, float] = {}
    for group, time in zip(root, columns.times, strict=True):
        if time is not None:
            latest[group] = max(time, latest.get(group, time))
    for group in free:
        if group not in latest:
            raise UserError(f"group {group!r}: found no time, expected one to split by time; split by group instead")
    free.sort(key=lambda r: (-latest[r], r))
    stages = [split for split in ("test", "dev", "train") if share[split] > 0]
    for place, group in enumerate(free):
        while len(stages) > 1:
            split, lacking = stages[0], share[stages[0]] * total - filled[stages[0]]
            waiting = sum(not filled[later] for later in stages[1:])
            if not filled[split] or (abs(lacking - size[group]) <= abs(lacking) and len(free) - place > waiting):
                break
            stages.pop(0)
        chosen[group] = stages[0]
        filled[stages[0]] += size[group]
    return _spread(columns, root, chosen)


def draw_queriers(columns: Columns, share: float, seed: int) -> list[str | None]:
    """Holds out whole queriers, so that replies to people never met in training can be scored (ours).

    Queriers are taken in the order of a hash of the seed and their name. Each dialogue they ask in becomes "unseen";
    every other dialogue of a (joined) group that holds one of these becomes "test", since in "train" it would give away
    what the unseen ones say, and in "dev" it would choose the model by them. That can be many dialogues where groups
    hold many queriers. A held-out querier may still be a responder in training. The rest is left to `draw_by_group` or
    `draw_by_time`.

    Args:
      columns: none of the dialogues with a split.
      share: the fraction of queriers to hold out, in [0, 1), rounded to a number of queriers but at least one where
        it is above 0.
      seed: of the draw.

    Returns:
      "unseen", "test" or None for each dialogue.

    Raises:
      UserError: a share out of bounds, a dialogue with a split, nothing left for training.
    """
    if not 0 <= share < 1:
        raise UserError(f"unseen: found {share}, expected a fraction of the queriers in [0, 1)")
    for name, split in zip(columns.ids, columns.splits, strict=True):
        if split is not None:
            raise UserError(f"dialogue {name!r}: found split {split!r}, expected none to hold out queriers; clear it")
    if share == 0:
        return [None] * len(columns.ids)
    queriers = sorted(set(columns.queriers), key=lambda name: (_draw(seed, f"querier:{name}"), name))
    held = set(queriers[: max(1, round(share * len(queriers)))])
    root = _roots(columns)
    touched = {group for group, querier in zip(root, columns.queriers, strict=True) if querier in held}
    splits = [
        "unseen" if querier in held else "test" if group in touched else None
        for group, querier in zip(root, columns.queriers, strict=True)
    ]
    if None not in splits:
        raise UserError(
            f"unseen: found no dialogue outside the groups of the {len(held)} of {len(queriers)} queriers held out,"
            " expected some for training; lower the fraction, or cut the conversations into smaller groups"
        )
    return splits


def check_columns(columns: Columns) -> None:
    """Checks that no group, no dialogue text and no cluster of near-duplicates stands in two splits.

    "test" and "unseen" may share all three (see `draw_queriers`); no querier of "unseen" asks in another split.

    Raises:
      UserError: a dialogue without a split, or two dialogues (both named) that should not be apart.
    """
    by_group: dict[str, int] = {}
    by_text: dict[Hashable, int] = {}
    by_near: dict[int, int] = {}
    asks: dict[str, int] = {}
    for row, split in enumerate(columns.splits):
        if _known(columns, row) is None:
            expected = f"one of {', '.join(SPLITS)}; split first"
            raise UserError(f"dialogue {columns.ids[row]!r}: found no split, expected {expected}")
        if split != "unseen":
            asks.setdefault(columns.queriers[row], row)
        group = columns.groups[row]
        for what, other in (
            (f"are in group {group!r}", by_group.setdefault(group, row)),
            ("have the same text", by_text.setdefault(columns.texts[row], row)),
            ("are near-duplicates", row if columns.near is None else by_near.setdefault(columns.near[row], row)),
        ):
            if {split, columns.splits[other]} not in ({split}, {"test", "unseen"}):
                raise UserError(_clash(columns, other, row, what))
    for row, (split, querier) in enumerate(zip(columns.splits, columns.queriers, strict=True)):
        if split == "unseen" and querier in asks:
            raise UserError(_clash(columns, asks[querier], row, f"have the querier {querier!r}"))


def _with_splits(dialogues: Sequence[Dialogue], splits: Sequence[str | None]) -> list[Dialogue]:
    return [dataclasses.replace(d, split=split) for d, split in zip(dialogues, splits, strict=True)]


def _clash(columns: Columns, one: int, other: int, what: str) -> str:
    return (
        f"dialogues {columns.ids[one]!r} and {columns.ids[other]!r}: found splits {columns.splits[one]} and"
        f" {columns.splits[other]}, expected one, since they {what}; give them one split, or clear the given splits so"
        " that whole groups are drawn anew"
    )


def _draw(seed: int, name: str) -> bytes:
    return hashlib.sha256(f"{seed}:{name}".encode("utf-8", "surrogatepass")).digest()


def _shares(dev: float, test: float) -> dict[str, float]:
    """The share of each split that is drawn."""
    for name, share in (("dev", dev), ("test", test), ("dev + test", dev + test)):
        if not 0 <= share < 1:
            raise UserError(f"{name}: found {share}, expected a fraction in [0, 1); leave some dialogues for training")
    return {"train": 1 - dev - test, "dev": dev, "test": test}


def _roots(columns: Columns) -> list[str]:
    """For each dialogue the first name, in sorted order, of all groups that are joined with its own."""
    if not len(columns.groups):
        return []
    code: dict[str, int] = {}
    own = [code.setdefault(group, len(code)) for group in columns.groups]
    head: list[int] = []
    for labels in (columns.texts, columns.near):
        if labels is not None:
            holder: dict[Hashable, int] = {}
            head += [holder.setdefault(label, group) for label, group in zip(labels, own, strict=True)]
    tail = np.tile(own, len(head) // len(own))
    graph = coo_array((np.ones(len(head), bool), (head, tail)), shape=(len(code), len(code)))
    joined = connected_components(graph, directed=False)[1].tolist()
    first: dict[int, str] = {}
    for group, label in zip(code, joined, strict=True):
        first[label] = min(group, first.get(label, group))
    return [first[joined[group]] for group in own]


def _known(columns: Columns, row: int) -> str | None:
    """The split that the dialogue carries; another name than the known ones is a UserError."""
    split = columns.splits[row]
    if split is not None and split not in SPLITS:
        expected = "one of " + ", ".join(SPLITS) + nearest(split, SPLITS)
        raise UserError(f"dialogue {columns.ids[row]!r}: found split {split!r}, expected {expected}")
    return split


def _given(
    columns: Columns, root: Sequence[str], share: Mapping[str, float]
) -> tuple[dict[str, int], dict[str, str], dict[str, int], list[str]]:
    """Where a draw begins: (size of each joined group, splits given to them, sizes of splits, groups left to draw).

    Dialogues that are "unseen" count for none of these.
    """
    first: dict[str, int] = {}
    unseen: dict[str, int] = {}
    size: collections.Counter[str] = collections.Counter()
    for row, group in enumerate(root):
        split = _known(columns, row)
        size[group] += split != "unseen"
        if split == "unseen":
            unseen.setdefault(group, row)
        elif split is not None:
            other = first.setdefault(group, row)
            if columns.splits[other] != split:
                raise UserError(_clash(columns, other, row, _bond(columns, other, row)))
    for group, row in unseen.items():
        other = first.get(group)
        if other is not None and columns.splits[other] != "test":
            raise UserError(_clash(columns, other, row, _bond(columns, other, row)))
    chosen = {group: "test" for group in unseen} | {group: columns.splits[row] for group, row in first.items()}
    filled = {split: sum(size[r] for r in chosen if chosen[r] == split) for split in _SHARED}
    empty = [split for split in _SHARED if share[split] > 0 and not filled[split]]
    free = [group for group in size if group not in chosen]
    if len(free) < len(empty):
        # As few shares as have to be 0; training's cannot.
        lacking = len(empty) - len(free)
        zero = [f"--{split} 0" for split in empty if split != "train"][:lacking]
        mend = f"give {' '.join(zero)}, or add groups" if len(zero) == lacking else "add groups"
        raise UserError(
            f"splits: found {len(free)} groups without a split (those with equal dialogue texts count as one), expected"
            f" at least {len(empty)} to fill {', '.join(empty)}; {mend}"
        )
    return size, chosen, filled, free


def _bond(columns: Columns, one: int, other: int) -> str:
    """Why two dialogues of one joined group belong together."""
    groups = (columns.groups[one], columns.groups[other])
    if groups[0] == groups[1]:
        return f"are in group {groups[0]!r}"
    return f"are in groups {groups[0]!r} and {groups[1]!r} that share dialogue texts"


def _spread(columns: Columns, root: Sequence[str], chosen: Mapping[str, str]) -> list[str]:
    """The split of each dialogue from that of its joined group."""
    return ["unseen" if s == "unseen" else chosen[r] for s, r in zip(columns.splits, root, strict=True)]
