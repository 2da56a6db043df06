"""Updates that are left out: their batches are kept, a run that is stopped by them goes on, and they can be computed again."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from tiny import SFT, TINY, arguments, call, contents, one_device, record  # noqa: F401

from qaperso import checkpoint, replay, step, train
from qaperso.data import batches
from qaperso.types import Batch

WORDS = (*SFT, "optimizer.spike=20.0", "keep_latest=9")
NOT_FINITE, SPIKE = 5, 7


def spoiled(batch: Batch, number: int) -> Batch:
    """Weights that make the loss NaN in one step, and the gradient huge in another."""
    weight = batch.weight.copy()
    first, second = np.flatnonzero(weight)[:2]
    if number == NOT_FINITE:
        weight.flat[first] = np.nan
    if number == SPIKE:
        weight.flat[first], weight.flat[second] = 1e4, -1e4
    return batch.replace(weight=weight)


def train_spoiled(folder: Path, *overrides: str) -> tuple[int, str, str]:
    """Trains on what an ill machine would feed; checkpoints at 3, 6 and 8."""
    made = batches.stream

    def stream(make, start, stop):
        return map(spoiled, made(make, start, stop), range(start + 1, stop + 1))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(batches, "stream", stream)
        return call(train.main, *arguments(TINY, folder, *WORDS, *overrides))


@pytest.fixture(scope="module")
def run(one_device, tmp_path_factory) -> Iterator[tuple[Path, str, str]]:  # noqa: F811
    """(folder, stdout, stderr) of a run that leaves out both and ends."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(step, "SPIKE_WINDOW", 3)
        folder = tmp_path_factory.mktemp("replay") / "run"
        code, out, err = train_spoiled(folder)
        assert code == 0, err
        yield folder, out, err


def rows(out: str) -> dict[str, list[str]]:
    """The lines of a table by their first word."""
    return {line.split()[0]: line.split()[1:] for line in out.splitlines() if line}


def test_updates_left_out_are_counted_and_their_batches_kept(run):
    folder, _, err = run
    lines = {v["step"]: v for v in record(folder) if "loss" in v}
    assert [v["skipped"] for v in lines.values()] == [0, 0, 0, 0, 1, 1, 2, 2]
    assert [v["finite"] for v in lines.values()] == [1, 1, 1, 1, 0, 1, 1, 1]
    # Limits come from the three accepted updates before: not from step 5, nor from step 7.
    norm = {number: np.float32(v["grad_norm"]) for number, v in lines.items()}
    for number, known in ((4, (1, 2, 3)), (5, (2, 3, 4)), (6, (2, 3, 4)), (7, (3, 4, 6)), (8, (3, 4, 6))):
        assert lines[number]["norm_limit"] == np.float32(20) * np.median([norm[n] for n in known])
    assert [lines[number]["norm_limit"] for number in (1, 2, 3)] == [0, 0, 0]
    told = [line for line in err.splitlines() if "the update was left out" in line]
    assert told[0] == (
        f"step 5: the update was left out (not finite: grad_norm, lm, loss, predicted); its batch is in {folder}/bad_batch_5.npz"
    )
    spike = f"a spike: grad_norm {norm[7]:.6g} is above norm_limit {lines[7]['norm_limit']:.6g}"
    assert told[1:] == [f"step 7: the update was left out ({spike}); its batch is in {folder}/bad_batch_7.npz"]
    assert sorted(p.name for p in folder.glob("bad_batch_*")) == ["bad_batch_5.npz", "bad_batch_7.npz"]
    leaves, number, found = batches.load_batch(folder / "bad_batch_7.npz")
    assert number == 7 and leaves["weight"].max() == 1e4 and leaves["inputs/tokens"].shape == (1, 4, 96)
    assert found["grad_norm"] == lines[7]["grad_norm"] and found["skipped"] == 2


def test_a_run_beyond_its_budget_stops_and_goes_on_with_a_larger_one(run, tmp_path):
    """From checkpoint 6, with the norms that were known by then: step 7 is a spike again, and the end is the same."""
    whole, end, _ = run
    folder = tmp_path / "run"
    code, out, err = train_spoiled(folder, "max_skipped=1")
    assert (code, out) == (2, "")
    last = err.splitlines()[-1]
    assert last.startswith(
        "error: 2 updates were left out, more than max_skipped=1, the last at step 7 (a spike: grad_norm "
    )
    assert f"python -m qaperso.replay --workdir {folder} --batch {folder}/bad_batch_7.npz" in last
    assert max(checkpoint.steps(folder / "checkpoints")) == 6
    code, out, err = train_spoiled(folder, "max_skipped=2")
    assert (code, out) == (0, end) and "going on at step 6" in " ".join(err.split())
    assert record(folder) == record(whole)


@pytest.mark.parametrize("number, start", [(NOT_FINITE, 3), (SPIKE, 6), (NOT_FINITE, 0)])
def test_an_update_is_computed_again(run, number, start, tmp_path):
    """After the steps since the checkpoint: step 4; none; all, where no checkpoint is older."""
    folder = tmp_path / "run"
    shutil.copytree(run[0], folder)
    if not start:
        shutil.rmtree(folder / "checkpoints" / "3")
    before = contents(folder)
    code, out, err = call(replay.main, "--workdir", folder, "--batch", folder / f"bad_batch_{number}.npz")
    assert code == 0, err
    assert contents(folder) == before
    assert out.splitlines()[0] == (
        f"step {number}, from checkpoint {start}; its batch is not what the data gives now (weight)"
    )
    told = next(v for v in record(folder) if v["step"] == number and "loss" in v)
    table = rows(out)
    for name in ("loss", "lm", "grad_norm", "norm_limit", "predicted"):
        assert table[name][0] == f"{told[name]:.7g}"
        np.testing.assert_allclose(float(table[name][1]), told[name], rtol=1e-5)
    parts = {name: cells for name, cells in table.items() if name.startswith("lora/")}
    assert len(parts) == 14 and {cells[2] for cells in parts.values()} == {"0"}
    norms, bad = (np.array([float(c[i].replace(",", "")) for c in parts.values()]) for i in (0, 1))
    if number == SPIKE:
        np.testing.assert_allclose(np.sqrt((norms**2).sum()), told["grad_norm"], rtol=1e-5)
        assert not bad.any() and (norms[:-1] >= norms[1:]).all()
    else:
        assert bad.all() and np.isnan(norms).all()


def test_a_batch_that_is_the_data_s(run, tmp_path):
    leaves, number, found = batches.load_batch(run[0] / "bad_batch_7.npz")
    np.savez(tmp_path / "mended.npz", **leaves | {"weight": np.abs(leaves["weight"]).clip(max=1)}, step=number)
    code, out, err = call(replay.main, "--workdir", run[0], "--batch", tmp_path / "mended.npz")
    assert code == 0 and out.startswith("step 7, from checkpoint 6; its batch is what the data gives\n"), err
    recorded, again = rows(out)["grad_norm"]
    assert recorded == "nan" and float(again) < found["norm_limit"]


def test_what_is_no_batch_of_the_run_is_refused(run, tmp_path):
    folder, *_ = run
    leaves, number, _ = batches.load_batch(folder / "bad_batch_5.npz")

    def refused(path: Path) -> str:
        code, out, err = call(replay.main, "--workdir", folder, "--batch", path)
        assert (code, out) == (2, "") and err.count("error: ") == 1
        return err.splitlines()[-1]

    assert "is not there; training names the file" in refused(tmp_path / "none.npz")
    cut = tmp_path / "cut.npz"
    cut.write_bytes((folder / "bad_batch_5.npz").read_bytes()[:200])
    assert "cut.npz is broken or holds no batch" in refused(cut)
    np.savez(tmp_path / "late.npz", **leaves, step=9)
    assert f"late.npz is of step 9, but {folder} has 8 steps" in refused(tmp_path / "late.npz")
    np.savez(tmp_path / "wide.npz", **leaves | {"target": np.zeros((1, 4, 65), np.int32)}, step=number)
    message = refused(tmp_path / "wide.npz")
    assert "wide.npz: 'target' is int32[1, 4, 65], the run's batches have int32[1, 4, 64]" in message
