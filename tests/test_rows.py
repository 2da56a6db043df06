"""Rows for new queriers: the fit is gradient descent on the whole model's loss, and changes one row and nothing else."""

from __future__ import annotations

import dataclasses
from typing import Any

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import untrained

from qaperso import people, rows
from qaperso.data.batches import sequential
from qaperso.data.store import Store
from qaperso.errors import UserError
from qaperso.eval import scores
from qaperso.run import Run
from qaperso.types import STRANGER, Example

Tree = Any
PLAIN = dict(method="qar", qar__contrast="none")


def some(run: Run, store: Store, querier: str, count: int) -> list[Example]:
    """Dev dialogues of one querier."""
    row = store.registry.row(querier)
    return [e for e in run.examples(store, "dev")[0] if e.querier == row][:count]


def by_definition(run: Run, trainable: Tree, examples: list[Example], steps: int, lr: float) -> jax.Array:
    """Adam with a cosine on the whole model's reply NLL under a row of the table."""
    row = rows.spare_row(run, trainable)
    table = np.asarray(trainable["tower"]["rows"])
    known = table[1 : 1 + len(run.registry.queriers)]
    rate = lr * np.sqrt(np.mean((known - table[STRANGER]) ** 2))
    batches = [b for b, _ in sequential([dataclasses.replace(e, querier=row) for e in examples], run.shape)]

    @jax.jit
    def slope(vector: jax.Array) -> jax.Array:
        def nll(vector: jax.Array) -> jax.Array:
            values = people.with_row(trainable, row, vector)
            each = (scores.batch_nll(run.setting, run.method, values, run.base, helpers.device(b)) for b in batches)
            return sum(sums.sum() for sums, _ in each)

        return jax.grad(nll)(vector)

    optimizer = optax.adam(optax.cosine_decay_schedule(rate, steps))
    vector = jnp.asarray(table[STRANGER])
    state = optimizer.init(vector)
    for _ in range(steps):
        updates, state = optimizer.update(slope(vector), state)
        vector = optax.apply_updates(vector, updates)
    return vector


# One stream in the first layer, two in the second: the parts that a fit takes apart are all there. And one stream only.
@pytest.mark.parametrize("changes", [PLAIN | {"qar__split_layer": 1}, {"method": "sft_rows"}], ids=["qar", "sft_rows"])
def test_the_fit_is_descent_on_the_whole_model_s_loss(changes: dict[str, Any]) -> None:
    run, store, trainable = untrained.opened(**changes)
    examples = some(run, store, "agnes", 5)
    assert len(examples) == 5
    expected = by_definition(run, trainable, examples, 4, 0.2)
    before = jax.tree.map(np.array, trainable)
    found = rows.fit_row(run, trainable, examples, steps=4, lr=0.2)
    moved = np.abs(expected - trainable["tower"]["rows"][STRANGER])
    assert moved.min() < moved.mean() < moved.max()
    np.testing.assert_allclose(found, expected, atol=2e-3 * float(moved.mean()))
    helpers.assert_trees_equal(trainable, before)


def test_a_fit_lowers_what_it_descends_and_turns_are_seeded(monkeypatch: pytest.MonkeyPatch) -> None:
    run, store, trainable = untrained.opened(**PLAIN)
    examples, row = some(run, store, "pip", 7), rows.spare_row(run, trainable)
    asked = [dataclasses.replace(e, querier=row) for e in examples]

    def nll(vector: jax.Array) -> float:
        return scores.reply_nll(run, people.with_row(trainable, row, vector), asked)[0].sum()

    whole = rows.fit_row(run, trainable, examples)
    assert nll(whole) < 0.99 * nll(trainable["tower"]["rows"][STRANGER])
    np.testing.assert_array_equal(whole, rows.fit_row(run, trainable, examples))
    # One row of a batch at a time: in an order that the seed decides.
    monkeypatch.setattr(rows, "TOKENS", 1)
    drawn = [rows.fit_row(run, trainable, examples, seed=seed) for seed in (0, 0, 1)]
    np.testing.assert_array_equal(drawn[0], drawn[1])
    assert np.abs(drawn[0] - drawn[2]).max() > 0 and np.abs(drawn[0] - whole).max() > 0
    assert nll(drawn[0]) < 0.99 * nll(trainable["tower"]["rows"][STRANGER])


def test_every_batch_has_its_turn() -> None:
    drawn = list(rows._turns(5, 20, 0))
    assert all(sorted(drawn[k : k + 5]) == list(range(5)) for k in range(0, 20, 5))
    assert drawn[:5] != drawn[5:10] and drawn == list(rows._turns(5, 20, 0)) != list(rows._turns(5, 20, 1))


def test_no_step_gives_the_stranger() -> None:
    run, store, trainable = untrained.opened(**PLAIN)
    found = rows.fit_row(run, trainable, some(run, store, "pip", 1), steps=0)
    np.testing.assert_array_equal(found, trainable["tower"]["rows"][STRANGER])


def test_another_row_leaves_everything_else_bit_for_bit() -> None:
    run, store, trainable = untrained.opened(**PLAIN)
    row = rows.spare_row(run, trainable)
    assert row == 1 + len(run.registry.queriers) == run.registry.rows - run.config.data.spare_rows
    vector = jnp.arange(32.0)
    changed = people.with_row(trainable, row, vector)
    table, before = changed["tower"]["rows"], trainable["tower"]["rows"]
    np.testing.assert_array_equal(table[row], vector)
    np.testing.assert_array_equal(np.delete(table, row, 0), np.delete(before, row, 0))
    for part in (changed, trainable):
        assert part["tower"].keys() == trainable["tower"].keys() and part.keys() == trainable.keys()
    rest = lambda tree: {**tree, "tower": {k: v for k, v in tree["tower"].items() if k != "rows"}}  # noqa: E731
    helpers.assert_trees_equal(rest(changed), rest(trainable))
    # So nobody else's replies change.
    known = run.examples(store, "dev", 6)[0]
    for a, b in zip(scores.reply_nll(run, changed, known), scores.reply_nll(run, trainable, known), strict=True):
        np.testing.assert_array_equal(a, b)


def test_what_cannot_be_fitted() -> None:
    run, store, trainable = untrained.opened(**PLAIN)
    with pytest.raises(UserError, match="found no dialogue that fits"):
        rows.fit_row(run, trainable, [])
    with pytest.raises(UserError, match="found row 17, expected one of the table's 17"):
        people.with_row(trainable, 17, jnp.zeros(32))
    full = dataclasses.replace(run, registry=dataclasses.replace(run.registry, spare=0))
    with pytest.raises(UserError, match="found no free row beside those of 12 queriers"):
        rows.spare_row(full, trainable)
    plain, _, values = untrained.opened(method="sft")
    calls = (
        lambda: rows.spare_row(plain, values),
        lambda: people.with_row(values, 1, jnp.zeros(32)),
        lambda: rows.fit_row(plain, values, some(run, store, "pip", 1)),
    )
    for call in calls:
        with pytest.raises(UserError, match="no querier rows in this run.*config.method=qar"):
            call()


def test_what_was_read_is_scored_under_any_row() -> None:
    run, store, trainable = untrained.opened(**PLAIN)
    examples, row = some(run, store, "pip", 7), rows.spare_row(run, trainable)
    known, vector = rows.read(run, trainable, examples), jnp.linspace(-1, 1, 32)
    asked = [dataclasses.replace(e, querier=row) for e in examples]
    sums, counts = scores.reply_nll(run, people.with_row(trainable, row, vector), asked)
    nats, tokens = rows.nll(known, vector)
    assert tokens == counts.sum()
    np.testing.assert_allclose(nats, sums.sum(), rtol=1e-5)


@pytest.mark.parametrize("tokens", [1, 200, 10**6])
def test_batches_hold_every_prediction_once_and_are_equal_in_shape(
    tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, store, _ = untrained.opened(**PLAIN)
    examples = some(run, store, "pip", 7)
    monkeypatch.setattr(rows, "TOKENS", tokens)
    batches = rows._batches(run, examples)
    assert len({b.inputs.tokens.shape for b in batches}) == len({b.target.shape for b in batches}) == 1
    length = batches[0].inputs.tokens.shape[1]
    assert length % rows.LENGTHS == 0 and max(map(len, examples)) <= length < max(map(len, examples)) + rows.LENGTHS
    found = sorted(int(t) for b in batches for t in np.asarray(b.target)[np.asarray(b.weight) > 0])
    assert found == sorted(int(t) for e in examples for t in e.tokens[e.predicted])
    assert len(batches) == 1 or batches[0].inputs.tokens.size <= max(tokens, length)
