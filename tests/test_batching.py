"""Continuous batching: whoever comes and goes when, each request gets what it would get alone."""

from __future__ import annotations

import functools

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
import untrained

from qaperso import batching, generate
from qaperso.batching import Batcher
from qaperso.generate import Sampling

SLOTS = 3
# Prompts of two buckets and of both ends of one; each row of the table is asked as.
PROMPTS = [untrained.prompt(n, i) for i, n in enumerate((1, 5, 32, 33, 12))]
HOW = (Sampling(6), Sampling(9, 1.2, 0.9, 3), Sampling(1), Sampling(6, 0.7, 1.0, 4), Sampling(20))
# Ends that some replies meet and some do not.
EOS = (7, 8, 9, 10, 11, 12)


def model(devices: int = 1) -> batching.Model:
    return untrained.small("qar", EOS, devices).model


@functools.cache
def alone(which: int, how: int) -> list[int]:
    """The tokens of a prompt's reply, with nobody else there."""
    batcher = Batcher(model(), SLOTS)
    batcher.submit(PROMPTS[which], which % 4, HOW[how])
    return [token for _ in range(HOW[how].new_tokens) for p in batcher.step() for token in p.tokens]


def test_replies_that_are_compared_differ() -> None:
    found = [tuple(alone(i, j)) for i in range(5) for j in (0, 1, 3)]
    assert len(set(found)) > 10 and {len(f) for f in found} >= {6, 9} and min(map(len, found)) < 6


@hypothesis.settings(deadline=None, max_examples=40)
@hypothesis.given(
    st.lists(
        st.one_of(
            st.tuples(st.just("submit"), st.integers(0, 4), st.integers(0, 4)),
            st.tuples(st.just("step"), st.integers(1, generate.STRIDE), st.just(0)),
            st.tuples(st.just("cancel"), st.integers(0, 8), st.just(0)),
        ),
        max_size=16,
    )
)
def test_each_request_gets_what_it_would_get_alone(actions: list[tuple[str, int, int]]) -> None:
    batcher = Batcher(model(), SLOTS)
    asked: dict[int, tuple[int, int]] = {}
    heard: dict[int, list[int]] = {}
    over: list[int] = []

    def step(tokens: int) -> None:
        alive = [h for h in asked if h not in over]
        found = batcher.step(tokens)
        # The first to come are the first to be answered, as many as there are slots.
        assert [p.handle for p in found] == alive[:SLOTS]
        for p in found:
            assert p.finished or 0 < len(p.tokens) <= tokens
            heard[p.handle] += p.tokens
            over.extend([p.handle] * p.finished)
        assert not found or len(found[0].tokens) == tokens or any(p.finished for p in found)

    for action, a, b in actions:
        if action == "submit":
            handle = batcher.submit(PROMPTS[a], a % 4, HOW[b])
            assert handle not in asked
            asked[handle], heard[handle] = (a, b), []
        elif action == "step":
            step(a)
        else:
            assert batcher.cancel(a) == (a in asked and a not in over)
            if a in asked and a not in over:
                over.append(a)
                assert heard[a] == alone(*asked[a])[: len(heard[a])]
                del asked[a]
        left = len([h for h in asked if h not in over])
        assert batcher.busy == (left > 0) and batcher.free == SLOTS - left
    while batcher.busy:
        step(generate.STRIDE)
    assert batcher.step() == []
    for handle, what in asked.items():
        assert heard[handle] == alone(*what)


def test_programs_are_compiled_for_buckets_only() -> None:
    programs = (generate.prefill, generate.insert, generate.advance, generate.empty_slots, generate.resize)

    for program in programs:
        program.clear_cache()

    def run(lengths: list[int], how: list[Sampling]) -> list[int]:
        batcher = Batcher(model(), SLOTS)
        for i, n in enumerate(lengths):
            batcher.submit(untrained.prompt(n, i), i % 4, how[i % len(how)])
            batcher.step()
        while batcher.busy:
            batcher.step(generate.STRIDE)
        return [p._cache_size() for p in programs]

    assert run([3, 30], [Sampling(2)]) == [1, 1, 1, 1, 0]
    ways = [Sampling(new, temperature, top_p, 5) for new, temperature, top_p in ((1, 0.0, 1.0), (2, 1.3, 0.2))]
    assert run([30, 1, 17, 29, 8, 2], ways) == [1, 1, 1, 1, 0]
    # A longer prompt is read by a program of its own, and needs a longer cache.
    assert run([33], [Sampling(3)]) == [2, 2, 2, 2, 0]
    # Here the cache grows when the second comes.
    assert run([3, 33], [Sampling(3)]) == [2, 2, 2, 2, 1]


def test_a_batch_is_spread_over_devices() -> None:
    """Eight devices: eight slots lie one on each, and prompts are read eight at a time."""
    many, read = model(8), []
    with pytest.MonkeyPatch.context() as patch:
        pad = generate.pad
        patch.setattr(generate, "pad", lambda prompts, *rest: read.append(len(prompts)) or pad(prompts, *rest))
        batcher = Batcher(many, 8)
        handles = {batcher.submit(PROMPTS[i % 3], i % 3, HOW[i % 2]): (i % 3, i % 2) for i in range(9)}
        heard: dict[int, list[int]] = {h: [] for h in handles}
        while batcher.busy:
            for p in batcher.step(generate.STRIDE):
                heard[p.handle] += p.tokens
    assert read == [8, 8]
    for handle, what in handles.items():
        assert heard[handle] == alone(*what)
    k = batcher._slots.cache[0][0]
    assert {s.data.shape[1] for s in k.addressable_shards} == {1} and len(k.sharding.device_set) == 8


def test_seeds_are_taken_modulo_32_bits() -> None:
    asked = batching.request(model(), PROMPTS[:3], [0, 1, 2], [Sampling(1, seed=s) for s in (-1, 5, 2**40 + 2)])
    assert asked.seed.tolist() == [2**32 - 1, 5, 2] and asked.seed.dtype == np.uint32
    assert asked.inputs.tokens.shape == (3, 32) and asked.rows.shape[:2] == (3, 32)
