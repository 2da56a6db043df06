"""What stands before a dialogue: in each of its sequences, never learned, cut only where nothing else can be."""

from __future__ import annotations

import dataclasses
import types
from typing import Any

import numpy as np
import pytest
import untrained
from hypothesis import given, settings
from hypothesis import strategies as st
from test_text import CHATML, END, ID, LLAMA, NEWLINE, START, WORD, known_text, long_talk, replies_of

from qaperso import methods, reply
from qaperso.data.text import called, encode_dialogue, encode_prompt, template_of, turn_size
from qaperso.types import QUERIER, RESPONDER, TEMPLATE, Dialogue, Turn

some_turns = st.lists(st.builds(Turn, st.sampled_from(["ann", "bo", "user"]), known_text), max_size=3)
TALK = [Turn("ann", "hello"), Turn("bo", "you"), Turn("ann", "who are"), Turn("bo", ".")]


def spelled(turn: Turn) -> list[int]:
    return [START, ID[turn.speaker], NEWLINE, *(ID[word] for word in turn.text.split()), END, NEWLINE]


def test_preface_written_out() -> None:
    preface = [Turn("user", "hello you"), Turn("bo", "are")]
    (e,) = encode_dialogue(WORD, CHATML, TALK, "bo", length=99, preface=preface)
    told = [t for turn in preface for t in spelled(turn)]
    (plain,) = encode_dialogue(WORD, CHATML, TALK, "bo", length=99)
    assert e.tokens.tolist() == [*told, *plain.tokens.tolist()] and e.cut == 0
    n = len(told)
    # The responder's earlier words are no labels, and nobody's words to a model that looks for the responder's.
    assert set(e.role[:n].tolist()) == {TEMPLATE} and not e.predicted[:n].any()
    np.testing.assert_array_equal(e.role[n:], plain.role)
    np.testing.assert_array_equal(e.predicted[n:], plain.predicted)
    assert [turn_size(WORD, CHATML, turn) for turn in preface] == [len(spelled(turn)) for turn in preface] == [7, 6]


def test_the_beginning_of_a_sequence_stays_the_first_token() -> None:
    (e,) = encode_dialogue(LLAMA, template_of(LLAMA), TALK, "bo", length=99, preface=[Turn("user", "hello")])
    (plain,) = encode_dialogue(LLAMA, template_of(LLAMA), TALK, "bo", length=99)
    (alone,) = encode_dialogue(LLAMA, template_of(LLAMA), [Turn("user", "hello")], "user", length=99)
    assert e.tokens.tolist() == [*alone.tokens.tolist(), *plain.tokens.tolist()[1:]]


def test_cuts_written_out() -> None:
    """Turns of 6, 6, 7 and 6 tokens after a preface of 7 and 6."""
    preface = [Turn("user", "hello you"), Turn("bo", "are")]
    told = [t for turn in preface for t in spelled(turn)]
    (plain,) = encode_dialogue(WORD, CHATML, TALK, "bo", length=99)
    said = plain.tokens.tolist()

    def cut(length: int) -> tuple[list[int], int]:
        (e,) = encode_dialogue(WORD, CHATML, TALK, "bo", length=length, preface=preface)
        return e.tokens.tolist(), e.cut

    assert cut(38) == (told + said, 0)
    assert cut(37) == (told + said[6:], 6)
    assert cut(26) == (told + said[12:], 12)
    # Now the query and the reply alone are too long beside it: it loses its first words, then its first turn.
    assert cut(25) == ([*told[:3], *told[4:], *said[12:]], 13)
    assert cut(24) == (told[7:] + said[12:], 12 + 7)
    assert cut(19) == (told[7:] + said[12:], 12 + 7)
    assert cut(18) == (said[12:], 12 + 13)
    assert cut(13) == (said[12:], 12 + 13)
    assert encode_dialogue(WORD, CHATML, TALK, "bo", length=12, preface=preface) == []


@settings(max_examples=120, deadline=None)
@given(
    turns=long_talk,
    preface=some_turns,
    length=st.integers(10, 80),
    targets=st.integers(1, 30),
    context=st.integers(0, 4),
)
def test_a_preface_costs_old_turns_and_no_reply(
    turns: list[Turn], preface: list[Turn], length: int, targets: int, context: int
) -> None:
    replies = replies_of(turns)
    how = dict(length=length, targets=targets, replies=replies, context=context)
    plain = encode_dialogue(WORD, CHATML, turns, "bo", **how)
    found = encode_dialogue(WORD, CHATML, turns, "bo", preface=preface, **how)
    assert sum(e.replies for e in found) == sum(e.replies for e in plain)
    learned = [e.tokens[e.predicted].tolist() for e in plain]
    assert [t for e in found for t in e.tokens[e.predicted]] == [t for tokens in learned for t in tokens]
    (whole,) = encode_dialogue(WORD, CHATML, turns, "bo", length=10**6)
    told = [t for turn in preface for t in spelled(turn)]
    starts = np.cumsum([0, *(len(spelled(turn)) for turn in turns)]).tolist()
    for e in found:
        assert len(e.tokens) <= length
        tokens = e.tokens.tolist()
        if tokens[: len(told)] == told and _is_stretch(tokens[len(told) :], whole.tokens.tolist(), starts):
            continue
        # It was shortened, so what follows is one query and what it was answered.
        assert e.replies == 1
        first = int(np.flatnonzero(e.predicted)[0]) - 3
        assert tokens[first] == START
        asked = [i for i in replies if tokens[first:] == spelled(turns[i])]
        assert any(tokens[-len(body) :] == body for i in asked for body in [_asked(turns, i)])
        assert len(tokens) + max(turn_size(WORD, CHATML, turn) for turn in preface) > length


def _is_stretch(tokens: list[int], whole: list[int], starts: list[int]) -> bool:
    return any(tokens == whole[i : i + len(tokens)] for i in starts)


def _asked(turns: list[Turn], reply: int) -> list[int]:
    """The tokens from a reply's query to its end."""
    query = next((i for i in range(reply - 1, -1, -1) if turns[i].speaker == "ann"), reply)
    return [t for turn in turns[query : reply + 1] for t in spelled(turn)]


@settings(max_examples=60, deadline=None)
@given(turns=long_talk, preface=some_turns)
def test_the_prompt_is_the_dialogue_s_beginning(turns: list[Turn], preface: list[Turn]) -> None:
    (whole,) = encode_dialogue(WORD, CHATML, turns, "bo", length=10**6, preface=preface)
    prompt = encode_prompt(WORD, CHATML, turns[:-1], "bo", length=10**6, preface=preface)
    n = len(prompt.tokens)
    np.testing.assert_array_equal(prompt.tokens, whole.tokens[:n])
    np.testing.assert_array_equal(prompt.role, whole.role[:n])
    assert whole.predicted[n:].tolist() == [True] * (len(whole.tokens) - n - 1) + [False]


def test_names() -> None:
    assert [called("bo", RESPONDER, names) for names in ("visible", "responder", "masked")] == ["bo", "bo", "assistant"]
    assert [called("ann", QUERIER, names) for names in ("visible", "responder", "masked")] == ["ann", "user", "user"]
    (hidden,) = encode_dialogue(WORD, CHATML, TALK, "bo", length=99, names="responder")
    renamed = [Turn("user", t.text) if t.speaker == "ann" else t for t in TALK]
    (expected,) = encode_dialogue(WORD, CHATML, renamed, "bo", length=99)
    np.testing.assert_array_equal(hidden.tokens, expected.tokens)
    np.testing.assert_array_equal(hidden.predicted, expected.predicted)


@pytest.fixture(scope="module")
def opened() -> tuple[Any, list[Dialogue]]:
    """A run whose method tells each query what it was, and what it was given to see."""
    run, _, _ = untrained.opened(method="sft")
    seen: list[Dialogue] = []
    method = types.ModuleType("echo")
    method.__dict__.update(vars(methods.load("sft")))

    def preface(setting: Any, store: Any, dialogue: Dialogue, size: Any) -> list[Turn]:
        seen.append(dialogue)
        return [Turn("system", dialogue.query)]

    method.preface = preface
    return dataclasses.replace(run, method=method), seen


def long_dialogue() -> Dialogue:
    texts = ["is there any bread?", "aye", "well", "who sells bread?", "no", "is there any bread?", "aye"]
    turns = [
        Turn(who, text) for who, text in zip(["tilda", "maren", "maren"] + ["tilda", "maren"] * 2, texts, strict=True)
    ]
    return Dialogue("x", "maren", "tilda", tuple(turns), "g", replies=(1, 2, 4, 6))


def test_replies_that_see_the_same_preface_share_a_sequence(opened: tuple[Any, list[Dialogue]]) -> None:
    run, seen = opened
    seen.clear()
    d = long_dialogue()
    found = run.encode(d)
    assert [e.replies for e in found] == [2, 1, 1]
    parts = []
    for end, replies in ((2, [1, 2]), (4, [4]), (6, [6])):
        query = Turn("system", d.turns[3 if end == 4 else 0].text)
        turns = d.turns[: end + 1]
        how = dict(length=run.config.batch.length, replies=replies, preface=[query])
        parts += encode_dialogue(run.tokenizer, run.template, turns, "maren", **how)
    for e, expected in zip(found, parts, strict=True):
        np.testing.assert_array_equal(e.tokens, expected.tokens)
        np.testing.assert_array_equal(e.predicted, expected.predicted)
    # Nobody is shown the reply that is asked for, nor anything after it.
    assert [(len(s.turns), s.reply, s.replies) for s in seen] == [(n, "", ()) for n in (2, 3, 5, 7)]
    assert all(s.turns[:-1] == d.turns[: len(s.turns) - 1] and s.turns[-1].speaker == "maren" for s in seen)


def test_replies_are_asked_for_as_they_were_scored(opened: tuple[Any, list[Dialogue]]) -> None:
    run, seen = opened
    seen.clear()
    d = long_dialogue()
    prompt, last = reply.make_prompt(run, d), run.encode(d)[-1]
    assert seen[0] == seen[-1]
    np.testing.assert_array_equal(prompt.tokens, last.tokens[: len(prompt.tokens)])
    np.testing.assert_array_equal(prompt.role, last.role[: len(prompt.tokens)])


def test_no_preface_is_one_group_with_all_labels() -> None:
    run, _, _ = untrained.opened(method="sft")
    d = long_dialogue()
    for labels in ("reply", "all"):
        how = dict(length=run.config.batch.length, targets=run.config.batch.targets, context=run.config.data.context)
        expected = encode_dialogue(
            run.tokenizer, run.template, d.turns, "maren", replies=d.replies, labels=labels, **how
        )
        for ours, theirs in zip(run.encode(d, labels), expected, strict=True):
            for name in ("tokens", "role", "predicted"):
                np.testing.assert_array_equal(getattr(ours, name), getattr(theirs, name))
            assert (ours.cut, ours.replies) == (theirs.cut, theirs.replies)
