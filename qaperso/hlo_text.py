"""The text of a compiled program, an HLO module, as records."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping

BYTES = {"pred": 1, "s4": 0.5, "u4": 0.5, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "bf16": 2, "f16": 2}
BYTES |= {"s32": 4, "u32": 4, "f32": 4, "s64": 8, "u64": 8, "f64": 8, "c64": 8, "c128": 16, "f8e4m3fn": 1, "f8e5m2": 1}

_ARRAY = re.compile(r"\b(pred|token|opaque|[a-z]+\d+\w*)\[([\d,]*)\](\{[^}]*\})?")
NAME = re.compile(r"%([\w.\-]+)")
_HEAD = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\) -> .*\{$")
_LINE = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (.*)$")
_CALLED = re.compile(r"\b(calls|body|condition|to_apply|true_computation|false_computation)=%?([\w.\-]+)")


@dataclasses.dataclass(frozen=True)
class Array:
    """One array of an instruction's result: element type, dimensions, and whether it lies in the device's main memory."""

    dtype: str
    dims: tuple[int, ...]
    main: bool = True

    @property
    def bytes(self) -> float:
        """Its size, without the padding of tiles."""
        return float(BYTES.get(self.dtype, 0) * math.prod(self.dims))

    def __str__(self) -> str:
        return f"{self.dtype}[{','.join(map(str, self.dims))}]"


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a computation; `rest` is what stands behind the operands, or the number of a parameter or constant."""

    name: str
    opcode: str
    result: tuple[Array, ...]
    operands: tuple[str, ...]
    rest: str
    root: bool

    @property
    def kind(self) -> str:
        """The opcode, without the -start of one whose end is an instruction of its own."""
        return self.opcode.removesuffix("-start")

    def called(self, key: str) -> str:
        """The computation under `key`; "" where there is none."""
        return dict(_CALLED.findall(self.rest)).get(key, "")


Computation = Mapping[str, Instruction]


def parse(text: str) -> tuple[dict[str, Computation], str]:
    """All computations by name, each {instruction: its line} in order, and the name of the entry."""
    found: dict[str, dict[str, Instruction]] = {}
    entry, current = "", {}
    for line in text.splitlines():
        if head := _HEAD.match(line):
            current = found[head[2]] = {}
            entry = head[2] if head[1] else entry
        elif body := _LINE.match(line):
            one = _instruction(body[2], body[3], bool(body[1]))
            current[one.name] = one
    return found, entry


def _instruction(name: str, text: str, root: bool) -> Instruction:
    end = _closing(text, 0) + 1 if text.startswith("(") else text.index(" ")
    result, text = text[:end], text[end:].lstrip()
    opcode, _, _ = text.partition("(")
    close = _closing(text, len(opcode))
    inner = text[len(opcode) + 1 : close]
    # Parameters and constants have a number where others have operands.
    rest = inner if opcode in ("parameter", "constant") else text[close + 1 :]
    return Instruction(name, opcode, _arrays(result), tuple(NAME.findall(inner)), rest, root)


def _closing(text: str, start: int) -> int:
    """Where the bracket that opens at `start` closes."""
    depth = 0
    for i in range(start, len(text)):
        depth += (text[i] == "(") - (text[i] == ")")
        if not depth:
            return i
    return len(text)


def _arrays(text: str) -> tuple[Array, ...]:
    # Memory space 0 is not written down; 1 is the chip's own fast memory, others are small or the host's.
    return tuple(
        Array(dtype, tuple(map(int, filter(None, dims.split(",")))), "S(" not in layout)
        for dtype, dims, layout in _ARRAY.findall(text)
    )
