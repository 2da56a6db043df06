"""The HTTP side of a server: routes, answers, streams, and what happens to clients who leave, stall or send too much."""

from __future__ import annotations

import asyncio
import contextlib
import json
import secrets
import time
from collections.abc import AsyncIterator, Awaitable
from typing import Any, TypeVar

from absl import logging
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import FileResponse, HTMLResponse, JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from qaperso.server import openapi, protocol
from qaperso.server.keys import Caller
from qaperso.server.page import load_page
from qaperso.server.protocol import ApiError, Chat, Json
from qaperso.server.service import Piece, Service

T = TypeVar("T")
# Seconds that a client has to send its request's body.
BODY_SECONDS = 20.0
# A body of up to so many times its limit is read to its end before it is refused, so that the client hears why.
PATIENCE = 16
REPORT_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:; frame-ancestors 'none'"


def make_app(service: Service) -> Starlette:
    """The application of a service; it starts the engine with its own start, and ends it with its end."""
    html, policy = load_page()
    document = openapi.document(service.limits, service.keys.required)

    @contextlib.asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        service.start(asyncio.get_running_loop().call_soon_threadsafe)
        try:
            yield
        finally:
            service.stop()

    async def page(request: Request) -> Response:
        return HTMLResponse(html, headers={"Content-Security-Policy": policy})

    async def report(request: Request) -> Response:
        _caller(service, request).check_unlimited()
        path = service.folder / "report.html"
        if not path.is_file():
            raise ApiError(404, "the run has no report.html; python -m qaperso.evaluate writes it", "not_found")
        return FileResponse(path, headers={"Content-Security-Policy": REPORT_POLICY})

    async def described(request: Request) -> Response:
        return JSONResponse(document)

    async def healthz(request: Request) -> Response:
        alive = service.engine.alive
        return JSONResponse({"status": "ok" if alive else "failed"}, 200 if alive else 503)

    async def readyz(request: Request) -> Response:
        what = "ready" if service.ready else "draining" if service.draining else "starting"
        return JSONResponse({"status": what}, 200 if service.ready else 503)

    async def metrics(request: Request) -> Response:
        _caller(service, request).check_unlimited()
        return Response(service.meters.text(), media_type="text/plain; version=0.0.4")

    async def models(request: Request) -> Response:
        _caller(service, request)
        return JSONResponse({"object": "list", "data": service.listed_models()})

    async def model(request: Request) -> Response:
        _caller(service, request)
        service.responder(request.path_params["model"])
        return JSONResponse(next(m for m in service.listed_models() if m["id"] == request.path_params["model"]))

    async def chat(request: Request) -> Response:
        caller = _caller(service, request)
        asked = protocol.parse_chat(await _body(service, request), service.defaults, service.limits)
        if asked.stream:
            return Stream(service, asked, caller)
        return await _heard(service, request, _whole(service, asked, caller))

    async def embeddings(request: Request) -> Response:
        _caller(service, request)
        asked = protocol.parse_embed(await _body(service, request))
        return await _heard(service, request, _embedded(service, asked))

    async def queriers(request: Request) -> Response:
        caller = _caller(service, request)
        report = (service.folder / "report.html").is_file() and not service.keys.required
        return JSONResponse({"object": "list", "data": service.roster.listed(caller), "report": report})

    async def enrol(request: Request) -> Response:
        _caller(service, request).check_unlimited()
        asked = protocol.parse_enrol(await _body(service, request))
        # Whether the client stays or not: a fit that was begun is ended, and the name is registered.
        return JSONResponse(await service.enrol(asked), 201)

    async def tell(request: Request) -> Response:
        _caller(service, request).check_unlimited()
        asked = protocol.parse_told(await _body(service, request), request.path_params["name"])
        return JSONResponse(await service.tell(asked))

    async def forget(request: Request) -> Response:
        _caller(service, request).check_unlimited()
        name = request.path_params["name"]
        await service.forget(name)
        return JSONResponse({"id": name, "object": "querier.deleted", "deleted": True})

    routes = [
        Route("/", page),
        Route("/report", report),
        Route("/openapi.json", described),
        Route("/healthz", healthz),
        Route("/readyz", readyz),
        Route("/metrics", metrics),
        Route("/v1/models", models),
        Route("/v1/models/{model:path}", model),
        Route("/v1/chat/completions", chat, methods=["POST"]),
        Route("/v1/embeddings", embeddings, methods=["POST"]),
        Route("/v1/queriers", queriers),
        Route("/v1/queriers", enrol, methods=["POST"]),
        Route("/v1/queriers/{name}/dialogues", tell, methods=["POST"]),
        Route("/v1/queriers/{name:path}", forget, methods=["DELETE"]),
    ]
    handlers = {ApiError: _on_error, HTTPException: _on_http_error, ClientDisconnect: _on_left, Exception: _on_failure}
    app = Starlette(routes=routes, exception_handlers=handlers, lifespan=lifespan)
    app.add_middleware(Counted, service=service)
    return app


class Counted:
    """Counts answers and their seconds, and gives every answer the headers that all have."""

    def __init__(self, app: ASGIApp, service: Service):
        """Stands around an application."""
        self._app, self._meters = app, service.meters

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request, or the application's life."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        start, status = time.monotonic(), 499  # as nginx has it: the client left before an answer began

        async def passed_on(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                extra = (
                    (b"x-content-type-options", b"nosniff"),
                    (b"cache-control", b"no-store"),
                    (b"referrer-policy", b"no-referrer"),
                )
                message["headers"] = [*message["headers"], *extra]
            await send(message)

        try:
            await self._app(scope, receive, passed_on)
        except Exception:
            status = 500
            raise
        finally:
            endpoint = getattr(scope.get("endpoint"), "__name__", "none")
            self._meters.requests.labels(endpoint, str(status)).inc()
            self._meters.seconds.labels(endpoint).observe(time.monotonic() - start)


class Stream:
    """A reply as server-sent events; the answer begins with the reply's first piece, so that an error before is an HTTP error."""

    def __init__(self, service: Service, asked: Chat, caller: Caller):
        """Begins nothing yet."""
        self._service, self._asked, self._caller = service, asked, caller

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Sends it, unless the client leaves."""
        await _until_left(self._service, receive, self._send(send))

    async def _send(self, send: Send) -> None:
        begun, sending = False, False

        async def event(data: str) -> None:
            nonlocal begun, sending
            sending = True
            if not begun:
                begun = True
                headers = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"x-accel-buffering", b"no")]
                await send({"type": "http.response.start", "status": 200, "headers": headers})
            await send({"type": "http.response.body", "body": f"data: {data}\n\n".encode(), "more_body": True})
            sending = False

        try:
            async with asyncio.timeout(self._service.limits.timeout):
                await self._events(event)
        except TimeoutError:
            if sending:
                return  # a client that reads nothing: the connection is closed on it
            if not begun:
                raise _too_slow() from None
            await event(_json(_too_slow().body()))
        except ApiError as error:
            if not begun:
                raise
            await event(_json(error.body()))
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _events(self, event: Any) -> None:
        asked, fixed, first = self._asked, _fixed(self._service, self._asked, "chat.completion.chunk"), True
        async with contextlib.aclosing(self._service.speak(asked, self._caller)) as pieces:
            async for piece in pieces:
                delta = {"role": "assistant"} if first else {}
                delta |= {"content": piece.text} if piece.text or first else {}
                first = False
                choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": None}
                # The reason has a chunk of its own, as clients expect it.
                if delta:
                    await event(_json({**fixed, "choices": [choice]}))
                if piece.finish:
                    await event(_json({**fixed, "choices": [{**choice, "delta": {}, "finish_reason": piece.finish}]}))
                    if asked.usage:
                        await event(_json({**fixed, "choices": [], "usage": _usage(piece)}))
        await event("[DONE]")


async def _whole(service: Service, asked: Chat, caller: Caller) -> Response:
    text = []
    async with contextlib.aclosing(service.speak(asked, caller)) as pieces:
        async for piece in pieces:
            text.append(piece.text)
    message = {"role": "assistant", "content": "".join(text), "refusal": None}
    choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": piece.finish}
    return JSONResponse({**_fixed(service, asked, "chat.completion"), "choices": [choice], "usage": _usage(piece)})


async def _embedded(service: Service, asked: protocol.Embed) -> Response:
    vectors, tokens = await service.embed(asked)
    data = [{"object": "embedding", "index": i, "embedding": vector} for i, vector in enumerate(vectors)]
    usage = {"prompt_tokens": tokens, "total_tokens": tokens}
    return JSONResponse({"object": "list", "data": data, "model": asked.model, "usage": usage})


def _fixed(service: Service, asked: Chat, kind: str) -> Json:
    stamp = {"created": int(time.time()), "system_fingerprint": f"step-{service.step}"}
    return {"id": f"chatcmpl-{secrets.token_hex(12)}", "object": kind, "model": asked.model, **stamp}


def _usage(piece: Piece) -> Json:
    total = piece.prompt + piece.tokens
    return {
        "prompt_tokens": piece.prompt,
        "completion_tokens": piece.tokens,
        "total_tokens": total,
        "cut_tokens": piece.cut,
    }


def _json(value: Json) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def _caller(service: Service, request: Request) -> Caller:
    return service.keys.caller(request.headers.get("authorization"))


async def _body(service: Service, request: Request) -> Json:
    """The request's JSON object.

    Raises:
      ApiError: 400, 408, 413 or 415.
    """
    # A page of another site can send forms and plain text here, but not this type.
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise ApiError(415, "the Content-Type is not application/json", "unsupported_media_type")
    most, data, length = service.limits.body, bytearray(), 0
    large = ApiError(413, f"the body is longer than {most} bytes", "body_too_large")
    closing = ApiError(413, str(large), large.code, headers={"Connection": "close"})
    declared = request.headers.get("content-length", "")
    if declared.isascii() and declared.isdigit() and int(declared[:20]) > PATIENCE * most:
        raise closing
    try:
        async with asyncio.timeout(BODY_SECONDS):
            async for chunk in request.stream():
                length += len(chunk)
                if length > PATIENCE * most:
                    raise closing
                if length <= most:
                    data += chunk
    except TimeoutError:
        headers = {"Connection": "close"}
        raise ApiError(
            408, f"the body did not come within {BODY_SECONDS:.0f} s", "body_timeout", headers=headers
        ) from None
    if length > most:
        raise large
    return protocol.parse_body(bytes(data))


async def _heard(service: Service, request: Request, answer: Awaitable[Response]) -> Response:
    """An answer that comes in time, and is given up when the client leaves."""

    async def in_time() -> Response:
        try:
            async with asyncio.timeout(service.limits.timeout):
                return await answer
        except TimeoutError:
            raise _too_slow() from None

    return await _until_left(service, request.receive, in_time()) or Response(status_code=499)


async def _until_left(service: Service, receive: Receive, work: Awaitable[T]) -> T | None:
    """The result of some work, None where the client left before it was there: then the work is cancelled.

    A server that shuts down tells the same of every client, to end streams early; here they are to be finished.
    """
    doing, watching = asyncio.ensure_future(work), asyncio.ensure_future(_left(receive))
    try:
        await asyncio.wait((doing, watching), return_when=asyncio.FIRST_COMPLETED)
        if not doing.done() and not service.draining:
            return None
        return await doing
    finally:
        doing.cancel()
        watching.cancel()
        await asyncio.gather(doing, watching, return_exceptions=True)


async def _left(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def _too_slow() -> ApiError:
    return ApiError(408, "the reply did not come in time; try again later", "timeout", headers={"Retry-After": "5"})


async def _on_error(_: Request, error: Exception) -> Response:
    return JSONResponse(error.body(), error.status, headers=error.headers)


async def _on_http_error(request: Request, error: Exception) -> Response:
    codes = {404: ("there is nothing at this path; see /openapi.json", "not_found")}
    codes[405] = (f"this path does not take {request.method}", "method_not_allowed")
    message, code = codes.get(error.status_code, (error.detail, "http_error"))
    return JSONResponse(ApiError(error.status_code, message, code).body(), error.status_code, headers=error.headers)


async def _on_left(_: Request, error: Exception) -> Response:
    return Response(status_code=499)


async def _on_failure(_: Request, error: Exception) -> Response:
    logging.error("a request failed: %r", error)
    return JSONResponse(
        ApiError(500, "the server failed at this request; its log says why", "internal_error").body(), 500
    )
