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
from qaperso.methods import base as base_method
from qaperso.methods import qar
from qaperso.models import decoder, towers
from qaperso.types import RESPONDER, Turn


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
    mask = decoder.causal_mask(inputs.segment, inputs.attend)
    tables = decoder.rope_tables(inputs.position, setting.model)

    def one(x, layer):
        x, _ = decoder.layer(x, *layer, tables, mask, setting.model)
        return x, x

    x = decoder.embed(base, inputs.tokens, adapters, jnp.float32)
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
