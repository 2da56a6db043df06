"""DPL: what sets a person apart from others is stated by a language model and told to the frozen base (arXiv 2503.02450).

For each of the earlier records that are most like the query, representative others on the same item (or query cluster)
are chosen and the differences to them stated, by aspect; a second question makes a profile of these and of the records;
the base replies after the profile and the records. Nothing is trained. The wording is in `qaperso/differences.py`.

Whose profile it is: that of the pair. In dialogues, how this responder speaks to this querier, as against other queriers
who asked alike; in reviews, where the responder of all is "reviewer", how this author writes, as against other authors on
the same item. See docs/methods.md.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import re
from collections.abc import Callable, Sequence

import numpy as np

from qaperso import differences
from qaperso.data.history import history, peers
from qaperso.data.peers import record_seed, reply_vectors, representatives
from qaperso.data.store import Store
from qaperso.data.text import called
from qaperso.differences import DIALOGUES, REVIEWS, Differences, Quote, Wording
from qaperso.endpoint import Messages
from qaperso.methods import Setting
from qaperso.methods.base import condition, counts, embeddings, joint, loss, reader, remember, weights
from qaperso.methods.prompts import Size, bm25, declare, fitted, named
from qaperso.types import QUERIER, RESPONDER, Dialogue, Turn

# The most recent records of the person, and of others on one item, that are looked through.
HISTORY, PEERS = 2048, 512
Complete = Callable[[Sequence[Messages]], Sequence[str]]


@dataclasses.dataclass(frozen=True)
class Note:
    """What was found of a dialogue's pair.

    Attributes:
      records: indices of the store, most like the query first.
      differences: by record; None where nobody else met the item, or the answer could not be read.
      profile: of the pair, "" without records, or where nothing was answered.
      counts: what happened on the way, see `annotate`.
    """

    records: tuple[int, ...]
    differences: tuple[Differences | None, ...]
    profile: str
    counts: collections.Counter[str]


def reads_history(setting: Setting) -> bool:
    """All of it is made from training data."""
    return True


def preface(setting: Setting, store: Store | None, dialogue: Dialogue, name: str, size: Size) -> Sequence[Turn]:
    """The profile as an instruction, then the records, the most similar last; see `base.preface`."""
    config, names = setting.config, setting.config.data.names
    (note,) = notes(setting, store, [dialogue], setting.notes.complete)
    who = called(name, QUERIER, names)
    lines = gold(dialogue, config.dpl.words) if config.dpl.gold else []
    if note.profile:
        # In sentences, of which those that do not fit are left out.
        first, *rest = re.split(r"(?<=[.!?])\s+", note.profile)
        lines += [f"{wording(store.dialogues[note.records[0]]).apart.format(who=who)} {first}", *rest]
    instruction = fitted(lines, config.prompts.tokens, size)
    left = config.prompts.tokens - sum(map(size, instruction))
    shown: list[Turn] = []
    for i in note.records:
        told = store.dialogues[i]
        pair = [
            named(told, turn, name, names) for turn in (Turn(told.querier, told.query), told.turns[-1]) if turn.text
        ]
        if sum(map(size, pair)) <= left:
            shown, left = [*pair, *shown], left - sum(map(size, pair))
    return (*instruction, *shown)


def preface_tokens(setting: Setting) -> int:
    """Those configured."""
    return setting.config.prompts.tokens


def gold(dialogue: Dialogue, words: int) -> list[str]:
    """What the published prompt gives away of the review that is asked for: its rating and title, cut to `words`."""
    told = []
    if "rating" in dialogue.fields:
        told.append(f"The review rates the item {_plain(dialogue.fields['rating'])}.")
    if "title" in dialogue.fields:
        told.append(f"The review's title is: {differences.clip(str(dialogue.fields['title']), words)}")
    return told


def annotate(setting: Setting, store: Store, dialogues: Sequence[Dialogue]) -> collections.Counter[str]:
    """Has all asked that the prefaces of these dialogues need, stage by stage, many questions together.

    Returns:
      Numbers of "dialogues", those with "no history", the "items" of the others (a dialogue's records), and of these
      "nobody else on the item", "differences" stated, "repaired" (read at the second try), "unreadable" (given up);
      "profiles", and "gold" where rating or title of a dialogue's reply are shown.
    """
    found: collections.Counter[str] = collections.Counter()
    for note in notes(setting, store, dialogues, setting.notes.complete):
        found.update(note.counts)
    if setting.config.dpl.gold:
        found["gold"] = sum(bool(gold(d, setting.config.dpl.words)) for d in dialogues)
    return found


def notes(setting: Setting, store: Store, dialogues: Sequence[Dialogue], complete: Complete) -> list[Note]:
    """What is known of each dialogue's pair; stage by stage for all, so that questions are asked together.

    Args:
      setting: of the run.
      store: of its data.
      dialogues: whose last turn, the reply, is not looked at.
      complete: answers questions, in their order.
    """
    dpl, examples = setting.config.dpl, setting.config.prompts.examples
    records = [similar(store, d, examples) for d in dialogues]
    # First stage: (number of the dialogue, record) -> question.
    asked: dict[tuple[int, int], Messages] = {}
    for n, (dialogue, own) in enumerate(zip(dialogues, records, strict=True)):
        for i in own:
            others = chosen(store, i, tuple(peers(store, dialogue, store.dialogues[i])[-PEERS:].tolist()), setting)
            if others:
                quotes = [quote(store.dialogues[j], dpl.words) for j in (i, *others)]
                asked[n, i] = differences.compare(wording(store.dialogues[i]), quotes[0], quotes[1:])
    answers = dict(zip(asked, complete(list(asked.values())), strict=True))
    first = {key: differences.parse(text, dpl.words) for key, text in answers.items()}
    again = {key: differences.repair(answers[key]) for key, read in first.items() if read is None and answers[key]}
    mended = dict(zip(again, complete(list(again.values())), strict=True))
    second = {key: differences.parse(text, dpl.words) for key, text in mended.items()}
    stated = {key: read for key, read in (first | second).items() if read is not None}

    # Second stage.
    summaries: dict[int, Messages] = {}
    for n, own in enumerate(records):
        if own:
            quotes = {i: quote(store.dialogues[i], dpl.words) for i in own}
            found = [(quotes[i].about, stated[n, i]) for i in own if (n, i) in stated]
            summaries[n] = differences.summarise(wording(store.dialogues[own[0]]), found, list(quotes.values()))
    profiles = dict(zip(summaries, complete(list(summaries.values())), strict=True))

    result = []
    for n, own in enumerate(records):
        profile = differences.clip(profiles.get(n, ""), dpl.words)
        keys = [(n, i) for i in own]
        counted = {
            "dialogues": 1,
            "no history": int(not own),
            "items": len(own),
            "nobody else on the item": sum(key not in asked for key in keys),
            "differences": sum(key in stated for key in keys),
            "repaired": sum(second.get(key) is not None for key in keys),
            "unreadable": sum(key in asked and key not in stated for key in keys),
            "profiles": int(bool(profile)),
        }
        result.append(Note(tuple(own), tuple(stated.get(key) for key in keys), profile, collections.Counter(counted)))
    return result


def wording(record: Dialogue) -> Wording:
    """Reviews name the item they are about."""
    return REVIEWS if "item" in record.fields else DIALOGUES


def topic(dialogue: Dialogue) -> str:
    """What a record is looked up and compared by: the item's title and description, else the query."""
    fields = dialogue.fields
    if "item" not in fields:
        return dialogue.query
    return " ".join(str(part) for part in (fields.get("item_title", fields["item"]), fields.get("description", "")))


def quote(record: Dialogue, words: int) -> Quote:
    """A record of the past in a question; its own rating and title are no secret."""
    told = [differences.clip(record.reply, words)]
    if "title" in record.fields:
        told.insert(0, f"Title: {differences.clip(str(record.fields['title']), words)}.")
    if "rating" in record.fields:
        told.insert(0, f"Rating: {_plain(record.fields['rating'])}.")
    return Quote(differences.clip(topic(record), words), " ".join(told))


def _plain(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def similar(store: Store, dialogue: Dialogue, count: int) -> list[int]:
    """The pair's earlier records that are most like the query by BM25 (`topic`), most like first, of equals the most recent.

    No text is there twice, and none without words.
    """
    distinct: dict[str, int] = {}
    for i in history(store, dialogue, "pair")[-HISTORY:][::-1].tolist():
        if store.dialogues[i].reply.strip():
            distinct.setdefault(store.dialogues[i].reply, i)
    own = list(distinct.values())
    nearness = bm25(tuple(topic(store.dialogues[i]) for i in own), topic(dialogue))
    return [own[k] for k in np.argsort(-nearness, kind="stable")[:count]]


def chosen(store: Store, record: int, others: tuple[int, ...], setting: Setting) -> tuple[int, ...]:
    """The records of representative others for one record of the person's; indices of the store, rising."""
    dpl = setting.config.dpl
    return _chosen(store, record, others, dpl.representatives, dpl.select, setting.config.seed)


# Most dialogues of a pair look at the same records.
@functools.lru_cache(maxsize=65536)
def _chosen(store: Store, record: int, others: tuple[int, ...], count: int, select: str, seed: int) -> tuple[int, ...]:
    own = store.dialogues[record]
    # The most recent of equal texts; what says the same as the own record shows no difference.
    distinct = {store.dialogues[i].reply: i for i in others if store.dialogues[i].reply.strip()}
    distinct.pop(own.reply, None)
    rows = sorted(distinct.values())
    vectors = reply_vectors(store, [own.reply, *(store.dialogues[i].reply for i in rows)])
    return tuple(rows[k - 1] for k in representatives(vectors, count, select, record_seed(seed, own.id)))
