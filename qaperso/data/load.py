"""From a config's data section to dialogues with splits."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from qaperso.data import clusters, readers, splits, synthetic
from qaperso.data.batches import Shape, make_examples
from qaperso.data.store import Store, make_store
from qaperso.data.text import Encoded
from qaperso.errors import UserError
from qaperso.types import Dialogue, Example


def load_dialogues(data: Any) -> list[Dialogue]:
    """Dialogues of `config.data`, each with a split; nothing straddles splits.

    Raises:
      UserError: no path, an unreadable file, nothing in it, or data that cannot be split.
    """
    if data.format == "synthetic":
        return synthetic.make_dialogues(synthetic.make_world(data.seed), data.per_pair)
    if data.format == "synthetic_base":
        return synthetic.make_base_dialogues(data.seed, data.count)
    if not data.path:
        raise UserError(f"data.format='{data.format}' needs a file; give --config.data.path=PATH")
    if data.format == "mqdialog":
        if len(data.responders) > 1:
            raise UserError(f"data.responders names {len(data.responders)}; the mqdialog format takes one or none")
        dialogues = readers.read_mqdialog(Path(data.path), *data.responders)
    else:
        dialogues = readers.read_scenes(Path(data.path), data.responders, data.max_turns, data.min_per_querier)
    dialogues = splits.split_by_group(dialogues, data.seed, data.dev, data.test)
    splits.check_disjoint(dialogues)
    return dialogues


def load_store(data: Any) -> Store:
    """Dialogues, clusters and numbers of `config.data`."""
    dialogues = load_dialogues(data)
    return make_store(dialogues, clusters.assign(dialogues, data.clusters, data.seed), data.spare_rows)


def encode_split(
    store: Store, indices: np.ndarray, encode: Callable[[Dialogue], Encoded | None], shape: Shape
) -> tuple[list[Example], int]:
    """Examples of the dialogues at `indices` that fit a row, and how many did not.

    Raises:
      UserError: none fits.
    """
    encoded = [encode(store.dialogues[i]) for i in indices]
    fitting = [e if e is not None and e.predicted.sum() <= shape.targets else None for e in encoded]
    examples = make_examples(store, fitting, indices)
    if len(indices) and not examples:
        raise UserError(
            f"none of {len(indices)} dialogues fits batch.length={shape.length} and batch.targets={shape.targets}; "
            "raise them"
        )
    return examples, len(indices) - len(examples)
