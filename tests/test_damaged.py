"""Checkpoints that are not what was saved: found out, named, put aside; and saves that take long."""

from __future__ import annotations

import shutil
from pathlib import Path

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding, PartitionSpec
from untrained import mesh

from qaperso import checkpoint, step
from qaperso.errors import UserError


def state(value: float) -> step.TrainState:
    """A state in which every leaf depends on the value."""
    params = {"lora": {"a": jnp.full((8, 4), float(value)), "b": jnp.arange(2.0 * 8).reshape(2, 8) + value}}
    made = step.init_state(optax.adam(1e-3), params, {"sums": jnp.full((3,), value + 1.0)})
    return made.replace(step=jnp.int32(value))


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """A run's folder with whole checkpoints of steps 3 and 6."""
    folder = tmp_path_factory.mktemp("run")
    writer = checkpoint.Writer(folder / "checkpoints", keep_latest=2, keep_best=0)
    for n in (3, 6):
        writer.save(n, state(n), {checkpoint.METRIC: float(n)})
    writer.close()
    return folder


@pytest.fixture
def folder(saved, tmp_path) -> Path:
    """A copy that may be damaged."""
    return shutil.copytree(saved, tmp_path / "run") / "checkpoints"


def lose_files(folder: Path) -> None:
    """What a disk that was unplugged may leave: metadata, and data files of no length."""
    for path in (folder / "trainable").rglob("*"):
        if path.is_file() and path.parent.name == "d":
            path.write_bytes(b"")


def flip_bits(folder: Path) -> None:
    """Rot in the middle of the largest data file."""
    path = max((p for p in (folder / "optimizer").rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    raw = bytearray(path.read_bytes())
    for i in range(len(raw) // 3, len(raw) // 3 + 40):
        raw[i] ^= 0x55
    path.write_bytes(bytes(raw))


def lose_item(folder: Path) -> None:
    """A part that was never copied."""
    shutil.rmtree(folder / "memory")


def lose_step(folder: Path) -> None:
    """A note of the step with half a line in it."""
    path = folder / "data" / "metadata"
    path.write_bytes(path.read_bytes()[:9])


@pytest.mark.parametrize("harm", [lose_files, flip_bits, lose_item, lose_step])
def test_the_newest_that_is_whole_is_gone_on_from(folder, capsys, harm):
    harm(folder / "6")
    writer = checkpoint.Writer(folder, keep_latest=2, keep_best=0)
    restored, number = writer.restore(state(0))
    assert number == 3
    helpers.assert_trees_equal(restored, state(3))
    err = capsys.readouterr().err
    place = folder.parent / "damaged_6"
    assert err.startswith("checkpoint 6 is damaged: ") and err.endswith(
        f"put aside as {place}, going on from checkpoint 3\n"
    )
    assert place.is_dir() and checkpoint.steps(folder) == {3: 3.0}
    # The step is reached again, and saved in the damaged one's place.
    writer.save(6, state(6), None)
    writer.close()
    assert sorted(checkpoint.steps(folder)) == [3, 6]
    writer = checkpoint.Writer(folder, keep_latest=2, keep_best=0)
    helpers.assert_trees_equal(writer.restore(state(0))[0], state(6))
    writer.close()


def test_other_values_than_were_saved_are_found_and_the_leaf_is_named(tmp_path, monkeypatch, capsys):
    """The files are sound, but not what the checksums were made of."""
    own = checkpoint.checksums

    def of_another(items):
        other = jax.tree.map(lambda x: x, items)
        other["trainable"]["lora"]["b"] = other["trainable"]["lora"]["b"].at[1, 3].add(1e-6)
        return own(other)

    writer = checkpoint.Writer(tmp_path / "checkpoints", keep_latest=2, keep_best=0)
    writer.save(3, state(3), None)
    monkeypatch.setattr(checkpoint, "checksums", of_another)
    writer.save(6, state(6), None)
    monkeypatch.undo()
    writer.close()
    wanted = state(0)
    said = "checkpoint 6 is damaged: 'trainable/lora/b' is not what was saved"
    with pytest.raises(UserError, match=f"^{said}.*bring a copy of .* back, or move it away"):
        checkpoint.load_trainable(tmp_path / "checkpoints", 6, wanted.trainable, wanted.memory)
    writer = checkpoint.Writer(tmp_path / "checkpoints", keep_latest=2, keep_best=0)
    assert writer.restore(wanted)[1] == 3
    writer.close()
    assert said in capsys.readouterr().err


def test_no_checkpoint_is_whole(folder):
    lose_item(folder / "3")
    lose_step(folder / "6")
    writer = checkpoint.Writer(folder, keep_latest=2, keep_best=0)
    with pytest.raises(UserError, match=r"none of the 2 checkpoints is whole \(the newest: checkpoint 6 is damaged"):
        writer.restore(state(0))
    writer.close()
    assert sorted(p.name for p in folder.iterdir()) == ["3", "6"]


def test_another_configuration_is_no_damage(folder):
    writer = checkpoint.Writer(folder, keep_latest=2, keep_best=0)
    other = state(0)
    other.trainable["lora"]["a"] = jnp.zeros((8, 5))
    with pytest.raises(UserError, match=r"checkpoint 6, trainable: 'lora/a' is .*, the configuration declares"):
        writer.restore(other)
    writer.close()
    assert sorted(checkpoint.steps(folder)) == [3, 6]


def test_checkpoints_of_earlier_versions_have_no_checksums(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "checksums", lambda _: {})
    writer = checkpoint.Writer(tmp_path, keep_latest=1, keep_best=0)
    writer.save(3, state(3), None)
    writer.close()
    writer = checkpoint.Writer(tmp_path, keep_latest=1, keep_best=0)
    restored, number = writer.restore(state(0))
    writer.close()
    assert number == 3
    helpers.assert_trees_equal(restored, state(3))


def test_any_mesh_checks_and_goes_on_from_what_another_saved(tmp_path):
    """Four devices save, one goes on."""

    def spread(tree, count: int):
        made = mesh(count)

        def place(x):
            spec = PartitionSpec("data") if x.ndim and x.shape[0] % count == 0 else PartitionSpec()
            return jax.device_put(x, NamedSharding(made, spec))

        return jax.tree.map(place, tree)

    writer = checkpoint.Writer(tmp_path, keep_latest=1, keep_best=0)
    writer.save(5, spread(state(5), 4), None)
    writer.close()
    writer = checkpoint.Writer(tmp_path, keep_latest=1, keep_best=0)
    restored, number = writer.restore(spread(state(0), 1))
    writer.close()
    assert number == 5 and len(restored.trainable["lora"]["a"].sharding.device_set) == 1
    helpers.assert_trees_equal(restored, state(5))


@settings(max_examples=40, deadline=None)
@given(
    where=st.integers(0, 63),
    bit=st.integers(0, 31),
    swap=st.tuples(st.integers(0, 63), st.integers(0, 63)).filter(lambda pair: pair[0] != pair[1]),
)
def test_checksums_see_single_bits_and_places(where, bit, swap):
    whole = np.arange(64, dtype=np.uint32).reshape(8, 8) * np.uint32(2654435761)
    flipped, moved = whole.copy(), whole.copy()
    flipped.flat[where] ^= np.uint32(1 << bit)
    moved.flat[list(swap)] = moved.flat[list(swap[::-1])]
    sums = [checkpoint.checksums({"x": x})["x"] for x in (whole, flipped, moved, whole.view(np.float32))]
    assert len(set(sums[:3])) == 3 and sums[3] == sums[0]
    assert all(len(value) == 16 and int(value, 16) >= 0 for value in sums)


@pytest.mark.parametrize("dtype", ["bool", "int8", "bfloat16"])
def test_checksums_of_every_dtype(dtype):
    ones, other = jnp.ones((3, 2), dtype), jnp.asarray(np.arange(6).reshape(3, 2) < 5, dtype)
    sums = checkpoint.checksums({"a": ones, "b": {"c": ones, "d": other}})
    assert set(sums) == {"a", "b/c", "b/d"} and sums["a"] == sums["b/c"] != sums["b/d"]


def test_slow_storage_is_told(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(checkpoint, "SLOW_SECONDS", -1.0)
    writer = checkpoint.Writer(tmp_path, keep_latest=1, keep_best=0)
    writer.save(1, state(1), None)
    assert capsys.readouterr().err == ""
    writer.save(2, state(2), None)
    err = capsys.readouterr().err
    assert "until checkpoint 1 was written" in err and "is slow; raise checkpoint_every" in err
    writer.close()
    assert capsys.readouterr().err == ""
