"""Processes that are looked after: who is started again, and who is not."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping

import pytest

from qaperso import launch

WAIT = "exec sleep 60"


class Shell:
    """Starts bash scripts, one for each process and attempt; the last attempt's for all that follow."""

    def __init__(self, *attempts: tuple[str, ...]):
        self.attempts, self.started = attempts, []
        self.processes: list[subprocess.Popen] = []

    def __call__(self, number: int, variables: Mapping[str, str]) -> subprocess.Popen:
        self.started.append((number, dict(variables)))
        attempt = sum(n == number for n, _ in self.started)
        script = self.attempts[min(attempt, len(self.attempts)) - 1][number]
        made = subprocess.Popen(["bash", "-c", script], env=os.environ | variables)
        self.processes.append(made)
        return made

    def run(self, restarts: int = 0, grace: float = 20.0) -> int:
        """The exit code; nobody is left behind."""
        code = launch.supervise(self, len(self.attempts[0]), restarts, grace, pause=0.01)
        assert all(p.returncode is not None for p in self.processes)
        return code


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Looks often, and waits less for those that follow a failed one."""
    monkeypatch.setattr(launch, "POLL_SECONDS", 0.005)
    monkeypatch.setattr(launch, "FOLLOW_SECONDS", 0.1)


def test_processes_know_each_other():
    shell = Shell(("exit 0", "exit 0", "exit 0"))
    assert shell.run() == 0
    assert [(n, v["JAX_PROCESS_ID"], v["JAX_NUM_PROCESSES"]) for n, v in shell.started] == [
        (0, "0", "3"),
        (1, "1", "3"),
        (2, "2", "3"),
    ]
    (address,) = {v["JAX_COORDINATOR_ADDRESS"] for _, v in shell.started}
    host, port = address.split(":")
    assert host == "127.0.0.1" and 0 < int(port) < 65536


def test_one_process_is_nobodys_peer():
    shell = Shell(("exit 0",))
    assert shell.run() == 0 and shell.started == [(0, {})]


@pytest.mark.parametrize("dead", [0, 1])
def test_all_start_again_when_one_is_killed(dead, capfd):
    scripts = [WAIT, WAIT]
    scripts[dead] = "kill -KILL $$"
    shell = Shell(tuple(scripts), ("exit 0", "exit 0"))
    assert shell.run(restarts=1) == 0
    assert [n for n, _ in shell.started] == [0, 1, 0, 1]
    assert [p.returncode for p in shell.processes[:2]] == [-signal.SIGKILL] * 2
    said = f"process {dead} of 2 was killed by SIGKILL; starting all again in 0.01 s, 0 restarts left"
    assert said in capfd.readouterr().err


def test_restarts_are_bounded_and_the_code_says_why(capfd):
    shell = Shell(("exit 7", WAIT))
    assert shell.run(restarts=2) == 7
    assert len(shell.started) == 6
    err = capfd.readouterr().err
    assert "in 0.01 s" in err and "in 0.02 s" in err and "3 attempts in a row have failed: giving up" in err
    assert Shell(("kill -ABRT $$",)).run() == 128 + signal.SIGABRT


def test_a_long_attempt_starts_the_count_afresh(monkeypatch):
    monkeypatch.setattr(launch, "HEALTHY_SECONDS", 0.0)
    assert Shell(("exit 1",), ("exit 1",), ("exit 1",), ("exit 0",)).run(restarts=1) == 0


def test_bad_input_is_not_tried_again():
    """Process 0 refuses, and the others fail for want of it."""
    shell = Shell(("sleep 0.05; exit 2", "exit 134"))
    assert shell.run(restarts=5) == 2 and len(shell.started) == 2


def test_who_saved_for_himself_goes_on():
    """A worker was told to stop, all saved and left; nobody told the launcher."""
    shell = Shell(("exit 143", "exit 143"), ("exit 0", "exit 0"))
    assert shell.run(restarts=1) == 0 and len(shell.started) == 4


def test_a_process_that_hangs_when_others_are_done_is_ended():
    shell = Shell(("exit 0", WAIT), ("exit 0", "exit 0"))
    assert shell.run(restarts=1, grace=0.1) == 0 and len(shell.started) == 4


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_are_passed_on(tmp_path, number):
    trap = f"trap 'touch {tmp_path}/$JAX_PROCESS_ID; exit 143' TERM; touch {tmp_path}/up$JAX_PROCESS_ID; while :; do sleep 0.01; done"
    shell = Shell((trap, trap))

    def tell() -> None:
        while len(list(tmp_path.iterdir())) < 2:
            time.sleep(0.005)
        os.kill(os.getpid(), number)

    # Whoever starts the tests in the background has them ignore Ctrl-C.
    before = signal.signal(number, signal.default_int_handler)
    try:
        teller = threading.Thread(target=tell)
        teller.start()
        assert shell.run(restarts=5) == 143
        teller.join()
        assert {p.name for p in tmp_path.iterdir()} == {"0", "1", "up0", "up1"}
        assert len(shell.started) == 2 and signal.getsignal(number) is signal.default_int_handler
    finally:
        signal.signal(number, before)


def test_who_does_not_stop_is_killed(tmp_path):
    shell = Shell((f"trap '' TERM; touch {tmp_path}/up; while :; do sleep 0.01; done",))

    def tell() -> None:
        while not (tmp_path / "up").exists():
            time.sleep(0.005)
        os.kill(os.getpid(), signal.SIGTERM)

    teller = threading.Thread(target=tell)
    teller.start()
    assert shell.run(restarts=5, grace=0.1) == 143
    teller.join()
    assert shell.processes[0].returncode == -signal.SIGKILL


def test_the_command_line(monkeypatch, tmp_path):
    seen = tmp_path / "seen.json"
    report = f"import json, os, sys; json.dump([sys.argv[1:], os.environ.get('JAX_NUM_PROCESSES')], open({str(seen)!r}, 'w'))"
    fake = tmp_path / "python"
    fake.write_text(f'#!/bin/sh\nexec {sys.executable} -c "{report}" "$@"\n')
    fake.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(fake))
    words = ["--config", "some file.py", "--workdir", "x", "--", "y"]
    assert launch.main(["--restarts", "0", "--", "train", *words]) == 0
    assert json.loads(seen.read_text()) == [["-m", "qaperso.train", *words], None]
    assert launch.main(["--processes", "2", "--", "evaluate"]) == 0
    assert json.loads(seen.read_text()) == [["-m", "qaperso.evaluate"], "2"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "found nothing after --, expected a command: ... -- train --config FILE --workdir DIR"),
        (["--processes", "2"], "found nothing after --"),
        (["--", "trian"], "found 'trian'; did you mean 'train'? after --"),
        (["--processes", "0", "--", "train"], "--processes is 0, expected 1 or more"),
        (["--restarts", "-1", "--", "train"], "--restarts is -1, expected 0 or more"),
    ],
)
def test_bad_arguments(words, said, capsys):
    assert launch.main(words) == 2
    assert capsys.readouterr().err.startswith(f"error: {said}")


def test_only_what_follows_the_dashes_is_the_command(capsys):
    with pytest.raises(SystemExit) as stop:
        launch.main(["--process", "2", "--", "train"])
    assert stop.value.code == 2 and "unrecognized arguments" in capsys.readouterr().err
