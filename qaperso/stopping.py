"""SIGTERM: training saves first, evaluation leaves at once. Either way the exit code is 143, and the next start goes on."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec


class StopSignal:
    """Listens for SIGTERM while it is entered; all hosts agree on the step at which they stop.

    Among several processes the answer is that of the call before: whether any of them had been told by then. So nobody
    waits for a step that has just been dispatched.
    """

    def __init__(self, mesh: Mesh) -> None:
        """`mesh` of all devices."""
        self._heard, self._asked = False, None
        self._each = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
        self._any = jax.jit(jnp.max, out_shardings=NamedSharding(mesh, PartitionSpec()))

    def __enter__(self) -> StopSignal:
        self._before = signal.signal(signal.SIGTERM, self._hear)
        return self

    def __exit__(self, *_: Any) -> None:
        signal.signal(signal.SIGTERM, self._before)

    def _hear(self, *_: Any) -> None:
        self._heard = True

    def agreed(self) -> bool:
        """Whether to stop now; the same on all hosts, which must call it equally often."""
        if jax.process_count() == 1:
            return self._heard
        before, flag = self._asked, np.asarray([self._heard], np.int32)
        flags = jax.make_array_from_callback((self._each.mesh.size,), self._each, lambda _: flag)
        self._asked = self._any(flags)
        return before is not None and bool(before)


class Stopped(BaseException):
    """SIGTERM came; no handler of ordinary errors catches it."""


@contextlib.contextmanager
def at_once() -> Iterator[None]:
    """SIGTERM ends the block with `Stopped`: for work that keeps what it has finished as it goes."""

    def leave(*_: Any) -> None:
        raise Stopped

    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
