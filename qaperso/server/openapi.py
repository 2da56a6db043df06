"""The API in OpenAPI 3.1, as `/openapi.json` gives it."""

from __future__ import annotations

from typing import Any

from qaperso.server import protocol
from qaperso.server.protocol import Json, Limits

# Of the API, not of the package.
VERSION = "1.0.0"
ERRORS = {
    400: "Something in the request is wrong; `param` says what.",
    401: "The key is missing or not known.",
    403: "The key is limited to other queriers.",
    404: "No such model, querier or path.",
    408: "The body or the reply did not come in time.",
    409: "The name is taken, or no row is left, or the querier is one of training.",
    413: "The body is too long.",
    415: "The body is not application/json.",
    429: "All places are taken; `Retry-After` says when to come again.",
    500: "The server's own fault.",
    503: "The server is starting, draining or has failed.",
}
POSTED = (400, 401, 403, 404, 408, 413, 415, 429, 500, 503)


def document(limits: Limits, keys: bool) -> Json:
    """The description of a server with these limits, and with or without keys."""
    schemas = _schemas(limits)
    paths = {
        "/v1/chat/completions": {
            "post": _operation(
                "One reply, whole or as server-sent events; `user` names the querier.",
                POSTED,
                {200: _either(_ref("Completion"), "text/event-stream")},
                _ref("Chat"),
            )
        },
        "/v1/embeddings": {
            "post": _operation("Representations of dialogues.", POSTED, {200: _json(_ref("Embeddings"))}, _ref("Embed"))
        },
        "/v1/models": {"get": _operation("Who answers.", (401,), {200: _json(_listed("Model"))})},
        "/v1/models/{model}": {
            "get": _operation("One of them.", (401, 404), {200: _json(_ref("Model"))}),
            "parameters": [_parameter("model")],
        },
        "/v1/queriers": {
            "get": _operation("Who can ask, as far as the key reaches.", (401,), {200: _json(_listed("Querier"))}),
            "post": _operation(
                "Enrols somebody new by a row of their own, or by their history.",
                (*POSTED, 409),
                {201: _json(_ref("Enrolled"))},
                _ref("Enrol"),
            ),
        },
        "/v1/queriers/{name}": {
            "delete": _operation(
                "Forgets somebody who was enrolled here.", (401, 403, 404, 409, 503), {200: _json(_ref("Deleted"))}
            ),
            "parameters": [_parameter("name")],
        },
        "/v1/queriers/{name}/dialogues": {
            "post": _operation(
                "Adds to the history of somebody who was enrolled here.",
                (*POSTED, 409),
                {200: _json(_ref("Enrolled"))},
                _ref("Told"),
            ),
            "parameters": [_parameter("name")],
        },
        "/healthz": {"get": _operation("Whether the process does its work.", (), _states(), secured=False)},
        "/readyz": {"get": _operation("Whether requests are taken.", (), _states(), secured=False)},
        "/metrics": {
            "get": _operation(
                "For Prometheus.", (401, 403), {200: _content("Metrics.", "text/plain", {"type": "string"})}
            )
        },
    }
    components: Json = {"schemas": schemas}
    result: Json = {
        "openapi": "3.1.0",
        "info": {"title": "qaperso", "version": VERSION, "description": "One responder, asked by many queriers."},
        "paths": paths,
        "components": components,
    }
    if keys:
        components["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        result["security"] = [{"key": []}]
    return result


def _schemas(limits: Limits) -> Json:
    text: Json = {"type": "string", "minLength": 1}
    number = lambda low, high: {"type": ["number", "null"], "minimum": low, "maximum": high}  # noqa: E731
    integer = lambda low, high: {"type": ["integer", "null"], "minimum": low, "maximum": high}  # noqa: E731
    flag = {"type": ["boolean", "null"]}
    part = _object({"type": {"const": "text"}, "text": {"type": "string"}}, ("type", "text"))
    content = {"anyOf": [text, {"type": "array", "items": part, "minItems": 1}]}
    message = _object({"role": {"enum": list(protocol.ROLES)}, "content": content}, ("role", "content"), more=True)
    messages = {"type": "array", "items": _ref("Message"), "minItems": 1, "maxItems": protocol.MESSAGES}
    stop = {"type": "string", "minLength": 1, "maxLength": protocol.STOP_LENGTH}
    neutral = {name: {"enum": [*values, None]} for name, values in protocol.NEUTRAL.items()}
    usage = {name: {"type": "integer"} for name in ("prompt_tokens", "completion_tokens", "total_tokens", "cut_tokens")}
    said = _object({"role": {"const": "assistant"}, "content": {"type": "string"}}, ("role", "content"), more=True)
    choice = _object(
        {"index": {"const": 0}, "message": said, "finish_reason": {"enum": ["stop", "length"]}}, ("message",), more=True
    )
    position = {"type": ["array", "null"], "items": {"type": "number"}, "minItems": 2, "maxItems": 2}
    querier = {"id": text, "object": {"const": "querier"}, "enrolled": {"type": "boolean"}, "position": position}
    embedded = {
        "object": {"const": "embedding"},
        "index": {"type": "integer"},
        "embedding": {"type": ["array", "string"]},
    }
    error = _object(
        {name: {"type": ["string", "null"]} for name in ("message", "type", "param", "code")},
        ("message", "type", "param", "code"),
    )
    chat = {
        "model": {**text, "description": "An id of /v1/models."},
        "messages": messages,
        "user": {"type": ["string", "null"], "minLength": 1, "description": "The querier; nobody = the stranger."},
        "max_tokens": integer(1, limits.tokens),
        "max_completion_tokens": {**integer(1, limits.tokens), "description": "The same as max_tokens."},
        "temperature": number(0, 2),
        "top_p": number(0, 1),
        "seed": {**integer(-(2**63), 2**63 - 1), "description": "Equal requests with equal seeds get equal replies."},
        "stop": {"anyOf": [stop, {"type": "array", "items": stop, "maxItems": protocol.STOPS}, {"type": "null"}]},
        "stream": flag,
        "stream_options": {
            "anyOf": [_object({"include_usage": flag, "include_obfuscation": flag}, ()), {"type": "null"}]
        },
        **neutral,
        **{name: {"description": "Not used."} for name in protocol.UNUSED},
    }
    told = {"type": "array", "items": messages, "minItems": 1, "maxItems": protocol.DIALOGUES}
    one = {"anyOf": [text, messages]}
    return {
        "Error": _object({"error": error}, ("error",)),
        "Message": message,
        "Chat": _object(chat, ("model", "messages")),
        "Completion": _object(
            {
                "id": text,
                "object": {"const": "chat.completion"},
                "created": {"type": "integer"},
                "model": text,
                "system_fingerprint": text,
                "choices": {"type": "array", "items": choice, "minItems": 1, "maxItems": 1},
                "usage": _object(usage, tuple(usage)),
            },
            ("id", "object", "created", "model", "choices", "usage"),
        ),
        "Embed": _object(
            {
                "model": text,
                "input": {
                    "anyOf": [
                        *one["anyOf"],
                        {"type": "array", "items": one, "minItems": 1, "maxItems": protocol.INPUTS},
                    ]
                },
                "encoding_format": {"enum": ["float", "base64", None]},
                "dimensions": {"type": "null"},
                "user": {"description": "Not used: representations are made as of a stranger."},
            },
            ("model", "input"),
        ),
        "Embeddings": _object(
            {
                "object": {"const": "list"},
                "data": {"type": "array", "items": _object(embedded, tuple(embedded))},
                "model": text,
                "usage": _object({"prompt_tokens": {"type": "integer"}, "total_tokens": {"type": "integer"}}, ()),
            },
            ("object", "data", "model", "usage"),
        ),
        "Model": _object(
            {"id": text, "object": {"const": "model"}, "responder": text}, ("id", "object", "responder"), more=True
        ),
        "Querier": _object(querier, tuple(querier)),
        "Enrol": _object(
            {
                "name": {**text, "maxLength": protocol.NAME_LENGTH, "description": "Printable, without slashes."},
                "model": text,
                "dialogues": told,
            },
            ("name", "model", "dialogues"),
        ),
        "Told": _object({"model": text, "dialogues": told}, ("model", "dialogues")),
        "Enrolled": _object(
            {**querier, "dialogues": {"type": "integer"}, "seconds": {"type": "number"}}, tuple(querier)
        ),
        "Deleted": _object(
            {"id": text, "object": {"const": "querier.deleted"}, "deleted": {"const": True}}, ("id", "deleted")
        ),
        "State": _object({"status": text}, ("status",)),
    }


def _object(properties: Json, required: tuple[str, ...], more: bool = False) -> Json:
    return {"type": "object", "properties": properties, "required": list(required), "additionalProperties": more}


def _ref(name: str) -> Json:
    return {"$ref": f"#/components/schemas/{name}"}


def _listed(name: str) -> Json:
    items = {"object": {"const": "list"}, "data": {"type": "array", "items": _ref(name)}}
    return _object(items, tuple(items), more=True)


def _content(what: str, kind: str, schema: Json) -> Json:
    return {"description": what, "content": {kind: {"schema": schema}}}


def _json(schema: Json) -> Json:
    return _content("The answer.", "application/json", schema)


def _either(schema: Json, stream: str) -> Json:
    both = _json(schema)
    both["content"][stream] = {"schema": {"type": "string"}}
    return both


def _states() -> dict[int, Json]:
    return {200: _json(_ref("State")), 503: _json(_ref("State"))}


def _parameter(name: str) -> Json:
    return {"name": name, "in": "path", "required": True, "schema": {"type": "string", "minLength": 1}}


def _operation(
    what: str, errors: tuple[int, ...], answers: dict[int, Json], body: Any = None, secured: bool = True
) -> Json:
    failing = {status: _content(ERRORS[status], "application/json", _ref("Error")) for status in errors}
    responses = {str(status): answer for status, answer in sorted({**failing, **answers}.items())}
    operation: Json = {"summary": what, "responses": responses}
    if body is not None:
        operation["requestBody"] = {"required": True, "content": {"application/json": {"schema": body}}}
    if not secured:
        operation["security"] = []
    return operation
