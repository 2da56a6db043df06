"""PPlug: a querier's history, weighed by the query, becomes soft tokens before the input of a frozen LM (arXiv 2409.11901).

`models/plug.py` has the equations; with `config.pplug.differences` the MLP reads of each item how it differs from what others
got on the same occasion (after DPL, arXiv 2503.02450, with vectors in place of words). History items are embedded once by a
frozen encoder and kept in `config.vectors`; the query is embedded in the step, by a copy of the encoder that is trained with
the rest. No querier has parameters: whoever has a history is served without training. `methods/qar.py` takes the same soft
tokens where `config.pplug.encoder` names an encoder.
"""

from __future__ import annotations

import collections
import copy
import dataclasses
import functools
import hashlib
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from qaperso import arrays
from qaperso.data.features import normalise
from qaperso.data.history import Item, asked, exchanges, items, peers, profile
from qaperso.data.store import Store
from qaperso.data.text import encode_all
from qaperso.data.vectors import Differences, Rows, Vectors
from qaperso.methods import Setting, base
from qaperso.methods.base import counts, embeddings, joint, preface, preface_tokens, remember, weights
from qaperso.models import encoder, plug
from qaperso.models.decoder import Adapters
from qaperso.types import Batch, Dialogue, Inputs

Tree = Any
# The encoder that needs no download: the base's own token embeddings, see `plug.Bag`.
BASE = "base"
# Others, the most recent, that an item is held against.
PEERS = 32


def declare(setting: Setting) -> tuple[Tree, Tree]:
    """The user embedder; the language model stays as it is."""
    return declare_plug(setting), {}


def declare_plug(setting: Setting) -> Tree:
    """{"plug": the user embedder}; {} where no encoder is configured.

    Raises:
      UserError: there is no such encoder.
    """
    pplug, model = setting.config.pplug, setting.model
    if not pplug.encoder:
        return {}
    if pplug.encoder == BASE:
        own, dim = plug.declare_bag(model.vocab, model.embed), model.embed
    else:
        shape = _bert(pplug.encoder).config
        own, dim = encoder.declare(shape), shape.embed
    return {"plug": plug.declare(own, dim, model.embed, pplug.tokens)}


def reads_history(setting: Setting) -> bool:
    """Where an encoder is configured."""
    return bool(setting.config.pplug.encoder)


def condition(setting: Setting, params: Tree, inputs: Inputs) -> Adapters:
    """The soft tokens, and nothing else."""
    return base.condition(setting, params, inputs).replace(soft=soft(setting, params, inputs))


def soft(setting: Setting, params: Tree, inputs: Inputs) -> Float[Array, "B M P D"] | None:
    """Soft tokens of each dialogue, at first as long as the base's token embeddings are on average.

    None where nothing was looked up: no encoder is configured, or the weights alone are asked for.
    """
    if not inputs.columns or "plug" not in params:
        return None
    pplug, own = setting.config.pplug, params["plug"]
    b, m, length = inputs.columns["query"].shape
    tokens = jnp.asarray(inputs.columns["query"]).reshape(b * m, length)
    history = jnp.asarray(inputs.columns["history"], jnp.float32).reshape(b * m, *inputs.columns["history"].shape[2:])
    there, tokens = tokens >= 0, jnp.maximum(tokens, 0)
    if pplug.encoder == BASE:
        query = plug.encode_bag(own["encoder"], tokens, there)
    else:
        # Normalised below, where a vector of 0 does no harm.
        shape = dataclasses.replace(_bert(pplug.encoder).config, normalise=False)
        query = encoder.encode(own["encoder"], tokens, there, shape)
    told = inputs.columns.get("difference")
    if told is not None:
        told = jnp.asarray(told, jnp.float32).reshape(history.shape)
    found = plug.soft_tokens(own, plug.unit(query), history, pplug.temperature, told)
    return (found * (setting.norm / setting.model.embed**0.5)).reshape(b, m, *found.shape[1:])


def forget(setting: Setting, inputs: Inputs, key: jax.Array | None) -> Inputs:
    """History dropout: of each dialogue a share of the items, drawn from 0 up to `pplug.dropout`, is not seen.

    Published as an augmentation. No key, no dropout.
    """
    if key is None or not inputs.columns:
        return inputs
    history = inputs.columns["history"]
    # Not the keys that LoRA's dropout makes of the same one.
    share, each = jax.random.split(jax.random.fold_in(key, 1 << 20))
    rate = jax.random.uniform(share, (*history.shape[:2], 1), maxval=setting.config.pplug.dropout)
    kept = jax.random.uniform(each, history.shape[:3]) >= rate
    return inputs.replace(columns={**inputs.columns, "history": jnp.where(kept[..., None], history, 0)})


def loss(
    setting: Setting, params: Tree, base_params: Tree, batch: Batch, memory: Tree, key: jax.Array | None
) -> tuple[dict[str, Float[Array, ""]], Tree]:
    """LM numerator behind the soft tokens; nothing to remember."""
    batch = batch.replace(inputs=forget(setting, batch.inputs, key))
    hidden = base.states(setting, base_params, batch.inputs, condition(setting, params, batch.inputs), key)
    return {"lm": base.token_losses(setting, params, base_params, batch, hidden).sum()}, {}


class Reader:
    """The history vectors of a run, and what was told since; see `base.Reader`. `pplug` is that section of the configuration."""

    def __init__(self, setting: Setting, store: Store, tokenizer: Any, table: Callable[[], np.ndarray]):
        """Embeds what `config.vectors` does not hold yet; arguments as of `base.reader`."""
        pplug = self.pplug = setting.config.pplug
        self._store, self.places = store, 1 + pplug.tokens
        own = _texts(store)
        if pplug.encoder == BASE:
            bag = plug.bag(table(), functools.partial(encode_all, tokenizer), own)
            self._tokens, self._embed, self._params = bag.tokens, bag.embed, {"table": bag.table}
            identity, dim = bag.identity, bag.table.shape[1]
        else:
            found = _bert(pplug.encoder)
            self._tokens, self._embed = functools.partial(_token_ids, found), functools.partial(_vectors, found)
            self._params, identity, dim = found.params, _identity(found), found.config.embed
        self._vectors = Vectors(setting.config.vectors, identity, dim)
        before = len(self._vectors)
        self._vectors.add(own, self._embed)
        self._made = len(self._vectors) - before
        self._known: dict[int, np.ndarray] = {}
        self._lock = threading.Lock()

    def columns(self, dialogue: Dialogue) -> Mapping[str, Any]:
        """What `soft` reads.

        Returns:
          query: its tokens int32[pplug.query], -1 behind its end.
          history: the items' vectors [pplug.history, E].
          difference: where these are asked for, how each item differs from what others got on the same occasion
            (`history.peers`, the `PEERS` most recent), [pplug.history, E]; items that nobody else met are left out.
        """
        told = items(self._store, dialogue, self.pplug.history)
        if self.pplug.differences:
            others = [self._others(dialogue, item) for item in told]
            told = [item for item, rows in zip(told, others, strict=True) if len(rows)]
        with self._lock:
            rows = self._vectors.add([item_text(item) for item in told], self._embed)
        query = np.full(self.pplug.query, -1, np.int32)
        (ids,) = self._tokens([asked(dialogue)])
        # The last token may be the encoder's own, which ends every text.
        ids = [*ids[: len(query) - 1], ids[-1]] if len(ids) > len(query) else ids
        query[: len(ids)] = ids
        found = {"query": query, "history": Rows(self._vectors, rows, self.pplug.history)}
        if self.pplug.differences:
            kept = [rows for rows in others if len(rows)]
            starts = np.cumsum([0, *map(len, kept)])[:-1]
            together = np.concatenate([np.zeros(0, np.int32), *kept])
            found["difference"] = Differences(self._vectors, rows, self.pplug.history, together, starts)
        return found

    def _others(self, dialogue: Dialogue, item: Item) -> np.ndarray:
        """Vectors of what others got on the occasion of an item; none of an item that belongs to no record."""
        found = [] if item.record is None else peers(self._store, dialogue, item.record)[-PEERS:].tolist()
        return np.concatenate([np.zeros(0, np.int32), *map(self._vectors_of, found)])

    def _vectors_of(self, record: int) -> np.ndarray:
        """Where the vectors of a training record's exchanges are."""
        if record not in self._known:
            texts = [item_text(Item(q.text, r.text)) for q, r in exchanges(self._store.dialogues[record])]
            self._known[record] = self._vectors.find(texts).astype(np.int32)
        return self._known[record]

    def start(self, values: Tree) -> Tree:
        """The trainable copy starts as the frozen encoder."""
        old = values["plug"]["encoder"]
        # Copies: the step donates its state, and must not be given the frozen encoder's arrays.
        fresh = jax.tree.map(lambda new, old: jax.device_put(np.array(new), old.sharding), self._params, old)
        return {**values, "plug": {**values["plug"], "encoder": fresh}}

    def over(self, store: Store) -> Reader:
        """The same over other data, of which only texts that were never met are embedded."""
        other = copy.copy(self)
        other._store, other._known = store, {}
        with self._lock:
            self._vectors.add(_texts(store), self._embed)
        return other

    def summary(self) -> str:
        """How many vectors there are, and what a querier's take."""
        pairs = {(d.responder, d.querier): d for d in self._store.dialogues if d.split == "train"}
        number = [len(items(self._store, d, self.pplug.history)) for d in pairs.values()]
        size = self._vectors.dim * self._vectors.table.itemsize
        apart = ""
        if self.pplug.differences:
            met = [len(self.columns(d)["difference"].index) for d in pairs.values()]
            apart = f"; {sum(met):,} of {sum(number):,} items have others to differ from"
        return (
            f"history: {len(self._vectors):,} vectors of {self._vectors.dim} by '{self.pplug.encoder}', {self._made:,} of them "
            f"new; {np.mean(number):.1f} items and {np.mean(number) * size:,.0f} bytes a querier and responder, at most "
            f"{max(number) * size:,}{apart}"
        )


def reader(setting: Setting, store: Store | None, tokenizer: Any, table: Callable[[], np.ndarray]) -> Reader | None:
    """What histories are looked up with, all of the data's items embedded; None where no encoder is configured."""
    if not setting.config.pplug.encoder:
        return None
    return Reader(setting, store, tokenizer, table)


def item_text(item: Item) -> str:
    """What is embedded of a history item: what was asked and what was answered."""
    return f"{item.query}\n{item.reply}".strip()


def _texts(store: Store) -> list[str]:
    """Texts of all items that may be somebody's history, a querier's together, oldest first."""
    found: dict[str, list[str]] = collections.defaultdict(list)
    for d in store.dialogues:
        told = [Item(entry["query"], entry["reply"]) for entry in profile(store, d)]
        told += [Item(q.text, r.text) for q, r in exchanges(d)] if d.split == "train" else []
        found[d.querier] += map(item_text, told)
    return list(dict.fromkeys(text for texts in found.values() for text in texts))


def _token_ids(found: encoder.Encoder, texts: Sequence[str]) -> list[list[int]]:
    return [e.ids for e in found.tokenizer.encode_batch([t.lower() if found.config.lower else t for t in texts])]


def _vectors(found: encoder.Encoder, texts: Sequence[str]) -> np.ndarray:
    # Few texts, such as a conversation that has just ended, are not padded to a whole batch.
    return normalise(found.embed(texts, batch=min(64, 1 << (len(texts) - 1).bit_length())))


@functools.lru_cache(maxsize=1)
def _bert(name: str) -> encoder.Encoder:
    return encoder.load_encoder(name)


def _identity(found: encoder.Encoder) -> str:
    """Of an encoder's weights, shape and tokeniser, wherever they were read from."""
    digest = hashlib.sha256(f"{found.config} {found.tokenizer.to_str()}".encode())
    for name, leaf in sorted(arrays.flat(found.params).items()):
        digest.update(name.encode() + np.asarray(leaf).tobytes())
    return f"sentence encoder sha256:{digest.hexdigest()}"
