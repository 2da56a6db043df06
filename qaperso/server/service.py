"""A run in service: questions in, pieces of replies out, for the one thread of the event loop."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import dataclasses
import functools
import math
import secrets
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import anyio
import numpy as np

from qaperso import people, reply, rows
from qaperso.batching import Model, Progress, prepare
from qaperso.data import load
from qaperso.data.store import STRANGER_NAME, Registry, Store
from qaperso.errors import UserError
from qaperso.eval import retrieval
from qaperso.generate import Sampling
from qaperso.people import Person
from qaperso.run import Run
from qaperso.server import protocol
from qaperso.server.engine import Engine, Ticket
from qaperso.server.keys import Caller, Keys
from qaperso.server.meters import Meters
from qaperso.server.protocol import ApiError, Chat, Defaults, Embed, Enrol, Json, Limits
from qaperso.server.roster import Roster
from qaperso.server.text import Stops
from qaperso.types import STRANGER, Dialogue

Tree = Any
# Weight of the newest reply in the mean duration, by which a full queue says when to come again.
RECENT = 0.1


@dataclasses.dataclass(frozen=True)
class Piece:
    """A part of a reply; `finish` is "stop" or "length" in its last one, which tells the tokens of prompt and reply, and how many
    of the dialogue's tokens were cut from the prompt."""

    text: str
    finish: str | None = None
    prompt: int = 0
    tokens: int = 0
    cut: int = 0


class Service:
    """What the handlers share: the engine, who is known, who is let in, and how much at a time."""

    def __init__(self, run: Run, trainable: Tree, step: int, keys: Keys, limits: Limits):
        """Takes a run into service.

        Args:
          run: opened.
          trainable: its trained parameters.
          step: of the checkpoint they are from.
          keys: who is let in.
          limits: what is taken.

        Raises:
          UserError: the files of enrolled queriers do not fit the run, or its method asks a language model before each reply.
        """
        if run.setting.notes is not None:
            raise UserError(
                f"{run.workdir}: config.method='{run.config.method}' asks a language model about every new query before its reply,"
                " which the server does not do; serve a run of another method, or use python -m qaperso.chat"
            )
        table = trainable.get("tower", {}).get("rows")
        self.rows, self.embeds, self.history = (
            table is not None,
            "heads" in trainable,
            run.method.reads_history(run.setting),
        )
        self.keys, self.limits, self.meters, self.step = keys, limits, Meters(), step
        self.folder: Path = run.workdir
        weights = "" if table is None else people.digest(trainable)
        table = None if table is None else np.asarray(table)
        self.roster = Roster(run.registry, table, run.workdir, step, weights, self.history)
        g = run.config.generate
        self.defaults = Defaults(min(g.max_new_tokens, limits.tokens), g.temperature, g.top_p)
        self.created = int(time.time())
        name = run.workdir.resolve().name
        self.models = {f"{name}/{responder}": responder for responder in run.registry.responders}
        later = tuple(self.roster.enrolled.values())
        self._model: Model = prepare(run, people.placed(trainable, later, step, run.workdir))
        # Only fits and embeddings need the weights as training has them: a second copy.
        self._whole = (run, trainable) if self.rows or self.embeds else None
        self.meters.enrolled.set(len(self.roster.enrolled))
        # As it is without those who were enrolled, and with them: what prompts are made with.
        self._plain = self._model.run
        self.run = rows.heard(self._plain, later)
        self.engine: Engine | None = None
        self.draining = False
        self._admitted = 0
        self._reply_seconds = 1.0
        self._fitting = asyncio.Lock()

    def start(self, post: Callable[[Callable[[], None]], Any]) -> None:
        """Starts the engine, which compiles its programs before it is ready; `post` as it says."""
        self.engine = Engine(self._model, self.limits, self.meters, post)
        self.engine.start()

    def stop(self) -> None:
        """Ends the engine."""
        self.engine.stop()

    @property
    def ready(self) -> bool:
        """Whether requests are taken."""
        return self.engine is not None and self.engine.ready.is_set() and self.engine.alive and not self.draining

    def responder(self, model: str) -> str:
        """Who answers under a model's name.

        Raises:
          ApiError: 404: no model has it.
        """
        if model not in self.models:
            shown = ", ".join(list(self.models)[:4])
            raise ApiError(
                404,
                f"model '{model[:64]}' is not served here; GET /v1/models lists: {shown}",
                "model_not_found",
                "model",
            )
        return self.models[model]

    def listed_models(self) -> list[Json]:
        """The models, one a responder."""
        more = {
            "embeddings": self.embeds,
            "enrol": self.rows or self.history,
            "max_tokens": self.limits.tokens,
            "defaults": dataclasses.asdict(self.defaults),
        }
        fixed = {"object": "model", "created": self.created, "owned_by": "qaperso", "step": self.step}
        return [{"id": name, **fixed, "responder": who, **more} for name, who in self.models.items()]

    @contextlib.contextmanager
    def place(self) -> Iterator[None]:
        """Takes one of the places that requests for the device share; it is free again at the end.

        Raises:
          ApiError: 429: all are taken; 503: the server is not ready.
        """
        if not self.ready:
            what = "is shutting down" if self.draining else "is not ready yet" if self.engine.alive else "has failed"
            raise ApiError(503, f"the server {what}", "not_ready", headers={"Retry-After": "2"})
        if self._admitted >= self.limits.slots + self.limits.queue:
            self.meters.rejected.inc()
            # When the last of those who wait for a slot will have got one.
            seconds = self._reply_seconds * self.limits.queue / self.limits.slots
            after = str(min(max(math.ceil(seconds), 1), 30))
            raise ApiError(429, "all places are taken; try again later", "queue_full", headers={"Retry-After": after})
        self._admitted += 1
        try:
            yield
        finally:
            self._admitted -= 1

    async def speak(self, asked: Chat, caller: Caller) -> AsyncIterator[Piece]:
        """The pieces of a reply; closing the iterator gives the reply up.

        Raises:
          ApiError: nobody answers under that name, nobody asks under that one, the question is too long, or all places are taken.
        """
        responder = self.responder(asked.model)
        self.roster.row(asked.querier, caller)
        with self.place():
            turns = protocol.turns_of(asked.messages, asked.querier, responder)
            question = reply.question(self.run, turns[:-1], asked.querier, turns[-1].text, responder)
            try:
                prompt = await anyio.to_thread.run_sync(reply.make_prompt, self.run, question)
            except UserError as error:
                raise protocol.wrong(str(error), "messages", "context_length_exceeded") from error
            seed = secrets.randbits(32) if asked.seed is None else asked.seed
            how = Sampling(asked.tokens, asked.temperature, asked.top_p, seed)
            events: asyncio.Queue[Progress | ApiError] = asyncio.Queue()
            # Looked up in the moment of asking: the querier may have been forgotten meanwhile, and their row another's.
            ticket = Ticket(prompt, self.roster.row(asked.querier, caller), how, events.put_nowait)
            self.engine.submit(ticket)
            self.meters.tokens.labels("prompt").inc(len(prompt.tokens))
            start, begun = time.monotonic(), None
            pieces, stops, drawn, finished = reply.Pieces(self.run), Stops(asked.stop), 0, False
            try:
                while not finished:
                    event = await events.get()
                    if isinstance(event, ApiError):
                        finished = True
                        raise event
                    if begun is None:
                        begun = time.monotonic()
                        self.meters.first.observe(begun - start)
                    drawn, finished = drawn + len(event.tokens), event.finished
                    self.meters.tokens.labels("reply").inc(len(event.tokens))
                    text, stopped = stops.add(pieces.add(event.tokens, finished), finished)
                    if stopped or finished:
                        why = "length" if not stopped and drawn == asked.tokens else "stop"
                        yield Piece(text, why, len(prompt.tokens), drawn, prompt.cut)
                        return
                    if text:
                        yield Piece(text)
            finally:
                if not finished:
                    self.engine.cancel(ticket)
                if begun is not None:
                    self._reply_seconds += RECENT * (time.monotonic() - begun - self._reply_seconds)

    async def embed(self, asked: Embed) -> tuple[list[Any], int]:
        """Representations of dialogues, and how many tokens they have.

        As in evaluation they are made with the stranger's row, whoever asks: the representation says what the dialogue is like.

        Raises:
          ApiError: 400: the run makes none, or a dialogue does not fit; 404, 429, 503 as `speak`.
        """
        responder = self.responder(asked.model)
        if not self.embeds:
            raise protocol.wrong(
                "the model makes no representations: it was trained without contrast", "model", "unsupported_value"
            )
        run, trainable = self._whole
        said = [protocol.dialogue_of(spoken, STRANGER_NAME, responder, i) for i, spoken in enumerate(asked.dialogues)]
        store = _store(said, run.registry)
        with self.place():
            lengths = [await anyio.to_thread.run_sync(_length, run, dialogue) for dialogue in store.dialogues]
            for i, length in enumerate(lengths):
                if not length:
                    message = f"'input[{i}]' is longer than the model's {run.room} tokens; shorten it"
                    raise protocol.wrong(message, "input", "context_length_exceeded")
            names = "masked" if run.config.data.names == "masked" else "visible"
            indices = np.arange(len(lengths))
            future = self.engine.call(lambda: retrieval.embed(run, trainable, store, indices, names))
            found = await asyncio.wrap_future(future)
        vectors = found.vectors.astype(np.float32)
        if asked.base64:
            return [base64.b64encode(v.astype("<f4").tobytes()).decode() for v in vectors], sum(lengths)
        return vectors.tolist(), sum(lengths)

    async def enrol(self, asked: Enrol) -> Json:
        """Makes somebody new known, by a row that is fitted, by their dialogues as history, or both; one at a time.

        Raises:
          ApiError: 400: no dialogue fits a row; 409: name taken or no row left; 429: another one is under way; 503: the folder
            of enrolled queriers cannot be written.
        """
        responder = self.responder(asked.model)
        async with self._alone():
            with self.place():
                row, done = self.roster.reserve(asked.name), False
                try:
                    start = time.monotonic()
                    said = _said(asked, responder)
                    kept = said if self.history else ()
                    person = self.roster.person(asked.name, row, None, kept)
                    run = await anyio.to_thread.run_sync(self._heard, person)
                    if self.rows:
                        vector = await anyio.to_thread.run_sync(self._fit, said, run)
                        await asyncio.wrap_future(self.engine.set_row(row, vector))
                        person = self.roster.person(asked.name, row, vector, kept)
                    with _written():
                        self.roster.add(person)
                    self.run, done = run, True
                finally:
                    if not done:
                        self.roster.release(row)
        self.meters.enrolled.set(len(self.roster.enrolled))
        return self._entry(asked, start)

    async def tell(self, asked: Enrol) -> Json:
        """Adds dialogues to the history of somebody who was enrolled; the next question sees them.

        Raises:
          ApiError: 404, 409: see `Roster.of`, or the model reads no history; 429, 503: as `enrol`.
        """
        responder = self.responder(asked.model)
        if not self.history:
            message = "the model reads no history: forget and enrol again, with all dialogues, to fit the row anew"
            raise ApiError(409, message, "no_history", "name")
        async with self._alone():
            with self.place():
                start, old = time.monotonic(), self.roster.of(asked.name)
                said = people.numbered((*old.dialogues, *_said(asked, responder)), old.row)
                person = dataclasses.replace(old, dialogues=said)
                run = await anyio.to_thread.run_sync(self._heard, person)
                # The name may have been struck meanwhile.
                self.roster.of(asked.name)
                with _written():
                    self.roster.change(person)
                self.run = run
        return self._entry(asked, start)

    def _entry(self, asked: Enrol, start: float) -> Json:
        entry = next(q for q in self.roster.listed(Caller()) if q["id"] == asked.name)
        return {**entry, "dialogues": len(asked.dialogues), "seconds": round(time.monotonic() - start, 3)}

    @contextlib.asynccontextmanager
    async def _alone(self) -> AsyncIterator[None]:
        if self._fitting.locked():
            raise ApiError(
                429, "somebody else is being enrolled; try again later", "enrolling", headers={"Retry-After": "5"}
            )
        async with self._fitting:
            yield

    def _heard(self, person: Person) -> Run:
        """The run with those who were enrolled and somebody new, or somebody changed."""
        return rows.heard(self._plain, tuple({**self.roster.enrolled, person.name: person}.values()))

    def _fit(self, said: Sequence[Dialogue], heard: Run) -> np.ndarray:
        run, trainable = self._whole
        run = dataclasses.replace(run, store=heard.store, reader=heard.reader)
        store = _store(said, run.registry)
        try:
            # Every reply says something of the querier.
            encode = functools.partial(run.encode, labels="all")
            examples, left_out = load.encode_split(store, np.arange(len(store.dialogues)), encode, run.shape, "all")
        except UserError as error:
            raise protocol.wrong(str(error), "dialogues", "context_length_exceeded") from error
        if left_out:
            message = f"{left_out} replies are longer, with their queries, than the model's {run.room} tokens"
            raise protocol.wrong(message, "dialogues", "context_length_exceeded")
        return np.asarray(rows.fit_row(run, trainable, examples), np.float32)

    async def forget(self, name: str) -> None:
        """Strikes somebody who was enrolled here: name and row are gone, and replies to them that are under way end.

        Raises:
          ApiError: 404, 409: see `Roster.remove`; 503: the folder of enrolled queriers cannot be written.
        """
        with _written():
            row = self.roster.remove(name)
        self.meters.enrolled.set(len(self.roster.enrolled))
        # Whoever is being enrolled was given a history that still has theirs.
        async with self._fitting:
            self.run = await anyio.to_thread.run_sync(rows.heard, self._plain, tuple(self.roster.enrolled.values()))
        await asyncio.wrap_future(self.engine.forget_row(row))
        self.roster.release(row)


@contextlib.contextmanager
def _written() -> Iterator[None]:
    try:
        yield
    except (OSError, UserError) as error:
        why = error.strerror if isinstance(error, OSError) else error
        raise ApiError(503, f"nothing was changed: {why}", "not_written") from error


def _said(asked: Enrol, responder: str) -> tuple[Dialogue, ...]:
    """The dialogues of a request, each a conversation of its own that took place now."""
    found = (protocol.dialogue_of(spoken, asked.name, responder, i) for i, spoken in enumerate(asked.dialogues))
    return tuple(dataclasses.replace(d, group=secrets.token_hex(8), time=time.time()) for d in found)


def _store(dialogues: Sequence[Dialogue], registry: Registry) -> Store:
    """Dialogues of a request as data of no split; their queriers count as strangers."""
    count = len(dialogues)
    number = np.array([registry.responders.index(d.responder) for d in dialogues], np.int32)
    nothing = np.zeros(count, np.int32)
    names = np.zeros(0, np.int32)
    classes = {key: names for key in ("responder", "querier", "cluster")}
    stranger, none = np.full(count, STRANGER, np.int32), np.full(count, -1, np.int32)
    return Store(tuple(dialogues), registry, stranger, number, nothing, np.arange(count, dtype=np.int32), classes, none)


def _length(run: Run, dialogue: Any) -> int:
    """Tokens of a dialogue as the model reads it, 0 where it does not fit."""
    return sum(len(e.tokens) for e in run.encode(dialogue))
