"""The merging half of data preparation: from the columns of all shards to what is kept, and in which split."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from qaperso.data import duplicates, splits
from qaperso.data.shards import Columns
from qaperso.errors import UserError, nearest

# Dropped dialogues whose ids, and unread files whose names, the statistics list.
LISTED = 20


@dataclasses.dataclass(frozen=True)
class Merging:
    """How dialogues are kept and split; see `python -m qaperso.prepare --help`."""

    responders: tuple[str, ...]
    min_per_querier: int
    threshold: float
    by_time: bool
    dev: float
    test: float
    unseen: float
    seed: int
    allow_leaks: bool


@dataclasses.dataclass(frozen=True, eq=False)
class Merged:
    """The n dialogues that are kept, ordered by shard and row.

    Attributes:
      shard, row: int64[n], where each stands.
      responders, queriers, groups: names, n each.
      split: str[n].
      stats: what `stats.json` tells.
    """

    shard: np.ndarray
    row: np.ndarray
    responders: list[str]
    queriers: list[str]
    groups: list[str]
    split: np.ndarray
    stats: dict[str, Any]

    def splits(self) -> list[str]:
        """Those that hold a dialogue."""
        return [name for name in splits.SPLITS if (self.split == name).any()]

    def places(self, split: str) -> np.ndarray:
        """int64[m], which of the n are in a split."""
        return np.flatnonzero(self.split == split)

    def by_shard(self, places: np.ndarray) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
        """(shard, rows in it, their places among the n) of ascending places."""
        for shard in np.unique(self.shard[places]):
            at = places[self.shard[places] == shard]
            yield int(shard), self.row[at], at

    def registry(self) -> dict[str, Any]:
        """Queriers and responders with the number of their dialogues in each split."""
        return {
            what: {name: dict(sorted(found.items())) for name, found in sorted(_per_split(names, self.split).items())}
            for what, names in (("queriers", self.queriers), ("responders", self.responders))
        }

    def group_splits(self) -> list[tuple[str, str]]:
        """(group, split) of every group, sorted."""
        return sorted(set(zip(self.groups, self.split.tolist(), strict=True)))

    def renamed(self, names: Sequence[Sequence[tuple[str, str, str]]], counts: collections.Counter) -> Merged:
        """With the (responder, querier, group) that each row of each shard has now, and without ids from before."""
        found = [names[s][r] for s, r in zip(self.shard.tolist(), self.row.tolist(), strict=True)]
        responders, queriers, groups = (list(part) for part in zip(*found, strict=True))
        stats = {k: v for k, v in self.stats.items() if k != "dropped"}
        stats["leaks"] = stats["leaks"] and "some; run without pseudonyms to see which"
        stats["counts"] = dict(sorted((collections.Counter(stats["counts"]) + counts).items()))
        return dataclasses.replace(self, responders=responders, queriers=queriers, groups=groups, stats=stats)


def _per_split(names: Sequence[str], split: np.ndarray) -> dict[str, collections.Counter]:
    counts: dict[str, collections.Counter] = collections.defaultdict(collections.Counter)
    for name, own in zip(names, split.tolist(), strict=True):
        counts[name][own] += 1
    return counts


def merge(shards: Sequence[Columns], files: Sequence[Path], rules: Merging, unread: Sequence[str] = ()) -> Merged:
    """Decides which dialogues are kept, and their splits (ours).

    In this order: a dialogue is dropped that is there already, by its id and text, or because the same two said the same
    at the same time in one group (as exports of a chat have it that overlap); near-duplicates of one querier and responder
    in different groups are dropped but for the first; so are the dialogues of pairs with too few replies. Then splits are
    drawn, with groups of equal or nearly equal text as one, and checked.

    Args:
      shards: what was read, in order.
      files: of the shards; their signatures lie beside them.
      rules: see `Merging`.
      unread: files of the input that are in no shard; they are counted and listed with what is dropped.

    Raises:
      UserError: an unknown responder, nothing left, two dialogues of one id, splits that cannot be drawn, or a leak.
    """
    whole = _Table(shards)
    counts: collections.Counter = collections.Counter()
    for own in shards:
        counts.update(own.counts)
    _check_responders(whole, frozenset().union(*(s.speakers for s in shards)), rules.responders)
    dropped: dict[str, list[str]] = {}
    if unread:
        counts["files not read"] = len(unread)
        dropped["files not read"] = list(unread[:LISTED])

    def drop(reason: str, keep: np.ndarray, flags: np.ndarray) -> np.ndarray:
        gone = keep[~flags]
        if len(gone):
            counts[f"dialogues dropped: {reason}"] = len(gone)
            dropped[reason] = [whole.ids[i] for i in gone[:LISTED]]
        return keep[flags]

    keep = np.arange(len(whole.ids))
    keep = drop("read twice", keep, _first_read(whole))
    near = np.arange(len(keep))
    if rules.threshold and len(keep):
        signatures = np.concatenate([np.load(f.with_suffix(".npy")) for f in files])[keep]
        pairs = duplicates.pairs(signatures, rules.threshold)
        del signatures
        own = [(whole.responders[i], whole.queriers[i]) for i in keep]
        first = duplicates.representatives(len(keep), pairs, own, [whole.groups[i] for i in keep])
        near = duplicates.representatives(len(keep), pairs)
        flags = first == np.arange(len(keep))
        keep, near = drop("near-duplicates", keep, flags), near[flags]
    pairs_of = [(whole.responders[i], whole.queriers[i]) for i in keep]
    number: collections.Counter = collections.Counter()
    for pair, i in zip(pairs_of, keep, strict=True):
        number[pair] += whole.replies[i]
    flags = np.array([number[pair] >= rules.min_per_querier for pair in pairs_of], bool)
    keep, near = drop("too few replies of the pair", keep, flags), near[flags]
    if not len(keep):
        most = max(number.values(), default=0)
        raise UserError(
            f"input: found no dialogue to keep (at most {most} replies of a pair), expected --min-per-querier="
            f"{rules.min_per_querier} at least; lower it, or check --responder"
        )
    columns = whole.columns(keep, near)
    split = _draw(columns, rules)
    columns = dataclasses.replace(columns, splits=split)
    leaks = _leaks(columns, rules.allow_leaks)
    stats = _statistics(whole, keep, split) | {
        "leaks": leaks,
        "counts": dict(sorted(counts.items())),
        "dropped": dropped,
    }
    return Merged(
        shard=whole.shard[keep],
        row=whole.row[keep],
        responders=[whole.responders[i] for i in keep],
        queriers=[whole.queriers[i] for i in keep],
        groups=[whole.groups[i] for i in keep],
        split=np.array(split, dtype=object),
        stats=stats,
    )


class _Table:
    """The columns of all shards, one after the other."""

    def __init__(self, shards: Sequence[Columns]):
        def join(name: str) -> list:
            return [value for shard in shards for value in getattr(shard, name)]

        self.ids, self.responders, self.queriers = join("ids"), join("responders"), join("queriers")
        self.groups, self.times, self.given = join("groups"), join("times"), join("given")
        self.replies, self.keys = join("replies"), join("keys")
        sizes = [len(s.ids) for s in shards]
        self.shard = np.repeat(np.arange(len(shards)), sizes)
        self.row = np.concatenate([np.arange(n) for n in sizes]) if sizes else np.zeros(0, int)
        self.sources = [s.source for s in shards]

    def source(self, i: int) -> str:
        return self.sources[self.shard[i]]

    def columns(self, keep: np.ndarray, near: np.ndarray) -> splits.Columns:
        def some(values: list) -> list:
            return [values[i] for i in keep]

        return splits.Columns(
            ids=some(self.ids),
            groups=some(self.groups),
            texts=some(self.keys),
            queriers=some(self.queriers),
            times=some(self.times),
            splits=some(self.given),
            near=near.tolist(),
        )


def _check_responders(whole: _Table, speakers: Collection[str], asked: Sequence[str]) -> None:
    known = set(whole.responders)
    for name in asked:
        if name not in known:
            found = f"found nobody {name!r} who replies, expected a speaker of the input who answers somebody"
            raise UserError(f"--responder: {found}{nearest(name, {*speakers} - {name})}")


def _first_read(whole: _Table) -> np.ndarray:
    """bool[n]: False for a dialogue that is there already: its id and text, or its people, group, text and time."""
    first: dict[str, int] = {}
    said: set[tuple[str | None, str, str, str, bytes, float]] = set()
    flags = np.ones(len(whole.ids), bool)
    for i, name in enumerate(whole.ids):
        other = first.setdefault(name, i)
        if other != i:
            if whole.keys[i] != whole.keys[other]:
                places = f"{whole.source(other)} and {whole.source(i)}"
                raise UserError(
                    f"{places}: found dialogue {name!r} with two different texts, expected one; correct or rename one of them"
                )
            flags[i] = False
        elif (time := whole.times[i]) is not None:
            # Copies in two given splits stay: they are a leak, to be told.
            event = (whole.given[i], whole.responders[i], whole.queriers[i], whole.groups[i], whole.keys[i], time)
            flags[i] = event not in said
            said.add(event)
    return flags


def _draw(columns: splits.Columns, rules: Merging) -> list[str]:
    if rules.allow_leaks:
        # Given splits may contradict each other: what has one keeps it, whatever becomes of the rest of its group.
        free = [i for i, split in enumerate(columns.splits) if split is None]
        drawn = iter(_drawn(_some(columns, free), rules) if free else [])
        return [next(drawn) if split is None else split for split in columns.splits]
    return _drawn(columns, rules)


def _some(columns: splits.Columns, rows: Sequence[int]) -> splits.Columns:
    return splits.Columns(**{f.name: [getattr(columns, f.name)[i] for i in rows] for f in dataclasses.fields(columns)})


def _drawn(columns: splits.Columns, rules: Merging) -> list[str]:
    if rules.unseen:
        columns = dataclasses.replace(columns, splits=splits.draw_queriers(columns, rules.unseen, rules.seed))
    if rules.by_time:
        return splits.draw_by_time(columns, rules.dev, rules.test)
    return splits.draw_by_group(columns, rules.seed, rules.dev, rules.test)


def _leaks(columns: splits.Columns, allow: bool) -> str:
    """What stands in two splits, "" where nothing does."""
    try:
        splits.check_columns(columns)
    except UserError as error:
        if not allow:
            raise
        return str(error)
    return ""


def _statistics(whole: _Table, keep: np.ndarray, split: Sequence[str]) -> dict[str, Any]:
    found: dict[str, dict[str, Any]] = {}
    for name in splits.SPLITS:
        own = [i for i, s in zip(keep, split, strict=True) if s == name]
        if own:
            found[name] = {
                "dialogues": len(own),
                "replies": sum(whole.replies[i] for i in own),
                "groups": len({whole.groups[i] for i in own}),
                "queriers": len({whole.queriers[i] for i in own}),
            }
    return {
        "splits": found,
        "queriers": len({whole.queriers[i] for i in keep}),
        "responders": len({whole.responders[i] for i in keep}),
    }
