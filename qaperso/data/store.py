"""Names to numbers: who asks, who answers, which class a dialogue belongs to."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Collection, Mapping, Sequence

import numpy as np

from qaperso.errors import UserError, nearest
from qaperso.types import STRANGER, Dialogue

STRANGER_NAME = "stranger"
# In `Registry.queriers`, in the place of somebody who was forgotten. No person has this name.
NOBODY = ""


@dataclasses.dataclass(frozen=True)
class Registry:
    """Queriers and responders by number. Querier i has row i + 1; row 0 is the stranger; spare rows stay free.

    A querier called `NOBODY` is one who was forgotten: the row is free, all others keep theirs.
    """

    queriers: tuple[str, ...]
    responders: tuple[str, ...]
    spare: int = 0

    @property
    def rows(self) -> int:
        """Rows of the querier table."""
        return 1 + len(self.queriers) + self.spare

    def row(self, querier: str) -> int:
        """The querier's row; 0 for "stranger".

        Raises:
          UserError: nobody of that name was in the training data.
        """
        if querier != NOBODY and querier in self.queriers:
            return self.queriers.index(querier) + 1
        if querier == STRANGER_NAME:
            return STRANGER
        raise UserError(f"querier '{querier}' is not known to this run{nearest(querier, [*self.known, STRANGER_NAME])}")

    @property
    def known(self) -> tuple[str, ...]:
        """The names that queriers have."""
        return tuple(name for name in self.queriers if name != NOBODY)

    @property
    def forgotten(self) -> tuple[int, ...]:
        """Rows of those who were forgotten."""
        return tuple(i + 1 for i, name in enumerate(self.queriers) if name == NOBODY)

    def free_row(self) -> int | None:
        """The first row that nobody has; None where all are taken."""
        row = (*self.forgotten, 1 + len(self.queriers))[0]
        return row if row < self.rows else None

    def called(self, row: int, name: str) -> Registry:
        """The registry in which a row is somebody else's, or `NOBODY`'s; the table keeps its size."""
        names = [*self.queriers, *[NOBODY] * (row - len(self.queriers))]
        names[row - 1] = name
        return dataclasses.replace(self, queriers=tuple(names), spare=self.rows - 1 - len(names))

    def to_json(self) -> dict:
        """A JSON object that `from_json` reads."""
        return dataclasses.asdict(self)

    @staticmethod
    def from_json(data: dict) -> Registry:
        """The inverse of `to_json`."""
        return Registry(tuple(data["queriers"]), tuple(data["responders"]), data["spare"])


@dataclasses.dataclass(frozen=True, eq=False)
class Store:
    """All dialogues of a run with their numbers.

    Attributes:
      dialogues: with splits.
      registry: names.
      row: int32[n], the querier's row; 0 where only other splits know the querier.
      responder, cluster, text: int32[n].
      classes: {responder, querier, cluster: int32[C]}: the (responder, querier, cluster) that occur in training.
      label: int32[n], the dialogue's class, -1 where training has no such class.
    """

    dialogues: tuple[Dialogue, ...]
    registry: Registry
    row: np.ndarray
    responder: np.ndarray
    cluster: np.ndarray
    text: np.ndarray
    classes: dict[str, np.ndarray]
    label: np.ndarray

    def split(self, name: str, limit: int | None = None) -> np.ndarray:
        """Indices of a split's dialogues, int64[m]; with a limit of at most so many, evenly spread."""
        found = np.array([i for i, d in enumerate(self.dialogues) if d.split == name], np.int64)
        return found[evenly(len(found), limit)]


def evenly(count: int, limit: int | None) -> np.ndarray:
    """Places of at most `limit` of `count` items (None = all), evenly spread from the first on to the last, int64[m]."""
    return np.linspace(0, count - 1, count if limit is None else min(count, limit)).round().astype(np.int64)


def make_store(dialogues: Sequence[Dialogue], cluster: np.ndarray, spare: int = 0) -> Store:
    """Numbers the dialogues. Registry and classes come from the training split, in sorted order of names.

    Raises:
      UserError: the training split is empty.
    """
    train = [d for d in dialogues if d.split == "train"]
    if not train:
        raise UserError(
            f"no dialogue of {len(dialogues)} is in the training split; prepare the data with lower --dev and --test"
        )
    registry = Registry(
        tuple(sorted({d.querier for d in train})), tuple(sorted({d.responder for d in dialogues})), spare
    )
    rows = {name: i + 1 for i, name in enumerate(registry.queriers)}
    responders = {name: i for i, name in enumerate(registry.responders)}
    row = np.array([rows.get(d.querier, STRANGER) for d in dialogues], np.int32)
    responder = np.array([responders[d.responder] for d in dialogues], np.int32)
    cluster = np.asarray(cluster, np.int32)
    is_train = np.array([d.split == "train" for d in dialogues])
    triples = sorted(set(zip(responder[is_train], row[is_train], cluster[is_train], strict=True)))
    number = {t: i for i, t in enumerate(triples)}
    label = [number.get(t, -1) for t in zip(responder, row, cluster, strict=True)]
    columns = np.array(triples, np.int32).reshape(-1, 3).T
    classes = dict(zip(("responder", "querier", "cluster"), columns, strict=True))
    return Store(
        tuple(dialogues), registry, row, responder, cluster, _text_ids(dialogues), classes, np.array(label, np.int32)
    )


def without(store: Store, rows: Collection[int]) -> Store:
    """The store without the dialogues, classes and names of some queriers' rows; every other number stays."""
    if not rows:
        return store
    kept = np.flatnonzero(~np.isin(store.row, list(rows)))
    columns = {key: getattr(store, key)[kept] for key in ("row", "responder", "cluster", "text", "label")}
    registry = store.registry
    for row in rows:
        registry = registry.called(row, NOBODY)
    dialogues, classes = tuple(store.dialogues[i] for i in kept), blank(store.classes, rows)
    return dataclasses.replace(store, dialogues=dialogues, registry=registry, classes=classes, **columns)


def blank(classes: Mapping[str, np.ndarray], rows: Collection[int]) -> dict[str, np.ndarray]:
    """The classes with all numbers 0 where they are of these rows; no other class has querier 0, the stranger."""
    gone = np.isin(classes["querier"], list(rows))
    return {key: np.where(gone, 0, value).astype(value.dtype) for key, value in classes.items()}


def _text_ids(dialogues: Sequence[Dialogue]) -> np.ndarray:
    seen: dict[str, int] = {}
    keys = (hashlib.sha256("\0".join(t.text for t in d.turns).encode()).hexdigest() for d in dialogues)
    return np.array([seen.setdefault(k, len(seen)) for k in keys], np.int32)
