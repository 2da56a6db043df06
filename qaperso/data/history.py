"""What a method may look at beside the dialogue itself: earlier records of the training split, here and nowhere else."""

from __future__ import annotations

import collections
import dataclasses
import functools
from typing import Literal, get_args

import numpy as np

from qaperso.data.store import Store
from qaperso.types import Dialogue, Turn

By = Literal["pair", "querier", "responder", "cluster"]
Key = tuple[str | int, ...]


def history(store: Store, dialogue: Dialogue, by: By) -> np.ndarray:
    """The earlier records that may be shown beside a dialogue (ours).

    Only the training split; never the dialogue's own group; where both times are known, only what is older.

    Args:
      store: of the run.
      dialogue: of any split, or one the store does not hold; nobody needs to know its querier.
      by: "pair" = this responder and querier, "querier" = this querier with anybody, "responder" = this responder with
        anybody, "cluster" = anybody's records of the dialogue's query cluster, none where the store does not hold it.

    Returns:
      Indices of the store, int64[n], oldest first; records without a time come first, in the store's order.
    """
    index = _index(store)
    found = index.members.get(_key(by, dialogue, index.cluster.get(dialogue.id, -1)), np.zeros(0, np.int64))
    kept = index.group[found] != index.groups.get(dialogue.group, -1)
    if dialogue.time is not None:
        # A time that is not known is NaN, which is never later.
        kept &= ~(index.time[found] >= dialogue.time)
    return found[kept]


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
                members[_key(by, dialogues[i], int(store.cluster[i]))].append(i)
    cluster = {d.id: int(c) for d, c in zip(dialogues, store.cluster, strict=True)}
    return _Index({key: np.array(own, np.int64) for key, own in members.items()}, groups, group, time, cluster)


def _key(by: By, dialogue: Dialogue, cluster: int) -> Key:
    responder, querier = dialogue.responder, dialogue.querier
    what = {"pair": (responder, querier), "querier": (querier,), "responder": (responder,), "cluster": (cluster,)}
    return (by, *what[by])
