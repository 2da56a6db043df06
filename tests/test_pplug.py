"""PPlug as a method: what it learns, what it looks at, and that training, scoring and replying see the same soft tokens."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import untrained
from test_encoder import folder  # noqa: F401

from qaperso import arrays, batching, generate, methods, reply, rows
from qaperso import config as configs
from qaperso import run as runs
from qaperso.batching import Batcher
from qaperso.data.batches import columns_of, make_batch
from qaperso.data.history import Item, items
from qaperso.data.store import Store, make_store
from qaperso.data.text import Encoded
from qaperso.data.vectors import Rows
from qaperso.errors import UserError
from qaperso.eval import awareness, scores
from qaperso.generate import Sampling
from qaperso.methods import base, pplug
from qaperso.models import decoder, towers
from qaperso.people import Person
from qaperso.run import Run
from qaperso.types import STRANGER, Dialogue, Example, Inputs, Turn

Tree = Any
PLUG = dict(pplug__encoder="base", pplug__history=8, pplug__query=12, pplug__tokens=2, pplug__temperature=0.2)
LEAVES = {
    "plug/encoder/table",
    "plug/instruction",
    *(f"plug/{m}/{x}" for m in ("mlp", "instruction_mlp") for x in ("hidden", "hidden_bias", "out", "out_bias")),
}


def opened(method: str = "pplug", **changes: Any) -> tuple[Run, Store, Tree]:
    """A run that knows people by their history alone."""
    return untrained.opened(method=method, data__names="masked", **PLUG, **changes)


def dev_of(store: Store, count: int = 3) -> list[int]:
    """Dev dialogues of different queriers."""
    found = {store.dialogues[i].querier: int(i) for i in store.split("dev")}
    return list(found.values())[:count]


def slopes(run: Run, trainable: Tree, examples: list[Example]) -> Tree:
    """Gradients of the language model's loss to the trainable tree."""
    shape = dataclasses.replace(run.shape, rows=2, length=3 * run.shape.length, targets=3 * run.shape.targets)
    batch = helpers.device(make_batch([examples[:3], examples[3:6]], shape))
    setting, key = run.setting, jax.random.key(0)
    loss = lambda values: run.method.loss(setting, values, run.base, batch, {}, key)[0]["lm"]  # noqa: E731
    return jax.jit(jax.grad(loss))(trainable)


def test_gradients_reach_the_embedder_and_nothing_else() -> None:
    run, store, trainable = opened()
    assert set(arrays.flat(trainable)) == LEAVES
    found = arrays.flat(slopes(run, trainable, run.examples(store, "dev", 6)[0]))
    for name, slope in found.items():
        assert np.isfinite(slope).all() and (slope != 0).any(), name
    # Of the table only the rows of words that were asked.
    words = (found["plug/encoder/table"] != 0).any(1)
    assert 3 < words.sum() < len(words)


@pytest.mark.slow
def test_a_sentence_encoder_learns_in_all_its_layers(folder: Path) -> None:  # noqa: F811
    run, store, _ = untrained.opened(method="pplug", **{**PLUG, "pplug__encoder": str(folder)})
    fresh = run.reader.start({"plug": helpers.drawn(runs.declare(run)[0], 0)["plug"]})
    # The trainable copy starts as the frozen encoder does.
    frozen = pplug._bert(str(folder)).params
    helpers.assert_trees_equal(fresh["plug"]["encoder"], frozen)
    examples = run.examples(store, "dev", 6)[0]
    found = arrays.flat(slopes(run, fresh, examples))
    dead = {name for name, slope in found.items() if not (np.asarray(slope) != 0).any()}
    # Keys' biases move no softmax.
    assert dead <= {"plug/encoder/layers/k_bias"} and {f"plug/encoder/{n}" for n in arrays.flat(frozen)} <= set(found)
    vectors = np.asarray(examples[0].columns["history"])
    np.testing.assert_allclose(
        np.linalg.norm(vectors[: len(examples[0].columns["history"].index)], axis=1), 1, atol=2e-3
    )


def test_soft_tokens_start_as_long_as_the_base_s_embeddings() -> None:
    run, store, _ = opened()
    embed = np.asarray(run.base["embed"])
    assert run.setting.norm == pytest.approx(np.linalg.norm(embed, axis=1).mean(), rel=1e-5)
    fresh = run.reader.start(helpers.drawn(runs.declare(run)[0], 0))
    (e, *_) = run.examples(store, "dev", 1)[0]
    e = dataclasses.replace(e, columns={**e.columns, "history": np.asarray(e.columns["history"])[:1]})
    inputs = helpers.device(make_batch([[e]], dataclasses.replace(run.shape, rows=1)).inputs)
    soft = np.asarray(run.method.condition(run.setting, fresh, inputs).soft)
    assert soft.shape == (1, 3, 3, embed.shape[1])
    np.testing.assert_allclose(np.linalg.norm(soft[0, 0], axis=-1), run.setting.norm, rtol=0.6)


def test_soft_tokens_stand_at_their_places() -> None:
    """Two dialogues of 3 and 2 tokens and one of padding, two soft tokens each."""
    x, soft = jnp.arange(1.0, 7)[None, None, :, None], -jnp.arange(1.0, 5).reshape(1, 2, 2, 1)
    segment, position = jnp.array([[1, 1, 1, 2, 2, 0]]), jnp.array([[0, 1, 2, 0, 1, 0]])
    placed = decoder.place(x, soft, segment, position)
    assert placed[0, 0, :, 0].tolist() == [-1, -2, 3, -3, -4, 6]
    assert decoder.place(x, None, segment, position) is x


def test_places_are_reserved_before_every_sequence() -> None:
    run, store, _ = opened()
    plain, _, _ = untrained.opened(method="prompts", data__names="masked")
    d = store.dialogues[dev_of(store)[0]]
    (ours,), (theirs,) = run.encode(d), plain.encode(d)
    assert run.places == 3 and plain.places == 0 and theirs.columns == {}
    assert ours.tokens.tolist() == [0, 0, 0, *theirs.tokens.tolist()]
    assert ours.role.tolist() == [0, 0, 0, *theirs.role.tolist()]
    assert ours.predicted.tolist() == [False] * 3 + theirs.predicted.tolist()
    prompt = reply.make_prompt(run, d)
    np.testing.assert_array_equal(prompt.tokens, ours.tokens[: len(prompt.tokens)])
    for name, column in ours.columns.items():
        np.testing.assert_array_equal(np.asarray(prompt.columns[name]), np.asarray(column))
    # They count: a row that the dialogue just fills is too short for it and them.
    asked = dataclasses.replace(d, turns=d.turns[-2:])
    (whole,) = run.encode(asked)
    for length, number in ((len(whole.tokens), 1), (len(whole.tokens) - 1, 0)):
        assert len(untrained.changed(run, batch__length=length).encode(asked)) == number


def test_each_reply_is_asked_with_its_own_query() -> None:
    run, _, _ = opened()
    texts = ["is there any bread?", "aye", "who sells bread?", "no", "who sells bread?", "no"]
    turns = tuple(Turn(("tilda", "maren")[i % 2], text) for i, text in enumerate(texts))
    found = run.encode(Dialogue("x", "maren", "tilda", turns, "g", replies=(1, 3, 5)))
    # The last two share what they are told, and so a sequence.
    assert [e.replies for e in found] == [1, 2]
    asked = [run.tokenizer.encode(texts[i], add_special_tokens=False) for i in (0, 2)]
    for e, ids in zip(found, asked, strict=True):
        assert e.columns["query"].tolist() == ids + [-1] * (12 - len(ids))


def test_packed_is_alone() -> None:
    run, store, trainable = opened()
    examples = run.examples(store, "dev", 7)[0]
    packed, counts = scores.reply_nll(run, trainable, examples)
    single, _ = scores.reply_nll(untrained.changed(run, batch__dialogues=1, batch__rows=7), trainable, examples)
    np.testing.assert_allclose(packed, single, rtol=1e-5, atol=1e-4)
    # The order in which they stand in a row does not matter either; what they are told does.
    assert len({e.columns["history"].tobytes() for e in examples}) > 1
    swapped = [dataclasses.replace(e, columns=o.columns) for e, o in zip(examples, examples[::-1], strict=True)]
    other = scores.reply_nll(run, trainable, swapped)[0]
    assert (np.abs(other - packed)[[0, 1, 2]] > 1e-3).all() and (counts > 0).all()


@pytest.mark.parametrize("method", ["pplug", "qar"])
def test_cached_replies_are_the_full_pass(method: str) -> None:
    run, store, trainable = opened(method)
    dialogues, rows = [store.dialogues[i] for i in dev_of(store)], [1, 2, STRANGER]
    model, setting = batching.prepare(run, trainable), run.setting
    batcher, prompts = Batcher(model, 4), [reply.make_prompt(run, d) for d in dialogues]
    place = {batcher.submit(p, row, Sampling(5)): i for i, (p, row) in enumerate(zip(prompts, rows, strict=True))}
    drawn: list[list[int]] = [[] for _ in prompts]
    while batcher.busy:
        for progress in batcher.step(generate.STRIDE):
            drawn[place[progress.handle]] += progress.tokens
    ids = dict(responder=0, cluster=0, text=0, label=-1, index=0)

    def example(prompt: Encoded, said: list[int], row: int, columns: Any) -> Example:
        tokens = np.array([*prompt.tokens, *said], np.int32)
        flags = np.zeros((2, len(tokens)), np.int32)
        return Example(tokens, flags[0], flags[1].astype(bool), querier=row, **ids, columns=columns)

    shape = dataclasses.replace(run.shape, rows=1, length=3 * run.config.batch.length)

    @jax.jit
    def forward(inputs: Inputs) -> jax.Array:
        states = base.states(setting, run.base, inputs, run.method.condition(setting, trainable, inputs))
        return decoder.logits(
            run.base, towers.join(trainable.get("tower", {}), run.base, states, setting.model), setting.model
        )

    def logits(told: list[Encoded]) -> list[np.ndarray]:
        """Of each drawn token, all dialogues packed into one row."""
        row = [example(p, s, r, t.columns) for p, s, r, t in zip(prompts, drawn, rows, told, strict=True)]
        whole = np.asarray(forward(helpers.device(make_batch([row], shape).inputs)))[0]
        ends = np.cumsum([len(e) for e in row])
        return [whole[end - len(s) - 1 : end - 1] for end, s in zip(ends, drawn, strict=True)]

    assert all(drawn)
    own, others = logits(prompts), logits(prompts[1:] + prompts[:1])
    for said, found in zip(drawn, own, strict=True):
        assert np.argmax(found, -1).tolist() == said
    # What is looked up matters, but not for whom QAR takes for a stranger: who has no row has no history.
    moved = [np.abs(a - b).max() for a, b in zip(own, others, strict=True)]
    assert min(moved[:2]) > 1e-2 and (moved[2] > 1e-2) == (method == "pplug")


def test_qar_takes_soft_tokens_beside_its_rows() -> None:
    run, store, trainable = opened("qar")
    plain, _, _ = untrained.opened(method="qar", data__names="masked")
    assert set(arrays.flat(trainable)) == set(arrays.flat(runs.declare(plain)[0], is_leaf=arrays.is_spec)) | LEAVES
    examples = [
        dataclasses.replace(e, querier=q) for e, q in zip(run.examples(store, "dev", 3)[0], (1, 0, 2), strict=True)
    ]
    inputs = helpers.device(
        make_batch([examples], dataclasses.replace(run.shape, rows=1, length=3 * run.shape.length)).inputs
    )
    found = run.method.condition(run.setting, trainable, inputs)
    assert found.rows is not None and found.specific is not None and found.lora is not None
    told = np.asarray(found.soft[0])
    # A stranger has no history: what is contrasted cannot copy it. The task is told to everybody.
    assert (told[1, 1:] == 0).all() and (told[[0, 2], 1:] != 0).all() and (told[0, 0] == told[1, 0]).all()
    slope = slopes(untrained.changed(run, qar__contrast="none"), trainable, run.examples(store, "dev", 6)[0])
    for name in ("plug/mlp/out", "plug/encoder/table", "tower/rows", "lora/q/b"):
        assert (np.asarray(arrays.flat(slope)[name]) != 0).any(), name


def test_history_dropout_takes_whole_items() -> None:
    run, store, _ = opened()
    examples = run.examples(store, "dev", 6)[0]
    columns = columns_of([[e.columns for e in examples]] * 200, 200, 6)
    there = (columns["history"] != 0).any(-1)
    batch = make_batch([examples[:1]], run.shape)
    inputs = batch.inputs.replace(columns=helpers.device(columns))
    assert pplug.forget(run.setting, inputs, None) is inputs
    forgot = np.asarray(pplug.forget(run.setting, inputs, jax.random.key(0)).columns["history"])
    kept = (forgot != 0).any(-1)
    np.testing.assert_array_equal(forgot[kept], columns["history"][kept])
    gone = 1 - kept.sum(-1) / there.sum(-1)
    # A rate from 0 to a half for each dialogue, a quarter on average; of 8 items some lose more, by chance.
    assert abs(gone.mean() - 0.25) < 0.02 and gone.std() > 0.15 and (gone == 0).mean() > 0.1
    none = untrained.changed(run, pplug__dropout=0.0)
    np.testing.assert_array_equal(
        np.asarray(pplug.forget(none.setting, inputs, jax.random.key(0)).columns["history"]), columns["history"]
    )


def test_what_is_looked_up() -> None:
    """The most recent items of the querier's own, of training, and never of the dialogue's own group."""
    run, store, _ = opened()
    for i in [*dev_of(store), *store.split("train")[:5]]:
        d = store.dialogues[i]
        own = [x for x in store.dialogues if x.split == "train" and x.querier == d.querier and x.group != d.group]
        texts = [f"{x.query}\n{x.reply}" for x in own]
        column = run.columns(d)["history"]
        assert isinstance(column, Rows) and len(column.index) == 8 < len(texts)
        np.testing.assert_array_equal(column.index, column.source.find(texts[-8:]))
        assert np.asarray(column).shape == (8, 32)
    # Long queries lose their end, but for their last token.
    long = reply.question(run, [], d.querier, "bread " * 20 + "?", d.responder)
    ids = run.tokenizer.encode("bread ?", add_special_tokens=False)
    assert run.columns(long)["query"].tolist() == [ids[0]] * 11 + [ids[1]]
    assert (run.columns(reply.question(run, [], d.querier, "", d.responder))["query"] == -1).all()


def test_another_querier_s_history_under_the_true_name() -> None:
    """With names masked the history is all that tells: the gap of history is the gap of everything."""
    run, store, trainable = opened()
    found = awareness.measure(run, trainable, store, "dev", every=False)
    assert {"reply_nll", "swap_gap", "history_gap"} == set(found.metrics)
    np.testing.assert_array_equal(found.scores["history_gap"], found.scores["swap_gap"])
    assert (found.scores["history_gap"][0] != 0).mean() > 0.9
    # Who reads no history has no such gap.
    sft, _, values = untrained.opened(method="sft")
    assert "history_gap" not in awareness.measure(sft, values, store, "dev", every=False).metrics


def told_of(run: Run, *said: Dialogue) -> Run:
    """The run to which somebody new has told these."""
    person = Person(said[0].querier, rows.free_row(run.registry), 0, "", None, said, {})
    return rows.heard(run, [person])


def test_an_unseen_querier_is_served_by_history_alone() -> None:
    """Told while the run is open: the next prompt sees it, in other conversations than its own."""
    run, store, trainable = opened()
    asked = reply.question(run, [], "zed", "is there any bread?", "maren")
    before = reply.make_prompt(run, asked)
    assert not np.asarray(before.columns["history"]).any()
    said = next(d for d in store.dialogues if d.split == "train")
    turns = tuple(Turn("zed" if t.speaker == said.querier else t.speaker, t.text) for t in said.turns)
    told = [dataclasses.replace(said, id=f"z{i}", querier="zed", turns=turns, group=f"z{i}") for i in range(2)]
    then = told_of(run, told[0])
    after = reply.make_prompt(then, asked)
    vectors = np.asarray(after.columns["history"])
    assert (vectors.any(-1)).tolist() == [True] + [False] * 7
    np.testing.assert_array_equal(
        vectors[0], after.columns["history"].source.table[then.columns(asked)["history"].index[0]]
    )
    more = told_of(run, told[0], dataclasses.replace(told[1], turns=(*turns[:-1], Turn("maren", "never, zed"))))
    assert np.asarray(more.columns(asked)["history"]).any(-1).sum() == 2
    assert np.asarray(more.columns(told[0])["history"]).any(-1).sum() == 1
    # What was opened before stays as it was.
    assert not np.asarray(run.columns(asked)["history"]).any()
    # And it is heard: no parameter of the model is zed's.
    model = batching.prepare(run, trainable)
    one, two = (batching.request(model, [p], [STRANGER], [Sampling(1)]).soft for p in (before, after))
    assert (np.asarray(one)[0, 1:] == 0).all() and (np.asarray(two)[0, 1:] != 0).all()
    assert "history: " in run.reader.summary() and " 512 bytes a querier" in run.reader.summary()


def test_items_are_told_by_how_they_differ() -> None:
    """From what other queriers of the responder got in the same cluster; what nobody else asked is left out."""
    run, store, trainable = opened(pplug__differences=True)
    train = [store.dialogues[i] for i in store.split("train")]
    cluster = {d.id: int(c) for d, c in zip(store.dialogues, store.cluster, strict=True)}
    d = store.dialogues[dev_of(store)[0]]
    columns, plain = run.columns(d), opened()[0].columns(d)
    told = items(store, d, 8)
    source, difference = columns["history"].source, np.asarray(columns["difference"], np.float32)
    table = source.table.astype(np.float32)
    assert len(columns["history"].index) == len(told) == 8 and "difference" not in plain
    for k, item in enumerate(told):
        met = [
            pplug.item_text(Item(x.query, x.reply))
            for x in train
            if x.querier != d.querier and cluster[x.id] == cluster[item.record.id] and x.group != d.group
        ]
        apart = table[columns["history"].index[k]] - table[source.find(met[-pplug.PEERS :])].mean(0)
        np.testing.assert_allclose(difference[k], apart / np.linalg.norm(apart), atol=2e-3)
    # They are what the MLP reads, and the instruction's token stays as it is.
    (e,) = run.examples(store, "dev", 1)[0]
    shape = dataclasses.replace(run.shape, rows=1)
    arrays_of = {name: np.asarray(x) for name, x in columns.items()}
    soft = [
        pplug.soft(
            run.setting, trainable, helpers.device(make_batch([[dataclasses.replace(e, columns=c)]], shape).inputs)
        )[0, 0]
        for c in (arrays_of, {**arrays_of, "difference": -arrays_of["difference"]})
    ]
    moved = np.abs(np.asarray(soft[0]) - np.asarray(soft[1])).max(-1)
    assert moved[0] == 0 and (moved[1:] > 1e-3).all()
    assert " items have others to differ from" in run.reader.summary()

    # Somebody new is held against all that the responder said to others; alone with the responder nobody differs.
    turns = tuple(Turn("zed" if t.speaker == train[0].querier else t.speaker, t.text) for t in train[0].turns)
    then = told_of(run, dataclasses.replace(train[0], id="z", querier="zed", turns=turns, group="z"))
    asked = reply.question(run, [], "zed", "is there any bread?", train[0].responder)
    own = then.columns(asked)["difference"]
    assert own.index.tolist() == source.find([pplug.item_text(Item(train[0].query, train[0].reply))]).tolist()
    assert len(own.others) == pplug.PEERS
    own = [x for x in train if x.querier == d.querier]
    alone = make_store(own, np.zeros(len(own), np.int32))
    nobody = pplug.reader(run.setting, alone, run.tokenizer, lambda: np.asarray(run.base["embed"])).columns(d)
    assert not np.asarray(nobody["history"]).any() and not np.asarray(nobody["difference"]).any()


def test_ten_thousand_items_are_the_last_few() -> None:
    run, _, _ = opened()
    said = [
        Dialogue(
            f"{i}", "maren", "tilda", (Turn("tilda", f"bread {i}"), Turn("maren", "aye")), f"{i}", float(i), "train"
        )
        for i in range(10_000)
    ]
    store = make_store(said, np.zeros(len(said), np.int32))
    table = lambda: np.asarray(run.base["embed"])  # noqa: E731
    own = pplug.reader(run.setting, store, run.tokenizer, table)
    asked = dataclasses.replace(said[5000], id="now", group="now")
    for time, last in ((None, 9999), (7000.0, 6999), (3.0, 2), (0.0, -1)):
        found = items(store, dataclasses.replace(asked, time=time), 8)
        assert [x.query for x in found] == [f"bread {i}" for i in range(max(last - 7, 0), last + 1)]
    column = own.columns(dataclasses.replace(asked, time=None))["history"]
    assert np.asarray(column).shape == (8, 32) and np.asarray(column).any(-1).all()


def test_bad_configurations() -> None:
    path = Path(__file__).resolve().parent.parent / "configs" / "pplug_town.py"
    for override, message in (
        (["pplug.encoder="], "method='pplug' needs config.pplug.encoder"),
        (["method=sft"], "needs method='pplug' or 'qar'"),
        (["trainable=all"], "trainable='adapters'"),
        (["pplug.history=0"], "more than 0"),
        (["pplug.dropout=1.0"], "a share"),
    ):
        with pytest.raises(UserError, match=message):
            configs.load(path, override)
    with pytest.raises(UserError, match="encoder 'nowhere': no such file"):
        methods.load("pplug").declare(helpers.setting("pplug", pplug__encoder="nowhere"))
    with pytest.raises(UserError, match="querier_embedding=True"):
        methods.load("qar").declare(helpers.setting("qar", pplug__encoder="base", qar__querier_embedding=False))
