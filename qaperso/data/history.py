"""What a method may look at beside the dialogue itself: earlier records of the training split, here and nowhere else."""

from __future__ import annotations

import collections
import dataclasses
import functools
from typing import Literal, get_args

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


def peers(store: Store, dialogue: Dialogue, record: int) -> np.ndarray:
    """What others got on the same occasion as an earlier record, as far as it may be shown beside a dialogue (ours).

    The same occasion is the same item where records say one (reviews), else the same query cluster. Others are other
    queriers of the same responder. The bounds are the dialogue's, see `history`: what it may not look at is no peer of a
    record either.

    Args:
      store: of the run.
      dialogue: for whose sake the record is looked at.
      record: index of the store; of the training split.

    Returns:
      Indices of the store, int64[n], oldest first.
    """
    own = store.dialogues[record]
    by: By = "item" if "item" in own.fields else "cluster"
    found = history(store, dataclasses.replace(own, group=dialogue.group, time=dialogue.time), by)
    return found[(store.row[found] != store.row[record]) & (store.responder[found] == store.responder[record])]


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


@dataclasses.dataclass(frozen=True, eq=False)
class _Index:
    """members: training records of each key, in order; group, time: of each record; cluster: of each id."""

    members: dict[Key, np.ndarray]
    groups: dict[str, int]
    group: np.ndarray
    time: np.ndarray
    cluster: dict[str, int]


# Of the few stores that a process has open, so that a look costs what it finds and not what there is.
@functools.lru_cache(maxsize=4)
def _index(store: Store) -> _Index:
    dialogues = store.dialogues
    time = np.array([np.nan if d.time is None else d.time for d in dialogues], float)
    groups: dict[str, int] = {}
    group = np.array([groups.setdefault(d.group, len(groups)) for d in dialogues], np.int64)
    members: dict[Key, list[int]] = collections.defaultdict(list)
    # What has no time counts as older than what has one: the end of a history is what is known to be recent.
    for i in np.argsort(np.where(np.isnan(time), -np.inf, time), kind="stable").tolist():
        if dialogues[i].split == "train":
            for by in get_args(By):
                key = _key(by, dialogues[i], int(store.cluster[i]))
                if key is not None:
                    members[key].append(i)
    cluster = {d.id: int(c) for d, c in zip(dialogues, store.cluster, strict=True)}
    return _Index({key: np.array(own, np.int64) for key, own in members.items()}, groups, group, time, cluster)


def _key(by: By, dialogue: Dialogue, cluster: int) -> Key | None:
    responder, querier = dialogue.responder, dialogue.querier
    if by == "item":
        item = dialogue.fields.get("item")
        # Fields may hold anything that a file says.
        return (by, item) if isinstance(item, str | int) else None
    what = {"pair": (responder, querier), "querier": (querier,), "responder": (responder,), "cluster": (cluster,)}
    return (by, *what[by])
