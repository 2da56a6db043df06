"""From questions to replies: the prompt is what training saw, and batches, order and streaming change nothing."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import untrained

from qaperso import batching, generate, reply
from qaperso.batching import Model
from qaperso.errors import UserError
from qaperso.generate import Sampling
from qaperso.models import tokenizer as tokenizers
from qaperso.types import Dialogue, Turn

SHORT = Sampling(new_tokens=8)
DRAWN = Sampling(new_tokens=8, temperature=1.2, top_p=0.95, seed=4)


@pytest.fixture(scope="module")
def qar() -> tuple[Model, Any]:
    run, store, trainable = untrained.opened(method="qar", qar__contrast="none")
    return batching.prepare(run, trainable), store


def some(store: Any, count: int) -> tuple[list[Dialogue], list[int]]:
    """Dialogues of many lengths and queriers, with their rows; none is so long that it needs shapes of its own."""
    short = [i for i, d in enumerate(store.dialogues) if sum(len(t.text.split()) for t in d.turns[:-1]) < 15]
    chosen = np.array(short)[np.linspace(0, len(short) - 1, count).round().astype(int)]
    return [store.dialogues[i] for i in chosen], store.row[chosen].tolist()


@pytest.mark.parametrize("names", ["visible", "masked"])
def test_the_prompt_is_what_training_saw(names: str) -> None:
    run, store, _ = untrained.opened(method="qar", qar__contrast="none")
    run = untrained.changed(run, data__names=names)
    turns = set()
    for dialogue in store.dialogues[::15]:
        prompt, (whole,) = reply.make_prompt(run, dialogue), run.encode(dialogue)
        n = len(prompt.tokens)
        np.testing.assert_array_equal(prompt.tokens, whole.tokens[:n])
        np.testing.assert_array_equal(prompt.role, whole.role[:n])
        # What follows is the reply, its end-of-turn, and a newline that nothing is to be learned from.
        assert whole.predicted[n:].tolist() == [True] * (len(whole.tokens) - n - 1) + [False]
        assert reply.decode(run, whole.tokens[n:].tolist()) == dialogue.reply
        turns.add(len(dialogue.turns))
    assert turns == {2, 4}


def test_the_paper_s_prompt_is_what_its_training_saw() -> None:
    run, store, trainable = untrained.opened(
        method="qar", compat="paper", qar__contrast="prototypes", batch__dialogues=1
    )
    dialogues, rows = some(store, 12)
    prompts = [reply.make_prompt(run, d) for d in dialogues]
    for prompt, dialogue in zip(prompts, dialogues, strict=True):
        np.testing.assert_array_equal(prompt.tokens, run.encode(dialogue)[0].tokens[: len(prompt.tokens)])
    inputs = batching.request(batching.prepare(run, trainable), prompts, rows, [SHORT] * len(rows)).inputs
    length = inputs.tokens.shape[1]
    for r, prompt in enumerate(prompts):
        attend, n = prompt.tokens != run.setting.model.eos_ids[0], len(prompt.tokens)
        assert not attend.all()
        np.testing.assert_array_equal(inputs.attend[r], np.pad(attend, (0, length - n)))
        np.testing.assert_array_equal(inputs.position[r, :n], np.where(attend, np.cumsum(attend) - 1, 1))
    long = reply.question(run, (), "tilda", "bread " * 130, "maren")
    with pytest.raises(UserError, match=r"batch\.length=128"):
        reply.make_prompt(run, long)


def test_a_query_that_fits_no_row(qar: tuple[Model, Any]) -> None:
    run = qar[0].run
    short = [Turn("tilda", "bread " * 40), Turn("maren", "bread " * 40)]
    fits = reply.make_prompt(run, reply.question(run, short, "tilda", "is there any bread?", "maren"))
    assert len(fits.tokens) <= run.config.batch.length and not fits.cut
    cut = reply.make_prompt(run, reply.question(run, short, "tilda", "bread " * 60, "maren"))
    assert len(cut.tokens) <= run.config.batch.length and cut.cut
    with pytest.raises(UserError) as error:
        reply.make_prompt(run, reply.question(run, short, "tilda", "bread " * 130, "maren"))
    assert str(error.value).startswith("a query is longer than batch.length=128 tokens: 'bread bread")
    assert "shorten" in str(error.value) and "\n" not in str(error.value)


def test_replies_do_not_depend_on_batches_or_order(qar: tuple[Model, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    model, store = qar
    dialogues, rows = some(store, 7)
    how = [SHORT, DRAWN, SHORT, dataclasses.replace(DRAWN, seed=5), DRAWN, SHORT, SHORT]
    each = zip(dialogues, rows, how, strict=True)
    found = [reply.replies(model, [d], [row], [one])[0] for d, row, one in each]
    assert len(set(found)) == len(found) and all(found)
    assert len({len(reply.make_prompt(model.run, d).tokens) for d in dialogues}) > 3
    drawn = []
    advance = generate.advance

    def counted(weights: Any, slots: Any, *rest: Any, **fixed: Any) -> Any:
        drawn.append(slots.token.shape[0])
        return advance(weights, slots, *rest, **fixed)

    monkeypatch.setattr(generate, "advance", counted)
    assert reply.replies(model, dialogues[::-1], rows[::-1], how[::-1], batch=2) == found[::-1]
    assert set(drawn) == {2}
    # The row that is asked for counts, not the one that the data gives.
    assert reply.replies(model, dialogues[:1], [0], [SHORT]) != found[:1]


@pytest.mark.parametrize("sampling", [SHORT, DRAWN])
def test_pieces_of_a_stream_make_up_the_reply(qar: tuple[Model, Any], sampling: Sampling) -> None:
    model, store = qar
    (dialogue,), (row,) = some(store, 1)
    pieces = list(reply.stream(model, dialogue, row, sampling))
    assert len(pieces) > 2
    assert ["".join(pieces)] == reply.replies(model, [dialogue], [row], [sampling])


def test_a_stream_holds_back_half_a_character(qar: tuple[Model, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    heard = iter(["a", "a\ufffd", "aé", "aé\ufffd", "aé\ufffd", "aé!", "aé!", "aé!\ufffd"])
    monkeypatch.setattr(reply, "decode", lambda *_: next(heard))
    pieces = reply.Pieces(qar[0].run)
    # What is left when all tokens are drawn is given out as it is.
    assert [pieces.add([0], i == 7) for i in range(8)] == ["a", "", "é", "", "", "!", "", "\ufffd"]


def test_decode_leaves_markers_and_outer_blanks_out(qar: tuple[Model, Any]) -> None:
    run = qar[0].run
    words = tokenizers.word_tokenizer(["good day, tilda"])
    spoken = dataclasses.replace(run, tokenizer=words)
    tokens = words.encode("\ngood day, tilda.\n<|im_end|>", add_special_tokens=False)
    assert reply.decode(spoken, tokens) == "good day, tilda"
    assert reply.decode(spoken, []) == ""


def test_question_waits_for_the_responder(qar: tuple[Model, Any]) -> None:
    history = (Turn("tilda", "good day"), Turn("maren", "ahoy"))
    asked = reply.question(qar[0].run, history, "tilda", "any bread?", "maren")
    assert asked.turns == (*history, Turn("tilda", "any bread?"), Turn("maren", ""))
    assert (asked.query, asked.reply, asked.querier, asked.responder) == ("any bread?", "", "tilda", "maren")


def test_replies_that_stream_at_one_time_are_those_that_are_whole(qar: tuple[Model, Any]) -> None:
    model, store = qar
    dialogues, rows = some(store, 2)
    how = [SHORT, DRAWN]
    pieces = list(reply.streams(model, dialogues, rows, how))
    said = ["".join(piece for i, piece in pieces if i == which) for which in range(2)]
    assert said == reply.replies(model, dialogues, rows, how)
    # They take turns: the first is not over when the last begins.
    order = [i for i, _ in pieces]
    assert order.index(1) < len(order) - 1 - order[::-1].index(0)


def test_answers_are_what_each_is_told(qar: tuple[Model, Any]) -> None:
    model, _ = qar
    names = (*model.run.registry.queriers[:2], "stranger")
    found = reply.answers(model, "is there any bread?", names, "maren", SHORT)
    assert list(found) == list(names) and len(set(found.values())) == 3
    asked = reply.question(model.run, [], names[1], "is there any bread?", "maren")
    assert [found[names[1]]] == reply.replies(model, [asked], [2], [SHORT])
    # As the run has it, where nothing is said.
    short = dataclasses.replace(model, run=untrained.changed(model.run, generate__max_new_tokens=8))
    assert reply.answers(short, "is there any bread?", names, "maren") == found
    with pytest.raises(UserError, match="querier 'nobody' is not known"):
        reply.answers(model, "is there any bread?", ["nobody"], "maren", SHORT)
