"""LaMP (Salemi et al., arXiv 2304.11406), tasks 1 to 7: questions with the asking user's profile, and gold outputs.

`SPLIT_questions.json` holds a JSON list of `{"id", "input", "profile": [{"id", ..., "date"?}, ...]}`; the golds are in
`SPLIT_outputs.json` beside it, `{"task": "LaMP_3", "golds": [{"id", "output"}, ...]}`, or under "output" in the
questions (as the benchmark's own ranking script writes them). For the test split no outputs are published.

An input is a fixed instruction and the user's query; an item of the profile becomes a query and what the user wrote:

| task     | the instruction asks for      | query                      | profile: query -> written |
|----------|-------------------------------|----------------------------|---------------------------|
| 1        | the reference that is related | title, both references     | title -> abstract         |
| 2        | a film's tag                  | description                | description -> tag        |
| 2 (news) | an article's category         | article                    | text -> category          |
| 3        | a review's score              | review                     | text -> score             |
| 4        | an article's headline         | article                    | text -> title             |
| 5        | a paper's title               | abstract                   | abstract -> title         |
| 6        | an e-mail's subject           | e-mail                     | text -> title             |
| 7        | a tweet in the user's words   | tweet                      | "" -> text                |

(instructions and keys: the paper's appendix and github.com/LaMP-Benchmark/LaMP, LaMP/prompts/prompts.py). In task 1
nobody wrote an answer such as "[1]" before; the choice of title -> abstract (ours) makes past queries titles, as the
query is. The instruction itself is put in words of ours, as the user would ask for it (`Task.wording`); references, labels
and query stay as they are. The news variant of task 2 is its first edition. In task 6 the benchmark gives names of files in place of
e-mails; its `create_avocado_dataset.py` fills them in from the Avocado collection, and only the result can be read.
"""

from __future__ import annotations

import collections
import dataclasses
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from qaperso.data.formats import as_time, files, shape
from qaperso.data.formats.common import (
    as_list,
    as_name,
    as_object,
    as_text,
    decode_json,
    fail,
    read_text,
    show,
    split_of,
)
from qaperso.types import Dialogue, Turn

LINES = False


@dataclasses.dataclass(frozen=True)
class Task:
    """What is asked and how it is said.

    Attributes:
      name: the task's name.
      opening: what inputs begin with.
      rest: a regular expression of what follows; its groups are the query.
      asks: the keys of a profile's item that are its query.
      writes: the key of what the user wrote.
      wording: how a user asks for it here, with the query's parts by number and the `{labels}` that the input offers; "" = by the
        input as it is.
    """

    name: str
    opening: str
    rest: str
    asks: tuple[str, ...]
    writes: str
    wording: str = ""


TASKS = (
    Task(
        "LaMP_1",
        "For an author who has written the paper with the title",
        r' "(.*)", which reference is related.*?\[1\]: "(.*)"\s*\[2\]: "(.*)"',
        ("title",),
        "abstract",
        'Which of two papers do I cite in mine, "{0}"? Say [1] or [2].\n[1]: "{1}"\n[2]: "{2}"',
    ),
    Task(
        "LaMP_2",
        "Which tag does this movie relate to",
        r".*?description:(.*)",
        ("description",),
        "tag",
        "Which of these would I put on the film below? Say one of them and no more. {labels}\n{0}",
    ),
    Task(
        "LaMP_2",
        "Which category does this article relate to",
        r".*?article:(.*)",
        ("text",),
        "category",
        "Where do I file the article below? Say one of these and no more. {labels}\n{0}",
    ),
    Task(
        "LaMP_3",
        "What is the score of the following review",
        r".*?review:(.*)",
        ("text",),
        "score",
        "How many points from 1 to 5 do I give with these words? Say the number and no more.\n{0}",
    ),
    Task(
        "LaMP_4",
        "Generate a headline for the following article:",
        r"(.*)",
        ("text",),
        "title",
        "What headline do I put over this?\n{0}",
    ),
    Task(
        "LaMP_5",
        "Generate a title for the following abstract of a paper:",
        r"(.*)",
        ("abstract",),
        "title",
        "What do I call the paper with this abstract?\n{0}",
    ),
    Task(
        "LaMP_6",
        "Generate a subject for the following email:",
        r"(.*)",
        ("text",),
        "title",
        "What subject line do I write over this mail?\n{0}",
    ),
    Task(
        "LaMP_7",
        "Paraphrase the following tweet",
        r"[^:]*:(.*)",
        (),
        "text",
        "Put this the way I would tweet it.\n{0}",
    ),
)


# The labels that a question of task 2 offers.
_LABELS = re.compile(r"(?:tags|categories): *\[.*?\]", re.DOTALL)


def sniff(path: Path, head: str) -> str | None:
    """Why the file looks like questions of LaMP, or None."""
    if {"[].id", "[].input", "[].profile"} <= shape(head):
        task = next((task.name for task in TASKS if task.opening in head), None)
        return task and f'a JSON list of {{"id", "input", "profile"}} with the instruction of {task}'
    return None


def units(path: Path) -> list[Path]:
    """The questions file, or the folder's files with "questions" in their names, at any depth."""
    return files(path, (".json",), "*questions*.json")


def read(
    unit: Path,
    counts: collections.Counter,
    columns: Mapping[str, str] = {},
    start: int = 0,
    stop: int | None = None,
) -> Iterator[Dialogue]:
    """One dialogue a question: "user ID" asks what the input does, in words of ours; the task ("LaMP_3") answers by the gold output.

    - id, group: TASK/FILE/ID, with the file's name without "_questions.json"; ids repeat from task to task.
    - split: from the name of the file or its folder.
    - fields: "task"; "query", the input without its instruction; "history", the profile in its order as
      `{"id", "query", "reply", "time"?}` with Unix seconds (midnight UTC of the date, the first day of the year).

    Args:
      unit: the questions file.
      counts: gets "empty replies" (questions) and "empty history" (items of profiles), which are left out.
      columns, start, stop: not used.

    Raises:
      UserError: unreadable files, broken bytes or JSON, wrong keys or types, no outputs file, a question without gold,
        with an unknown instruction or of another task than the outputs, an id that occurs twice, no question.
    """
    questions = as_list(decode_json(read_text(unit), unit), str(unit), "questions")
    apart = any(isinstance(question, dict) and "output" not in question for question in questions)
    label, golds = _golds(unit) if apart else (None, {})
    stem = re.sub(r"_?questions_?", "", as_name(unit.stem, f"{unit}: file name")) or unit.stem
    seen: set[str] = set()
    some = False
    for index, question in enumerate(questions):
        place = f"{unit}: [{index}]"
        question = as_object(question, ("id", "input", "profile"), ("output",), place)
        name = as_name(question["id"], f"{place}.id")
        if name in seen:
            fail(f"{place}.id", f"{name!r} a second time", "it once", "; rename one of them")
        seen.add(name)
        text = as_text(question["input"], f"{place}.input")
        task, query = match(TASKS, text, f"{place}.input")
        if label and re.findall(r"[0-9]+", label)[:1] != re.findall(r"[0-9]+", task.name):
            fail(f"{place}.input", f"the instruction of {task.name}", f"that of {label}", "; give the right outputs")
        if "output" not in question and name not in golds:
            fail(place, f"no output for the id {name!r}", f"one in {_outputs(unit).name}", "; add it there")
        reply = written(question.get("output", golds.get(name)), f"{place}.output")
        past = history(question["profile"], task, counts, f"{place}.profile")
        if not reply:
            counts["empty replies"] += 1
            continue
        some = True
        who, unique = label or task.name, f"{label or task.name}/{stem}/{name}"
        turns = (Turn(f"user {name}", worded(task, text)), Turn(who, reply))
        fields = {"task": who, "query": query, "history": past}
        yield Dialogue(unique, who, f"user {name}", turns, unique, split=split_of(unit), fields=fields)
    if not some:
        fail(unit, "no question with an output", "at least one", "; check that this is the right file")


def match(tasks: Sequence[Task], text: str, place: str) -> tuple[Task, str]:
    """The task whose instruction an input begins with, and the query in it (its parts on a line each)."""
    for task in tasks:
        if (parts := _parts(task, text)) is not None:
            return task, "\n".join(parts)
    openings = ", ".join(f"'{task.opening} ...'" for task in tasks if task.opening)
    fail(place, show(text), f"one of the instructions {openings}", "; give the benchmark's own files")


def worded(task: Task, text: str) -> str:
    """An input of a task in words of ours; as it is where there are none."""
    labels = _LABELS.search(text)
    return task.wording.format(*_parts(task, text), labels=labels[0] if labels else "") if task.wording else text


def _parts(task: Task, text: str) -> list[str] | None:
    """The parts of the query in an input, None where it is none of the task's."""
    found = re.fullmatch(re.escape(task.opening) + task.rest, text, re.DOTALL | re.IGNORECASE)
    return None if found is None else [part.strip() for part in found.groups() if part is not None]


def history(profile: Any, task: Task, counts: collections.Counter, place: str) -> list[dict[str, Any]]:
    """What the user did before: `{"id", "query", "reply", "time"?}` of every item of a profile that holds a reply."""
    past = []
    for number, item in enumerate(as_list(profile, place, "items")):
        here = f"{place}[{number}]"
        item = as_object(item, (*task.asks, task.writes), ("id", "date"), here)
        asked = "\n".join(written(item[key], f"{here}.{key}") for key in task.asks)
        reply = written(item[task.writes], f"{here}.{task.writes}")
        name = number if item.get("id") is None else item["id"]
        entry = {"id": as_name(name, f"{here}.id"), "query": asked, "reply": reply}
        if item.get("date") is not None:
            entry["time"] = as_time(item["date"], f"{here}.date")
        if reply:
            past.append(entry)
        else:
            counts["empty history"] += 1
    return past


def written(value: Any, place: str) -> str:
    """A text; a number as text (scores), null as "", a list of texts joined by spaces (descriptions of products)."""
    if value is None:
        return ""
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return show(value)
    if isinstance(value, list):
        return " ".join(as_text(part, f"{place}[{number}]") for number, part in enumerate(value)).strip()
    return as_text(value, place)


def beside(unit: Path) -> list[Path]:
    """What is read with a questions file, where it is there."""
    return [_outputs(unit)]


def _outputs(unit: Path) -> Path:
    """Where the golds of a questions file are."""
    return unit.with_name(unit.name.replace("questions", "outputs"))


def _golds(unit: Path) -> tuple[str, dict[str, Any]]:
    """The task's name and the outputs by id."""
    path = _outputs(unit)
    if path == unit or not path.is_file():
        missing = f"no {path.name} beside it" if path != unit else "no 'questions' in its name to find the outputs by"
        mend = "; add that file, or leave this one out (the test split is published without outputs)"
        fail(unit, missing, "the gold outputs", mend)
    value = as_object(decode_json(read_text(path), path), ("task", "golds"), (), str(path))
    golds: dict[str, Any] = {}
    for index, gold in enumerate(as_list(value["golds"], f"{path}: golds", "golds")):
        place = f"{path}: golds[{index}]"
        gold = as_object(gold, ("id", "output"), (), place)
        name = as_name(gold["id"], f"{place}.id")
        if name in golds:
            fail(f"{place}.id", f"{name!r} a second time", "it once", "; rename one of them")
        golds[name] = gold["output"]
    return as_name(value["task"], f"{path}: task"), golds
