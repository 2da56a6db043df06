"""Awareness of the querier: who is said to ask, and gaps of planted models whose knowledge is known."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence

import numpy as np
import pytest

from qaperso.data import features, synthetic
from qaperso.data.store import Store, make_store
from qaperso.errors import UserError
from qaperso.eval import awareness
from qaperso.eval.awareness import Asked
from qaperso.types import Dialogue, Turn

SEEDS = (0, 1)


def talk(name: str, querier: str, responder: str, split: str) -> Dialogue:
    turns = (
        Turn(querier, f"{querier} asks {name}"),
        Turn(responder, "well"),
        Turn(querier, "so?"),
        Turn(responder, name),
    )
    return Dialogue(name, responder, querier, turns, name, split=split)


def stored(dialogues: Sequence[Dialogue]) -> Store:
    return make_store(dialogues, np.zeros(len(dialogues), np.int32))


def small() -> list[Dialogue]:
    """Cy answers three in training; dee answers nobody but ann."""
    trained = [talk(f"t{q}", q, "cy", "train") for q in ("ann", "bo", "eve")] + [talk("d", "ann", "dee", "train")]
    asked = [talk(f"x{i}", q, "cy", "test") for i, q in enumerate(["ann", "bo", "eve", "new"] * 16)]
    return [*trained, *asked, talk("y", "ann", "dee", "test"), talk("z", "bo", "dee", "test")]


@functools.cache
def town() -> Store:
    return stored(synthetic.make_dialogues(synthetic.make_world(0, 6), 5))


def test_rename_changes_names_only() -> None:
    old = talk("x", "ann", "cy", "test")
    new = awareness.rename(old, "bo")
    assert new.querier == "bo" and [t.speaker for t in new.turns] == ["bo", "cy", "bo", "cy"]
    assert [t.text for t in new.turns] == [t.text for t in old.turns]
    assert dataclasses.replace(new, querier="ann", turns=old.turns) == old


def test_others_are_never_the_true_querier() -> None:
    dialogues = small()
    store = stored(dialogues)
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


def test_the_nearest_querier_has_the_most_similar_training_dialogues() -> None:
    def said(name: str, querier: str, query: str, reply: str, responder: str = "cy", split: str = "train") -> Dialogue:
        return Dialogue(name, responder, querier, (Turn(querier, query), Turn(responder, reply)), name, split=split)

    dialogues = [
        said("1", "ann", "bread please", "here is rye bread"),
        said("2", "ann", "good bye", "fair winds"),
        said("3", "bo", "bread please", "here is rye bread"),
        said("4", "eve", "any letters?", "no letters, fair winds"),
        # What is not in training, of another responder, or a name counts for nothing.
        said("5", "eve", "bread please good bye", "here is rye bread", split="test"),
        said("6", "eve", "bread please good bye", "here is rye bread", responder="dee"),
        said("7", "gus", "cy cy cy eve eve", "eve cy bo"),
        said("8", "hob", "ropes", "boats"),
    ]
    store = stored(dialogues)
    asked = {q: talk(q, q, "cy", "test") for q in ("ann", "bo", "eve", "gus", "hob", "new")}
    found = dict(zip(asked, awareness.nearest(store, list(asked.values())), strict=True))
    # Gus says nothing but names and hob what nobody else says: both are like all others, of whom ann is the first.
    assert found == {"ann": "bo", "bo": "ann", "eve": "ann", "gus": "ann", "hob": "ann", "new": None}
    assert awareness.nearest(store, [talk("x", "eve", "dee", "test"), talk("y", "ann", "dee", "test")]) == [None, None]
    silent = stored([said("1", "ann", "?", "!"), said("2", "bo", "?", "!")])
    assert awareness.nearest(silent, [talk("x", "bo", "cy", "test")]) == ["ann"]


def test_a_newcomer_is_named_in_no_name_or_text() -> None:
    dialogues = small()
    first = awareness.newcomer(stored(dialogues))
    assert first == awareness.newcomer(stored(dialogues[::-1])) and first.isalpha()
    heard = talk(f"is {first.upper()} here?", "ann", "cy", "dev")
    second = awareness.newcomer(stored([*dialogues, heard]))
    third = awareness.newcomer(stored([*dialogues, heard, talk("met", f"Old {second}", "cy", "dev")]))
    assert len({first, second, third}) == 3
    words = {w for d in town().dialogues for t in d.turns for w in features.words(f"{t.speaker} {t.text}")}
    assert awareness.newcomer(town()).lower() not in words


def test_conditions_change_row_and_name_and_leave_words() -> None:
    dialogues = small()
    store = stored(dialogues)
    indices = store.split("test")
    found = awareness.conditions(store, indices, True, 0)
    assert list(found) == ["true", *(part for parts in awareness.GAPS.values() for part in parts)]
    rowless = awareness.conditions(store, indices, False, 0)
    assert rowless == {name: column for name, column in found.items() if name not in ("row", "name")}
    nobody = awareness.newcomer(store)
    for k, i in enumerate(indices.tolist()):
        old, row = dialogues[i], int(store.row[i])
        told = {name: column[k] for name, column in found.items()}
        assert told["true"] == Asked(i, old, row)
        assert told["masked"] == Asked(i, awareness.rename(old, "stranger"), 0, masked=True)
        assert told["renamed"] == Asked(i, awareness.rename(old, nobody), row)
        swapped = [told[name] for name in awareness.GAPS["gap_random"]]
        if old.id == "y":  # dee answers nobody but ann
            assert not any(swapped) and told["nearest"] is told["row"] is told["name"] is None
            continue
        for other in swapped:
            name = other.dialogue.querier
            assert name != old.querier and other == Asked(i, awareness.rename(old, name), store.registry.row(name))
        assert told["row"] == Asked(i, old, swapped[0].row) and told["name"] == Asked(i, swapped[0].dialogue, row)
        known = (old.responder, old.querier) in {("cy", "ann"), ("cy", "bo"), ("cy", "eve")}
        assert (told["nearest"] is not None) == known
    assert [a and a.dialogue.querier for a in found["random_1"]] == awareness.others(
        store, [dialogues[i] for i in indices], 1
    )


def oracle(store: Store, believed: Callable[[Asked], str | None]) -> awareness.Score:
    """Every word costs a nat, but for one: it says who asks, and its probability follows from who is believed to."""
    n = len(store.registry.queriers)

    def score(asked: Sequence[Asked]) -> tuple[np.ndarray, np.ndarray]:
        counts = np.array([len(features.words(a.dialogue.reply)) for a in asked], float)
        told = [(believed(a), store.dialogues[a.index].querier) for a in asked]
        p = np.array([1 / n if b is None else 0.9 if b == truth else 0.1 / (n - 1) for b, truth in told])
        return counts - 1 - np.log(p), counts

    return score


def shares(store: Store) -> dict[str, float]:
    """Test replies a word of theirs, by querier: what turns nats a reply into nats a word."""
    words: dict[str, list[int]] = {}
    for i in store.split("test"):
        words.setdefault(store.dialogues[i].querier, []).append(len(features.words(store.dialogues[i].reply)))
    return {q: len(w) / sum(w) for q, w in words.items()}


def by_row(store: Store) -> Callable[[Asked], str | None]:
    return lambda a: store.registry.queriers[a.row - 1] if a.row else None


def by_name(store: Store) -> Callable[[Asked], str | None]:
    return lambda a: a.dialogue.querier if not a.masked and a.dialogue.querier in store.registry.queriers else None


def per_querier(found: awareness.Awareness, store: Store) -> dict[str, dict[str, float]]:
    """Each gap in nats per token of each querier of the test split who is compared."""
    who = np.array([store.dialogues[i].querier for i in store.split("test")])
    result = {}
    for name in (n for n in awareness.GAPS if n in found.scores):
        sums, counts = found.scores[name]
        names = sorted(set(who[counts > 0].tolist()))
        result[name] = {q: sums[who == q].sum() / counts[who == q].sum() for q in names}
    return result


@pytest.mark.parametrize("knows", ["row", "name"])
def test_an_oracle_has_the_gaps_known_in_closed_form(knows: str) -> None:
    store = town()
    n = len(store.registry.queriers)
    found = awareness.gaps(store, "test", oracle(store, {"row": by_row, "name": by_name}[knows](store)), rows=True)
    # Nats that a reply loses by a wrong belief, and by none.
    wrong, none = math.log(0.9 * (n - 1) / 0.1), math.log(0.9 * n)
    per_token = shares(store)
    lost = {"gap_random": wrong, "gap_nearest": wrong, "gap_masked": none}
    lost |= {"row": {"gap_renamed": 0, "gap_row": wrong, "gap_name": 0}}.get(knows, {})
    lost |= {"name": {"gap_renamed": none, "gap_row": 0, "gap_name": wrong}}.get(knows, {})
    assert set(found.metrics) == {*lost, "reply_nll", "swap_gap", "compared"} and not found.absent
    for name, nats in lost.items():
        metric = found.metrics[name]
        assert per_querier(found, store)[name] == pytest.approx(
            {q: nats * share for q, share in per_token.items()}, rel=1e-9
        )
        assert metric["value"] == pytest.approx(nats * np.mean(list(per_token.values())), rel=1e-9)
        assert metric["n"] == n
        if nats:
            assert 0 < metric["low"] < metric["value"] < metric["high"]
        else:
            assert metric["value"] == metric["low"] == metric["high"] == 0
    test = [store.dialogues[i] for i in store.split("test")]
    total = sum(len(features.words(d.reply)) for d in test)
    assert found.metrics["swap_gap"]["value"] == pytest.approx(wrong * len(test) / total, rel=1e-9)
    nll = 1 - len(test) * (1 + math.log(0.9)) / total
    assert found.metrics["reply_nll"]["value"] == pytest.approx(nll, rel=1e-9)
    assert found.metrics["compared"] == {"value": 1.0, "low": 1.0, "high": 1.0, "n": len(test)}
    assert set(found.scores) == set(found.metrics) - {"compared"}
    np.testing.assert_allclose(found.scores["gap_masked"][0], np.full(len(test), none), rtol=1e-9)
    np.testing.assert_array_equal(found.scores["gap_row"][1], [len(features.words(d.reply)) for d in test])


def test_a_model_that_does_not_know_who_asks_has_no_gap() -> None:
    store = town()

    def blind(asked: Sequence[Asked]) -> tuple[np.ndarray, np.ndarray]:
        counts = np.array([len(features.words(a.dialogue.reply)) for a in asked], float)
        return np.sqrt(counts) * [1 + a.index % 7 for a in asked], counts

    found = awareness.gaps(store, "test", blind, rows=True)
    for name in ("swap_gap", *awareness.GAPS):
        metric = found.metrics[name]
        assert metric["value"] == metric["low"] == metric["high"] == 0, name


@pytest.mark.parametrize("seed", SEEDS)
def test_a_model_that_knows_nothing_has_gaps_whose_intervals_hold_0(seed: int) -> None:
    store = town()
    rng = np.random.default_rng(seed)

    def noisy(asked: Sequence[Asked]) -> tuple[np.ndarray, np.ndarray]:
        counts = np.array([len(features.words(a.dialogue.reply)) for a in asked], float)
        return counts + rng.normal(0, 2, len(asked)), counts

    found = awareness.gaps(store, "test", noisy, rows=True, seed=seed, level=0.999).metrics
    for name in awareness.GAPS:
        assert found[name]["low"] < 0 < found[name]["high"], name
        # The intervals are narrow beside the gap of an oracle.
        assert found[name]["high"] - found[name]["low"] < math.log(0.9 * 5 / 0.1) * min(shares(store).values()), name


def test_who_is_only_told_apart_by_kind_is_not_told_from_the_nearest() -> None:
    store = town()
    kind = {p.name: p.register for p in synthetic.make_world(0, 6).people}
    three = dataclasses.replace(store, registry=dataclasses.replace(store.registry, queriers=("a", "b", "c")))
    truth = dataclasses.replace(
        three, dialogues=tuple(dataclasses.replace(d, querier=kind[d.querier]) for d in store.dialogues)
    )
    told = by_name(store)
    score = oracle(truth, lambda a: kind.get(told(a) or ""))
    found = awareness.gaps(store, "test", score, rows=False)
    # The replies of one register are alike, so the nearest has the same; of five others four have another one.
    assert found.metrics["gap_nearest"]["value"] == 0
    nats = found.metrics["gap_random"]["value"] / np.mean(list(shares(store).values()))
    assert nats == pytest.approx(math.log(0.9 * 2 / 0.1) * 4 / 5, rel=0.1)
    assert set(found.absent) == {"gap_row", "gap_name"}
    assert "no querier rows" in found.absent["gap_row"]


def test_replies_that_do_not_fit_under_all_names_are_not_compared() -> None:
    store = town()
    known = oracle(store, by_name(store))
    long = {"harald", "roscoe"}

    def score(asked: Sequence[Asked]) -> tuple[np.ndarray, np.ndarray]:
        fits = np.array([a.dialogue.querier not in long for a in asked])
        return tuple(x * fits for x in known(asked))

    found = awareness.gaps(store, "test", score, rows=True)
    columns = awareness.conditions(store, store.split("test"), True, 0)
    told = [{a.dialogue.querier for a in column} for column in zip(*columns.values(), strict=True)]
    true = [a.dialogue.querier for a in columns["true"]]
    scored = [q not in long for q in true]
    compared = [not names & long for names in told]
    assert 0 < sum(compared) < sum(scored) < len(told)
    assert found.metrics["compared"]["value"] == pytest.approx(sum(compared) / sum(scored))
    assert found.metrics["reply_nll"]["n"] == found.metrics["compared"]["n"] == sum(scored)
    first = [a.dialogue.querier not in long for a in columns["random_0"]]
    assert sum(compared) < found.metrics["swap_gap"]["n"] == sum(a and b for a, b in zip(first, scored, strict=True))
    left = {q for q, keep in zip(true, compared, strict=True) if keep}
    for name in awareness.GAPS:
        assert set(per_querier(found, store)[name]) == left and found.metrics[name]["n"] == len(left)
    # What is compared is compared as ever; the rest counts for nothing.
    everybody = awareness.gaps(store, "test", known, rows=True).scores
    for name in awareness.GAPS:
        for ours, all_of_them in zip(found.scores[name], everybody[name], strict=True):
            np.testing.assert_array_equal(ours, all_of_them * compared)


def unknowing(asked: Sequence[Asked]) -> tuple[np.ndarray, np.ndarray]:
    """Two tokens a reply, each of a nat and a bit more under a name that is hidden."""
    return np.array([2.5 if a.masked else 2.0 for a in asked]), np.full(len(asked), 2.0)


def test_a_single_querier_can_be_hidden_but_not_swapped() -> None:
    names = ["train", "train", "test", "test"]
    store = stored([talk(str(i), "ann", "cy", split) for i, split in enumerate(names)])
    found = awareness.gaps(store, "test", unknowing, rows=True)
    assert set(found.metrics) == {"reply_nll", "gap_masked", "gap_renamed", "compared"}
    assert found.metrics["gap_masked"]["value"] == 0.25 and found.metrics["gap_masked"]["n"] == 1
    assert per_querier(found, store) == {"gap_masked": {"ann": 0.25}, "gap_renamed": {"ann": 0.0}}
    assert set(found.absent) == {"swap_gap", *awareness.SWAPS}
    assert all("answers both its querier and another one in training" in why for why in found.absent.values())


def test_queriers_whom_training_never_met_have_no_nearest() -> None:
    dialogues = [talk(q, q, "cy", "train") for q in ("ann", "bo")] + [talk(q, q, "cy", "unseen") for q in ("x", "y")]
    found = awareness.gaps(stored(dialogues), "unseen", unknowing, rows=False)
    assert set(found.metrics) == {"reply_nll", "swap_gap", "gap_masked", "gap_renamed", "compared"}
    assert found.metrics["gap_masked"]["n"] == 2 and set(found.absent) == set(awareness.SWAPS)


def test_one_test_dialogue_has_gaps_without_intervals() -> None:
    dialogues = [talk(q, q, "cy", "train") for q in ("ann", "bo")]
    found = awareness.gaps(stored([*dialogues, talk("x", "ann", "cy", "test")]), "test", unknowing, rows=False)
    gap = found.metrics["gap_masked"]
    assert (gap["value"], gap["n"]) == (0.25, 1) and math.isnan(gap["low"]) and math.isnan(gap["high"])
    # Beside another querier's five, the one dialogue has as much weight as they have.
    more = [talk(f"x{i}", "bo", "cy", "test") for i in range(5)]

    def score(asked: Sequence[Asked]) -> tuple[np.ndarray, np.ndarray]:
        hidden = {2: 4.0}
        return np.array([hidden.get(a.index, 2.0) if a.masked else 2.0 for a in asked]), np.full(len(asked), 2.0)

    store = stored([*dialogues, talk("x", "ann", "cy", "test"), *more])
    found = awareness.gaps(store, "test", score, rows=False)
    assert per_querier(found, store)["gap_masked"] == {"ann": 1.0, "bo": 0.0}
    assert found.metrics["gap_masked"]["value"] == 0.5 and found.metrics["gap_masked"]["n"] == 2


def test_nothing_to_score_is_one_clear_error() -> None:
    store = stored(small())
    with pytest.raises(UserError, match="the unseen split of the data has no dialogue to score; .*: test, train"):
        awareness.gaps(store, "unseen", unknowing, rows=False)
    with pytest.raises(UserError, match="no reply of the test split fits batch.length"):
        awareness.gaps(store, "test", lambda asked: (np.zeros(len(asked)), np.zeros(len(asked))), rows=False)


def test_a_reply_that_fits_under_its_true_name_only_is_not_compared() -> None:
    store = stored([d for d in small() if d.responder == "cy" and d.querier != "new"])

    def score(asked: Sequence[Asked]) -> tuple[np.ndarray, np.ndarray]:
        counts = np.array([2.0 * (a.dialogue == store.dialogues[a.index]) for a in asked])
        return counts, counts

    found = awareness.gaps(store, "test", score, rows=False)
    assert set(found.metrics) == {"reply_nll"} and per_querier(found, store) == {}
    assert "fits batch.length under all names" in found.absent["swap_gap"]
    assert "fits batch.length under all names" in found.absent["gap_masked"]
