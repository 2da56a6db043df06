"""Errors that are the user's to mend: one line, exit code 2, no traceback."""

from __future__ import annotations

import difflib
import functools
import sys
from collections.abc import Callable, Iterable


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


def command(main: Callable[..., int | None]) -> Callable[..., int]:
    """Wraps a command-line entry point: a UserError becomes one line on stderr and exit code 2."""

    @functools.wraps(main)
    def run(*args, **kwargs) -> int:
        try:
            return main(*args, **kwargs) or 0
        except UserError as error:
            print("error: " + " ".join(str(error).split()), file=sys.stderr)
            return 2

    return run
