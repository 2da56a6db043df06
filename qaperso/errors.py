"""Exit codes, and errors that are the user's to mend: one line, exit code 2, no traceback."""

from __future__ import annotations

import contextlib
import difflib
import functools
import os
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

# What a scheduler may start again is every exit code but 0 and this one.
USER_ERROR = 2
# Stopped by SIGTERM, after saving.
STOPPED = 143


class UserError(Exception):
    """Something in the input is wrong.

    The message is one line that names the file, line or key, says what was found and what was expected, and how to
    mend it.
    """


def nearest(name: str, valid: Iterable[str]) -> str:
    """Returns `; did you mean 'x'?` for the closest valid name, or the list of valid names when none is close."""
    valid = sorted(map(str, valid))
    close = difflib.get_close_matches(str(name), valid, n=1, cutoff=0.5)
    if close:
        return f"; did you mean '{close[0]}'?"
    shown = ", ".join(valid[:12]) + (", ..." if len(valid) > 12 else "")
    return f"; valid: {shown}" if valid else ""


@contextlib.contextmanager
def running(what: str, path: Path, explain: Callable[[BaseException], str] = lambda _: "") -> Iterator[None]:
    """While a Python file of the user's runs: whatever it raises becomes one line that says where.

    Args:
      what: the file is, such as "config".
      path: of the file.
      explain: what is wrong and how to mend it, of an error that it knows; else "".

    Raises:
      UserError: instead of any exception, `SystemExit` among them, but a UserError.
    """
    try:
        yield
    except UserError:
        raise
    except (Exception, SystemExit) as error:
        said = error.msg if isinstance(error, SyntaxError) else str(error)
        found = " ".join(f"{type(error).__name__}: {said}".split()).removesuffix(":")
        file, line = _raised(error, path)
        place = f"{what} '{file}'" + (f", line {line}" if line else "")
        told = explain(error) or f"found {found}, expected code that runs; mend that {'line' if line else 'file'}"
        raise UserError(f"{place}: {told}") from error


def _raised(error: BaseException, path: Path) -> tuple[Path, int | None]:
    """The innermost line of the file, or of one in its folder that it ran; no line where none was reached."""
    lines = [(Path(frame.f_code.co_filename), line) for frame, line in traceback.walk_tb(error.__traceback__)]
    if isinstance(error, SyntaxError) and error.filename:
        lines.append((Path(error.filename), error.lineno))
    folder = path.resolve().parent
    own = [(file, line) for file, line in lines if file.is_file() and file.resolve().parent == folder]
    return own[-1] if own else (path, None)


def command(main: Callable[..., int | None]) -> Callable[..., int]:
    """Wraps a command-line entry point: a UserError becomes one line on stderr and exit code 2.

    One of several JAX processes that fails, however it does, ends at once: an orderly exit waits for the others, which wait
    for this one.
    """

    @functools.wraps(main)
    def run(*args, **kwargs) -> int:
        try:
            return main(*args, **kwargs) or 0
        except UserError as error:
            print("error: " + " ".join(str(error).split()), file=sys.stderr)
            return leave(USER_ERROR)
        except Exception:
            if not _among_others():
                raise
            traceback.print_exc()
            return leave(1)

    return run


def leave(code: int) -> int:
    """An exit code for the end of a command; one of several JAX processes ends here."""
    if _among_others():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code


def _among_others() -> bool:
    """Whether this process has joined others; commands without JAX have not."""
    jax = sys.modules.get("jax")
    return jax is not None and jax.distributed.is_initialized()
