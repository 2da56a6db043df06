"""An endpoint that misbehaves costs patience, never an answer, and nothing is asked twice."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from email.utils import formatdate
from pathlib import Path

import pytest
from endpoints import KEY, MODEL, Server, error, hang, hang_up, raw, serving

from qaperso import endpoint
from qaperso.endpoint import Address, Cache, Completion, Endpoint, complete_all, digest
from qaperso.errors import UserError

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def direct(monkeypatch: pytest.MonkeyPatch) -> None:
    """The local server is reached without a proxy."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


def user(text: str) -> list[dict[str, str]]:
    """A question of one message."""
    return [{"role": "user", "content": text}]


def connect(server: Server, waits: list[float], **options) -> Endpoint:
    """An endpoint that notes its waits instead of sitting through them."""
    return Endpoint(Address(server.base, MODEL, KEY), sleep=waits.append, **options)


def refused(ask: Endpoint, text: str = "hello") -> str:
    """What is said when a question fails for good; never the key."""
    with pytest.raises(UserError) as found:
        ask.complete(user(text))
    assert KEY not in str(found.value)
    return str(found.value)


def test_a_question_and_its_answer() -> None:
    with serving(lambda text: f"you said {text}") as server:
        found = connect(server, waits := []).complete(user("hello"))
    assert found == Completion("you said hello", 10, 3)
    assert server.asked == [{"model": MODEL, "messages": user("hello"), "temperature": 0}]
    assert server.keys == [f"Bearer {KEY}"] and waits == []


@pytest.mark.parametrize(
    "step",
    [
        *(error(status) for status in (408, 409, 429, 500, 503)),
        hang_up,
        hang,
        raw('{"choices": [', missing=500),
        raw('{"choices": ['),
        raw("<html>busy</html>", kind="text/html"),
        raw("<html>busy</html>"),
        raw(b'{"choices": "\xff'),
        raw({"choices": []}),
        raw({"choices": [None]}),
        raw({"choices": [{}]}),
        raw({}),
        raw([]),
        raw({"error": {"message": "upstream is down"}}),
    ],
)
def test_what_passes_is_tried_again(step) -> None:
    with serving(script=[step]) as server:
        found = connect(server, waits := [], timeout=0.3 if step is hang else 20.0).complete(user("hello"))
    assert found == Completion("fine", 10, 3)
    assert len(server.asked) == 2 and len(waits) == 1 and 0.5 <= waits[0] <= 1


def test_retry_after_is_never_undercut() -> None:
    date = formatdate(time.time() + 20, usegmt=True)
    with serving(
        script=[error(429, Retry_After="7"), error(503, Retry_After=date), error(429, Retry_After="soon")]
    ) as s:
        connect(s, waits := []).complete(user("hello"))
    assert 7 <= waits[0] < 8 and 10 < waits[1] < 21.1 and 2 <= waits[2] <= 4
    with serving(script=[error(429, Retry_After="3600")]) as server:
        line = refused(connect(server, waits := []))
    assert "asks to be left alone for 3600 s" in line and "run again to go on" in line
    assert waits == [] and len(server.asked) == 1


def test_patience_ends() -> None:
    with serving(script=[error(500, f"no {KEY}")] * 9) as server:
        line = refused(connect(server, waits := []))
        assert len(server.asked) == endpoint.ATTEMPTS == 6 and len(waits) == 5
        assert all(2**i / 2 <= wait <= 2**i for i, wait in enumerate(waits))
        assert f"127.0.0.1:{server.server_port} failed 6 times in a row" in line and "500 - no ***" in line
        assert "failed 2 times in a row" in refused(connect(server, waits := [], attempts=2)) and len(waits) == 1
    line = refused(connect(server, waits := []))
    assert "Connection error" in line and len(waits) == 5


@pytest.mark.parametrize(
    ("step", "parts"),
    [
        (error(401, f"wrong key {KEY[:9]}"), ["refused the key (401); check QAPERSO_API_KEY"]),
        (error(403), ["refused the key (403)"]),
        (error(404, "no such model"), ["no such model", "check QAPERSO_API_BASE and QAPERSO_API_MODEL"]),
        (error(400, f"what is {KEY}?"), ["refused the question: Error code: 400 - what is ***?"]),
        (error(422, "x" * 999), ["refused the question", "xxx"]),
    ],
)
def test_what_stays_is_not(step, parts: list[str]) -> None:
    with serving(script=[step]) as server:
        line = refused(connect(server, waits := []))
    assert all(part in line for part in parts) and KEY[:9] not in line and len(line) < 400
    assert len(server.asked) == 1 and waits == []


def test_models_that_take_no_temperature() -> None:
    refusal = error(400, "only the default temperature", param="temperature", code="unsupported_value")
    with serving(script=[refusal]) as server:
        ask = connect(server, waits := [])
        assert ask.complete(user("a")).text == ask.complete(user("b")).text == "fine"
    assert ["temperature" in body for body in server.asked] == [True, False, False] and waits == []
    with serving(script=[None, refusal, refusal]) as server:
        ask = connect(server, [])
        ask.complete(user("a"))
        assert "only the default temperature" in refused(ask)


def test_no_text_is_an_answer_too() -> None:
    steps = [error(400, "filtered", code="content_filter"), lambda handler: handler.answer(None)]
    with serving(script=[*steps, raw({"choices": [{"message": {"content": "short"}}]})]) as server:
        ask = connect(server, waits := [])
        found = [ask.complete(user("a")) for _ in range(3)]
    assert found == [Completion("", 0, 0), Completion("", 10, 3), Completion("short", 0, 0)] and waits == []


def test_a_key_that_comes_back_is_hidden(tmp_path: Path) -> None:
    with serving(lambda text: f"your key is {KEY}") as server:
        cache = Cache(tmp_path / "answers.jsonl")
        found = complete_all(connect(server, []), cache, [user("a")], 1)
    assert [a.text for a in found.values()] == ["your key is ***"]
    assert KEY not in (tmp_path / "answers.jsonl").read_text()
    # A placeholder of a server that asks for no key is a word like others.
    with serving(lambda text: "none of it") as server:
        assert Endpoint(Address(server.base, MODEL, "none")).complete(user("a")).text == "none of it"


def test_the_environment() -> None:
    whole = {"QAPERSO_API_BASE": "http://localhost:8000/v1", "QAPERSO_API_MODEL": "m", "QAPERSO_API_KEY": f"{KEY}\n"}
    found = endpoint.from_environment(whole)
    assert found == Address("http://localhost:8000/v1", "m", KEY) and KEY not in repr(found)
    assert Address("https://me:secret@host.example:99/v1", "m", KEY).host == "host.example:99"
    for name in whole:
        for value in ({}, {name: " "}):
            with pytest.raises(UserError, match=f"^{name} is not set; set QAPERSO_API_BASE"):
                endpoint.from_environment({k: v for k, v in whole.items() if k != name} | value)
    for base in ("localhost:8000", "ftp://host/v1", "http://", "http://host:port/v1", "http://[::1/v1"):
        with pytest.raises(UserError, match="QAPERSO_API_BASE is no http:// or https:// address"):
            endpoint.from_environment(whole | {"QAPERSO_API_BASE": base})
    for key in ("two words of it", "schlüssel", "one\nmore"):
        with pytest.raises(UserError, match="QAPERSO_API_KEY holds blanks") as problem:
            endpoint.from_environment(whole | {"QAPERSO_API_KEY": key})
        assert key not in str(problem.value)


def test_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openai", None)
    with pytest.raises(UserError, match=r"pip install 'qaperso\[judge\]'"):
        Endpoint(Address("http://localhost/v1", MODEL, KEY))


def test_waits_by_their_definition() -> None:
    assert [endpoint.backoff(n, None, 0.5) for n in (1, 2, 3, 6, 7, 50)] == [0.75, 1.5, 3.0, 24.0, 45.0, 45.0]
    assert (endpoint.backoff(1, None, 0.0), endpoint.backoff(5, 7.0, 0.25)) == (0.5, 7.25)
    now = 1e9
    for text, seconds in {"3": 3.0, "0.5": 0.5, "-1": 0.0, "": None, "nan": None, "inf": None, "soon": None}.items():
        assert endpoint.retry_after({"retry-after": text}, now) == seconds
    assert endpoint.retry_after({"retry-after": formatdate(now + 90, usegmt=True)}, now) == 90
    assert endpoint.retry_after({"retry-after": formatdate(now - 90, usegmt=True)}, now) == 0
    assert endpoint.retry_after({}, now) is None


def test_digests() -> None:
    same = digest("m", [{"content": "a", "role": "user"}])
    assert same == digest("m", [{"role": "user", "content": "a"}])
    different = [digest("n", user("a")), digest("m", user("b")), digest("m", user("a") * 2)]
    assert len({same, *different}) == 4


def test_the_cache_keeps_answers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "answers.jsonl"
    answers = {"k1": Completion('a "quoted"\n\u2028 line', 5, 6), "k2": Completion("", 0, 0)}
    cache = Cache(path)
    for key, answer in answers.items():
        cache.put(key, answer)
    cache.close()
    again = Cache(path)
    assert len(again) == 2 and {key: again.get(key) for key in answers} == answers and again.get("k3") is None
    again.close()
    whole = path.read_bytes()
    assert capsys.readouterr().err == ""
    # A kill in the middle of a line: what follows begins a line of its own.
    path.write_bytes(whole + whole[: len(whole) // 3])
    torn = Cache(path)
    assert capsys.readouterr().err.startswith(f"warning: {path}: the last line is cut short")
    assert path.read_bytes() == whole and len(torn) == 2
    torn.put("k3", Completion("new", 1, 1))
    torn.close()
    assert len(Cache(path)) == 3 and capsys.readouterr().err == ""
    path.write_bytes(whole[:9])
    assert len(Cache(path)) == 0 and path.read_bytes() == b""


@pytest.mark.parametrize(
    "line", ["{", "3", "{}", '{"key": "a", "text": 1, "prompt_tokens": 2, "completion_tokens": 3}', ""]
)
def test_a_broken_cache(tmp_path: Path, line: str) -> None:
    path = tmp_path / "answers.jsonl"
    good = json.dumps({"key": "k", "text": "t", "prompt_tokens": 1, "completion_tokens": 2})
    path.write_text(f"{good}\n{line}\n{good}\n")
    with pytest.raises(UserError, match="answers.jsonl:2: found no kept answer there"):
        Cache(path)
    with pytest.raises(UserError, match="cannot be opened"):
        Cache(tmp_path / "absent" / "answers.jsonl")


def test_each_question_is_asked_once(tmp_path: Path) -> None:
    asked = [user(text) for text in ("a", "b", "a", "c", "b")]
    with serving(lambda text: text * 2) as server:
        cache = Cache(tmp_path / "answers.jsonl")
        found = complete_all(connect(server, []), cache, asked, 2)
        assert [found[digest(MODEL, messages)].text for messages in asked] == ["aa", "bb", "aa", "cc", "bb"]
        assert sorted(server.contents) == ["a", "b", "c"] and len(cache) == 3
        cache.close()
        again = complete_all(connect(server, []), Cache(tmp_path / "answers.jsonl"), [*asked, user("d")], 2)
        assert {key: again[key] for key in found} == found
    assert sorted(server.contents) == ["a", "b", "c", "d"]


def test_questions_go_side_by_side(tmp_path: Path) -> None:
    # Nobody is answered before three are waiting.
    together = threading.Barrier(3, timeout=20)
    lock, under_way, most = threading.Lock(), [0], [0]

    def reply(_: str) -> str:
        with lock:
            under_way[0] += 1
            most[0] = max(most[0], under_way[0])
        together.wait()
        with lock:
            under_way[0] -= 1
        return "fine"

    with serving(reply) as server:
        complete_all(connect(server, []), Cache(tmp_path / "a.jsonl"), [user(str(i)) for i in range(6)], 3)
    assert most == [3] and len(server.asked) == 6


def test_a_failure_keeps_what_was_answered(tmp_path: Path) -> None:
    asked = [user(str(i)) for i in range(8)]
    with serving(lambda text: text, [None, None, None, error(401)]) as server:
        with pytest.raises(UserError, match="refused the key"):
            complete_all(connect(server, []), Cache(tmp_path / "a.jsonl"), asked, 1)
        assert len(server.asked) == 4
        kept = Cache(tmp_path / "a.jsonl")
        assert len(kept) == 3
        complete_all(connect(server, []), kept, asked, 1)
    assert len(server.asked) == 8 + 1


def test_waiting_ends_when_all_is_over() -> None:
    with serving(script=[error(500)] * 9) as server:
        ask = Endpoint(Address(server.base, MODEL, KEY), sleep=lambda _: ask.stop())
        assert "was stopped" in refused(ask) and len(server.asked) == 1
        # The waits of its own are cut short: after one try, and long before the minute that five waits would take.
        patient = Endpoint(Address(server.base, MODEL, KEY))
        server.script.appendleft(lambda handler: (patient.stop(), error(429, Retry_After="200")(handler)))
        assert "was stopped" in refused(patient) and len(server.asked) == 2


PROGRAM = """
import sys
from pathlib import Path
from qaperso.endpoint import Address, Cache, Endpoint, complete_all
asked = [[{"role": "user", "content": str(i)}] for i in range(6)]
complete_all(Endpoint(Address(sys.argv[1], sys.argv[2], sys.argv[3])), Cache(Path(sys.argv[4])), asked, 1)
"""


def test_a_killed_program_asks_nothing_twice(tmp_path: Path) -> None:
    path, children = tmp_path / "answers.jsonl", []
    started = threading.Event()

    def kill(handler) -> None:
        started.wait(20)
        children[0].send_signal(signal.SIGKILL)
        children[0].wait()

    with serving(lambda text: text, [None, None, None, kill]) as server:
        words = [sys.executable, "-c", PROGRAM, server.base, MODEL, KEY, str(path)]
        where = {"PYTHONPATH": str(ROOT)}
        children.append(subprocess.Popen(words, env=os.environ | where, stderr=subprocess.DEVNULL))
        started.set()
        assert children[0].wait(60) == -signal.SIGKILL
        assert server.contents == ["0", "1", "2", "3"]
        complete_all(connect(server, []), Cache(path), [user(str(i)) for i in range(6)], 1)
        # The fourth was under way: nobody has its answer.
        assert server.contents == ["0", "1", "2", "3", "3", "4", "5"]
    assert len(path.read_text().splitlines()) == 6
