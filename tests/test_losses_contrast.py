"""The contrastive losses, tile by tile, against loops and against the formula with all scores at once."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding, PartitionSpec

from qaperso import arrays, hlo, losses, mesh
from qaperso.arrays import BATCH_AXES
from qaperso.data.contrast import Keys, contrast_masks

N, K, P = 5, 9, 3
SEEDS = st.integers(0, 2**32 - 1)
TEMPERATURE = 0.2


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def keys(queriers: Any, clusters: Any = 0, texts: Any = None, itself: bool = True) -> Keys:
    """Keys of dialogues by their queriers and clusters; all texts differ unless given."""
    number = np.arange(len(queriers))
    parts = list(queriers), 0, clusters, number if texts is None else texts, number if itself else -1
    names = "querier", "responder", "cluster", "text", "index"
    return {n: jnp.asarray(np.broadcast_to(np.int32(v), number.shape)) for n, v in zip(names, parts, strict=True)}


def plain(view: jax.Array, other: jax.Array, positives: jax.Array, candidates: jax.Array) -> jax.Array:
    """InfoNCE with all scores at once."""
    scores = losses.normalise(view) @ losses.normalise(other).T / TEMPERATURE
    low = jnp.finfo(scores.dtype).min
    log_z = jax.nn.logsumexp(jnp.where(candidates, scores, low), 1, keepdims=True)
    each = jnp.where(positives, log_z - scores, 0).sum(1) / jnp.maximum(positives.sum(1), 1)
    return jnp.where(positives.any(1) & (candidates & ~positives).any(1), each, 0).sum()


def reference(view: np.ndarray, other: np.ndarray, positives: np.ndarray, candidates: np.ndarray) -> tuple[float, int]:
    """Double loop in float64: mean over positives of the log-ratio, summed over anchors; and how many there are."""
    total, count = 0.0, 0
    for i in range(len(view)):
        if not positives[i].any() or not (candidates[i] & ~positives[i]).any():
            continue
        lengths = [np.linalg.norm(view[i].astype(np.float64)) * np.linalg.norm(o.astype(np.float64)) for o in other]
        cosine = [float(view[i].astype(np.float64) @ o) / n / TEMPERATURE for o, n in zip(other, lengths, strict=True)]
        below = sum(np.exp(cosine[j]) for j in range(len(other)) if candidates[i, j])
        terms = [-np.log(np.exp(cosine[j]) / below) for j in range(len(other)) if positives[i, j]]
        total, count = total + sum(terms) / len(terms), count + 1
    return total, count


def ours(view: jax.Array, other: jax.Array, rows: Keys, columns: Keys) -> jax.Array:
    return losses.info_nce(view, other, rows, columns, TEMPERATURE)


def with_gradient(loss: Callable) -> Callable:
    """Value and gradient to both representations, compiled anew, as the size of a tile is no argument."""
    return jax.jit(jax.value_and_grad(lambda *a: loss(*a), (0, 1)))


def tiled(size: int) -> Any:
    return mock.patch.object(losses, "TILE", size)


@functools.cache
def programs(tile: int) -> tuple[Callable, Callable, Callable]:
    return with_gradient(ours), with_gradient(plain), jax.jit(lambda *a: losses.count_anchors(*a))


def drawn(seed: int, size: int) -> Keys:
    """Few values, so that every kind of coincidence is common: nobody, copies, rows without a positive or negative."""
    rng = np.random.default_rng(seed)
    names = {"querier": (-1, 2), "responder": (0, 2), "cluster": (0, 2), "text": (0, 3)}
    found = {name: rng.integers(*bounds, size).astype(np.int32) for name, bounds in names.items()}
    return found | {"index": np.arange(size, dtype=np.int32)}


@pytest.mark.parametrize("n, k, tile", [(11, 7, 4), (N, K, 16)])
def test_tiles_are_the_whole_with_its_gradients(n: int, k: int, tile: int) -> None:
    run, expected, count = programs(tile)
    kinds = set()

    @settings(max_examples=40, deadline=None)
    @given(SEEDS)
    def check(seed: int) -> None:
        view, other, rows, columns = normal(seed, n, P), normal(seed + 1, k, P), drawn(seed, n), drawn(seed + 2, k)
        masks = contrast_masks(rows, columns)
        found, gradient = run(view, other, rows, columns)
        total, anchors = reference(view, other, *masks)
        np.testing.assert_allclose(found, total, rtol=1e-5, atol=1e-5)
        assert count(rows, columns) == anchors
        for g, wanted in zip(gradient, expected(view, other, *masks)[1], strict=True):
            np.testing.assert_allclose(g, wanted, rtol=1e-5, atol=1e-5)
        kinds.add(anchors == 0)

    with tiled(tile):
        check()
    assert kinds == {True, False}


def largest(loss: Callable, *arguments: Any, gradient: bool) -> int:
    """Elements of the largest array in the compiled program of a loss, or of its value and gradient."""
    function = jax.value_and_grad(loss, (0, 1)) if gradient else loss
    computations, _ = hlo.parse(jax.jit(lambda *a: function(*a)).lower(*arguments).compile().as_text())
    found = [a for inside in computations.values() for one in inside.values() for a in one.result]
    return max(int(np.prod(a.dims)) for a in found)


@pytest.mark.parametrize("gradient", [False, True])
def test_no_buffer_has_a_place_for_every_pair(gradient: bool) -> None:
    n, k, dim = 2200, 1700, 8
    views = [jax.ShapeDtypeStruct((size, dim), jnp.float32) for size in (n, k)]
    rows, columns = (keys(range(size)) for size in (n, k))
    masks = [jax.ShapeDtypeStruct((n, k), bool)] * 2
    assert losses.TILE**2 < n * k / 10
    assert largest(ours, *views, rows, columns, gradient=gradient) <= losses.TILE**2
    assert largest(plain, *views, *masks, gradient=gradient) == n * k


@pytest.mark.parametrize("kind", ["means", "bank"])
def test_nor_has_writing_the_memory(kind: str) -> None:
    n, classes, dim = 2200, 1700, 8
    memory = arrays.abstract(losses.declare_memory(kind, classes, dim, 2))
    views, label = jax.ShapeDtypeStruct((2, n, dim), jnp.float32), jax.ShapeDtypeStruct((n,), jnp.int32)
    assert largest(losses.write_memory, memory, views, label, gradient=False) < n * classes / 4


def mean_loss(a: jax.Array, b: jax.Array, rows: Keys) -> jax.Array:
    return losses.in_batch((a, b), rows, TEMPERATURE) / losses.count_anchors(rows, rows)


def test_eight_devices_are_one() -> None:
    """16 anchors are spread over four devices, in tiles of two."""
    made, count = mesh.make_mesh(2, 2, 2), 16
    views, rows = [normal(s, count, P) for s in (0, 1)], drawn(5, count)
    place = mesh.batch_sharding(made, 0, count)
    assert place.spec == PartitionSpec(BATCH_AXES)
    with tiled(3):
        expected, gradients = with_gradient(mean_loss)(*views, rows)
        with jax.set_mesh(made):
            out = NamedSharding(made, PartitionSpec()), (place, place)
            spread = jax.jit(jax.value_and_grad(mean_loss, (0, 1)), out_shardings=out)
            compiled = spread.lower(*jax.device_put((*views, rows), place)).compile()
            found, own = compiled(*jax.device_put((*views, rows), place))
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    for g, wanted in zip(own, gradients, strict=True):
        np.testing.assert_allclose(g, wanted, rtol=1e-5, atol=1e-6)
    assert float(expected) > 0.1
    # What goes between devices are representations, keys and sums.
    sent = [a for c in hlo.cost(compiled.as_text()).collectives for a in c.arrays]
    assert sent and all(a.dims in ((), (count,), (count, P)) for a in sent)


def test_anchors_that_do_not_divide_are_on_every_device() -> None:
    made, count = mesh.make_mesh(2, 2, 2), 18
    given = [normal(s, count, P) for s in (0, 1)] + [drawn(5, count)]
    expected = jax.jit(mean_loss)(*given)
    with jax.set_mesh(made):
        found = jax.jit(mean_loss)(*jax.device_put(given, mesh.batch_sharding(made, 0, count)))
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_mean_over_positives_stands_outside_the_log() -> None:
    # Cosines 1 and 0 to two positives and -1 to a negative.
    view, other = jnp.asarray([[2.0, 0.0]]), jnp.asarray([[1.0, 0.0], [0.0, 3.0], [-5.0, 0.0]])
    z = np.e + 1 + 1 / np.e
    outside = (np.log(z) - 1 + np.log(z)) / 2
    inside = -np.log((np.e + 1) / z / 2)
    rows, columns = keys([1], texts=[9]), keys([1, 1, 2])
    found = float(jax.jit(lambda *views: losses.info_nce(*views, rows, columns, 1.0))(view, other))
    np.testing.assert_allclose(found, outside, rtol=1e-6)
    assert abs(found - inside) > 0.05


def test_rows_without_positive_or_negative_contribute_nothing() -> None:
    # Alone in its cluster; nobody of its own querier; nobody at all in its cluster; not contrasted.
    rows = keys([1, 2, 1, -1, 1], [0, 1, 2, 1, 2], itself=False)
    columns = keys([1, 3, 3, 4, -1, 3, 3, 4, 4], [0, *[1] * 8])
    run, _, count = programs(16)
    value, gradient = run(normal(0, N, P), normal(1, K, P), rows, columns)
    assert value == 0 and count(rows, columns) == 0
    assert all((g == 0).all() for g in gradient)


def test_in_batch_is_symmetric() -> None:
    a, b, rows = jnp.asarray(normal(0, N, P)), jnp.asarray(normal(1, N, P)), keys([1, 1, 2, 2, 2])
    loss = jax.jit(lambda *views: losses.in_batch(views, rows, TEMPERATURE))
    found = loss(a, b)
    np.testing.assert_allclose(found, loss(b, a), rtol=1e-6)
    masks = tuple(map(np.asarray, contrast_masks(rows, rows)))
    one_way = [reference(*map(np.asarray, pair), *masks)[0] for pair in ((a, b), (b, a))]
    np.testing.assert_allclose(found, np.mean(one_way), rtol=1e-5)
    assert abs(one_way[0] - one_way[1]) > 1e-3, "the two directions differ, so that averaging shows"


def test_normalise() -> None:
    x = jnp.asarray([[3.0, 4.0], [0.0, 0.0], [1e-12, 0.0]])
    np.testing.assert_allclose(losses.normalise(x), [[0.6, 0.8], [0, 0], [1, 0]], rtol=1e-6)


def test_gradients_are_finite_for_zero_vectors() -> None:
    a = jnp.asarray(normal(0, N, P)).at[1].set(0)
    b = jnp.asarray(normal(1, N, P)).at[1:3].set(0)
    rows = keys(range(1, N + 1))
    gradients = jax.jit(jax.grad(lambda views: losses.in_batch(views, rows, 0.1)))((a, b))
    assert all(jnp.isfinite(g).all() for g in gradients)
    # Direction of a zero vector: none. The others still learn.
    assert (gradients[0][1] == 0).all() and (gradients[0][0] != 0).any()


def test_no_gradient_into_prototypes() -> None:
    views = jnp.asarray(normal(0, N, P)), jnp.asarray(normal(1, N, P))
    means = jnp.asarray(normal(2, 2, K, P))
    rows, columns = keys(range(1, N + 1)), keys(range(1, K + 1), texts=-1, itself=False)
    loss = jax.jit(jax.value_and_grad(lambda *a: losses.prototype(*a, rows, columns, TEMPERATURE), (0, 1)))
    value, (into_views, into_means) = loss(views, means)
    assert (into_means == 0).all()
    assert all((g != 0).any(1).all() for g in into_views)
    # Each view is compared with the prototypes of the other one.
    masks = tuple(map(np.asarray, contrast_masks(rows, columns)))
    expected = [reference(*map(np.asarray, (views[i], means[1 - i])), *masks)[0] for i in (0, 1)]
    np.testing.assert_allclose(value, np.mean(expected), rtol=1e-5)
