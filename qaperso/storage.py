"""A run's folder: one run at a time works in it, and what its disk refuses is said in one line."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from qaperso.errors import UserError

LOCK = "lock"
# Seconds for which a lock of another machine is waited for. Where that machine died, its server frees the lock when the
# lease ends: after 90 seconds on a Linux NFS server as it comes.
LEASE_SECONDS = 120.0
REFUSALS = {
    errno.ENOSPC: "the disk is full; make room and run again: it goes on from its newest checkpoint",
    errno.EDQUOT: "the disk quota is used up; make room and run again: it goes on from its newest checkpoint",
    errno.EROFS: "the disk is read-only; give a --workdir that can be written to",
    errno.EACCES: "access is denied; give a --workdir that can be written to",
    errno.EPERM: "access is denied; give a --workdir that can be written to",
    errno.EIO: "the disk fails (input/output error); have it looked at, and give a --workdir on another one",
    errno.ESTALE: "the network disk has lost the file; mount it anew and run again",
}


def refusal(error: BaseException) -> str | None:
    """What a disk refused and how to mend it; None where the error is of another kind.

    Libraries put the system's error into the text of their own, so causes and texts are looked at as well.
    """
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        if isinstance(error, OSError) and error.errno in REFUSALS:
            return REFUSALS[error.errno]
        text = str(error)
        for number, what in REFUSALS.items():
            if os.strerror(number) in text:
                return what
        error = error.__cause__ or error.__context__
    return None


@contextlib.contextmanager
def plainly(folder: Path) -> Iterator[None]:
    """Errors of a folder's disk become one line; all others pass as they are.

    Raises:
      UserError: the disk is full, read-only, barred or failing.
    """
    try:
        yield
    except (OSError, ValueError, RuntimeError) as error:
        what = refusal(error)
        if what is None:
            raise
        where = error.filename if isinstance(error, OSError) and error.filename else folder
        raise UserError(f"{where}: {what}") from error


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keeps other runs out of a folder.

    The system holds the lock for the process, not the file: it is free again once the process has ended, however it did.

    Args:
      folder: which exists.

    Raises:
      UserError: another run works in the folder, or it cannot be written to.
    """
    with plainly(folder):
        file = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        _take(file, folder)
        with plainly(folder):
            os.ftruncate(file, 0)
            os.pwrite(file, f"process {os.getpid()} on {socket.gethostname()}".encode(), 0)
        try:
            yield
        finally:
            os.ftruncate(file, 0)
    finally:
        os.close(file)


def _take(file: int, folder: Path) -> None:
    deadline, told = time.monotonic() + LEASE_SECONDS, False
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError as error:
            holder = os.pread(file, 200, 0).decode(errors="replace").strip() or "another process"
            elsewhere = not holder.endswith(f" on {socket.gethostname()}")
            if not elsewhere or time.monotonic() > deadline:
                raise UserError(
                    f"{folder} is the workdir of a run that is under way ({holder}); wait for it or stop it, or give "
                    "another --workdir"
                ) from error
            if not told:
                print(f"{folder} is held by {holder}; waiting up to {LEASE_SECONDS:.0f} s for it", file=sys.stderr)
                told = True
            time.sleep(1.0)
        except OSError as error:
            # Some network file systems have no locks.
            print(
                f"{folder} cannot be locked ({error.strerror}); make sure that no other run works in it",
                file=sys.stderr,
            )
            return
