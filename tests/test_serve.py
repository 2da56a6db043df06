"""The server as its clients see it: the openai client, streams, keys, enrolment, and what happens at the limits."""

from __future__ import annotations

import asyncio
import concurrent.futures
import dataclasses
import http.client
import json
import socket
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax.numpy as jnp
import numpy as np
import openai
import pytest
import serving
import untrained
from serving import Served

from qaperso import batching, generate, reply, rows, serve
from qaperso.batching import Batcher
from qaperso.errors import UserError
from qaperso.eval import retrieval
from qaperso.generate import Sampling
from qaperso.notes import Notes
from qaperso.server.engine import Engine, Ticket
from qaperso.server.keys import Caller, Keys
from qaperso.server.protocol import ApiError, Enrol
from qaperso.server.service import Service
from qaperso.types import Turn

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import serve_load  # noqa: E402

ASKED = "what do i still owe?"


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with serving.serving(tmp_path_factory.mktemp("serve") / "town") as found:
        yield found


@pytest.fixture(scope="module")
def client(served: Served) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{served.base}/v1", api_key="none", max_retries=0)


def directly(served: Served, querier: str, text: str, how: Sampling, history: tuple[Turn, ...] = ()) -> str:
    """The reply that the library gives without a server."""
    run = served.service.run
    asked = reply.question(run, history, querier, text, "maren")
    # As many slots and places as the server has, so that no other programs are compiled.
    batcher = Batcher(served.service.engine.model, serving.LIMITS.slots, served.service.engine._batcher._length)
    batcher.submit(reply.make_prompt(run, asked), served.service.roster.row(querier, Caller()), how)
    tokens: list[int] = []
    while batcher.busy:
        tokens += batcher.step(generate.STRIDE)[0].tokens
    return reply.decode(run, tokens)


def test_the_openai_client_gets_what_the_library_gives(served: Served, client: openai.OpenAI) -> None:
    assert [m.id for m in client.models.list()] == ["town/maren"] and client.models.retrieve(
        "town/maren"
    ).id == "town/maren"
    found = {}
    for querier in ("tilda", "harald", "stranger"):
        messages = [{"role": "user", "content": ASKED}]
        fixed: dict[str, Any] = dict(model="town/maren", messages=messages, temperature=0, max_tokens=6)
        fixed |= {} if querier == "stranger" else {"user": querier}
        whole = client.chat.completions.create(**fixed)
        found[querier] = whole.choices[0].message.content
        assert found[querier] == directly(served, querier, ASKED, Sampling(6))
        assert whole.usage.total_tokens == whole.usage.prompt_tokens + whole.usage.completion_tokens
        chunks = list(client.chat.completions.create(**fixed, stream=True, stream_options={"include_usage": True}))
        assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == found[querier]
        assert chunks[0].choices[0].delta.role == "assistant" and chunks[-1].usage == whole.usage
        assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == whole.choices[0].finish_reason
    assert len(set(found.values())) == 3


def test_sampling_and_history_are_as_asked(served: Served) -> None:
    how = dict(user="tilda", temperature=1.2, top_p=0.9, max_tokens=8)
    _, one = served.chat(ASKED, **how, seed=5)
    assert one["choices"][0]["message"]["content"] == directly(served, "tilda", ASKED, Sampling(8, 1.2, 0.9, 5))
    drawn = {served.chat(ASKED, **how)[1]["choices"][0]["message"]["content"] for _ in range(4)}
    assert len(drawn) > 1
    said = [("user", "good day"), ("assistant", "ahoy"), ("user", ASKED)]
    messages = [{"role": role, "content": text} for role, text in said]
    body = {"model": served.model, "messages": messages, "user": "tilda", "temperature": 0, "max_tokens": 8}
    _, answer = served.ask("POST", "/v1/chat/completions", body)
    history = (Turn("tilda", "good day"), Turn("maren", "ahoy"))
    assert answer["choices"][0]["message"]["content"] == directly(served, "tilda", ASKED, Sampling(8), history)
    assert answer["choices"][0]["finish_reason"] == "length" and answer["usage"]["completion_tokens"] == 8


def test_a_stop_ends_the_reply(served: Served) -> None:
    whole = directly(served, "tilda", ASKED, Sampling(12))
    stop = whole.split()[3]
    for stream in (False, True):
        _, answer = served.chat(ASKED, user="tilda", max_tokens=12, stop=[stop], stream=stream)
        if stream:
            events = serving.lines_of(answer)
            assert events.pop() == "[DONE]" and events[-1]["choices"][0]["finish_reason"] == "stop"
            text = "".join(e["choices"][0]["delta"].get("content", "") for e in events)
        else:
            text = answer["choices"][0]["message"]["content"]
            assert answer["choices"][0]["finish_reason"] == "stop"
        assert text == whole[: whole.index(stop)]
    serving.wait(lambda: served.metric("qaperso_replies_running") == 0)


def test_representations_are_those_of_evaluation(served: Served, client: openai.OpenAI) -> None:
    messages = [{"role": "user", "content": ASKED}, {"role": "assistant", "content": "twelve crowns"}]
    found = client.embeddings.create(model="town/maren", input=[messages, "twelve crowns"])  # type: ignore[list-item]
    plain = client.embeddings.create(model="town/maren", input="twelve crowns", encoding_format="float")
    run, trainable = served.service._whole
    assert [len(d.embedding) for d in found.data] == [run.setting.model.embed] * 2 and found.usage.total_tokens > 8
    # The two were packed into rows with other company.
    np.testing.assert_allclose(found.data[1].embedding, plain.data[0].embedding, rtol=1e-4, atol=1e-5)
    assert np.abs(np.subtract(found.data[0].embedding, plain.data[0].embedding)).max() > 1e-2
    # The way of an evaluation, for a dialogue of the data whose querier is called as the server calls everybody.
    _, store, _ = untrained.opened(**serving.PLAIN)
    which = next(i for i, d in enumerate(store.dialogues) if len(d.turns) == 2 and d.split == "test")
    said = store.dialogues[which].turns
    turns = (Turn("stranger", said[0].text), said[1])
    renamed = dataclasses.replace(store.dialogues[which], querier="stranger", turns=turns)
    other = dataclasses.replace(store, dialogues=(*store.dialogues[:which], renamed, *store.dialogues[which + 1 :]))
    expected = retrieval.embed(run, trainable, other, np.array([which]), "visible").vectors[0]
    messages = [{"role": "user", "content": said[0].text}, {"role": "assistant", "content": said[1].text}]
    got = client.embeddings.create(model="town/maren", input=[messages]).data[0].embedding  # type: ignore[list-item]
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)
    status, answer = served.ask("POST", "/v1/embeddings", {"model": "town/maren", "input": "bread " * 60})
    assert status == 400 and answer["error"]["code"] == "context_length_exceeded"


@pytest.mark.parametrize("fitted", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_somebody_new_comes_is_kept_and_goes(served: Served, monkeypatch: pytest.MonkeyPatch, fitted: bool) -> None:
    given: list[int] = []
    if not fitted:
        width = served.service.run.setting.model.embed
        fit = lambda run, trainable, examples: given.append(sum(e.predicted.any() for e in examples)) or jnp.ones(width)  # noqa: E731
        monkeypatch.setattr(rows, "fit_row", fit)

    def taught(text: str) -> list[dict[str, str]]:
        return [{"role": "user", "content": ASKED}, {"role": "assistant", "content": text}]

    body = {"name": "<script>anna", "model": served.model, "dialogues": [taught("ahoy"), taught("fair winds")]}
    _, others = served.chat(ASKED, user="tilda", max_tokens=8)
    status, entry = served.ask("POST", "/v1/queriers", body)
    assert status == 201 and entry["enrolled"] and len(entry["position"]) == 2 and entry["dialogues"] == 2
    _, told = served.chat(ASKED, user=body["name"], max_tokens=8)
    how = Sampling(8)
    assert told["choices"][0]["message"]["content"] == directly(served, body["name"], ASKED, how)
    assert fitted or given == [2]
    person = served.service.roster.enrolled[body["name"]]
    row, vector = person.row, person.vector
    assert not person.dialogues
    stranger = np.asarray(served.service.engine.model.trained["tower"]["rows"])[0]
    assert np.abs(vector - stranger).max() > 0
    # Another server of the run knows them, and nobody else changed.
    again = serving.made(served.service.folder)
    np.testing.assert_array_equal(again._model.trained["tower"]["rows"][row], vector)
    assert served.chat(ASKED, user="tilda", max_tokens=8)[1]["choices"] == others["choices"]
    assert served.ask("POST", "/v1/queriers", body)[0] == 409
    path = "/v1/queriers/%3Cscript%3Eanna"
    assert served.ask("DELETE", path)[1]["deleted"] and served.ask("DELETE", path)[0] == 404
    assert served.chat(ASKED, user=body["name"])[1]["error"]["code"] == "querier_not_found"
    np.testing.assert_array_equal(served.service.engine.model.trained["tower"]["rows"][row], stranger)
    assert served.ask("DELETE", "/v1/queriers/tilda")[1]["error"]["code"] == "querier_trained"


def test_who_is_known_by_history_is_enrolled_and_told_more(served: Served, tmp_path: Path) -> None:
    """Dialogues are all that is kept; the next prompt sees them, here and wherever the run is opened; forgotten, they are gone."""
    plug = dict(pplug__encoder="base", pplug__history=4, pplug__query=12, pplug__temperature=0.2)
    how: dict[str, Any] = dict(method="pplug", data__names="masked", qar__contrast="none", **plug)
    service = serving.made(tmp_path, **how)
    done = concurrent.futures.Future()
    done.set_result(None)
    service.engine = SimpleNamespace(ready=threading.Event(), alive=True, forget_row=lambda row: done)
    service.engine.ready.set()
    assert next(iter(service.listed_models()))["enrol"]

    def given(*texts: str) -> Any:
        (model,) = service.models
        return Enrol("zed", model, tuple((("user", ASKED), ("assistant", text)) for text in texts))

    def seen(by: Service) -> list[int]:
        question = reply.question(by.run, [], "zed", ASKED, "maren")
        return [len(by.run.columns(question)["history"].index), len(by.roster.enrolled["zed"].dialogues)]

    asking = reply.question(service.run, [], "zed", ASKED, "maren")
    assert not len(service.run.columns(asking)["history"].index)
    with pytest.raises(ApiError, match="not known"):
        asyncio.run(service.tell(given("fair winds")))
    entry = asyncio.run(service.enrol(given("ahoy, zed", "fair winds")))
    assert entry["enrolled"] and entry["position"] is None and entry["dialogues"] == 2 and seen(service) == [2, 2]
    # Again only the most recent are read, all are kept.
    assert asyncio.run(service.tell(given("aye", "nay", "never")))["dialogues"] == 3 and seen(service) == [4, 5]
    again = serving.made(tmp_path, **how)
    assert seen(again) == [4, 5]
    columns = [np.asarray(by.run.columns(asking)["history"]) for by in (service, again)]
    np.testing.assert_array_equal(*columns)
    assert columns[0].any(-1).all()
    asyncio.run(service.forget("zed"))
    assert not len(service.run.columns(asking)["history"].index) and not service.roster.enrolled
    assert not list((tmp_path / "enrolled").iterdir())
    # Who is known by a row cannot be told more.
    body = {"model": served.model, "dialogues": [[{"role": "assistant", "content": "aye"}]]}
    status, answer = served.ask("POST", "/v1/queriers/tilda/dialogues", body)
    assert status == 400 and "no message of the querier's" in answer["error"]["message"]
    body["dialogues"][0].insert(0, {"role": "user", "content": ASKED})
    status, answer = served.ask("POST", "/v1/queriers/tilda/dialogues", body)
    assert (status, answer["error"]["code"]) == (409, "no_history")


def test_soft_tokens_are_compiled_for_before_the_first_request(tmp_path: Path) -> None:
    how: dict[str, Any] = dict(method="pplug", pplug__encoder="base", pplug__history=4, pplug__query=12)
    service = serving.made(tmp_path, data__names="masked", qar__contrast="none", **how)
    engine = Engine(service._model, serving.LIMITS, service.meters, lambda function: function())
    programs = (batching._added, generate.prefill)
    engine._warm_up()
    before = [program._cache_size() for program in programs]
    prompt = reply.make_prompt(service.run, reply.question(service.run, [], "tilda", "bread?", "maren"))
    assert "history" in prompt.columns
    engine._batcher.submit(prompt, service.roster.row("tilda", Caller()), Sampling(2))
    while engine._batcher.busy:
        engine._batcher.step()
    assert [program._cache_size() for program in programs] == before


def held(served: Served, count: int, **more: Any) -> list[socket.socket]:
    """Clients that stream long replies and read nothing."""
    body = {
        "model": served.model,
        "messages": [{"role": "user", "content": ASKED}],
        "stream": True,
        "temperature": 0,
    } | more
    data = json.dumps(body).encode()
    head = "POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    found = []
    for _ in range(count):
        found.append(socket.create_connection(("127.0.0.1", served.port)))
        found[-1].sendall(f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data)
    return found


def test_a_full_server_says_when_to_come_again(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    going, step = threading.Event(), served.service.engine._batcher.step
    monkeypatch.setattr(served.service.engine._batcher, "step", lambda tokens: going.wait(30) and step(tokens))
    clients = held(served, 8, max_tokens=32, user="tilda")
    serving.wait(lambda: served.service._admitted == 8)
    connection = http.client.HTTPConnection("127.0.0.1", served.port)
    body = json.dumps({"model": served.model, "messages": [{"role": "user", "content": ASKED}]})
    connection.request("POST", "/v1/chat/completions", body, {"Content-Type": "application/json"})
    answer = connection.getresponse()
    assert answer.status == 429 and 1 <= int(answer.headers["Retry-After"]) <= 30
    assert json.load(answer)["error"]["type"] == "rate_limit_error"
    # Whoever leaves frees a place, before the device has done anything for them.
    for client in clients[:6]:
        client.close()
    serving.wait(lambda: served.service._admitted == 2)
    before = served.metric("qaperso_cancelled_total")
    going.set()
    serving.wait(lambda: served.service._admitted == 0)
    assert served.chat(ASKED)[0] == 200 and served.metric("qaperso_cancelled_total") == before + 6
    assert served.metric("qaperso_rejected_total") >= 1
    for client in clients[6:]:
        client.settimeout(10)
        text = b""
        while b"[DONE]" not in text:
            text += client.recv(65536)
        client.close()


def test_under_load_nobody_hears_what_is_another_s(served: Served) -> None:
    queriers = ["tilda", "harald", "brandt", "anselm", "stranger"]
    tally = serve_load.Tally()

    async def all_of_it() -> None:
        expected = await serve_load.replies_alone(served.port, served.model, queriers)
        assert len(set(expected.values())) > len(queriers)
        await serve_load.load(served.port, served.model, expected, 24, 3.0, tally)

    asyncio.run(all_of_it())
    assert not tally.mixed and tally.complete >= 0.95, (tally.outcomes, tally.mixed[:3])
    # Four have slots; the queue is full, so that some were told to wait and came again.
    assert tally.most >= 4 and tally.outcomes["complete"] > 24 and tally.outcomes["told to wait"]
    assert served.service._admitted == 0 and not served.service.engine._tickets


def test_keys_guard_everything_but_health(tmp_path: Path) -> None:
    whole, some = "sk-whole-0123456789", "sk-some-0123456789"
    with serving.serving(tmp_path / "town", keys={whole: None, some: frozenset({"tilda"})}) as served:
        body = {"model": served.model, "messages": [{"role": "user", "content": ASKED}], "max_tokens": 2}
        key = lambda k: {"Authorization": f"Bearer {k}"}  # noqa: E731
        for method, path in (
            ("GET", "/v1/models"),
            ("GET", "/v1/queriers"),
            ("GET", "/metrics"),
            ("GET", "/report"),
            ("POST", "/v1/chat/completions"),
            ("POST", "/v1/embeddings"),
            ("POST", "/v1/queriers"),
            ("DELETE", "/v1/queriers/tilda"),
        ):
            status, answer = served.ask(method, path)
            assert status == 401 and answer["error"]["type"] == "authentication_error"
        for path in ("/", "/healthz", "/readyz", "/openapi.json"):
            assert served.ask("GET", path)[0] == 200
        for path in ("/metrics", "/report"):
            assert served.ask("GET", path, **key(some))[0] == 403
        assert served.ask("POST", "/v1/queriers", {}, **key(some))[0] == 403
        chat = "/v1/chat/completions"
        assert served.ask("POST", chat, body | {"user": "tilda"}, **key(some))[0] == 200
        assert served.ask("POST", chat, body | {"user": "harald"}, **key(some))[0] == 403
        assert served.ask("POST", chat, body | {"user": "harald"}, **key(whole))[0] == 200
        people = served.ask("GET", "/v1/queriers", **key(some))[1]["data"]
        assert [q["id"] for q in people] == ["stranger", "tilda"]


def test_when_the_engine_fails_all_who_wait_hear_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whose reply was begun, whose command was still in the queue, and who came later."""
    service = serving.made(tmp_path)
    engine = Engine(service._model, serving.LIMITS, service.meters, lambda function: function())
    heard: dict[str, list[Any]] = {"begun": [], "queued": [], "late": []}
    calls = []

    def come(who: str) -> None:
        engine.submit(Ticket(untrained.prompt(4, 0), 0, Sampling(2), heard[who].append))
        calls.append(engine.call(lambda: who))

    def broken(tokens: int) -> None:
        come("queued")
        raise RuntimeError("out of memory")

    monkeypatch.setattr(engine, "_warm_up", lambda: None)
    monkeypatch.setattr(engine._batcher, "step", broken)
    come("begun")
    engine.start()
    engine._thread.join(60)
    come("late")
    assert {who: [error.code for error in errors] for who, errors in heard.items()} == {
        who: ["engine_failed"] for who in heard
    }
    assert not engine.alive and calls[0].result(0) == "begun"
    for call in calls[1:]:
        with pytest.raises(ApiError, match="the server needs a restart"):
            call.result(0)


def test_a_drain_ends_what_was_begun(tmp_path: Path) -> None:
    with serving.serving(tmp_path / "town") as served:
        (client,) = held(served, 1, max_tokens=32, user="tilda")
        client.settimeout(20)
        text = client.recv(64)
        served.server.should_exit = True
        while data := client.recv(65536):
            text += data
        assert b"[DONE]" in text and b"error" not in text
        with pytest.raises(ConnectionRefusedError):
            served.chat(ASKED)


def test_bad_options_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    taken = socket.create_server(("127.0.0.1", 0))
    for words, says in (
        (["--slots", "0"], "--slots is 0, expected 1 or more"),
        (["--timeout", "0.5"], "--timeout is 0.5, expected 1 or more"),
        (["--timeout", "inf"], "--timeout is inf, expected 1 or more, less than"),
        (["--port", "70000"], "--port is 70000"),
        (["--port", str(taken.getsockname()[1])], "cannot be listened at"),
        (["--keys", str(tmp_path / "none")], "cannot be read"),
        (["--port", "0"], "is no run"),
    ):
        assert serve.main(["--workdir", str(tmp_path), *words]) == 2
        assert says in capsys.readouterr().err
    taken.close()


def test_a_method_that_asks_a_language_model_first_is_refused(tmp_path: Path) -> None:
    run, _, trainable = untrained.opened(**serving.PLAIN)
    asking = dataclasses.replace(run, setting=dataclasses.replace(run.setting, notes=Notes(tmp_path / "notes.jsonl")))
    with pytest.raises(UserError, match="asks a language model about every new query"):
        Service(asking, trainable, 7, Keys({}), serving.LIMITS)
