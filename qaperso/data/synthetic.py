"""The embedded world: a seeded harbour town in which one shopkeeper answers twelve queriers, each in their own way.

The right reply depends on what is asked (the intent: it gives the sentence) and on who asks (the address, the register,
the private facts that fill the sentence). The query says nothing about who asks. Some (intent, querier) pairs are held
out of training, so that a model can be asked to put together what it has seen only apart. The design and the texts are
ours; `qaperso.data.town` has the texts.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import random
import re
import string
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from qaperso.data.town import (
    BASE_QUERIER,
    BASE_RESPONDER,
    FACTS,
    INTENTS,
    REGISTERS,
    RESIDENTS,
    SHOPKEEPER,
    SMALL_TALK,
    Intent,
    expand,
)
from qaperso.errors import UserError, nearest
from qaperso.types import Dialogue, Turn

# In how many training intents each private fact of each querier shows at least.
SHOWN = 2

# How often a dialogue begins with small talk.
SMALL_TALK_RATE = 1 / 3

_INTENTS: dict[str, Intent] = {intent.name: intent for intent in INTENTS}
_BLANK: dict[str, str] = dict.fromkeys(FACTS, "")
_TRUTH = ("intent", "address", "register", "facts")


@dataclasses.dataclass(frozen=True)
class Person:
    """A querier of the town.

    Attributes:
      name: one word.
      relation: to the shopkeeper.
      register: "plain", "formal" or "playful".
      address: what the shopkeeper calls this person and nobody else.
      facts: value per kind, for every kind of `FACTS`.
    """

    name: str
    relation: str
    register: str
    address: str
    facts: Mapping[str, str]


@dataclasses.dataclass(frozen=True)
class World:
    """The town of one seed.

    Attributes:
      people: the queriers.
      shopkeeper: name of the responder.
      held_out: (intent, querier) pairs that no training dialogue shows.
      seed: what it was made from.
    """

    people: tuple[Person, ...]
    shopkeeper: str
    held_out: frozenset[tuple[str, str]]
    seed: int


def make_world(seed: int, queriers: int = 12, held_out: float = 0.15) -> World:
    """Makes the town of a seed (ours).

    Who lives there never changes; the seed draws the facts (each value of a kind equally often, give or take one) and
    the held-out pairs (spread evenly over queriers and over intents).

    Args:
      seed: any integer.
      queriers: how many people of the town ask, at least 2.
      held_out: share of the (intent, querier) pairs to hold out; each private fact of each querier still shows in at
        least `SHOWN` training intents.

    Raises:
      UserError: `queriers` or `held_out` is out of range.
    """
    if not 2 <= queriers <= len(RESIDENTS):
        raise UserError(f"queriers is {queriers}, expected 2 to {len(RESIDENTS)}: that many people live in the town")
    rng = _rng("world", seed)
    drawn = {kind: _even_draw(rng, pool, queriers) for kind, pool in FACTS.items()}
    people = tuple(
        Person(r.name, r.relation, r.register, r.address, {kind: values[i] for kind, values in drawn.items()})
        for i, r in enumerate(RESIDENTS[:queriers])
    )
    pairs = _draw_held_out(rng, [person.name for person in people], held_out)
    return World(people=people, shopkeeper=SHOPKEEPER, held_out=pairs, seed=seed)


def intents() -> tuple[str, ...]:
    """Returns the names of all intents."""
    return tuple(_INTENTS)


def kinds(intent: str) -> tuple[str, ...]:
    """Returns the kinds of facts that the reply to an intent uses, in the order of the reply.

    Raises:
      UserError: there is no such intent.
    """
    return tuple(field for _, field, _, _ in string.Formatter().parse(_intent(intent).reply) if field)


@functools.cache
def paraphrases(intent: str) -> tuple[str, ...]:
    """Returns every wording of the question of an intent, all different.

    Raises:
      UserError: there is no such intent.
    """
    return expand(_intent(intent).queries)


def true_reply(world: World, intent: str, querier: str) -> str:
    """Returns the one right reply of the shopkeeper to `querier`, whichever wording of `intent` was used.

    Raises:
      UserError: there is no such intent, or no such querier in this world.
    """
    for person in world.people:
        if person.name == querier:
            return _reply(_intent(intent).reply, person.address, person.register, person.facts)
    raise UserError(f"unknown querier '{querier}'{nearest(querier, [person.name for person in world.people])}")


def make_dialogues(world: World, per_pair: int = 6) -> list[Dialogue]:
    """Makes the dialogues of a world: `per_pair` for every (intent, querier), each with another wording of the question.

    One dialogue of a pair goes to dev, one to test, the others to train; of a held-out pair, the first third goes to dev
    and the rest to test. About a third begin with small talk, in which the shopkeeper shows address and register but no
    fact. Each dialogue is its own group. A pair's wordings differ and no two intents share one, so no question of a
    querier is in two splits.

    Returns:
      Dialogues by intent, then querier, with split and `fields`: "intent", "held_out" (bool), "address", "register",
      "facts" (value per kind that the reply needs). Small talk is the only context there is.

    Raises:
      UserError: `per_pair` is below 3, or above the fewest wordings an intent has.
    """
    most = min(len(paraphrases(intent)) for intent in _INTENTS)
    if not 3 <= per_pair <= most:
        raise UserError(
            f"per_pair is {per_pair}, expected 3 to {most}: one each for train, dev and test, none repeated"
        )
    dialogues = []
    for intent, person in itertools.product(_INTENTS, world.people):
        held_out = (intent, person.name) in world.held_out
        rng = _rng("dialogues", world.seed, intent, person.name)
        for i, query in enumerate(rng.sample(paraphrases(intent), per_pair)):
            dialogues.append(
                _dialogue(
                    rng,
                    id=f"town-{world.seed}-{intent}-{person.name}-{i}",
                    querier=person.name,
                    responder=world.shopkeeper,
                    query=query,
                    split=_split(i, per_pair, held_out),
                    fields=_fields(intent, held_out, person.address, person.register, person.facts),
                )
            )
    return dialogues


def make_base_dialogues(seed: int, n: int) -> list[Dialogue]:
    """Makes `n` dialogues that teach a base model the language of the town and nothing about anybody in it (ours).

    The querier is always "user" and the responder "assistant"; intent, wording, address, register and every fact are
    drawn independently and uniformly for each dialogue. `fields` are as in `make_dialogues`. The split (about 90% train,
    5% dev, 5% test) depends on the text alone, so equal dialogues never straddle it.

    Raises:
      UserError: `n` is not positive.
    """
    if n < 1:
        raise UserError(f"n is {n}, expected at least 1 dialogue")
    rng = _rng("base", seed)
    dialogues = []
    for i in range(n):
        intent = rng.choice(tuple(_INTENTS))
        facts = {kind: rng.choice(FACTS[kind]) for kind in FACTS}
        dialogue = _dialogue(
            rng,
            id=f"base-{seed}-{i}",
            querier=BASE_QUERIER,
            responder=BASE_RESPONDER,
            query=rng.choice(paraphrases(intent)),
            split=None,
            fields=_fields(intent, False, rng.choice(RESIDENTS).address, rng.choice(tuple(REGISTERS)), facts),
        )
        place = _rng("split", *(turn.text for turn in dialogue.turns)).random()
        split = "train" if place < 0.9 else "dev" if place < 0.95 else "test"
        dialogues.append(dataclasses.replace(dialogue, split=split))
    return dialogues


def score_reply(dialogue: Dialogue, reply: str) -> dict[str, float]:
    """Scores a reply against the ground truth in `dialogue.fields` (ours); blind to case, spacing and punctuation.

    Returns:
      0.0 or 1.0 for each of
        "address": the querier's address is there, and nobody else's;
        "register": opening and closing of the right register are there, and none of another register;
        "fact": every fact that the reply needs is there, and no other value of its kind; left out where it needs none;
        "exact": all of the above; and the reply has all words that only the sentence of this intent has, none that only
          the sentence of another intent has, and no fact of a kind that it does not need.

    Raises:
      UserError: the dialogue has no ground truth: it does not come from this module.
    """
    fields = _truth(dialogue)
    text = _spoken(reply)
    facts = fields["facts"]
    scores = {
        "address": _said(text, (r.address for r in RESIDENTS)) == {fields["address"]},
        "register": _said(text, itertools.chain(*REGISTERS.values())) == set(REGISTERS[fields["register"]]),
    }
    if facts:
        scores["fact"] = all(_said(text, FACTS[kind]) == {value} for kind, value in facts.items())
    unasked = (_said(text, pool) for kind, pool in FACTS.items() if kind not in facts)
    own = _own_words()
    answers = _said(text, itertools.chain(*own.values())) == own[_intent(fields["intent"]).name]
    scores["exact"] = all(scores.values()) and answers and not any(unasked)
    return {key: float(value) for key, value in scores.items()}


def chance(world: World, dialogues: Sequence[Dialogue]) -> dict[str, float]:
    """Computes what an ideal answerer scores who knows the intent and the whole world, but not who asks (ours).

    It answers as if to a querier drawn uniformly from all of `world.people`, the right one among them. For a dialogue,
    each expected score is therefore the mean over people p of `score_reply(dialogue, true_reply(world, intent, p))[key]`;
    nothing is sampled. The result is the mean over the dialogues whose score has the key: "fact" is averaged over those
    whose reply needs a fact. "exact" and "address" are 1 / len(world.people), since no two people share an address. Small
    talk earlier in a dialogue gives address and register away; this answerer does not read it.

    Raises:
      UserError: there are no dialogues, or one has no ground truth.
    """
    if not dialogues:
        raise UserError("chance needs at least one dialogue, found none")
    known: dict[str, dict[str, float]] = {}
    values: dict[str, list[float]] = {}
    for dialogue in dialogues:
        fields = _truth(dialogue)
        truth = repr([fields[key] for key in _TRUTH])
        if truth not in known:
            known[truth] = _expected_scores(world, dialogue)
        for key, value in known[truth].items():
            values.setdefault(key, []).append(value)
    return {key: math.fsum(column) / len(column) for key, column in values.items()}


def words() -> list[str]:
    """Returns every word and punctuation mark that any world's turns, names and relations are made of, sorted.

    Splitting is that of the `Whitespace` pre-tokeniser of `tokenizers`: runs of word characters, runs of anything else.
    """
    said = (*INTENTS, *SMALL_TALK)
    replies = [_reply(a.reply, "", register, _BLANK) for a, register in itertools.product(said, REGISTERS)]
    queries = itertools.chain.from_iterable(expand(a.queries) for a in said)
    people = itertools.chain.from_iterable((r.name, r.relation, r.address) for r in RESIDENTS)
    speakers = (SHOPKEEPER, BASE_QUERIER, BASE_RESPONDER)
    texts = itertools.chain(replies, queries, people, speakers, *FACTS.values())
    return sorted({token for text in texts for token in re.findall(r"\w+|[^\w\s]+", text)})


def _rng(*parts: object) -> random.Random:
    # A string seeds Random through SHA-512: the same on every machine, and streams of different parts are independent.
    return random.Random("/".join(map(str, parts)))


def _intent(name: str) -> Intent:
    if name not in _INTENTS:
        raise UserError(f"unknown intent '{name}'{nearest(name, _INTENTS)}")
    return _INTENTS[name]


def _reply(skeleton: str, address: str, register: str, facts: Mapping[str, str]) -> str:
    opening, closing = REGISTERS[register]
    return f"{opening}, {address}: {skeleton.format_map(facts)}. {closing}."


def _fields(intent: str, held_out: bool, address: str, register: str, facts: Mapping[str, str]) -> dict[str, Any]:
    needed = {kind: facts[kind] for kind in kinds(intent)}
    return {"intent": intent, "held_out": held_out, "address": address, "register": register, "facts": needed}


def _dialogue(
    rng: random.Random,
    *,
    id: str,
    querier: str,
    responder: str,
    query: str,
    split: str | None,
    fields: Mapping[str, Any],
) -> Dialogue:
    own = fields["address"], fields["register"], fields["facts"]
    turns = [Turn(querier, query), Turn(responder, _reply(_intent(fields["intent"]).reply, *own))]
    if rng.random() < SMALL_TALK_RATE:
        talk = rng.choice(SMALL_TALK)
        turns = [Turn(querier, rng.choice(expand(talk.queries))), Turn(responder, _reply(talk.reply, *own)), *turns]
    return Dialogue(
        id=id, responder=responder, querier=querier, turns=tuple(turns), group=id, split=split, fields=fields
    )


def _split(place: int, per_pair: int, held_out: bool) -> str:
    if held_out:
        return "dev" if place < per_pair // 3 else "test"
    return {per_pair - 2: "dev", per_pair - 1: "test"}.get(place, "train")


def _even_draw(rng: random.Random, pool: Sequence[str], n: int) -> list[str]:
    # Whole shuffled pools one after the other: values are as rare as they can be, so that guessing them pays least.
    drawn: list[str] = []
    while len(drawn) < n:
        drawn += rng.sample(pool, len(pool))
    drawn = drawn[:n]
    rng.shuffle(drawn)
    return drawn


def _draw_held_out(rng: random.Random, names: Sequence[str], share: float) -> frozenset[tuple[str, str]]:
    """Draws pairs in rounds of one per querier, each time an intent that was drawn least so far."""
    if not 0.0 <= share < 1.0:
        raise UserError(f"held_out is {share}, expected a share of the (intent, querier) pairs in [0, 1)")
    total = round(share * len(_INTENTS) * len(names))
    order = rng.sample(names, len(names))
    held: dict[str, set[str]] = {name: set() for name in names}
    count = dict.fromkeys(_INTENTS, 0)
    for name in itertools.islice(itertools.cycle(order), total):
        free = [intent for intent in _INTENTS if intent not in held[name] and _all_shown(held[name] | {intent})]
        if not free:
            raise UserError(
                f"held_out is {share}, which is too much: each fact of {name} must show in {SHOWN} training intents or "
                f"more, and {len(held[name])} of {len(_INTENTS)} intents are as many as this seed can hold out; lower it"
            )
        intent = min(free, key=lambda name: (count[name], rng.random()))
        held[name].add(intent)
        count[intent] += 1
    return frozenset((intent, name) for name in names for intent in held[name])


def _all_shown(held: set[str]) -> bool:
    shown = [kind for intent in _INTENTS if intent not in held for kind in kinds(intent)]
    return all(shown.count(kind) >= SHOWN for kind in FACTS)


def _spoken(text: str) -> str:
    # Blanks around every word, so that looking for " a b " finds whole words only.
    return " " + " ".join(re.findall(r"[^\W_]+", text.lower())) + " "


def _said(spoken: str, phrases: Iterable[str]) -> set[str]:
    return {phrase for phrase in phrases if f" {phrase} " in spoken}


@functools.cache
def _own_words() -> dict[str, set[str]]:
    """Returns, per intent, the words that occur in the sentence of no other intent."""
    own = {name: set(_spoken(intent.reply.format_map(_BLANK)).split()) for name, intent in _INTENTS.items()}
    return {name: own[name].difference(*(own[n] for n in own if n != name)) for name in own}


def _truth(dialogue: Dialogue) -> Mapping[str, Any]:
    missing = [key for key in _TRUTH if key not in dialogue.fields]
    if missing:
        raise UserError(
            f"dialogue '{dialogue.id}' has no field '{missing[0]}': score only the embedded world's dialogues"
        )
    return dialogue.fields


def _expected_scores(world: World, dialogue: Dialogue) -> dict[str, float]:
    replies = (true_reply(world, dialogue.fields["intent"], person.name) for person in world.people)
    scores = [score_reply(dialogue, reply) for reply in replies]
    return {key: math.fsum(score[key] for score in scores) / len(scores) for key in scores[0]}
