"""One, two and four processes make the same global batches, from any step on, and gather what is scattered over them."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from helpers import examples

from qaperso import arrays
from qaperso.data.batches import plan_batch, stream
from qaperso.data.plan import Plan, Shape

DEVICES, STEPS, START = 4, 6, 3
SHAPE = Shape(4, 32, 24, 3)
RULE = (2, 0.5, "in_batch")
# Seven entries, the last part of two is a single one.
GATHERED = np.arange(7 * 8 * 3, dtype=np.float32).reshape(7, 8, 3)


def plan() -> Plan:
    return Plan(examples(0, 40), SHAPE, 7, 2)


def main(folder: Path, start: int) -> None:
    """What each process does: saves the rows of every batch that lie on its own devices."""
    from qaperso import mesh as mesh_module
    from qaperso.mesh import host_copy, make_mesh, put_batch, start_runtime

    start_runtime()
    mesh, me = make_mesh(DEVICES, 1, 1), jax.process_index()
    planned, known = plan(), examples(0, 40)
    for step, batch in enumerate(stream(lambda n: plan_batch(planned, known, n, *RULE), start, STEPS), start):
        for name, x in arrays.flat(put_batch(batch, mesh, 1)).items():
            for k, shard in enumerate(x.addressable_shards):
                rows = [s.indices(n)[0] for s, n in zip(shard.index, x.shape, strict=True)]
                np.savez(
                    folder / f"{step}.{name.replace('/', '-')}.{me}.{k}.npz", at=rows, value=np.asarray(shard.data)
                )
    # Gathered whole, in parts of one, two or all entries of the first dimension.
    for entries in (1, 2, len(GATHERED)):
        mesh_module.PART = entries * GATHERED[0].nbytes
        back = host_copy(put_batch({"x": GATHERED, "small": GATHERED[0, :3]}, mesh, 1))
        np.testing.assert_array_equal(back["x"], GATHERED)
        np.testing.assert_array_equal(back["small"], GATHERED[0, :3])


def run(folder: Path, processes: int, start: int) -> None:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{s.getsockname()[1]}"
    own = {
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={DEVICES // processes}",
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_PROCESSES": str(processes),
    }
    own |= {"JAX_COORDINATOR_ADDRESS": address} if processes > 1 else {}
    words = [sys.executable, __file__, str(folder), str(start)]
    here = Path(__file__).parent
    path = os.pathsep.join([str(here.parent), str(here), os.environ.get("PYTHONPATH", "")])
    running = [
        subprocess.Popen(
            words, env=os.environ | own | {"JAX_PROCESS_ID": str(k), "PYTHONPATH": path}, stderr=subprocess.PIPE
        )
        for k in range(processes)
    ]
    for process in running:
        _, err = process.communicate(timeout=200)
        assert process.returncode == 0, err.decode()[-2000:]


@pytest.mark.parametrize("processes, start", [(1, 0), (2, START), (4, START)])
def test_global_batches(tmp_path, processes, start):
    run(tmp_path, processes, start)
    for step in range(start, STEPS):
        expected = arrays.flat(plan_batch(plan(), examples(0, 40), step, *RULE))
        for name, whole in expected.items():
            files = sorted(tmp_path.glob(f"{step}.{name.replace('/', '-')}.*.npz"))
            assert len(files) == DEVICES
            seen = np.zeros(whole.shape, bool)
            for file in files:
                with np.load(file) as found:
                    place = tuple(slice(a, a + n) for a, n in zip(found["at"], found["value"].shape, strict=True))
                    np.testing.assert_array_equal(found["value"], whole[place], err_msg=name)
                    seen[place] = True
            assert seen.all(), name
            spread = {tuple(np.load(file)["at"].tolist()) for file in files}
            assert len(spread) == DEVICES


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
