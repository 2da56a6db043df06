"""What is kept, what is read back, what is refused."""

from __future__ import annotations

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from qaperso import checkpoint, step
from qaperso.errors import UserError


def state(rank: int = 2, value: float = 1.0) -> step.TrainState:
    """A state with a memory and with every leaf different."""
    params = {"lora": {"a": jnp.full((2, 4, rank), float(value)), "b": jnp.arange(2.0 * rank).reshape(2, rank)}}
    made = step.init_state(optax.adam(1e-3), params, {"sums": jnp.full((3,), value + 1.0)})
    return made.replace(step=jnp.int32(7), skipped=jnp.int32(2))


def like(tree):
    """Shapes and shardings only."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Five checkpoints whose dev metric falls, then rises; the last was not validated."""
    path = tmp_path_factory.mktemp("checkpoints")
    writer = checkpoint.Writer(path, keep_latest=1, keep_best=1)
    for n, nll in ((1, 3.0), (2, 1.0), (3, 2.0), (4, 2.5), (5, None)):
        writer.save(n, state(value=n), None if nll is None else {checkpoint.METRIC: nll})
    writer.close()
    return path


def test_latest_and_best_are_both_kept(folder):
    assert checkpoint.steps(folder) == {2: 1.0, 5: None}
    assert checkpoint.choose(folder) == 2


def test_the_best_is_kept_while_the_metric_rises(tmp_path):
    writer = checkpoint.Writer(tmp_path, keep_latest=2, keep_best=1)
    for n, nll in ((1, 1.0), (2, 2.0), (3, 3.0), (4, 4.0)):
        writer.save(n, state(value=n), {checkpoint.METRIC: nll})
    assert writer.latest() == 4
    writer.close()
    assert checkpoint.steps(tmp_path) == {1: 1.0, 3: 3.0, 4: 4.0}
    assert checkpoint.choose(tmp_path) == 1


def test_whole_state_comes_back_bit_for_bit(folder):
    writer = checkpoint.Writer(folder, keep_latest=1, keep_best=1)
    assert writer.latest() == 5
    restored, number = writer.restore(like(state(value=0.0)))
    assert number == 5
    helpers.assert_trees_equal(restored, state(value=5))
    writer.close()


def test_without_a_checkpoint_the_state_stays_as_it_is(tmp_path):
    writer, given = checkpoint.Writer(tmp_path, keep_latest=1, keep_best=1), state()
    assert writer.restore(given) == (given, 0)
    writer.close()


def test_trainable_and_memory_alone_come_back(folder):
    wanted = like(state())
    trainable, memory = checkpoint.load_trainable(folder, 2, wanted.trainable, wanted.memory)
    helpers.assert_trees_equal(trainable, state(value=2).trainable)
    helpers.assert_trees_equal(memory, state(value=2).memory)


def test_another_declaration_is_refused_by_name(folder):
    wanted = like(state(rank=3))
    message = (
        r"checkpoint 2, trainable: 'lora/a' is \(\(2, 4, 2\), 'float32'\), the configuration declares \(\(2, 4, 3\)"
    )
    with pytest.raises(UserError, match=message):
        checkpoint.load_trainable(folder, 2, wanted.trainable, {})
    more = {**like(state()).trainable, "tower": jax.ShapeDtypeStruct((2,), np.float32)}
    with pytest.raises(UserError, match=r"'tower' is absent, the configuration declares"):
        checkpoint.load_trainable(folder, 2, more, {})
    fewer = {"lora": {"a": like(state()).trainable["lora"]["a"]}}
    with pytest.raises(UserError, match=r"'lora/b' is .*, the configuration declares no such array"):
        checkpoint.load_trainable(folder, 2, fewer, {})


def test_a_step_that_is_there_is_left_alone(tmp_path):
    writer = checkpoint.Writer(tmp_path, keep_latest=1, keep_best=1)
    writer.save(3, state(value=1), {checkpoint.METRIC: 1.0})
    writer.save(3, state(value=2), None)
    writer.close()
    assert checkpoint.steps(tmp_path) == {3: 1.0}
    wanted = like(state())
    trainable, _ = checkpoint.load_trainable(tmp_path, 3, wanted.trainable, wanted.memory)
    helpers.assert_trees_equal(trainable, state(value=1).trainable)


def test_a_half_written_step_is_not_there(tmp_path):
    writer = checkpoint.Writer(tmp_path, keep_latest=1, keep_best=1)
    writer.save(3, state(), None)
    writer.close()
    torn = tmp_path / "6.orbax-checkpoint-tmp-17" / "trainable"
    torn.mkdir(parents=True)
    (torn / "manifest.ocdbt").write_bytes(b"half")
    assert checkpoint.steps(tmp_path) == {3: None}
    assert torn.exists()  # a reader leaves it alone: somebody may be writing it
    writer = checkpoint.Writer(tmp_path, keep_latest=1, keep_best=1)
    assert writer.latest() == 3
    writer.save(6, state(), None)
    writer.close()
    assert not torn.exists()
    assert checkpoint.steps(tmp_path) == {6: None}


def test_no_checkpoint_is_an_error(tmp_path):
    assert checkpoint.steps(tmp_path / "absent") == {}
    with pytest.raises(UserError, match="holds no complete checkpoint; train the run first"):
        checkpoint.choose(tmp_path / "absent")
    assert not (tmp_path / "absent").exists()


def test_json_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "a.json"
    checkpoint.write_json(path, {"name": "Zoë", "value": 0.1})
    before = path.read_bytes()
    assert before.decode("utf-8") == '{\n "name": "Zoë",\n "value": 0.1\n}\n'
    with pytest.raises(TypeError):
        checkpoint.write_json(path, {"name": object()})
    assert path.read_bytes() == before
