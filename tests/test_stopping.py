"""SIGTERM in training, in evaluation, and among several processes."""

from __future__ import annotations

import os
import signal

import jax
import pytest
from tiny import call
from untrained import mesh

from qaperso import errors, evaluate, stopping
from qaperso.errors import UserError


def terminate() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def test_one_process_stops_at_once():
    before = signal.getsignal(signal.SIGTERM)
    with stopping.StopSignal(mesh()) as stop:
        assert not stop.agreed()
        terminate()
        assert stop.agreed() and stop.agreed()
    assert signal.getsignal(signal.SIGTERM) is before


def test_among_several_the_answer_is_that_of_the_call_before(monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with stopping.StopSignal(mesh(4)) as stop:
        assert not stop.agreed() and not stop.agreed()
        terminate()
        assert [stop.agreed(), stop.agreed(), stop.agreed()] == [False, True, True]


def test_leaving_at_once():
    before, reached = signal.getsignal(signal.SIGTERM), []
    with pytest.raises(stopping.Stopped), stopping.at_once():
        try:
            terminate()
            reached.append("after")
        except Exception:
            reached.append("caught")
    assert not reached and signal.getsignal(signal.SIGTERM) is before


def test_evaluation_leaves_with_143(monkeypatch):
    monkeypatch.setattr(evaluate, "check_arguments", lambda known: ([], []))
    monkeypatch.setattr(evaluate, "start_runtime", lambda: None)
    monkeypatch.setattr(evaluate, "score", lambda *_: terminate())
    code, out, err = call(evaluate.main, "--workdir", "x")
    assert (code, out) == (143, "")
    assert err == "stopped by SIGTERM; replies written so far are kept, run again to go on\n"


class Ended(BaseException):
    """Stands for the end of the process."""


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [(UserError("a line"), 2, "error: a line\n"), (ValueError("a fault"), 1, "ValueError: a fault\n")],
)
def test_one_of_several_processes_that_fails_ends_at_once(monkeypatch, capsys, error, code, said):
    """Alone it ends in order; else it would wait for the others, and they for it."""

    def main() -> int:
        raise error

    def leave(number: int) -> None:
        raise Ended(number)

    monkeypatch.setattr(errors.os, "_exit", leave)
    if code == 2:
        assert errors.command(main)() == 2
    else:
        with pytest.raises(ValueError, match="a fault"):
            errors.command(main)()
    monkeypatch.setattr(jax.distributed, "is_initialized", lambda: True)
    capsys.readouterr()
    with pytest.raises(Ended) as end:
        errors.command(main)()
    assert end.value.args == (code,) and capsys.readouterr().err.endswith(said)
