"""One run at a time in a folder, and what disks refuse."""

from __future__ import annotations

import errno
import fcntl
import itertools
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from qaperso import checkpoint, storage
from qaperso.errors import UserError

HOLDER = """
import pathlib, sys, time
from qaperso import storage
with storage.locked(pathlib.Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_second_run_is_refused_and_a_later_one_is_not(tmp_path):
    with storage.locked(tmp_path):
        said = rf"is the workdir of a run that is under way \(process {os.getpid()} on .*another --workdir"
        with pytest.raises(UserError, match=said), storage.locked(tmp_path):
            pass
        assert f"process {os.getpid()} on" in (tmp_path / storage.LOCK).read_text()
    assert (tmp_path / storage.LOCK).read_bytes() == b""
    with storage.locked(tmp_path):
        pass


def test_a_lock_ends_with_its_process_however_that_ends(tmp_path):
    root = str(Path(__file__).parents[1])
    words = [sys.executable, "-c", HOLDER, str(tmp_path)]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True, env=os.environ | {"PYTHONPATH": root}) as holder:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(UserError, match=f"process {holder.pid} on"), storage.locked(tmp_path):
            pass
        holder.kill()
        assert holder.wait() == -signal.SIGKILL
    assert f"process {holder.pid}" in (tmp_path / storage.LOCK).read_text()  # it had no time to tidy up
    with storage.locked(tmp_path):
        pass


def test_a_lock_of_another_machine_is_waited_for(tmp_path, monkeypatch, capsys):
    slept = []
    with storage.locked(tmp_path):
        monkeypatch.setattr(socket, "gethostname", lambda: "elsewhere")
        monkeypatch.setattr(storage, "LEASE_SECONDS", 60.0)
        clock = itertools.count(0, 20)
        monkeypatch.setattr(storage.time, "monotonic", lambda: next(clock))
        monkeypatch.setattr(storage.time, "sleep", slept.append)
        with pytest.raises(UserError, match="under way"), storage.locked(tmp_path):
            pass
    # Begun at 0; looked at the clock at 20, 40, 60 and 80.
    assert slept == [1.0] * 3
    assert capsys.readouterr().err.count("waiting up to 60 s") == 1


def test_a_file_system_without_locks_is_told(tmp_path, monkeypatch, capsys):
    def flock(*_):
        raise OSError(errno.ENOTSUP, os.strerror(errno.ENOTSUP))

    monkeypatch.setattr(fcntl, "flock", flock)
    with storage.locked(tmp_path):
        pass
    assert "cannot be locked" in capsys.readouterr().err


def test_a_folder_that_cannot_be_written_to(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(tmp_path / "lock"))

    monkeypatch.setattr(storage.os, "open", refuse)
    with pytest.raises(UserError, match="lock: the disk is read-only; give a --workdir"), storage.locked(tmp_path):
        pass


def test_a_full_disk(tmp_path):
    (tmp_path / "a.json.partial").symlink_to("/dev/full")
    with pytest.raises(UserError, match="the disk is full; make room"), storage.plainly(tmp_path):
        checkpoint.write_json(tmp_path / "a.json", {"text": "x" * 10_000})


@pytest.mark.parametrize("number", storage.REFUSALS)
def test_refusals_are_found_inside_of_other_errors(number):
    inner = OSError(number, os.strerror(number), "some/file")
    assert storage.refusal(inner) == storage.REFUSALS[number]
    assert (
        storage.refusal(ValueError(f"RESOURCE_EXHAUSTED: {os.strerror(number)} [path='x']")) == storage.REFUSALS[number]
    )
    try:
        try:
            raise inner
        except OSError as error:
            raise RuntimeError("the save has failed") from error
    except RuntimeError as outer:
        assert storage.refusal(outer) == storage.REFUSALS[number]


def test_other_errors_pass(tmp_path):
    assert storage.refusal(FileNotFoundError(errno.ENOENT, "No such file or directory", "x")) is None
    for error in (ValueError("shapes differ"), FileNotFoundError("x"), RuntimeError("no"), KeyError("k")):
        with pytest.raises(type(error)) as caught, storage.plainly(tmp_path):
            raise error
        assert caught.value is error
