"""Baselines that train nothing: the frozen base replies, after a preface made from training data (`config.prompts.kind`).

- "zero_shot": no preface.
- "responder" (RPG): a profile of the responder.
- "querier" (QCG): a profile of the querier as this responder knows them.
- "retrieved" (few-shot RAG): what this querier asked this responder (where nothing, anybody) most like the query, by BM25
  (Robertson & Zaragoza, 2009, in bm25s's Lucene variant), with the replies.
- "history" (long context): the end of all that the pair has said.

These two read the profile that a benchmark gives with a question, too (`history.items`).

No LLM writes the profiles: they are extractive, what training data say put together by a template of ours. No preface
takes more than `prompts.tokens`, and where nothing is known there is none.
"""

from __future__ import annotations

import collections
import functools
import logging
import math
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

import numpy as np
from sklearn.feature_extraction.text import TfidfVectorizer

from qaperso.data.features import words
from qaperso.data.history import Item, asked, exchanges, history, items
from qaperso.data.store import Store
from qaperso.data.text import called
from qaperso.methods import Setting
from qaperso.methods.base import condition, counts, embeddings, joint, loss, reader, remember, weights
from qaperso.types import QUERIER, RESPONDER, Dialogue, Turn

Size = Callable[[Turn], int]
SYSTEM = "system"
# Words and people that a profile names.
WORDS, PEOPLE = 12, 8


def declare(setting: Setting) -> tuple[dict, dict]:
    """Nothing is trained, and nothing is remembered."""
    return {}, {}


def reads_history(setting: Setting) -> bool:
    """Every kind but zero-shot is made from training data."""
    return setting.config.prompts.kind != "zero_shot"


def preface(setting: Setting, store: Store | None, dialogue: Dialogue, name: str, size: Size) -> Sequence[Turn]:
    """What stands before a dialogue; see `base.preface`."""
    prompts, names = setting.config.prompts, setting.config.data.names
    if prompts.kind == "retrieved":
        return retrieved(store, dialogue, name, names, prompts.examples, prompts.tokens, size)
    if prompts.kind == "history":
        return recent(store, dialogue, name, names, prompts.tokens, size)
    if prompts.kind == "zero_shot":
        return ()
    rows = tuple(history(store, dialogue, "responder").tolist())
    querier = dialogue.querier if prompts.kind == "querier" else None
    lines = profile(store, rows, dialogue.responder, querier, name if querier else "", names, prompts.examples)
    return fitted(lines, prompts.tokens, size)


def preface_tokens(setting: Setting) -> int:
    """Those configured, where anything stands before dialogues."""
    prompts = setting.config.prompts
    return 0 if prompts.kind == "zero_shot" else prompts.tokens


# The dialogues of a pair mostly have the same history, and so the same profile.
@functools.lru_cache(maxsize=1024)
def profile(
    store: Store, rows: tuple[int, ...], responder: str, querier: str | None, name: str, names: str, count: int
) -> tuple[str, ...]:
    """A profile of a responder, or of a querier as the responder knows them, in the order of what matters most (ours).

    Args:
      store: of the run.
      rows: the responder's earlier records.
      responder: whose they are.
      querier: whom the profile is about; None = the responder.
      name: what that querier is called.
      names: see `text.called`.
      count: how many replies it quotes.

    Returns:
      Lines; none where there are no records (of the querier).
    """
    told = [store.dialogues[i] for i in rows]
    own = [d for d in told if querier in (None, d.querier)]
    if not own:
        return ()
    said = collections.defaultdict(list)
    for d in told:
        for turn in d.turns:
            said[turn.speaker].append(turn.text)
    me = called(responder, RESPONDER, names)
    replies = typical([reply.text for d in own for _, reply in exchanges(d)], count)
    if querier is None:
        people = collections.Counter(d.querier for d in own)
        lines = [f"You are {me}. Conversations so far: {len(own)}; people: {len(people)}."]
        if names == "visible":
            most = sorted(people.items(), key=lambda item: (-item[1], item[0]))[:PEOPLE]
            lines.append("Most often with " + ", ".join(f"{name} ({n})" for name, n in most) + ".")
        about, whom, quoted = responder, me, "You typically reply"
    else:
        you = called(name, QUERIER, names)
        lines = [f"You are {me}, talking to {you}. Conversations with {you} so far: {len(own)}."]
        said.pop(responder, None)
        about, whom, quoted = querier, you, f"To {you} you typically reply"
    if special := characteristic(said.pop(about, ()), said.values(), WORDS):
        lines.append(f"Words typical of {whom}: {', '.join(special)}.")
    return (*lines, *(f"{quoted}: {reply}" for reply in replies))


def characteristic(own: Sequence[str], others: Collection[Sequence[str]], count: int) -> list[str]:
    """The words that tell a person from others by TF-IDF (Sparck Jones, 1972), a person's texts being one document.

    Args:
      own: texts of the person.
      others: texts of each other person.
      count: how many words.

    Returns:
      Words by falling n ln(N / N_word), of equals the first in the alphabet; none that all N people use.
    """
    theirs = [{w for text in texts for w in words(text)} for texts in others]
    weight = {
        word: n * math.log((1 + len(theirs)) / (1 + sum(word in used for used in theirs)))
        for word, n in collections.Counter(w for text in own for w in words(text)).items()
    }
    return sorted((w for w in weight if weight[w] > 0), key=lambda w: (-weight[w], w))[:count]


def typical(replies: Sequence[str], count: int) -> list[str]:
    """The different replies that are nearest to the centroid of all by the cosine of TF-IDF vectors, nearest first.

    White space is made single blanks; replies without a word are left out.
    """
    texts = [" ".join(reply.split()) for reply in replies if words(reply)]
    if not texts:
        return []
    matrix = TfidfVectorizer(analyzer=words).fit_transform(texts)
    nearness = matrix @ np.asarray(matrix.mean(0)).ravel()
    order = np.argsort(-nearness, kind="stable")
    return list(dict.fromkeys(texts[i] for i in order))[:count]


def fitted(lines: Sequence[str], tokens: int, size: Size) -> Sequence[Turn]:
    """The lines as one instruction, less those that would make it exceed `tokens`."""
    kept: list[str] = []
    for line in lines:
        if size(Turn(SYSTEM, "\n".join([*kept, line]))) <= tokens:
            kept.append(line)
    return (Turn(SYSTEM, "\n".join(kept)),) if kept else ()


def retrieved(
    store: Store, dialogue: Dialogue, name: str, names: str, count: int, tokens: int, size: Size
) -> Sequence[Turn]:
    """Queries most like the dialogue's, with their replies, as far as `tokens` hold them; the most similar last.

    Of what `history.items` finds: the pair's earlier exchanges, where there are none the querier's with anybody, and the
    querier's profile. Of equally similar ones the most recent are taken.
    """
    # The most recent first, so that it is what remains of equals; and none twice.
    newest = (spoken(item, dialogue.responder, name, names) for item in reversed(items(store, dialogue)))
    told = list(dict.fromkeys(turns for turns in newest if turns))
    nearness = bm25(tuple(turns[0].text for turns in told), asked(dialogue))
    kept: list[Turn] = []
    for i in np.argsort(-nearness, kind="stable")[:count]:
        taken = sum(map(size, told[i]))
        if taken <= tokens:
            kept, tokens = [*told[i], *kept], tokens - taken
    return kept


def spoken(item: Item, responder: str, name: str, names: str) -> tuple[Turn, ...]:
    """An item as the querier's query and its reply, or as the reply alone where it has no query.

    Args:
      item: of a record, or of a profile.
      responder: who is to have replied to a profile's.
      name: what the querier is called.
      names: see `text.called`.
    """
    me = item.record.responder if item.record else responder
    turns = (Turn(called(name, QUERIER, names), item.query), Turn(called(me, RESPONDER, names), item.reply))
    return tuple(turn for turn in turns if turn.text)


def bm25(texts: tuple[str, ...], query: str) -> np.ndarray:
    """BM25 of a query against each text, float32[n]; 0 where they share no word."""
    wanted = words(query)
    index = _bm25_index(texts)
    if index is None or not wanted:
        return np.zeros(len(texts), np.float32)
    return index.get_scores(wanted)


@functools.lru_cache(maxsize=256)
def _bm25_index(texts: tuple[str, ...]) -> Any:
    # Its import runs JAX, which must not happen before the runtime of several hosts is started.
    import bm25s

    logging.getLogger("bm25s").setLevel(logging.WARNING)  # it tells of each index that it builds
    split = [words(text) for text in texts]
    if not any(split):
        return None
    index = bm25s.BM25(method="lucene", k1=1.5, b=0.75)
    index.index(split, show_progress=False)
    return index


def recent(store: Store, dialogue: Dialogue, name: str, names: str, tokens: int, size: Size) -> Sequence[Turn]:
    """The last turns of the querier's profile and the pair's earlier dialogues, as many as `tokens` hold, oldest first."""
    kept: list[Turn] = []
    for turn in _newest_first(store, dialogue, name, names):
        tokens -= size(turn)
        if tokens < 0:
            break
        kept.append(turn)
    return kept[::-1]


def _newest_first(store: Store, dialogue: Dialogue, name: str, names: str) -> Iterator[Turn]:
    for i in reversed(history(store, dialogue, "pair")):
        record = store.dialogues[i]
        yield from (named(record, turn, name, names) for turn in reversed(record.turns))
    for item in reversed(items(store, dialogue)):
        if item.record is None:
            yield from reversed(spoken(item, dialogue.responder, name, names))


def named(record: Dialogue, turn: Turn, name: str, names: str) -> Turn:
    """A turn of a record, its querier called by `name`, as far as `names` shows names; see `text.called`."""
    mine = turn.speaker == record.responder
    return Turn(called(turn.speaker, RESPONDER, names) if mine else called(name, QUERIER, names), turn.text)
