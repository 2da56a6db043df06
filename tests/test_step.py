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
from jax.sharding import NamedSharding, PartitionSpec

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


# Slow: that of the batch has a faster test on eight devices below.
@pytest.mark.parametrize("name", ["prototypes", pytest.param("in_batch", marks=pytest.mark.slow)])
def test_micro_batches_are_one_batch(name: str) -> None:
    """Within the batch too, whose dialogues find their partners in the other micro-batch."""
    run, method, optimizer, advance = adam(name)
    state, base = begin(run, method, optimizer)
    before, half = jax.tree.map(np.array, state.trainable), dataclasses.replace(helpers.SHAPE, rows=4)
    twice = helpers.stepper(run, method, optimizer)
    split, whole = state, jax.tree.map(jnp.copy, state)
    for seed in range(2):
        rows = helpers.rows_of(helpers.examples(seed), 3)
        flags = helpers.rows_of([i % 3 > 0 for i in range(24)], 3)
        one = helpers.stack([make_batch(rows, helpers.SHAPE, flags, name)])
        two = helpers.stack([make_batch(rows[k : k + 4], half, flags[k : k + 4], name) for k in (0, 4)])
        whole, expected = advance(whole, base, one, KEY)
        split, found = twice(split, base, two, KEY)
        helpers.assert_trees_close(found, expected, atol=1e-5, rtol=1e-5)
        for part in ("trainable", "optimizer", "memory", "largest"):
            helpers.assert_trees_close(getattr(split, part), getattr(whole, part), atol=1e-5, rtol=1e-5)
    assert expected["contrast"] > 0.1, "the memory of the first step makes the second step's contrast"
    moved = jax.tree.map(lambda a, b: bool((a != b).any()), before, whole.trainable)
    assert all(jax.tree.leaves(moved))


@pytest.mark.slow
def test_cached_gradients_are_those_through_all_micro_batches_at_once() -> None:
    """With dropout, whose draws both passes over a micro-batch must share."""
    run, method = setting("in_batch", lora__dropout=0.3)
    seen = optax.GradientTransformation(lambda params: params, lambda gradient, *_: (gradient, gradient))
    state, base = begin(run, method, seen)
    batch = helpers.device(jax.tree.map(lambda x: x.reshape(2, 4, *x.shape[2:]), batches("in_batch", 1)[0]))
    after, metrics = helpers.stepper(run, method, seen)(state, base, batch, KEY)

    def whole(trainable: dict, key: jax.Array) -> jax.Array:
        found = [
            method.loss(run, trainable, base, jax.tree.map(lambda x, k=k: x[k], batch), {}, jax.random.fold_in(key, k))
            for k in (0, 1)
        ]
        sums = {"lm": found[0][0]["lm"] + found[1][0]["lm"]}
        sums |= method.joint(run)(jax.tree.map(lambda *x: jnp.stack(x), found[0][1], found[1][1]), batch)
        counts = method.counts(run, batch, {})
        return sum(weight * sums[name] / counts[name] for name, weight in method.weights(run).items())

    key = jax.random.fold_in(KEY, 0)
    value, gradient = jax.jit(jax.value_and_grad(whole))(state.trainable, key)
    np.testing.assert_allclose(metrics["loss"], value, rtol=1e-5)
    helpers.assert_trees_close(after.optimizer, gradient, atol=1e-5, rtol=1e-5)
    assert abs(float(value) - float(jax.jit(whole)(state.trainable, jax.random.key(7)))) > 1e-3, "dropout is on"


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


def run_three(name: str, advance: Any, state: step.TrainState, base: dict, place: Any) -> tuple[np.ndarray, dict]:
    """Metrics of three steps, a row each that starts with the loss, and the trained parameters."""
    rows = []
    for batch in batches(name, 3):
        state, metrics = advance(state, base, place(batch), KEY)
        rows.append([float(metrics[n]) for n in ["loss", *sorted(metrics)]])
    return np.array(rows), jax.tree.map(np.array, state.trainable)


def on_mesh(name: str, sizes: tuple[int, int, int], micro: int) -> tuple[np.ndarray, dict]:
    """`run_three` on eight devices, parameters and batches, cut into so many micro-batches, spread over them."""

    def cut(batch: Batch) -> Batch:
        return jax.tree.map(lambda x: x.reshape(micro, -1, *x.shape[2:]), batch)

    run, method, optimizer, _ = adam(name)
    state, base = begin(run, method, optimizer)
    made = mesh.make_mesh(*sizes)
    place = functools.partial(arrays.shardings, mesh=made, rules=RULES)
    trainable, memory = (
        jax.device_put(tree, place(specs))
        for tree, specs in zip((state.trainable, state.memory), method.declare(run), strict=True)
    )
    base = jax.device_put(base, place(decoder.declare(run.model)))
    state = step.init_state(optimizer, trainable, memory)
    # Moments follow their parameters; counters and the like are whole everywhere.
    whole = NamedSharding(made, PartitionSpec())
    spread = jax.tree.map(lambda x: x.sharding if isinstance(x.sharding, NamedSharding) else whole, state)
    moments = arrays.flat(spread.optimizer)["1/0/mu/lora/q/a"]
    assert moments.spec == (PartitionSpec(None, "fsdp", None) if sizes[1] > 1 else moments.spec)
    # Without output shardings the compiler may choose others than the input's, and the second step compiles again.
    advance = step.program(run, method, optimizer, spread)
    with jax.set_mesh(made):
        result = run_three(
            name, advance, jax.device_put(state, spread), base, lambda b: mesh.put_batch(cut(b), made, 1)
        )
    assert advance._cache_size() == 1
    return result


@functools.cache
def on_one_device(name: str) -> tuple[np.ndarray, dict]:
    run, method, optimizer, advance = adam(name)
    return run_three(name, advance, *begin(run, method, optimizer), lambda batch: batch)


@pytest.mark.parametrize(
    "name, sizes, micro",
    [("sft", (8, 1, 1), 1), ("in_batch", (2, 2, 2), 2), ("prototypes", (1, 4, 2), 1)],
)
def test_eight_devices_are_one(name: str, sizes: tuple[int, int, int], micro: int) -> None:
    """Losses and parameters; two micro-batches on eight devices are one batch on one."""
    expected, alone = on_one_device(name)
    found, trained = on_mesh(name, sizes, micro)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
    assert len(np.unique(expected[:, 0])) == 3 and np.ptp(expected[:, 0]) > 1e-2, "the steps differ"
    helpers.assert_trees_close(trained, alone, atol=1e-5, rtol=1e-5)


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
    kept = jax.tree.map(np.array, state)
    after, metrics = advance(state, base, bad, KEY)
    assert not np.isfinite(metrics["loss"]) and metrics["finite"] == 0 and metrics["skipped"] == 1
    for part in ("trainable", "optimizer", "memory", "largest"):
        helpers.assert_trees_equal(getattr(after, part), getattr(kept, part))
    assert (int(after.step), int(after.skipped)) == (2, 1)
    if where == "batch":
        # The next good batch is an update again.
        last, metrics = advance(after, base, second, KEY)
        assert metrics["finite"] == 1 and (int(last.step), int(last.skipped)) == (3, 1)
        assert step.params_hash(last.trainable) != step.params_hash(kept.trainable)


def test_a_spike_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """The limit is three medians of the last three norms; neither NaN nor the spike becomes one of them."""
    monkeypatch.setattr(step, "SPIKE_WINDOW", 3)
    run, method = setting("prototypes", optimizer__spike=3.0, optimizer__lr=0.0)
    optimizer, _ = step.make_optimizer(run.config, step.DEAD_PARAMETER_STEPS)
    advance, norms = helpers.stepper(run, method, optimizer, donate_argnums=0), []
    state, base = begin(run, method, optimizer)
    for batch in batches("prototypes", 3):
        state, metrics = advance(state, base, batch, KEY)
        assert metrics["norm_limit"] == 0 and metrics["skipped"] == 0
        norms.append(metrics["grad_norm"])
    good = batches("prototypes", 1)[0]
    signs = np.where(np.arange(good.weight.size) % 2, -1000, 1000).reshape(good.weight.shape)
    for skipped, factor in ((1, np.nan), (2, signs)):
        kept = jax.tree.map(np.array, state)
        state, metrics = advance(state, base, good.replace(weight=(good.weight * factor).astype(np.float32)), KEY)
        assert metrics["norm_limit"] == np.float32(3) * np.median(norms)
        assert metrics["skipped"] == skipped and metrics["finite"] == skipped - 1
        for part in ("trainable", "optimizer", "memory", "largest"):
            helpers.assert_trees_equal(getattr(state, part), getattr(kept, part))
        assert (int(state.step), int(state.skipped)) == (3 + skipped, skipped)
    assert metrics["grad_norm"] > metrics["norm_limit"]
    # The next good batch is an update again.
    state, metrics = advance(state, base, good, KEY)
    assert metrics["skipped"] == 2 and int(state.step) == 6
    recent = optax.tree.get(state.optimizer, "recent")
    np.testing.assert_array_equal(recent, [*norms[1:], metrics["grad_norm"]])


def test_norms_are_watched_only_where_that_is_asked_for() -> None:
    params = {"w": jnp.ones(2)}
    plain, watched = (
        step.make_optimizer(setting("sft", optimizer__spike=spike)[0].config, 20)[0].init(params)
        for spike in (0.0, 9.0)
    )
    assert optax.tree.get(plain, "norm_limit") is None and len(plain) == 2
    assert jax.tree.structure(watched[1:]) == jax.tree.structure(plain)


def test_watched_norms_are_whole_on_every_device() -> None:
    run, method = setting("sft", optimizer__spike=9.0)
    optimizer, _ = step.make_optimizer(run.config, 20)
    trainable, _, memory = helpers.build(run, method)
    spread = step.state_shardings(optimizer, trainable, memory, mesh.make_mesh(2, 2, 2))
    assert {optax.tree.get(spread.optimizer, name).spec for name in step.Norms._fields} == {PartitionSpec()}


@pytest.mark.parametrize("name", RUNS)
def test_a_healthy_run_has_no_dead_parameters_and_compiles_once(name: str) -> None:
    run, method, optimizer, advance = adam(name)
    trainable, base, memory = helpers.build(run, method)
    state, base_hash = step.init_state(optimizer, trainable, memory), step.params_hash(base)
    before = step.params_hash(trainable)
    data, seen = batches(name, 4), []
    for t in range(step.DEAD_PARAMETER_STEPS):
        state, metrics = advance(state, base, data[t % 4], KEY)
        seen.append(float(metrics["lm"]))
        if t == 0:
            # LoRA's a faces a b of zero: rightly without gradient so far, and not yet to be judged.
            assert "lora/q/a (every layer)" in step.dead_parameters(state.largest)
    step.check_alive(state.largest, step.DEAD_PARAMETER_STEPS)
    assert advance._cache_size() == 1
    assert step.params_hash(base) == base_hash and step.params_hash(state.trainable) != before
    assert state.step == step.DEAD_PARAMETER_STEPS
    # Every batch is easier the fifth time than the first.
    assert all(late < early for early, late in zip(seen[:4], seen[-4:], strict=True))


def test_dead_heads_are_named() -> None:
    run, method = setting("in_batch", qar__weight=0.0)
    state, base = begin(run, method, optax.sgd(0.1))
    advance = helpers.stepper(run, method, optax.sgd(0.1))
    for batch in batches("in_batch", 2):
        state, _ = advance(state, base, batch, KEY)
    assert step.dead_parameters(state.largest) == ["heads/bias", "heads/kernel", "heads/norm_p"]
    with pytest.raises(
        UserError, match="no gradient reached heads/bias, heads/kernel, heads/norm_p in the first 20 steps"
    ):
        step.check_alive(state.largest, 20)


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
        step.check_alive({n: jnp.zeros(()) for n in "abcdefgh"} | {"z": jnp.ones(())}, 20)


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
    run, _ = setting(
        "sft", optimizer__lr=0.01, optimizer__eps=1.0, optimizer__b1=0.0, optimizer__b2=0.0, optimizer__weight_decay=0.0
    )
    optimizer, schedule = step.make_optimizer(run.config, 20)
    params = {"w": jnp.zeros(2)}
    # Norm 50 is scaled to 1: (0.6, 0.8). With b1 = b2 = 0 and eps = 1 Adam's step is g / (|g| + 1).
    updates, _ = optimizer.update({"w": jnp.asarray([30.0, 40.0])}, optimizer.init(params), params)
    np.testing.assert_allclose(updates["w"], [-0.01 * 0.6 / 1.6, -0.01 * 0.8 / 1.8], rtol=1e-5)
    assert float(schedule(0)) == pytest.approx(0.01)


def test_hash_changes_with_any_leaf_and_not_with_order() -> None:
    tree = {"b": jnp.arange(3.0), "a": {"y": jnp.zeros((2, 2)), "x": jnp.ones(1)}}
    known = step.params_hash(tree)
    assert known == step.params_hash(
        {"a": {"x": np.ones(1, np.float32), "y": np.zeros((2, 2), np.float32)}, "b": np.arange(3.0, dtype=np.float32)}
    )
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


@pytest.mark.parametrize("tied", [False, True])
def test_flops_by_hand(tied: bool) -> None:
    base = {"embed": jnp.zeros((10, 3)), "layers": {"q": jnp.zeros((2, 3, 4))}}
    base |= {} if tied else {"head": jnp.zeros((3, 7))}
    trainable = {
        "heads": {"kernel": jnp.zeros((2, 3, 5))},
        "lora": {"q": {"a": jnp.zeros((1, 3, 2)), "b": jnp.zeros((1, 2, 3))}},
        "tower": {"rows": jnp.zeros((9, 3))},
    }
    # A token: 24 frozen kernel entries forward and back, 4 each; 12 trained ones at 6 each. A prediction: the output table.
    assert step.step_flops(trainable, base) == (24 * 4 + 12 * 6, 30 * 4 if tied else 21 * 4)
    assert step.step_flops({"base": base}, {}) == (24 * 6, 30 * 6 if tied else 21 * 6)
