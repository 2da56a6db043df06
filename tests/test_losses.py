"""Losses against loops, and the prototype memory against plain Python containers."""

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

N, K, P = 4, 5, 3
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


def reference(view: np.ndarray, other: np.ndarray, positives: np.ndarray, candidates: np.ndarray, t: float) -> float:
    """Double loop in float64: mean over positives of the log-ratio, summed over rows with positive and negative."""
    total = 0.0
    for i in range(len(view)):
        if not positives[i].any() or not (candidates[i] & ~positives[i]).any():
            continue
        cosine = [
            float(view[i].astype(np.float64) @ other[j]) / (np.linalg.norm(view[i]) * np.linalg.norm(other[j])) / t
            for j in range(len(other))
        ]
        below = sum(np.exp(cosine[j]) for j in range(len(other)) if candidates[i, j])
        terms = [-np.log(np.exp(cosine[j]) / below) for j in range(len(other)) if positives[i, j]]
        total += sum(terms) / len(terms)
    return total


info_nce = jax.jit(losses.info_nce, static_argnums=4)


@settings(max_examples=60, deadline=None)
@given(SEEDS, hnp.arrays(bool, (N, K)), hnp.arrays(bool, (N, K)), st.sampled_from([0.1, 1.0]))
def test_info_nce_is_the_double_loop(seed: int, positives: np.ndarray, others: np.ndarray, t: float) -> None:
    view, other, candidates = normal(seed, N, P), normal(seed + 1, K, P), positives | others
    ours = info_nce(*map(jnp.asarray, (view, other, positives, candidates)), t)
    np.testing.assert_allclose(ours, reference(view, other, positives, candidates, t), rtol=1e-4, atol=1e-4)


def test_mean_over_positives_stands_outside_the_log() -> None:
    # Cosines 1 and 0 to two positives and -1 to a negative, at temperature 1.
    view, other = jnp.asarray([[2.0, 0.0]]), jnp.asarray([[1.0, 0.0], [0.0, 3.0], [-5.0, 0.0]])
    positives, candidates = jnp.asarray([[True, True, False]]), jnp.ones((1, 3), bool)
    z = np.e + 1 + 1 / np.e
    outside = (np.log(z) - 1 + np.log(z)) / 2
    inside = -np.log((np.e + 1) / z / 2)
    ours = float(info_nce(view, other, positives, candidates, 1.0))
    np.testing.assert_allclose(ours, outside, rtol=1e-6)
    assert abs(ours - inside) > 0.05


def test_rows_without_positive_or_negative_contribute_nothing() -> None:
    positives = np.zeros((N, K), bool)
    candidates = np.zeros((N, K), bool)
    positives[0, :2] = candidates[0, :2] = True  # no negative
    candidates[1, :] = True  # no positive; rows 2 and 3 have neither
    args = jnp.asarray(positives), jnp.asarray(candidates), 0.1
    value, gradient = jax.jit(jax.value_and_grad(losses.info_nce, (0, 1)), static_argnums=4)(
        jnp.asarray(normal(0, N, P)), jnp.asarray(normal(1, K, P)), *args
    )
    assert value == 0
    assert all((g == 0).all() for g in gradient)


def test_in_batch_is_symmetric() -> None:
    a, b = jnp.asarray(normal(0, N, P)), jnp.asarray(normal(1, N, P))
    kind = np.array([0, 0, 1, 1])
    positives, candidates = jnp.asarray(kind[:, None] == kind[None]), jnp.ones((N, N), bool)
    ours = losses.in_batch(a, b, positives, candidates, 0.2)
    np.testing.assert_allclose(ours, losses.in_batch(b, a, positives, candidates, 0.2), rtol=1e-6)
    one_way = [reference(*map(np.asarray, (*pair, positives, candidates)), 0.2) for pair in ((a, b), (b, a))]
    np.testing.assert_allclose(ours, np.mean(one_way), rtol=1e-5)
    assert abs(one_way[0] - one_way[1]) > 1e-3, "the two directions differ, so that averaging shows"


def test_normalise() -> None:
    x = jnp.asarray([[3.0, 4.0], [0.0, 0.0], [1e-12, 0.0]])
    np.testing.assert_allclose(losses.normalise(x), [[0.6, 0.8], [0, 0], [1, 0]], rtol=1e-6)


def test_gradients_are_finite_for_zero_vectors() -> None:
    a = jnp.asarray(normal(0, N, P)).at[1].set(0)
    b = jnp.asarray(normal(1, N, P)).at[1:3].set(0)
    positives, candidates = jnp.eye(N, dtype=bool), jnp.ones((N, N), bool)
    gradients = jax.jit(jax.grad(losses.in_batch, (0, 1)), static_argnums=4)(a, b, positives, candidates, 0.1)
    assert all(jnp.isfinite(g).all() for g in gradients)
    # Direction of a zero vector: none. The others still learn.
    assert (gradients[0][1] == 0).all() and (gradients[0][0] != 0).any()


def test_no_gradient_into_prototypes() -> None:
    views = jnp.asarray(normal(0, N, P)), jnp.asarray(normal(1, N, P))
    means = jnp.asarray(normal(2, 2, K, P))
    positives = jnp.asarray(np.eye(N, K, dtype=bool))
    args = positives, jnp.ones((N, K), bool), 0.3
    value, (into_views, into_means) = jax.jit(jax.value_and_grad(losses.prototype, (0, 1)), static_argnums=4)(
        views, means, *args
    )
    assert (into_means == 0).all()
    assert all((g != 0).any(1).all() for g in into_views)
    # Each view is compared with the prototypes of the other one.
    expected = [reference(*map(np.asarray, (views[i], means[1 - i], *args[:2])), 0.3) for i in (0, 1)]
    np.testing.assert_allclose(value, np.mean(expected), rtol=1e-5)


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
