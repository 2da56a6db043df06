"""Unseen queriers: what is given is never scored, and the instrument finds the gain that was planted."""

from __future__ import annotations

import dataclasses
from typing import Any

import hypothesis
import hypothesis.strategies as st
import jax.numpy as jnp
import numpy as np
import pytest
import untrained

from qaperso.data.store import Store, make_store
from qaperso.errors import UserError
from qaperso.eval import report, unseen
from qaperso.run import Run
from qaperso.types import Dialogue, Turn

Tree = Any


def talk(querier: str, group: str, name: int) -> Dialogue:
    turns = (Turn(querier, "well?"), Turn("cy", f"well, {name}"))
    return Dialogue(f"{querier} {name}", "cy", querier, turns, group, split="unseen")


def people(**sizes: int) -> list[Dialogue]:
    """Each querier's dialogues, two in each group."""
    return [talk(name, f"{name} {i // 2}", i) for name, size in sizes.items() for i in range(size)]


@hypothesis.settings(deadline=None, max_examples=60)
@hypothesis.given(groups=st.lists(st.sampled_from("abcdefgh"), min_size=1, max_size=40), seed=st.integers(0, 99))
def test_what_is_given_shares_no_group_with_what_is_scored(groups: list[str], seed: int) -> None:
    dialogues = [talk("ann", group, i) for i, group in enumerate(groups)]
    pool, rest = unseen.divide(dialogues, unseen.GIVEN, seed)
    assert len(pool) in unseen.GIVEN and rest and len(set(pool + rest)) == len(pool) + len(rest)
    touched = {groups[i] for i in pool}
    assert {i for i in range(len(groups)) if groups[i] not in touched} == set(rest)
    # Only whole groups are between the first and the last one given.
    assert sum(any(i not in pool for i in range(len(groups)) if groups[i] == g) for g in touched) <= 1
    assert unseen.divide(dialogues, unseen.GIVEN, seed) == (pool, rest)


def test_how_many_are_given() -> None:
    sizes = {1: 0, 2: 0, 3: 1, 6: 1, 7: 5, 19: 5, 22: 20, 23: 20}
    found = {n: unseen.divide(people(ann=n), unseen.GIVEN, 0) for n in sizes}
    assert {n: len(pool) for n, (pool, _) in found.items()} == sizes
    drawn = {tuple(unseen.divide(people(ann=30), unseen.GIVEN, seed)[0]) for seed in range(8)}
    assert len(drawn) == 8


def planted(dialogues: list[Dialogue], gain: dict[int, float]) -> tuple[dict[str, Any], list[tuple[str, ...]]]:
    """Metrics of a model that loses `gain[n]` nats a token by n dialogues, and what its fits were given."""
    noise = np.random.default_rng(0).normal(0, 1, len(dialogues))
    counts = np.random.default_rng(1).integers(1, 9, len(dialogues)).astype(float)
    fits: list[tuple[str, ...]] = []
    groups: dict[Any, set[str]] = {None: set()}

    def fit(numbers: Any) -> int:
        assert len({dialogues[i].querier for i in numbers}) == 1
        fits.append(tuple(dialogues[i].id for i in numbers))
        groups[len(numbers)] = {dialogues[i].group for i in numbers}
        return len(numbers)

    def score(row: Any, numbers: Any) -> tuple[np.ndarray, np.ndarray]:
        assert not groups[row] & {dialogues[i].group for i in numbers}
        return counts[numbers] * (3 + noise[numbers] - (gain[row] if row else 0)), counts[numbers]

    return unseen.learning(dialogues, fit, score), fits


def querier_of(ids: tuple[str, ...]) -> str:
    return ids[0].split()[0]


def test_a_planted_gain_is_found_and_none_where_there_is_none() -> None:
    dialogues = people(ann=40, bo=30, cleo=12, dee=2)
    metrics, fits = planted(dialogues, {1: 0.25, 5: 0.5, 20: 1.0})
    for n, gain in {1: 0.25, 5: 0.5, 20: 1.0}.items():
        found = metrics[f"unseen_gain_{n}"]
        np.testing.assert_allclose([found["low"], found["value"], found["high"]], gain, rtol=1e-9)
    assert {n: metrics[f"unseen_nll_{n}"]["n"] for n in unseen.GIVEN} == {0: 4, 1: 3, 5: 3, 20: 2}
    left = {n: metrics[f"unseen_left_out_{n}"] for n in (1, 5, 20)}
    assert {n: m["value"] for n, m in left.items()} == {1: 1, 5: 1, 20: 2} and left[20]["n"] == 4
    assert metrics["unseen_nll_0"]["low"] < 3 < metrics["unseen_nll_0"]["high"]
    # Of one querier the smaller sets are in the larger ones.
    assert sorted(map(len, fits)) == [1, 1, 1, 5, 5, 5, 20, 20]
    for few in fits:
        larger = [many for many in fits if querier_of(many) == querier_of(few) and len(many) >= len(few)]
        assert all(many[: len(few)] == few for many in larger)
    deaf, _ = planted(dialogues, dict.fromkeys((1, 5, 20), 0.0))
    assert all(deaf[f"unseen_gain_{n}"] | {"n": 0} == dict(value=0, low=0, high=0, n=0) for n in (1, 5, 20))
    report.table("unseen", {"run": metrics})


def held_out(run: Run, store: Store, names: tuple[str, ...]) -> tuple[Run, Store]:
    """The run and its data with some queriers held out of training; the table keeps its size."""
    dialogues = [dataclasses.replace(d, split="unseen") if d.querier in names else d for d in store.dialogues]
    again = make_store(dialogues, store.cluster, store.registry.spare + len(names))
    return dataclasses.replace(run, registry=again.registry), again


def test_a_run_learns_somebody_new() -> None:
    run, store, trainable = untrained.opened(method="qar", qar__contrast="none")
    run, store = held_out(run, store, ("tilda", "voss"))
    # Rows point where the words lie that their people are addressed with; the stranger's and the spare ones nowhere.
    embed, rows = np.asarray(run.base["embed"]), np.zeros(trainable["tower"]["rows"].shape, np.float32)
    for name, words in {d.querier: d.fields["address"] for d in store.dialogues}.items():
        if name in run.registry.queriers:
            tokens = run.tokenizer.encode(words, add_special_tokens=False)
            rows[run.registry.row(name)] = 100 * embed[tokens].sum(0)
    alpha = jnp.full_like(trainable["tower"]["alpha"], 0.3)
    knows = {**trainable, "tower": {**trainable["tower"], "rows": jnp.asarray(rows), "alpha": alpha}}
    found = unseen.unseen_queriers(run, knows, store, given=(0, 5))
    assert found["unseen_gain_5"]["low"] > 0.01 and found["unseen_left_out_5"]["value"] == 0
    assert found["unseen_nll_0"]["n"] == found["unseen_nll_5"]["n"] == 2
    # The same people under the stranger's row are what n = 0 says: nothing was fitted on them.
    deaf = {**knows, "tower": {**knows["tower"], "alpha": jnp.zeros_like(alpha)}}
    assert unseen.unseen_queriers(run, deaf, store, given=(0, 1))["unseen_gain_1"]["value"] == 0


def test_nobody_unseen_and_no_rows() -> None:
    run, store, trainable = untrained.opened(method="qar", qar__contrast="none")
    with pytest.raises(UserError, match="no dialogue in the unseen split.*--unseen SHARE"):
        unseen.unseen_queriers(run, trainable, store)
    plain, same, values = untrained.opened(method="sft")
    with pytest.raises(UserError, match="no querier rows"):
        unseen.unseen_queriers(plain, values, same)
