"""DPL's stages by hand: what is asked of whom, what comes of it, and what can never be looked at."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Sequence
from pathlib import Path

import helpers
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qaperso import config as configs
from qaperso.data.store import Store, make_store
from qaperso.endpoint import Messages
from qaperso.errors import UserError
from qaperso.methods import Setting, dpl
from qaperso.notes import Notes
from qaperso.types import Dialogue, Turn

FIELDS = '{"writing": "shorter", "emotional": "colder", "semantic": "none"}'


def size(turn: Turn) -> int:
    """A token a word, and three for the turn."""
    return 3 + len(turn.text.split())


def review(
    user: str, item: str, text: str, time: float | None = None, split: str = "train", **more: object
) -> Dialogue:
    turns = Turn(user, f"review {item}"), Turn("reviewer", text)
    fields = {"item": item, "description": f"a {item} indeed", **more}
    return Dialogue(f"{user}/{item}", "reviewer", user, turns, f"{user}/{item}", time, split, fields=fields)


def talk(name: str, querier: str, query: str, reply: str, responder: str = "cy", split: str = "train") -> Dialogue:
    return Dialogue(name, responder, querier, (Turn(querier, query), Turn(responder, reply)), name, split=split)


def store_of(dialogues: Sequence[Dialogue], cluster: Sequence[int] = ()) -> Store:
    return make_store(dialogues, np.array(cluster or [0] * len(dialogues), np.int32))


class Asked(list):
    """Writes down what it is asked, and answers by a function of the question's text."""

    def __init__(
        self, reply: Callable[[str], str] = lambda text: FIELDS if "## Record" not in text else "Be brief. Be dry."
    ):
        super().__init__()
        self.reply = reply

    def __call__(self, asked: Sequence[Messages]) -> list[str]:
        self += [messages[-1]["content"] for messages in asked]
        return [self.reply(messages[-1]["content"]) for messages in asked]


def setting(names: str = "visible", notes: Notes | None = None, **changes: object) -> Setting:
    """Keys of `dpl`, or of `prompts` where that has them."""
    config = configs.default()
    config.data.names = names
    for key, value in changes.items():
        (config.prompts if key in config.prompts else config.dpl)[key] = value
    return Setting(config, helpers.model(), 3, 1, {}, notes=notes)


def preface(store: Store, dialogue: Dialogue, asked: Asked, names: str = "visible", **changes: object) -> list[Turn]:
    notes = Notes(Path("never written"))
    notes.complete = asked  # type: ignore[method-assign]
    return list(dpl.preface(setting(names, notes, **changes), store, dialogue, dialogue.querier, size))


LAMP, ROPE, NEW = (
    review("ann", "lamp", "a bright red lamp", rating=4.0, title="Lit"),
    review("ann", "rope", "long enough"),
    review("ann", "lamp oil", "a secret", split="test", rating=2.0, title="Smells"),
)
STORE = store_of([
    LAMP, ROPE, NEW,
    review("bo", "lamp", "dim and dull lamp"), review("eve", "lamp", "what a lamp", title="Oh"),
    review("eve", "rope", "unseen", split="dev"), review("bo", "kettle", "it boils"),
])  # fmt: skip


def test_the_pipeline_by_hand() -> None:
    found = preface(STORE, NEW, asked := Asked())
    # Nobody else reviewed the rope in training; so one comparison, then the profile.
    assert asked == [
        "## Item\nlamp a lamp indeed\n\n## This reviewer\nRating: 4. Title: Lit. a bright red lamp\n\n"
        "## Another reviewer, 1\ndim and dull lamp\n\n## Another reviewer, 2\nTitle: Oh. what a lamp",
        f"## Difference 1\nItem: lamp a lamp indeed\n{FIELDS}\n\n"
        "## Record 1\nItem: lamp a lamp indeed\nThis reviewer: Rating: 4. Title: Lit. a bright red lamp\n\n"
        "## Record 2\nItem: rope a rope indeed\nThis reviewer: long enough",
    ]
    assert found == [
        Turn(
            "system",
            "You write reviews as ann does. What sets ann apart from other reviewers: Be brief.\nBe dry.",
        ),
        # The most similar last.
        *ROPE.turns,
        *LAMP.turns,
    ]


def test_what_is_counted() -> None:
    (note,) = dpl.notes(setting(), STORE, [NEW], Asked())
    assert note.records == (0, 1) and note.profile == "Be brief. Be dry."
    assert [d and d.writing for d in note.differences] == ["shorter", None]
    expected = {"dialogues": 1, "items": 2, "nobody else on the item": 1, "differences": 1, "profiles": 1}
    assert {k: v for k, v in note.counts.items() if v} == expected


def test_dialogues_are_compared_within_a_cluster_and_a_responder() -> None:
    """How cy speaks to ann, as against others who asked alike; what she asked dee is another matter."""
    dialogues = [
        talk("a0", "ann", "is there bread", "yes my dear"),
        talk("b0", "bo", "any bread", "no"),
        talk("b1", "bo", "who goes there", "nobody"),
        talk("e0", "eve", "bread please", "never", responder="dee"),
        talk("a1", "ann", "bread", "?", split="test"),
    ]
    store = store_of(dialogues, [0, 0, 1, 0, 0])
    found = preface(store, dialogues[-1], asked := Asked())
    assert asked[0] == (
        "## Query\nis there bread\n\n## Reply to this person\nyes my dear\n\n"
        "## Reply to another person, 1\n(Query: any bread)\nno"
    )
    assert len(asked) == 2
    assert found[0].text.split("\n")[0].startswith("You are talking to ann.")
    assert found[1:] == list(dialogues[0].turns)
    hidden = preface(store, dialogues[-1], again := Asked(), "masked")
    # Questions name nobody, so they are the same.
    assert again == asked and not any(name in t.speaker + t.text for t in hidden for name in ("ann", "cy"))
    assert [t.speaker for t in hidden] == ["system", "user", "assistant"]


def test_no_history_asks_nothing() -> None:
    nobody = dataclasses.replace(NEW, querier="zoe", turns=(Turn("zoe", "review it"), NEW.turns[1]))
    assert preface(STORE, nobody, asked := Asked()) == [] and asked == []
    (note,) = dpl.notes(setting(), STORE, [nobody], asked)
    assert (note.records, note.profile, note.counts["no history"], note.counts["items"]) == ((), "", 1, 0)


def test_one_item_that_nobody_else_touched() -> None:
    """Its differences are left out, the profile is made of the record."""
    store = store_of([ROPE, NEW])
    found = preface(store, NEW, asked := Asked())
    assert len(asked) == 1 and asked[0].startswith("## Record 1")
    assert found[0].text.endswith(": Be brief.\nBe dry.") and found[1:] == list(ROPE.turns)


def test_an_answer_that_cannot_be_read_is_repaired_once() -> None:
    answers = {"## Item": "They differ.", "## Answer": FIELDS, "## Difference": "Be brief.", "## Record": "Be plain."}
    found = dpl.notes(setting(), STORE, [NEW], asked := Asked(lambda text: answers[text.split("\n")[0].rstrip(" 1")]))
    assert asked[1] == "## Answer\nThey differ." and len(asked) == 3
    assert found[0].profile == "Be brief." and found[0].counts["repaired"] == found[0].counts["differences"] == 1
    answers["## Answer"] = "Still prose."
    found = dpl.notes(setting(), STORE, [NEW], asked := Asked(lambda text: answers[text.split("\n")[0].rstrip(" 1")]))
    assert len(asked) == 3 and asked[2].startswith("## Record 1") and found[0].profile == "Be plain."
    assert (found[0].counts["unreadable"], found[0].counts["differences"]) == (1, 0)
    # Nothing was said, so there is nothing to repair.
    found = dpl.notes(setting(), STORE, [NEW], asked := Asked(lambda text: ""))
    assert len(asked) == 2 and found[0].counts["unreadable"] == 1 and found[0].profile == ""
    assert preface(STORE, NEW, Asked(lambda text: "")) == [*ROPE.turns, *LAMP.turns]


def test_rating_and_title_are_told_on_demand_only() -> None:
    plain, told = (preface(STORE, NEW, Asked(), gold=gold) for gold in (False, True))
    assert "Smells" not in str(plain) and "rates" not in str(plain)
    assert told[0].text.split("\n")[:2] == ["The review rates the item 2.", "The review's title is: Smells"]
    assert told[1:] == plain[1:] and told[0].text.endswith(plain[0].text)
    counts = []
    for gold in (False, True):
        notes = Notes(Path("never written"))
        notes.complete = Asked()  # type: ignore[method-assign]
        counts.append(dpl.annotate(setting(notes=notes, gold=gold), STORE, [NEW, LAMP, ROPE]))
    assert "gold" not in counts[0] and counts[1]["gold"] == 2 and counts[0]["dialogues"] == 3


def test_choice_of_others() -> None:
    """The own record is like number 2; of the others two pairs are each alike."""
    said = ["good good lamp", "good fine lamp", "red as wine", "blue sky sea", "blue sky ship"]
    others = [review(f"u{i}", "lamp", text) for i, text in enumerate(said)]
    store = store_of([*others, review("ann", "lamp", "red as wine is"), NEW])

    def choose(select: str, seed: int = 0) -> tuple[int, ...]:
        return dpl.chosen(store, 5, (0, 1, 2, 3, 4), _seeded(seed, select))

    found = choose("kmeans")
    assert len(found) == 2 and found[0] in (0, 1) and found[1] in (3, 4)
    # Four have no word in common with it; of equals the first.
    assert choose("least_similar") == (0, 1)
    drawn = {choose("random", seed) for seed in range(30)}
    assert len(drawn) > 5 and {len(pair) for pair in drawn} == {2} and choose("random", 3) == choose("random", 3)


def _seeded(seed: int, select: str) -> Setting:
    made = setting(select=select, representatives=2)
    made.config.seed = seed
    return made


def test_equal_texts_are_compared_once() -> None:
    others = [review(f"u{i}", "lamp", text) for i, text in enumerate(["same words", "same words", "a bright red lamp"])]
    store = store_of([*others, LAMP, NEW])
    assert len(dpl.chosen(store, 3, (0, 1, 2), setting())) == 1


def test_budget() -> None:
    whole = preface(STORE, NEW, Asked())
    total = sum(map(size, whole))
    assert preface(STORE, NEW, Asked(), tokens=total) == whole
    # The less similar record goes first, then sentences of the profile.
    assert preface(STORE, NEW, Asked(), tokens=total - 1) == [whole[0], *LAMP.turns]
    assert preface(STORE, NEW, Asked(), tokens=size(whole[0])) == whole[:1]
    (short,) = preface(STORE, NEW, Asked(), tokens=size(whole[0]) - 1)
    assert short.text == whole[0].text.removesuffix("\nBe dry.")
    assert preface(STORE, NEW, Asked(), tokens=3) == []
    assert [t.text for t in preface(STORE, NEW, Asked(), examples=1)][1:] == [t.text for t in LAMP.turns]


def test_long_texts_are_cut() -> None:
    long = review("ann", "lamp", "word " * 999)
    store = store_of([long, review("bo", "lamp", "other " * 999), NEW])
    preface(store, NEW, asked := Asked(lambda text: "much " * 999 if "## Record" in text else FIELDS), words=5)
    assert asked[0].count("word ") == 5 and "\nother other other other other ..." in asked[0]
    (note,) = dpl.notes(setting(words=5), store, [NEW], Asked(lambda text: "much " * 999))
    assert note.profile == "much much much much much ..."


def letters(number: int) -> str:
    """Four words of a small vocabulary."""
    return " ".join("abcdefghij"[int(digit)] for digit in f"{number:04}")


def test_ten_thousand_records() -> None:
    """Questions, their length and the preface are as bounded as with five."""
    many = [review("ann", f"item{i}", letters(i)) for i in range(10_000)]
    colours = ("red", "blue", "green", "grey")
    others = [review(f"u{i}", "item9998", f"{letters(i)} {colours[i % 4]}") for i in range(700)]
    new = review("ann", "item9998 again", "?", split="test")
    store = store_of([*many, *others, new])
    found = preface(store, new, asked := Asked())
    assert len(asked) == 2 and max(map(len, asked)) < 2000
    assert sum(map(size, found)) <= configs.default().prompts.tokens
    # The most like the query is last, and was compared with four of the most recent.
    assert found[-1].text == letters(9998)
    seen = [i for i, other in enumerate(others) if f"\n{other.reply}" in asked[0]]
    assert len(seen) == 4 and min(seen) >= 700 - dpl.PEERS


words = st.lists(st.sampled_from("abcdef"), min_size=1, max_size=3)
records = st.lists(
    st.tuples(
        st.sampled_from(["ann", "bo", "eve"]),
        st.sampled_from(["lamp", "rope", None]),
        words,
        st.none() | st.integers(0, 4).map(float),
        st.sampled_from(["train", "train", "train", "dev", "test"]),
    ),
    min_size=3,
    max_size=12,
).filter(lambda es: any(e[4] == "train" for e in es))


@settings(max_examples=40, deadline=None)
@given(records, st.sampled_from(["kmeans", "least_similar", "random"]), st.data())
def test_nothing_is_asked_or_told_of_what_may_not_be_seen(es: list[tuple], select: str, data: st.DataObject) -> None:
    """Every word is marked with the record it is from; what is asked of the model counts as much as what is shown."""
    dialogues = []
    for i, (user, item, said, time, split) in enumerate(es):
        text = " ".join(f"{w}x{i}" for w in said)
        turns = Turn(user, f"queryx{i}"), Turn("reviewer", text)
        fields = {"item": item, "description": f"descriptionx{i}"} if item else {}
        group = f"{user}/{item}" if i % 3 else f"group {i % 2}"
        dialogues.append(Dialogue(f"d{i}", "reviewer", user, turns, group, time, split, fields=fields))
    store = store_of(dialogues, [i % 2 for i in range(len(es))])
    n = data.draw(st.integers(0, len(es) - 1))
    asked = dataclasses.replace(dialogues[n], turns=(dialogues[n].turns[0], Turn("reviewer", "")))
    told = preface(store, asked, questions := Asked(), select=select, tokens=1000)
    shown = {int(k) for t in told for k in re.findall(r"x(\d+)", t.text)}
    seen = shown | {int(k) for text in questions for k in re.findall(r"x(\d+)", text)}
    for k in seen:
        d = dialogues[k]
        assert d.split == "train" and d.group != asked.group and k != n
        assert None in (d.time, asked.time) or d.time < asked.time
    # What is shown is the pair's own.
    assert {dialogues[k].querier for k in shown} <= {asked.querier}


def test_without_a_writer_it_is_one_clear_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="this method asks a language model, and this command has none for it"):
        dpl.preface(setting(notes=Notes(tmp_path)), STORE, NEW, NEW.querier, size)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("override", ["trainable=all", "compat=paper"])
def test_what_dpl_cannot_be(override: str) -> None:
    file = Path(__file__).resolve().parent.parent / "configs" / "dpl_town.py"
    with pytest.raises(UserError, match=r"config\.method='dpl' needs compat='' and trainable='adapters'"):
        configs.load(file, [override])
    with pytest.raises(UserError, match=r"config\.dpl\.select is 'farthest', expected one of 'kmeans'"):
        configs.load(file, ["dpl.select=farthest"])
    with pytest.raises(UserError, match=r"config\.dpl\.words is 0, expected more than 0"):
        configs.load(file, ["dpl.words=0"])


def test_shipped_configs() -> None:
    folder = Path(__file__).resolve().parent.parent / "configs"
    qar, own, other = (configs.load(folder / f"{n}_smollm2.py") for n in ("qar", "dpl", "dpl_endpoint"))
    assert own.method == "dpl" and (own.dpl.writer, other.dpl.writer) == ("base", "endpoint")
    assert own.batch.length == qar.batch.length + own.prompts.tokens and own.batch.targets == qar.batch.targets
    assert configs.load(folder / "dpl_town.py").data.format == "synthetic_reviews"
