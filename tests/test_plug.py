"""PPlug's equations: by hand, against a plain reading of them, and at their edges."""

from __future__ import annotations

import functools
from typing import Any

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import erf

from qaperso.models import plug

Tree = Any
N, H, E, D, T = 3, 5, 4, 6, 2
# Compiled whole, not operation by operation.
SOFT, ATTEND = jax.jit(plug.soft_tokens, static_argnums=3), jax.jit(plug.attend, static_argnums=2)


@functools.cache
def params(seed: int = 0) -> Tree:
    return helpers.shaken(helpers.drawn(plug.declare({}, E, D, T), seed), seed + 1, 0.3)


def drawn(seed: int, present: list[list[bool]] | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Unit vectors of queries [N, E] and of history [N, H, E], 0 where there is no item."""
    rng = np.random.default_rng(seed)
    vectors = rng.normal(size=(N, 1 + H, E))
    vectors /= np.linalg.norm(vectors, axis=-1, keepdims=True)
    there = np.ones((N, H)) if present is None else np.array(present)
    return vectors[:, 0].astype(np.float32), (vectors[:, 1:] * there[..., None]).astype(np.float32)


def plainly(own: Tree, query: np.ndarray, history: np.ndarray, temperature: float) -> np.ndarray:
    """The published equations read word by word, in float64."""
    own = jax.tree.map(lambda x: np.asarray(x, np.float64), own)

    def mlp(p: Tree, v: np.ndarray) -> np.ndarray:
        z = np.sqrt(len(v)) * v @ p["hidden"] + p["hidden_bias"]
        return (0.5 * z * (1 + erf(z / np.sqrt(2)))) @ p["out"] + p["out_bias"]

    result = []
    for x, items in zip(np.asarray(query, np.float64), np.asarray(history, np.float64), strict=True):
        told = mlp(own["instruction_mlp"], own["instruction"])
        items = [h for h in items if h.any()]
        personal = np.zeros(own["mlp"]["out_bias"].shape)
        if items:
            w = np.exp([x @ h / temperature for h in items])
            personal = sum(wi * mlp(own["mlp"], h) for wi, h in zip(w / w.sum(), items, strict=True))
        result.append(np.stack([told, *np.split(personal, len(personal) // len(told))]))
    return np.array(result)


def test_by_hand() -> None:
    """Two items at right angles, the query being the first: weights e / (e + 1) and 1 / (e + 1).

    The hidden layer takes (1, 0) to GELU(1, 0) = (0.841345, 0) and (0, 1) to GELU(0, 2) = (0, 1.954500); (0.5, -0.5) is added.
    """
    half = {
        "hidden": jnp.diag(jnp.array([1.0, 2.0])) / 2**0.5,
        "hidden_bias": jnp.zeros(2),
        "out": jnp.eye(2),
        "out_bias": jnp.array([0.5, -0.5]),
    }
    own = {"mlp": half, "instruction_mlp": half, "instruction": jnp.array([0.0, 1.0])}
    query, history = jnp.array([[1.0, 0.0]]), jnp.array([[[1.0, 0.0], [0.0, 1.0], [0.0, 0.0]]])
    np.testing.assert_allclose(ATTEND(query, history, 1.0), [[0.7310586, 0.2689414, 0]], atol=1e-6)
    found = SOFT(own, query, history, 1.0)
    np.testing.assert_allclose(found, [[[0.5, 1.4544997], [1.1150722, 0.0256459]]], atol=1e-6)
    # At half the temperature twice the difference: e^2 / (e^2 + 1).
    np.testing.assert_allclose(ATTEND(query, history, 0.5), [[0.8807971, 0.1192029, 0]], atol=1e-6)
    np.testing.assert_allclose(SOFT(own, query, history, 0.5)[0, 1], [1.2410540, -0.2670179], atol=1e-6)


@settings(max_examples=40, deadline=None)
@given(
    st.integers(0, 99),
    st.lists(st.lists(st.booleans(), min_size=H, max_size=H), min_size=N, max_size=N),
    st.sampled_from([0.05, 0.5, 1.0]),
)
def test_equations_and_masks(seed: int, present: list[list[bool]], temperature: float) -> None:
    query, history = drawn(seed, present)
    found = SOFT(params(), jnp.asarray(query), jnp.asarray(history), temperature)
    assert found.shape == (N, 1 + T, D)
    np.testing.assert_allclose(found, plainly(params(), query, history, temperature), atol=2e-5)
    weight = np.asarray(ATTEND(jnp.asarray(query), jnp.asarray(history), temperature))
    assert (weight[~np.array(present)] == 0).all()
    np.testing.assert_allclose(weight.sum(-1), np.array(present).any(-1), atol=1e-6)
    # The order of a history does not matter, nor what room is left behind it.
    order = np.random.default_rng(seed).permutation(H)
    more = np.concatenate([history[:, order], np.zeros((N, 2, E), np.float32)], 1)
    np.testing.assert_allclose(SOFT(params(), jnp.asarray(query), jnp.asarray(more), temperature), found, atol=2e-5)


def test_no_history_and_one_item() -> None:
    query, history = drawn(0, [[False] * H, [True] + [False] * (H - 1), [True] * H])
    found = np.asarray(SOFT(params(), jnp.asarray(query), jnp.asarray(history), 1.0))
    assert (found[0, 1:] == 0).all() and (found[1:, 1:] != 0).all()
    # A single item has all the weight, whatever is asked.
    other = np.asarray(SOFT(params(), jnp.asarray(query[[2, 2, 2]]), jnp.asarray(history), 1.0))
    np.testing.assert_allclose(other[1], found[1], atol=1e-6)
    # What is told of the task is the same for everybody.
    assert (found[:, 0] == found[0, 0]).all() and (found[0, 0] != 0).all()


def test_gradients_are_finite_where_nothing_is() -> None:
    """No history, and a query without words."""
    table = {"table": jnp.ones((7, E))}
    tokens, absent = jnp.zeros((N, 3), jnp.int32), jnp.zeros((N, 3), bool)

    def total(own: Tree) -> jax.Array:
        query = plug.unit(plug.encode_bag(own["encoder"], tokens, absent))
        return (SOFT(own, query, jnp.zeros((N, H, E)), 0.1) ** 2).sum()

    value, slope = jax.jit(jax.value_and_grad(total))({**params(), "encoder": table})
    assert np.isfinite(value) and all(np.isfinite(x).all() for x in jax.tree.leaves(slope))
    assert all((x == 0).all() for x in jax.tree.leaves((slope["mlp"], slope["encoder"])))
    assert all((x != 0).any() for x in jax.tree.leaves((slope["instruction"], slope["instruction_mlp"])))


def test_elements_are_of_size_one_at_first() -> None:
    """Under an encoder of any width; so that the scale measured from the base is the soft tokens' own."""
    rng = np.random.default_rng(0)
    for dim, embed in ((24, 300), (400, 64)):
        own = helpers.drawn(plug.declare({}, dim, embed, 1), 0)
        one = rng.normal(size=(40, 1, dim))
        one = jnp.asarray(one / np.linalg.norm(one, axis=-1, keepdims=True), jnp.float32)
        found = SOFT(own, one[:, 0], one, 1.0)
        for token in (0, 1):
            assert np.sqrt(np.mean(np.square(found[:, token]))) == pytest.approx(1, rel=0.35 if token == 0 else 0.1)


def test_a_bag_on_the_device_is_the_bag_on_the_host() -> None:
    rng = np.random.default_rng(0)
    texts = ["1 2 2", "3", "", "4 4 4 4 1"]
    table = rng.normal(1.0, 1.0, (6, E)).astype(np.float32)
    bag = plug.bag(table, lambda texts: [[int(t) for t in text.split()] for text in texts], ["1 2", "1 1", "4"])
    # idf: 1 is in two of three texts, 2 and 4 in one, the others in none.
    weight = 1 + np.log(4 / np.array([1, 3, 2, 1, 2, 1]))
    np.testing.assert_allclose(bag.table, (table - table.mean(0)) * weight[:, None], rtol=1e-5, atol=1e-6)
    tokens, present = np.zeros((len(texts), 5), np.int32), np.zeros((len(texts), 5), bool)
    for i, ids in enumerate(bag.tokens(texts)):
        tokens[i, : len(ids)], present[i, : len(ids)] = ids, True
    found = bag.embed(texts)
    device = plug.unit(plug.encode_bag({"table": jnp.asarray(bag.table)}, jnp.asarray(tokens), jnp.asarray(present)))
    np.testing.assert_allclose(found, device, atol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), [1, 1, 0, 1], atol=1e-6)
    other = plug.bag(table, bag.tokens, ["1 2"])
    assert bag.identity == plug.bag(table, bag.tokens, ["4", "1 2", "1 1"]).identity != other.identity
