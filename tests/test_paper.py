"""compat = "paper" gives the numbers of the published implementation (recorded in tests/fixtures)."""

from __future__ import annotations

import json

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import optax
import paper
import pytest

from qaperso import arrays, losses, step
from qaperso.data import paper as layout
from qaperso.data import text
from qaperso.data.store import make_store
from qaperso.methods import base as base_method
from qaperso.methods import qar
from qaperso.models import attention, decoder, towers
from qaperso.types import QUERIER, RESPONDER, TEMPLATE, Dialogue, Turn


def close(ours, theirs, what: str) -> None:
    """|a - b| <= 1e-4 max|b| + 1e-6."""
    theirs = np.asarray(theirs, np.float64)
    worst = np.abs(np.asarray(ours, np.float64) - theirs).max()
    assert worst <= 1e-4 * np.abs(theirs).max() + 1e-6, f"{what}: {worst} of {np.abs(theirs).max()}"


def recorded(name: str) -> tuple[dict, dict]:
    with np.load(paper.FIXTURES / f"{name}.npz") as archive:
        return dict(archive), json.loads((paper.FIXTURES / f"{name}.json").read_text())


def split(setting, tree: dict) -> tuple[dict, dict, dict]:
    """Recorded parameters as (trainable, base, memory) of the run."""
    base, heads = tree.pop("base"), tree["heads"]
    _, memory = qar.declare(setting)
    memory = helpers.drawn(memory, 0)
    if setting.config.trainable == "all":
        return {"base": base, **tree}, {}, memory
    tree["heads"] = {"norm_p": heads["norm_p"]}
    memory["heads"] = {k: heads[k] for k in ("kernel", "bias")}
    return tree, base, memory


def optimizer(args: dict, name: str) -> optax.GradientTransformation:
    """The recorded optimiser; first in its state is the step's gradient."""
    seen = optax.GradientTransformation(lambda params: params, lambda gradient, _, __: (gradient, gradient))
    if name == "sgd":
        return optax.chain(seen, optax.sgd(args["lr"]))
    b1, b2 = args["betas"]
    return optax.chain(seen, optax.adamw(args["lr"], b1, b2, args["eps"], weight_decay=args["weight_decay"]))


@pytest.mark.parametrize("name", ["qwen_full", "qwen_lora"])
def test_every_recorded_step(name: str) -> None:
    data, facts = recorded(name)
    setting = paper.setting(name)
    trainable, base, memory = split(setting, paper.tree(data, "param0/"))
    declared = jax.tree.map(lambda x: x.shape, arrays.abstract(qar.declare(setting)[0]))
    assert declared == jax.tree.map(lambda x: x.shape, trainable)
    opt = optimizer(facts["optimizer_args"], facts["optimizer"])
    state = step.init_state(opt, trainable, memory)
    advance = jax.jit(lambda s, b: step.train_step(setting, qar, opt, s, base, b, jax.random.key(0)))
    forward = jax.jit(lambda *trees: computed(setting, *trees))
    for t in range(sum(1 for k in data if k.endswith("/loss"))):
        batch = paper.batch(data, t)
        params = state.trainable
        ours = forward(params, params.get("base", base), state.memory, batch)
        check_forward(ours, {k.removeprefix(f"out{t}/"): v for k, v in data.items() if k.startswith(f"out{t}/")}, t)
        state, metrics = advance(state, jax.tree.map(lambda x: x[None], batch))
        if t == 0:
            check_gradients(state.optimizer[0], paper.tree(data, "grad0/"))
        close(metrics["lm"], data[f"out{t}/loss_lm"], f"step {t} lm")
        close(metrics["contrast"], data[f"out{t}/loss_specific"], f"step {t} contrast")
        close(metrics["loss"], data[f"out{t}/loss"], f"step {t} loss")
        bank = state.memory["prototypes"]
        shape = (paper.CLUSTERS, paper.QUERIERS)
        for view in (0, 1):
            entries = bank["entries"][view].reshape(*shape, 4, -1)
            close(entries, data[f"out{t}/role_avg_emb_view{view + 1}"], f"step {t} bank")
        assert (bank["written"].reshape(shape) % 4 == data[f"out{t}/role_avg_emb_ptr"]).all()


def computed(setting, params, base, memory, batch) -> dict:
    """What the published model gives out, by its recorded names, and our states of the last layer computed twice."""
    adapters = qar.condition(setting, params, batch.inputs)
    states = base_method.states(setting, base, batch.inputs, adapters)
    eps, heads = setting.model.norm_eps, params["heads"] | memory.get("heads", {})
    pooled, _ = qar.embeddings(setting, params, batch.inputs, states)
    every = jnp.broadcast_to(pooled, (pooled.shape[0], setting.clusters, pooled.shape[-1]))
    views = towers.views(heads, every, jnp.broadcast_to(jnp.arange(setting.clusters), every.shape[:2]))
    means, filled = losses.read_memory(memory["prototypes"])
    means = jnp.where(filled[None, :, None], means, 1e-6).reshape(2, paper.CLUSTERS, paper.QUERIERS, -1)
    layers = all_layers(setting, base, adapters, batch.inputs)
    pools = jax.vmap(lambda x: towers.pool(heads["norm_p"], x[1], batch.inputs, eps)[0][:, 0])(layers)
    spoken = (batch.inputs.role == RESPONDER)[..., None]
    joined = towers.join(params["tower"], base, states, setting.model)
    return {
        "pooled_specific": pooled[:, 0],
        "pooled_specific_all_layers": pools,
        "pooled_general": (states[0] * spoken).sum(1) / spoken.sum(1),
        "proj_view1": views[0],
        "proj_view2": views[1],
        "proto_view1": means[0],
        "proto_view2": means[1],
        "hidden_general": decoder.rms_norm(states[0], base["norm"], eps),
        "hidden_specific": decoder.rms_norm(states[1], params["tower"]["norm_s"], eps),
        "logits": decoder.logits(base, joined, setting.model),
        "states": states,
        "states layer by layer": layers[-1],
    }


# What the fixtures recorded at the first step only.
SOMETIMES = {"logits", "hidden_general", "hidden_specific"}


def check_forward(ours: dict, theirs: dict, t: int) -> None:
    close(ours.pop("states layer by layer"), ours.pop("states"), f"step {t} states layer by layer")
    assert set(ours) - SOMETIMES <= set(theirs)
    for name in set(ours) & set(theirs):
        close(ours[name], theirs[name], f"step {t} {name}")


def all_layers(setting, base, adapters, inputs) -> jax.Array:
    """States after each layer, [L, W, B, S, D], without cache, dropout or rematerialisation."""
    seen = attention.segments(inputs.segment, inputs.attend)
    tables = decoder.rope_tables(inputs.position, setting.model)

    def one(x, layer):
        x = decoder.layer(x, *layer, tables, seen, setting.model)
        return x, x

    x = decoder.embed(base, inputs.tokens, jnp.float32)
    x = x if adapters.specific is None else decoder.part(x, adapters.rows)
    return jax.lax.scan(one, x, (base["layers"], adapters.replace(rows=None)))[1]


def check_gradients(ours: dict, theirs: dict) -> None:
    ours, theirs = arrays.flat(ours), arrays.flat(theirs)
    assert set(ours) == set(theirs)
    for name in theirs:
        close(ours[name], theirs[name], f"gradient of {name}")


class WordTokenizer:
    """Words 't<ID>' are token ID, as in the fixture; the markers are ChatML's, or a Llama-like bos and headers."""

    def __init__(self, markers: dict[str, int]):
        self.markers = markers

    def get_vocab(self) -> dict[str, int]:
        return self.markers

    def encode(self, string: str, add_special_tokens: bool, split_special_tokens: bool) -> list[int]:
        assert not add_special_tokens and split_special_tokens
        fixed = {"\n": 3, "\n\n": 3, "system": 4}
        return [fixed[string]] if string in fixed else [int(word[1:]) for word in string.split()]


CHATML = WordTokenizer({"<|im_start|>": 1, "<|im_end|>": 2})


@pytest.mark.parametrize("system", ["nosys", "sys"])
def test_layout_is_the_published_one(system: str) -> None:
    data, facts = recorded("layout")
    template, length = text.template_of(CHATML), facts["max_len"]
    message = facts["system_message_for_sys"] if system == "sys" else None
    for i, item in enumerate(facts["items"]):
        turns = [Turn(t["from"], t["value"]) for t in item["conversations"]]
        responder, querier = turns[-1].speaker, item["role_pair_id"] + 1

        e = layout.encode_train(CHATML, template, turns, responder, length, message)
        pad = length - len(e.tokens)
        expect = {k: data[f"train_{system}/{k}"][i] for k in ("input_ids", "labels", "attention_mask", "role_pos_ids")}
        tokens = np.pad(e.tokens, (0, pad), constant_values=2)
        np.testing.assert_array_equal(tokens, expect["input_ids"])
        labels = np.where(np.pad(e.predicted, (0, pad)), tokens, -100)
        np.testing.assert_array_equal(labels, expect["labels"])
        np.testing.assert_array_equal(tokens != 2, expect["attention_mask"])
        role = np.pad(np.where(e.role == 2, querier, e.role), (0, pad))
        np.testing.assert_array_equal(role, expect["role_pos_ids"])
        assert data[f"train_{system}/role_pair_id"][i] == querier
        assert data[f"train_{system}/cluster_ids"][i] == item["cluster_id"]

        p, target = layout.encode_eval(CHATML, template, turns, responder, length, message)
        pad = length - len(p.tokens)
        expect = {k: data[f"eval_{system}/{k}"][i] for k in ("input_ids", "labels", "attention_mask", "role_pos_ids")}
        tokens = np.pad(p.tokens, (pad, 0), constant_values=2)
        np.testing.assert_array_equal(tokens, expect["input_ids"])
        np.testing.assert_array_equal(np.pad(target, (0, length - len(target)), constant_values=-100), expect["labels"])
        np.testing.assert_array_equal(tokens != 2, expect["attention_mask"])
        role = np.pad(np.where(p.role == 2, querier, p.role), (pad, 0))
        np.testing.assert_array_equal(role, expect["role_pos_ids"])


def test_the_llama_variant_is_a_matter_of_configuration() -> None:
    data, facts = recorded("qwen_lora")
    setting = paper.setting("qwen_lora", rank=64, family="llama")
    trainable, base, memory = helpers.build(setting, qar)
    assert not [name for name in arrays.flat(base) if name.endswith("_bias")]
    layers, width = setting.model.layers, setting.model.embed
    assert {k: v.shape for k, v in trainable["tower"]["specific"].items()} == {
        "gate": (layers, width, 64),
        "up": (layers, width, 64),
        "down": (layers, 64, width),
    }
    assert "alpha" not in trainable["tower"] and "rows" not in trainable["tower"]
    opt = optimizer(facts["optimizer_args"], facts["optimizer"])
    state = step.init_state(opt, trainable, memory)
    batch = jax.tree.map(lambda x: x[None], paper.batch(data, 0))
    new, metrics = helpers.stepper(setting, qar, opt)(state, base, batch, jax.random.key(0))
    assert metrics["finite"] == 1 and metrics["contrast"] > 0
    moved = {k for k, v in arrays.flat(new.trainable).items() if (v != arrays.flat(trainable)[k]).any()}
    # LoRA-A faces a B that is zero at first; it moves by weight decay alone.
    assert moved == set(arrays.flat(trainable))
    for name in ("kernel", "bias"):
        np.testing.assert_array_equal(new.memory["heads"][name], memory["heads"][name])
    assert new.memory["prototypes"]["written"].sum() == batch.inputs.tokens.shape[1]


HEADERS = WordTokenizer({"<|begin_of_text|>": 1, "<|eot_id|>": 2, "<|start_header_id|>": 5, "<|end_header_id|>": 6})


def test_the_llama_layout_written_out() -> None:
    template = text.template_of(HEADERS)
    turns = [Turn("t71", "t9"), Turn("t70", "t10 t11"), Turn("t71", "t12")]
    t, r, q = TEMPLATE, RESPONDER, QUERIER

    # The responder's opening turn is left out; markers are labels, headers and what the querier says are not.
    e = layout.encode_train(HEADERS, template, turns, "t71", 32)
    assert e.tokens.tolist() == [1, 5, 70, 6, 3, 10, 11, 2, 5, 71, 6, 3, 12, 2]
    assert e.role.tolist() == [t, t, q, q, q, q, q, t, t, r, r, r, r, t]
    assert np.flatnonzero(e.predicted).tolist() == [1, 7, 8, 12, 13]
    short = layout.encode_train(HEADERS, template, turns, "t71", 9)
    assert short.tokens.tolist() == e.tokens[:9].tolist() and short.cut == 5

    p, target = layout.encode_eval(HEADERS, template, turns, "t71", 32)
    assert p.tokens.tolist() == [1, 5, 71, 6, 3, 9, 2, 5, 70, 6, 3, 10, 11, 2, 5, 71, 6, 3]
    assert p.role.tolist() == [t, t, r, r, r, r, t, t, q, q, q, q, q, t, t, r, r, r]
    assert target.tolist() == [12]

    told = layout.encode_train(HEADERS, template, turns, "t71", 32, system="t8")
    assert told.tokens.tolist() == [1, 5, 4, 6, 3, 8, 2, *e.tokens[1:].tolist()]


def test_every_cluster_has_a_class_for_every_querier_and_two_empty_ones() -> None:
    def talk(name: str, querier: str, responder: str, split: str) -> Dialogue:
        return Dialogue(name, responder, querier, (Turn(querier, name), Turn(responder, name)), name, split=split)

    asked = [("ann", "cy"), ("bo", "cy"), ("eve", "dee"), ("ann", "dee")]
    dialogues = [talk(f"d{i}", *pair, "train") for i, pair in enumerate(asked * 2)] + [talk("new", "new", "cy", "dev")]
    store = make_store(dialogues, np.arange(len(dialogues), dtype=np.int32) // 4 % 2)
    grid = layout.class_grid(store)
    # 2 responders, 2 clusters, 3 queriers and 2 rows more.
    assert {k: v.shape for k, v in grid.classes.items()} == dict.fromkeys(("responder", "querier", "cluster"), (20,))
    keys = list(zip(*(grid.classes[k].tolist() for k in ("responder", "cluster", "querier")), strict=True))
    assert keys == [(r, c, q) for r in range(2) for c in range(2) for q in range(1, 6)]
    for i in range(8):
        assert keys[grid.label[i]] == (store.responder[i], store.cluster[i], store.row[i])
    assert grid.label[8] == -1  # nobody of that name is in the training data
    assert not {q for _, _, q in (keys[label] for label in grid.label[:8])} & {4, 5}
    assert grid.dialogues == store.dialogues and (grid.row == store.row).all()


def test_as_published_padding_is_whatever_equals_end_of_turn() -> None:
    batch = helpers.batch(0, shape=helpers.SINGLE)
    pad, real = 1, batch.inputs.segment > 0
    tokens = batch.inputs.tokens.copy()
    tokens[0, 2] = pad  # an end-of-turn within the dialogue
    seen = layout.as_published(batch.replace(inputs=batch.inputs.replace(tokens=tokens)), pad)
    assert not real.all() and real[0, 2]
    np.testing.assert_array_equal(seen.inputs.tokens, np.where(real, tokens, pad))
    np.testing.assert_array_equal(seen.inputs.attend, real & (tokens != pad))
    assert not seen.inputs.attend[0, 2]
    assert (seen.inputs.segment == 1).all() and (seen.inputs.position == np.arange(real.shape[1])).all()
    for name in ("role", "querier", "responder", "cluster", "present"):
        np.testing.assert_array_equal(getattr(seen.inputs, name), getattr(batch.inputs, name))
    for name in ("target_index", "target", "weight"):
        np.testing.assert_array_equal(getattr(seen, name), getattr(batch, name))
