"""From work to time: a roofline over every kernel, with one constant for each kind of chip, fitted on a published run.

A kernel takes as long as its products or its bytes, whichever is more:

    seconds = max(FLOPs / (efficiency * peak), bytes / (streaming * memory's peak))

Copies and communication read and write memory while kernels run, and take what these leave of it. Links come on top: no
communication is taken to be hidden. `chips.Chip.efficiency` is what one of MaxText's published pre-training runs on such
chips says; `tests/test_roofline.py` fits it again and checks that other runs come out. `chips.Chip.streaming` was chosen: these
runs hardly tell, any value from 0.5 to 0.9 does with efficiencies that are fitted to it. Of GPUs both are those of one that was timed.
"""

from __future__ import annotations

import dataclasses
import math

from qaperso.chips import Topology
from qaperso.hlo import Cost, Kernel
from qaperso.models.config import DecoderConfig


@dataclasses.dataclass(frozen=True)
class Work:
    """What one chip does in a step.

    Attributes:
      kernels: FLOPs and bytes of each, what is recomputed included.
      transfers: bytes that are read from and written to memory while they run.
      sent: (bytes, chips) for each collective: what one chip sends in a step, and how many chips take part.
    """

    kernels: tuple[Kernel, ...]
    transfers: float
    sent: tuple[tuple[float, int], ...]


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A predicted step.

    Attributes:
      parts: {"compute", "HBM", "interconnect": seconds}: kernels that their products bind, those that memory binds with the
        transfers that wait for it, and links.
      seconds: of the step, their sum.
      mfu: useful FLOPs over what the chips could do in that time.
      bound: which of the three takes longest.
    """

    parts: dict[str, float]
    seconds: float
    mfu: float
    bound: str


def work_of(cost: Cost) -> Work:
    """The work of a compiled program."""
    return Work(cost.kernels, cost.transfers, tuple((c.sent * c.times, c.group) for c in cost.collectives))


def estimate(
    work: Work,
    topology: Topology,
    useful: float,
    efficiency: float | None = None,
    bandwidth: float | None = None,
) -> Estimate:
    """Predicts a step.

    Args:
      work: of one chip.
      topology: the chips.
      useful: FLOPs of one chip that count for MFU.
      efficiency: None = that of the chips.
      bandwidth: share of the memory's peak; None = that of the chips.
    """
    chip = topology.chip
    rate = chip.flops * (chip.efficiency if efficiency is None else efficiency)
    speed = chip.hbm_bandwidth * (chip.streaming if bandwidth is None else bandwidth)
    parts, moving = {"compute": 0.0, "HBM": 0.0, "interconnect": 0.0}, work.transfers / speed
    for flops, moved, times in work.kernels:
        binds = "compute" if flops / rate >= moved / speed else "HBM"
        parts[binds] += times * max(flops / rate, moved / speed)
        moving += times * moved / speed
    parts["HBM"] += max(0.0, moving - parts["compute"] - parts["HBM"])
    parts["interconnect"] = sum(sent / topology.bandwidth(group) for sent, group in work.sent if sent)
    seconds = sum(parts.values())
    return Estimate(parts, seconds, useful / seconds / chip.flops, max(parts, key=parts.__getitem__))


@dataclasses.dataclass(frozen=True)
class Pretraining:
    """A published run of full pre-training in bfloat16, fully sharded over all chips.

    Attributes:
      model: shape of the decoder.
      topology: name of the chips.
      length: tokens of a sequence.
      rows: sequences of a chip in a step.
      mfu: published share of the peak.
      remat: what is recomputed: "full", whole layers; "qkv", all but queries, keys and values.
    """

    model: DecoderConfig
    topology: str
    length: int
    rows: int
    mfu: float
    remat: str


def matmul_sizes(model: DecoderConfig) -> tuple[int, int]:
    """Entries of the kernels of one layer, and of the output table."""
    wide, narrow = model.heads * model.head_dim, model.kv_heads * model.head_dim
    return model.embed * (2 * wide + 2 * narrow + 3 * model.mlp), model.vocab * model.embed


def useful_flops(run: Pretraining) -> float:
    """Of one chip in a step, as the published figures count them: 6 a kernel's entry and token, scores without a mask."""
    layer, table = matmul_sizes(run.model)
    scores = 12 * run.length * run.model.heads * run.model.head_dim
    return float(run.rows * run.length) * (run.model.layers * (6 * layer + scores) + 6 * table)


def pretraining_work(run: Pretraining, chips: int) -> Work:
    """What one chip does in a step of such a run, from shapes alone.

    Of a recomputed layer nothing reads again what the last product gives. Attention is one kernel that computes the causal
    half, forward, again in the backward pass, and there with five products for two; it reads and writes what stands before
    and behind it only.

    Args:
      run: its sizes.
      chips: that share the parameters.
    """
    m = run.model
    layer, table = matmul_sizes(m)
    tokens, wide, narrow = run.rows * run.length, m.heads * m.head_dim, m.kv_heads * m.head_dim
    first = [(m.embed, wide), (m.embed, narrow), (m.embed, narrow)]
    later = [(wide, m.embed), (m.embed, m.mlp), (m.embed, m.mlp)]
    again = (first if run.remat == "full" else []) + later

    def product(size: tuple[int, int], times: int) -> Kernel:
        moved = tokens * sum(size) + math.prod(size)
        return Kernel(2.0 * tokens * math.prod(size), 2.0 * moved, times)

    # Each product has two more in the backward pass, and so have the other kernels: two norms, two sums and the gate.
    products = [product(size, 3 * m.layers) for size in (*first, *later, (m.mlp, m.embed))]
    products += [product(size, m.layers) for size in again] + [product((m.embed, m.vocab), 3)]
    # Scores and weighted values of the causal half are 2 S (H d) each token.
    scores, beside = 2.0 * tokens * run.length * wide, 4.0 * tokens * (wide + narrow)
    attention = [Kernel(scores * passes, beside, m.layers) for passes in (1.0, 1.0, 2.5)]
    plain = [Kernel(0.0, 2.0 * tokens * (5 * m.embed + 3 * m.mlp), 3 * m.layers)]
    plain += [Kernel(0.0, 2.0 * tokens * (4 * m.embed + 3 * m.mlp), m.layers)]
    # Logits as float32: written, read by the softmax, and their gradient written and read twice.
    plain += [Kernel(0.0, 4.0 * 5 * tokens * m.vocab)]
    parameters = m.layers * layer + 2 * table
    # The optimiser reads and writes its own part. Gathered parameters are written twice, their gradients read.
    plain += [Kernel(0.0, 24 * parameters / chips)]
    sent = 2 * parameters * (chips - 1) / chips
    return Work((*products, *attention, *plain), 3 * 2.0 * parameters, ((3 * sent, chips),))


def fit(work: Work, topology: Topology, seconds: float, bandwidth: float | None = None) -> float:
    """The efficiency with which a run takes as long as it did, by bisection: a step is the shorter the larger it is."""
    low, high = 0.01, 1.0
    for _ in range(50):
        middle = (low + high) / 2
        slow = estimate(work, topology, 1.0, middle, bandwidth).seconds > seconds
        low, high = (middle, high) if slow else (low, middle)
    return low
