"""python -m qaperso.launch [--processes N] [--restarts R] -- train|evaluate [ARGUMENT ...]

Runs a command as N processes of this machine that work as one, and looks after them. When one dies, the others are ended
and all start again, from the newest checkpoint, after a pause that doubles; it ends when the command is done (0), when its
input is bad (2), or when R starts in a row have failed. SIGTERM and Ctrl-C are passed on: the run saves, and the exit code
is 143.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence

from qaperso.errors import STOPPED, USER_ERROR, UserError, command, nearest

COMMANDS = ("train", "evaluate")
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
POLL_SECONDS = 0.05
# How long the others have to end by themselves once one has failed, in which nothing can be saved any more.
FOLLOW_SECONDS = 3.0
# An attempt that lasted so long was healthy: restarts are counted afresh.
HEALTHY_SECONDS = 600.0
LONGEST_PAUSE = 60.0
Start = Callable[[int, Mapping[str, str]], subprocess.Popen]


def supervise(start: Start, processes: int, restarts: int, grace: float, pause: float = 1.0) -> int:
    """Runs N processes until they are done, starting all of them again whenever one fails.

    Args:
      start: starts process number i with these variables added to its environment.
      processes: how many.
      restarts: so many attempts in a row may fail and be followed by another; one of `HEALTHY_SECONDS` starts the count
        afresh.
      grace: seconds that processes have to save and end once they were told to stop or one of them is done.
      pause: seconds before the second attempt; doubles with each that fails.

    Returns:
      0 = done, 2 = bad input, 143 = stopped by a signal; else the exit code of the last attempt, 128 + n where signal n
      ended it.
    """
    failures = 0
    with _listening() as heard:
        while True:
            began = time.monotonic()
            codes, first = _attempt(start, processes, grace, heard)
            if not any(codes):
                return 0
            if USER_ERROR in codes:
                return USER_ERROR
            if heard:
                return STOPPED
            failures = 1 if time.monotonic() - began >= HEALTHY_SECONDS else failures + 1
            ended = f"process {first} of {processes} {_how(codes[first])}"
            if failures > restarts:
                print(f"{ended}; {failures} attempts in a row have failed: giving up", file=sys.stderr, flush=True)
                return codes[first] if codes[first] > 0 else 128 - codes[first]
            wait = min(pause * 2 ** (failures - 1), LONGEST_PAUSE)
            left = restarts - failures
            print(f"{ended}; starting all again in {wait:g} s, {left} restarts left", file=sys.stderr, flush=True)
            until = time.monotonic() + wait
            while time.monotonic() < until:
                if heard:
                    return STOPPED
                time.sleep(POLL_SECONDS)


def _how(code: int) -> str:
    return f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"


@contextlib.contextmanager
def _listening() -> Iterator[list[int]]:
    """The signals that have come; a list, since a handler may not take locks. What nohup ignores stays ignored."""
    heard: list[int] = []
    wanted = [number for number in SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
    before = {number: signal.signal(number, lambda n, _: heard.append(n)) for number in wanted}
    try:
        yield heard
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def environment(processes: int) -> dict[str, str]:
    """What makes N processes of this machine one JAX program (`mesh.start_runtime`), but for each one's number."""
    if processes == 1:
        return {}
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return {"JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}", "JAX_NUM_PROCESSES": str(processes)}


def _attempt(start: Start, processes: int, grace: float, heard: list[int]) -> tuple[list[int], int]:
    """Exit codes, negative ones of signals, and which process was the first that failed (or -1)."""
    common, running = environment(processes), []
    own = [{"JAX_PROCESS_ID": str(i)} if common else {} for i in range(processes)]
    first, deadline, told = -1, float("inf"), False
    try:
        for i in range(processes):
            running.append(start(i, common | own[i]))
        while any(p.poll() is None for p in running):
            now, codes = time.monotonic(), [p.poll() for p in running]
            failed = [i for i, code in enumerate(codes) if code not in (None, 0, STOPPED)]
            if failed and first < 0:
                # The coordinator's end takes the others with it within one look: then it was the first.
                first, deadline = failed[0], min(deadline, now + FOLLOW_SECONDS)
            if any(code is not None for code in codes):
                deadline = min(deadline, now + grace)
            if heard and not told:
                told, deadline = True, min(deadline, now + grace)
                for p in running:
                    p.send_signal(signal.SIGTERM)
            if now > deadline:
                break
            time.sleep(POLL_SECONDS)
    finally:
        for p in running:
            if p.poll() is None:
                p.kill()
        for p in running:
            p.wait()
    codes = [p.returncode for p in running]
    return codes, first if first >= 0 else next((i for i, code in enumerate(codes) if code), -1)


@command
def main(arguments: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m qaperso.launch",
        description=__doc__,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--processes", type=int, default=1, metavar="N", help="default: 1, which is only looked after")
    parser.add_argument("--restarts", type=int, default=10, metavar="R", help="in a row (default: 10)")
    parser.add_argument(
        "--grace", type=float, default=120.0, metavar="S", help="seconds to save in when told to stop (default: 120)"
    )
    given = list(sys.argv[1:] if arguments is None else arguments)
    cut = given.index("--") if "--" in given else len(given)
    known, words = parser.parse_args(given[:cut]), given[cut + 1 :]
    if not words or words[0] not in COMMANDS:
        found = f"'{words[0]}'{nearest(words[0], COMMANDS)}" if words else "nothing"
        raise UserError(f"found {found} after --, expected a command: ... -- train --config FILE --workdir DIR")
    for name, least in (("processes", 1), ("restarts", 0), ("grace", 0)):
        if getattr(known, name) < least:
            raise UserError(f"--{name} is {getattr(known, name)}, expected {least} or more")
    run = [sys.executable, "-m", f"qaperso.{words[0]}", *words[1:]]

    def start(_: int, variables: Mapping[str, str]) -> subprocess.Popen:
        # A group of its own: Ctrl-C reaches the launcher alone, which passes it on as SIGTERM.
        return subprocess.Popen(run, env=os.environ | variables, process_group=0)

    return supervise(start, known.processes, known.restarts, known.grace)


if __name__ == "__main__":
    sys.exit(main())
