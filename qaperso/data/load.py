"""From a config's data section to dialogues with splits."""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from qaperso.data import clusters, prepared, reviews_town, synthetic
from qaperso.data.batches import make_examples
from qaperso.data.plan import Shape
from qaperso.data.store import Store, make_store
from qaperso.data.text import Encoded, scored_turns
from qaperso.errors import UserError, nearest
from qaperso.types import Dialogue, Example

# What a token begins with; then salt and digest, in hex.
_TOKEN = "sha256"


def token(name: str, salt: str | None = None) -> str:
    """What stands for a name where the name itself must not: "sha256:SALT:DIGEST".

    Whoever knows a name can tell whether a token is its, and so can guess at names; nobody can read a name from it.

    Args:
      name: of a person.
      salt: in hex; None = drawn anew, so that tokens of one name do not look alike.
    """
    salt = secrets.token_hex(16) if salt is None else salt
    return f"{_TOKEN}:{salt}:{hashlib.sha256(f'{salt}:{name}'.encode()).hexdigest()}"


def is_named(name: str, names: Collection[str]) -> bool:
    """Whether a name is among `names`, of which some may be tokens."""
    tokens = (other.split(":") for other in names if other.startswith(f"{_TOKEN}:"))
    return name in names or any(len(t) == 3 and token(name, t[1]) == ":".join(t) for t in tokens)


def load_dialogues(data: Any) -> list[Dialogue]:
    """Dialogues of `config.data`, each with a split; nothing straddles splits. Those of `data.without` are left out.

    Raises:
      UserError: no path, no prepared data set there, or nobody of a name that is to be left out.
    """
    dialogues = _load(data)
    if not data.without:
        return dialogues
    queriers = {d.querier for d in dialogues}
    for name in data.without:
        # Whoever a token stands for may be gone from the data.
        if name not in queriers and not name.startswith(f"{_TOKEN}:"):
            raise UserError(
                f"config.data.without names '{name}', and no querier of the data is called so{nearest(name, queriers)}"
            )
    gone = {name for name in queriers if is_named(name, data.without)}
    return [d for d in dialogues if d.querier not in gone]


def _load(data: Any) -> list[Dialogue]:
    if data.format == "synthetic":
        return synthetic.make_dialogues(synthetic.make_world(data.seed), data.per_pair)
    if data.format == "synthetic_base":
        return synthetic.make_base_dialogues(data.seed, data.count)
    if data.format == "synthetic_reviews":
        return reviews_town.make_reviews(reviews_town.make_world(data.seed))
    if not data.path:
        raise UserError(
            "data.format='prepared' needs a folder; give --config.data.path=DIR of python -m qaperso.prepare"
        )
    return prepared.read(Path(data.path))


def words(data: Any) -> list[str]:
    """The words of an embedded world, of which a random base's tokeniser is made; the town's two formats share theirs."""
    return reviews_town.words() if data.format == "synthetic_reviews" else synthetic.words()


def load_store(data: Any) -> Store:
    """Dialogues, clusters and numbers of `config.data`."""
    dialogues = load_dialogues(data)
    return make_store(dialogues, clusters.assign(dialogues, data.clusters, data.seed), data.spare_rows)


def encode_split(
    store: Store,
    indices: np.ndarray,
    encode: Callable[[Dialogue], Sequence[Encoded]],
    shape: Shape,
    labels: str = "reply",
) -> tuple[list[Example], int]:
    """Examples of the dialogues at `indices`, and how many of their replies are in none, as too long for a row.

    Args:
      store: holds the dialogues.
      indices: of those that are wanted.
      encode: a dialogue's sequences.
      shape: bounds of a row.
      labels: what counts as a reply, as `encode_dialogue` has it.

    Raises:
      UserError: none fits.
    """
    encoded = [encode(store.dialogues[i]) for i in indices]
    examples = make_examples(store, encoded, indices)
    if len(indices) and not examples:
        raise UserError(
            f"none of {len(indices)} dialogues fits batch.length={shape.length}, less what the method puts before them, and "
            f"batch.targets={shape.targets}; raise them"
        )
    asked = (store.dialogues[i] for i in indices)
    expected = sum(len(scored_turns(d.turns, d.responder, d.replies, labels)) for d in asked)
    return examples, expected - sum(e.replies for sequences in encoded for e in sequences)
