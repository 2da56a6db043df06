"""compat = "paper" gives the numbers of the published implementation (recorded in tests/fixtures)."""

from __future__ import annotations

import json
import operator

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
    memory = arrays.initialise(memory, jax.random.key(0))
    if setting.config.trainable == "all":
        return {"base": base, **tree}, {}, memory
    tree["heads"] = {"norm_p": heads["norm_p"]}
    memory["heads"] = {k: heads[k] for k in ("kernel", "bias")}
    return tree, base, memory


def optimizer(args: dict, name: str) -> optax.GradientTransformation:
    if name == "sgd":
        return optax.sgd(args["lr"])
    b1, b2 = args["betas"]
    return optax.adamw(args["lr"], b1, b2, args["eps"], weight_decay=args["weight_decay"])


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
    for t in range(sum(1 for k in data if k.endswith("/loss"))):
        batch = paper.batch(data, t)
        params = state.trainable
        model = params.get("base", base)
        check_forward(setting, params, model, state.memory, batch, data, t)
        if t == 0:
            check_gradients(setting, state, base, batch, paper.tree(data, "grad0/"))
        state, metrics = advance(state, jax.tree.map(lambda x: x[None], batch))
        close(metrics["lm"], data[f"out{t}/loss_lm"], f"step {t} lm")
        close(metrics["contrast"], data[f"out{t}/loss_specific"], f"step {t} contrast")
        close(metrics["loss"], data[f"out{t}/loss"], f"step {t} loss")
        bank = state.memory["prototypes"]
        shape = (paper.CLUSTERS, paper.QUERIERS)
        for view in (0, 1):
            entries = bank["entries"][view].reshape(*shape, 4, -1)
            close(entries, data[f"out{t}/role_avg_emb_view{view + 1}"], f"step {t} bank")
        assert (bank["written"].reshape(shape) % 4 == data[f"out{t}/role_avg_emb_ptr"]).all()


def check_forward(setting, params, base, memory, batch, data, t: int) -> None:
    adapters = qar.condition(setting, params, batch.inputs)
    states = base_method.states(setting, base, batch.inputs, adapters)
    eps, out = setting.model.norm_eps, {k.split("/", 1)[1]: v for k, v in data.items() if k.startswith(f"out{t}/")}
    heads = params["heads"] | memory.get("heads", {})
    pooled, _ = qar.embeddings(setting, params, batch.inputs, states)
    close(pooled[:, 0], out["pooled_specific"], f"step {t} pooled_specific")
    every = jnp.broadcast_to(pooled, (pooled.shape[0], setting.clusters, pooled.shape[-1]))
    cluster = jnp.broadcast_to(jnp.arange(setting.clusters), every.shape[:2])
    for i, view in enumerate(towers.views(heads, every, cluster)):
        close(view, out[f"proj_view{i + 1}"], f"step {t} proj_view{i + 1}")
    means, filled = losses.read_memory(memory["prototypes"])
    means = jnp.where(filled[None, :, None], means, 1e-6).reshape(2, paper.CLUSTERS, paper.QUERIERS, -1)
    close(means[0], out["proto_view1"], f"step {t} proto_view1")
    close(means[1], out["proto_view2"], f"step {t} proto_view2")
    layers = all_layers(setting, base, adapters, batch.inputs)
    close(layers[-1], states, "layers one by one")
    pools = [towers.pool(heads["norm_p"], x[1], batch.inputs, eps)[0][:, 0] for x in layers]
    close(jnp.stack(pools), out["pooled_specific_all_layers"], f"step {t} pooled_specific_all_layers")
    spoken = (batch.inputs.role == RESPONDER)[..., None]
    close((states[0] * spoken).sum(1) / spoken.sum(1), out["pooled_general"], f"step {t} pooled_general")
    if "logits" in out:
        close(decoder.rms_norm(states[0], base["norm"], eps), out["hidden_general"], "hidden_general")
        close(decoder.rms_norm(states[1], params["tower"]["norm_s"], eps), out["hidden_specific"], "hidden_specific")
        joined = towers.join(params["tower"], base, states, setting.model)
        close(decoder.logits(base, joined, setting.model), out["logits"], "logits")


def all_layers(setting, base, adapters, inputs) -> list:
    """States after each layer, by running the layers one by one."""
    x = decoder.embed(base, inputs.tokens, adapters, jnp.float32)
    mask = decoder.causal_mask(jnp.asarray(inputs.segment), jnp.asarray(inputs.attend))
    tables = decoder.rope_tables(inputs.position, setting.model)
    result = []
    for i in range(setting.model.layers):
        weights, own = jax.tree.map(operator.itemgetter(i), (base["layers"], adapters.replace(rows=None)))
        x, _ = decoder.layer(x, weights, own, tables, mask, setting.model)
        result.append(x)
    return result


def check_gradients(setting, state, base, batch, theirs: dict) -> None:
    def total(trainable: dict) -> jax.Array:
        sums, _ = qar.loss(setting, trainable, trainable.get("base", base), batch, state.memory, None)
        counts = qar.counts(setting, batch, state.memory)
        return sum(w * sums[k] / counts[k] for k, w in qar.weights(setting).items())

    ours = arrays.flat(jax.grad(total)(state.trainable))
    theirs = arrays.flat(theirs)
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
