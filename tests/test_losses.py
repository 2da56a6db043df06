"""Cross-entropy against all logits at once, and the prototype memory against plain Python containers."""

from __future__ import annotations

import collections
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from qaperso import arrays, losses

SEEDS = st.integers(0, 2**32 - 1)


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def plain(hidden: jax.Array, table: jax.Array, target: jax.Array, weight: jax.Array) -> jax.Array:
    """Cross-entropy with all logits at once."""
    logits = hidden @ table.T
    own = jnp.take_along_axis(logits, target[..., None], -1)[..., 0]
    return (jax.nn.logsumexp(logits, -1) - own) * weight


@pytest.mark.parametrize("t", [1, 4, losses.CHUNK, losses.CHUNK + 1, 3 * losses.CHUNK - 5])
def test_chunked_cross_entropy_is_the_whole_with_its_gradients(t: int) -> None:
    hidden, table = jnp.asarray(normal(0, 2, t, 8)), jnp.asarray(3 * normal(1, 37, 8))
    generator = np.random.default_rng(2)
    target = jnp.asarray(generator.integers(0, 37, (2, t)))
    weight = jnp.asarray(generator.integers(0, 3, (2, t)) / 2, jnp.float32)

    def total(function: Any, hidden: jax.Array, table: jax.Array) -> jax.Array:
        return jnp.sum(jnp.sin(function(hidden, table, target, weight)))

    ours = losses.cross_entropy(hidden, table, target, weight)
    np.testing.assert_allclose(ours, plain(hidden, table, target, weight), rtol=1e-5, atol=1e-5)
    assert (np.asarray(ours)[np.asarray(weight) == 0] == 0).all()
    own, expected = (jax.grad(total, (1, 2))(f, hidden, table) for f in (losses.cross_entropy, plain))
    for gradient, wanted in zip(own, expected, strict=True):
        np.testing.assert_allclose(gradient, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("rows", [1, 8])
def test_a_chunk_without_weight_is_not_computed(rows: int) -> None:
    part = losses.CHUNK
    table, weight = jnp.asarray(normal(1, 37, 8)), np.zeros((rows, 3 * part), np.float32)
    weight[0, :3], weight[-1, 2 * part] = 1, 1
    # What is computed gives NaN in the middle chunk, and times a weight of zero still.
    hidden = jnp.asarray(normal(0, rows, 3 * part, 8)).at[:, part : 2 * part].set(jnp.nan)
    target = jnp.zeros((rows, 3 * part), jnp.int32)

    def total(function: Any, hidden: jax.Array, table: jax.Array) -> tuple[jax.Array, jax.Array]:
        found = function(hidden, table, target, jnp.asarray(weight))
        return found.sum(), found

    (_, ours), slope = jax.value_and_grad(total, 1, has_aux=True)(losses.cross_entropy, hidden, table)
    (_, expected), right = jax.value_and_grad(total, 1, has_aux=True)(plain, jnp.nan_to_num(hidden), table)
    np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(losses.cross_entropy(hidden, table, target, jnp.asarray(weight)), expected, rtol=1e-5)
    np.testing.assert_allclose(slope, right, rtol=1e-5, atol=1e-6)


def test_all_logits_never_exist() -> None:
    t, vocab = 4 * losses.CHUNK, 1000
    shapes = (2, t, 8), (vocab, 8)
    arguments = [jax.ShapeDtypeStruct(s, jnp.float32) for s in shapes]
    arguments += [jax.ShapeDtypeStruct((2, t), d) for d in (jnp.int32, jnp.float32)]
    gradient = jax.jit(jax.grad(lambda *a: losses.cross_entropy(*a).sum()))
    used = gradient.lower(*arguments).compile().memory_analysis().temp_size_in_bytes
    assert used < 4 * 2 * t * vocab


def test_cross_entropy_of_large_logits_is_finite() -> None:
    hidden, table = jnp.asarray([[[1e4, 0.0]]]), jnp.asarray([[1.0, 0], [-1, 0], [0, 1]])
    ours, slope = jax.value_and_grad(
        lambda h: losses.cross_entropy(h, table, jnp.asarray([[1]]), jnp.ones((1, 1))).sum()
    )(hidden)
    np.testing.assert_allclose(ours, 2e4)
    np.testing.assert_allclose(slope, [[[2.0, 0.0]]])


def empty(kind: str, classes: int, size: int = 3, dim: int = 2) -> dict:
    return arrays.initialise(losses.declare_memory(kind, classes, dim, size), jax.random.key(0))


@pytest.mark.parametrize("kind", ["means", "bank"])
def test_an_empty_memory_has_no_members(kind: str) -> None:
    means, filled = losses.read_memory(empty(kind, 4))
    assert not filled.any() and (means == 0).all() and means.shape == (2, 4, 2)


def test_decayed_sums_by_hand() -> None:
    memory = empty("means", 3)
    first = jnp.asarray([[[1.0, 0], [3.0, 0], [7.0, 7.0]], [[0, 1.0], [0, 3.0], [7.0, 7.0]]])
    memory = losses.write_memory(memory, first, jnp.asarray([1, 1, -1]), 0.5)
    np.testing.assert_array_equal(memory["counts"], [0, 2, 0])
    np.testing.assert_array_equal(memory["sums"][:, 1], [[4, 0], [0, 4]])
    # Class 1: (1 + 3) * 0.5 + 8 = 10 over 2 * 0.5 + 1 = 2 members; the other view's second number is 2 over 2.
    # Class 2 has had none before.
    second = jnp.asarray([[[8.0, 0], [5.0, 5.0], [9.0, 9.0]]] * 2)
    memory = losses.write_memory(memory, second, jnp.asarray([1, 2, -1]), 0.5)
    np.testing.assert_array_equal(memory["counts"], [0, 2, 1])
    means, filled = losses.read_memory(memory)
    np.testing.assert_array_equal(means, [[[0, 0], [5, 0], [5, 5]], [[0, 0], [4, 1], [5, 5]]])
    np.testing.assert_array_equal(filled, [False, True, True])
    # A batch without members of a class leaves it as it is: no decay.
    third = losses.write_memory(memory, second, jnp.asarray([-1, -1, -1]), 0.5)
    for name in memory:
        np.testing.assert_array_equal(third[name], memory[name])


CLASSES, SIZE, ROWS = 3, 2, 6
write = jax.jit(losses.write_memory)


@settings(max_examples=60, deadline=None)
@given(SEEDS, hnp.arrays(np.int32, st.tuples(st.integers(1, 4), st.just(ROWS)), elements=st.integers(-1, CLASSES - 1)))
def test_bank_is_first_in_first_out(seed: int, labels: np.ndarray) -> None:
    """Batches with several of one class, and with more than the bank holds of one class."""
    memory = empty("bank", CLASSES, SIZE)
    bank = [collections.deque(maxlen=SIZE) for _ in range(CLASSES)]
    written = [0] * CLASSES
    for t, label in enumerate(labels):
        views = normal(seed + t, 2, ROWS, 2)
        memory = write(memory, jnp.asarray(views), jnp.asarray(label))
        for i, c in enumerate(label):
            if c >= 0:
                bank[c].append(views[:, i])
                written[c] += 1
        means, filled = losses.read_memory(memory)
        np.testing.assert_array_equal(memory["written"], written)
        np.testing.assert_array_equal(filled, [w > 0 for w in written])
        for c in range(CLASSES):
            # The oldest of a full bank stands where the next one will be written.
            held = np.roll(memory["entries"][:, c], -(written[c] % SIZE) if len(bank[c]) == SIZE else 0, 1)
            expected = np.zeros((2, SIZE, 2), np.float32)
            if bank[c]:
                expected[:, : len(bank[c])] = np.stack(bank[c], 1)
                np.testing.assert_allclose(means[:, c], np.mean(bank[c], 0), rtol=1e-5, atol=1e-6)
            np.testing.assert_array_equal(held, expected)


@pytest.mark.parametrize("kind", ["means", "bank"])
def test_no_gradient_flows_into_memory(kind: str) -> None:
    def total(views: jax.Array) -> jax.Array:
        means, _ = losses.read_memory(losses.write_memory(empty(kind, 3), views, jnp.asarray([0, 1, 1])))
        return (means**2).sum()

    views = jnp.asarray(normal(0, 2, 3, 2))
    assert total(views) > 0 and (jax.grad(total)(views) == 0).all()


@pytest.mark.parametrize("kind", ["means", "bank"])
def test_cleared_classes_are_as_at_first_and_others_as_they_were(kind: str) -> None:
    written = losses.write_memory(empty(kind, 4), jnp.asarray(normal(5, 2, 4, 2)), jnp.asarray([0, 1, 2, 3]))
    cleared = losses.clear_memory(written, np.array([1, 3]))
    means, filled = losses.read_memory(cleared)
    assert filled.tolist() == [True, False, True, False]
    np.testing.assert_array_equal(means[:, [0, 2]], losses.read_memory(written)[0][:, [0, 2]])
    assert all(not np.asarray(x if x.ndim == 1 else x[0])[[1, 3]].any() for x in cleared.values())
