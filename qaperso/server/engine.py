"""The thread that owns the device: it steps the batch, and between two steps does what it was told.

Everything reaches it as a command in one queue, in order; what it has to say goes back through `post`, which runs a function in
the event loop's thread. So neither side ever waits for the other, and the batch is touched by one thread only.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import queue
import threading
import time
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
from absl import logging
from jaxtyping import Float

from qaperso import generate, people, reply
from qaperso.batching import Batcher, Model, Progress
from qaperso.data.store import STRANGER_NAME
from qaperso.data.text import Encoded
from qaperso.generate import Sampling
from qaperso.server.meters import Meters
from qaperso.server.protocol import ApiError, Limits
from qaperso.types import STRANGER

# Seconds that a step is to take: how often streams hear of new tokens, and how long a newcomer waits for a free slot.
PACE = 0.05


@dataclasses.dataclass(eq=False)
class Ticket:
    """A reply that was asked for.

    Attributes:
      prompt, row, sampling: what is to be drawn.
      deliver: gets each `Progress`, or the error that ends the reply, in the event loop's thread.
    """

    prompt: Encoded
    row: int
    sampling: Sampling
    deliver: Callable[[Progress | ApiError], None]
    handle: int = -1
    begun: bool = False


class Engine:
    """A model and its batch, in a thread of their own."""

    def __init__(self, model: Model, limits: Limits, meters: Meters, post: Callable[[Callable[[], None]], Any]):
        """Makes an engine that does nothing until it is started.

        Args:
          model: from `batching.prepare`.
          limits: of the server.
          meters: where steps are counted.
          post: runs a function in the event loop's thread, from any thread.
        """
        self.model = model
        self.ready = threading.Event()
        self.failed: BaseException | None = None
        self._stopping = threading.Event()
        self._limits, self._meters, self._post = limits, meters, post
        # As long as the longest request can be: the memory is taken once, and every step is the same program.
        longest = generate.bucket(model.run.config.batch.length + limits.tokens)
        self._batcher = Batcher(model, limits.slots, longest)
        self._commands: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._tickets: dict[int, Ticket] = {}
        # Held while `failed` is set or a command is put, so that none comes after the last look at the queue.
        self._taking = threading.Lock()
        self._token_seconds = PACE
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self) -> None:
        """Starts the thread; `ready` is set once its programs are compiled."""
        self._thread.start()

    def stop(self) -> None:
        """Ends the thread after the step under way, or the program that is being compiled; replies that are not finished stay so."""
        self._stopping.set()
        self._commands.put(None)
        self._thread.join()

    @property
    def alive(self) -> bool:
        """Whether the thread does its work."""
        return self._thread.is_alive() and self.failed is None

    def submit(self, ticket: Ticket) -> None:
        """Asks for a reply; for the event loop's thread."""
        if not self._put(lambda: self._submit(ticket)):
            ticket.deliver(_gone())

    def cancel(self, ticket: Ticket) -> None:
        """Gives a reply up; nothing more is delivered but what is on its way. Does nothing to one that is finished."""
        self._put(lambda: self._drop([ticket]))

    def call(self, function: Callable[[], Any]) -> concurrent.futures.Future:
        """Runs a function between two steps; its result or error comes in the future, `ApiError` 500 where the engine has failed."""
        future: concurrent.futures.Future = concurrent.futures.Future()

        def run() -> None:
            if future.set_running_or_notify_cancel():
                try:
                    if self.failed is not None:
                        raise _gone()
                    future.set_result(function())
                except Exception as error:
                    future.set_exception(error)

        if not self._put(run):
            run()
        return future

    def set_row(self, row: int, vector: Float[np.ndarray, " D"]) -> concurrent.futures.Future:
        """Changes a querier's row for whoever is admitted from now on."""
        return self.call(lambda: self._set_row(row, vector))

    def forget_row(self, row: int) -> concurrent.futures.Future:
        """Ends the replies that are written for a row, and makes it the stranger's."""
        return self.call(lambda: self._forget_row(row))

    def _run(self) -> None:
        try:
            self._warm_up()
            if not self._stopping.is_set():
                self.ready.set()
            while self._obey():
                if self._batcher.busy:
                    self._step()
        except BaseException as error:
            # Out of memory, a lost device: whoever waits is told, and readiness with health says it to the rest.
            logging.exception("the engine stopped")
            with self._taking:
                self.failed = error
            self.ready.clear()
            self._give_up()

    def _put(self, command: Callable[[], None]) -> bool:
        """Puts a command into the queue; False where the engine has failed, and nobody would read it."""
        with self._taking:
            if self.failed is None:
                self._commands.put(command)
            return self.failed is None

    def _give_up(self) -> None:
        """Tells all who wait, those as well whose command was still in the queue."""
        begun, self._tickets = self._tickets, {}
        while not self._commands.empty():
            # Of a reply that is asked for the ticket is kept, to be told; a call hears it in its future.
            if (command := self._commands.get()) is not None:
                command()
        self._tell([(ticket, _gone()) for ticket in (*begun.values(), *self._tickets.values())])

    def _obey(self) -> bool:
        """Does what came in; waits for something where there is nothing to write. False = stop."""
        wait = not self._batcher.busy
        while True:
            try:
                command = self._commands.get(block=wait)
            except queue.Empty:
                return True
            if command is None:
                return False
            command()
            wait = False

    def _step(self) -> None:
        stride = max(1, min(generate.STRIDE, int(PACE / self._token_seconds)))
        start = time.monotonic()
        found = self._batcher.step(stride)
        took = time.monotonic() - start
        self._meters.steps.observe(took)
        told, read = [], False
        for progress in found:
            ticket = self._tickets[progress.handle]
            read, ticket.begun = read or not ticket.begun, True
            if progress.finished:
                del self._tickets[progress.handle]
            told.append((ticket, progress))
        if not read:  # what prompts take says nothing of what tokens take
            drawn = max(len(progress.tokens) for progress in found)
            self._token_seconds += 0.2 * (took / max(drawn, 1) - self._token_seconds)
        self._tell(told)
        self._gauge()

    def _submit(self, ticket: Ticket) -> None:
        ticket.handle = self._batcher.submit(ticket.prompt, ticket.row, ticket.sampling)
        self._tickets[ticket.handle] = ticket
        self._gauge()

    def _drop(self, tickets: list[Ticket]) -> None:
        for ticket in tickets:
            if self._tickets.pop(ticket.handle, None) is not None:
                self._batcher.cancel(ticket.handle)
                self._meters.cancelled.inc()
        self._gauge()

    def _gauge(self) -> None:
        running = self._limits.slots - max(self._batcher.free, 0)
        self._meters.running.set(running)
        self._meters.waiting.set(max(-self._batcher.free, 0))

    def _tell(self, told: list[tuple[Ticket, Progress | ApiError]]) -> None:
        if told:
            self._post(lambda: [ticket.deliver(what) for ticket, what in told])

    def _set_row(self, row: int, vector: Float[np.ndarray, " D"]) -> None:
        self.model = dataclasses.replace(
            self.model, trained=people.with_row(self.model.trained, row, jnp.asarray(vector))
        )
        self._batcher.model = self.model

    def _forget_row(self, row: int) -> None:
        gone = ApiError(409, "the querier was forgotten while this was answered", "querier_forgotten", "user")
        tickets = [ticket for ticket in self._tickets.values() if ticket.row == row]
        self._tell([(ticket, gone) for ticket in tickets])
        self._drop(tickets)
        if "rows" in self.model.trained.get("tower", {}):
            self._set_row(row, np.asarray(people.table_of(self.model.trained)[STRANGER]))

    def _warm_up(self) -> None:
        """Compiles what requests need, a program for each bucket of prompts and the step, and times the step."""
        run = self.model.run
        length, size = run.config.batch.length, generate.bucket(1)
        # Soft tokens, where the method has such, are made of what is looked up, and make other programs.
        columns = run.columns(reply.question(run, [], STRANGER_NAME, "", run.registry.responders[0]))
        while True:
            count = min(size, length)
            prompt = Encoded(*np.zeros((2, count), np.int32), np.zeros(count, bool), columns=columns)
            self._batcher.submit(prompt, STRANGER, Sampling(2, 1.0, 0.9))
            while self._batcher.busy:
                self._batcher.step()
            if size >= length or self._stopping.is_set():
                break
            size *= 2
        handle = self._batcher.submit(prompt, STRANGER, Sampling(self._limits.tokens))
        self._batcher.step()
        start = time.monotonic()
        self._batcher.step()
        self._token_seconds = max(time.monotonic() - start, 1e-4)
        self._batcher.cancel(handle)  # the release of a slot is a program too


def _gone() -> ApiError:
    return ApiError(500, "the engine has stopped; the server needs a restart", "engine_failed")
