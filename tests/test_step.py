"""The step: micro-batches, devices, the non-finite gate, dead parameters, decay, hashes and compilation."""

from __future__ import annotations

import dataclasses
import functools
from types import ModuleType
from typing import Any

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from qaperso import arrays, losses, mesh, step
from qaperso.data.batches import make_batch
from qaperso.errors import UserError
from qaperso.methods import Setting, load
from qaperso.models import decoder
from qaperso.types import Batch

RULES = [(":(embed)$", "fsdp"), (":(heads|kv_heads|mlp|vocab)$", "tensor"), (":classes$", "fsdp")]
KEY = jax.random.key(0)
# What the contrast of each run needs of its batches.
RUNS = {"sft": ("sft", "none"), "in_batch": ("qar", "in_batch"), "prototypes": ("qar", "prototypes")}


def setting(name: str, **changes: Any) -> tuple[Setting, ModuleType]:
    """(setting, method) of one of RUNS."""
    method, contrast = RUNS[name]
    return helpers.setting(method, **({"qar__contrast": contrast} | changes)), load(method)


def batches(name: str, count: int, stranger: float | None = 0.7) -> list[Batch]:
    """Numpy batches [1, ...]."""
    return [helpers.stack([helpers.batch(seed, RUNS[name][1], stranger=stranger)]) for seed in range(count)]


@functools.cache
def adam(name: str) -> tuple:
    """(setting, method, optimizer, jitted step that takes its state over) of a run of 20 steps."""
    run, method = setting(name)
    optimizer, _ = step.make_optimizer(run.config, step.DEAD_PARAMETER_STEPS)
    return run, method, optimizer, helpers.stepper(run, method, optimizer, donate_argnums=0)


def begin(run: Setting, method: ModuleType, optimizer: optax.GradientTransformation) -> tuple[step.TrainState, dict]:
    """(state, base) of a run whose adapters are not zero."""
    trainable, base, memory = helpers.build(run, method)
    return step.init_state(optimizer, helpers.shaken(trainable), memory), base


def test_micro_batches_are_one_batch() -> None:
    run, method = setting("prototypes")
    # Plain gradient descent with rate 1: the new parameters are the gradient.
    optimizer = optax.sgd(1.0)
    advance = helpers.stepper(run, method, optimizer)
    state, base = begin(run, method, optimizer)
    split = whole = state
    for seed in range(2):
        rows = helpers.rows_of(helpers.examples(seed), 3)
        flags = helpers.rows_of([i % 3 > 0 for i in range(24)], 3)
        half = dataclasses.replace(helpers.SHAPE, rows=4)
        one = helpers.stack([make_batch(rows, helpers.SHAPE, flags, "prototypes")])
        two = helpers.stack([make_batch(rows[k : k + 4], half, flags[k : k + 4], "prototypes") for k in (0, 4)])
        whole, expected = advance(whole, base, one, KEY)
        split, found = advance(split, base, two, KEY)
        helpers.assert_trees_close(found, expected, atol=1e-5, rtol=1e-5)
        helpers.assert_trees_close(split.trainable, whole.trainable, atol=1e-5, rtol=1e-5)
        helpers.assert_trees_close(split.memory, whole.memory, atol=1e-5)
    assert expected["contrast"] > 0.1, "the memory of the first step makes the second step's contrast"
    moved = jax.tree.map(lambda a, b: bool((a != b).any()), state.trainable, whole.trainable)
    assert all(jax.tree.leaves(moved))


@pytest.mark.parametrize("memory", ["means", "bank"])
def test_memory_is_written_in_the_order_of_the_batch(memory: str) -> None:
    run, method = setting("prototypes", qar__memory=memory)
    held = helpers.build(run, method)[2]
    rng = np.random.default_rng(0)
    views, label = rng.normal(size=(2, 24, 8)).astype(np.float32), rng.integers(-1, 3, 24).astype(np.int32)
    cut = np.stack([views[:, :12], views[:, 12:]])
    one = method.remember(run, held, helpers.device({"views": views[None], "label": label[None]}))
    two = method.remember(run, held, helpers.device({"views": cut, "label": label.reshape(2, 12)}))
    helpers.assert_trees_equal(two, one)
    _, filled = losses.read_memory(one["prototypes"])
    np.testing.assert_array_equal(filled, np.arange(12) < 3)


def losses_of(name: str, sizes: tuple[int, int, int] | None) -> tuple[np.ndarray, dict]:
    """loss, lm and contrast of three steps, and the trained parameters, on one device or on a mesh."""
    run, method, optimizer, _ = adam(name)
    state, base = begin(run, method, optimizer)
    seen = []
    if sizes is None:
        advance = adam(name)[3]
        for batch in batches(name, 3):
            state, metrics = advance(state, base, batch, KEY)
            seen.append(metrics)
    else:
        made = mesh.make_mesh(*sizes)
        trainable, memory = method.declare(run)
        place = functools.partial(arrays.shardings, mesh=made, rules=RULES)
        trainable = jax.device_put(state.trainable, place(trainable))
        state = step.init_state(optimizer, trainable, jax.device_put(state.memory, place(memory)))
        base = jax.device_put(base, place(decoder.declare(run.model)))
        advance = helpers.stepper(run, method, optimizer)
        with jax.set_mesh(made):
            for batch in batches(name, 3):
                state, metrics = advance(state, base, mesh.put_batch(batch, made, 1), KEY)
                seen.append(metrics)
        print("CACHE", name, sizes, advance._cache_size())
        assert len(state.trainable["lora"]["q"]["a"].sharding.device_set) == 8
    names = [n for n in ("loss", "lm", "contrast", "grad_norm", "tokens") if n in seen[0]]
    return np.array([[float(m[n]) for n in names] for m in seen]), mesh.host_copy(state.trainable)


@functools.cache
def on_one_device(name: str) -> tuple[np.ndarray, dict]:
    return losses_of(name, None)


@pytest.mark.parametrize(
    "name, sizes",
    [
        ("sft", (1, 4, 2)),
        ("in_batch", (8, 1, 1)),
        ("in_batch", (2, 2, 2)),
        ("prototypes", (2, 2, 2)),
        ("prototypes", (1, 4, 2)),
    ],
)
def test_eight_devices_are_one(name: str, sizes: tuple[int, int, int]) -> None:
    expected, alone = on_one_device(name)
    found, trained = losses_of(name, sizes)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
    assert np.abs(np.diff(expected[:, 0])).min() > 1e-4, "the steps differ"
    # Adam turns rounding of near-zero gradients into steps of up to lr, so parameters agree less exactly than losses.
    helpers.assert_trees_close(trained, alone, atol=1e-3)


@pytest.mark.parametrize("where", ["batch", "base", "trainable"])
def test_a_step_that_is_not_finite_changes_nothing(where: str) -> None:
    run, method, optimizer, advance = adam("prototypes")
    state, base = begin(run, method, optimizer)
    good, second = batches("prototypes", 2)
    state, metrics = advance(state, base, good, KEY)
    assert metrics["finite"] == 1 and state.skipped == 0
    bad = second
    if where == "batch":
        weight = second.weight.copy()
        weight[0, 0, 0] = np.nan
        bad = second.replace(weight=weight)
    elif where == "base":
        base = base | {"norm": base["norm"].at[3].set(jnp.inf)}
    else:
        lora = state.trainable["lora"]
        spoiled = lora | {"o": lora["o"] | {"b": lora["o"]["b"].at[1, 0, 0].set(jnp.nan)}}
        state = state.replace(trainable=state.trainable | {"lora": spoiled})
    state = mesh.host_copy(jax.tree.map(jnp.copy, state))
    after, metrics = advance(state, base, bad, KEY)
    assert not np.isfinite(metrics["loss"]) and metrics["finite"] == 0 and metrics["skipped"] == 1
    for part in ("trainable", "optimizer", "memory", "largest"):
        helpers.assert_trees_equal(getattr(after, part), getattr(state, part))
    assert (int(after.step), int(after.skipped)) == (2, 1)
    if where == "batch":
        # The next good batch is an update again.
        last, metrics = advance(after, base, second, KEY)
        assert metrics["finite"] == 1 and (int(last.step), int(last.skipped)) == (3, 1)
        assert step.params_hash(last.trainable) != step.params_hash(state.trainable)


@pytest.mark.parametrize("name", RUNS)
def test_a_healthy_run_has_no_dead_parameters_and_compiles_once(name: str) -> None:
    run, method, optimizer, advance = adam(name)
    trainable, base, memory = helpers.build(run, method)
    state, base_hash = step.init_state(optimizer, trainable, memory), step.params_hash(base)
    before = step.params_hash(trainable)
    data, first = batches(name, 4), None
    for t in range(step.DEAD_PARAMETER_STEPS):
        state, metrics = advance(state, base, data[t % 4], KEY)
        first = float(metrics["lm"]) if first is None else first
        if t == 0:
            # LoRA's a faces a b of zero: rightly without gradient so far, and not yet to be judged.
            assert "lora/q/a (every layer)" in step.dead_parameters(state.largest)
    step.check_alive(state.largest)
    assert advance._cache_size() == 1
    assert step.params_hash(base) == base_hash and step.params_hash(state.trainable) != before
    assert metrics["lm"] < first and state.step == step.DEAD_PARAMETER_STEPS


def test_dead_heads_are_named() -> None:
    run, method = setting("in_batch", qar__weight=0.0)
    state, base = begin(run, method, optax.sgd(0.1))
    advance = helpers.stepper(run, method, optax.sgd(0.1))
    for batch in batches("in_batch", 2):
        state, _ = advance(state, base, batch, KEY)
    assert step.dead_parameters(state.largest) == ["heads/bias", "heads/kernel", "heads/norm_p"]
    with pytest.raises(UserError, match="no gradient reached heads/bias, heads/kernel, heads/norm_p in the first 20 steps"):
        step.check_alive(state.largest)


def test_a_dead_layer_is_named() -> None:
    run, method, optimizer, advance = adam("in_batch")
    state, base = begin(run, method, optimizer)
    # silu(0) * 0 = 0 and a way out of zeros: neither side can ever move the other.
    zeroed = {n: w.at[1].set(0) for n, w in state.trainable["tower"]["specific"].items()}
    tower = state.trainable["tower"] | {"specific": zeroed}
    state = state.replace(trainable=state.trainable | {"tower": tower})
    for batch in batches("in_batch", 2):
        state, _ = advance(state, base, batch, KEY)
    assert step.dead_parameters(state.largest) == [f"tower/specific/{n} (layer 1)" for n in ("down", "gate", "up")]


def test_many_dead_parameters_are_shortened() -> None:
    with pytest.raises(UserError, match="a, b, c, d, e, f and more in the first"):
        step.check_alive({n: jnp.zeros(()) for n in "abcdefgh"} | {"z": jnp.ones(())})


def test_weight_decay_spares_norms_biases_and_alpha() -> None:
    run, method = setting("in_batch", trainable="all")
    trainable = helpers.shaken(helpers.build(run, method)[0])
    optimizer, schedule = step.make_optimizer(run.config, 20)
    still = jax.tree.map(np.zeros_like, trainable)
    updates, _ = jax.jit(lambda p: optimizer.update(still, optimizer.init(p), p))(trainable)
    o, spared = run.config.optimizer, set()
    for name, update in arrays.flat(updates).items():
        expected = -float(schedule(0)) * o.weight_decay * np.asarray(arrays.flat(trainable)[name])
        if (update == 0).all():
            spared.add(name)
        else:
            np.testing.assert_allclose(update, expected, rtol=1e-5, err_msg=name)
    norms = {"base/norm", "base/layers/attn_norm", "base/layers/mlp_norm", "tower/norm_s", "heads/norm_p"}
    assert spared == norms | {"tower/alpha", "heads/bias"}


def test_schedule() -> None:
    run, _ = setting("sft", optimizer__warmup=4, optimizer__lr=0.5, optimizer__final=0.2)
    _, schedule = step.make_optimizer(run.config, 12)
    # Linear to the peak at 4, cosine to a fifth of it at 12, half-way between the two at 8; constant after.
    np.testing.assert_allclose([schedule(t) for t in (0, 1, 4, 8, 12, 99)], [0, 0.125, 0.5, 0.3, 0.1, 0.1], rtol=1e-6)


def test_warm_up_longer_than_the_run_still_ends_in_the_peak() -> None:
    run, _ = setting("sft", optimizer__warmup=100, optimizer__lr=0.5)
    _, schedule = step.make_optimizer(run.config, 3)
    np.testing.assert_allclose([schedule(t) for t in (0, 1, 2)], [0, 0.25, 0.5], rtol=1e-6)
    assert step.make_optimizer(run.config, 1)[1](0) == 0.5


def test_large_gradients_are_clipped_to_the_norm() -> None:
    run, _ = setting("sft", optimizer__eps=1.0, optimizer__b1=0.0, optimizer__b2=0.0, optimizer__weight_decay=0.0)
    optimizer, schedule = step.make_optimizer(run.config, 20)
    params = {"w": jnp.zeros(2)}
    # Norm 50 is scaled to 1: (0.6, 0.8). With b1 = b2 = 0 and eps = 1 Adam's step is g / (|g| + 1).
    updates, _ = optimizer.update({"w": jnp.asarray([30.0, 40.0])}, optimizer.init(params), params)
    np.testing.assert_allclose(updates["w"], [-0.01 * 0.6 / 1.6, -0.01 * 0.8 / 1.8], rtol=1e-5)
    assert float(schedule(0)) == pytest.approx(0.01)


def test_hash_changes_with_any_leaf_and_not_with_order() -> None:
    tree = {"b": jnp.arange(3.0), "a": {"y": jnp.zeros((2, 2)), "x": jnp.ones(1)}}
    known = step.params_hash(tree)
    assert known == step.params_hash({"a": {"x": np.ones(1, np.float32), "y": np.zeros((2, 2), np.float32)}, "b": np.arange(3.0, dtype=np.float32)})
    changed = [
        tree | {"b": tree["b"].at[2].add(1e-6)},
        tree | {"b": -tree["b"]},  # -0.0 is not 0.0
        tree | {"a": tree["a"] | {"y": jnp.zeros((4, 1))}},
        tree | {"a": tree["a"] | {"x": jnp.ones(1, jnp.bfloat16)}},
        tree | {"a": {"y": tree["a"]["y"], "z": tree["a"]["x"]}},
        {"b": tree["b"]},
    ]
    assert len({known, *map(step.params_hash, changed)}) == 1 + len(changed)


def test_metrics_count_tokens_and_predictions() -> None:
    run, method, optimizer, advance = adam("sft")
    state, base = begin(run, method, optimizer)
    batch = batches("sft", 1)[0]
    _, metrics = advance(state, base, batch, KEY)
    dialogues = helpers.examples(0)
    assert metrics["tokens"] == sum(map(len, dialogues))
    assert metrics["predicted"] == sum(e.predicted.sum() for e in dialogues)
    assert metrics["loss"] == metrics["lm"] and all(v.dtype == jnp.float32 for v in metrics.values())


def test_flops_by_hand() -> None:
    base = {"embed": jnp.zeros((10, 3)), "head": jnp.zeros((3, 10))}
    trainable = {"lora": {"q": {"a": jnp.zeros((1, 3, 2)), "b": jnp.zeros((1, 2, 3))}}, "tower": {"rows": jnp.zeros((9, 3))}}
    # Frozen: 30 kernel entries forward and back, 4 each; trained: 12 at 6 each; look-ups nothing.
    assert step.step_flops(trainable, base, 5) == 5 * (30 * 4 + 12 * 6)
