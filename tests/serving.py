"""A server on a free port, in this process, with an untrained model of the embedded world."""

from __future__ import annotations

import contextlib
import dataclasses
import http.client
import json
import socket
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import untrained

from qaperso import serve
from qaperso.server.keys import Keys
from qaperso.server.protocol import Limits
from qaperso.server.service import Service

PLAIN = dict(method="qar", qar__contrast="in_batch", batch__length=64, batch__targets=32, data__spare_rows=2)
LIMITS = Limits(slots=4, queue=4, tokens=32, body=65_536, timeout=60.0)
OPEN: dict[str, None] = {}


@dataclasses.dataclass(frozen=True)
class Served:
    """A running server."""

    service: Service
    server: serve.Server
    port: int

    @property
    def base(self) -> str:
        """Where it is."""
        return f"http://127.0.0.1:{self.port}"

    @property
    def model(self) -> str:
        """The only model's name."""
        (name,) = self.service.models
        return name

    def ask(self, method: str, path: str, body: Any = None, **headers: str) -> tuple[int, Any]:
        """Status and JSON (or text) of one request; bytes are sent as they are."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=120)
        try:
            data = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
            kind = {} if data is None else {"Content-Type": "application/json"}
            connection.request(method, path, data, {**kind, **{k.replace("_", "-"): v for k, v in headers.items()}})
            answer = connection.getresponse()
            text = answer.read().decode()
            is_json = (answer.headers["Content-Type"] or "").startswith("application/json")
            return answer.status, json.loads(text) if is_json else text
        finally:
            connection.close()

    def chat(self, text: str, **more: Any) -> tuple[int, Any]:
        """One greedy question."""
        body = {"model": self.model, "messages": [{"role": "user", "content": text}], "temperature": 0} | more
        return self.ask("POST", "/v1/chat/completions", body)

    def metric(self, name: str) -> float:
        """A metric without labels."""
        lines = self.service.meters.text().decode().splitlines()
        return float(next(line for line in lines if line.startswith(f"{name} ")).split()[1])


def made(
    folder: Path, limits: Limits = LIMITS, keys: Mapping[str, frozenset[str] | None] = OPEN, **changes: Any
) -> Service:
    """The service of an untrained run whose folder is this one."""
    run, _, trainable = untrained.opened(**(PLAIN | changes))
    folder.mkdir(parents=True, exist_ok=True)
    return Service(dataclasses.replace(run, workdir=folder), trainable, 7, Keys(keys), limits)


@contextlib.contextmanager
def serving(folder: Path, **how: Any) -> Iterator[Served]:
    """A server that is ready; it is drained at the end."""
    service = made(folder, **how)
    server = serve.make_server(service, "127.0.0.1", 0)
    listening = socket.create_server(("127.0.0.1", 0))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
    thread.start()
    try:
        served = Served(service, server, listening.getsockname()[1])
        wait(lambda: service.ready, 300)
        yield served
    finally:
        server.should_exit = True
        thread.join(60)
        assert not thread.is_alive()


def wait(condition: Any, seconds: float = 10) -> None:
    """Waits until something holds."""
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "it never came"
        time.sleep(0.01)


def lines_of(answer: Any) -> list[Any]:
    """The events of a stream."""
    events = [line[6:] for line in answer.splitlines() if line.startswith("data: ")]
    return [event if event == "[DONE]" else json.loads(event) for event in events]
