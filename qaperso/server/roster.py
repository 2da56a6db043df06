"""The queriers of a running server: those of training, and those whom it was given since, with their rows.

Whoever is enrolled gets one of the table's free rows. Name, row and vector are kept as `python -m qaperso.enrol` keeps them
(`qaperso/people.py`), so that a server that was killed and all other commands know them. Their dialogues are kept where the
run's method reads history, and nowhere else. Who was in the training data cannot be forgotten here: what was learned of them
is in shared weights too.
"""

from __future__ import annotations

from collections.abc import Sequence
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
from qaperso.types import STRANGER, Dialogue

# Names among which the nearest to a wrong one is looked for, at most.
GUESSED = 1000


class Roster:
    """Names and rows; for one thread."""

    def __init__(
        self,
        registry: Registry,
        table: Float[np.ndarray, "Q D"] | None,
        folder: Path,
        step: int,
        weights: str,
        history: bool = False,
    ):
        """Reads whoever was enrolled before.

        Args:
          registry: of training.
          table: the trained rows; None where the run has none.
          folder: of the run.
          step, weights: of the checkpoint that is served; see `people.digest`.
          history: whether the run's method reads history, so that somebody can be enrolled without a row.

        Raises:
          UserError: a file there is broken, or of another run.
        """
        self._folder, self._step, self._weights = folder, step, weights
        found = people.read(folder)
        people.joined(registry, found, folder)
        self._rows = {STRANGER_NAME: STRANGER} | {name: registry.row(name) for name in registry.known}
        first = 1 + len(registry.queriers)
        free = (*registry.forgotten, *range(first, registry.rows)) if history or table is not None else ()
        self._free = sorted(set(free) - {person.row for person in found})
        self._map = None if table is None else Plane(table[:first])
        self._places = {} if table is None else {row: self._map.place(table[row]) for row in self._rows.values()}
        self.enrolled: dict[str, Person] = {}
        for person in found:
            self._know(person)

    def _know(self, person: Person) -> None:
        self._rows[person.name], self.enrolled[person.name] = person.row, person
        if person.vector is not None:
            self._places[person.row] = self._map.place(person.vector)

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
                "enrolled": name in self.enrolled,
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
                    "the model has no rows for queriers, or none left; a run of config.method=qar can enrol somebody, and one"
                    " that reads history (pplug), within config.data.spare_rows"
                )
            raise ApiError(409, message, "no_row")
        return self._free.pop(0)

    def release(self, row: int) -> None:
        """Gives a reserved or forgotten row back."""
        self._free.append(row)
        self._free.sort()

    def person(
        self, name: str, row: int, vector: Float[np.ndarray, " D"] | None, dialogues: Sequence[Dialogue]
    ) -> Person:
        """Somebody as they would be registered: with the vector of their row, where rows are fitted, and with what is kept."""
        weights = "" if vector is None else self._weights
        vector = None if vector is None else np.asarray(vector, np.float32)
        return Person(name, row, self._step, weights, vector, people.numbered(dialogues, row), {})

    def add(self, person: Person) -> None:
        """Registers somebody new, in a file first.

        Raises:
          ApiError: 409: a command outside of the server has enrolled somebody in that row, or of that name.
          UserError: the file cannot be written; nobody was registered.
        """
        with people.locked(self._folder):
            others = people.read(self._folder)
            if any(person.row == other.row or person.name == other.name for other in others):
                message = (
                    f"'{person.name}' or row {person.row} was enrolled outside of this server meanwhile; restart it to know of"
                    " that"
                )
                raise ApiError(409, message, "name_taken", "name")
            people.write(self._folder, person)
        self._know(person)

    def change(self, person: Person) -> None:
        """Puts somebody who is enrolled in the place of what was known of them, in their file first.

        Raises:
          ApiError: 409: a command outside of the server has forgotten them.
          UserError: the file cannot be written; nothing changed.
        """
        with people.locked(self._folder):
            if not self._has(person):
                message = f"'{person.name}' was forgotten outside of this server meanwhile; restart it to know of that"
                raise ApiError(409, message, "querier_forgotten", "name")
            people.write(self._folder, person)
        self._know(person)

    def _has(self, person: Person) -> bool:
        """Whether the row's file is still this person's; to be called under `people.locked`."""
        return any((other.row, other.name) == (person.row, person.name) for other in people.read(self._folder))

    def of(self, name: str) -> Person:
        """Who was enrolled under a name.

        Raises:
          ApiError: 404 or 409: nobody of that name, or somebody of the training data.
        """
        self.row(name, Caller())
        if name not in self.enrolled:
            message = (
                f"'{name}' is in what the model was trained with, whose traces are in the shared weights too; only who was enrolled"
                " here can be changed or forgotten here"
            )
            raise ApiError(409, message, "querier_trained", "name")
        return self.enrolled[name]

    def remove(self, name: str) -> int:
        """Strikes somebody who was enrolled, their file first; their row is theirs until it is released.

        Raises:
          ApiError: 404 or 409: nobody of that name, or somebody of the training data.
          UserError, OSError: the folder cannot be written; nothing changed.
        """
        person = self.of(name)
        with people.locked(self._folder):
            # Whom a command has forgotten meanwhile has no file, and the one of their row is somebody else's.
            if self._has(person):
                people.file_of(self._folder, person.row).unlink()
        del self.enrolled[name], self._rows[name]
        self._places.pop(person.row, None)
        return person.row
