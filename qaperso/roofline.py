"""From work to time: a roofline over compute, memory and links, with two constants fitted on published runs.

    seconds = FLOPs / (EFFICIENCY * peak) + bytes / (BANDWIDTH * memory's peak) + bytes sent / links' peak

The three add up: nothing is taken to be hidden behind anything else. EFFICIENCY is the share of the peak at which products
run, BANDWIDTH that at which memory is read and written, with whatever the count of bytes leaves out. Both were fitted on two
of MaxText's published runs, on chips whose ratios of compute to memory differ by more than three;
`tests/test_roofline.py` fits them again and checks that the other runs come out.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from qaperso.chips import Topology
from qaperso.hlo import Cost
from qaperso.models.config import DecoderConfig

EFFICIENCY = 0.94
BANDWIDTH = 0.425


@dataclasses.dataclass(frozen=True)
class Work:
    """What one chip does in a step.

    Attributes:
      flops: of matrix products, what is recomputed included.
      hbm_bytes: read from and written to memory.
      sent: (bytes, chips) for each collective: what one chip sends in a step, and how many chips take part.
    """

    flops: float
    hbm_bytes: float
    sent: tuple[tuple[float, int], ...]


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A predicted step.

    Attributes:
      parts: {"compute", "HBM", "interconnect": seconds}.
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
    return Work(cost.flops, cost.hbm_bytes, tuple((c.sent * c.times, c.group) for c in cost.collectives))


def limits(work: Work, topology: Topology) -> dict[str, float]:
    """Seconds of each resource at its published speed."""
    chip = topology.chip
    return {
        "compute": work.flops / chip.flops,
        "HBM": work.hbm_bytes / chip.hbm_bandwidth,
        "interconnect": sum(sent / topology.bandwidth(group) for sent, group in work.sent if sent),
    }


def estimate(
    work: Work, topology: Topology, useful: float, efficiency: float = EFFICIENCY, bandwidth: float = BANDWIDTH
) -> Estimate:
    """Predicts a step.

    Args:
      work: of one chip.
      topology: the chips.
      useful: FLOPs of one chip that count for MFU.
      efficiency, bandwidth: the two constants.
    """
    each = limits(work, topology)
    each["compute"] /= efficiency
    each["HBM"] /= bandwidth
    seconds = sum(each.values())
    mfu = useful / seconds / topology.chip.flops
    return Estimate(each, seconds, mfu, max(each, key=each.__getitem__))


@dataclasses.dataclass(frozen=True)
class Pretraining:
    """A published run of full pre-training in bfloat16, fully sharded over all chips.

    Attributes:
      model: shape of the decoder.
      topology: name of the chips.
      length: tokens of a sequence.
      rows: sequences of a chip in a step.
      mfu: published share of the peak.
      tokens: published tokens per second and chip.
    """

    model: DecoderConfig
    topology: str
    length: int
    rows: int
    mfu: float
    tokens: float


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

    The runs keep each layer's input and its queries, keys and values, and recompute the rest of a layer, but for what the
    MLP gives, which nothing reads again. Attention is one kernel that computes the causal half, forward, again in the
    backward pass, and there with five products for two; it reads and writes what stands before and behind it only.

    Args:
      run: its sizes.
      chips: that share the parameters.
    """
    m = run.model
    layer, table = matmul_sizes(m)
    tokens, wide, narrow = run.rows * run.length, m.heads * m.head_dim, m.kv_heads * m.head_dim
    again = m.embed * (wide + 2 * m.mlp)
    products = m.layers * (6 * layer + 2 * again) + 6 * table
    # Scores and weighted values of the causal half are 2 S (H d) each token; passes: forward 1, again 1, backward 2.5.
    attention = m.layers * 2 * run.length * wide * 4.5
    # Elements of one token that the kernels of a layer read and write: two norms, seven products, the gate, two sums.
    forward = 12 * m.embed + 4 * (wide + narrow) + 6 * m.mlp
    recomputed = 6 * m.embed + 3 * (wide + narrow) + 4 * m.mlp
    # Each product has two in the backward pass.
    moved = 2 * m.layers * (forward * 3 + recomputed)
    # Logits as float32: written, read by the softmax, and their gradient written and read twice.
    moved += 4 * 5 * m.vocab
    parameters = m.layers * layer + 2 * table
    # Gathered for the forward and the backward pass: written and read, twice; gradients too; the optimiser's own part.
    weights = 2 * parameters * 6 + 24 * parameters / chips
    sent = 2 * parameters * (chips - 1) / chips
    return Work(tokens * (products + attention), tokens * moved + weights, ((3 * sent, chips),))


def fit(runs: Sequence[tuple[Work, Topology, float]]) -> tuple[float, float]:
    """The two constants that make two runs take as long as they did.

    Args:
      runs: of each its work, its chips and its measured seconds.

    Returns:
      (EFFICIENCY, BANDWIDTH): the inverse of each solves two linear equations.
    """
    (a, b, c), (d, e, f) = (
        (each["compute"], each["HBM"], seconds - each["interconnect"])
        for each, seconds in ((limits(work, topology), seconds) for work, topology, seconds in runs)
    )
    determinant = a * e - b * d
    return determinant / (c * e - b * f), determinant / (a * f - c * d)
