"""Continuous batching: requests come and go while others are under way; all that are share each step.

A request waits for a free slot, has its prompt read, draws with the others and leaves its slot to the next one at once.
Everything that writes replies does it this way: evaluation submits all of its requests at once, chat one, a server each
as it arrives.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import itertools
import math
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qaperso import generate
from qaperso.arrays import BATCH_AXES
from qaperso.data import paper
from qaperso.data.text import Encoded
from qaperso.generate import Request, Sampling, Slots
from qaperso.mesh import host_copy
from qaperso.methods import Setting
from qaperso.models import inference
from qaperso.run import Run
from qaperso.types import Inputs

Tree = Any


@dataclasses.dataclass(frozen=True, eq=False)
class Model:
    """A run ready to reply.

    Attributes:
      run: without its base.
      weights: of the decoder, see `inference.prepare`.
      trained: the trained parameters that requests are worked on by (querier rows, PPlug's embedder); no base, no LoRA.
    """

    run: Run
    weights: Tree
    trained: Tree


@dataclasses.dataclass(frozen=True)
class Progress:
    """What a step brought one request: its new tokens, without end-of-turn, and whether these were its last."""

    handle: int
    tokens: list[int]
    finished: bool


@dataclasses.dataclass(frozen=True)
class _Job:
    handle: int
    prompt: Encoded
    row: int
    sampling: Sampling

    @property
    def length(self) -> int:
        return len(self.prompt.tokens) + self.sampling.new_tokens


def prepare(run: Run, trainable: Tree) -> Model:
    """Makes a run ready to reply, once: adapters merged where that is exact, weights arranged for decoding.

    The model's weights are arrays of their own: drop `run` and `trainable` where nothing else needs them.
    """
    fixed = dict(setting=run.setting, method=run.method, dtype=jnp.dtype(run.config.dtype))
    with jax.set_mesh(run.mesh):
        weights = arrange(trainable, run.params_of(trainable), **fixed)
    trained = {name: tree for name, tree in trainable.items() if name not in ("base", "lora")}
    return Model(dataclasses.replace(run, base={}), weights, trained)


@functools.partial(jax.jit, static_argnames=("setting", "method", "dtype"))
def arrange(trainable: Tree, base: Tree, *, setting: Setting, method: ModuleType, dtype: Any) -> Tree:
    """Weights for `inference`, with everything the method adds that does not depend on the request."""
    nobody = generate.pad([Encoded(*np.zeros((2, 1), np.int32), np.zeros(1, bool))], [0], 1)
    adapters = method.condition(setting, trainable, jax.tree.map(jnp.asarray, nobody))
    return inference.prepare(base, adapters, trainable.get("tower", {}), setting.model, dtype)


@functools.partial(jax.jit, static_argnames=("setting", "method"))
def _added(trained: Tree, inputs: Inputs, *, setting: Setting, method: ModuleType) -> tuple[Any, Any]:
    """Querier rows [n, S, D] and soft tokens [n, P, D] of one prompt a row; None where the method has none."""
    # The rest of what the method adds is in the weights already, and not computed here.
    adapters = method.condition(setting, trained, inputs)
    return adapters.rows, None if adapters.soft is None else adapters.soft[:, 0]


def request(model: Model, prompts: Sequence[Encoded], rows: Sequence[int], samplings: Sequence[Sampling]) -> Request:
    """Prompts as one batch padded to a bucket's length, with what the method adds for their queriers."""
    run = model.run
    inputs = generate.pad(prompts, rows, generate.bucket(max(len(p.tokens) for p in prompts)))
    if run.config.compat == "paper":
        attend = inputs.attend & (inputs.tokens != run.setting.model.eos_ids[0])
        inputs = inputs.replace(attend=attend, position=paper.generation_positions(attend))
    rows, soft = _added(model.trained, inputs, setting=run.setting, method=run.method)
    return Request(
        inputs.replace(columns={}),  # what they were for is done
        rows,
        limit=np.array([s.new_tokens for s in samplings], np.int32),
        temperature=np.array([s.temperature for s in samplings], np.float32),
        top_p=np.array([s.top_p for s in samplings], np.float32),
        seed=np.array([s.seed % 2**32 for s in samplings], np.uint32),
        soft=soft,
    )


class Batcher:
    """A fixed number of slots and the requests that wait for them; for one thread.

    The cache is as long as the longest request under way needs, rounded up to a power of two. Prompts are read one a
    device at a time, padded to a power of two. So programs are compiled for buckets of lengths, and for no other reason.

    `model` may be replaced by one of the same shapes: requests that get a slot from then on are looked up in it.
    """

    def __init__(self, model: Model, slots: int, length: int = 1):
        """Makes `slots` free slots; a multiple of the mesh's devices is spread over them.

        Args:
          model: from `prepare`.
          slots: how many.
          length: of the cache at least; whatever fits it compiles no further step and takes no further memory.
        """
        self.model, self._count, self._length = model, slots, length
        devices = math.prod(model.run.mesh.shape[a] for a in BATCH_AXES)
        self._together = devices if slots % devices == 0 else 1
        self._handles = itertools.count()
        self._waiting: collections.deque[_Job] = collections.deque()
        self._running: dict[int, _Job] = {}
        self._slots: Slots | None = None

    @property
    def free(self) -> int:
        """How many requests more would get a slot at once; negative where so many are waiting."""
        return self._count - len(self._running) - len(self._waiting)

    @property
    def busy(self) -> bool:
        """Whether a request is waiting or under way."""
        return bool(self._running or self._waiting)

    def submit(self, prompt: Encoded, row: int, sampling: Sampling) -> int:
        """Adds a request; it waits where no slot is free.

        Args:
          prompt: at least one token.
          row: of the querier.
          sampling: how its reply is drawn, at least one token.

        Returns:
          Its handle, by which `step` names it.
        """
        job = _Job(next(self._handles), prompt, row, sampling)
        self._waiting.append(job)
        return job.handle

    def cancel(self, handle: int) -> bool:
        """Forgets a request; False where it has finished already. Its slot is free at once."""
        for job in self._waiting:
            if job.handle == handle:
                self._waiting.remove(job)
                return True
        for which, job in self._running.items():
            if job.handle == handle:
                del self._running[which]
                with jax.set_mesh(self.model.run.mesh):
                    self._slots = generate.release(self._slots, np.int32(which))
                return True
        return False

    def step(self, tokens: int = 1) -> list[Progress]:
        """Gives free slots to who waits, then draws up to `tokens` for every request under way.

        Args:
          tokens: 1 to generate.STRIDE; fewer are drawn where a request ends, so that its slot is not idle.

        Returns:
          What each request under way got, in the order of their handles.
        """
        model = self.model
        with jax.set_mesh(model.run.mesh):
            self._admit()
            if not self._running:
                return []
            config = model.run.setting.model
            self._slots, out = generate.advance(model.weights, self._slots, np.int32(tokens), config=config)
            drawn, active = host_copy(out)
        result = []
        for which, job in list(self._running.items()):
            new = drawn[which][drawn[which] >= 0].tolist()
            finished = not active[which]
            if finished:
                del self._running[which]
                if new[-1] in config.eos_ids:
                    new.pop()
            result.append(Progress(job.handle, new, finished))
        return sorted(result, key=lambda p: p.handle)

    def _admit(self) -> None:
        free = [i for i in range(self._count) if i not in self._running]
        chosen = [(i, self._waiting.popleft()) for i in free[: len(self._waiting)]]
        if not chosen:
            return
        self._running.update(chosen)
        length = generate.bucket(max(self._length, *(job.length for job in self._running.values())))
        # Prompts that are read together are of like length.
        chosen.sort(key=lambda c: len(c[1].prompt.tokens))
        for start in range(0, len(chosen), self._together):
            group = chosen[start : start + self._together]
            group += group[-1:] * (self._together - len(group))
            self._insert([i for i, _ in group], [job for _, job in group], length)

    def _insert(self, which: list[int], jobs: list[_Job], length: int) -> None:
        model = self.model
        config = model.run.setting.model
        asked = request(model, [j.prompt for j in jobs], [j.row for j in jobs], [j.sampling for j in jobs])
        cache = generate.prefill(model.weights, asked.inputs, asked.rows, asked.soft, config=config)
        if self._slots is None:
            fixed = dict(config=config, count=self._count, length=length, rows=asked.rows is not None)
            self._slots = generate.empty_slots(model.weights, **fixed)
        elif self._slots.attend.shape[1] != length:
            self._slots = generate.resize(self._slots, length=length)
        self._slots = generate.insert(self._slots, np.array(which, np.int32), asked, cache)
