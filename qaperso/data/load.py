"""From a config's data section to dialogues with splits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from qaperso.data import clusters, prepared, reviews_town, synthetic
from qaperso.data.batches import make_examples
from qaperso.data.plan import Shape
from qaperso.data.store import Store, make_store
from qaperso.data.text import Encoded, scored_turns
from qaperso.errors import UserError
from qaperso.types import Dialogue, Example


def load_dialogues(data: Any) -> list[Dialogue]:
    """Dialogues of `config.data`, each with a split; nothing straddles splits.

    Raises:
      UserError: no path, or no prepared data set there.
    """
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
            f"none of {len(indices)} dialogues fits batch.length={shape.length} and batch.targets={shape.targets}; "
            "raise them"
        )
    asked = (store.dialogues[i] for i in indices)
    expected = sum(len(scored_turns(d.turns, d.responder, d.replies, labels)) for d in asked)
    return examples, expected - sum(e.replies for sequences in encoded for e in sequences)
