"""A local server that speaks the chat protocol, and misbehaves when told to."""

from __future__ import annotations

import collections
import contextlib
import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

KEY = "sk-local-0123456789abcdef"
MODEL = "judge-1"


class Server(ThreadingHTTPServer):
    """Answers by `reply`, a function of the last message's text; first it goes through `script`, one step a request.

    A step is a function of the request's handler (whose `body` is the question) that answers in its own way, or None for an
    ordinary answer.
    """

    def __init__(self, reply: Callable[[str], str], script: list[Callable | None]):
        super().__init__(("127.0.0.1", 0), Handler)
        self.reply, self.script = reply, collections.deque(script)
        self.asked: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        self.lock = threading.Lock()
        self.over = threading.Event()

    @property
    def base(self) -> str:
        """What QAPERSO_API_BASE is to be."""
        return f"http://127.0.0.1:{self.server_port}/v1"

    @property
    def contents(self) -> list[str]:
        """The last message of each request, in their order."""
        return [body["messages"][-1]["content"] for body in self.asked]

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients that have gone are no news."""


class Handler(BaseHTTPRequestHandler):
    """One request; the connection is closed after it, as HTTP/1.0 has it."""

    server: Server

    def do_POST(self) -> None:
        """Reads the question and goes on by the script."""
        self.body = body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            self.server.asked.append(body)
            self.server.keys.append(self.headers["Authorization"])
            step = self.server.script.popleft() if self.server.script else None
        if step is None:
            self.answer(self.server.reply(body["messages"][-1]["content"]))
        else:
            step(self)

    def answer(self, text: str | None) -> None:
        """An ordinary answer: 10 prompt tokens, 3 completion tokens."""
        message = {"role": "assistant", "content": text}
        usage = {"prompt_tokens": 10, "completion_tokens": 3, "total_tokens": 13}
        choices = [{"index": 0, "message": message, "finish_reason": "stop"}]
        self.send(200, {"id": "x", "object": "chat.completion", "created": 0, "choices": choices, "usage": usage})

    def send(self, status: int, body: Any, missing: int = 0, kind: str = "application/json", **headers: str) -> None:
        """A response; `missing` bytes of the announced ones never come."""
        data = body if isinstance(body, bytes) else (body if isinstance(body, str) else json.dumps(body)).encode()
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(data) + missing))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: Any) -> None:
        """Says nothing."""


def error(status: int, message: str = "told to", **headers: str) -> Callable:
    """A step: an error as such servers word them; `param` and `code` go into the body."""
    body = {"message": message, **{name: headers.pop(name) for name in ("param", "code") if name in headers}}
    return lambda handler: handler.send(status, {"error": body}, **headers)


def raw(body: Any, **how: Any) -> Callable:
    """A step: status 200 and this body."""
    return lambda handler: handler.send(200, body, **how)


def hang_up(handler: Handler) -> None:
    """A step: not a word, and the connection is closed."""


def hang(handler: Handler) -> None:
    """A step: nothing comes until the server is taken down."""
    handler.server.over.wait(30)


@contextlib.contextmanager
def serving(reply: Callable[[str], str] = lambda text: "fine", script: list[Callable | None] = ()) -> Iterator[Server]:
    """A running server."""
    server = Server(reply, list(script))
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield server
    finally:
        server.over.set()
        server.shutdown()
        thread.join()
        server.server_close()
