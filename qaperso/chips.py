"""Accelerators by their makers' figures, and how many of them are wired together."""

from __future__ import annotations

import dataclasses
import math
import re

from qaperso.errors import UserError, nearest

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """Published figures of one chip.

    Attributes:
      flops: dense bfloat16 FLOP/s.
      efficiency: share of them that kernels reach which compute binds; fitted, see `roofline`.
      hbm_bytes: of memory.
      hbm_bandwidth: bytes/s between memory and compute units.
      link_bandwidth: bytes/s that leave the chip over all of its links together (half of what is called bidirectional).
      axes: dimensions of the grid that links make.
      ring: from how many chips on an axis of the grid is closed to a ring.
      largest: most chips that such links join.
      source: where the figures stand.
    """

    flops: float
    efficiency: float
    hbm_bytes: int
    hbm_bandwidth: float
    link_bandwidth: float
    axes: int
    ring: int
    largest: int
    source: str


TPU_PAGES = "https://docs.cloud.google.com/tpu/docs/"
CHIPS = {
    "v5e": Chip(197e12, 0.84, 16 * GIB, 819e9, 200e9, 2, 16, 256, TPU_PAGES + "v5e"),
    "v5p": Chip(459e12, 0.818, 95 * GIB, 2765e9, 600e9, 3, 4, 8960, TPU_PAGES + "v5p"),
    "v6e": Chip(918e12, 0.598, 32 * GIB, 1640e9, 448e9, 2, 16, 256, TPU_PAGES + "v6e"),
}


@dataclasses.dataclass(frozen=True)
class Topology:
    """Chips of one kind that links join.

    Attributes:
      name: as given, such as "v5e:4x4".
      chip: its figures.
      grid: chips along each axis.
    """

    name: str
    chip: Chip
    grid: tuple[int, ...]

    @property
    def devices(self) -> int:
        """How many chips; each is one JAX device."""
        return math.prod(self.grid)

    def bandwidth(self, group: int) -> float:
        """Bytes/s that one chip sends in a collective of `group` chips, all its useful links at work.

        A group lies along as few axes as hold it. An axis that is no ring gives half: what goes round a ring both ways
        must pass the middle of a line one way.
        """
        held, share = 1, 0.0
        for size in sorted(self.grid, reverse=True):
            if held >= group:
                break
            held *= size
            share += 1.0 if size >= self.chip.ring else 0.5
        return self.chip.link_bandwidth * share / self.chip.axes


def topology(name: str) -> Topology:
    """Reads "KIND:AxB", such as "v5e:4x4" or "v5p:4x4x4".

    Raises:
      UserError: no such kind, or not a grid that it comes in.
    """
    kind, _, size = name.partition(":")
    if kind not in CHIPS:
        raise UserError(f"topology '{name}' is of no known chip{nearest(kind, CHIPS)}; write for example v5e:4x4")
    chip = CHIPS[kind]
    if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", size):
        raise UserError(f"topology '{name}': expected {kind}:{'x'.join('4' * chip.axes)}, chips along each axis")
    grid = tuple(map(int, size.split("x")))
    if len(grid) != chip.axes or math.prod(grid) > chip.largest:
        raise UserError(
            f"topology '{name}': {kind} chips come in grids of {chip.axes} axes and at most {chip.largest} chips"
        )
    return Topology(name, chip, grid)
