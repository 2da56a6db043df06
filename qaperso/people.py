"""Queriers who came after training: their rows and dialogues, beside the checkpoints and never in them.

    DIR/enrolled/000013.json      whoever has row 13: name, row, the checkpoint it was fitted on, dialogues; a checksum

One file a person, written whole or not at all, so that enrolling and forgetting somebody leaves everybody else's files,
and all that training wrote, as they are. `run.open_run` and `run.restore` read them.
"""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Array, Float

from qaperso import checkpoint, step
from qaperso.data.formats import jsonl
from qaperso.data.store import Registry, Store
from qaperso.errors import UserError
from qaperso.types import Dialogue

Tree = Any
FOLDER, LOCK = "enrolled", ".people.lock"
# Of the files above; another one is refused.
LAYOUT = 1
# Rows that decide how a map lies, at most.
MAPPED = 4096


@dataclasses.dataclass(frozen=True, eq=False)
class Person:
    """Somebody who came after training.

    Attributes:
      name: of the querier.
      row: of the querier table.
      step: of the checkpoint that they were enrolled on.
      weights: `digest` of that checkpoint; "" without a vector.
      vector: float32[D], the value of their row; None in a run without querier rows, which knows them by their history.
      dialogues: what they were enrolled with.
      found: figures of the fit, see `enrol.enrol`.
    """

    name: str
    row: int
    step: int
    weights: str
    vector: np.ndarray | None
    dialogues: tuple[Dialogue, ...]
    found: Mapping[str, Any]


def table_of(trainable: Tree) -> Float[Array, "Q D"]:
    """The querier table of a run's trained parameters.

    Raises:
      UserError: its method has none.
    """
    table = trainable.get("tower", {}).get("rows")
    if table is None:
        raise UserError(
            "found no querier rows in this run, expected some to fit one more; train with config.method=qar,"
            " config.qar.querier_embedding=True and without config.compat"
        )
    return table


def with_row(trainable: Tree, row: int, vector: Float[Array | np.ndarray, " D"]) -> Tree:
    """The trained parameters with another row; every other row and leaf stays bit for bit.

    Args:
      trainable: of a run with querier rows.
      row: which one.
      vector: its new value.

    Raises:
      UserError: there is no such row.
    """
    table = table_of(trainable)
    if not 0 <= row < len(table):
        raise UserError(f"found row {row}, expected one of the table's {len(table)}; raise config.data.spare_rows")
    return {**trainable, "tower": {**trainable["tower"], "rows": table.at[row].set(vector.astype(table.dtype))}}


class Plane:
    """The plane of the two directions in which rows differ most (principal components), -1 to 1 along the wider."""

    def __init__(self, rows: Float[Array | np.ndarray, "Q D"]):
        """Finds the plane of rows, an even spread of MAPPED of many; with fewer than three it has less than two directions."""
        rows = np.asarray(rows[:: 1 + len(rows) // MAPPED], np.float64)
        self._mean = rows.mean(0)
        _, _, axes = np.linalg.svd(rows - self._mean, full_matrices=False)
        axes = axes[:2]
        # The sign of a direction is anybody's choice: its largest element is positive.
        at = np.abs(axes).argmax(1)
        self._axes = axes * np.sign(axes[np.arange(len(axes)), at])[:, None]
        reach = np.abs((rows - self._mean) @ self._axes.T).max()
        self._scale = 1 / reach if reach > 0 else 1.0

    def place(self, vector: Float[Array | np.ndarray, " D"]) -> list[float]:
        """Where a row lies, [x, y]; others than those that the plane was made of may lie beyond 1."""
        found = ((np.asarray(vector) - self._mean) @ self._axes.T * self._scale).round(4).tolist()
        return [*found, 0.0, 0.0][:2]


def digest(trainable: Tree) -> str:
    """sha256 of what a row is fitted beside: every trained leaf but the table, since no row bears on another's fit."""
    tower = {name: leaf for name, leaf in trainable.get("tower", {}).items() if name != "rows"}
    return step.params_hash({**trainable, "tower": tower})


def placed(trainable: Tree, people: Sequence[Person], number: int, workdir: Path) -> Tree:
    """The trained parameters with the rows of those who came later.

    Args:
      trainable: of the checkpoint.
      people: of the run.
      number: the checkpoint's step.
      workdir: of the run, for messages.

    Raises:
      UserError: somebody's row was fitted on other weights.
    """
    people = [person for person in people if person.vector is not None]
    if not people:
        return trainable
    weights = digest(trainable)
    for person in people:
        if (person.step, person.weights) != (number, weights):
            raise UserError(
                f"{workdir}: '{person.name}' was enrolled on checkpoint {person.step}, and this is checkpoint {number}"
                f" with other weights; fit all rows again with python -m qaperso.enrol --workdir {workdir} --again"
            )
        trainable = with_row(trainable, person.row, person.vector)
    return trainable


def joined(registry: Registry, people: Sequence[Person], workdir: Path) -> Registry:
    """The registry of training with those who came later.

    Raises:
      UserError: a name or a row that somebody has already, or a row that the table does not have.
    """
    for person in people:
        taken = person.row <= len(registry.queriers) and person.row not in registry.forgotten
        if taken or person.name in registry.known or not 0 < person.row < registry.rows:
            raise UserError(
                f"{file_of(workdir, person.row)}: found '{person.name}' in row {person.row}, expected a name and a row that"
                f" nobody has, below {registry.rows}; is the file of another run? take it away"
            )
        registry = registry.called(person.row, person.name)
    return registry


def with_history(store: Store, registry: Registry, people: Sequence[Person]) -> Store:
    """The data of a run with the dialogues of those who came later, as training records in clusters of their own.

    Args:
      store: of the run's data.
      registry: with those who came later.
      people: they.

    Returns:
      A store in which `data.history` finds their dialogues: by pair, querier and responder, not by query cluster. They
      have no class, and nobody else's numbers change.
    """
    added = [dataclasses.replace(d, split="train") for person in people for d in person.dialogues]
    if not added:
        return dataclasses.replace(store, registry=registry)
    count = len(added)
    number = {name: i for i, name in enumerate(registry.responders)}
    columns = {
        "row": [registry.row(d.querier) for d in added],
        "responder": [number[d.responder] for d in added],
        # -1 is what a dialogue without a cluster is looked up under.
        "cluster": range(-2, -2 - count, -1),
        "text": range(1 + max(store.text, default=-1), 1 + max(store.text, default=-1) + count),
        "label": [-1] * count,
    }
    joint = {key: np.append(getattr(store, key), np.array(new, np.int32)) for key, new in columns.items()}
    return dataclasses.replace(store, dialogues=(*store.dialogues, *added), registry=registry, **joint)


def numbered(dialogues: Sequence[Dialogue], row: int) -> tuple[Dialogue, ...]:
    """Dialogues of whoever has a row, with ids that no dialogue of the data has."""
    return tuple(dataclasses.replace(d, id=f"enrolled/{row}/{i}", split=None) for i, d in enumerate(dialogues))


def file_of(workdir: Path, row: int) -> Path:
    """Where whoever has a row is written down; no name becomes part of a path."""
    return workdir / FOLDER / f"{row:06d}.json"


def read(workdir: Path) -> tuple[Person, ...]:
    """Everybody who was enrolled in a run, by row.

    Raises:
      UserError: a file that is broken or was changed.
    """
    return tuple(_read(path) for path in sorted((workdir / FOLDER).glob("*.json")))


def _read(path: Path) -> Person:
    try:
        whole = json.loads(path.read_text(encoding="utf-8"))
        layout, content = whole["layout"], whole["person"]
        if layout != LAYOUT:
            raise UserError(f"{path}: found layout {layout}, expected {LAYOUT}; enrol again with this version")
        if whole["sha256"] != _checksum(content):
            raise ValueError("its checksum is of other content")
        dialogues = tuple(jsonl.from_json(d, f"{path}: dialogue {i}") for i, d in enumerate(content.pop("dialogues")))
        vector = content.pop("vector")
        vector = None if vector is None else np.frombuffer(base64.b64decode(vector), "<f4").astype(np.float32)
        return Person(**content, vector=vector, dialogues=dialogues)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is broken ({error}); take it away, and enrol that person again") from error


def write(workdir: Path, person: Person) -> None:
    """Writes a person down, in the place of whoever had the row. To be called under `locked`.

    Raises:
      UserError: the folder cannot be written.
    """
    vector = None if person.vector is None else np.asarray(person.vector, "<f4")
    content = {field.name: getattr(person, field.name) for field in dataclasses.fields(person)}
    content["dialogues"] = [jsonl.to_json(d) for d in person.dialogues]
    content["vector"] = None if vector is None else base64.b64encode(vector.tobytes()).decode()
    path = file_of(workdir, person.row)
    try:
        path.parent.mkdir(exist_ok=True)
        checkpoint.write_json(path, {"layout": LAYOUT, "sha256": _checksum(content), "person": content})
    except OSError as error:
        raise UserError(f"{path} cannot be written ({error.strerror}); make the run's folder writable") from error


def _checksum(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


@contextlib.contextmanager
def locked(workdir: Path) -> Iterator[None]:
    """Keeps everybody else from enrolling or forgetting somebody in the run meanwhile; waits for whoever does.

    Raises:
      UserError: the folder cannot be written.
    """
    # Not on every system; only these commands need it.
    import fcntl

    try:
        file = (workdir / LOCK).open("w", encoding="utf-8")
    except OSError as error:
        raise UserError(f"{workdir} cannot be written ({error.strerror}); make the run's folder writable") from error
    with file:
        fcntl.flock(file, fcntl.LOCK_EX)
        # What a writing that was killed has left, of somebody who may be forgotten next. Nobody else writes now.
        for left in file_of(workdir, 0).parent.glob("*.partial"):
            left.unlink()
        yield
