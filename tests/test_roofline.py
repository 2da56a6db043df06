"""Predicted steps: by hand, and MaxText's published runs from constants fitted on two of them."""

from __future__ import annotations

import pytest

from qaperso import chips, roofline
from qaperso.hlo import Array, Collective, Cost
from qaperso.models.shapes import PUBLISHED
from qaperso.roofline import Pretraining, Work

LLAMA2, LLAMA8, LLAMA70 = (
    PUBLISHED[name]
    for name in ("meta-llama/Llama-2-70b-hf", "meta-llama/Llama-3.1-8B-Instruct", "meta-llama/Llama-3.1-70B-Instruct")
)
# MaxText's table of full bfloat16 pre-training: share of the peak, tokens a second and chip. Rows a chip as in its
# recipes for these runs.
FITTED = {
    "v5p Llama-2-70B": Pretraining(LLAMA2, "v5p:8x8x8", 4096, 4, 0.654, 692.0),
    "v6e Llama-3.1-8B": Pretraining(LLAMA8, "v6e:16x16", 8192, 3, 0.455, 7207.0),
}
OTHERS = {
    "v6e Llama-3.1-70B": Pretraining(LLAMA70, "v6e:16x16", 8192, 4, 0.503, 960.0),
    "v6e Llama-2-70B": Pretraining(LLAMA2, "v6e:16x16", 4096, 4, 0.438, 900.0),
}


def work(run: Pretraining) -> tuple[Work, chips.Topology]:
    topology = chips.topology(run.topology)
    return roofline.pretraining_work(run, topology.devices), topology


@pytest.mark.parametrize("name", OTHERS)
def test_runs_that_no_constant_was_fitted_on_come_out(name: str) -> None:
    run = OTHERS[name]
    found = roofline.estimate(*work(run), roofline.useful_flops(run))
    assert found.mfu == pytest.approx(run.mfu, rel=0.2)
    assert run.rows * run.length / found.seconds == pytest.approx(run.tokens, rel=0.2)
    assert found.bound == "compute"


def test_the_constants_are_those_of_two_runs() -> None:
    measured = [(*work(run), run.rows * run.length / run.tokens) for run in FITTED.values()]
    assert (roofline.EFFICIENCY, roofline.BANDWIDTH) == pytest.approx(roofline.fit(measured), abs=0.005)


@pytest.mark.parametrize("name", [*FITTED, *OTHERS])
def test_published_figures_count_flops_as_we_do(name: str) -> None:
    run = (FITTED | OTHERS)[name]
    rate = roofline.useful_flops(run) / (run.rows * run.length) * run.tokens
    assert rate / chips.topology(run.topology).chip.flops == pytest.approx(run.mfu, rel=0.03)


@pytest.mark.parametrize(
    "sizes, bound",
    [((2.0, 0.5, 0.25), "compute"), ((0.5, 2.0, 0.25), "HBM"), ((0.5, 0.25, 2.0), "interconnect")],
)
def test_the_slowest_binds(sizes: tuple[float, float, float], bound: str) -> None:
    topology = chips.topology("v5e:16x16")
    chip = topology.chip
    work = Work(
        sizes[0] * chip.flops * 0.8,
        sizes[1] * chip.hbm_bandwidth * 0.5,
        ((sizes[2] * chip.link_bandwidth, 256), (0.0, 1)),
    )
    found = roofline.estimate(work, topology, useful=chip.flops, efficiency=0.8, bandwidth=0.5)
    assert tuple(found.parts.values()) == pytest.approx(sizes)
    assert found.bound == bound and found.seconds == pytest.approx(2.75)
    assert found.mfu == pytest.approx(1 / 2.75)


def test_work_of_a_program() -> None:
    gather = Collective("all-gather", (Array("bf16", (16, 8)),), 256.0, 16, times=3)
    reduce = Collective("all-reduce", (Array("f32", (4,)),), 16.0, 4)
    found = roofline.work_of(Cost(10.0, 20.0, (gather, reduce)))
    assert found == Work(10.0, 20.0, ((3 * 256 * 15 / 16, 16), (2 * 16 * 3 / 4, 4)))


def test_fit_finds_the_constants_that_made_the_times() -> None:
    runs = [work(run) for run in FITTED.values()]
    times = [roofline.estimate(*run, 1.0, efficiency=0.7, bandwidth=0.3).seconds for run in runs]
    assert roofline.fit([(*run, t) for run, t in zip(runs, times, strict=True)]) == pytest.approx((0.7, 0.3))
