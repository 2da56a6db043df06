"""Topologies as named, and what their links carry."""

from __future__ import annotations

import pytest

from qaperso import chips
from qaperso.errors import UserError


@pytest.mark.parametrize(
    "name, grid, devices",
    [("v5e:4x4", (4, 4), 16), ("v5p:4x4x4", (4, 4, 4), 64), ("v6e:16x16", (16, 16), 256), ("h100:8", (8,), 8)],
)
def test_names(name: str, grid: tuple[int, ...], devices: int) -> None:
    found = chips.topology(name)
    assert (found.grid, found.devices) == (grid, devices)


@pytest.mark.parametrize(
    "name, said",
    [
        ("v5f:4x4", "topology 'v5f:4x4' is of no known chip; did you mean 'v5"),
        ("v5e", "topology 'v5e': expected v5e:4x4"),
        ("v5e:4", "v5e chips come in grids of 2 axes and at most 256 chips"),
        ("v5e:4x0", "expected v5e:4x4, chips along each axis"),
        ("v5p:4x4", "v5p chips come in grids of 3 axes"),
        ("v5e:32x16", "at most 256 chips"),
        ("h100:16", "h100 chips come in grids of 1 axis and at most 8 chips"),
        ("h100:2x8", "h100 chips come in grids of 1 axis"),
    ],
)
def test_names_of_nothing(name: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        chips.topology(name)


@pytest.mark.parametrize(
    "name, group, share",
    [
        ("v5e:16x16", 256, 1.0),
        ("v5e:16x16", 16, 0.5),  # one ring of two
        ("v5e:4x4", 16, 0.5),  # two lines, which are no rings
        ("v5e:4x4", 4, 0.25),
        ("v5p:4x4x4", 64, 1.0),
        ("v5p:4x4x4", 16, 2 / 3),
        ("v5p:2x4x4", 8, 2 / 3),  # the long axes first
        ("h100:8", 8, 1.0),  # a switch: everything to anybody
        ("h100:8", 2, 1.0),
    ],
)
def test_links_that_a_collective_uses(name: str, group: int, share: float) -> None:
    found = chips.topology(name)
    assert found.bandwidth(group) == pytest.approx(share * found.chip.link_bandwidth)


def test_gpus_are_described_to_the_compiler() -> None:
    assert chips.topology("v5e:4x4").target == {}
    found = chips.topology("h200:4").target
    assert found["topology"] == "1x1x4"
    assert "device_memory_size: 151397597184 memory_bandwidth: 4800000000000 " in found["target_config"]
