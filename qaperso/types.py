"""The records that flow from raw files to losses."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import flax.struct
import numpy as np

# Roles of tokens.
TEMPLATE, RESPONDER, QUERIER = 0, 1, 2

# The querier row of somebody the model has never met.
STRANGER = 0


@dataclasses.dataclass(frozen=True)
class Turn:
    """One utterance."""

    speaker: str
    text: str


@dataclasses.dataclass(frozen=True)
class Message:
    """One message as a file has it; `speaker` is None where nobody in particular says it."""

    speaker: str | None
    text: str
    time: float | None = None


@dataclasses.dataclass(frozen=True)
class Conversation:
    """Messages of any number of speakers, in order: what most readers give.

    Attributes:
      name: unique within its file.
      messages: as they came, without those that hold no text of a person's.
      group: what must never straddle a split; it is cut further where the messages have times and long silences.
      split: as given by the data.
      fields: whatever else the source says about it.
    """

    name: str
    messages: tuple[Message, ...]
    group: str
    split: str | None = None
    fields: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Dialogue:
    """Two-party dialogue whose last turn is the responder's.

    Attributes:
      id: unique name, stable across runs.
      responder: who answers; the speaker of the last turn.
      querier: who asks.
      turns: at least one turn; `turns[-1].speaker == responder`.
      group: what must never straddle a split (scene, episode, conversation, day).
      time: seconds since the epoch where known.
      split: "train", "dev", "test" or "unseen" once split, or as given by the data.
      replies: which turns are replies that are learned and scored, each once in all data; () = the last one only.
      fields: whatever else the source says about it (a given cluster, the ground truth of the embedded world, ...).
    """

    id: str
    responder: str
    querier: str
    turns: tuple[Turn, ...]
    group: str
    time: float | None = None
    split: str | None = None
    replies: tuple[int, ...] = ()
    fields: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def until(self, reply: int) -> Dialogue:
        """The dialogue up to turn number `reply`, the responder's, which is blank: it is what is asked for."""
        return dataclasses.replace(self, turns=(*self.turns[:reply], Turn(self.responder, "")), replies=())

    @property
    def query(self) -> str:
        """The querier's last turn, "" when the responder speaks unasked."""
        return next((t.text for t in reversed(self.turns[:-1]) if t.speaker == self.querier), "")

    @property
    def reply(self) -> str:
        """The responder's last turn: what a model is to produce."""
        return self.turns[-1].text


@dataclasses.dataclass(frozen=True)
class Example:
    """A tokenised dialogue on the host, or one of the sequences that a long one makes.

    Attributes:
      tokens: int32[n].
      role: int32[n], TEMPLATE, RESPONDER or QUERIER.
      predicted: bool[n]; whether token i is a label (predicted from token i - 1).
      querier, responder, cluster: ids of the store; querier is the true one, not the row the model gets.
      text: id of the dialogue's text; two dialogues with equal text share it.
      label: its class (responder, querier, cluster), -1 where training has none such.
      index: place of the dialogue in the store; its sequences share it, and `text`, so they are no partners in contrast.
      cut: how many tokens did not fit.
      columns: what its method looked up for it, by name: arrays, or what becomes one in a batch (`data.vectors.Rows`).
    """

    tokens: np.ndarray
    role: np.ndarray
    predicted: np.ndarray
    querier: int
    responder: int
    cluster: int
    text: int
    label: int
    index: int
    cut: int = 0
    columns: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.tokens)


@flax.struct.dataclass
class Inputs:
    """What the towers read: B rows of S tokens that hold up to M dialogues each."""

    tokens: Any  # int32[B, S]
    segment: Any  # int32[B, S]: 1..M, 0 = padding
    position: Any  # int32[B, S]: counted within the dialogue
    role: Any  # int32[B, S]
    attend: Any  # bool[B, S]: keys that may be attended to; segment > 0 in every default
    querier: Any  # int32[B, M]: the row the specific tower gets; STRANGER where dropped
    responder: Any  # int32[B, M]
    cluster: Any  # int32[B, M]
    present: Any  # bool[B, M]: whether there is an m-th dialogue in the row
    # What the method looked up, {name: [B, M, ...]}; empty for a method that looks nothing up.
    columns: Any = dataclasses.field(default_factory=dict)


@flax.struct.dataclass
class Contrast:
    """What says who is compared with whom; see `data/contrast.py`."""

    label: Any  # int32[B, M]: class (responder, querier, cluster) of the dialogue, -1 = not contrasted
    text: Any  # int32[B, M]: id of the dialogue's text


@flax.struct.dataclass
class Batch:
    """Inputs and what is to be learned from them; T predicted positions a row at most."""

    inputs: Inputs
    target_index: Any  # int32[B, T]: the position whose output predicts
    target: Any  # int32[B, T]: the token predicted there
    weight: Any  # float32[B, T]: 0 = no prediction
    contrast: Contrast | None
