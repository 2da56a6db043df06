"""Plain LoRA with querier rows at the input: starts as plain LoRA, knows who asks, learns the stranger's row."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import helpers
import jax
import numpy as np
import pytest
import untrained
from tiny import TINY, one_device, trained  # noqa: F401

from qaperso import run, train
from qaperso.data import load
from qaperso.data.store import Store
from qaperso.eval import scores

Tree = Any


def dev_nll(opened: run.Run, trainable: Tree, store: Store) -> np.ndarray:
    """NLL of each dev dialogue."""
    return scores.reply_nll(opened, trainable, opened.examples(store, "dev")[0])[0]


def test_rows_of_zeros_are_plain_lora() -> None:
    plain, store, trainable = untrained.opened(method="sft")
    rows, _, other = untrained.opened(method="sft_rows")
    zero = {"lora": trainable["lora"], "tower": jax.tree.map(np.zeros_like, other["tower"])}
    np.testing.assert_array_equal(dev_nll(rows, zero, store), dev_nll(plain, trainable, store))
    fresh = helpers.drawn(run.declare(rows)[0], 0)
    assert not fresh["tower"]["rows"].any() and not fresh["lora"]["q"]["b"].any()


def test_rows_are_all_it_knows_people_by() -> None:
    opened, store, trainable = untrained.opened(method="sft_rows")
    opened = untrained.changed(opened, data__names="masked")
    swapped = dataclasses.replace(store, row=store.row % len(store.registry.queriers) + 1)
    assert (swapped.row != store.row).all()
    assert (dev_nll(opened, trainable, swapped) != dev_nll(opened, trainable, store)).all()
    same = {**trainable, "tower": jax.tree.map(np.ones_like, trainable["tower"])}
    np.testing.assert_array_equal(dev_nll(opened, same, swapped), dev_nll(opened, same, store))


@pytest.mark.usefixtures("one_device")
def test_rows_of_queriers_and_of_the_stranger_are_learned(tmp_path: Path) -> None:
    trained(TINY, tmp_path / "run", "method=sft_rows", "qar.drop_row=0.5")
    opened = run.open_run(tmp_path / "run")
    rows = np.asarray(run.restore(opened, 8)[0]["tower"]["rows"])
    examples, _ = opened.examples(load.load_store(opened.config.data), "train")
    made = map(train.batch_maker(opened, examples), range(8))
    told = [b.inputs.querier[b.inputs.present] for b in made]
    assert np.flatnonzero(rows.any(1)).tolist() == np.unique(np.concatenate(told)).tolist()
    # The stranger among them; nobody has a spare row.
    assert rows[0].any()
    assert len(rows) == 1 + len(opened.registry.queriers) + opened.config.data.spare_rows
