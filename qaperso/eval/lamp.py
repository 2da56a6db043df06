"""LaMP's own metrics (Salemi et al., arXiv 2304.11406) of written replies.

| task    | metrics            | a reply must be                           |
|---------|--------------------|-------------------------------------------|
| 1, 2    | accuracy, macro-F1 | one of the labels that the question names |
| 3       | MAE, RMSE          | a number from 1 to 5                      |
| 4 to 7  | ROUGE-1, ROUGE-L   | any text                                  |

The benchmark's own script (eval/evaluation.py of github.com/LaMP-Benchmark/LaMP) compares whole replies with labels. Here
the first line that is not empty counts, and in it neither case nor what surrounds a label without being a letter or a
digit: `[1]`, `1.` and `"1"` are one label. Any other line is unparsed: wrong as a label, and as a rating as far from the
true one as the scale goes, as in that script. The share of unparsed replies is a metric too. Numbers off the scale,
which that script takes as they are, are unparsed.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np

from qaperso.errors import UserError
from qaperso.eval import intervals, overlap
from qaperso.types import Dialogue

LOWEST, HIGHEST = 1.0, 5.0

_TASK = re.compile(r"LaMP\D*([1-7])(?!\d)", re.IGNORECASE)
_LISTED = re.compile(r"(?:tags|categories): *\[(.*?)\]", re.DOTALL)
_NUMBER = re.compile(r"[^\w.+-]*([+-]?[0-9]+(?:\.[0-9]+)?)[^\w]*")


def score(dialogues: Sequence[Dialogue], replies: Sequence[str]) -> dict[str, dict[str, float]]:
    """LaMP's metrics of each task that is among the dialogues.

    Args:
      dialogues: of any data; those of LaMP are known by `fields["task"]`, which the reader sets (and which data sets
        under pseudonyms have not kept).
      replies: what was written to each.

    Returns:
      {name: {"value", "low", "high", "n"}}, names such as lamp_2_accuracy, lamp_2_macro_f1, lamp_2_unparsed, lamp_3_mae,
      lamp_3_rmse, lamp_3_unparsed, lamp_4_rouge_1, lamp_4_rouge_l. {} where no dialogue is LaMP's.

    Raises:
      UserError: a true rating that is none.
    """
    members: dict[int, list[int]] = {}
    for i, dialogue in enumerate(dialogues):
        found = _TASK.match(str(dialogue.fields.get("task", "")))
        if found:
            members.setdefault(int(found[1]), []).append(i)
    result = {}
    for task, places in sorted(members.items()):
        asked, written = [dialogues[i] for i in places], [replies[i] for i in places]
        if task <= 2:
            metrics = labels(asked, written, ("[1]", "[2]") if task == 1 else listed(asked))
        else:
            metrics = ratings(asked, written) if task == 3 else texts(asked, written)
        result |= {f"lamp_{task}_{name}": metric for name, metric in metrics.items()}
    return result


def listed(dialogues: Sequence[Dialogue]) -> list[str]:
    """The labels that questions of task 2 offer, in square brackets after "tags:" or "categories:"."""
    found = [text for d in dialogues for turn in d.turns for text in _LISTED.findall(turn.text)]
    return [label for text in found for label in text.split(",")]


def labels(
    dialogues: Sequence[Dialogue], replies: Sequence[str], offered: Sequence[str]
) -> dict[str, dict[str, float]]:
    """Accuracy, macro-F1 and the share of unparsed replies of tasks 1 and 2.

    The labels are those offered and those that are true of some dialogue. Macro-F1 is the mean over all of them that
    are true or replied at least once; the benchmark's script counts the others as 0, which matters only where few
    dialogues are scored.
    """
    true, said = [_bare(d.reply) for d in dialogues], [_bare(_first_line(text)) for text in replies]
    names = sorted({*map(_bare, offered), *true} - {""})
    is_true, is_said = (np.array([[x == name for name in names] for x in column], float) for column in (true, said))
    groups, ones = [d.group for d in dialogues], np.ones(len(dialogues))
    hits = is_true * is_said
    return {
        "accuracy": intervals.bootstrap(hits.sum(1), ones, groups),
        "macro_f1": intervals.bootstrap_statistic(np.concatenate([hits, is_true + is_said], 1), groups, macro_f1),
        "unparsed": intervals.bootstrap(1 - is_said.sum(1), ones, groups),
    }


def macro_f1(sums: np.ndarray) -> np.ndarray:
    """Mean F1 of the labels, from sums float[r, 2 labels]: hits of each, then how often it is true or said."""
    hits, both = np.split(sums, 2, 1)
    f1 = 2 * hits / np.maximum(both, 1)
    return intervals.ratio(np.stack([f1.sum(1), (both > 0).sum(1)], 1))


def ratings(dialogues: Sequence[Dialogue], replies: Sequence[str]) -> dict[str, dict[str, float]]:
    """MAE, RMSE and the share of unparsed replies of task 3.

    Raises:
      UserError: a true rating that is none.
    """
    true = [rating(d.reply) for d in dialogues]
    for dialogue, value in zip(dialogues, true, strict=True):
        if value is None:
            raise UserError(
                f"{dialogue.id}: the true score is {dialogue.reply[:40]!r}, expected a number from 1 to 5; "
                "mend the outputs and prepare the data again"
            )
    said = [rating(_first_line(text)) for text in replies]
    worst = [LOWEST if 2 * value > LOWEST + HIGHEST else HIGHEST for value in true]
    errors = np.array([t - (w if s is None else s) for t, w, s in zip(true, worst, said, strict=True)])
    groups, ones = [d.group for d in dialogues], np.ones(len(dialogues))
    return {
        "mae": intervals.bootstrap(np.abs(errors), ones, groups),
        "rmse": intervals.transformed(intervals.bootstrap(errors**2, ones, groups), np.sqrt),
        "unparsed": intervals.bootstrap(np.array([s is None for s in said], float), ones, groups),
    }


def rating(text: str) -> float | None:
    """The number from 1 to 5 that a text is, or None; marks around it do not matter, but a sign does."""
    found = _NUMBER.fullmatch(text)
    value = float(found[1]) if found else None
    return value if value is not None and LOWEST <= value <= HIGHEST else None


def texts(dialogues: Sequence[Dialogue], replies: Sequence[str]) -> dict[str, dict[str, float]]:
    """ROUGE-1 and ROUGE-L of tasks 4 to 7; see `overlap.rouge`."""
    groups, found = [d.group for d in dialogues], overlap.rouge([d.reply for d in dialogues], replies)
    return {name: intervals.bootstrap(found[name], np.ones(len(replies)), groups) for name in ("rouge_1", "rouge_l")}


def _first_line(text: str) -> str:
    return next((line for line in text.splitlines() if line.strip()), "")


def _bare(text: str) -> str:
    """A label in lower case, without what surrounds it and is neither letter nor digit."""
    return " ".join(re.sub(r"^[\W_]+|[\W_]+$", "", text.casefold()).split())
