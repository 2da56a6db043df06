"""What stands before a dialogue: in each of its sequences, never learned, and no reason to show fewer or more of its turns."""

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
from qaperso.data.text import Front, called, encode_dialogue, encode_prompt, template_of, turn_size
from qaperso.types import QUERIER, RESPONDER, TEMPLATE, Dialogue, Turn

some_turns = st.lists(st.builds(Turn, st.sampled_from(["ann", "bo", "user"]), known_text), max_size=3)
# What the method of `opened` may put before a dialogue.
TOLD = 20
TALK = [Turn("ann", "hello"), Turn("bo", "you"), Turn("ann", "who are"), Turn("bo", ".")]


def spelled(turn: Turn) -> list[int]:
    return [START, ID[turn.speaker], NEWLINE, *(ID[word] for word in turn.text.split()), END, NEWLINE]


def test_preface_written_out() -> None:
    preface = [Turn("user", "hello you"), Turn("bo", "are")]
    (e,) = encode_dialogue(WORD, CHATML, TALK, "bo", length=99, fronts=[Front(tuple(preface))])
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
    front = Front((Turn("user", "hello"),))
    (e,) = encode_dialogue(LLAMA, template_of(LLAMA), TALK, "bo", length=99, fronts=[front])
    (plain,) = encode_dialogue(LLAMA, template_of(LLAMA), TALK, "bo", length=99)
    (alone,) = encode_dialogue(LLAMA, template_of(LLAMA), [Turn("user", "hello")], "user", length=99)
    assert e.tokens.tolist() == [*alone.tokens.tolist(), *plain.tokens.tolist()[1:]]


def test_old_turns_go_as_they_would_without_a_preface() -> None:
    """Turns of 6, 6, 7 and 6 tokens after a preface of 7 and 6, which takes none of their room."""
    front = Front((Turn("user", "hello you"), Turn("bo", "are")))
    told = [t for turn in front.preface for t in spelled(turn)]
    (plain,) = encode_dialogue(WORD, CHATML, TALK, "bo", length=99)
    said = plain.tokens.tolist()

    def cut(length: int) -> tuple[list[int], int]:
        (e,) = encode_dialogue(WORD, CHATML, TALK, "bo", length=length, fronts=[front])
        return e.tokens.tolist(), e.cut

    assert cut(25) == (told + said, 0)
    assert cut(24) == (told + said[6:], 6)
    assert cut(13) == (told + said[12:], 12)
    assert encode_dialogue(WORD, CHATML, TALK, "bo", length=12, fronts=[front]) == []


@settings(max_examples=120, deadline=None)
@given(
    turns=long_talk,
    prefaces=st.lists(some_turns.map(tuple), min_size=1, max_size=3),
    places=st.integers(0, 2),
    length=st.integers(10, 80),
    targets=st.integers(1, 30),
    context=st.integers(0, 4),
)
def test_replies_see_the_same_turns_whatever_stands_before_them(
    turns: list[Turn], prefaces: list[tuple[Turn, ...]], places: int, length: int, targets: int, context: int
) -> None:
    replies = replies_of(turns)
    # Two replies alike, the next two with another preface.
    which = [k // 2 % len(prefaces) for k in range(len(replies))]
    fronts = [Front(prefaces[w], places, {"which": np.int32(w)}) for w in which]
    how = dict(length=length, targets=targets, replies=replies, context=context)
    plain = encode_dialogue(WORD, CHATML, turns, "bo", **how)
    found = encode_dialogue(WORD, CHATML, turns, "bo", fronts=fronts, **how)
    assert sum(e.cut for e in found) == sum(e.cut for e in plain)
    parts = iter(found)
    for shared in plain:
        # The sequences that it has become show its turns from the first on, and predict its labels one after the other.
        left, predicted = shared.replies, np.zeros(len(shared.tokens), bool)
        while left:
            e = next(parts)
            told = [0] * places + [t for turn in prefaces[e.columns["which"]] for t in spelled(turn)]
            n = len(told)
            own = len(e.tokens) - n
            assert e.tokens[:n].tolist() == told
            assert own <= length and set(e.role[:n].tolist()) <= {TEMPLATE} and not e.predicted[:n].any()
            np.testing.assert_array_equal(e.tokens[n:], shared.tokens[:own])
            np.testing.assert_array_equal(e.role[n:], shared.role[:own])
            assert not (predicted[:own] & e.predicted[n:]).any()
            predicted[:own] |= e.predicted[n:]
            left -= e.replies
        np.testing.assert_array_equal(predicted, shared.predicted)
        assert left == 0
    assert next(parts, None) is None


@settings(max_examples=60, deadline=None)
@given(turns=long_talk, preface=some_turns)
def test_the_prompt_is_the_dialogue_s_beginning(turns: list[Turn], preface: list[Turn]) -> None:
    front = Front(tuple(preface))
    (whole,) = encode_dialogue(WORD, CHATML, turns, "bo", length=10**6, fronts=[front])
    prompt = encode_prompt(WORD, CHATML, turns[:-1], "bo", length=10**6, front=front)
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

    def preface(setting: Any, store: Any, dialogue: Dialogue, name: str, size: Any) -> list[Turn]:
        seen.append(dialogue)
        return [Turn("system", dialogue.query)]

    method.preface, method.preface_tokens = preface, lambda setting: TOLD
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
    assert run.room == run.config.batch.length - TOLD
    for e, end, replies in zip(found, (2, 4, 6), ([1, 2], [4], [6]), strict=True):
        fronts = [Front((Turn("system", d.turns[3 if end == 4 else 0].text),))] * len(replies)
        (expected,) = encode_dialogue(
            run.tokenizer, run.template, d.turns[: end + 1], "maren", length=run.room, replies=replies, fronts=fronts
        )
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
