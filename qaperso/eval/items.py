"""Metrics by dialogue: what intervals, paired comparisons and suites are computed from, in memory and in a run's folder."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from qaperso.errors import UserError
from qaperso.eval import intervals

FILE = "items.npz"


@dataclasses.dataclass(frozen=True, eq=False)
class Items:
    """Numerators and denominators of metrics for each dialogue of a split.

    Attributes:
      ids, queriers, groups: of the n dialogues.
      sums, counts: {metric: float64[n]}; a count of 0 = the dialogue has no value.
    """

    ids: Sequence[str]
    queriers: Sequence[str]
    groups: Sequence[str]
    sums: dict[str, np.ndarray]
    counts: dict[str, np.ndarray]

    def add(self, metric: str, sums: np.ndarray, counts: np.ndarray | None = None) -> None:
        """Adds a metric; each dialogue counts once where no counts are given."""
        self.sums[metric] = np.asarray(sums, float)
        self.counts[metric] = np.ones(len(self.ids)) if counts is None else np.asarray(counts, float)

    def metrics(self) -> dict[str, dict[str, float]]:
        """Every metric as a mean with its interval over groups; n counts dialogues with a value."""
        found = {}
        for name, sums in self.sums.items():
            held = self.counts[name] > 0
            groups = [g for g, h in zip(self.groups, held, strict=True) if h]
            found[name] = intervals.bootstrap(sums[held], self.counts[name][held], groups)
        return found


def difference(a: Items, b: Items, metric: str) -> tuple[list[str], np.ndarray, np.ndarray]:
    """Numerators of a - b over the dialogues that both scored with equal denominators.

    Returns:
      Groups, numerators and denominators of these dialogues.

    Raises:
      UserError: there are none.
    """
    place = {name: i for i, name in enumerate(b.ids)}
    pairs = [(i, place[name]) for i, name in enumerate(a.ids) if name in place]
    mine, theirs = (np.array(x, int) for x in zip(*pairs, strict=True)) if pairs else (np.zeros(0, int),) * 2
    counts = a.counts[metric][mine]
    same = (counts > 0) & (counts == b.counts[metric][theirs])
    if not same.any():
        raise UserError(
            f"the two runs scored no dialogue alike for '{metric}'; evaluate both on the same data and split"
        )
    kept = mine[same]
    gap = a.sums[metric][kept] - b.sums[metric][theirs[same]]
    return [a.groups[i] for i in kept], gap, counts[same]


def save(folder: Path, items: Items) -> None:
    """Writes a run's items, whole or not at all."""
    target = folder / FILE
    partial = target.with_name("partial-" + FILE)
    names = {name: np.array(getattr(items, name), str) for name in ("ids", "queriers", "groups")}
    arrays = {f"{kind}/{k}": v for kind in ("sums", "counts") for k, v in getattr(items, kind).items()}
    np.savez(partial, **names, **arrays)
    partial.replace(target)


def load(folder: Path) -> Items:
    """The items that `save` wrote.

    Raises:
      UserError: none there, or broken.
    """
    path = folder / FILE
    try:
        with np.load(path) as file:
            held = {name: file[name] for name in file.files}
    except FileNotFoundError as error:
        raise UserError(f"{path} is not there; run python -m qaperso.evaluate --workdir {folder} first") from error
    except (OSError, EOFError, ValueError, KeyError) as error:
        raise UserError(f"{path} is broken ({error}); evaluate the run again") from error
    parts = {
        kind: {k.split("/", 1)[1]: v for k, v in held.items() if k.startswith(kind + "/")}
        for kind in ("sums", "counts")
    }
    return Items(held["ids"].tolist(), held["queriers"].tolist(), held["groups"].tolist(), **parts)
