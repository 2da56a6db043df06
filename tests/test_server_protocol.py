"""Requests as values: whatever comes in is a request or an error 400, and what goes out is cut where a stop begins."""

from __future__ import annotations

import json
import string
import unicodedata
from typing import Any

import hypothesis
import hypothesis.strategies as st
import pytest

from qaperso.server import openapi, page, protocol
from qaperso.server.protocol import ApiError, Chat, Defaults, Limits
from qaperso.server.text import Stops
from qaperso.types import Turn

DEFAULTS = Defaults(20, 0.5, 0.9)
LIMITS = Limits(tokens=64)
HELLO = [{"role": "user", "content": "good day"}]
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=6,
)


def chat(**body: Any) -> Chat:
    return protocol.parse_chat({"model": "m", "messages": HELLO} | body, DEFAULTS, LIMITS)


def refused(function: Any, *arguments: Any, **more: Any) -> ApiError:
    with pytest.raises(ApiError) as error:
        function(*arguments, **more)
    assert error.value.status == 400 and error.value.body()["error"]["type"] == "invalid_request_error"
    assert "\n" not in str(error.value)
    return error.value


def test_a_plain_question_gets_the_defaults() -> None:
    assert chat() == Chat("m", (("user", "good day"),), "stranger", 20, 0.5, 0.9, None, (), False, False)
    full = dict(user="tilda", max_tokens=3, temperature=2, top_p=0, seed=-1, stop=["a", "bc"], stream=True)
    found = chat(**full, stream_options={"include_usage": True}, n=1.0, tools=[], logprobs=False, metadata={"a": "b"})
    assert found == Chat("m", (("user", "good day"),), "tilda", 3, 2.0, 0.0, -1, ("a", "bc"), True, True)
    assert chat(max_completion_tokens=5).tokens == 5 == chat(max_completion_tokens=5, max_tokens=5).tokens
    assert chat(stop="x").stop == ("x",) and chat(user=None, seed=None, stop=None, tools=None) == chat()
    # A default that is longer than the server's limit is cut to it.
    assert protocol.parse_chat({"model": "m", "messages": HELLO}, DEFAULTS, Limits(tokens=9)).tokens == 9


@pytest.mark.parametrize(
    ("body", "param", "says"),
    [
        ({"n": 2}, "n", "not supported but as 1"),
        ({"n": True}, "n", "not supported but as 1"),
        ({"tools": [{}]}, "tools", "not supported but as []"),
        ({"temprature": 1}, "temprature", "did you mean 'temperature'?"),
        ({"temperature": "hot"}, "temperature", "is a string, expected a number from 0 to 2"),
        ({"temperature": 2.1}, "temperature", "out of bounds"),
        ({"temperature": float("inf")}, "temperature", "out of bounds"),
        ({"temperature": 10**400}, "temperature", "out of bounds"),
        ({"top_p": True}, "top_p", "is a boolean"),
        ({"max_tokens": 65}, "max_tokens", "out of bounds, expected 1 to 64"),
        ({"max_tokens": 1.5}, "max_tokens", "is a number, expected 1 to 64"),
        ({"max_tokens": 1, "max_completion_tokens": 2}, "max_tokens", "differ"),
        ({"seed": 2**63}, "seed", "out of bounds"),
        ({"stop": ["a"] * 5}, "stop", "4 strings at most"),
        ({"stop": [""]}, "stop", "1 to 64 characters"),
        ({"stream": 1}, "stream", "expected true or false"),
        ({"stream_options": {}}, "stream_options", "set 'stream'"),
        ({"stream": True, "stream_options": {"usage": True}}, "usage", "is no parameter"),
        ({"user": ""}, "user", "is an empty string"),
        ({"user": 5}, "user", "is a number"),
        ({"user": "x" * 257}, "user", "257 characters"),
        ({"model": None}, "model", "is missing"),
        ({"messages": []}, "messages", "is an empty list"),
        ({"messages": HELLO * 257}, "messages", "257 messages"),
        ({"messages": ["hello"]}, "messages", "'messages[0]' is a string"),
        ({"messages": [{"role": "system", "content": "be kind"}]}, "messages", "without instructions"),
        ({"messages": [{"role": "king", "content": "hear me"}]}, "messages", "messages[0].role"),
        ({"messages": [{"role": "user", "content": " "}]}, "messages", "content' is empty"),
        ({"messages": [{"role": "user"}]}, "messages", "content' is missing"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages", "no text"),
        ({"messages": [*HELLO, {"role": "assistant", "content": "ahoy"}]}, "messages", 'expected "user"'),
    ],
)
def test_what_is_wrong_is_named(body: dict[str, Any], param: str, says: str) -> None:
    error = refused(chat, **body)
    assert error.param == param and says in str(error)


def test_content_may_come_in_parts() -> None:
    parts = [{"type": "text", "text": "good "}, {"type": "text", "text": "day"}]
    assert chat(messages=[{"role": "user", "content": parts, "name": "x"}]) == chat()


def test_texts_and_names_are_in_nfc_as_those_of_all_data_are() -> None:
    said, name = unicodedata.normalize("NFD", " où est Zoé ?\n"), unicodedata.normalize("NFD", "Zoé")
    found = chat(messages=[{"role": "user", "content": said}], user=name)
    assert found.messages == (("user", "où est Zoé ?"),) and found.querier == "Zoé"
    assert protocol.parse_embed({"model": "m", "input": said}).dialogues == ((("assistant", "où est Zoé ?"),),)
    dialogue = [*HELLO, {"role": "assistant", "content": said}]
    assert protocol.parse_enrol({"model": "m", "name": name, "dialogues": [dialogue]}).name == "Zoé"


@hypothesis.given(st.dictionaries(st.sampled_from(protocol.CHAT) | st.text(max_size=5), VALUES, max_size=6))
def test_any_object_is_a_question_or_an_error(body: dict[str, Any]) -> None:
    for parse in (lambda: protocol.parse_chat({"model": "m", "messages": HELLO} | body, DEFAULTS, LIMITS),):
        try:
            found = parse()
        except ApiError as error:
            assert error.status == 400 and json.loads(json.dumps(error.body()))["error"]["message"]
        else:
            assert 1 <= found.tokens <= 64 and 0 <= found.temperature <= 2 and 0 <= found.top_p <= 1


@hypothesis.given(VALUES, VALUES)
def test_any_input_is_embedded_or_enrolled_or_an_error(one: Any, two: Any) -> None:
    for parse, body in (
        (protocol.parse_embed, {"model": "m", "input": one, "encoding_format": two}),
        (protocol.parse_embed, {"model": "m", "input": one}),
        (protocol.parse_enrol, {"model": "m", "name": one, "dialogues": two}),
    ):
        try:
            parse(body)
        except ApiError as error:
            assert error.status == 400


@hypothesis.given(
    st.binary(max_size=64) | st.text(max_size=64).map(str.encode) | VALUES.map(lambda v: json.dumps(v).encode())
)
def test_any_bytes_are_an_object_or_an_error(data: bytes) -> None:
    try:
        body = protocol.parse_body(data)
    except ApiError as error:
        assert error.status == 400 and error.code == "invalid_json"
    else:
        # What was let in can be said again.
        assert isinstance(body, dict) and json.dumps(body, ensure_ascii=False).encode()


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"", "not valid JSON"),
        (b"[]", "is an empty list"),
        (b'{"a": NaN}', "NaN is no JSON number"),
        (b'{"a": "\xff"}', "not valid UTF-8"),
        (b'{"a": "\\ud800"}', "not valid UTF-8"),
        (b'{"a":' * 100_000, "too deeply nested"),
        (b'{"a": ' + b"9" * 5000 + b"}", "not valid JSON"),
    ],
)
def test_bodies_that_are_no_object(data: bytes, says: str) -> None:
    assert says in str(refused(protocol.parse_body, data))


def test_embeddings_take_replies_and_dialogues() -> None:
    both = [*HELLO, {"role": "assistant", "content": "ahoy"}]
    alone, whole = (("assistant", "ahoy"),), (("user", "good day"), ("assistant", "ahoy"))
    for given, expected in (("ahoy", [alone]), (both, [whole]), (["ahoy", both], [alone, whole])):
        assert protocol.parse_embed({"model": "m", "input": given}).dialogues == tuple(expected)
    assert protocol.parse_embed({"model": "m", "input": "a", "encoding_format": "base64"}).base64
    for body, says in (
        ({"input": [1, 2]}, "'input[0]' is a number"),
        ({"input": []}, "is an empty list"),
        ({"input": ["a"] * 33}, "33 dialogues, expected 32"),
        ({"input": ["a", " "]}, "'input[1]' is empty"),
        ({"input": HELLO}, 'expected "assistant"'),
        ({"input": "a", "encoding_format": "hex"}, "neither"),
        ({"input": "a", "dimensions": 5}, "'dimensions' is not supported"),
    ):
        assert says in str(refused(protocol.parse_embed, {"model": "m"} | body))


@pytest.mark.parametrize(
    "name", ["a/b", "../../etc/passwd", "a\\b", "..", " a", "a\n", "a\0", "stranger", "x" * 65, "", None, 3]
)
def test_names_that_nobody_may_have(name: Any) -> None:
    dialogues = [[*HELLO, {"role": "assistant", "content": "ahoy"}]]
    assert refused(protocol.parse_enrol, {"model": "m", "name": name, "dialogues": dialogues}).param == "name"


def test_who_is_enrolled_with_what() -> None:
    dialogue = [*HELLO, {"role": "assistant", "content": "ahoy"}]
    found = protocol.parse_enrol({"model": "m", "name": "<script>", "dialogues": [dialogue]})
    assert found.name == "<script>" and found.dialogues == ((("user", "good day"), ("assistant", "ahoy")),)
    turns = protocol.dialogue_of(found.dialogues[0], "anna", "maren").turns
    assert turns == (Turn("anna", "good day"), Turn("maren", "ahoy"))
    for dialogues, says in (
        ([], "is 0"),
        ([dialogue] * 65, "is 65"),
        ("a", "is a string"),
        ([dialogue[1:]], "no message of the"),
    ):
        assert says in str(refused(protocol.parse_enrol, {"model": "m", "name": "anna", "dialogues": dialogues}))


@hypothesis.given(
    st.text("ab", max_size=20), st.lists(st.integers(1, 4)), st.lists(st.text("ab", min_size=1, max_size=4), max_size=3)
)
def test_stops_cut_as_if_the_text_came_at_once(text: str, sizes: list[int], stops: list[str]) -> None:
    cuts = [text.find(stop) for stop in stops if stop in text]
    found, said, over = Stops(stops), "", False
    pieces, rest = [], text
    for size in sizes:
        pieces.append(rest[:size])
        rest = rest[size:]
    for piece, last in [*((p, False) for p in pieces), (rest, True)]:
        new, over = found.add(piece, last)
        said += new
        if over:
            break
    assert over == bool(cuts)
    if not over:
        assert said == text
    else:
        # The first to be complete cuts; nothing of it, nor after it, is said.
        assert text.startswith(said) and any(text[len(said) :].startswith(stop) for stop in stops)


def test_a_stop_is_held_back_until_it_cannot_be_one() -> None:
    stops = Stops(["end."])
    assert [stops.add(piece, False) for piece in ("the e", "n", "emy e", "nd")] == [
        ("the ", False),
        ("", False),
        ("enemy ", False),
        ("", False),
    ]
    assert stops.add(". more", False) == ("", True)
    assert Stops(["end."]).add("the en", True) == ("the en", False)


def test_the_description_names_every_parameter_and_bound() -> None:
    found = openapi.document(LIMITS, True)
    schemas = found["components"]["schemas"]
    assert (
        set(schemas["Chat"]["properties"]) == set(protocol.CHAT)
        and schemas["Chat"]["properties"]["max_tokens"]["maximum"] == 64
    )
    assert found["security"] and "security" not in openapi.document(LIMITS, False)
    text = json.dumps(found)
    for name in set(part.split('"')[0] for part in text.split("#/components/schemas/")[1:]):
        assert name in schemas


def test_the_page_needs_nothing_and_allows_nothing_else() -> None:
    html, policy = page.load_page()
    assert "innerHTML" not in html and "insertAdjacentHTML" not in html and "document.write" not in html
    rules = dict(rule.split(" ", 1) for rule in policy.split("; "))
    assert rules["default-src"] == "'none'" and "unsafe" not in policy and rules["script-src"].startswith("'sha256-")
    assert not [word for word in ("src=", "@import", "url(", "https://") if word in html]
    assert all(c in string.printable for c in policy)
