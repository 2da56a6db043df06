"""A run that is stopped anywhere and started again ends bit for bit as one that was not."""

from __future__ import annotations

import os
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
from tiny import (  # noqa: F401
    CONFIG,
    QAR,
    RUNS,
    SFT_ALL,
    TINY,
    arguments,
    call,
    contents,
    finished,
    one_device,
    record,
    spawn,
    trained,
)

from qaperso import checkpoint, train

pytestmark = pytest.mark.usefixtures("one_device")
# Checkpoints are at 3, 6 and 8.
FIRST_LINES = [(0, False), (1, True), (2, True), (3, True), (3, False)]


class Killed(BaseException):
    """Stands for SIGKILL in this process: nothing in the package catches it."""


@pytest.fixture
def stop(monkeypatch):
    """stop(n, how): how() is called in place of the n-th step, counted from when training starts."""

    def arrange(n: int, how) -> None:
        put, save, done = train.put_batch, checkpoint.Writer.save, []

        def put_batch(*words):
            done.append(1)
            if len(done) == n:
                how()
            return put(*words)

        def save_now(writer, *words):
            save(writer, *words)
            writer._manager.wait_until_finished()

        monkeypatch.setattr(train, "put_batch", put_batch)
        monkeypatch.setattr(checkpoint.Writer, "save", save_now)

    yield arrange


def die() -> None:
    raise Killed


def assert_same_end(folder: Path, out: str, whole: tuple[Path, str]) -> None:
    """Every metrics line, and the final line."""
    assert record(folder) == record(whole[0])
    assert out == whole[1]


def test_what_a_whole_run_leaves_behind():
    folder, out = finished("qar")
    lines = record(folder)
    assert [(v["step"], "loss" in v) for v in lines[:5]] == FIRST_LINES
    assert [v["step"] for v in lines if "loss" in v] == list(range(1, 9))
    assert [v["step"] for v in lines if "dev_nll" in v] == [0, 3, 6, 8]
    loss = next(v["loss"] for v in reversed(lines) if "loss" in v)
    start, digest = out.strip().split("sha256:")
    assert start == f"final step=8 loss={loss!r} params=" and len(bytes.fromhex(digest)) == 32
    assert len({v["loss"] for v in lines if "loss" in v}) == 8


@pytest.mark.parametrize(("name", "n"), [("qar", 2), ("prototypes", 4)])
def test_killed_and_started_again(stop, monkeypatch, tmp_path, name, n):
    """Before the first checkpoint, so that the second run is one with the same seed, and right after one."""
    words = arguments(TINY, tmp_path / "run", *RUNS[name])
    stop(n, die)
    with pytest.raises(Killed):
        call(train.main, *words)
    assert [v["step"] for v in record(tmp_path / "run")][-1] < n
    monkeypatch.undo()
    saved = (n - 1) // 3 * 3
    assert sorted(checkpoint.steps(tmp_path / "run" / "checkpoints")) == list(range(3, saved + 1, 3))
    code, out, err = call(train.main, *words)
    assert code == 0 and (f"going on at step {saved}" in " ".join(err.split())) == (saved > 0)
    assert_same_end(tmp_path / "run", out, finished(name))


def test_killed_between_checkpoints_with_torn_files(stop, monkeypatch, tmp_path):
    """Half a checkpoint and half a line of metrics do no harm, and batches come in the same order."""
    whole = finished("qar")  # trained before anybody listens
    folder, seen = tmp_path / "run", {"first": [], "second": []}
    words = arguments(TINY, folder, *QAR)

    def listen(name: str):
        put = train.put_batch

        def put_batch(batch, *rest):
            seen[name].append(np.asarray(batch.inputs.tokens).tobytes() + np.asarray(batch.inputs.querier).tobytes())
            return put(batch, *rest)

        monkeypatch.setattr(train, "put_batch", put_batch)

    stop(6, die)
    listen("first")
    with pytest.raises(Killed):
        call(train.main, *words)
    monkeypatch.undo()
    torn = folder / "checkpoints" / "6.orbax-checkpoint-tmp-1234" / "trainable"
    torn.mkdir(parents=True)
    (torn / "manifest.ocdbt").write_bytes(b"half")
    with (folder / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"step": 5, "loss": 5.1')
    listen("second")
    code, out, _ = call(train.main, *words)
    assert code == 0 and not torn.exists()
    assert_same_end(folder, out, whole)
    # Six batches were asked for before the kill, and step 4 is the first after the checkpoint.
    assert len(seen["first"]) == 6 and len(seen["second"]) == 5
    assert seen["first"][3:] == seen["second"][:3]
    assert len(set(seen["first"] + seen["second"])) == 8


def test_terminated_run_saves_and_goes_on(stop, monkeypatch, tmp_path):
    words = arguments(TINY, tmp_path / "run", *QAR)
    before = signal.getsignal(signal.SIGTERM)
    stop(5, lambda: os.kill(os.getpid(), signal.SIGTERM))
    code, out, err = call(train.main, *words)
    monkeypatch.undo()
    assert code == 143 and out == ""
    assert err.splitlines()[-1] == "stopped by SIGTERM at step 5; saved, run again to go on"
    assert signal.getsignal(signal.SIGTERM) is before
    assert max(checkpoint.steps(tmp_path / "run" / "checkpoints")) == 5
    assert [v["step"] for v in record(tmp_path / "run") if "loss" in v] == [1, 2, 3, 4, 5]
    code, out, err = call(train.main, *words)
    assert code == 0 and "going on at step 5" in " ".join(err.split())
    assert_same_end(tmp_path / "run", out, finished("qar"))


def test_a_finished_run_trains_nothing_more(monkeypatch, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(finished("qar")[0], folder)
    before = contents(folder)
    monkeypatch.setattr(train, "put_batch", lambda *_: die())
    out = trained(TINY, folder, *QAR)
    assert out == finished("qar")[1]
    after = contents(folder)
    assert {k: v for k, v in after.items() if "tensorboard" not in k} == {
        k: v for k, v in before.items() if "tensorboard" not in k
    }


def test_another_seed_is_another_run(tmp_path):
    other = trained(TINY, tmp_path / "other", *QAR, "seed=1")
    for ours, theirs in zip(other.split()[2:], finished("qar")[1].split()[2:], strict=True):
        assert ours != theirs
    assert record(tmp_path / "other")[0]["dev_nll"] != record(finished("qar")[0])[0]["dev_nll"]


KILL = """

import os
import signal

from qaperso import checkpoint

save = checkpoint.Writer.save


def save_and_die(writer, step, *rest):
    save(writer, step, *rest)
    if step == {step} and not os.environ.get("QAPERSO_TEST_LIVE"):
        os.kill(os.getpid(), signal.SIGKILL)


checkpoint.Writer.save = save_and_die
"""


@pytest.mark.slow
def test_sigkill_while_a_checkpoint_is_written(tmp_path, monkeypatch):
    """A process of its own dies within the asynchronous save of step 6."""
    config = tmp_path / "tiny.py"
    config.write_text(CONFIG + KILL.format(step=6), encoding="utf-8")
    dead = spawn(config, tmp_path / "run", *SFT_ALL)
    assert dead.returncode == -signal.SIGKILL and dead.stdout == ""
    assert [v["step"] for v in record(tmp_path / "run") if "loss" in v] == [1, 2, 3, 4, 5, 6]
    monkeypatch.setenv("QAPERSO_TEST_LIVE", "1")
    again = spawn(config, tmp_path / "run", *SFT_ALL)
    assert again.returncode == 0, again.stderr
    assert "going on at step" in " ".join(again.stderr.split())
    straight = spawn(config, tmp_path / "straight", *SFT_ALL)
    assert straight.returncode == 0, straight.stderr
    assert_same_end(tmp_path / "run", again.stdout, (tmp_path / "straight", straight.stdout))
    assert again.stdout.startswith("final step=8 loss=") and again.stdout.count("\n") == 1
