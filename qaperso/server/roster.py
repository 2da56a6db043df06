"""The queriers of a running server: those of training, and those whom it was given since, with their rows.

Whoever is enrolled gets one of the table's free rows. Name, row and vector are kept as `python -m qaperso.enrol` keeps them
(`qaperso/people.py`), so that a server that was killed and all other commands know them; their dialogues are kept nowhere. Who was
in the training data cannot be forgotten here: what was learned of them is in shared weights too.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from qaperso import people
from qaperso.data.store import STRANGER_NAME, Registry
from qaperso.errors import nearest
from qaperso.people import Person, Plane
from qaperso.server.keys import Caller
from qaperso.server.protocol import ApiError
from qaperso.types import STRANGER

# Names among which the nearest to a wrong one is looked for, at most.
GUESSED = 1000


class Roster:
    """Names and rows; for one thread."""

    def __init__(
        self, registry: Registry, table: Float[np.ndarray, "Q D"] | None, folder: Path, step: int, weights: str
    ):
        """Reads whoever was enrolled before.

        Args:
          registry: of training.
          table: the trained rows; None where the run has none, so that nobody can be enrolled.
          folder: of the run.
          step, weights: of the checkpoint that is served; see `people.digest`.

        Raises:
          UserError: a file there is broken, or of another run.
        """
        self._folder, self._step, self._weights = folder, step, weights
        self.people = people.read(folder)
        people.joined(registry, self.people, folder)
        self._rows = {STRANGER_NAME: STRANGER} | {name: registry.row(name) for name in registry.known}
        first = 1 + len(registry.queriers)
        free = () if table is None else (*registry.forgotten, *range(first, registry.rows))
        self._free = sorted(set(free) - {person.row for person in self.people})
        self._map = None if table is None else Plane(table[:first])
        self._places = {} if table is None else {row: self._map.place(table[row]) for row in self._rows.values()}
        self._vectors: dict[str, np.ndarray | None] = {}
        for person in self.people:
            self._know(person.name, person.row, person.vector)

    def _know(self, name: str, row: int, vector: np.ndarray | None) -> None:
        self._rows[name], self._vectors[name] = row, vector
        if vector is not None:
            self._places[row] = self._map.place(vector)

    @property
    def enrolled(self) -> dict[str, tuple[int, np.ndarray | None]]:
        """Row and vector, float32[D], of everybody who was enrolled."""
        return {name: (self._rows[name], vector) for name, vector in self._vectors.items()}

    def row(self, querier: str, caller: Caller) -> int:
        """The querier's row.

        Raises:
          ApiError: 403 or 404: the caller's key is not good for the querier, or nobody has that name. A limited key is told the
            first of both, so that it cannot ask who else is there.
        """
        if not caller.may_ask_as(querier):
            raise ApiError(403, "this key is not good for that querier", "querier_not_allowed", "user")
        if querier not in self._rows:
            known = [name for name in self._rows if caller.may_ask_as(name)]
            hint = nearest(querier[:64], known) if len(known) <= GUESSED else ""
            raise ApiError(
                404, f"querier '{querier[:64]}' is not known to this server{hint}", "querier_not_found", "user"
            )
        return self._rows[querier]

    def listed(self, caller: Caller) -> list[dict[str, Any]]:
        """The queriers whom a caller may ask as, the stranger first, each with its place on the map."""
        return [
            {
                "id": name,
                "object": "querier",
                "enrolled": name in self._vectors,
                "position": self._places.get(row),
            }
            for name, row in self._rows.items()
            if caller.may_ask_as(name)
        ]

    def reserve(self, name: str) -> int:
        """A spare row for somebody new.

        Raises:
          ApiError: 409: the name is taken, or no row is left.
        """
        if name in self._rows:
            raise ApiError(
                409,
                f"there is a querier '{name}' already; forget them first, or choose another name",
                "name_taken",
                "name",
            )
        if not self._free:
            message = "no spare row is left for somebody new"
            if self._map is None:
                message = (
                    "the model has no rows for queriers; only a run of config.method=qar with them can enrol somebody"
                )
            raise ApiError(409, message, "no_row")
        return self._free.pop(0)

    def release(self, row: int) -> None:
        """Gives a reserved or forgotten row back."""
        self._free.append(row)
        self._free.sort()

    def add(self, name: str, row: int, vector: Float[np.ndarray, " D"]) -> None:
        """Registers somebody new, in a file first.

        Raises:
          ApiError: 409: a command outside of the server has enrolled somebody in that row, or of that name.
          UserError: the file cannot be written; nobody was registered.
        """
        vector = np.asarray(vector, np.float32)
        with people.locked(self._folder):
            if any(row == person.row or name == person.name for person in people.read(self._folder)):
                message = (
                    f"'{name}' or row {row} was enrolled outside of this server meanwhile; restart it to know of that"
                )
                raise ApiError(409, message, "name_taken", "name")
            people.write(self._folder, Person(name, row, self._step, self._weights, vector, (), {}))
        self._know(name, row, vector)

    def remove(self, name: str) -> int:
        """Strikes somebody who was enrolled, their file first; their row is theirs until it is released.

        Raises:
          ApiError: 404 or 409: nobody of that name, or somebody of the training data.
          UserError, OSError: the folder cannot be written; nothing changed.
        """
        row = self.row(name, Caller())
        if name not in self._vectors:
            message = (
                f"'{name}' is in what the model was trained with, whose traces are in the shared weights too; only who was enrolled"
                " here can be forgotten here"
            )
            raise ApiError(409, message, "querier_trained", "name")
        with people.locked(self._folder):
            people.file_of(self._folder, row).unlink(missing_ok=True)
        del self._vectors[name], self._rows[name]
        self._places.pop(row, None)
        return row
