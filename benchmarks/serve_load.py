"""python benchmarks/serve_load.py --workdir DIR [--clients 200] [--seconds 120] [--slots 48] [--restart-at 60] [--json FILE]

Starts `python -m qaperso.serve` on a run and lets clients stream replies from it without a pause. Every reply is held against the one
that the same querier got to the same question alone, before. 429 is obeyed (Retry-After) and tried again. With --restart-at
the server is killed (SIGKILL) at that second and started again: what was in flight is lost, everything after goes on.
The exit code is 1 where a reply was mixed up, more was lost than was in flight at the kill, fewer than 95% of the other requests
came through, or fewer than 32 streams were live at once.
"""

from __future__ import annotations

import argparse
import asyncio
import collections
import contextlib
import dataclasses
import json
import random
import re
import statistics
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

QUESTIONS = ("what do i still owe?", "is there any bread left?", "when do you close?", "who was here yesterday?")
# Shares and counts that a run is held against.
COMPLETE, LIVE = 0.95, 32
Expected = dict[tuple[str, str], str]


@dataclasses.dataclass
class Tally:
    """What happened: requests by outcome, streams that were live at once, seconds to a reply's first piece, bytes in memory."""

    outcomes: collections.Counter = dataclasses.field(default_factory=collections.Counter)
    live: int = 0
    most: int = 0
    sampled: list[int] = dataclasses.field(default_factory=list)
    first: list[float] = dataclasses.field(default_factory=list)
    memory: list[int] = dataclasses.field(default_factory=list)
    mixed: list[str] = dataclasses.field(default_factory=list)

    @property
    def complete(self) -> float:
        """The share of requests that ended in the whole, right reply, of those that no kill of the server has cut off."""
        ended = sum(self.outcomes[what] for what in ("complete", "failed", "mixed"))
        return self.outcomes["complete"] / max(ended, 1)


async def stream(port: int, body: dict[str, Any], tally: Tally) -> tuple[int, str | float]:
    """One streaming request: (200, the reply), (429, seconds to wait), or (another status, what was said).

    Raises:
      OSError, EOFError: the connection broke before the reply was whole.
    """
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    start, begun = time.monotonic(), False
    try:
        data = json.dumps(body).encode()
        head = "POST /v1/chat/completions HTTP/1.1\r\nHost: load\r\nConnection: close\r\nContent-Type: application/json\r\n"
        writer.write(f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data)
        await writer.drain()
        status = int((await reader.readuntil(b"\r\n")).split()[1])
        headers = (await reader.readuntil(b"\r\n\r\n")).decode()
        if status != 200:
            text = (await reader.read()).decode()
            after = re.search(r"(?i)^retry-after: (\d+)", headers, re.MULTILINE)
            return (status, float(after[1])) if status == 429 and after else (status, text)
        said = []
        # The events stand whole in the body's chunks, so that the sizes between them are just other lines.
        async for line in reader:
            if not line.startswith(b"data: "):
                continue
            if line.startswith(b"data: [DONE]"):
                return 200, "".join(said)
            if not begun:
                begun, tally.live = True, tally.live + 1
                tally.most = max(tally.most, tally.live)
                tally.first.append(time.monotonic() - start)
            event = json.loads(line[6:])
            if "error" in event:
                return event["error"].get("status", 599), str(event["error"])
            said += [choice["delta"].get("content", "") for choice in event["choices"]]
        raise EOFError("the stream ended before its end")
    finally:
        tally.live -= begun
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()


def asked(model: str, querier: str, question: str) -> dict[str, Any]:
    """A greedy streaming request."""
    messages = [{"role": "user", "content": question}]
    return {"model": model, "user": querier, "messages": messages, "temperature": 0, "stream": True}


async def replies_alone(port: int, model: str, queriers: list[str], questions: tuple[str, ...] = QUESTIONS) -> Expected:
    """What each querier is told, asked one at a time."""
    expected = {}
    for querier in queriers:
        for question in questions:
            status, text = await stream(port, asked(model, querier, question), Tally())
            assert status == 200, f"{querier}, {question}: {status} {text}"
            expected[querier, question] = text
    return expected


async def client(number: int, port: int, model: str, expected: Expected, until: float, tally: Tally) -> None:
    """Asks until the time is over, each question again as long as there is no room for it."""
    draw = random.Random(number)
    while time.monotonic() < until:
        querier, question = draw.choice(sorted(expected))
        while True:
            try:
                status, said = await stream(port, asked(model, querier, question), tally)
            except ConnectionRefusedError:
                # It is not back yet: nothing was asked.
                tally.outcomes["refused"] += 1
                await asyncio.sleep(0.5)
                continue
            except (OSError, EOFError):
                tally.outcomes["lost"] += 1
                break
            if status in (429, 503):
                tally.outcomes["told to wait"] += 1
                await asyncio.sleep((said if isinstance(said, float) else 1.0) * draw.uniform(0.8, 1.2))
                if time.monotonic() > until:
                    return
                continue
            right = status == 200 and said == expected[querier, question]
            tally.outcomes["complete" if right else "mixed" if status == 200 else "failed"] += 1
            if not right:
                tally.mixed.append(
                    f"{querier}, {question}: {status} {said!r}, expected {expected[querier, question]!r}"
                )
            break


async def load(port: int, model: str, expected: Expected, clients: int, seconds: float, tally: Tally) -> None:
    """All clients at once."""
    until = time.monotonic() + seconds

    async def sample() -> None:
        while True:
            tally.sampled.append(tally.live)
            await asyncio.sleep(0.25)

    sampling = asyncio.create_task(sample())
    await asyncio.gather(*(client(i, port, model, expected, until, tally) for i in range(clients)))
    sampling.cancel()


class Process:
    """The server, as a process of its own."""

    def __init__(self, workdir: Path, port: int, *options: str):
        """Starts it and waits until it takes requests."""
        words = [sys.executable, "-m", "qaperso.serve", "--workdir", str(workdir), "--port", str(port), *options]
        self._process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
        line = self._process.stdout.readline()
        found = re.search(r":(\d+)$", line.strip())
        assert found, f"the server did not start: {line!r}"
        self.port = int(found[1])
        wait_until_ready(self.port)

    def memory(self) -> int:
        """Resident bytes (Linux)."""
        text = Path(f"/proc/{self._process.pid}/status").read_text(encoding="utf-8")
        return int(re.search(r"VmRSS:\s+(\d+) kB", text)[1]) * 1024

    def kill(self) -> None:
        """SIGKILL."""
        self._process.kill()
        self._process.wait()

    def terminate(self) -> int:
        """SIGTERM; its exit code."""
        self._process.terminate()
        return self._process.wait(timeout=150)


def get(port: int, path: str) -> Any:
    """The JSON at a path."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=30) as answer:
        return json.load(answer)


def wait_until_ready(port: int, seconds: float = 300) -> None:
    """Waits until a server takes requests."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        with contextlib.suppress(OSError):
            get(port, "/readyz")
            return
        time.sleep(0.2)
    raise TimeoutError(f"the server was not ready within {seconds} s")


async def drive(options: argparse.Namespace) -> tuple[Tally, dict[str, Any]]:
    """The whole measurement."""
    more = ("--slots", str(options.slots), "--queue", str(options.queue))
    server = await asyncio.to_thread(Process, options.workdir, 0, *more)
    tally, restarts = Tally(), 0
    try:
        model = (await asyncio.to_thread(get, server.port, "/v1/models"))["data"][0]["id"]
        queriers = [q["id"] for q in (await asyncio.to_thread(get, server.port, "/v1/queriers"))["data"]]
        expected = await replies_alone(server.port, model, queriers)
        print(f"{len(expected)} questions asked alone, {len(set(expected.values()))} different replies", flush=True)
        running = asyncio.create_task(load(server.port, model, expected, options.clients, options.seconds, tally))
        start = time.monotonic()
        while not running.done():
            await asyncio.sleep(1)
            tally.memory.append(server.memory())
            if options.restart_at and not restarts and time.monotonic() - start > options.restart_at:
                print("killing the server and starting it again", flush=True)
                server.kill()
                restarts = 1
                server = await asyncio.to_thread(Process, options.workdir, server.port, *more)
        await running
        code = await asyncio.to_thread(server.terminate)
    except BaseException:
        server.kill()
        raise
    steady = tally.memory[len(tally.memory) // 4 :]
    first = sorted(tally.first)
    figures = {
        "clients": options.clients,
        "seconds": options.seconds,
        "slots": options.slots,
        "requests": dict(tally.outcomes),
        "complete": round(tally.complete, 4),
        "live_most": tally.most,
        "live_median": statistics.median(tally.sampled),
        "replies_per_second": round(tally.outcomes["complete"] / options.seconds, 1),
        "first_piece_p50": round(first[len(first) // 2], 3),
        "first_piece_p95": round(first[len(first) * 95 // 100], 3),
        "memory_mib": [round(statistics.median(part) / 2**20) for part in (steady[:10], steady[-10:])],
        "restarts": restarts,
        "exit_code": code,
    }
    return tally, figures


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--workdir", type=Path, required=True, metavar="DIR")
    parser.add_argument("--clients", type=int, default=200)
    parser.add_argument("--seconds", type=float, default=120)
    parser.add_argument("--slots", type=int, default=48)
    parser.add_argument("--queue", type=int, default=64)
    parser.add_argument("--restart-at", type=float, default=0, metavar="SECONDS")
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    tally, figures = asyncio.run(drive(options))
    print(json.dumps(figures, indent=1))
    for line in tally.mixed[:5]:
        print(line)
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    enough = tally.complete >= COMPLETE and tally.most >= min(LIVE, options.clients)
    # A client has one request in flight: a kill costs each of them one at most.
    spared = tally.outcomes["lost"] <= options.clients * figures["restarts"]
    return 0 if enough and spared and not tally.outcomes["mixed"] else 1


if __name__ == "__main__":
    sys.exit(main())
