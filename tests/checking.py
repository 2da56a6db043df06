"""Annotations are checked under test: shapes by jaxtyping, everything else by beartype alone, which is much faster."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import jaxtyping
from beartype import beartype

_jaxtyped = jaxtyping.jaxtyped
_SHAPED = re.compile(r"\b(Bool|Float|Int|Key|Num|Shaped|UInt)(8|16|32|64)?\[")


def install() -> None:
    """Has everything that is imported from the package from now on checked at each call."""
    # The hook writes `@jaxtyping.jaxtyped(typechecker=...)` before each function and class.
    jaxtyping.jaxtyped = _decorator
    jaxtyping.install_import_hook("qaperso", "beartype.beartype")


def _decorator(*, typechecker: Any) -> Callable:
    return lambda what: _checked(what, typechecker)


def _checked(what: Any, typechecker: Any) -> Any:
    """What is annotated with shapes goes to jaxtyping, whose check takes a tenth of a millisecond a call.

    A function within a function is made anew at every call of that, and its check with it, which takes milliseconds: without shapes it
    has none.
    """
    if isinstance(what, type) or any(_SHAPED.search(str(a)) for a in getattr(what, "__annotations__", {}).values()):
        return _jaxtyped(what, typechecker=typechecker)
    if "<locals>" in getattr(what, "__qualname__", ""):
        return what
    for name, annotation in getattr(what, "__annotations__", {}).items():
        what.__annotations__[name] = _resolved(annotation, what.__globals__)
    return beartype(what)


def _resolved(annotation: Any, names: dict[str, Any]) -> Any:
    """What an annotation says; anything goes where it names what is not known yet, or is imported for type checkers only."""
    try:
        return eval(annotation, names) if isinstance(annotation, str) else annotation
    except NameError:
        return Any
