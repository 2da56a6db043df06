"""A run that is stopped anywhere and started again ends bit for bit as one that was not."""

from __future__ import annotations

import functools
import os
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
from runs import CONFIG, PROTOTYPES, QAR, SFT_ALL, arguments, call, config_file, contents, one_device, record, spawn, trained  # noqa: F401

from qaperso import checkpoint, train

pytestmark = pytest.mark.usefixtures("one_device")
METHODS = {"qar in_batch": QAR, "qar prototypes": PROTOTYPES, "sft all": SFT_ALL}
# Checkpoints are at 3, 6 and 8.
FIRST_LINES = [(0, False), (1, True), (2, True), (3, True), (3, False)]


class Killed(BaseException):
    """Stands for SIGKILL in this process: nothing in the package catches it."""


@pytest.fixture(scope="module")
def whole(tmp_path_factory, config_file):  # noqa: F811
    """Trains a method without a stop, once; gives its folder and its stdout."""

    @functools.cache
    def make(name: str) -> tuple[Path, str]:
        folder = tmp_path_factory.mktemp("whole") / "run"
        return folder, trained(config_file, folder, *METHODS[name])

    return make


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


def test_what_a_whole_run_leaves_behind(whole):
    folder, out = whole("qar in_batch")
    lines = record(folder)
    assert [(v["step"], "loss" in v) for v in lines[:5]] == FIRST_LINES
    assert [v["step"] for v in lines if "loss" in v] == list(range(1, 9))
    assert [v["step"] for v in lines if "dev_nll" in v] == [0, 3, 6, 8]
    loss = next(v["loss"] for v in reversed(lines) if "loss" in v)
    start, digest = out.strip().split("sha256:")
    assert start == f"final step=8 loss={loss!r} params=" and len(bytes.fromhex(digest)) == 32
    assert len({v["loss"] for v in lines if "loss" in v}) == 8


@pytest.mark.parametrize(("name", "n"), [("qar in_batch", 2), ("qar in_batch", 4), ("qar prototypes", 6), ("sft all", 8)])
def test_killed_and_started_again(whole, stop, monkeypatch, tmp_path, config_file, name, n):  # noqa: F811
    """Before the first checkpoint, right after one, between two, before the last step."""
    words = arguments(config_file, tmp_path / "run", *METHODS[name])
    stop(n, die)
    with pytest.raises(Killed):
        call(train.main, *words)
    assert [v["step"] for v in record(tmp_path / "run")][-1] < n
    monkeypatch.undo()
    saved = (n - 1) // 3 * 3
    assert sorted(checkpoint.steps(tmp_path / "run" / "checkpoints")) == list(range(3, saved + 1, 3))
    code, out, err = call(train.main, *words)
    assert code == 0 and (f"going on at step {saved}" in err) == (saved > 0)
    assert_same_end(tmp_path / "run", out, whole(name))


def test_data_order_of_a_resumed_run(whole, stop, monkeypatch, tmp_path, config_file):  # noqa: F811
    seen: dict[str, list[bytes]] = {"first": [], "second": []}
    words = arguments(config_file, tmp_path / "run", *QAR)

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
    listen("second")
    call(train.main, *words)
    # Six batches were asked for, and step 4 is the first after the checkpoint.
    assert len(seen["first"]) == 6 and len(seen["second"]) == 5
    assert seen["first"][3:] == seen["second"][:3]
    assert len(set(seen["first"] + seen["second"])) == 8


def test_terminated_run_saves_and_goes_on(whole, stop, monkeypatch, tmp_path, config_file):  # noqa: F811
    words = arguments(config_file, tmp_path / "run", *QAR)
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
    assert code == 0 and "going on at step 5" in err
    assert_same_end(tmp_path / "run", out, whole("qar in_batch"))


def test_torn_files_do_no_harm(whole, stop, monkeypatch, tmp_path, config_file):  # noqa: F811
    folder = tmp_path / "run"
    words = arguments(config_file, folder, *QAR)
    stop(5, die)
    with pytest.raises(Killed):
        call(train.main, *words)
    monkeypatch.undo()
    torn = folder / "checkpoints" / "6.orbax-checkpoint-tmp-1234" / "trainable"
    torn.mkdir(parents=True)
    (torn / "manifest.ocdbt").write_bytes(b"half")
    with (folder / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"step": 5, "loss": 5.1')
    code, out, _ = call(train.main, *words)
    assert code == 0 and not torn.exists()
    assert_same_end(folder, out, whole("qar in_batch"))


def test_a_finished_run_trains_nothing_more(whole, monkeypatch, tmp_path, config_file):  # noqa: F811
    folder = tmp_path / "run"
    shutil.copytree(whole("qar in_batch")[0], folder)
    before = contents(folder)
    monkeypatch.setattr(train, "put_batch", lambda *_: die())
    out = trained(config_file, folder, *QAR)
    assert out == whole("qar in_batch")[1]
    after = contents(folder)
    assert {k: v for k, v in after.items() if "tensorboard" not in k} == {
        k: v for k, v in before.items() if "tensorboard" not in k
    }


def test_seeds(whole, tmp_path, config_file):  # noqa: F811
    assert trained(config_file, tmp_path / "same", *QAR) == whole("qar in_batch")[1]
    assert record(tmp_path / "same") == record(whole("qar in_batch")[0])
    other = trained(config_file, tmp_path / "other", *QAR, "seed=1")
    assert other.split("loss=")[1].split() != whole("qar in_batch")[1].split("loss=")[1].split()


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
    assert "going on at step" in again.stderr
    straight = spawn(config, tmp_path / "straight", *SFT_ALL)
    assert straight.returncode == 0, straight.stderr
    assert_same_end(tmp_path / "run", again.stdout, (tmp_path / "straight", straight.stdout))
    assert again.stdout.startswith("final step=8 loss=") and again.stdout.count("\n") == 1
