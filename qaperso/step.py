"""One optimiser step as one jitted, donated, pure function."""

from __future__ import annotations

import functools
import hashlib
import math
from collections.abc import Callable
from types import ModuleType
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float

from qaperso import arrays
from qaperso.errors import UserError
from qaperso.mesh import host_copy
from qaperso.methods import Setting
from qaperso.models import quantized

Tree = Any
DEAD_PARAMETER_STEPS = 20
# Accepted updates whose gradient norms say what the next one's may be.
SPIKE_WINDOW = 32
# Parameters that weight decay leaves alone: norms, biases, gates and anything else that is not a matrix.
NO_DECAY = ("norm", "bias", "alpha")


@flax.struct.dataclass
class TrainState:
    """Everything needed to continue bit for bit.

    Attributes:
      step: int32, steps done (skipped ones included).
      trainable: what the optimiser sees.
      optimizer: its state.
      memory: state of the method that no gradient reaches.
      largest: per trainable (and layer) the largest |gradient| so far, for the dead-parameter check.
      skipped: int32, updates left out: loss or gradient not finite, or a spike.
    """

    step: Any
    trainable: Tree
    optimizer: Tree
    memory: Tree
    largest: Tree
    skipped: Any


def make_optimizer(config: Any, steps: int) -> tuple[optax.GradientTransformation, optax.Schedule]:
    """AdamW (arXiv 1711.05101) behind global-norm clipping; linear warm-up, then cosine to `final` of the peak.

    With `spike` what `train_step` knows a spike by comes first.
    """
    o = config.optimizer
    warmup = min(o.warmup, max(steps - 1, 0))
    schedule = optax.warmup_cosine_decay_schedule(0.0, o.lr, warmup, max(steps, warmup + 1), o.lr * o.final)
    decay = optax.adamw(schedule, b1=o.b1, b2=o.b2, eps=o.eps, weight_decay=o.weight_decay, mask=decayed)
    first = (watch_norms(o.spike),) if o.spike else ()
    return optax.chain(*first, optax.clip_by_global_norm(o.clip), decay), schedule


class Norms(NamedTuple):
    """State of `watch_norms`.

    Attributes:
      recent: float32[SPIKE_WINDOW], gradient norms of the last accepted updates, the newest last; 0 = none yet.
      norm_limit: float32, what the next one's may be at most; 0 = whatever it is, until `recent` is full.
    """

    recent: Any
    norm_limit: Any


def watch_norms(factor: float) -> optax.GradientTransformation:
    """Leaves gradients as they are, and keeps `factor` times the median of recent norms as the limit of the next (ours).

    Norms are those before clipping. A median, since one large norm that was within the limit must not move it; only
    accepted updates count, since `train_step` keeps the old state for others.
    """

    def update(gradient: Tree, state: Norms, params: Tree | None = None) -> tuple[Tree, Norms]:
        recent = jnp.append(state.recent[1:], optax.tree.norm(gradient))
        return gradient, Norms(recent, jnp.where(recent[0] > 0, factor * jnp.median(recent), 0.0))

    return optax.GradientTransformation(lambda _: Norms(jnp.zeros(SPIKE_WINDOW), jnp.zeros(())), update)


def decayed(trainable: Tree) -> Tree:
    """Which leaves weight decay applies to: matrices, by name, not by rank (stacked norms have two dimensions)."""
    return jax.tree_util.tree_map_with_path(
        lambda path, _: not any(word in arrays.path_name(path[-1:]) for word in NO_DECAY), trainable
    )


def init_state(optimizer: optax.GradientTransformation, trainable: Tree, memory: Tree) -> TrainState:
    """State before the first step."""
    largest = jax.tree_util.tree_map_with_path(lambda p, x: jnp.zeros(_check_shape(p, x)), trainable)
    # Two zeros, not one twice: the step donates its state, and a buffer can be donated once only.
    step, skipped = jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32)
    return TrainState(step, trainable, optimizer.init(trainable), memory, largest, skipped)


def state_shardings(optimizer: optax.GradientTransformation, trainable: Tree, memory: Tree, mesh: Mesh) -> TrainState:
    """Where each part of the state lives: moments with their parameters, counters everywhere.

    Without it the compiler would choose, differently for the first and the second step.
    """
    whole = NamedSharding(mesh, PartitionSpec())
    place = jax.tree.map(lambda x: x.sharding if isinstance(x.sharding, NamedSharding) else whole, (trainable, memory))
    shape = jax.eval_shape(functools.partial(init_state, optimizer), trainable, memory)
    moments = optax.tree.map_params(
        optimizer, lambda _, s: s, shape.optimizer, place[0], transform_non_params=lambda _: whole
    )
    largest = jax.tree.map(lambda _: whole, shape.largest)
    return TrainState(whole, place[0], moments, place[1], largest, whole)


def _check_shape(path: tuple, x: Any) -> tuple[int, ...]:
    """Stacked leaves are checked layer by layer."""
    names = arrays.path_name(path).split("/")
    stacked = any(n in ("layers", "lora", "specific") for n in names)
    return x.shape[:1] if stacked else ()


def gradients(
    setting: Setting,
    method: ModuleType,
    state: TrainState,
    base: Tree,
    batch: Tree,
    key: jax.Array,
    place: Tree | None = None,
) -> tuple[Tree, dict[str, Float[Array, ""]], Tree]:
    """The gradient of K micro-batches.

    Where a method compares dialogues of different micro-batches (`joint`), gradients are cached (Gao et al., arXiv
    2101.06983): a first pass makes all representations and the gradient to them, a second one for each micro-batch takes it
    on to the parameters. It costs K forward passes without logits; with K = 1 there is one pass only.

    Args:
      setting, method: static.
      state: of training; what is trained, the memory and the step are read.
      base: frozen parameters, {} when everything is trained.
      batch: a Batch with leaves [K, ...].
      key: of the run; the step's number is folded in.
      place: static, shardings of the trainables, for their gradients. Left to itself the compiler sums whole gradients on
        every device and then cuts them.

    Returns:
      The gradient; float32 scalars: the losses (means), `loss`, and `predicted`, how many tokens were; and what the method
      remembers of each micro-batch.
    """
    count = jax.tree.leaves(batch)[0].shape[0]
    keys = jax.vmap(lambda i: jax.random.fold_in(jax.random.fold_in(key, state.step), i))(jnp.arange(count))
    term_weights = method.weights(setting)
    counts = jax.tree.map(lambda c: jnp.maximum(c, 1), method.counts(setting, batch, state.memory))
    joint = method.joint(setting)

    def forward(trainable: Tree, micro: Tree, micro_key: jax.Array) -> tuple[dict[str, Array], Tree]:
        return method.loss(setting, trainable, trainable.get("base", base), micro, state.memory, micro_key)

    def weighted(sums: dict[str, Array]) -> tuple[Array, dict[str, Array]]:
        means = {name: x / counts[name] for name, x in sums.items()}
        loss = sum((term_weights[name] * mean for name, mean in means.items()), jnp.zeros(()))
        zeros = {name: jnp.zeros(()) for name in term_weights}
        return loss, zeros | means | {"loss": loss}

    def objective(trainable: Tree, micro: Tree, micro_key: jax.Array, pull: Tree) -> tuple[Array, tuple]:
        sums, update = forward(trainable, micro, micro_key)
        if joint and count == 1:
            sums |= joint(jax.tree.map(lambda x: x[None], update), batch)
        loss, found = weighted(sums)
        # Its gradient to the representations is `pull`. No dot product, which TPUs would round.
        return loss + sum((update[name] * pull[name]).sum() for name in pull), (found, update)

    def accumulate(total: Tree, scanned: tuple) -> tuple[Tree, Tree]:
        (_, (found, update)), gradient = jax.value_and_grad(objective, has_aux=True)(state.trainable, *scanned)
        gradient = gradient if place is None else jax.lax.with_sharding_constraint(gradient, place)
        return jax.tree.map(jnp.add, total, (gradient, found)), update

    pull, known = {}, weighted({})[1]
    if joint and count > 1:
        given = jax.lax.map(lambda scanned: forward(state.trainable, *scanned)[1], (batch, keys))
        (_, known), pull = jax.value_and_grad(lambda x: weighted(joint(x, batch)), has_aux=True)(given)
    start = (jax.tree.map(jnp.zeros_like, state.trainable), known)
    (gradient, metrics), update = jax.lax.scan(accumulate, start, (batch, keys, pull))
    return gradient, metrics | {"predicted": counts["lm"]}, update


def train_step(
    setting: Setting,
    method: ModuleType,
    optimizer: optax.GradientTransformation,
    state: TrainState,
    base: Tree,
    batch: Tree,
    key: jax.Array,
    place: Tree | None = None,
) -> tuple[TrainState, dict[str, Float[Array, ""]]]:
    """One update from K micro-batches.

    Args:
      setting, method, base, batch, key, place: see `gradients`.
      optimizer: static.
      state: donated.

    Returns:
      The new state, and float32 scalars: those of `gradients`, `grad_norm`, `tokens`, `finite`, `skipped`, and `norm_limit`
      where the optimiser watches norms. Where loss or gradient norm is not finite, or the norm above that limit, the
      parameters, moments and memory stay as they were.
    """
    gradient, metrics, update = gradients(setting, method, state, base, batch, key, place)
    norm, limit = optax.tree.norm(gradient), optax.tree.get(state.optimizer, "norm_limit")
    finite = jnp.isfinite(metrics["loss"]) & jnp.isfinite(norm)
    good = finite if limit is None else finite & ((limit == 0) | (norm <= limit))
    updates, moments = optimizer.update(gradient, state.optimizer, state.trainable)
    new = (optax.apply_updates(state.trainable, updates), moments, method.remember(setting, state.memory, update))
    old = (state.trainable, state.optimizer, state.memory)
    trainable, moments, memory = jax.tree.map(lambda n, o: jnp.where(good, n, o), new, old)
    largest = jax.tree.map(
        lambda m, g: jnp.where(good, jnp.maximum(m, jnp.abs(g).reshape(*m.shape, -1).max(-1)), m),
        state.largest,
        gradient,
    )
    skipped = state.skipped + (~good).astype(jnp.int32)
    metrics |= {"grad_norm": norm, "tokens": (batch.inputs.segment > 0).sum().astype(jnp.float32)}
    metrics |= {"finite": finite.astype(jnp.float32), "skipped": skipped.astype(jnp.float32)}
    metrics |= {} if limit is None else {"norm_limit": limit}
    return TrainState(state.step + 1, trainable, moments, memory, largest, skipped), metrics


def start(
    setting: Setting,
    method: ModuleType,
    optimizer: optax.GradientTransformation,
    trainable: Tree,
    memory: Tree,
    mesh: Mesh,
) -> tuple[TrainState, Callable]:
    """The state before the first step, and the step as one program.

    Args:
      setting, method, optimizer: of the run.
      trainable, memory: first values, on the mesh.
      mesh: of the devices.

    Returns:
      The state, and the jitted (state, base, batch, key) -> (state, metrics) of `train_step`, which donates the state and
      leaves each part of it where it was.
    """
    spread = state_shardings(optimizer, trainable, memory, mesh)
    state = jax.jit(functools.partial(init_state, optimizer), out_shardings=spread)(trainable, memory)
    return state, program(setting, method, optimizer, spread)


def program(setting: Setting, method: ModuleType, optimizer: optax.GradientTransformation, spread: TrainState) -> Any:
    """`train_step` as one jitted program that donates its state and leaves each part of it where `spread` says."""
    function = functools.partial(train_step, setting, method, optimizer, place=spread.trainable)
    return jax.jit(function, donate_argnums=0, out_shardings=(spread, None))


def dead_parameters(largest: Tree) -> list[str]:
    """Names of trainables (and layers) whose gradient has been exactly zero throughout."""
    dead = []
    for name, value in arrays.flat(largest).items():
        value = np.asarray(value)
        if value.ndim == 0 and value == 0:
            dead.append(name)
        elif value.ndim and (value == 0).all():
            dead.append(f"{name} (every layer)")
        elif value.ndim:
            dead += [f"{name} (layer {i})" for i in np.flatnonzero(value == 0)]
    return dead


def check_alive(largest: Tree, steps: int) -> None:
    """Stops a run that declares a trainable no gradient reaches.

    Args:
      largest: see `TrainState`.
      steps: how many have been made.

    Raises:
      UserError: naming parameters and layers.
    """
    if dead := dead_parameters(largest):
        raise UserError(
            f"no gradient reached {', '.join(dead[:6])}{' and more' if len(dead) > 6 else ''} in the first "
            f"{steps} steps; a trainable that cannot learn is a mistake in method or data: mend its loss term (is its weight 0?), "
            "or do not declare it"
        )


def params_hash(trainable: Tree) -> str:
    """sha256 over the trainable leaves in key order: name, dtype, shape, bytes.

    Where parts of a leaf lie on other hosts all of them must ask.
    """
    digest = hashlib.sha256()
    for name, leaf in sorted(arrays.flat(trainable).items()):
        value = host_copy(leaf)
        digest.update(f"{name} {value.dtype} {value.shape}\n".encode())
        digest.update(np.ascontiguousarray(value).tobytes())
    return digest.hexdigest()


def step_flops(trainable: Tree, base: Tree) -> tuple[float, float]:
    """Model FLOPs of a training step, for each token and for each prediction.

    2 a kernel's entry forward and 2 backward through activations, 2 more for the gradient of a trained one. The output
    table, tied or not, works where something is predicted only; look-ups, the contrast's heads, PPlug's embedder and
    attention's scores count nothing, and what is recomputed or applied by two towers counts once.
    """
    frozen, trained = arrays.flat(base, quantized.is_quantized), arrays.flat(trainable)
    last = {name: name.rsplit("/", 1)[-1] for name in (*frozen, *trained)}
    output = "head" if "head" in last.values() else "embed"
    token = prediction = 0.0
    for leaves, each in ((frozen, 4.0), (trained, 6.0)):
        for name, x in leaves.items():
            if last[name] == output:
                prediction += each * math.prod(x.shape)
            elif last[name] not in ("embed", "rows") and not name.startswith(("heads/", "plug/")):
                token += each * math.prod(x.shape)
    return token, prediction
