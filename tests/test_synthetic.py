"""The embedded world: determinism, ground truth, hold-out, vocabulary, chance."""

from __future__ import annotations

import collections
import dataclasses
import itertools
import os
import re
import statistics
import subprocess
import sys

import hypothesis
import hypothesis.strategies as st
import pytest
import tokenizers

from qaperso.data import synthetic, town
from qaperso.errors import UserError
from qaperso.types import Dialogue, Turn

SEEDS = st.integers(-(2**40), 2**40)


@pytest.fixture(scope="module")
def world() -> synthetic.World:
    return synthetic.make_world(0)


@pytest.fixture(scope="module")
def dialogues(world: synthetic.World) -> list[Dialogue]:
    return synthetic.make_dialogues(world)


@pytest.fixture(scope="module")
def base() -> list[Dialogue]:
    return synthetic.make_base_dialogues(0, 2000)


def bare(text: str) -> list[str]:
    return re.findall(r"\w+", text)


def test_expand():
    assert town.expand(["[a|b] c [d|e]!", "f"]) == ("a c d!", "a c e!", "b c d!", "b c e!", "f")


def test_world_is_pinned(world, dialogues):
    tilda = world.people[0]
    assert (tilda.name, tilda.relation, tilda.register, tilda.address) == (
        "tilda",
        "sister",
        "playful",
        "little sister",
    )
    assert dict(tilda.facts) == {
        "allergy": "onion",
        "tab": "twelve",
        "meeting": "friday dusk",
        "favourite": "pickled herring",
        "place": "stone well",
    }
    assert sorted(world.held_out)[:3] == [("barter", "brandt"), ("basket", "harald"), ("basket", "voss")]
    assert dialogues[0].turns[-1] == Turn(
        "maren", "ahoy, little sister: the rye loaf is warm, without any onion. fair winds."
    )
    assert synthetic.make_base_dialogues(0, 1)[0].turns[2:] == (
        Turn("user", "will you dine with me?"),
        Turn(
            "assistant",
            "hello, your honour: supper with your favourite lemon drops, see you on tuesday noon. take care.",
        ),
    )


def test_everything_is_a_function_of_the_arguments(world, dialogues, base):
    assert synthetic.make_world(0) == world
    assert synthetic.make_dialogues(synthetic.make_world(0)) == dialogues
    assert synthetic.make_base_dialogues(0, 2000) == base
    other = synthetic.make_world(1)
    assert other.held_out != world.held_out
    assert [p.facts for p in other.people] != [p.facts for p in world.people]
    factless = [[dataclasses.replace(p, facts={}) for p in w.people] for w in (world, other)]
    assert factless[0] == factless[1]
    assert synthetic.make_base_dialogues(1, 50) != base[:50]


def test_hash_seed_changes_nothing():
    code = (
        "from qaperso.data.synthetic import *; w = make_world(3); "
        "print(sorted(w.held_out), w.people, make_dialogues(w, 3), make_base_dialogues(3, 20), words())"
    )
    printed = []
    for seed in ("1", "2"):
        env = {"PYTHONHASHSEED": seed, "PYTHONPATH": os.pathsep.join(sys.path)}
        printed.append(subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, check=True).stdout)
    assert printed[0] == printed[1]


def test_residents_cover_what_the_world_promises():
    assert len(town.RESIDENTS) == 12 and len(town.INTENTS) == 16 and len(town.REGISTERS) == 3
    assert collections.Counter(r.register for r in town.RESIDENTS) == dict.fromkeys(town.REGISTERS, 4)
    for key in ("name", "relation", "address"):
        assert len({getattr(r, key) for r in town.RESIDENTS}) == 12
    assert all(re.fullmatch(r"[a-z]+", r.name) for r in town.RESIDENTS)
    assert all(10 <= len(pool) == len(set(pool)) for pool in town.FACTS.values())
    used = collections.Counter(kind for intent in synthetic.intents() for kind in synthetic.kinds(intent))
    assert set(used) == set(town.FACTS) and min(used.values()) >= 4
    assert all(len(synthetic.kinds(intent)) <= 2 for intent in synthetic.intents())


def test_no_scored_phrase_is_part_of_another():
    phrases = [r.address for r in town.RESIDENTS] + list(
        itertools.chain(*town.REGISTERS.values(), *town.FACTS.values())
    )
    assert len(set(phrases)) == len(phrases)
    for a, b in itertools.permutations(phrases, 2):
        assert f" {a} " not in f" {b} "
    # Nor does a sentence contain one of its own accord.
    for said in (*town.INTENTS, *town.SMALL_TALK):
        sentence = " ".join(bare(said.reply.format_map(dict.fromkeys(town.FACTS, "|"))))
        assert not [phrase for phrase in phrases if f" {phrase} " in f" {sentence} "]


def test_facts_follow_the_same_words_everywhere():
    cues = {
        "allergy": "without any",
        "tab": "tab stands at",
        "meeting": "see you on",
        "favourite": "your favourite",
        "place": "waiting by the",
    }
    for intent in town.INTENTS:
        for kind in synthetic.kinds(intent.name):
            assert f"{cues[kind]} {{{kind}}}" in intent.reply


def test_replies_are_short(world):
    for intent, person in itertools.product(synthetic.intents(), world.people):
        assert 8 <= len(bare(synthetic.true_reply(world, intent, person.name))) <= 16


def test_paraphrases_are_many_and_name_one_intent():
    everything = [text for intent in synthetic.intents() for text in synthetic.paraphrases(intent)]
    assert min(len(synthetic.paraphrases(intent)) for intent in synthetic.intents()) >= 10
    assert len(set(everything)) == len(everything)


def test_no_query_tells_who_asks(dialogues, base):
    telling = {word for r in town.RESIDENTS for word in bare(f"{r.name} {r.relation} {r.address}")}
    telling |= {word for text in itertools.chain(*town.REGISTERS.values(), *town.FACTS.values()) for word in bare(text)}
    telling |= set(town.REGISTERS) | {town.SHOPKEEPER}
    asked = {turn.text for d in (*dialogues, *base) for turn in d.turns if turn.speaker == d.querier}
    for text in asked.union(*(synthetic.paraphrases(intent) for intent in synthetic.intents())):
        assert not telling & set(bare(text)), text


def test_dialogue_records(world, dialogues):
    assert len(dialogues) == 16 * 12 * 6
    assert len({d.id for d in dialogues}) == len({d.group for d in dialogues}) == len(dialogues)
    for d in dialogues:
        assert d.responder == world.shopkeeper
        assert [t.speaker for t in d.turns] == [d.querier, d.responder] * (len(d.turns) // 2)
        assert d.query in synthetic.paraphrases(d.fields["intent"])
        assert d.reply == synthetic.true_reply(world, d.fields["intent"], d.querier)
        assert tuple(d.fields["facts"]) == synthetic.kinds(d.fields["intent"])
        assert d.fields["held_out"] == ((d.fields["intent"], d.querier) in world.held_out)
    share = statistics.mean(len(d.turns) == 4 for d in dialogues)
    assert 0.28 < share < 0.39 and {len(d.turns) for d in dialogues} == {2, 4}


def test_small_talk_shows_address_and_register_but_no_fact(dialogues, base):
    values = list(itertools.chain(*town.FACTS.values()))
    for d in (d for d in (*dialogues, *base) if len(d.turns) == 4):
        scores = synthetic.score_reply(d, d.turns[1].text)
        assert (scores["address"], scores["register"], scores["exact"]) == (1.0, 1.0, 0.0)
        assert not [value for value in values if value in d.turns[1].text]


@hypothesis.settings(max_examples=15, deadline=None)
@hypothesis.given(seed=SEEDS, per_pair=st.integers(3, 10), queriers=st.integers(2, 12))
def test_splits(seed, per_pair, queriers):
    world = synthetic.make_world(seed, queriers)
    splits = collections.defaultdict(lambda: collections.defaultdict(set))
    for d in synthetic.make_dialogues(world, per_pair):
        splits[d.fields["intent"], d.querier][d.split].add(" ".join(bare(d.query.lower())))
    asked = collections.Counter((who, text) for (_, who), pair in splits.items() for s in pair.values() for text in s)
    assert set(asked.values()) == {1} and len(asked) == 16 * queriers * per_pair
    for pair, texts in splits.items():
        sizes = {split: len(t) for split, t in texts.items()}
        third = per_pair // 3
        expected = {"dev": third, "test": per_pair - third}
        assert sizes == (expected if pair in world.held_out else {"train": per_pair - 2, "dev": 1, "test": 1})


@hypothesis.settings(max_examples=60, deadline=None)
@hypothesis.given(seed=SEEDS, share=st.sampled_from([0.0, 0.15, 0.3, 0.5]))
def test_every_fact_of_everyone_shows_in_two_training_intents(seed, share):
    world = synthetic.make_world(seed, held_out=share)
    assert len(world.held_out) == round(share * 16 * 12)
    for person in world.people:
        shown = collections.Counter(
            kind
            for intent in synthetic.intents()
            if (intent, person.name) not in world.held_out
            for kind in synthetic.kinds(intent)
        )
        assert all(shown[kind] >= 2 for kind in person.facts) and set(person.facts) == set(town.FACTS)
        assert all(person.facts[kind] in pool for kind, pool in town.FACTS.items())
    if share:
        assert {who for _, who in world.held_out} == {p.name for p in world.people}
        assert {intent for intent, _ in world.held_out} == set(synthetic.intents())
        held = collections.Counter(who for _, who in world.held_out)
        assert max(held.values()) - min(held.values()) <= 1


@hypothesis.settings(max_examples=30, deadline=None)
@hypothesis.given(seed=SEEDS)
def test_values_of_a_fact_are_shared_evenly(seed):
    for kind, pool in town.FACTS.items():
        count = collections.Counter(p.facts[kind] for p in synthetic.make_world(seed).people)
        assert max(count.values()) <= -(-12 // len(pool))


def test_truth_scores_one_and_anyone_elses_zero(world, dialogues):
    one = {(d.fields["intent"], d.querier): d for d in dialogues}
    assert len(one) == 16 * 12
    for (intent, querier), dialogue in one.items():
        keys = {"address", "register", "exact"} | ({"fact"} if synthetic.kinds(intent) else set())
        assert synthetic.score_reply(dialogue, dialogue.reply) == dict.fromkeys(keys, 1.0)
        for person in world.people:
            if person.name != querier:
                scores = synthetic.score_reply(dialogue, synthetic.true_reply(world, intent, person.name))
                assert scores["exact"] == scores["address"] == 0.0
                assert scores["register"] == (person.register == dialogue.fields["register"])
        for other in synthetic.intents():
            if other != intent:
                scores = synthetic.score_reply(dialogue, synthetic.true_reply(world, other, querier))
                assert (scores["address"], scores["register"], scores["exact"]) == (1.0, 1.0, 0.0)


def test_base_truth_scores_one(base):
    assert all(set(synthetic.score_reply(d, d.reply).values()) == {1.0} for d in base)


REPLY = "greetings, your honour: mended, waiting by the red barn, tab stands at nine crowns. respectfully yours."
MAYOR = Dialogue(
    id="d",
    responder="maren",
    querier="harald",
    turns=(Turn("harald", "is the repair done?"), Turn("maren", REPLY)),
    group="d",
    fields={
        "intent": "mend",
        "held_out": False,
        "address": "your honour",
        "register": "formal",
        "facts": {"place": "red barn", "tab": "nine"},
    },
)


@pytest.mark.parametrize(
    ("reply", "wrong"),
    [
        (REPLY, set()),
        (REPLY.upper().replace(",", "  ,\n").replace(".", " . ").replace("BARN", "BARN_"), set()),
        (REPLY.replace("your honour", "honour"), {"address"}),
        (REPLY.replace("your honour", "your honour, old fox"), {"address"}),
        (REPLY.replace("your honour", "your honours"), {"address"}),
        (REPLY.replace("greetings", "ahoy"), {"register"}),
        (REPLY.replace("respectfully yours", "yours"), {"register"}),
        (REPLY + " fair winds.", {"register"}),
        (REPLY.replace("nine", "eight"), {"fact"}),
        (REPLY.replace("nine", "nine eight"), {"fact"}),
        (REPLY.replace("red barn", "barn"), {"fact"}),
        (REPLY.replace("mended", ""), set("x")),
        (REPLY.replace("mended", "mended, packed"), set("x")),
        (REPLY.replace("mended", "mended, without any nuts"), set("x")),
        ("", {"address", "register", "fact"}),
    ],
)
def test_each_score_sees_its_own_mistake(reply, wrong):
    scores = synthetic.score_reply(MAYOR, reply)
    assert {key for key, value in scores.items() if value == 0.0} - {"exact"} == wrong - {"x"}
    assert scores["exact"] == float(not wrong)


@pytest.mark.parametrize("queriers", [2, 12])
def test_chance_is_the_score_of_guessing_who_asks(queriers):
    world = synthetic.make_world(5, queriers, 0.1)
    dialogues = synthetic.make_dialogues(world, 3)
    scores = collections.defaultdict(list)
    for d, person in itertools.product(dialogues, world.people):
        said = synthetic.true_reply(world, d.fields["intent"], person.name)
        for key, value in synthetic.score_reply(d, said).items():
            scores[key].append(value)
    expected = {key: statistics.fmean(column) for key, column in scores.items()}
    assert synthetic.chance(world, dialogues) == pytest.approx(expected, abs=1e-12)
    assert expected["exact"] == expected["address"] == pytest.approx(1 / queriers)
    assert expected["fact"] < 1.0


def test_chance_values(world, dialogues):
    # Three registers of four people each; "weather" needs no fact.
    weather = [d for d in dialogues if d.fields["intent"] == "weather"]
    assert synthetic.chance(world, weather) == pytest.approx({"address": 1 / 12, "register": 1 / 3, "exact": 1 / 12})
    # Twelve allergies for twelve people: each is somebody's own. Ten places: two of them are shared by two people.
    bread, cart = ([d for d in dialogues if d.fields["intent"] == name] for name in ("bread", "delivery"))
    assert synthetic.chance(world, bread)["fact"] == pytest.approx(1 / 12)
    assert synthetic.chance(world, cart)["fact"] == pytest.approx((8 * 1 + 4 * 2) / 12 / 12)


def test_words_close_the_vocabulary(world, dialogues, base):
    words = synthetic.words()
    assert words == sorted(set(words)) and len(words) <= 600
    assert {"user", "assistant", "maren", *(p.name for p in world.people)} <= set(words)
    assert all(word == word.lower() for word in words)
    model = tokenizers.models.WordLevel({word: i for i, word in enumerate(["[UNK]", *words])}, unk_token="[UNK]")
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    everyone = [synthetic.true_reply(world, i, p.name) for i in synthetic.intents() for p in world.people]
    said = [turn.text for d in (*dialogues, *base) for turn in d.turns]
    asked = [text for intent in synthetic.intents() for text in synthetic.paraphrases(intent)]
    for text in {*everyone, *said, *asked}:
        encoded = tokenizer.encode(text)
        assert "[UNK]" not in encoded.tokens
    # Nothing in the list is idle: some world says it, or it names somebody or a relation.
    met = {token for text in (*said, *asked) for token in re.findall(r"\w+|[^\w\s]+", text)}
    people = {word for r in town.RESIDENTS for word in (r.name, r.relation)}
    assert set(words) <= met | people | {"user", "assistant", "maren"}


def test_decoded_words_score_as_the_text(dialogues):
    for d in dialogues[::7]:
        decoded = " ".join(re.findall(r"\w+|[^\w\s]+", d.reply))
        assert synthetic.score_reply(d, decoded)["exact"] == 1.0


def test_base_dialogues_link_nothing(base):
    assert {d.querier for d in base} == {"user"} and {d.responder for d in base} == {"assistant"}
    names = {r.name for r in town.RESIDENTS} | {town.SHOPKEEPER}
    assert not names & {word for d in base for turn in d.turns for word in bare(turn.text)}
    # Every address meets every register, and many values of a fact.
    assert len({(d.fields["address"], d.fields["register"]) for d in base}) == 12 * 3
    tabs = collections.defaultdict(set)
    for d in base:
        tabs[d.fields["address"]].add(d.fields["facts"].get("tab"))
    assert min(map(len, tabs.values())) > 6
    share = collections.Counter(d.split for d in base)
    assert 0.86 < share["train"] / 2000 < 0.94 and 0.03 < share["dev"] / 2000 < 0.07 and share.total() == 2000
    assert set(share) == {"train", "dev", "test"} and len({d.id for d in base}) == 2000


def test_equal_base_dialogues_share_a_split():
    split_of = collections.defaultdict(set)
    count = collections.Counter()
    for d in synthetic.make_base_dialogues(1, 6000):
        text = tuple(turn.text for turn in d.turns)
        split_of[text].add(d.split)
        count[text] += 1
    assert max(count.values()) > 1 and all(len(splits) == 1 for splits in split_of.values())


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda w: synthetic.make_world(0, queriers=13), "queriers is 13, expected 2 to 12"),
        (lambda w: synthetic.make_world(0, held_out=1.5), "held_out is 1.5, expected a share"),
        (lambda w: synthetic.make_world(0, held_out=float("nan")), "held_out is nan, expected a share"),
        (lambda w: synthetic.make_world(0, held_out=0.8), "held_out is 0.8, which is too much"),
        (lambda w: synthetic.make_dialogues(w, 2), "per_pair is 2, expected 3 to 10"),
        (lambda w: synthetic.make_dialogues(w, 11), "per_pair is 11, expected 3 to 10"),
        (lambda w: synthetic.make_base_dialogues(0, 0), "n is 0, expected at least 1"),
        (lambda w: synthetic.true_reply(w, "bred", "tilda"), "unknown intent 'bred'; did you mean 'bread'?"),
        (lambda w: synthetic.true_reply(w, "bread", "tlda"), "unknown querier 'tlda'; did you mean 'tilda'?"),
        (lambda w: synthetic.paraphrases("lunch!"), "unknown intent 'lunch!'"),
        (lambda w: synthetic.chance(w, []), "chance needs at least one dialogue"),
        (
            lambda w: synthetic.score_reply(dataclasses.replace(MAYOR, fields={}), ""),
            "dialogue 'd' has no field 'intent'",
        ),
        (lambda w: synthetic.chance(w, [dataclasses.replace(MAYOR, fields={})]), "dialogue 'd' has no field 'intent'"),
    ],
)
def test_user_errors(world, call, message):
    with pytest.raises(UserError) as error:
        call(world)
    assert str(error.value).startswith(message) and "\n" not in str(error.value)
