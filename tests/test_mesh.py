"""The device mesh, on eight fake devices."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec
from ml_collections import ConfigDict

from qaperso import mesh
from qaperso.errors import UserError


@pytest.mark.parametrize(
    "sizes, expected",
    [
        ((8, 1, 1), (8, 1, 1)),
        ((-1, 1, 1), (8, 1, 1)),
        ((1, -1, 2), (1, 4, 2)),
        ((2, 4, -1), (2, 4, 1)),
        ((2, 2, 2), (2, 2, 2)),
    ],
)
def test_sizes(sizes: tuple[int, int, int], expected: tuple[int, int, int]) -> None:
    made = mesh.make_mesh(*sizes)
    assert tuple(made.shape.items()) == tuple(zip(("data", "fsdp", "tensor"), expected, strict=True))
    assert made.axis_types == (AxisType.Auto,) * 3
    assert len({d.id for d in made.devices.flat}) == 8


@pytest.mark.parametrize(
    "sizes", [(-1, -1, 1), (3, -1, 1), (0, -1, 1), (4, 1, 1), (16, 1, 1), (-2, -4, 1), (-1, 16, 1)]
)
def test_sizes_that_make_no_mesh(sizes: tuple[int, int, int]) -> None:
    said = "config.mesh data={} fsdp={} tensor={} does not make 8 devices; .*one may be -1".format(*sizes)
    with pytest.raises(UserError, match=said):
        mesh.make_mesh(*sizes)


def test_each_device_gets_its_rows_only() -> None:
    made = mesh.make_mesh(2, 2, 2)
    whole = {"rows": np.arange(2 * 8 * 3).reshape(2, 8, 3), "few": np.arange(6).reshape(2, 3)}
    placed = mesh.put_batch(whole, made, 1)
    assert placed["rows"].sharding.spec == PartitionSpec(None, ("data", "fsdp"))
    assert placed["rows"].sharding == mesh.batch_sharding(made, 1, 8)
    for shard in placed["rows"].addressable_shards:
        data, fsdp, _ = (int(i[0]) for i in np.nonzero(made.devices == shard.device))
        first = 2 * (2 * data + fsdp)
        np.testing.assert_array_equal(shard.data, whole["rows"][:, first : first + 2])
    # Three rows do not divide by four: whole everywhere.
    assert placed["few"].sharding.spec == PartitionSpec()
    assert all(s.data.shape == (2, 3) for s in placed["few"].addressable_shards)


def test_host_copy_gives_back_what_was_placed() -> None:
    whole = {"x": np.arange(16.0, dtype=np.float32).reshape(1, 16), "y": np.arange(8)[None]}
    back = mesh.host_copy(mesh.put_batch(whole, mesh.make_mesh(1, 4, 2), 1))
    assert all(isinstance(x, np.ndarray) for x in jax.tree.leaves(back))
    for name in whole:
        np.testing.assert_array_equal(back[name], whole[name])


@pytest.mark.parametrize(
    ("wanted", "count", "found"),
    [
        ((-1, 1, 1), 8, (8, 1, 1)),
        ((1, -1, 1), 8, (1, 8, 1)),
        ((2, 2, 2), 8, (2, 2, 2)),
        ((1, 8, 1), 2, (1, 2, 1)),
        ((8, 1, 1), 2, (2, 1, 1)),
        ((2, 4, 4), 2, (1, 1, 2)),
        ((1, 4, 3), 8, (1, 8, 1)),
        ((3, 1, -1), 8, (8, 1, 1)),
        ((1, 8, 1), 6, (3, 2, 1)),
        ((1, 8, 1), 7, (7, 1, 1)),
        ((1, -1, 8), 1, (1, 1, 1)),
    ],
)
def test_a_mesh_of_the_devices_there_are(wanted: tuple, count: int, found: tuple) -> None:
    """Whoever opens a run has other devices than training had: what was spread stays spread."""
    sizes = ConfigDict(dict(zip(mesh.AXES, wanted, strict=True)))
    made = mesh.mesh_over(sizes, jax.devices()[:count])
    assert tuple(made.shape.values()) == found


@pytest.mark.parametrize("name", ["JAX_COORDINATOR_ADDRESS", "QAPERSO_DISTRIBUTED"])
def test_a_command_of_one_process_joins_nobody(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv(name, "1")
    with pytest.raises(UserError, match=f"^{name} is set, but this command is one process; start it once, without"):
        mesh.start_runtime(alone=True)


def test_one_process_tells_itself() -> None:
    assert mesh.told(b"x\n") == b"x\n" and mesh.told(b"") == b""


def joined(monkeypatch: pytest.MonkeyPatch, **variables: str) -> list[dict]:
    """What JAX's runtime is told under these variables."""
    told: list[dict] = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda **words: told.append(words))
    monkeypatch.setattr(jax.config, "update", lambda *_: None)
    for name in ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID", "QAPERSO_DISTRIBUTED"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    mesh.start_runtime()
    return told


def test_who_joins_whom(monkeypatch: pytest.MonkeyPatch) -> None:
    silence = {"heartbeat_timeout_seconds": mesh.HEARTBEAT_SECONDS}
    assert joined(monkeypatch) == []
    assert joined(monkeypatch, QAPERSO_DISTRIBUTED="1") == [silence]
    address = {"JAX_COORDINATOR_ADDRESS": "127.0.0.1:1"}
    numbers = {"num_processes": 2, "process_id": 0}
    assert joined(monkeypatch, **address, JAX_NUM_PROCESSES="2", JAX_PROCESS_ID="0") == [numbers | silence]
    with pytest.raises(UserError, match="but JAX_PROCESS_ID is '', expected a number; start .* qaperso.launch"):
        joined(monkeypatch, **address, JAX_NUM_PROCESSES="2")
    with pytest.raises(UserError, match="but JAX_NUM_PROCESSES is 'two'"):
        joined(monkeypatch, **address, JAX_NUM_PROCESSES="two", JAX_PROCESS_ID="0")
