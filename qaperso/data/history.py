"""What a method may look at beside the dialogue itself: earlier records of the training split, here and nowhere else."""

from __future__ import annotations

import collections
import dataclasses
import functools
import math
import sys
from collections.abc import Sequence
from typing import Any, Literal, get_args

import numpy as np

from qaperso.data.store import Store
from qaperso.types import Dialogue, Turn

By = Literal["pair", "querier", "responder", "cluster", "item"]
Key = tuple[str | int, ...]


def history(store: Store, dialogue: Dialogue, by: By) -> np.ndarray:
    """The earlier records that may be shown beside a dialogue (ours).

    Only the training split; never the dialogue's own group; where both times are known, only what is older.

    Args:
      store: of the run.
      dialogue: of any split, or one the store does not hold; nobody needs to know its querier.
      by: "pair" = this responder and querier, "querier" = this querier with anybody, "responder" = this responder with
        anybody, "cluster" = anybody's records of the dialogue's query cluster, none where the store does not hold it,
        "item" = anybody's records of the thing it is about, `fields["item"]`, none where it names none.

    Returns:
      Indices of the store, int64[n], oldest first; records without a time come first, in the store's order.
    """
    index = _index(store)
    key = _key(by, dialogue, index.cluster.get(dialogue.id, -1))
    found = np.zeros(0, np.int64) if key is None else index.members.get(key, np.zeros(0, np.int64))
    kept = index.group[found] != index.groups.get(dialogue.group, -1)
    if dialogue.time is not None:
        # A time that is not known is NaN, which is never later.
        kept &= ~(index.time[found] >= dialogue.time)
    return found[kept]


def peers(store: Store, dialogue: Dialogue, record: Dialogue) -> np.ndarray:
    """What others got on the same occasion as an earlier record, as far as it may be shown beside a dialogue (ours).

    The same occasion is the same item where records say one (reviews), else the same query cluster; where a record came
    after the clusters were made (`people.with_history`), any query will do. Others are other queriers of the same responder. The
    bounds are the dialogue's, see `history`: what it may not look at is no peer of a record either.

    Args:
      store: of the run.
      dialogue: for whose sake the record is looked at.
      record: of the training split.

    Returns:
      Indices of the store, int64[n], oldest first.
    """
    index = _index(store)
    by: By = "item" if "item" in record.fields else "cluster" if index.cluster.get(record.id, -1) >= 0 else "responder"
    found = history(store, dataclasses.replace(record, group=dialogue.group, time=dialogue.time), by)
    responder, querier = (index.people.get(name, -1) for name in (record.responder, record.querier))
    return found[(index.querier[found] != querier) & (index.responder[found] == responder)]


def exchanges(dialogue: Dialogue) -> list[tuple[Turn, Turn]]:
    """(query, reply) of each of a dialogue's replies: the querier's last turn before it, and the reply.

    A reply that nothing was asked before is in none.
    """
    found, query = [], None
    replies = set(dialogue.replies or (len(dialogue.turns) - 1,))
    for i, turn in enumerate(dialogue.turns):
        if turn.speaker != dialogue.responder:
            query = turn
        elif i in replies and query is not None:
            found.append((query, turn))
    return found


@dataclasses.dataclass(frozen=True)
class Item:
    """Something a querier asked before and was answered; a profile's item may have no query, and is of no record."""

    query: str
    reply: str
    time: float | None = None
    record: Dialogue | None = None


def items(store: Store, dialogue: Dialogue, limit: int = sys.maxsize) -> list[Item]:
    """The most recent of what a querier asked before (ours), under the rules of `history`.

    It is what the pair said to each other; where they never did, what the querier said to anybody. A profile that the data
    give with their records (`fields["history"]`, see `formats.lamp`) belongs to it: a record's own, or that of the
    querier's training records where the record has none or somebody else is said to ask.

    Args:
      store: of the run.
      dialogue: see `history`.
      limit: at most so many.

    Returns:
      Items, oldest first; those without a time come first.
    """
    found: list[Item] = []
    for by in ("pair", "querier"):
        if not found:
            for i in reversed(history(store, dialogue, by)):
                if len(found) >= limit:
                    break
                told_then = store.dialogues[i]
                found += [Item(q.text, r.text, told_then.time, told_then) for q, r in reversed(exchanges(told_then))]
    given = [Item(entry["query"], entry["reply"], entry.get("time")) for entry in profile(store, dialogue)]
    told = [*given, *reversed(found)]
    if dialogue.time is not None:
        told = [item for item in told if item.time is None or item.time < dialogue.time]
    return sorted(told, key=lambda item: -math.inf if item.time is None else item.time)[-limit:]


def asked(dialogue: Dialogue) -> str:
    """What a history is searched for: the query, less a benchmark's fixed instruction where the reader of its files told it apart."""
    query = dialogue.fields.get("query")
    return query if isinstance(query, str) and "history" in dialogue.fields else dialogue.query


def profile(store: Store, dialogue: Dialogue) -> Sequence[dict[str, Any]]:
    """The profile that the data give for a dialogue's querier, `{"query", "reply", "time"?}` each; see `items`."""
    index = _index(store)
    own = _profile(dialogue) if index.asked.get(dialogue.id, dialogue.querier) == dialogue.querier else None
    return index.profiles.get(dialogue.querier, ()) if own is None else own


def _profile(dialogue: Dialogue) -> list[dict[str, Any]] | None:
    """None where `fields["history"]` is no list of queries and replies: other data may use the name for something else."""
    found = dialogue.fields.get("history")
    return found if isinstance(found, list) and all(map(_is_item, found)) else None


def _is_item(entry: Any) -> bool:
    texts = isinstance(entry, dict) and all(isinstance(entry.get(key), str) for key in ("query", "reply"))
    return texts and isinstance(entry.get("time"), float | int | None)


@dataclasses.dataclass(frozen=True, eq=False)
class _Index:
    """members: training records of each key, in order; group, time, querier, responder: of each record; cluster, asked (who
    did): of each id; people: numbers of names; profiles: of each querier, from the last training record that has one."""

    members: dict[Key, np.ndarray]
    groups: dict[str, int]
    group: np.ndarray
    time: np.ndarray
    querier: np.ndarray
    responder: np.ndarray
    cluster: dict[str, int]
    asked: dict[str, str]
    people: dict[str, int]
    profiles: dict[str, list[dict[str, Any]]]


# Of the few stores that a process has open, so that a look costs what it finds and not what there is.
@functools.lru_cache(maxsize=4)
def _index(store: Store) -> _Index:
    dialogues = store.dialogues
    time = np.array([np.nan if d.time is None else d.time for d in dialogues], float)
    groups: dict[str, int] = {}
    group = np.array([groups.setdefault(d.group, len(groups)) for d in dialogues], np.int64)
    members: dict[Key, list[int]] = collections.defaultdict(list)
    profiles: dict[str, list[dict[str, Any]]] = {}
    # What has no time counts as older than what has one: the end of a history is what is known to be recent.
    for i in np.argsort(np.where(np.isnan(time), -np.inf, time), kind="stable").tolist():
        if dialogues[i].split == "train":
            for by in get_args(By):
                key = _key(by, dialogues[i], int(store.cluster[i]))
                if key is not None:
                    members[key].append(i)
            if (own := _profile(dialogues[i])) is not None:
                profiles[dialogues[i].querier] = own
    cluster = {d.id: int(c) for d, c in zip(dialogues, store.cluster, strict=True)}
    asked = {d.id: d.querier for d in dialogues}
    people: dict[str, int] = {}
    numbers = [[people.setdefault(name, len(people)) for name in (d.querier, d.responder)] for d in dialogues]
    querier, responder = np.array(numbers, np.int64).reshape(-1, 2).T
    arrays = {key: np.array(own, np.int64) for key, own in members.items()}
    return _Index(arrays, groups, group, time, querier, responder, cluster, asked, people, profiles)


def _key(by: By, dialogue: Dialogue, cluster: int) -> Key | None:
    responder, querier = dialogue.responder, dialogue.querier
    if by == "item":
        item = dialogue.fields.get("item")
        # Fields may hold anything that a file says.
        return (by, item) if isinstance(item, str | int) else None
    what = {"pair": (responder, querier), "querier": (querier,), "responder": (responder,), "cluster": (cluster,)}
    return (by, *what[by])
