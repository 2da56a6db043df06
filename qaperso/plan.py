"""python -m qaperso.plan --config configs/x.py --topology v5e:4x4|h100:8 [--json FILE] [--search | --generate] [--config.key=value ...]

Whether a run fits on chips that are not there, how fast it would be, what binds it and what to change: the real train step
is compiled ahead of time from shapes alone (--generate: the programs of replying). Exit codes: 0 fits, 1 does not, 2 bad
input.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
from rich.console import Console
from rich.table import Table

from qaperso import aot, chips, roofline, step
from qaperso import config as configs
from qaperso import run as runs
from qaperso.chips import GIB, Topology
from qaperso.errors import UserError, command
from qaperso.hlo import Cost
from qaperso.methods import Setting

# Of memory that a search takes as there: the runtime and fragments need the rest.
USABLE = 0.95
# A run this full has no room for twice its rows.
ROOM = 0.5


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is known of a program on a topology; bytes, FLOPs and seconds are those of one chip and one step.

    Attributes:
      config, topology, program: what was planned; "train", "decode" or "prefill".
      changes: {dotted key: value}, what a search set.
      fits: whether it compiles for the chip's memory, and needs no more; compilers for GPUs do not fail for want of it.
      peak_bytes, arguments_bytes, temporary_bytes: of memory; but for the first unknown (0) where it does not fit.
      hbm_bytes: what the chip has.
      useful_flops: what counts for MFU, see `useful`.
      flops: of matrix products, scans counted as often as they run, recomputed work included.
      collectives: {kind, arrays, bytes of one run, group, times} of each in the program.
      seconds: {resource: its part of the step}.
      step_seconds, mfu, bound: predicted; None where it does not fit.
      tokens_per_second: of one chip.
      advice: what to change.
    """

    config: str
    topology: str
    program: str
    changes: dict[str, Any]
    fits: bool
    peak_bytes: float
    arguments_bytes: float
    temporary_bytes: float
    hbm_bytes: int
    useful_flops: float
    flops: float = 0.0
    collectives: tuple[dict[str, Any], ...] = ()
    seconds: dict[str, float] = dataclasses.field(default_factory=dict)
    step_seconds: float | None = None
    mfu: float | None = None
    bound: str | None = None
    tokens_per_second: float | None = None
    advice: tuple[str, ...] = ()


def useful(setting: Setting, program: str, prompt: int) -> tuple[float, int]:
    """(FLOPs that count, tokens) of a step on all chips, every row full.

    Training counts what `step.step_flops` does: 4 a frozen kernel's entry and token, 6 a trained one's, and nothing for
    attention's scores, a kernel's second use by the other tower, or what is recomputed. Replying counts 2 for each.

    Args:
      setting: of the run.
      program: "train", "decode" or "prefill".
      prompt: tokens that "prefill" reads on all chips.
    """
    batch = setting.config.batch
    trainable, _, base = aot.declared(setting)
    if program == "train":
        token, prediction = step.step_flops(trainable, base)
        rows = batch.rows * batch.accumulate
        return rows * (batch.length * token + batch.targets * prediction), rows * batch.length
    token, prediction = step.step_flops({}, {**base, **trainable.pop("base", {}), **trainable})
    if program == "decode":
        return batch.rows * (token + prediction) / 2, batch.rows
    return prompt * token / 2, prompt


def plan(
    name: str, config: Any, topology: Topology, queriers: int, generate: bool = False, changes: dict | None = None
) -> list[Plan]:
    """Plans a configuration.

    Args:
      name: what to call it.
      config: as it is to be run.
      topology: the chips.
      queriers: that the data will have.
      generate: the programs of replying in place of the train step.
      changes: what was changed since the configuration was read.

    Returns:
      One plan; for replies that of a decoding step and that of reading prompts.

    Raises:
      UserError: mesh, batch or method do not suit, or there is no compiler for the chips.
    """
    if config.dtype != "bfloat16":
        raise UserError(f"config.dtype is '{config.dtype}'; these chips are planned for --config.dtype=bfloat16")
    if config.pplug.encoder:
        raise UserError(
            f"config.pplug.encoder is '{config.pplug.encoder}'; soft tokens are not planned: plan with --config.pplug.encoder= and"
            " a method other than pplug"
        )
    mesh = aot.mesh_of(config, aot.devices(topology))
    shards = mesh.shape["data"] * mesh.shape["fsdp"]
    if config.batch.rows % shards:
        raise UserError(
            f"config.batch.rows={config.batch.rows} is not a multiple of the {shards} devices of the mesh's data and fsdp axes"
        )
    setting = aot.make_setting(config, runs.shape_of(config), queriers)
    if not generate and not aot.declared(setting)[0]:
        raise UserError(f"config.method='{config.method}' trains nothing; plan its replies with --generate")
    programs = aot.generate_programs(setting, mesh) if generate else {"train": aot.train_program(setting, mesh)}
    found = []
    for kind, program in programs.items():
        compiled = aot.compile_program(program, mesh)
        prompt = program.arguments[1].tokens.size if kind == "prefill" else 0
        flops, tokens = useful(setting, kind, prompt)
        fits = compiled.fits and compiled.peak <= topology.chip.hbm_bytes
        one = Plan(
            config=name,
            topology=topology.name,
            program=kind,
            changes=changes or {},
            fits=fits,
            peak_bytes=compiled.peak,
            arguments_bytes=compiled.arguments,
            temporary_bytes=compiled.temporaries,
            hbm_bytes=topology.chip.hbm_bytes,
            useful_flops=flops / topology.devices,
        )
        one = predict(one, compiled.cost, topology, tokens) if fits else one
        found.append(dataclasses.replace(one, advice=tuple(advise(one, config, shards))))
    return found


def predict(one: Plan, cost: Cost, topology: Topology, tokens: int) -> Plan:
    """The plan with what its program does, and how long that takes for so many tokens on all chips."""
    guess = roofline.estimate(roofline.work_of(cost), topology, one.useful_flops)
    listed = [dataclasses.asdict(c) | {"arrays": " ".join(map(str, c.arrays))} for c in cost.collectives]
    return dataclasses.replace(
        one,
        flops=cost.flops,
        collectives=tuple(listed),
        seconds=guess.parts,
        step_seconds=guess.seconds,
        mfu=guess.mfu,
        bound=guess.bound,
        tokens_per_second=tokens / topology.devices / guess.seconds,
    )


def advise(plan: Plan, config: Any, shards: int) -> Iterator[str]:
    """What to change, most useful first."""
    rows = config.batch.rows // shards
    if plan.program != "train":
        if not plan.fits:
            yield f"fewer slots (batch.rows={config.batch.rows // 2}), shorter prompts, or a larger mesh.tensor"
        return
    if not plan.fits:
        if config.remat == "dots":
            yield "recompute whole layers: --config.remat=full"
        if rows > 1:
            yield f"fewer rows: --config.batch.rows={max(rows // 2, 1) * shards}, the same batch with batch.accumulate=2"
        if config.mesh.data != 1:
            yield "spread parameters and optimiser over all chips: --config.mesh.data=1 --config.mesh.fsdp=-1"
        if rows == 1:
            yield f"shorter rows (batch.length={config.batch.length // 2}), a larger mesh.tensor, or more chips"
        return
    room = plan.hbm_bytes - plan.peak_bytes > ROOM * plan.hbm_bytes
    if plan.bound == "compute" and config.remat == "full":
        yield "if memory allows, keep what matrix products give: --config.remat=dots"
    if plan.bound == "interconnect":
        yield f"more rows for each gathering of the weights: --config.batch.rows={config.batch.rows * 2}"
    elif room:
        yield f"there is room for more rows: --config.batch.rows={config.batch.rows * 2}"


def search(name: str, config: Any, topology: Topology, queriers: int) -> list[Plan]:
    """Plans with other meshes, batch sizes and remat; all that were compiled, the best first.

    First both ways of recomputation with everything spread over one axis, then the better one on other meshes. For each,
    one and two rows a device tell how memory grows, hence the most rows that should fit.
    """
    found: list[Plan] = []

    def attempt(changes: dict[str, Any]) -> Plan:
        changed = copy.deepcopy(config)
        changed.update_from_flattened_dict(changes)
        one = plan(name, changed, topology, queriers, changes=changes)[0]
        told = f"{one.mfu:.1%} MFU, {one.tokens_per_second:,.0f} tokens/s" if one.fits else "does not fit"
        print(f"{settings(changes)}: {one.peak_bytes / GIB:.1f} GiB, {told}", file=sys.stderr, flush=True)
        found.append(one)
        return one

    def fill(mesh: dict[str, int], remat: str) -> Plan | None:
        """The best of a mesh."""
        shards = mesh["mesh.data"] * mesh["mesh.fsdp"]
        rows = lambda n: {**mesh, "remat": remat, "batch.rows": n * shards}  # noqa: E731
        tried = [attempt(rows(1))]
        if tried[0].fits:
            tried.append(attempt(rows(2)))
        if all(p.fits for p in tried) and len(tried) == 2:
            grown = max(tried[1].peak_bytes - tried[0].peak_bytes, 1.0)
            most = 2 + int((USABLE * topology.chip.hbm_bytes - tried[1].peak_bytes) / grown)
            while most > 2:
                tried.append(attempt(rows(most)))
                if tried[-1].fits:
                    break
                most = min(most - 1, most * 9 // 10)
        return max((p for p in tried if p.fits), key=lambda p: p.tokens_per_second, default=None)

    count, heads = topology.devices, runs.shape_of(config).kv_heads
    spread = {"mesh.data": 1, "mesh.fsdp": count, "mesh.tensor": 1}
    best = {remat: fill(spread, remat) for remat in ("dots", "full")}
    kept = [p for p in best.values() if p is not None]
    remat = max(kept, key=lambda p: p.tokens_per_second).changes["remat"] if kept else "full"
    for axis in ("tensor", "data"):
        last = best[remat]
        for size in (2, 4, 8):
            if count % size or size == count or (axis == "tensor" and heads % size):
                break
            mesh = spread | {"mesh.fsdp": count // size, f"mesh.{axis}": size}
            one = fill(mesh, remat)
            if one is not None and last is not None and one.tokens_per_second <= last.tokens_per_second:
                break
            last = one or last
    return sorted(found, key=lambda p: (not p.fits, -(p.tokens_per_second or 0), p.peak_bytes))


def settings(changes: dict[str, Any]) -> str:
    """Changes as options of a command line."""
    return " ".join(f"--config.{key}={value}" for key, value in changes.items())


def show(plan: Plan) -> None:
    """Prints a plan."""
    console = Console(width=None if sys.stdout.isatty() else 110, highlight=False)
    table = Table(title=f"{plan.program}: {plan.config} on {plan.topology}", show_header=False)

    def row(what: str, text: str) -> None:
        table.add_row(what, text)

    row(
        "fits",
        ("yes" if plan.fits else "no") + f", {plan.peak_bytes / GIB:.2f} of {plan.hbm_bytes / GIB:.0f} GiB a chip",
    )
    if plan.fits:
        row("arguments", f"{plan.arguments_bytes / GIB:.2f} GiB: parameters, optimiser, memory, batch")
        row("temporaries", f"{plan.temporary_bytes / GIB:.2f} GiB")
        row("FLOPs", f"{plan.flops / 1e12:.2f} T a chip and step, of which {plan.useful_flops / 1e12:.2f} T useful")
        row("of which", ", ".join(f"{name} {seconds * 1e3:.1f} ms" for name, seconds in plan.seconds.items()))
        row(
            "step",
            f"{plan.step_seconds * 1e3:.1f} ms, {plan.tokens_per_second:,.0f} tokens/s a chip, MFU {plan.mfu:.1%}",
        )
        row("bound by", plan.bound)
    for text in plan.advice:
        row("to change", text)
    console.print(table)
    if plan.collectives:
        listed = Table(title="collectives, largest first", show_edge=False)
        for column in ("kind", "arrays", "MiB", "chips", "times", "GiB in all"):
            listed.add_column(column, justify="left" if column in ("kind", "arrays") else "right")
        for c in sorted(plan.collectives, key=lambda c: -c["bytes"] * c["times"]):
            total = c["bytes"] * c["times"] / GIB
            listed.add_row(
                c["kind"], c["arrays"], f"{c['bytes'] / 2**20:.2f}", str(c["group"]), str(c["times"]), f"{total:.3f}"
            )
        console.print(listed)


@command
def main(arguments: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m qaperso.plan", description=__doc__, allow_abbrev=False)
    parser.add_argument("--config", required=True, metavar="FILE[:VARIANT]", help="a Python file with get_config()")
    parser.add_argument("--topology", required=True, metavar="KIND:AxB", help="such as v5e:4x4, v5p:4x4x4 or h100:8")
    parser.add_argument("--json", type=Path, metavar="FILE", help="writes the plan there too")
    parser.add_argument("--queriers", type=int, default=1024, metavar="N", help="people in the data (default: 1024)")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--search", action="store_true", help="tries meshes, batch sizes and remat; prints the best")
    what.add_argument("--generate", action="store_true", help="plans replies: decoding a token, reading prompts")
    known, rest = parser.parse_known_args(arguments)
    config = configs.load(
        known.config, configs.overrides(rest, "--config, --topology, --json, --queriers, --search, --generate")
    )
    # The chips are not there, and looking for some would take those of somebody else.
    jax.config.update("jax_platforms", "cpu")
    topology = chips.topology(known.topology)
    if known.queriers < 1:
        raise UserError(f"--queriers is {known.queriers}, expected 1 or more")
    if known.search:
        found = search(known.config, config, topology, known.queriers)[:1]
    else:
        found = plan(known.config, config, topology, known.queriers, known.generate)
    for one in found:
        show(one)
        if one.changes:
            print(f"best: {settings(one.changes)}")
    if known.json:
        record = dataclasses.asdict(found[0]) | {one.program: dataclasses.asdict(one) for one in found[1:]}
        known.json.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return 0 if all(one.fits for one in found) else 1


if __name__ == "__main__":
    sys.exit(main())
