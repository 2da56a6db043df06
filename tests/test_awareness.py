"""Awareness of the querier: swaps change who asks and nothing else, and only a model that knows loses by them."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import untrained

from qaperso.data.store import make_store
from qaperso.errors import UserError
from qaperso.eval import awareness
from qaperso.types import Dialogue, Turn

Tree = Any


def talk(name: str, querier: str, responder: str, split: str) -> Dialogue:
    turns = (
        Turn(querier, f"{querier} asks {name}"),
        Turn(responder, "well"),
        Turn(querier, "so?"),
        Turn(responder, name),
    )
    return Dialogue(name, responder, querier, turns, name, split=split)


def small() -> list[Dialogue]:
    """Cy answers three in training; dee answers nobody but ann."""
    trained = [talk(f"t{q}", q, "cy", "train") for q in ("ann", "bo", "eve")] + [talk("d", "ann", "dee", "train")]
    asked = [talk(f"x{i}", q, "cy", "test") for i, q in enumerate(["ann", "bo", "eve", "new"] * 16)]
    return [*trained, *asked, talk("y", "ann", "dee", "test"), talk("z", "bo", "dee", "test")]


def test_rename_changes_names_only() -> None:
    old = talk("x", "ann", "cy", "test")
    new = awareness.rename(old, "bo")
    assert new.querier == "bo" and [t.speaker for t in new.turns] == ["bo", "cy", "bo", "cy"]
    assert [t.text for t in new.turns] == [t.text for t in old.turns]
    assert dataclasses.replace(new, querier="ann", turns=old.turns) == old


def test_others_are_never_the_true_querier() -> None:
    dialogues = small()
    store = make_store(dialogues, np.zeros(len(dialogues), np.int32))
    test = [d for d in dialogues if d.split == "test"]
    found = awareness.others(store, test, 0)
    assert found == awareness.others(store, test, 0) != awareness.others(store, test, 1)
    chosen: dict[str, set] = {}
    for d, name in zip(test, found, strict=True):
        chosen.setdefault(f"{d.responder} {d.querier}", set()).add(name)
    assert chosen == {
        "cy ann": {"bo", "eve"},
        "cy bo": {"ann", "eve"},
        "cy eve": {"ann", "bo"},
        "cy new": {"ann", "bo", "eve"},  # somebody unknown may become anybody known
        "dee ann": {None},
        "dee bo": {"ann"},
    }


def test_swap_changes_row_and_name_and_leaves_words() -> None:
    dialogues = small()
    store = make_store(dialogues, np.arange(len(dialogues), dtype=np.int32) % 2)
    before = store.row.copy()
    swapped = awareness.swap(store, "test", 0)
    np.testing.assert_array_equal(store.row, before)  # the store itself stays
    alone = dialogues.index(next(d for d in dialogues if d.id == "y"))
    for i, (old, new) in enumerate(zip(dialogues, swapped.dialogues, strict=True)):
        if old.split == "train":
            assert new == old and swapped.row[i] == before[i]
        elif i == alone:
            assert new == dataclasses.replace(old, split="alone") and swapped.row[i] == before[i]
        else:
            assert new == awareness.rename(old, new.querier) and new.querier != old.querier
            assert swapped.row[i] == store.registry.row(new.querier) != before[i]
    assert alone not in swapped.split("test") and len(swapped.split("test")) == len(store.split("test")) - 1
    np.testing.assert_array_equal(swapped.cluster, store.cluster)


def test_nobody_to_swap_with() -> None:
    dialogues = [talk("a", "ann", "cy", "train"), talk("b", "ann", "cy", "dev")]
    store = make_store(dialogues, np.zeros(2, np.int32))
    with pytest.raises(UserError, match="dev split answers two queriers in training"):
        awareness.swap(store, "dev", 0)


def test_a_run_blind_to_names_and_rows_has_no_gap() -> None:
    run, store, trainable = untrained.opened(method="sft")
    blind = untrained.changed(run, data__names="masked")
    found = awareness.swap_gap(blind, trainable, store, "dev")
    assert found["swap_gap"] == {"value": 0.0, "low": 0.0, "high": 0.0, "n": len(store.split("dev"))}
    nll = found["reply_nll"]
    assert 0 < nll["low"] < nll["value"] < nll["high"]
    # The names in the text are all that such a run can know people by.
    assert awareness.swap_gap(run, trainable, store, "dev")["swap_gap"]["value"] != 0


def test_a_run_that_knows_its_queriers_has_a_gap() -> None:
    run, store, trainable = untrained.opened(method="qar", qar__contrast="none")
    run = untrained.changed(run, data__names="masked")
    # Each row points where the words lie that this querier is addressed with, and the specific tower adds nothing.
    embed = np.asarray(run.base["embed"])
    rows = np.zeros(trainable["tower"]["rows"].shape, np.float32)
    address = {d.querier: d.fields["address"] for d in store.dialogues}
    for name, words in address.items():
        tokens = run.tokenizer.encode(words, add_special_tokens=False)
        rows[store.registry.row(name)] = 100 * embed[tokens].sum(0)
    tower = {**trainable["tower"], "rows": jnp.asarray(rows), "alpha": jnp.full_like(trainable["tower"]["alpha"], 0.3)}
    knows = {**trainable, "tower": tower}
    found = awareness.swap_gap(run, knows, store, "dev")
    assert found["swap_gap"]["low"] > 0.01
    deaf = {**trainable, "tower": {**tower, "alpha": jnp.zeros_like(tower["alpha"])}}
    assert awareness.swap_gap(run, deaf, store, "dev")["swap_gap"]["value"] == 0
