"""Requests and answers of the HTTP API as plain values: OpenAI's chat and embeddings protocol, and queriers beside it.

Nothing here reads a socket or a model, so that whatever bytes come in can be tried without either. Texts and names come out in
NFC, as those of all data are. Field names and shapes are
those of the OpenAI API reference (chat completions, embeddings, errors); `user`, there an end user's id, names the querier.
"""

from __future__ import annotations

import dataclasses
import json
import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any

from qaperso.data.formats.common import normal
from qaperso.data.store import STRANGER_NAME
from qaperso.errors import nearest
from qaperso.types import Dialogue, Turn

Json = dict[str, Any]

# Bounds that no option moves.
MESSAGES = 256  # of a conversation
STOPS, STOP_LENGTH = 4, 64
INPUTS = 32  # dialogues embedded by one request
DIALOGUES = 64  # that a querier is enrolled with
NAME_LENGTH = 64
TYPES = {401: "authentication_error", 403: "permission_error", 408: "timeout_error", 429: "rate_limit_error"}

# Parameters of the protocol that say nothing new to this server: the values that ask for what it does anyway.
NEUTRAL: dict[str, Sequence[Any]] = {
    "n": (1,),
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "logprobs": (False,),
    "logit_bias": ({},),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
}
# Those that are book-keeping of somebody else's.
UNUSED = ("metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "parallel_tool_calls")
CHAT = ("model", "messages", "user", "max_tokens", "max_completion_tokens", "temperature", "top_p", "seed", "stop")
CHAT += ("stream", "stream_options", *NEUTRAL, *UNUSED)
ROLES = ("user", "assistant")


class ApiError(Exception):
    """What a client is told instead of an answer, in OpenAI's error format."""

    def __init__(
        self, status: int, message: str, code: str, param: str | None = None, headers: Mapping[str, str] | None = None
    ):
        """Makes an error of an HTTP status, a sentence, a word for programs, and the parameter that is wrong."""
        super().__init__(message)
        self.status, self.code, self.param, self.headers = status, code, param, dict(headers or {})

    def body(self) -> Json:
        """The error as the JSON object that goes out."""
        kind = TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}


@dataclasses.dataclass(frozen=True)
class Limits:
    """What one server takes.

    Attributes:
      slots: replies written at a time.
      queue: requests that may wait for a slot.
      tokens: of a reply, at most.
      body: bytes of a request, at most.
      timeout: seconds from a request to the end of its answer, waiting included.
    """

    slots: int = 16
    queue: int = 64
    tokens: int = 256
    body: int = 262_144
    timeout: float = 120.0


@dataclasses.dataclass(frozen=True)
class Defaults:
    """What a request that does not say gets: the run's `config.generate`."""

    tokens: int
    temperature: float
    top_p: float


Spoken = tuple[tuple[str, str], ...]  # (role, text), in order


@dataclasses.dataclass(frozen=True)
class Chat:
    """A question: who asks which model what, and how the reply is drawn. `seed` None = any."""

    model: str
    messages: Spoken
    querier: str
    tokens: int
    temperature: float
    top_p: float
    seed: int | None
    stop: tuple[str, ...]
    stream: bool
    usage: bool


@dataclasses.dataclass(frozen=True)
class Embed:
    """Dialogues to embed, as lists of messages that end in the responder's; `base64` as the openai client asks for."""

    model: str
    dialogues: tuple[Spoken, ...]
    base64: bool


@dataclasses.dataclass(frozen=True)
class Enrol:
    """Somebody new, and dialogues of theirs that end in the responder's replies."""

    name: str
    model: str
    dialogues: tuple[Spoken, ...]


def wrong(message: str, param: str | None = None, code: str = "invalid_value") -> ApiError:
    """An error 400."""
    return ApiError(400, message, code, param)


def parse_body(data: bytes) -> Json:
    """The JSON object of a request's body.

    Raises:
      ApiError: 400: it is none, or holds text that no UTF-8 file could.
    """
    try:
        body = json.loads(data.decode("utf-8"), parse_constant=_no_constant)
        json.dumps(body, ensure_ascii=False).encode("utf-8")  # an escape may spell half of a surrogate pair
    except UnicodeError as error:
        raise wrong("the body is not valid UTF-8 text", code="invalid_json") from error
    except (ValueError, RecursionError) as error:
        detail = "too deeply nested" if isinstance(error, RecursionError) else str(error)
        raise wrong(f"the body is not valid JSON: {detail}", code="invalid_json") from error
    if not isinstance(body, dict):
        raise wrong(f"the body is {_kind(body)}, expected a JSON object", code="invalid_json")
    return body


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON number")


def parse_chat(body: Json, defaults: Defaults, limits: Limits) -> Chat:
    """The question of a chat completion's body.

    Raises:
      ApiError: 400: a parameter is missing, unknown, of the wrong type, out of bounds, or asks for what the server does not do.
    """
    _known(body, CHAT)
    for name, values in NEUTRAL.items():
        found = body.get(name)
        # Python holds True to be 1.
        if found is not None and not any(found == v and isinstance(found, bool) == isinstance(v, bool) for v in values):
            raise wrong(f"'{name}' is not supported but as {json.dumps(values[0])}", name, "unsupported_value")
    messages = parse_messages(body.get("messages"), "messages", "user")
    both = [name for name in ("max_tokens", "max_completion_tokens") if body.get(name) is not None]
    if len(both) == 2 and body[both[0]] != body[both[1]]:
        raise wrong("'max_tokens' and 'max_completion_tokens' differ; give one of them", both[0])
    tokens = _integer(body, both[0] if both else "max_tokens", 1, limits.tokens, min(defaults.tokens, limits.tokens))
    stream = _flag(body, "stream")
    return Chat(
        model=_text(body, "model", 256),
        messages=messages,
        querier=_text(body, "user", 256, STRANGER_NAME),
        tokens=tokens,
        temperature=_number(body, "temperature", 0.0, 2.0, defaults.temperature),
        top_p=_number(body, "top_p", 0.0, 1.0, defaults.top_p),
        seed=_integer(body, "seed", -(2**63), 2**63 - 1, None),
        stop=_stop(body.get("stop")),
        stream=stream,
        usage=_usage(body.get("stream_options"), stream),
    )


def parse_embed(body: Json) -> Embed:
    """The dialogues of an embeddings request's body: strings (replies that nothing stands before) or lists of messages.

    Raises:
      ApiError: 400, as `parse_chat`.
    """
    _known(body, ("model", "input", "encoding_format", "dimensions", "user"))
    given = body.get("input")
    items = [given] if isinstance(given, str) or _is_dialogue(given) else given
    if not isinstance(items, list) or not items:
        raise wrong(f"'input' is {_kind(given)}, expected a string, a list of messages, or a list of these", "input")
    if len(items) > INPUTS:
        raise wrong(f"'input' holds {len(items)} dialogues, expected {INPUTS} at most", "input")
    dialogues = []
    for i, item in enumerate(items):
        if isinstance(item, str):
            if not normal(item):
                raise wrong(f"'input[{i}]' is empty", "input")
            dialogues.append((("assistant", normal(item)),))
        else:
            dialogues.append(parse_messages(item, f"input[{i}]", "assistant"))
    form = body.get("encoding_format")
    if form not in (None, "float", "base64"):
        raise wrong('\'encoding_format\' is neither "float" nor "base64"', "encoding_format")
    if body.get("dimensions") is not None:
        raise wrong(
            "'dimensions' is not supported: representations come as long as they are", "dimensions", "unsupported_value"
        )
    return Embed(_text(body, "model", 256), tuple(dialogues), form == "base64")


def _is_dialogue(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(item, dict) for item in value)


def parse_told(body: Json, name: str) -> Enrol:
    """More dialogues of a querier, whose name is in the path.

    Raises:
      ApiError: 400, as `parse_enrol`.
    """
    _known(body, ("model", "dialogues"))
    return parse_enrol({**body, "name": name})


def parse_enrol(body: Json) -> Enrol:
    """Name and dialogues of a new querier.

    Raises:
      ApiError: 400, as `parse_chat`; a name is no more than NAME_LENGTH printable characters, none of them a slash.
    """
    _known(body, ("name", "model", "dialogues"))
    name = _text(body, "name", NAME_LENGTH)
    if not name.isprintable() or name != name.strip() or any(c in name for c in "/\\") or name.strip(".") == "":
        raise wrong("'name' holds a slash, a blank at an end, a control character, or nothing but dots", "name")
    if name == STRANGER_NAME:
        raise wrong(f"'name' is '{STRANGER_NAME}', which stands for nobody in particular", "name")
    given = body.get("dialogues")
    if not isinstance(given, list) or not 1 <= len(given) <= DIALOGUES:
        found = len(given) if isinstance(given, list) else _kind(given)
        raise wrong(f"'dialogues' is {found}, expected a list of 1 to {DIALOGUES} lists of messages", "dialogues")
    dialogues = tuple(parse_messages(d, f"dialogues[{i}]", "assistant") for i, d in enumerate(given))
    for i, dialogue in enumerate(dialogues):
        if all(role != "user" for role, _ in dialogue):
            raise wrong(f"'dialogues[{i}]' has no message of the querier's (role \"user\")", "dialogues")
    return Enrol(name, _text(body, "model", 256), dialogues)


def parse_messages(given: Any, where: str, last: str) -> Spoken:
    """Messages of two people, as (role, text).

    Args:
      given: what stands in the body.
      where: the parameter's name.
      last: the role of the last message.

    Raises:
      ApiError: 400.
    """
    param = where.split("[")[0]
    if not isinstance(given, list) or not given:
        raise wrong(f"'{where}' is {_kind(given)}, expected a list of messages", param)
    if len(given) > MESSAGES:
        raise wrong(f"'{where}' holds {len(given)} messages, expected {MESSAGES} at most", param)
    found = []
    for i, message in enumerate(given):
        if not isinstance(message, dict):
            raise wrong(f"'{where}[{i}]' is {_kind(message)}, expected an object with role and content", param)
        role = message.get("role")
        if role in ("system", "developer"):
            raise wrong(
                f"'{where}[{i}]' is a {role} message; the model learned from dialogues of two people, without instructions",
                param,
                "unsupported_value",
            )
        if role not in ROLES:
            raise wrong(f'\'{where}[{i}].role\' is neither "user" (the querier) nor "assistant" (the responder)', param)
        text = normal(_content(message.get("content"), f"{where}[{i}].content", param))
        if not text:
            raise wrong(f"'{where}[{i}].content' is empty", param)
        found.append((role, text))
    if found[-1][0] != last:
        raise wrong(f'the last message of \'{where}\' has the role "{found[-1][0]}", expected "{last}"', param)
    return tuple(found)


def _content(given: Any, where: str, param: str) -> str:
    if isinstance(given, str):
        return given
    if isinstance(given, list) and given:
        parts = []
        for part in given:
            if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
                raise wrong(
                    f"'{where}' has a part that is no text; the model reads text only", param, "unsupported_value"
                )
            parts.append(part["text"])
        return "".join(parts)
    raise wrong(f"'{where}' is {_kind(given)}, expected text", param)


def turns_of(messages: Spoken, querier: str, responder: str) -> tuple[Turn, ...]:
    """The messages as turns of two people."""
    names = {"user": querier, "assistant": responder}
    return tuple(Turn(names[role], text) for role, text in messages)


def dialogue_of(messages: Spoken, querier: str, responder: str, number: int = 0) -> Dialogue:
    """Messages that end in the responder's as a dialogue in a group of its own."""
    name = f"request-{number}"
    return Dialogue(name, responder, querier, turns_of(messages, querier, responder), name)


def _known(body: Json, names: Sequence[str]) -> None:
    for name in body:
        if name not in names:
            raise wrong(f"'{name[:64]}' is no parameter{nearest(name[:64], names)}", name[:64], "unknown_parameter")


def _kind(value: Any) -> str:
    if value is None:
        return "missing"
    names = {bool: "a boolean", int: "a number", float: "a number", str: "a string", list: "a list", dict: "an object"}
    return ("an empty " + names[type(value)].split()[1]) if value in ("", [], {}) else names[type(value)]


def _text(body: Json, name: str, longest: int, default: str | None = None) -> str:
    value = body.get(name)
    if value is None and default is not None:
        return default
    if not isinstance(value, str) or not value:
        raise wrong(f"'{name}' is {_kind(value)}, expected text", name)
    if len(value) > longest:
        raise wrong(f"'{name}' has {len(value)} characters, expected {longest} at most", name)
    return unicodedata.normalize("NFC", value)


def _flag(body: Json, name: str) -> bool:
    value = body.get(name)
    if value is not None and not isinstance(value, bool):
        raise wrong(f"'{name}' is {_kind(value)}, expected true or false", name)
    return bool(value)


def _number(body: Json, name: str, low: float, high: float, default: float) -> float:
    value = body.get(name)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise wrong(f"'{name}' is {_kind(value)}, expected a number from {low:g} to {high:g}", name)
    if not low <= value <= high:
        raise wrong(f"'{name}' is out of bounds, expected a number from {low:g} to {high:g}", name)
    return float(value)


def _integer(body: Json, name: str, low: int, high: int, default: int | None) -> Any:
    value = body.get(name)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise wrong(
            f"'{name}' is {'out of bounds' if type(value) is int else _kind(value)}, expected {low} to {high}", name
        )
    return value


def _stop(given: Any) -> tuple[str, ...]:
    found = [] if given is None else [given] if isinstance(given, str) else given
    if not isinstance(found, list) or len(found) > STOPS:
        raise wrong(f"'stop' is neither a string nor a list of {STOPS} strings at most", "stop")
    if not all(isinstance(s, str) and 0 < len(s) <= STOP_LENGTH for s in found):
        raise wrong(f"'stop' holds something else than strings of 1 to {STOP_LENGTH} characters", "stop")
    return tuple(found)


def _usage(given: Any, stream: bool) -> bool:
    if given is None:
        return False
    if not stream:
        raise wrong("'stream_options' is for streams; set 'stream' as well", "stream_options")
    if not isinstance(given, dict):
        raise wrong(f"'stream_options' is {_kind(given)}, expected an object", "stream_options")
    _known(given, ("include_usage", "include_obfuscation"))
    return _flag(given, "include_usage")
