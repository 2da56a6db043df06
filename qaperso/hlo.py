"""What a compiled program does on one device, read from its HLO text.

XLA's own cost analysis counts the body of a loop once, and a stack of layers is a loop. Here each computation counts as
often as it runs: XLA writes trip counts down, or, for TPUs, leaves a condition that compares a counter with a constant. A loop
whose count nobody knows, such as that of decoding, counts once. A collective that runs beside other kernels is written again
in each of them, under one channel: it counts once.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from qaperso.hlo_text import NAME, Array, Computation, Instruction, parse

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
# What touches no memory itself.
FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "partition-id", "replica-id"}
FREE |= {"opt-barrier", "iota", "while", "conditional", "call", "async-start", "async-update", "async-done"}
SLICES = ("dynamic-slice", "slice", "gather")
# Products of queries' and keys' blocks in the kernels of attention (`models/splash.py`), whose inside is not in the text.
ATTENTION = {"fwd": 2, "dq": 3, "dkv": 4}

_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")


@dataclasses.dataclass(frozen=True)
class Collective:
    """Communication of one instruction.

    Attributes:
      kind: one of COLLECTIVES.
      arrays: what it works on, on one device: the gathered arrays of an all-gather, else its operands.
      bytes: of those arrays, for one run.
      group: how many devices take part.
      times: how often it runs in the program.
      channel: its number; 0 = none.
    """

    kind: str
    arrays: tuple[Array, ...]
    bytes: float
    group: int
    times: int = 1
    channel: int = 0

    @property
    def sent(self) -> float:
        """Bytes that one device sends in one run, by ring algorithms."""
        share = {"all-reduce": 2 * (self.group - 1) / self.group, "collective-permute": 1.0}
        return self.bytes * share.get(self.kind, (self.group - 1) / self.group)


class Kernel(NamedTuple):
    """What one kernel does in one run, and how often it runs; `bytes` are read from and written to main memory."""

    flops: float
    bytes: float
    times: int = 1


@dataclasses.dataclass(frozen=True)
class Cost:
    """What a program does on one device.

    Attributes:
      kernels: one after another; FLOPs are those of matrix products, convolutions and attention; bytes those of operands and
        results, slices as slices.
      transfers: bytes that are read from and written to main memory while kernels run: by communication, and copies
        into and out of fast memory.
      collectives: with how often each runs.
    """

    kernels: tuple[Kernel, ...] = ()
    transfers: float = 0.0
    collectives: tuple[Collective, ...] = ()

    @property
    def flops(self) -> float:
        """Of all kernels."""
        return sum((k.flops * k.times for k in self.kernels), 0.0)

    @property
    def hbm_bytes(self) -> float:
        """Read from and written to main memory, transfers included."""
        return sum((k.bytes * k.times for k in self.kernels), self.transfers)

    def repeated(self, times: int) -> Cost:
        """The same, `times` times."""
        kernels = tuple(k._replace(times=k.times * times) for k in self.kernels)
        found = tuple(dataclasses.replace(c, times=c.times * times) for c in self.collectives)
        return Cost(kernels, self.transfers * times, found)


def _once(collectives: Sequence[Collective]) -> tuple[Collective, ...]:
    """One collective of each channel: the others are parts of it, in kernels that run meanwhile."""
    seen = {c.channel or -i: c for i, c in reversed(list(enumerate(collectives, 1)))}
    return tuple(reversed(seen.values()))


def cost(text: str) -> Cost:
    """What the compiled module does, every loop body as often as it runs.

    Args:
      text: of the optimised HLO module, as `jax.stages.Compiled.as_text` gives it.
    """
    computations, entry = parse(text)

    @functools.cache
    def inside_of(name: str) -> tuple[float, tuple[Collective, ...]]:
        """FLOPs and communication of a fused kernel."""
        inside, flops, found = computations[name], 0.0, ()
        for one in inside.values():
            flops += _flops(one, inside)
            found += _collectives(one, inside, True)
            if one.opcode in ("fusion", "call", "async-start"):
                more = inside_of(one.called("to_apply") or one.called("calls"))
                flops, found = flops + more[0], found + more[1]
        return flops, found

    @functools.cache
    def of(name: str) -> Cost:
        inside = computations[name]
        kernels, transfers, found, beside = [], 0.0, [], []
        for one in inside.values():
            flops, traffic, other = _flops(one, inside), _traffic(one, inside, computations), None
            found += _collectives(one, inside, False)
            if one.kind == "fusion":
                more, arriving = inside_of(one.called("calls"))
                flops += more
                beside += arriving
                found += arriving
            elif one.opcode == "while":
                other = of(one.called("body")).repeated(_trips(one, computations))
            elif one.opcode in ("call", "async-start"):
                other = of(one.called("to_apply") or one.called("calls"))
            elif one.opcode == "conditional":
                other = max((of(branch) for branch in _branches(one)), key=lambda c: (c.flops, c.hbm_bytes))
            if other is not None:
                kernels += other.kernels
                transfers += other.transfers
                found += other.collectives
            elif one.kind in COLLECTIVES or one.opcode.endswith("-start") and not flops:
                transfers += traffic
            elif flops or traffic:
                kernels.append(Kernel(flops, traffic))
        # What arrives beside other kernels is written once, whichever of them lists it.
        transfers += sum((c.bytes for c in _once(beside)), 0.0)
        return Cost(tuple(kernels), transfers, _once(found))

    return of(entry)


def _branches(one: Instruction) -> Sequence[str]:
    listed = _BRANCHES.search(one.rest)
    return NAME.findall(listed[1]) if listed else [one.called("true_computation"), one.called("false_computation")]


def _trips(one: Instruction, computations: Mapping[str, Computation]) -> int:
    """How often a loop runs; 1 where that is not known. Counters start at 0."""
    if written := _TRIPS.search(one.rest):
        return int(written[1])
    inside = computations[one.called("condition")]
    root = next(x for x in inside.values() if x.root)
    if root.opcode == "fusion":
        # The comparison as a kernel of its own: its operands are those of the kernel.
        fused = computations[root.called("calls")]
        test = next(x for x in fused.values() if x.root)
        given = {x.name: root.operands[int(x.rest)] for x in fused.values() if x.opcode == "parameter"}
        names = [given.get(name, name) for name in test.operands]
        inside = {**fused, **inside}
    else:
        test, names = root, list(root.operands)
    if test.opcode != "compare" or "direction=LT" not in test.rest:
        return 1
    counter, bound = (inside[name] for name in names)
    if bound.opcode != "constant":
        return 1
    return -(-int(bound.rest) // _stride(counter, computations[one.called("body")]))


def _stride(counter: Instruction, body: Computation) -> int:
    """What a loop adds to its counter each time; 1 where that cannot be read.

    The loops in which TPUs hide the gathering of a kernel behind its product take two of its parts at once.
    """
    place = re.search(r"index=(\d+)", counter.rest)
    root = next(x for x in body.values() if x.root)
    made = body.get(root.operands[int(place[1])]) if place and root.opcode == "tuple" else None
    added = [body[name] for name in made.operands if name in body] if made is not None and made.opcode == "add" else []
    return next((int(x.rest) for x in added if x.opcode == "constant"), 1)


def _group(rest: str) -> int:
    """Devices in each replica group of a collective; 2 for pairs."""
    if named := re.search(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}", rest):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", named[1]))
        # An axis, or a part of one: 'name':(devices before)devices.
        parts = re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", named[2])
        return math.prod(int(own or sizes[name]) for name, own in parts)
    if iota := re.search(r"replica_groups=\[\d+,(\d+)\]", rest):
        return int(iota[1])
    if listed := re.search(r"replica_groups=\{\{([\d,]*)\}", rest):
        return listed[1].count(",") + 1
    return 2


def _operands(one: Instruction, inside: Computation) -> list[Array]:
    return [a for name in one.operands if name in inside for a in inside[name].result]


def _collectives(one: Instruction, inside: Computation, fused: bool) -> tuple[Collective, ...]:
    if one.kind not in COLLECTIVES:
        return ()
    group, kind, arrays = _group(one.rest), one.kind, _operands(one, inside)
    if kind == "all-gather":
        axis = int(re.search(r"dimensions=\{(\d+)", one.rest)[1])
        arrays = [
            dataclasses.replace(a, dims=(*a.dims[:axis], a.dims[axis] * group, *a.dims[axis + 1 :])) for a in arrays
        ]
    users = [other.opcode for other in inside.values() if one.name in other.operands]
    if fused and kind == "all-reduce" and users and all(user == "dynamic-slice" for user in users):
        # How TPUs write a reduce-scatter: one kernel that sums and keeps the device's own part.
        kind = "reduce-scatter"
    channel = re.search(r"channel_id=(\d+)", one.rest)
    size = sum((a.bytes for a in arrays), 0.0)
    return (Collective(kind, tuple(arrays), size, group, channel=int(channel[1]) if channel else 0),)


def _flops(one: Instruction, inside: Computation) -> float:
    """2 for each multiplication of a matrix product, convolution or kernel of attention; 0 for anything else."""
    if one.opcode == "convolution":
        return _convolution(one, inside)
    if attention := re.match(r"splash_mha_(fwd|dq|dkv)", one.name):
        return ATTENTION[attention[1]] * _causal(_operands(one, inside))
    if attention := re.search(r'"__cudnn\$fmha\w*?(Backward)?"', one.rest):
        return (5 if attention[1] else 2) * _fused(one, inside)
    key = r'lhs_contracting_dim(?:s=\{|ensions":\[)([\d,"]*)'
    found = re.search(key, one.rest) if one.opcode in ("dot", "custom-call") else None
    if not found:
        return 0.0
    left = inside[one.operands[0]].result[0]
    return 2.0 * math.prod(one.result[0].dims) * math.prod(left.dims[int(i)] for i in re.findall(r"\d+", found[1]))


def _causal(operands: Sequence[Array]) -> float:
    """FLOPs of one product of queries and keys [..., H, S, d]; blocks that lie in the future are skipped."""
    blocks = operands[0].dims[-1]
    # Before the queries come tables of blocks, in integers; one row of one tower has no dimensions of its own.
    queries = next(a for a in operands if a.dtype.lstrip("b").startswith("f"))
    return 2.0 * math.prod(queries.dims) * queries.dims[-2] * (blocks + 1) / (2 * blocks)


def _fused(one: Instruction, inside: Computation) -> float:
    """FLOPs of one product of queries and keys [..., d] in cuDNN's attention, which is told the shape of their scores."""
    scores = re.search(r'"dimensions": ?\[([^\]]*)\]', one.rest)[1]
    share = 0.5 if '"CAUSAL"' in one.rest else 1.0
    return share * 2.0 * math.prod(map(int, re.findall(r"\d+", scores))) * _operands(one, inside)[0].dims[-1]


def _convolution(one: Instruction, inside: Computation) -> float:
    """Products that fall on padding or between dilated elements are not counted: TPUs write batched products so."""
    left, right = (inside[name].result[0] for name in one.operands[:2])
    lhs, rhs, out = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", one.rest).groups()
    window = dict(re.findall(r"(\w+)=([\dx_\-]+)", (re.search(r"window=\{([^}]*)\}", one.rest) or [None, ""])[1]))
    groups = int((re.search(r"batch_group_count=(\d+)", one.rest) or [None, 1])[1])
    total = 2.0 * one.result[0].dims[out.index("b")] * math.prod(right.dims[rhs.index(x)] for x in "io") / groups

    def option(name: str, i: int, default: str) -> str:
        return window[name].split("x")[i] if name in window else default

    for i, place in enumerate(c for c in out if c.isdigit()):
        size, kernel = left.dims[lhs.index(place)], right.dims[rhs.index(place)]
        stride, spread, step = (int(option(name, i, "1")) for name in ("stride", "lhs_dilate", "rhs_dilate"))
        low = int(option("pad", i, "0_0").split("_")[0])
        total *= _valid(size, kernel, one.result[0].dims[out.index(place)], stride, spread, step, low)
    return total


@functools.cache
def _valid(size: int, kernel: int, out: int, stride: int, spread: int, step: int, low: int) -> int:
    """Pairs of a result's and a kernel's place, along one dimension, that meet an element of the input."""
    at = (o * stride - low + k * step for o, k in itertools.product(range(out), range(kernel)))
    return sum(0 <= x <= (size - 1) * spread and x % spread == 0 for x in at)


def _traffic(one: Instruction, inside: Computation, computations: Mapping[str, Computation]) -> float:
    """Bytes that a kernel reads from and writes to main memory."""
    if one.opcode in FREE or one.opcode.endswith("-done"):
        return 0.0
    if one.kind == "fusion":
        return _fusion_traffic(one, inside, computations)
    if "AllocateBuffer" in one.rest:
        return 0.0
    operands = _operands(one, inside)
    read, written = _main(operands), _main(one.result)
    if one.opcode in SLICES:
        return 2 * written
    if one.kind in SLICES:
        # Only the part is read, and written where it does not go into the chip's own memory.
        part = one.result[1]
        return part.bytes * (operands[0].main + part.main)
    if one.opcode == "dynamic-update-slice":
        return 2 * _main(inside[one.operands[1]].result)
    if one.opcode == "copy-start" or "__cublas" in one.rest:
        # What else a product of cuBLAS gives is room to work in.
        written = _main(one.result[:1])
    elif one.opcode.endswith("-start") and len(one.result) >= 2 * len(operands):
        # The result lists the operands before what is written.
        written = _main(one.result[len(operands) : 2 * len(operands)])
    return read + written


def _main(arrays: Sequence[Array]) -> float:
    return sum((a.bytes for a in arrays if a.main), 0.0)


def _fusion_traffic(one: Instruction, inside: Computation, computations: Mapping[str, Computation]) -> float:
    """Of a fused kernel: what it slices of an operand, what it updates of a result, else all of them.

    What only passes through, and what communication beside the kernel sends and receives, is not the kernel's.
    """
    fused, total = computations[one.called("calls")], 0.0
    parameters, operands = _parameters(fused), _operands(one, inside)
    # One that runs beside others lists its operands before what it gives.
    given = one.result if one.opcode == "fusion" else one.result[len(operands) :]
    for number, array in enumerate(operands):
        if array.main:
            total += _read(array, list(_consumers(parameters[number].name, fused, computations)))
    for array, source in zip(given, _sources(fused), strict=False):
        if array.main and source is not None and source.opcode == "dynamic-update-slice":
            total += sum(a.bytes for a in fused[source.operands[1]].result)
        elif array.main and (source is None or not _passes(source)):
            total += array.bytes
    return total


def _passes(one: Instruction) -> bool:
    """Whether an instruction of a kernel moves nothing for it: what is handed on, and communication."""
    return one.kind in ("parameter", "tuple", *COLLECTIVES) or "AsyncCollective" in one.rest


def _parameters(computation: Computation) -> dict[int, Instruction]:
    return {int(one.rest): one for one in computation.values() if one.opcode == "parameter"}


def _consumers(
    name: str, inside: Computation, computations: Mapping[str, Computation]
) -> Iterator[tuple[Instruction, int]]:
    """What uses a value, and as which operand; bitcasts and fusions within the fusion are looked through."""
    for user in inside.values():
        for place, operand in enumerate(user.operands):
            if operand != name:
                continue
            if user.opcode == "bitcast":
                yield from _consumers(user.name, inside, computations)
            elif user.opcode == "fusion":
                inner = computations[user.called("calls")]
                yield from _consumers(_parameters(inner)[place].name, inner, computations)
            else:
                yield user, place


def _read(array: Array, used: Sequence[tuple[Instruction, int]]) -> float:
    """Bytes of an operand that a kernel reads, by what it does with it."""
    used = [(user, place) for user, place in used if not _passes(user)]
    if any(place or user.opcode not in (*SLICES, "dynamic-update-slice") for user, place in used):
        return array.bytes
    # What is updated in place is not read.
    return min(array.bytes, sum((user.result[0].bytes for user, _ in used if user.opcode in SLICES), 0.0))


def _sources(fused: Computation) -> list[Instruction | None]:
    """The instruction that makes each array of the result, bitcasts looked through."""
    root = next(one for one in fused.values() if one.root)
    names = root.operands if root.opcode == "tuple" else (root.name,)

    def source(name: str) -> Instruction | None:
        one = fused.get(name)
        return source(one.operands[0]) if one is not None and one.opcode == "bitcast" and one.operands else one

    return [source(name) for name in names]
