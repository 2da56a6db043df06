"""The command: on fake devices in place of a topology, and what it says of programs that do not fit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import pytest

from qaperso import aot, chips
from qaperso import config as configs
from qaperso import plan as planning
from qaperso import run as runs
from qaperso.chips import GIB
from qaperso.hlo import Array, Collective, Cost, Kernel
from qaperso.plan import Plan

ROOT = Path(__file__).resolve().parent.parent
KEYS = {"fits", "peak_bytes", "hbm_bytes", "flops", "collectives", "step_seconds", "mfu", "bound"}
TINY = """
from qaperso.config import default

VARIANTS = {"wide": {"mesh.data": 1, "mesh.fsdp": -1, "batch.rows": 16}}

def get_config():
    c = default()
    c.dtype = "bfloat16"
    c.model.update(embed=32, layers=2, heads=2, kv_heads=1, mlp=48)
    c.batch.update(rows=8, length=48, targets=24, dialogues=2)
    c.qar.update(rank=4, head_dim=8)
    c.lora.update(rank=4)
    return c
"""


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A tiny configuration; topologies are the fake devices of the tests, and programs are not compiled but known."""
    gather = Collective("all-gather", (Array("bf16", (64, 32)),), 4096.0, 8, times=6)
    known = aot.Compiled(True, 3.0 * GIB, 4.0 * GIB, 7.5 * GIB, Cost((Kernel(2e9, 3e8),), 0.0, (gather,)), "")
    monkeypatch.setattr(aot, "devices", lambda _: jax.devices())
    monkeypatch.setattr(aot, "compile_program", lambda *_: known)
    (tmp_path / "tiny.py").write_text(TINY, encoding="utf-8")
    return tmp_path / "tiny.py"


def run(config: Path | str, *words: str) -> int:
    return planning.main(["--config", str(config), "--topology", "v5e:2x4", *words])


def test_a_plan_and_its_record(config: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert run(f"{config}:wide", "--json", str(tmp_path / "plan.json"), "--queriers", "5") == 0
    found = json.loads((tmp_path / "plan.json").read_text())
    assert KEYS <= set(found) and found["fits"] and found["hbm_bytes"] == 16 * GIB and found["peak_bytes"] == 7.5 * GIB
    assert found["flops"] == 2e9 and 0 < found["useful_flops"] and 0 < found["mfu"] < 1
    assert found["step_seconds"] == pytest.approx(sum(found["seconds"].values()))
    assert found["seconds"][found["bound"]] == max(found["seconds"].values())
    gather = {"kind": "all-gather", "arrays": "bf16[64,32]", "bytes": 4096.0, "group": 8, "times": 6, "channel": 0}
    assert found["collectives"] == [gather]
    # 16 rows of 48 tokens on 8 chips.
    assert found["tokens_per_second"] == pytest.approx(16 * 48 / 8 / found["step_seconds"])
    told = capsys.readouterr().out
    assert "fits" in told and "bound by" in told and "all-gather" in told


def test_replies(config: Path, tmp_path: Path) -> None:
    assert run(config, "--json", str(tmp_path / "plan.json"), "--generate") == 0
    found = json.loads((tmp_path / "plan.json").read_text())
    assert KEYS <= set(found) and (found["program"], found["prefill"]["program"]) == ("decode", "prefill")
    # A prompt of 64 places on each of 8 chips against 8 slots; what both do besides is reading the output table once.
    assert found["prefill"]["useful_flops"] > 10 * found["useful_flops"] > 0


@pytest.mark.parametrize("compiles", [False, True])
def test_what_does_not_fit(config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compiles: bool) -> None:
    """Compilers for TPUs fail then, those for GPUs do not."""
    found = aot.Compiled(compiles, 0.0, 0.0, 20.0 * GIB, Cost((Kernel(2e9, 3e8),)) if compiles else None, "")
    monkeypatch.setattr(aot, "compile_program", lambda *_: found)
    assert run(f"{config}:wide", "--json", str(tmp_path / "plan.json"), "--config.remat=dots") == 1
    found = json.loads((tmp_path / "plan.json").read_text())
    assert not found["fits"] and found["peak_bytes"] == 20 * GIB
    assert found["step_seconds"] is found["mfu"] is found["bound"] is None
    assert "--config.remat=full" in found["advice"][0] and "--config.batch.rows=8" in found["advice"][1]


@pytest.mark.parametrize(
    "words, said",
    [
        (["--config.dtype=float32"], "config.dtype is 'float32'; these chips are planned for"),
        (["--config.batch.rows=12"], "config.batch.rows=12 is not a multiple of the 8 devices"),
        (["--config.mesh.data=3"], "config.mesh data=3 fsdp=1 tensor=1 does not make 8 devices"),
        (["--config.method=prompts"], "trains nothing; plan its replies with --generate"),
        (["--config.method=pplug", "--config.pplug.encoder=base"], "soft tokens are not planned"),
        (["--queriers", "0"], "--queriers is 0, expected 1 or more"),
        (["--topology", "v9:4x4"], "topology 'v9:4x4' is of no known chip"),
        (["--serach"], "unknown argument '--serach'; options are --config, --topology"),
    ],
)
def test_bad_input(config: Path, words: list[str], said: str, capsys: pytest.CaptureFixture) -> None:
    assert run(config, *words) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("error: ") and said in error and "\n" not in error


def test_a_variant_that_is_not_there(config: Path, capsys: pytest.CaptureFixture) -> None:
    assert run(f"{config}:wode") == 2
    assert "has no variant 'wode'; did you mean 'wide'?" in capsys.readouterr().err


def planned(name: str, config: Any, topology: Any, queriers: int, changes: dict) -> list[Plan]:
    """A machine whose memory and speed are known: 1 GiB and 2 (kept) or 0.5 (recomputed) for each row of a device."""
    mesh, rows = config.mesh, config.batch.rows / (config.mesh.data * config.mesh.fsdp)
    peak = (1 + rows * (2.0 if config.remat == "dots" else 0.5) / mesh.tensor) * GIB
    fits = peak <= topology.chip.hbm_bytes
    # Kept products are faster, more rows too, and two-way tensor parallelism best of all.
    rate = (
        rows
        / (rows + 1)
        * (1.4 if config.remat == "dots" else 1.0)
        * {1: 1.0, 2: 1.1}.get(mesh.tensor, 0.5)
        / mesh.data
    )
    room = dict(arguments_bytes=0.0, temporary_bytes=0.0, hbm_bytes=topology.chip.hbm_bytes, useful_flops=0.0)
    guess = dict(step_seconds=1.0, mfu=rate, bound="compute", tokens_per_second=rate) if fits else {}
    return [Plan(name, "", "train", changes, fits, peak, **room, **guess)]


def test_search(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planning, "plan", planned)
    asked = configs.load(config, ["model.kv_heads=2"])
    found = planning.search("tiny", asked, chips.topology("v5e:4x4"), 5)
    best = found[0]
    # Two-way: 1 GiB + 1 for each row; 14 rows are within 95% of 16 GiB.
    assert best.changes == {"mesh.data": 1, "mesh.fsdp": 8, "mesh.tensor": 2, "remat": "dots", "batch.rows": 14 * 8}
    assert [p.tokens_per_second or 0 for p in found] == sorted((p.tokens_per_second or 0 for p in found), reverse=True)
    assert {p.changes["remat"] for p in found} == {"dots", "full"}
    assert {p.changes["mesh.data"] for p in found} == {1, 2}


def test_a_search_that_finds_nothing(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(name: str, config: Any, topology: Any, queriers: int, changes: dict) -> list[Plan]:
        one = planned(name, config, topology, queriers, changes)[0]
        return [Plan(**{**vars(one), "fits": False, "tokens_per_second": None, "peak_bytes": 99.0 * GIB})]

    monkeypatch.setattr(planning, "plan", never)
    assert run(config, "--search") == 1


VARIANTS = [
    f"{path.relative_to(ROOT)}:{name}"
    for path in sorted((ROOT / "configs").glob("qar_*.py"))
    for name in configs.variants(path)
]


@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_loads(name: str) -> None:
    found = configs.load(ROOT / name)
    assert found.batch.length == 640 and found.mesh.fsdp != 1
    assert (found.qar.contrast, found.qar.drop_row) == ("prototypes", 0.15)


PLANS = json.loads((ROOT / "docs" / "evidence" / "plans.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("command", PLANS)
def test_the_page_says_what_plans_said(command: str) -> None:
    """Of the variants as they stand: whoever changes one plans it again."""
    found, page = PLANS[command], (ROOT / "docs" / "scale.md").read_text(encoding="utf-8")
    topology, config = chips.topology(found["topology"]), configs.load(ROOT / found["config"])
    assert command in page and command.endswith(f" --config {found['config']} --topology {topology.name}")
    setting = aot.make_setting(config, runs.shape_of(config), 1024)
    flops, tokens = planning.useful(setting, "train", 0)
    assert found["useful_flops"] == pytest.approx(flops / topology.devices)
    assert found["tokens_per_second"] == pytest.approx(tokens / topology.devices / found["step_seconds"])
    assert found["mfu"] == pytest.approx(found["useful_flops"] / found["step_seconds"] / topology.chip.flops)
    (row,) = [line for line in page.splitlines() if f"`{Path(found['config']).name}` | `{topology.name}`" in line]
    told = [cell.strip() for cell in row.split("|")[3:-1]]
    memory, seconds = (
        f"{found['peak_bytes'] / GIB:.1f} of {topology.chip.hbm_bytes / GIB:.0f}",
        found["seconds"].values(),
    )
    assert told == [
        f"{config.batch.rows:,}",
        "yes" if found["fits"] else "no",
        memory,
        f"{found['step_seconds']:.2f}",
        ", ".join(f"{s:.2f}" for s in seconds),
        f"{found['tokens_per_second']:,.0f}",
        f"{found['mfu']:.1%}",
        {"HBM": "memory", "interconnect": "links"}.get(found["bound"], found["bound"]),
    ]
