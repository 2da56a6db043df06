"""Scores of single dialogues: their means by run and by querier, and paired differences between runs."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from qaperso.errors import UserError
from qaperso.eval import intervals
from qaperso.types import Dialogue

Metrics = dict[str, dict[str, float]]
LOWER_IS_BETTER = ("reply_nll", "empty_replies")


@dataclasses.dataclass(frozen=True, eq=False)
class Items:
    """What was measured of each of n dialogues.

    Attributes:
      ids, queriers, groups: of the dialogues.
      scores: by metric, numerators and denominators float64[n]; 0 / 0 where a dialogue has no such score. Denominators
        are tokens where the metric is a mean over tokens, else 1.
      vocabulary: digest of the tokeniser's, which decides what a token is.
    """

    ids: tuple[str, ...]
    queriers: tuple[str, ...]
    groups: tuple[str, ...]
    scores: Mapping[str, tuple[np.ndarray, np.ndarray]]
    vocabulary: str


def metrics(items: Items) -> Metrics:
    """Each metric's mean over all dialogues that have it, with an interval from resampling groups."""
    return {name: _mean(items, *scores, scores[1] > 0) for name, scores in items.scores.items()}


def by_querier(items: Items, name: str) -> Metrics:
    """One metric's mean for each querier, who has no interval with dialogues of a single group; {} without scores."""
    if name not in items.scores:
        return {}
    sums, counts = items.scores[name]
    who = np.array(items.queriers)
    return {q: _mean(items, sums, counts, (who == q) & (counts > 0)) for q in sorted(set(who[counts > 0].tolist()))}


def _mean(items: Items, sums: np.ndarray, counts: np.ndarray, keep: np.ndarray) -> dict[str, float]:
    return intervals.bootstrap(sums[keep], counts[keep], [items.groups[i] for i in np.flatnonzero(keep)])


def paired(ours: Items, theirs: Items) -> Metrics:
    """Differences, ours minus theirs, of every metric that both have, over the dialogues that both have scored.

    Both are resampled together, so that what makes a dialogue hard for both cancels out. A dialogue of which the runs
    scored different numbers of tokens (a reply did not fit one of them) is left out; metrics of tokens are left out where
    the runs do not agree on what a token is.

    Args:
      ours, theirs: of the same dialogues, in whatever order, see `check_same`.
    """
    result = {}
    for name in ours.scores:
        if (found := difference(ours, theirs, name)) is not None:
            kept = np.flatnonzero(found[1])
            if not len(kept):
                continue
            (gap, counts), groups = (x[kept] for x in found), [ours.groups[i] for i in kept]
            better = name in LOWER_IS_BETTER
            result[name] = intervals.paired(gap, np.zeros_like(gap), counts, groups, lower_is_better=better)
    return result


def difference(ours: Items, theirs: Items, name: str) -> tuple[np.ndarray, np.ndarray] | None:
    """Numerators and denominators of a metric's difference for each of our dialogues, see `paired`; 0 where left out.

    None where one of them does not have the metric, or they do not agree on what a token is.

    Raises:
      UserError: they are of different dialogues.
    """
    if set(ours.ids) != set(theirs.ids):
        raise UserError("two runs that are compared scored different dialogues; give them the same data and split")
    if name not in ours.scores or name not in theirs.scores:
        return None
    place = {other: i for i, other in enumerate(theirs.ids)}
    order = [place[own] for own in ours.ids]
    (a, number), (b, other) = ours.scores[name], (x[order] for x in theirs.scores[name])
    of_tokens = max(number.max(initial=0), other.max(initial=0)) > 1
    if of_tokens and ours.vocabulary != theirs.vocabulary:
        return None
    kept = (number > 0) & (number == other)
    return np.where(kept, a - b, 0.0), np.where(kept, number, 0.0)


def check_same(ours: str, mine: Sequence[Dialogue], theirs: str, others: Sequence[Dialogue], split: str) -> None:
    """Makes sure that two runs have the same dialogues in a split.

    Args:
      ours, mine: name and dialogues of one run.
      theirs, others: of the other.
      split: its name, for the message.

    Raises:
      UserError: an id that only one of them has, or one whose words or people differ.
    """
    left, right = ({d.id: d for d in dialogues} for dialogues in (mine, others))
    alone = [name for name in left if name not in right], [name for name in right if name not in left]
    if any(alone):
        first = (alone[0] or alone[1])[0]
        raise UserError(
            f"'{ours}' and '{theirs}' do not share the {split} split: {len(alone[0])} of {len(left)} dialogues are only "
            f"in the first and {len(alone[1])} of {len(right)} only in the second, such as '{first}'; compare runs of the "
            "same data"
        )
    for name, dialogue in left.items():
        if (dialogue.turns, dialogue.querier) != (right[name].turns, right[name].querier):
            raise UserError(
                f"'{ours}' and '{theirs}' do not share the {split} split: dialogue '{name}' has other words or people in "
                "the second; compare runs of the same data"
            )


def file_of(workdir: Path, split: str) -> Path:
    """Where the items of a split lie: items.npz for the test split, items_SPLIT.npz for another."""
    return workdir / ("items.npz" if split == "test" else f"items_{split}.npz")


def save(path: Path, items: Items) -> None:
    """Writes items to an .npz file, whole or not at all."""
    partial = path.with_name("partial-" + path.name)
    names = {name: np.array(getattr(items, name), str) for name in ("ids", "queriers", "groups", "vocabulary")}
    np.savez(partial, **names, **{f"scores/{name}": np.stack(columns) for name, columns in items.scores.items()})
    partial.replace(path)


def load(path: Path) -> Items:
    """The items that `save` wrote.

    Raises:
      UserError: none there, or broken.
    """
    try:
        with np.load(path) as file:
            held = {name: file[name] for name in file.files}
        names = {name: tuple(held[name].tolist()) for name in ("ids", "queriers", "groups")}
        scores = {k.split("/", 1)[1]: (v[0], v[1]) for k, v in held.items() if k.startswith("scores/")}
        return Items(**names, scores=scores, vocabulary=str(held["vocabulary"]))
    except FileNotFoundError as error:
        raise UserError(f"{path} is not there; run python -m qaperso.evaluate on the run first") from error
    except (OSError, EOFError, ValueError, KeyError) as error:
        raise UserError(f"{path} is broken ({error}); evaluate the run again") from error
