"""Requests that mean no good: each gets an answer below 500 or a closed connection, and the server goes on for the others."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import json
import socket
import time
from collections.abc import Iterator
from typing import Any
from urllib.parse import quote

import hypothesis
import jax.numpy as jnp
import pytest
import schemathesis
import serving
from schemathesis import GenerationMode
from schemathesis.specs.openapi.checks import positive_data_acceptance
from serving import Served

from qaperso import rows
from qaperso.server import api

CHAT = "/v1/chat/completions"
# Strategies of a whole API's bodies take their time, are filtered, and may be large.
SLOW = list(hypothesis.HealthCheck)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with serving.serving(tmp_path_factory.mktemp("hostile") / "town") as found:
        yield found


@pytest.fixture(autouse=True)
def unharmed(served: Served) -> Iterator[None]:
    """After each attack: nobody was told of a fault of the server's, nothing is held, and it answers."""
    yield
    assert served.ask("GET", "/healthz") == (200, {"status": "ok"}) and served.ask("GET", "/readyz")[0] == 200
    assert served.chat("good day", max_tokens=2)[0] == 200
    serving.wait(lambda: served.service._admitted == 0)
    counted = served.service.meters.requests.collect()[0].samples
    assert not [s for s in counted if s.labels["status"].startswith("5")]


def raw(served: Served, data: bytes, seconds: float = 20) -> bytes:
    """All that comes back for some bytes."""
    with socket.create_connection(("127.0.0.1", served.port)) as client:
        client.settimeout(seconds)
        with contextlib.suppress(ConnectionError):
            client.sendall(data)
        text = b""
        with contextlib.suppress(ConnectionError):
            while more := client.recv(65536):
                text += more
        return text


def status_of(answer: bytes) -> int:
    return int(answer.split(b" ", 2)[1])


def post(body: bytes, *headers: str, path: str = CHAT, length: int | None = None) -> bytes:
    """A request as bytes."""
    more = "".join(f"{header}\r\n" for header in headers)
    size = len(body) if length is None else length
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Type: application/json\r\n{more}"
    return f"{head}Content-Length: {size}\r\n\r\n".encode() + body


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b"", 400),
        (b"null", 400),
        (b'{"messages": "\xff\xfe"}', 400),
        (b'{"user": "\\ud800"}', 400),
        (b"[" * 60_000, 400),
        (b'{"seed": ' + b"9" * 10_000 + b"}", 400),
        (b'{"temperature": 1e999}', 400),
        (b'{"' + b"x" * 60_000 + b'": 1}', 400),
        (b"x" * 65_537, 413),
        (b"x" * 1_000_000, 413),
        (json.dumps({"messages": [{"role": "user", "content": "bread " * 1_000_000}]}).encode(), 413),
    ],
)
def test_bodies(served: Served, body: bytes, status: int) -> None:
    for path in (CHAT, "/v1/embeddings", "/v1/queriers"):
        answer = raw(served, post(body, path=path))
        # Of a body that is far too long the connection may be closed before its sender has heard why.
        assert (not answer and len(body) > 16 * serving.LIMITS.body) or status_of(answer) == status
        assert not answer or json.loads(answer.split(b"\r\n\r\n", 1)[1])["error"]["message"]


def test_prompts_that_are_too_long(served: Served) -> None:
    status, answer = served.chat("bread " * 10_000)
    assert (
        status == 400
        and answer["error"]["code"] == "context_length_exceeded"
        and "shorten" in answer["error"]["message"]
    )
    # An old turn is cut, and that is said.
    messages = [
        {"role": "user", "content": "bread " * 60},
        {"role": "assistant", "content": "ahoy"},
        {"role": "user", "content": "good day"},
    ]
    body = {"model": served.model, "messages": messages, "max_tokens": 2}
    status, answer = served.ask("POST", CHAT, body)
    assert status == 200 and answer["usage"]["cut_tokens"] > 40


@pytest.mark.parametrize(
    "name", ["../../etc/passwd", "/etc/passwd", "..\\..", "%2e%2e", "<script>", "tilda\x00", "' or 1=1", "🙂" * 64]
)
def test_names(served: Served, name: str) -> None:
    status, answer = served.chat("good day", user=name)
    assert status == 404 and answer["error"]["code"] == "querier_not_found"
    for path in ("/v1/queriers/../../etc/passwd", "/v1/queriers/%2e%2e%2fetc", "/v1/queriers/%ff%fe", "/v1/queriers/"):
        assert served.ask("DELETE", path)[0] == 404
    assert not list(served.service.folder.iterdir())


@pytest.mark.parametrize("value", [None, True, 1, -1.5, "x", [], {}, [[]], [{}], [None], {"role": "user"}])
def test_types(served: Served, value: Any) -> None:
    good = {"model": served.model, "messages": [{"role": "user", "content": "good day"}], "max_tokens": 1}
    for key in (
        "model",
        "messages",
        "user",
        "max_tokens",
        "temperature",
        "top_p",
        "seed",
        "stop",
        "stream",
        "stream_options",
        "n",
    ):
        assert served.ask("POST", CHAT, good | {key: value})[0] in (200, 400, 404)
    for path, keys in (("/v1/embeddings", ("model", "input")), ("/v1/queriers", ("name", "model", "dialogues"))):
        assert served.ask("POST", path, dict.fromkeys(keys, value))[0] in (400, 404)


def test_paths_methods_and_kinds(served: Served) -> None:
    for path in ("/nothing", "/v1", "/v1/models/nothing", "/report", "/../../etc/passwd", "/%00", "/v1/models/%2e%2e"):
        status, answer = served.ask("GET", path)
        assert status == 404 and answer["error"]["message"]
    for method in ("PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "GET", "BREW"):
        assert served.ask(method, CHAT)[0] == 405
    answer = served.ask("POST", CHAT, b"a=b", Content_Type="text/plain")
    assert answer[0] == 415
    upgrade = (
        b"GET / HTTP/1.1\r\nHost: x\r\nConnection: Upgrade, close\r\nUpgrade: websocket\r\nSec-WebSocket-Key: x\r\n\r\n"
    )
    assert status_of(raw(served, upgrade)) in (200, 400)


def test_floods_of_headers_and_rubbish(served: Served) -> None:
    many = "".join(f"X-{i}: y\r\n" for i in range(100_000))
    for data in (
        b"GET / HTTP/1.1\r\nHost: x\r\n" + many.encode() + b"\r\n",
        b"GET / HTTP/1.1\r\nHost: x\r\nX: " + b"y" * 10_000_000 + b"\r\n\r\n",
        b"GET /" + b"y" * 1_000_000 + b" HTTP/1.1\r\nHost: x\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" * 10 + b"\r\n\r\n",
        post(b"{}", "Content-Length: 5", "Transfer-Encoding: chunked"),
        post(b"{}", length=-1),
    ):
        answer = raw(served, data)
        assert not answer or 400 <= status_of(answer) < 500


def test_bodies_that_never_end(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(api, "BODY_SECONDS", 0.3)
    start = time.monotonic()
    assert status_of(raw(served, post(b"{", length=10))) == 408
    assert time.monotonic() - start < 10
    head = "POST /v1/embeddings HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n"
    endless = b"10000\r\n" + b"x" * 65_536 + b"\r\n"
    answer = raw(served, head.encode() + endless * 40)
    assert not answer or status_of(answer) == 413


def test_readers_who_are_slow_or_leave(served: Served) -> None:
    body = {"model": served.model, "messages": [{"role": "user", "content": "good day"}], "stream": True}
    data = json.dumps(body).encode()
    clients = []
    for _ in range(4):
        client = socket.create_connection(("127.0.0.1", served.port))
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1)
        client.sendall(post(data))
        clients.append(client)
    # They read nothing; the others are served all the same, and nothing waits for them.
    assert served.chat("good day", max_tokens=4)[0] == 200
    serving.wait(lambda: served.service._admitted == 0)
    for client in clients:
        client.close()
    for _ in range(20):
        client = socket.create_connection(("127.0.0.1", served.port))
        client.sendall(post(data)[: -len(data) // 2])
        client.close()


def test_a_reply_that_takes_too_long_is_given_up(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(served.service, "limits", dataclasses.replace(serving.LIMITS, timeout=2.0))
    step, begun = served.service.engine._batcher.step, []

    def stalled(tokens: int) -> Any:
        # A token, and then nothing until time is over.
        begun.append(time.sleep(2.5 if begun else 0))
        return step(1)

    monkeypatch.setattr(served.service.engine._batcher, "step", stalled)
    status, answer = served.chat("good day", max_tokens=32)
    assert status == 408 and answer["error"]["code"] == "timeout"
    serving.wait(lambda: not served.service.engine._tickets)
    begun.clear()
    status, answer = served.chat("good day", max_tokens=32, stream=True)
    events = serving.lines_of(answer)
    # What was said before time was over was heard.
    assert status == 200 and events[0]["choices"] and events[-1]["error"]["code"] == "timeout"


def mended(body: Any, model: str) -> Any:
    """A body in which what no schema says is right: who answers, who asks, and whose turn comes first and last."""
    dialogues = [
        [{"role": "user", "content": "x"}, *d, {"role": "assistant", "content": "x"}] for d in body.get("dialogues", ())
    ]
    more = {"dialogues": dialogues} if dialogues else {}
    return {k: v for k, v in body.items() if k != "user"} | {"model": model} | more


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["as described", "of a model that is here", "not as described"])
def test_what_the_description_says_is_so(served: Served, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    width = served.service.run.setting.model.embed
    monkeypatch.setattr(rows, "fit_row", lambda run, trainable, examples: jnp.ones(width))  # seconds each
    schema = schemathesis.openapi.from_url(f"{served.base}/openapi.json")
    mode = GenerationMode.NEGATIVE if kind == "not as described" else GenerationMode.POSITIVE
    seen: dict[str, set[int]] = collections.defaultdict(set)

    for result in schema.get_all_operations():
        operation = result.ok()
        # Any text is a name in a path; other than described is what has a body.
        if kind != "as described" and not operation.body:
            continue

        @hypothesis.given(case=operation.as_strategy(generation_mode=mode))
        @hypothesis.settings(max_examples=25, deadline=None, suppress_health_check=SLOW)
        def check(case: Any) -> None:
            if kind == "of a model that is here":
                case.body = mended(case.body, served.model)
            # Whose turn is last, no schema says; and no answer may take longer than this.
            answer = case.call_and_validate(timeout=30, excluded_checks=[positive_data_acceptance])
            seen[case.operation.label].add(answer.status_code)
            if answer.status_code == 201:
                name = quote(case.body["name"], safe="")
                assert served.ask("DELETE", f"/v1/queriers/{name}")[0] == 200

        check()
    assert len(seen) == (10 if kind == "as described" else 3), seen
    if kind == "of a model that is here":
        # Some of it was good, and went all the way.
        assert all(statuses & {200, 201} for statuses in seen.values()), seen
    elif kind == "not as described":
        assert not any(statuses & {200, 201} for statuses in seen.values()), seen
