"""Awareness of runs: their likelihoods under other names and rows, and gaps that follow from what a run is given."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import untrained

from qaperso.data.batches import make_examples
from qaperso.data.store import Store
from qaperso.eval import awareness, measure, scores
from qaperso.run import Run
from qaperso.types import Turn

Tree = Any


def opened(**changes: Any) -> tuple[Run, Store, Tree]:
    """A tiny run and what three of the town ask it."""
    run, store, trainable = untrained.opened(**changes)
    return run, untrained.of_queriers(store, "tilda", "harald", "agnes"), trainable


def knowing() -> tuple[Run, Store, Tree]:
    """A run with names masked and rows that know."""
    run, store, trainable = opened(method="qar", qar__contrast="none")
    # Each row points where the words lie that this querier is addressed with, and the specific tower adds nothing.
    embed = np.asarray(run.base["embed"])
    rows = np.zeros(trainable["tower"]["rows"].shape, np.float32)
    address = {d.querier: d.fields["address"] for d in store.dialogues}
    for name, words in address.items():
        tokens = run.tokenizer.encode(words, add_special_tokens=False)
        rows[store.registry.row(name)] = 100 * embed[tokens].sum(0)
    tower = {**trainable["tower"], "rows": jnp.asarray(rows), "alpha": jnp.full_like(trainable["tower"]["alpha"], 0.3)}
    return untrained.changed(run, data__names="masked"), store, {**trainable, "tower": tower}


def test_the_likelihoods_are_those_of_renamed_dialogues() -> None:
    run, store, trainable = opened(method="qar", qar__contrast="none")
    indices = store.split("dev")[:12]
    columns = awareness.conditions(store, indices, True, 0)
    asked = [a for column in columns.values() for a in column]
    sums, counts = awareness.likelihoods(run, trainable, store)(asked)
    masked = untrained.changed(run, data__names="masked")
    by_name = {}
    for number, (name, column) in enumerate(columns.items()):
        mine = slice(number * len(indices), (number + 1) * len(indices))
        told = list(store.dialogues)
        row = store.row.copy()
        for a in column:
            told[a.index], row[a.index] = a.dialogue, a.row
        said = dataclasses.replace(store, dialogues=tuple(told), row=row)
        teller = masked if name == "masked" else run
        examples = make_examples(said, [teller.encode(told[i]) for i in indices], indices)
        expected, number_of_tokens = scores.reply_nll(run, trainable, examples)
        np.testing.assert_allclose(sums[mine], expected, rtol=1e-5)
        np.testing.assert_array_equal(counts[mine], number_of_tokens)
        by_name[name] = sums[mine]
    # Names and rows both tell this run something.
    for name in set(columns) - {"true"}:
        assert np.abs(by_name[name] - by_name["true"]).max() > 1e-3, name


def test_only_what_is_read_is_scored_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    run, store, _ = opened(method="sft")
    seen = []

    def reply_nll(run: Run, trainable: Tree, examples: list) -> tuple[np.ndarray, np.ndarray]:
        seen.append(len(examples))
        return np.arange(len(examples)) + 1.0, np.ones(len(examples))

    monkeypatch.setattr(awareness, "reply_nll", reply_nll)
    indices = store.split("dev")[:9]
    asked = [a for column in awareness.conditions(store, indices, False, 0).values() for a in column]
    for names, rows in (("visible", False), ("masked", False), ("masked", True)):
        monkeypatch.setattr(awareness, "has_rows", lambda *_, rows=rows: rows)
        told = untrained.changed(run, data__names=names)
        sums, counts = awareness.likelihoods(told, {}, store)(asked)
        shown = ((a.index, "" if names == "masked" or a.masked else a.dialogue.querier, a.row * rows) for a in asked)
        distinct = set(shown)
        assert seen.pop() == len(distinct)
        assert len(set(sums.tolist())) == len(distinct) and (counts == 1).all()


def test_a_run_blind_to_names_and_rows_has_no_gap(tmp_path: Path) -> None:
    run, store, trainable = opened(method="sft")
    assert not awareness.has_rows(run, trainable)
    blind = untrained.changed(run, data__names="masked")

    def measured(every: bool) -> measure.Measured:
        wanted = measure.Wanted(replies=0, awareness=every)
        return measure.measure(blind, trainable, store, "dev", 1, wanted, tmp_path / "replies.jsonl")

    whole = measured(True)
    found = whole.metrics
    count = len(store.split("dev"))
    assert found["swap_gap"] == {"value": 0.0, "low": 0.0, "high": 0.0, "n": count}
    for name in ("gap_random", "gap_nearest", "gap_masked", "gap_renamed"):
        assert found[name] == {"value": 0.0, "low": 0.0, "high": 0.0, "n": 3}
    nll = found["reply_nll"]
    assert 0 < nll["low"] < nll["value"] < nll["high"] and nll["n"] == count
    # What such a run cannot be measured by is said.
    assert not {"gap_row", "gap_name", "retrieval_top1"} & set(found)
    assert "No gap_row: the method has no querier rows." in whole.notes
    assert any(note.startswith("No retrieval_top1: the run was trained without contrast") for note in whole.notes)
    # By default two conditions are scored, with the same result.
    few = measured(False)
    assert set(few.metrics) == {"reply_nll", "perplexity", "swap_gap"} and not few.notes
    assert all(few.metrics[name] == found[name] for name in few.metrics)


def test_a_run_that_knows_its_queriers_has_a_gap() -> None:
    run, store, knows = knowing()
    assert awareness.has_rows(run, knows)
    found = awareness.measure(run, knows, store, "dev").metrics
    for name in ("swap_gap", "gap_random", "gap_nearest", "gap_masked", "gap_row"):
        assert found[name]["low"] > 0.01, name
    # Names are masked: rows are all that it knows people by.
    for name in ("gap_name", "gap_renamed"):
        assert found[name]["value"] == found[name]["low"] == found[name]["high"] == 0
    deaf = {**knows, "tower": {**knows["tower"], "alpha": jnp.zeros_like(knows["tower"]["alpha"])}}
    # Rows that do nothing change nothing but the rounding of sums, as dialogues stand in other rows of a batch.
    assert awareness.measure(run, deaf, store, "dev").metrics["gap_row"]["value"] == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("compat", ["", "paper"])
def test_masked_names_are_told_by_no_token(compat: str) -> None:
    changes = {"compat": compat, "qar__contrast": "prototypes", "batch__dialogues": 1} if compat else {}
    run, store, _ = opened(method="qar", **changes or {"qar__contrast": "none"})
    old = store.dialogues[store.split("dev")[0]]
    turns = tuple(dataclasses.replace(t, speaker={"maren": "ann"}.get(t.speaker, "bo")) for t in old.turns)
    new = dataclasses.replace(old, turns=turns, querier="bo", responder="ann")
    for names, equal in (("masked", True), ("visible", False)):
        encode = awareness.encoder(run, names)
        (a,), (b,) = encode(old), encode(new)
        assert np.array_equal(a.tokens, b.tokens) == equal
        assert np.array_equal(a.role, b.role) and a.predicted.sum() == b.predicted.sum()
    shown = run.tokenizer.decode(awareness.encoder(run, "masked")(old)[0].tokens)
    assert "user" in shown and "assistant" in shown and old.querier not in shown
    # The run's own names stay as they were.
    assert run.config.data.names == "visible" and old.turns[-1] == Turn("maren", old.reply)
