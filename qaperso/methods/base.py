"""Defaults of the method interface: plain language-model fine-tuning of whatever `declare` gives."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from types import ModuleType
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int

from qaperso import losses
from qaperso.arrays import gather_table
from qaperso.data.store import Store
from qaperso.methods import Setting
from qaperso.models import decoder, lora, towers
from qaperso.models.attention import segments
from qaperso.models.decoder import Adapters
from qaperso.models.linear import working
from qaperso.types import Batch, Dialogue, Inputs, Turn

Tree = Any


def reads_history(setting: Setting) -> bool:
    """Whether `preface` needs the run's data."""
    return False


def preface(
    setting: Setting, store: Store | None, dialogue: Dialogue, name: str, size: Callable[[Turn], int]
) -> Sequence[Turn]:
    """The turns that stand before the dialogue's own: no part of it, never learned, always template.

    A long dialogue is asked for each of its replies, cut off after it.

    Args:
      setting: of the run.
      store: the run's data; None where `reads_history` says that it is not needed.
      dialogue: its last turn is the reply, which must not be looked at; () for `replies`.
      name: what the querier is to be called: their own name, but where another's history is told under it.
      size: how many tokens a turn takes.

    Returns:
      Turns whose speakers are called as given; "system" for instructions. Together at most `preface_tokens`.
    """
    return ()


def preface_tokens(setting: Setting) -> int:
    """How many tokens of a row are kept for `preface`, so that a dialogue's own turns have what is left, as elsewhere."""
    return 0


@runtime_checkable
class Reader(Protocol):
    """What a method looks things up with for each dialogue.

    Attributes:
      places: how many soft tokens stand before each dialogue's own.
    """

    places: int

    def columns(self, dialogue: Dialogue) -> Mapping[str, Any]:
        """What the step is to know of a dialogue whose last turn is the (blank) reply, see `types.Example`.

        Of one shape and dtype by name, whatever the dialogue.
        """

    def start(self, values: Tree) -> Tree:
        """First values of the trainable tree, where some are not those declared."""

    def over(self, store: Store) -> Reader:
        """The same over other data, such as those with dialogues that took place since."""

    def summary(self) -> str:
        """One sentence on what is kept."""


def reader(setting: Setting, store: Store | None, tokenizer: Any, table: Callable[[], np.ndarray]) -> Reader | None:
    """What the run's dialogues are looked up with; None where the method looks nothing up.

    Args:
      setting: of the run.
      store: the run's data, where `reads_history` says that they are needed.
      tokenizer: of the base.
      table: gives the base's token embeddings, float32[V, D].
    """
    return None


def open_reader(
    setting: Setting, method: ModuleType, store: Store | None, tokenizer: Any, base: Tree, mesh: Mesh
) -> tuple[Setting, Reader | None]:
    """A method's reader, and the setting with what soft tokens are measured by; see `reader` and `Setting`."""

    def table() -> np.ndarray:
        whole = NamedSharding(mesh, PartitionSpec())
        return np.asarray(jax.jit(lambda x: x.astype(jnp.float32), out_shardings=whole)(base["embed"]))

    found = method.reader(setting, store, tokenizer, table)
    if found is None:
        return setting, None
    norm = jax.jit(lambda x: jnp.linalg.norm(x.astype(jnp.float32), axis=-1).mean())(base["embed"])
    return dataclasses.replace(setting, norm=float(norm)), found


def declare(setting: Setting) -> tuple[Tree, Tree]:
    """Declares the trainable tree and the memory tree (state that no gradient reaches).

    With trainable = "all" the base is part of the trainable tree, under "base", and there are no adapters.
    """
    config = setting.config
    if config.trainable == "all":
        return {"base": decoder.declare(setting.model)}, {}
    return {"lora": lora.declare(setting.model, config.lora.rank)}, {}


def condition(setting: Setting, params: Tree, inputs: Inputs) -> Adapters:
    """What the forward pass adds to the base for these inputs."""
    if "lora" not in params:
        return Adapters()
    return Adapters(lora=lora.scaled(params["lora"], setting.config.lora.alpha, setting.config.lora.rank))


def embedded(setting: Setting, base: Tree, inputs: Inputs, adapters: Adapters) -> Float[Array, "1 B S D"]:
    """What the first layer reads: token embeddings, and soft tokens where the method has such."""
    x = decoder.embed(base, inputs.tokens, working(setting.config.dtype))
    return decoder.place(x, adapters.soft, inputs.segment, inputs.position)


def states(
    setting: Setting, base: Tree, inputs: Inputs, adapters: Adapters, key: jax.Array | None = None
) -> Float[Array, "W B S D"]:
    """Last layer's states of each tower, before any final norm. A key switches dropout on."""
    config = setting.config
    x = embedded(setting, base, inputs, adapters)
    seen = segments(inputs.segment, inputs.attend)
    kept = dict(remat=config.remat, dropout=config.lora.dropout, key=key)
    return decoder.run(base, x, inputs.position, seen, setting.model, adapters, **kept)


def token_losses(
    setting: Setting, params: Tree, base: Tree, batch: Batch, states: Float[Array, "W B S D"]
) -> Float[Array, "B T"]:
    """Negative log-likelihood of each predicted token in nats, 0 where nothing is predicted."""
    picked = jnp.take_along_axis(states, batch.target_index[None, :, :, None], 2)
    hidden = towers.join(params.get("tower", {}), base, picked, setting.model)
    return losses.cross_entropy(hidden, gather_table(decoder.head(base)), batch.target, batch.weight)


def dialogue_losses(batch: Batch, per_token: Float[Array, "B T"]) -> tuple[Float[Array, "B M"], Float[Array, "B M"]]:
    """Sums of the tokens' losses and counts of tokens for each dialogue."""
    number = jnp.arange(1, batch.inputs.present.shape[1] + 1)
    segment = jnp.take_along_axis(batch.inputs.segment, batch.target_index, 1)
    mine = (segment[..., None] == number).astype(per_token.dtype)
    return jnp.einsum("bt,btm->bm", per_token, mine), jnp.einsum("bt,btm->bm", batch.weight, mine)


def weights(setting: Setting) -> dict[str, float]:
    """Weight of each loss term in the total."""
    return {"lm": 1.0}


def counts(setting: Setting, batch: Batch, memory: Tree) -> dict[str, Float[Array, ""]]:
    """Denominator of each loss term; must not depend on parameters. Leaves of `batch` are [K, ...], of all micro-batches."""
    return {"lm": batch.weight.sum()}


def loss(
    setting: Setting, params: Tree, base: Tree, batch: Batch, memory: Tree, key: jax.Array | None
) -> tuple[dict[str, Float[Array, ""]], Tree]:
    """Numerator of each loss term, and what `remember` is to write into memory and `joint` to compare."""
    hidden = states(setting, base, batch.inputs, condition(setting, params, batch.inputs), key)
    per_token = token_losses(setting, params, base, batch, hidden)
    return {"lm": per_token.sum()}, {}


def joint(setting: Setting) -> Callable[[Tree, Batch], dict[str, Float[Array, ""]]] | None:
    """The loss terms that compare dialogues of different micro-batches with each other; None where there are none.

    Returns:
      (what `loss` gave out, float leaves [K, ...]; batch, leaves [K, ...]) -> numerators.
    """
    return None


def remember(setting: Setting, memory: Tree, update: Tree) -> Tree:
    """The memory after a step; `update` has the micro-batches' updates on a leading axis."""
    return memory


def embeddings(
    setting: Setting, params: Tree, inputs: Inputs, states: Float[Array, "W B S D"]
) -> tuple[Float[Array, "B M D"], Int[Array, "B M"]] | None:
    """Dialogue embeddings and their numbers of responder tokens, where the method has such."""
    return None
