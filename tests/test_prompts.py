"""Baselines that train nothing: what they put before a dialogue, by hand, and their runs from command to reply."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import helpers
import numpy as np
import pytest
import untrained
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import TINY, arguments, call, contents, one_device, record, trained  # noqa: F401

from qaperso import arrays, chat, checkpoint, evaluate, methods, reply, run, train
from qaperso import config as configs
from qaperso.data import load
from qaperso.data.store import Store, make_store
from qaperso.data.text import turn_size
from qaperso.errors import UserError
from qaperso.eval import awareness, scores
from qaperso.methods import Setting, prompts
from qaperso.models.config import DecoderConfig
from qaperso.types import Dialogue, Turn

KINDS = configs.CHOICES["prompts.kind"]
FOLDER = Path(__file__).resolve().parent.parent / "configs"
SMOLLM2 = DecoderConfig(vocab=49152, embed=576, layers=30, heads=9, kv_heads=3, head_dim=64, mlp=1536, tied=True)


def size(turn: Turn) -> int:
    """A token a word, and three for the turn."""
    return 3 + len(turn.text.split())


def talk(name: str, querier: str, query: str, reply: str, responder: str = "cy", split: str = "train") -> Dialogue:
    return Dialogue(name, responder, querier, (Turn(querier, query), Turn(responder, reply)), name, split=split)


def store_of(dialogues: Sequence[Dialogue]) -> Store:
    return make_store(dialogues, np.zeros(len(dialogues), np.int32))


def preface(store: Store | None, dialogue: Dialogue, kind: str, names: str = "visible", **changes: int) -> list[Turn]:
    config = configs.default()
    config.data.names = names
    config.prompts.update(kind=kind, **changes)
    return list(prompts.preface(Setting(config, helpers.model(), 3, 1, {}), store, dialogue, dialogue.querier, size))


ANN = [
    talk("a0", "ann", "where is the bread", "on the shelf"),
    talk("a1", "ann", "bread bread and salt", "take it"),
    talk("a2", "ann", "who goes there", "nobody"),
]
STORE = store_of(
    [
        *ANN,
        talk("b0", "bo", "bread please bread", "never", split="train"),
        talk("b1", "bo", "please", "please yourself"),
        talk("a3", "ann", "bread please", "a secret", split="dev"),
        talk("e0", "eve", "is it dark", "it is", responder="dee"),
    ]
)
ASKED = STORE.dialogues[5]


def test_bm25_by_hand(caplog: pytest.LogCaptureFixture) -> None:
    """Three texts of 4, 4 and 3 words; "bread" is in two of them, "please" in none."""
    idf = math.log(1 + (3 - 2 + 0.5) / (2 + 0.5))
    norm = 1.5 * (0.25 + 0.75 * 4 / (11 / 3))
    expected = [idf * 1 / (1 + norm), idf * 2 / (2 + norm), 0]
    np.testing.assert_allclose(expected, [0.18061, 0.26095, 0], atol=1e-5)
    texts = tuple(d.query for d in ANN)
    np.testing.assert_allclose(prompts.bm25(texts, "Bread, please!"), expected, rtol=1e-6)
    for query in ("", "?!", "please"):
        np.testing.assert_array_equal(prompts.bm25(texts, query), [0, 0, 0])
    np.testing.assert_array_equal(prompts.bm25(("", "..."), "bread"), [0, 0])
    assert not caplog.records  # a line for each index would go to the user


def test_retrieved_examples_by_hand() -> None:
    shelf, salt, nobody = (list(d.turns) for d in ANN)
    assert preface(STORE, ASKED, "retrieved", examples=1) == salt
    assert preface(STORE, ASKED, "retrieved", examples=2) == [*shelf, *salt]
    # More than there are: the one with no word in common comes first.
    assert preface(STORE, ASKED, "retrieved", examples=9) == [*nobody, *shelf, *salt]
    # What does not fit leaves its room to what does.
    assert [sum(map(size, d.turns)) for d in ANN] == [13, 12, 10]
    assert preface(STORE, ASKED, "retrieved", examples=9, tokens=24) == [*nobody, *salt]
    assert preface(STORE, ASKED, "retrieved", tokens=9) == []
    # With no word in common the most recent ones are taken.
    other = dataclasses.replace(ASKED, turns=(Turn("ann", "hush"), ASKED.turns[1]))
    assert preface(STORE, other, "retrieved", examples=2) == [*salt, *nobody]


def test_nothing_is_retrieved_twice() -> None:
    store = store_of([*ANN, dataclasses.replace(ANN[0], id="again", group="again")])
    found = preface(store, ASKED, "retrieved", examples=9)
    assert len(found) == 6 and {t.text for t in found} == {t.text for d in ANN for t in d.turns}


def test_what_the_querier_asked_others_stands_in_for_the_pair() -> None:
    stranger = dataclasses.replace(ASKED, responder="dee", turns=(ASKED.turns[0], Turn("dee", "")))
    assert preface(STORE, stranger, "retrieved", examples=1) == list(ANN[1].turns)
    assert preface(STORE, stranger, "history") == preface(STORE, stranger, "querier") == []
    hidden = preface(STORE, stranger, "retrieved", "masked", examples=1)
    assert [(t.speaker, t.text) for t in hidden] == [("user", "bread bread and salt"), ("assistant", "take it")]


def test_the_profile_of_a_benchmark_is_a_history_too() -> None:
    """As LaMP has it: every question is a user of its own, and its input has an instruction before the query."""
    given = [
        {"query": "old salt", "reply": "buy it", "time": 5.0},
        {"query": "", "reply": "a word on bread", "time": 7.0},
        {"query": "dark bread", "reply": "too late", "time": 30.0},
        {"query": "", "reply": ""},
    ]
    turns = (Turn("zoe", "old words for the title: bread"), Turn("LaMP", "?"))
    d = Dialogue("z", "LaMP", "zoe", turns, "z", time=20.0, split="dev", fields={"history": given, "query": "bread"})
    store = store_of([*ANN, d])
    salt = [Turn("zoe", "old salt"), Turn("LaMP", "buy it")]
    # Compared without the instruction, of which the first item has a word; what came later is not shown.
    assert preface(store, d, "retrieved", examples=1) == [Turn("LaMP", "a word on bread")]
    assert preface(store, d, "retrieved", examples=9) == [*salt, Turn("LaMP", "a word on bread")]
    assert preface(store, d, "history") == [*salt, Turn("LaMP", "a word on bread")]
    assert preface(store, d, "history", tokens=size(salt[1]) + 7) == [salt[1], Turn("LaMP", "a word on bread")]
    assert preface(store, d, "history", "masked")[0] == Turn("user", "old salt")
    # What the pair said in training is newer than the profile; somebody else's question is not about it.
    known = dataclasses.replace(ANN[0], fields={"history": given[:1]})
    other = store_of([known, *ANN[1:]])
    assert preface(other, ASKED, "history")[:4] == [Turn("ann", "old salt"), Turn("cy", "buy it"), *ANN[0].turns]
    assert preface(store, dataclasses.replace(d, querier="eve"), "retrieved") == []


def test_history_is_the_end_of_what_was_said() -> None:
    said = [turn for d in ANN for turn in d.turns]
    assert preface(STORE, ASKED, "history") == said
    assert preface(STORE, ASKED, "history", tokens=sum(map(size, said))) == said
    assert preface(STORE, ASKED, "history", tokens=sum(map(size, said)) - 1) == said[1:]
    assert preface(STORE, ASKED, "history", tokens=4) == said[-1:]
    assert preface(STORE, ASKED, "history", tokens=3) == []
    assert {t.speaker for t in preface(STORE, ASKED, "history", "responder")} == {"user", "cy"}


def test_profile_of_a_querier() -> None:
    (turn,) = preface(STORE, ASKED, "querier", examples=2)
    assert turn.speaker == "system"
    lines = turn.text.split("\n")
    assert lines[0] == "You are cy, talking to ann. Conversations with ann so far: 3."
    # Of ann's words bo says "bread", too; what she says once comes in the order of the alphabet.
    assert lines[1] == "Words typical of ann: and, goes, is, salt, the, there, where, who."
    assert all(line.startswith("To ann you typically reply: ") for line in lines[2:]) and len(lines) == 4
    (hidden,) = preface(STORE, ASKED, "querier", "masked", examples=1)
    assert "ann" not in hidden.text
    assert hidden.text.split("\n")[0] == "You are assistant, talking to user. Conversations with user so far: 3."


def test_profile_of_a_responder() -> None:
    (turn,) = preface(STORE, ASKED, "responder", examples=1)
    lines = turn.text.split("\n")
    assert lines[0] == "You are cy. Conversations so far: 5; people: 2."
    assert lines[1] == "Most often with ann (3), bo (2)."
    # Ann says "the", and bo "please".
    assert lines[2] == "Words typical of cy: it, never, nobody, on, shelf, take, yourself, please, the."
    assert lines[3].startswith("You typically reply: ") and len(lines) == 4
    (hidden,) = preface(STORE, ASKED, "responder", "masked", examples=1)
    assert not {"ann", "bo", "cy"} & set(hidden.text.replace("(", " ").split())
    # It is the same whoever asks.
    assert preface(STORE, dataclasses.replace(ASKED, querier="bo"), "responder", examples=1) == [turn]


def test_a_profile_keeps_the_lines_that_fit() -> None:
    (whole,) = preface(STORE, ASKED, "querier", examples=2)
    assert preface(STORE, ASKED, "querier", examples=2, tokens=size(whole)) == [whole]
    lines = whole.text.split("\n")
    (short,) = preface(STORE, ASKED, "querier", examples=2, tokens=size(whole) - 1)
    assert short.text == "\n".join(lines[:3])
    two = "\n".join([lines[0], lines[2]])
    assert len(lines[2].split()) < len(lines[1].split())
    assert preface(STORE, ASKED, "querier", examples=2, tokens=size(Turn("", two))) == [Turn("system", two)]
    assert preface(STORE, ASKED, "querier", tokens=5) == []


def test_characteristic_words_by_hand() -> None:
    """ "oh" 3 ln(3/2) = 1.216, "my" 1 ln 3 = 1.099, "so" 1 ln(3/2); all three say "you"."""
    others = [["you oh", "so"], ["you"]]
    own = ["Oh, oh you!", "oh my you", "so you"]
    assert prompts.characteristic(own, others, 9) == ["oh", "my", "so"]
    assert prompts.characteristic(own, others, 1) == ["oh"]
    assert prompts.characteristic(own, [], 9) == prompts.characteristic([], others, 9) == []


def test_typical_replies_are_near_the_centroid() -> None:
    replies = ["aye", "aye  my\nlord", "no", "...", "aye", "aye my lord"]
    assert prompts.typical(replies, 9)[-1] == "no"
    assert sorted(prompts.typical(replies, 9)) == ["aye", "aye my lord", "no"]
    assert prompts.typical(replies, 1) == prompts.typical(replies, 9)[:1]
    assert prompts.typical(["one thing"], 3) == ["one thing"]
    assert prompts.typical(["...", ""], 3) == prompts.typical([], 3) == []


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_known_is_nothing_said(kind: str) -> None:
    """A querier nobody has met (of the unseen split, or new in a chat), with a responder nobody has met."""
    nobody = talk("z", "zoe", "bread please", "?", responder="kim", split="unseen")
    assert preface(STORE, nobody, kind) == []
    known = dataclasses.replace(nobody, responder="cy")
    assert bool(preface(STORE, known, kind)) == (kind == "responder")


@pytest.mark.parametrize("kind", KINDS[1:])
def test_one_item(kind: str) -> None:
    store = store_of([talk("a", "ann", "well", "aye")])
    found = preface(store, ASKED, kind)
    if kind in ("retrieved", "history"):
        assert found == [Turn("ann", "well"), Turn("cy", "aye")]
    else:
        assert found[0].text.split("\n")[0].endswith("1; people: 1." if kind == "responder" else "ann so far: 1.")
        assert "typically reply: aye" in found[0].text
    # Its own history is empty.
    assert preface(store, store.dialogues[0], kind) == []


words = st.lists(st.sampled_from("abcdef"), min_size=1, max_size=4)
spoken = st.lists(
    st.tuples(st.sampled_from(["ann", "bo", "eve"]), st.sampled_from(["cy", "dee"]), words, words),
    min_size=4,
    max_size=12,
)


@settings(max_examples=60, deadline=None)
@given(spoken, st.sampled_from(["querier", "retrieved", "history"]), st.booleans())
def test_the_wrong_querier_s_history_never_appears(said: list[tuple], kind: str, training: bool) -> None:
    """Every word is marked with whose dialogue it is from."""
    dialogues = [
        talk(f"d{i}", q, *(" ".join(f"{w}{q}{i}" for w in part) for part in texts), responder=r)
        for i, (q, r, *texts) in enumerate(said)
    ]
    store = store_of(dialogues)
    for i, d in enumerate(dialogues):
        asked = d if training else dataclasses.replace(d, id="new", group="new")
        told = " ".join(turn.text for turn in preface(store, asked, kind, tokens=1000))
        owners = {int(k) for k in re.findall(r"[a-f](?:ann|bo|eve)(\d+)", told)}
        assert {dialogues[k].querier for k in owners} <= {d.querier}
        assert not training or i not in owners


@pytest.mark.parametrize("kind", KINDS)
def test_swapping_the_querier_swaps_the_preface(kind: str) -> None:
    opened, store, trainable = untrained.opened(method="prompts", prompts__kind=kind, prompts__tokens=60)
    assert trainable == {} and opened.store is store
    d = store.dialogues[store.split("dev")[0]]
    other = awareness.rename(d, awareness.others(store, [d], 0)[0])
    assert (opened.preface(d) == opened.preface(other)) == (kind in ("zero_shot", "responder"))
    assert bool(opened.preface(d)) == (kind != "zero_shot")
    # A history can be told under another's name, which is then all that changes.
    known = {d.querier: other.querier}
    moved = [Turn(known.get(t.speaker, t.speaker), t.text) for t in opened.preface(d, name=d.querier)]
    told = [Turn(t.speaker, t.text.replace(d.querier, other.querier)) for t in moved]
    assert list(opened.preface(d, name=other.querier)) == (moved if kind == "responder" else told)
    theirs = next(x for x in store.dialogues if x.querier == other.querier and x.split == "dev")
    if kind in ("querier", "history"):
        assert opened.preface(other) == opened.preface(theirs)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "zero_shot"])
def test_every_kind_shows_the_same_turns(kind: str) -> None:
    """A reply sees what it sees in zero-shot, and is asked for after the same turns, whatever stands before them."""
    bare, store, _ = untrained.opened(method="prompts", batch__length=90)
    told, _, _ = untrained.opened(method="prompts", prompts__kind=kind, prompts__tokens=60, batch__length=150)
    querier = store.dialogues[store.split("dev")[0]].querier
    said = ("is there any bread ?", "aye", "who sells bread ?", "nobody that i know of", "why ?", "aye aye aye")
    turns = tuple(Turn(("maren" if i % 2 else querier), text) for i, text in enumerate(4 * said))
    d = Dialogue("x", "maren", querier, turns, "g", replies=(*range(1, len(turns), 2),), split="dev")

    def before(opened: run.Run) -> list[int]:
        """How many tokens stand before the turns of each reply."""
        how = opened.tokenizer, opened.template
        return [sum(turn_size(*how, turn) for turn in opened.preface(d, i)) for i in d.replies]

    def shown(opened: run.Run) -> list[list[int]]:
        """The turns that each reply sees, up to its own end."""
        found = [
            (e.tokens, int(end) + 1)
            for e in opened.encode(d)
            for end in np.flatnonzero(e.predicted & ~np.append(e.predicted[1:], False))
        ]
        return [tokens[n:end].tolist() for n, (tokens, end) in zip(before(opened), found, strict=True)]

    assert len(bare.encode(d)) > 1 and not any(before(bare)) and all(before(told))
    assert shown(told) == shown(bare)
    asked, plain = (reply.make_prompt(opened, d).tokens.tolist() for opened in (told, bare))
    assert asked[before(told)[-1] :] == plain


def test_zero_shot_is_the_base() -> None:
    """What plain LoRA scores before its first step."""
    opened, store, trainable = untrained.opened(method="prompts")
    lora, _, _ = untrained.opened(method="sft")
    fresh = helpers.drawn(run.declare(lora)[0], 2)
    ours = scores.reply_nll(opened, trainable, opened.examples(store, "dev")[0])
    theirs = scores.reply_nll(lora, fresh, lora.examples(store, "dev")[0])
    np.testing.assert_array_equal(ours[1], theirs[1])
    np.testing.assert_allclose(ours[0], theirs[0], rtol=1e-6)
    assert ours[1].sum() > 0


@pytest.mark.usefixtures("one_device")
def test_from_command_to_reply(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "run"
    how = ("method=prompts", "prompts.kind=retrieved", "prompts.tokens=60")
    out = trained(TINY, folder, *how)
    assert re.fullmatch(r"final step=0 loss=nan params=sha256:[0-9a-f]{64}\n", out)
    (dev,) = checkpoint.steps(folder / "checkpoints").items()
    (first,) = record(folder)
    assert dev == (0, first["dev_nll"]) and first["step"] == 0 and math.isfinite(first["dev_nll"])
    before = contents(folder)
    assert trained(TINY, folder, *how) == out and contents(folder) == before
    code, _, err = call(train.main, *arguments(TINY, folder, "method=prompts", "prompts.kind=history", *how[2:]))
    assert code == 2 and "prompts.kind: 'retrieved' -> 'history'" in err

    opened = run.open_run(folder)
    trainable, _, step = run.restore(opened)
    assert (trainable, step) == ({}, 0)
    dialogues = [opened.store.dialogues[i] for i in opened.store.split("dev")[:4]]
    made, _ = run.new_run(opened.config, folder)
    assert [opened.preface(d) for d in dialogues] == [made.preface(d) for d in dialogues] != [()] * 4

    code, _, err = call(evaluate.main, "--workdir", folder, "--split", "dev", "--replies", "2")
    assert code == 0, err
    found = json.loads((folder / "eval_dev.json").read_text(encoding="utf-8"))
    assert found["step"] == 0 and 0 <= found["metrics"]["rouge_l"]["value"] <= 1
    querier = opened.registry.queriers[0]
    code, out, _ = call(chat.main, "--workdir", folder, "--once", "Are you open?", "--querier", querier, "stranger")
    assert code == 0 and querier in out

    # Its data is gone, or is not what it was.
    whole = load.load_store(opened.config.data)
    fewer = [d for d in whole.dialogues if d.querier != querier]
    monkeypatch.setattr(load, "load_store", lambda data: store_of(fewer))
    with pytest.raises(UserError, match=r"reads the history of its data, which has changed .*\(registry\)"):
        run.open_run(folder)

    def gone(data: Any) -> Store:
        raise UserError("'data' is no prepared data set")

    monkeypatch.setattr(load, "load_store", gone)
    with pytest.raises(UserError, match=r"config\.method='prompts' reads the history of its data: 'data' is no prep"):
        run.open_run(folder)


@pytest.mark.usefixtures("one_device")
def test_zero_shot_needs_no_data_to_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trained(TINY, tmp_path / "run", "method=prompts", "dev_dialogues=2")
    monkeypatch.setattr(load, "load_store", lambda data: pytest.fail("it was read"))
    assert run.open_run(tmp_path / "run").store is None


@pytest.mark.parametrize("override", ["trainable=all", "compat=paper"])
def test_what_prompts_cannot_be(tmp_path: Path, override: str) -> None:
    with pytest.raises(UserError, match=r"config\.method='prompts' needs compat='' and trainable='adapters'"):
        configs.load(TINY, ["method=prompts", override])


def test_shipped_configs() -> None:
    kinds = {"zero_shot": "zero_shot", "rpg": "responder", "qcg": "querier", "rag": "retrieved", "history": "history"}
    qar = configs.load(FOLDER / "qar_smollm2.py")
    for name, kind in kinds.items():
        config = configs.load(FOLDER / f"{name}_smollm2.py")
        assert (config.method, config.prompts.kind, config.base) == ("prompts", kind, qar.base)
        # The dialogue itself has the room that it has under every other method.
        assert config.batch.length == qar.batch.length + (kind != "zero_shot") * config.prompts.tokens
        assert config.batch.targets == qar.batch.targets


def declared(name: str) -> int:
    """Trainable values of a config on the data of docs/results.md: 72 queriers and two clusters."""
    config = configs.load(FOLDER / f"{name}.py")
    setting = Setting(config, SMOLLM2, 1 + 72 + config.data.spare_rows, 2, {"cluster": np.zeros(60, np.int32)})
    trainable, _ = methods.load(config.method).declare(setting)
    return sum(math.prod(spec.shape) for spec in arrays.flat(trainable, arrays.is_spec).values())


@pytest.mark.parametrize("name", ["sft_matched_smollm2", "sft_hidden_smollm2", "sft_rows_smollm2"])
def test_as_many_trainable_values_as_qar(name: str) -> None:
    assert declared("qar_smollm2") == 5_907_712
    assert declared(name) == pytest.approx(declared("qar_smollm2"), rel=0.02)
    assert declared("sft_smollm2") < 0.85 * declared("qar_smollm2")
    # The step is as large: the scale alpha / rank is the same.
    config, qar = (configs.load(FOLDER / f"{n}.py") for n in (name, "qar_smollm2"))
    assert config.lora.alpha / config.lora.rank == qar.lora.alpha / qar.lora.rank
