"""Likelihoods of replies: by plain logits, and the same however packed."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import untrained

from qaperso.data.batches import sequential
from qaperso.eval import scores
from qaperso.models import decoder, lora
from qaperso.run import Run
from qaperso.types import Example

Tree = Any


@pytest.fixture(scope="module")
def qar() -> tuple[Run, list[Example], Tree]:
    run, store, trainable = untrained.opened(method="qar", qar__contrast="none")
    return run, run.examples(store, "dev", 11)[0], trainable


def test_nll_packed_is_nll_one_at_a_time(qar: tuple[Run, list[Example], Tree]) -> None:
    run, examples, trainable = qar
    assert len({e.querier for e in examples}) > 3
    sums, counts = scores.reply_nll(run, trainable, examples)
    assert counts.tolist() == [e.predicted.sum() for e in examples]
    rows = [row for _, rows in sequential(examples, run.shape) for row in rows]
    assert max(map(len, rows)) == run.shape.dialogues
    alone = [scores.reply_nll(run, trainable, [e]) for e in examples]
    np.testing.assert_allclose(sums, [s[0] for s, _ in alone], rtol=1e-5)
    back, _ = scores.reply_nll(run, trainable, examples[::-1])
    np.testing.assert_allclose(back, sums[::-1], rtol=1e-5)
    stranger, _ = scores.reply_nll(run, trainable, [dataclasses.replace(e, querier=0) for e in examples])
    assert (np.abs(stranger - sums) > 1e-4 * sums).all()


def test_nll_is_that_of_plain_logits() -> None:
    run, store, trainable = untrained.opened(method="sft")
    examples = run.examples(store, "dev", 5)[0]
    sums, _ = scores.reply_nll(run, trainable, examples)
    tree = lora.scaled(trainable["lora"], run.config.lora.alpha, run.config.lora.rank)
    merged, model = lora.merge(run.base, tree), run.setting.model
    n = max(map(len, examples))
    tokens = jnp.array([np.pad(e.tokens, (0, n - len(e))) for e in examples])
    ones = jnp.ones_like(tokens)

    @jax.jit
    def logits(params: Tree) -> jax.Array:
        position = jnp.arange(n)[None] * ones
        hidden = decoder.forward(params, tokens, position, ones, ones.astype(bool), model)
        return decoder.logits(params, hidden, model)

    values = np.asarray(logits(merged), np.float64)
    for e, z, total in zip(examples, values, sums, strict=True):
        p = np.exp(z - z.max(-1, keepdims=True))
        p /= p.sum(-1, keepdims=True)
        places = np.flatnonzero(e.predicted)
        assert -np.log(p[places - 1, e.tokens[places]]).sum() == pytest.approx(total, rel=1e-4)


def test_the_paper_s_nll_masks_what_its_training_masks(monkeypatch: pytest.MonkeyPatch) -> None:
    run, store, trainable = untrained.opened(
        method="qar", compat="paper", qar__contrast="prototypes", batch__dialogues=1
    )
    seen = []

    def batch_nll(setting: Any, method: Any, trainable: Tree, base: Tree, batch: Any) -> tuple[np.ndarray, np.ndarray]:
        seen.append(batch.inputs)
        return np.ones(batch.inputs.present.shape), np.ones(batch.inputs.present.shape)

    monkeypatch.setattr(scores, "batch_nll", batch_nll)
    scores.reply_nll(run, trainable, run.examples(store, "dev", 2)[0])
    (inputs,) = seen
    assert (np.asarray(inputs.attend) == (np.asarray(inputs.tokens) != run.setting.model.eos_ids[0])).all()
