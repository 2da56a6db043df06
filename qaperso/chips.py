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
      efficiency: share of them that kernels reach which compute binds; fitted or measured, see `roofline`.
      hbm_bytes: of memory.
      hbm_bandwidth: bytes/s between memory and compute units.
      streaming: share of them that kernels reach which memory binds; chosen, see `roofline`.
      link_bandwidth: bytes/s that leave the chip over all of its links together (half of what is called bidirectional).
      axes: dimensions of the grid that links make; 1 where a switch joins all.
      ring: from how many chips on an axis of the grid is closed to a ring; 1 for a switch, which halves nothing.
      largest: most chips that such links join.
      source: where the figures stand.
      cuda: a GPU's name and bytes of memory as CUDA reports them; None for a TPU.
    """

    flops: float
    efficiency: float
    hbm_bytes: int
    hbm_bandwidth: float
    streaming: float
    link_bandwidth: float
    axes: int
    ring: int
    largest: int
    source: str
    cuda: tuple[str, int] | None = None


TPU_PAGES = "https://docs.cloud.google.com/tpu/docs/"
GPU_PAGES = "https://www.nvidia.com/en-us/data-center/"
# Of one H100 that was timed (docs/speed.md): what a square product of 8,192 reached, and what a step of plain LoRA takes for its memory
# then. `tests/test_roofline.py` has its work, and another step's that neither was fitted on.
HOPPER_EFFICIENCY, HOPPER_STREAMING = 0.665, 0.7


def _hopper(name: str, memory: int, bandwidth: float, page: str, cuda: int) -> Chip:
    """An SXM module, without sparsity; eight of them share a switch.

    Of its memory the maker's gigabytes count: CUDA reports 6 to 7% more, which its context, libraries and fragments take.
    """
    shares = dict(efficiency=HOPPER_EFFICIENCY, streaming=HOPPER_STREAMING)
    links = dict(link_bandwidth=450e9, axes=1, ring=1, largest=8)
    return Chip(
        989e12, hbm_bytes=memory, hbm_bandwidth=bandwidth, source=GPU_PAGES + page, cuda=(name, cuda), **shares, **links
    )


CHIPS = {
    "v5e": Chip(197e12, 0.84, 16 * GIB, 819e9, 0.6, 200e9, 2, 16, 256, TPU_PAGES + "v5e"),
    "v5p": Chip(459e12, 0.818, 95 * GIB, 2765e9, 0.6, 600e9, 3, 4, 8960, TPU_PAGES + "v5p"),
    "v6e": Chip(918e12, 0.598, 32 * GIB, 1640e9, 0.6, 448e9, 2, 16, 256, TPU_PAGES + "v6e"),
    "h100": _hopper("NVIDIA H100 80GB HBM3", 80 * 10**9, 3350e9, "h100", 84_942_979_072),
    "h200": _hopper("NVIDIA H200 141GB HBM3e", 141 * 10**9, 4800e9, "h200", 151_397_597_184),
}
# What XLA's compiler wants to know of a GPU (GpuTargetConfigProto): what CUDA's device query says of any Hopper.
_HOPPER = """
platform_name: "CUDA"
device_description_str: "{name}"
dnn_version_info {{ major: 9 minor: 10 }}
gpu_device_info {{
  name: "{name}"
  device_vendor: "NVIDIA Corporation"
  cuda_compute_capability {{ major: 9 minor: 0 feature_extension: ACCELERATED_FEATURES }}
  driver_version: "13.0.0" runtime_version: "13.0.0" compile_time_toolkit_version: "13.0.0" dnn_version: "9.10.0"
  core_count: 132 fpus_per_core: 128 clock_rate_ghz: 1.98 threads_per_warp: 32
  threads_per_core_limit: 2048 threads_per_block_limit: 1024
  thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  shared_memory_per_core: 233472 shared_memory_per_block: 49152 shared_memory_per_block_optin: 232448
  device_memory_size: {memory} memory_bandwidth: {bandwidth} l2_cache_size: 52428800
  device_address_bits: 64 ecc_enabled: true
  device_interconnect_info {{ active_links: 18 }}
}}
"""


@dataclasses.dataclass(frozen=True)
class Topology:
    """Chips of one kind that links join.

    Attributes:
      name: as given, such as "v5e:4x4" or "h100:8".
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

    @property
    def target(self) -> dict[str, str]:
        """How JAX is asked for GPUs that are not there: the chip's figures, and hosts by GPUs of one; {} for TPUs."""
        if self.chip.cuda is None:
            return {}
        name, memory = self.chip.cuda
        config = _HOPPER.format(name=name, memory=memory, bandwidth=int(self.chip.hbm_bandwidth))
        return {"target_config": config, "topology": f"1x1x{self.devices}"}


def topology(name: str) -> Topology:
    """Reads "KIND:AxB", such as "v5e:4x4" or "v5p:4x4x4"; of GPUs how many a host has, such as "h100:8".

    Raises:
      UserError: no such kind, or not a grid that it comes in.
    """
    kind, _, size = name.partition(":")
    if kind not in CHIPS:
        raise UserError(
            f"topology '{name}' is of no known chip{nearest(kind, CHIPS)}; write for example v5e:4x4 or h100:8"
        )
    chip = CHIPS[kind]
    if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", size):
        raise UserError(f"topology '{name}': expected {kind}:{'x'.join('4' * chip.axes)}, chips along each axis")
    grid = tuple(map(int, size.split("x")))
    if len(grid) != chip.axes or math.prod(grid) > chip.largest:
        axes = f"{chip.axes} ax{'e' if chip.axes > 1 else 'i'}s"
        raise UserError(f"topology '{name}': {kind} chips come in grids of {axes} and at most {chip.largest} chips")
    return Topology(name, chip, grid)
