"""Scores of single dialogues as an evaluation collects them, and data on which some cannot be had."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import untrained

from qaperso.data.store import Store, make_store
from qaperso.eval import awareness, compare, gather, measure, page
from qaperso.run import Run

Tree = Any


def likelihoods(run: Run, trainable: Tree, store: Store) -> tuple[compare.Items, dict[str, str]]:
    """Items of the dev split, and what is absent."""
    found = awareness.measure(run, trainable, store, "dev", every=False)
    return measure.items_of(run, store, "dev", found.scores), found.absent


@pytest.fixture(scope="module")
def blind() -> tuple[Run, Store, Tree]:
    run, store, trainable = untrained.opened(method="sft")
    return untrained.changed(run, data__names="masked"), store, trainable


def test_likelihoods_of_every_dialogue(blind: tuple[Run, Store, Tree]) -> None:
    run, store, trainable = blind
    items, absent = likelihoods(run, trainable, store)
    places = store.split("dev")
    assert items.ids == tuple(store.dialogues[i].id for i in places)
    assert (items.queriers[3], items.groups[3]) == (
        store.dialogues[places[3]].querier,
        store.dialogues[places[3]].group,
    )
    sums, counts = items.scores["reply_nll"]
    assert (counts > 0).all() and (sums > 0).all()
    # A run that is told neither name nor row cannot know who asks.
    np.testing.assert_array_equal(items.scores["swap_gap"], [0 * counts, counts])
    seeing, _ = likelihoods(untrained.changed(run, data__names="visible"), trainable, store)
    gap, number = seeing.scores["swap_gap"]
    assert (gap != 0).mean() > 0.9 and (number == counts).all() and seeing.vocabulary == items.vocabulary
    assert measure.what_is_missing(items, absent) == []


def test_a_single_querier_is_scored_without_a_swap(blind: tuple[Run, Store, Tree]) -> None:
    run, store, trainable = blind
    name = store.registry.queriers[0]
    own = [d for d in store.dialogues if d.querier == name]
    alone = make_store(own, np.zeros(len(own), np.int32))
    items, absent = likelihoods(run, trainable, alone)
    assert list(items.scores) == ["reply_nll"] and set(items.queriers) == {name}
    (note,) = measure.what_is_missing(items, absent)
    assert note == f"No swap_gap: {absent['swap_gap']}." and "answers both its querier and another one" in note
    found = gather.report(run, trainable, alone, "dev", 1, items, [], None)
    assert not found.swap and not found.maps and found.lengths is None and len(found.failures) == 1
    assert not gather.asked_by_others(run, alone, "dev").dialogues
    assert '<section id="swap">' not in page.render(found)


def test_who_gets_replies(blind: tuple[Run, Store, Tree]) -> None:
    run, store, trainable = blind
    items, absent = likelihoods(run, trainable, store)
    places = store.split("dev").tolist()
    assert measure.answerable(run, store, "dev", items, None) == places
    assert measure.answerable(run, store, "dev", items, len(places) + 5) == places
    assert measure.answerable(run, store, "dev", items, 2) == [places[0], places[-1]]
    assert measure.answerable(run, store, "dev", items, 0) == []
    # Not those without a score of their own, since they do not fit a row.
    items.scores["reply_nll"][1][0] = 0
    assert measure.answerable(run, store, "dev", items, None) == places[1:]
    assert measure.what_is_missing(items, absent) == [
        f"1 of {len(places)} dialogues do not fit batch.length and are not scored."
    ]


def test_scores_of_replies_stand_at_their_dialogues(blind: tuple[Run, Store, Tree]) -> None:
    run, store, trainable = blind
    dialogues = [store.dialogues[i] for i in store.split("test")]
    ids = tuple(d.id for d in dialogues)
    items = compare.Items(ids, ids, ids, {}, "")
    chosen = dialogues[::-3]
    half = len(chosen) // 2
    texts = [d.reply if n < half else "" for n, d in enumerate(chosen)]
    found = measure.reply_scores(run, chosen, items, texts)
    right = {d.id for d in chosen[:half]}
    for name in ("exact", "address", "register", "rouge_1", "rouge_l"):
        sums, counts = found[name]
        assert {i for i, n in zip(ids, counts, strict=True) if n} == {d.id for d in chosen}
        assert {i for i, x in zip(ids, sums, strict=True) if x == 1} == right and sums.sum() == half
    empty, _ = found["empty_replies"]
    assert empty.sum() == len(chosen) - half
    needed = [bool(d.fields["facts"]) for d in dialogues]
    held_out = [d.fields["held_out"] for d in dialogues]
    asked = np.isin(ids, [d.id for d in chosen])
    np.testing.assert_array_equal(found["fact"][1] > 0, asked & needed)
    np.testing.assert_array_equal(found["exact_heldout"][1] > 0, asked & held_out)
    whole = compare.Items(ids, ids, ids, {"reply_nll": (np.ones(len(ids)), np.ones(len(ids))), **found}, "")
    notes = measure.what_is_missing(whole, {})
    assert notes[-1] == f"{len(chosen) - half} of {len(chosen)} replies hold no text."
    chance = measure.town_chance(run, chosen)
    assert chance["exact_chance"] == pytest.approx({"value": 1 / 12, "low": 1 / 12, "high": 1 / 12, "n": len(chosen)})
