"""Who may ask as whom: bearer keys, some of which are limited to some queriers."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

from qaperso.data.store import STRANGER_NAME
from qaperso.errors import UserError
from qaperso.server.protocol import ApiError

VARIABLE = "QAPERSO_API_KEYS"
SHORTEST = 16


@dataclasses.dataclass(frozen=True)
class Caller:
    """Whoever sent a request. `queriers` None = may ask as anybody."""

    queriers: frozenset[str] | None = None

    def may_ask_as(self, querier: str) -> bool:
        """Whether the key is good for this querier. The stranger is nobody, and open to every key."""
        return self.queriers is None or querier == STRANGER_NAME or querier in self.queriers

    def check_unlimited(self) -> None:
        """Lets only keys pass that are good for every querier.

        Raises:
          ApiError: 403.
        """
        if self.queriers is not None:
            raise ApiError(403, "this key is limited to some queriers; this needs one that is not", "key_limited")


class Keys:
    """The keys of a server, as digests: what is compared tells nothing of a key by the time that it takes."""

    def __init__(self, granted: Mapping[str, frozenset[str] | None]):
        """Keeps keys and what each is good for; {} = no key is asked for."""
        self._granted = {_digest(key): Caller(queriers) for key, queriers in granted.items()}

    @property
    def required(self) -> bool:
        """Whether requests need a key."""
        return bool(self._granted)

    def caller(self, authorization: str | None) -> Caller:
        """Whoever sends this header `Authorization`.

        Raises:
          ApiError: 401: a key is needed and this is none of them.
        """
        if not self._granted:
            return Caller()
        scheme, _, key = (authorization or "").partition(" ")
        found = self._granted.get(_digest(key.strip())) if scheme.lower() == "bearer" else None
        if found is None:
            what = "is not known" if authorization else "is missing"
            headers = {"WWW-Authenticate": "Bearer"}
            message = f"the API key {what}; send it as the header 'Authorization: Bearer KEY'"
            raise ApiError(401, message, "invalid_api_key", headers=headers)
        return found


def load_keys(path: Path | None, environment: Mapping[str, str]) -> Keys:
    """The keys of a file and of the environment, none where there is neither.

    Args:
      path: a file with a JSON object, {key: null | [querier, ...]}.
      environment: `QAPERSO_API_KEYS` may hold keys for all queriers, with commas between them.

    Raises:
      UserError: the file cannot be read or is something else; a key is too short.
    """
    granted: dict[str, frozenset[str] | None] = {}
    if path is not None:
        granted |= _read(path)
    for key in environment.get(VARIABLE, "").split(","):
        if key.strip():
            granted[_checked(key.strip(), VARIABLE)] = None
    return Keys(granted)


def _read(path: Path) -> dict[str, frozenset[str] | None]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"--keys {path}: cannot be read ({error.strerror}); give a JSON file") from error
    except ValueError as error:
        raise UserError(f"--keys {path}: found no JSON ({error}), expected {{KEY: null or [querier, ...]}}") from error
    if not isinstance(data, dict) or not data:
        raise UserError(f"--keys {path}: found no key, expected a JSON object {{KEY: null or [querier, ...]}}")
    granted = {}
    for key, queriers in data.items():
        if queriers is not None and not (isinstance(queriers, list) and all(isinstance(q, str) for q in queriers)):
            raise UserError(
                f"--keys {path}: found a key with something else than queriers, expected null (all of them) or a list of names"
            )
        granted[_checked(key, f"--keys {path}")] = None if queriers is None else frozenset(queriers)
    return granted


def _checked(key: str, where: str) -> str:
    # The key itself is not shown: messages end up in logs.
    if len(key) < SHORTEST or not key.isascii() or not key.isprintable() or " " in key:
        raise UserError(
            f"{where}: found a key of {len(key)} characters, expected {SHORTEST} printable ASCII ones or more without blanks;"
            " make one with: python -c 'import secrets; print(secrets.token_urlsafe())'"
        )
    return key


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()
