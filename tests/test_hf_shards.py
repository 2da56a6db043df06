"""Base weights on their way to the devices: each shard is read by itself, and the host holds one at a time."""

from __future__ import annotations

import functools
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qaperso import arrays, mesh
from qaperso.models import decoder, hf, quantized
from qaperso.models.config import DecoderConfig

Tree = Any
RULES = ((":embed$", "fsdp"), (":(heads|kv_heads|mlp|vocab)$", "tensor"))
# 32 MB, most of them in stacks of 8 MB.
MODEL = DecoderConfig(vocab=256, embed=256, layers=8, heads=8, kv_heads=4, head_dim=32, mlp=1024, tied=False)
SMALL = DecoderConfig(vocab=32, embed=64, layers=2, heads=2, kv_heads=2, head_dim=32, mlp=128)


def saved(path: Path, model: DecoderConfig) -> Path:
    """A folder of random weights, in several files."""
    rng = np.random.default_rng(0)
    tree = arrays.map_specs(lambda _, s: rng.standard_normal(s.shape, np.float32), decoder.declare(model))
    hf.save(path, tree, model, max_shard_bytes=10_000_000)
    return path


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Bytes of whatever is read from the files."""
    found, read = [], hf._read

    def counted(*words: Any) -> np.ndarray:
        value = read(*words)
        found.append(value.nbytes)
        return value

    monkeypatch.setattr(hf, "_read", counted)
    yield found


def places(model: DecoderConfig, kind: str = "") -> Tree:
    """Pairs of devices hold the same; each pair has a quarter of the columns or rows that are `embed`."""
    specs = quantized.declare(decoder.declare(model), kind)
    return arrays.shardings(specs, mesh.make_mesh(2, 4, 1), RULES)


def odd(shape: Any, dtype: Any = float) -> np.ndarray:
    """As numpy's `empty`, but never at a multiple of 64 bytes: there CPU devices keep the host's array as their own."""
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    room = np.zeros(size + 128, np.uint8)
    start = -room.ctypes.data % 64 + 8
    return room[start : start + size].view(dtype).reshape(shape)


def test_the_host_holds_one_stacked_shard(tmp_path: Path, reads: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    path, place = saved(tmp_path / "model", MODEL), places(MODEL)
    # Whatever is imported, or kept by libraries, on the first occasion.
    helpers.assert_trees_equal(hf.load(path, MODEL, jnp.float32, place), hf.load(path, MODEL, jnp.float32))
    reads.clear()
    monkeypatch.setattr(np, "empty", odd)
    tracemalloc.start()
    try:
        loaded = hf.load(path, MODEL, jnp.float32, place)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    layer = MODEL.embed * MODEL.mlp * 4 // 4
    shard = MODEL.layers * layer
    assert {s.data.nbytes for s in loaded["layers"]["gate"].addressable_shards} == {shard}
    # A stacked shard, a layer's part of it as it comes from the file, and what else Python holds.
    assert shard < peak < shard + 2 * layer + 500_000 < 1.5 * shard
    # Every value is read once, whoever holds it.
    assert sum(reads) == sum(x.nbytes for x in jax.tree.leaves(loaded))
    assert max(reads) == layer


def test_kernels_are_quantised_on_their_way(tmp_path: Path, reads: list[int]) -> None:
    path, place = saved(tmp_path / "model", SMALL), places(SMALL, "nf4")
    loaded = hf.load(path, SMALL, jnp.float32, place, "nf4")
    assert sum(reads) == sum(x.size * 4 for x in quantized.leaves(loaded))
    assert max(reads) == SMALL.embed * SMALL.mlp * 4 // 4, "one layer's shard"
    assert jax.tree.map(lambda x: x.sharding, loaded) == place
    # To the bit what quantising the loaded kernels gives, however they are cut: an exported base stays itself.
    plain = hf.load(path, SMALL, jnp.float32)
    helpers.assert_trees_equal(loaded, jax.jit(functools.partial(quantized.compress, kind="nf4"))(plain))
