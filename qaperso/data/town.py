"""The texts of the embedded world: who lives in the harbour town, what they ask for, how the shopkeeper answers.

All text is ours. It is lower case and splits into words and single punctuation marks, so that a word-level tokeniser of a
few hundred entries covers it. Three rules keep it learnable and scorable, and tests hold them:

- a query contains no word of any name, address, register marker or fact value, so only who asks decides the reply;
- a fact always follows the same words ("without any", "tab stands at", "see you on", "your favourite", "waiting by the"),
  whichever intent it serves, so that what was learned in one intent carries over to another;
- no marker, address, fact value or word of a reply's own is part of another one.
"""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Iterable

SHOPKEEPER = "maren"

# The nameless pair of the dialogues that a base model is pre-trained on.
BASE_QUERIER, BASE_RESPONDER = "user", "assistant"


@dataclasses.dataclass(frozen=True)
class Resident:
    """Somebody who comes to the shop, as every seed has them.

    Attributes:
      name: one word.
      relation: to the shopkeeper.
      register: a key of `REGISTERS`.
      address: one or two words that the shopkeeper uses for this person only.
    """

    name: str
    relation: str
    register: str
    address: str


@dataclasses.dataclass(frozen=True)
class Intent:
    """Something people come for.

    Attributes:
      name: one word.
      reply: what the shopkeeper says between address and closing, with `{kind}` where a fact goes.
      queries: patterns of the question; `[a|b]` stands for either.
    """

    name: str
    reply: str
    queries: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class SmallTalk:
    """An exchange of greetings: patterns of what is said on entering, and what the shopkeeper says between address and
    closing."""

    reply: str
    queries: tuple[str, ...]


# Opening and closing words of a reply.
REGISTERS: dict[str, tuple[str, str]] = {
    "plain": ("hello", "take care"),
    "formal": ("greetings", "respectfully yours"),
    "playful": ("ahoy", "fair winds"),
}

# The registers take turns, so that the first few residents have them all.
RESIDENTS: tuple[Resident, ...] = (
    Resident("tilda", "sister", "playful", "little sister"),
    Resident("harald", "mayor", "formal", "your honour"),
    Resident("agnes", "mother", "plain", "mama"),
    Resident("roscoe", "rival", "playful", "old fox"),
    Resident("ines", "doctor", "formal", "dear doctor"),
    Resident("brandt", "captain", "plain", "skipper"),
    Resident("pip", "pupil", "playful", "young scholar"),
    Resident("voss", "taxman", "formal", "inspector"),
    Resident("hanna", "baker", "plain", "neighbour"),
    Resident("jory", "friend", "playful", "shipmate"),
    Resident("anselm", "priest", "formal", "reverend father"),
    Resident("edda", "watchman", "plain", "lamp keeper"),
)

# Kinds of private facts and the values they take.
# fmt: off
FACTS: dict[str, tuple[str, ...]] = {
    "allergy": (
        "nuts", "milk", "eggs", "mustard", "honey", "garlic", "pepper", "celery", "sesame", "butter", "onion",
        "cheese",
    ),
    "tab": (
        "three", "four", "five", "seven", "eight", "nine", "eleven", "twelve", "fifteen", "twenty", "thirty",
        "forty",
    ),
    "meeting": (
        "monday dawn", "monday dusk", "tuesday noon", "wednesday dawn", "wednesday dusk", "thursday noon",
        "friday dawn", "friday dusk", "saturday noon", "sunday dusk",
    ),
    "favourite": (
        "plum jam", "apple cider", "black tea", "lemon drops", "rhubarb pie", "pickled herring", "smoked eel",
        "peach syrup", "oat biscuits", "mint toffee",
    ),
    "place": (
        "blue gate", "back door", "north pier", "stone well", "boat shed", "church wall", "garden fence",
        "red barn", "ferry ramp", "school bench",
    ),
}
# fmt: on

INTENTS: tuple[Intent, ...] = (
    Intent(
        "bread",
        "the rye loaf is warm, without any {allergy}",
        (
            "[what|which] bread [is fresh|can i have] today?",
            "is there [any|some] bread [left|for me]?",
            "i need a loaf for [my breakfast|my table|the morning].",
            "[could|may] i have a loaf of bread?",
            "[what|which] rolls did you bake today?",
        ),
    ),
    Intent(
        "soup",
        "leek soup on the stove, without any {allergy}",
        (
            "[what|which] soup is [hot|cooking] today?",
            "is there a [bowl|pot] of soup for me?",
            "i would like a [warm|hot] bowl of something.",
            "[could|may] i have a [bowl|ladle] of soup?",
            "what is [in|simmering in] the pot?",
        ),
    ),
    Intent(
        "cake",
        "a cake without any {allergy}, see you on {meeting}",
        (
            "[could|can] you bake [a cake|something sweet] for [the feast|my party]?",
            "i [need|want] to order a cake for [the feast|a birthday].",
            "how about a cake for [my party|a birthday]?",
        ),
    ),
    Intent(
        "basket",
        "a basket without any {allergy}, with your favourite {favourite}",
        (
            "[could|can] you pack [a picnic|a basket|some lunch] for me?",
            "i am going to the [beach|hills], what shall i eat?",
            "we want a picnic on the [beach|hills].",
            "what goes in my picnic [basket|hamper]?",
        ),
    ),
    Intent(
        "credit",
        "i can wait, tab stands at {tab} crowns",
        (
            "[can|may|could] i [pay|settle] later?",
            "i have no [coins|money|purse] with me.",
            "[can|may] i buy on credit?",
            "will you trust me [until|till] next month?",
        ),
    ),
    Intent(
        "ledger",
        "the ledger says tab stands at {tab} crowns",
        (
            "how much do i owe [you|the shop]?",
            "what do i [still|now] owe?",
            "[could|can] you [check|open] the ledger [please|for me]?",
            "how big is my [debt|bill]?",
        ),
    ),
    Intent(
        "barter",
        "deal, tab stands at {tab} crowns, see you on {meeting}",
        (
            "would you [trade|swap] this [rope|lantern|carpet] for goods?",
            "i [offer|bring] you a [rope|lantern|carpet] in trade.",
            "is barter [allowed|possible]?",
            "shall we [trade|swap]?",
        ),
    ),
    Intent(
        "mend",
        "mended, waiting by the {place}, tab stands at {tab} crowns",
        (
            "are my [boots|nets|oars] [mended|repaired] yet?",
            "did you [mend|repair] my [boots|nets|oars]?",
            "is the repair [done|finished]?",
        ),
    ),
    Intent(
        "order",
        "your favourite {favourite}, packed, waiting by the {place}",
        (
            "is my [weekly|usual] order [ready|packed]?",
            "where can i [fetch|collect] my order?",
            "did you put my [weekly|usual] things aside?",
            "i am here to [fetch|collect] what i ordered.",
        ),
    ),
    Intent(
        "delivery",
        "the cart came early, all waiting by the {place}",
        (
            "has the cart [come|arrived] [yet|today]?",
            "where did the cart leave my [sacks|crates]?",
            "have my [sacks|crates|barrels] been delivered?",
            "when does the delivery [come|arrive]?",
        ),
    ),
    Intent(
        "parcel",
        "parcel waiting by the {place}, see you on {meeting}",
        (
            "is there [a parcel|some post|a letter] for me?",
            "did the [ship|mail] bring [a|my] parcel?",
            "has my [parcel|letter] [come|arrived]?",
            "any [post|letter] for me?",
        ),
    ),
    Intent(
        "help",
        "i bring the tools, see you on {meeting}",
        (
            "[could|can|will] you help me [move a cupboard|patch the roof|paint the house]?",
            "i need [help|a hand] with a [leaking roof|broken chair].",
        ),
    ),
    Intent(
        "supper",
        "supper with your favourite {favourite}, see you on {meeting}",
        (
            "[will|would] you [dine|eat] with [me|us]?",
            "shall we have [dinner|supper] together?",
            "will you come over for [dinner|supper]?",
            "you must [dine|eat] at our table!",
        ),
    ),
    Intent(
        "stock",
        "new on the shelf, your favourite {favourite}",
        (
            "what is new [in the shop|this week]?",
            "did [anything|something] new arrive [today|this week]?",
            "show me the [new|latest] goods.",
            "which [goods|wares] are new?",
            "do you have [new|fresh] wares?",
        ),
    ),
    Intent(
        "weather",
        "grey clouds above the harbour, but they will pass",
        (
            "how is the weather [today|out there]?",
            "will it [rain|storm] [today|tonight]?",
            "do i need [a coat|an umbrella] today?",
            "is a storm [near|coming]?",
            "what does the sky say?",
        ),
    ),
    Intent(
        "hours",
        "this shop opens at sunrise and closes at nightfall",
        (
            "when do you [open|close|shut]?",
            "[what|which] hours is the shop open?",
            "how [late|long] are you open [today|tonight]?",
            "at what time does the shop [open|close]?",
        ),
    ),
)

SMALL_TALK: tuple[SmallTalk, ...] = (
    SmallTalk("come in and mind the step", ("[may|can] i come in?", "it is only me.", "knock knock!")),
    SmallTalk(
        "what a morning, and what can i do", ("what a [lovely|cold|windy] morning!", "[lovely|cold|windy] out there!")
    ),
    SmallTalk("busy hands, happy heart", ("how are you [today|this morning]?", "you look [busy|happy] today!")),
)


def expand(patterns: Iterable[str]) -> tuple[str, ...]:
    """Returns every text of some patterns: "[a|b] c" gives "a c" and "b c"."""
    texts: list[str] = []
    for pattern in patterns:
        # Splitting on a captured group puts what is in brackets at the odd places.
        pieces = re.split(r"\[([^]]*)\]", pattern)
        choices = [piece.split("|") if i % 2 else [piece] for i, piece in enumerate(pieces)]
        texts += ["".join(chosen) for chosen in itertools.product(*choices)]
    return tuple(texts)
