"""Suites: which cells there are, what is run and when, and the comparison by hand."""

from __future__ import annotations

import dataclasses
import json
import math
import threading
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from qaperso import arrays, bench, methods
from qaperso import config as configs
from qaperso.bench import Cell, Suite
from qaperso.errors import UserError
from qaperso.eval import compare
from qaperso.eval.compare import Items
from qaperso.methods import Setting
from qaperso.models.config import DecoderConfig

CONFIGS = Path(__file__).parents[1] / "configs"
TEXT = """
def get_suite():
    return dict(
        before={"base": ("configs/base.py", "steps=3")},
        methods={"Two towers": ("configs/qar.py", "base={base}"), "LoRA": ("configs/sft.py", "base={base}", "steps=7")},
        seeds=(0, 1),
        against={"Two towers": ("LoRA",)},
        metrics=("nll",),
        evaluate=("--replies", "5"),
    )
"""


@pytest.fixture
def suite_file(tmp_path: Path) -> Path:
    path = tmp_path / "suite_x.py"
    path.write_text(TEXT, encoding="utf-8")
    return path


def test_cells_come_base_first_then_seed_by_seed(suite_file: Path) -> None:
    found = bench.cells(bench.load_suite(suite_file), Path("runs"))
    base = Path("runs/before-base")
    assert found[0] == Cell("", 0, base, "configs/base.py", ("steps=3",))
    assert [(c.method, c.seed, c.workdir.name) for c in found[1:]] == [
        ("Two towers", 0, "two_towers-0"),
        ("LoRA", 0, "lora-0"),
        ("Two towers", 1, "two_towers-1"),
        ("LoRA", 1, "lora-1"),
    ]
    assert found[2].overrides == (f"base={base}", "steps=7", "seed=0")


@pytest.mark.parametrize("override", ["base={bse}", "base={}", "base={base"])
def test_an_override_that_names_no_run(suite_file: Path, override: str) -> None:
    suite_file.write_text(TEXT.replace('"base={base}", "steps=7"', f'"{override}"'), encoding="utf-8")
    with pytest.raises(UserError, match=r"must be one of its runs of `before` \(base\)") as caught:
        bench.cells(bench.load_suite(suite_file), Path("runs"))
    assert f"'{override}'" in str(caught.value)


def test_what_trains_nothing_is_run_once_and_compared_with_every_seed(suite_file: Path) -> None:
    suite_file.write_text(TEXT.replace("        seeds=", '        once=("LoRA",),\n        seeds='), encoding="utf-8")
    suite = bench.load_suite(suite_file)
    assert [(c.method, c.seed) for c in bench.cells(suite, Path("runs")) if c.method] == [
        ("Two towers", 0),
        ("LoRA", 0),
        ("Two towers", 1),
    ]
    one = np.ones(1)
    values = {("Two towers", 0): 2.0, ("Two towers", 1): 4.0, ("LoRA", 0): 1.0}
    found = {key: Items(("a",), ("q",), ("g",), {"nll": (one * x, one)}, "") for key, x in values.items()}
    made = bench.compare(suite, found)
    assert made["LoRA"]["value"]["nll"]["value"] == 1.0
    assert made["Two towers"]["difference"]["LoRA"]["nll"]["value"] == 2.0  # the mean of 1 and 3


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("get_suite", "suite", "defines no get_suite"),
        ("seeds=", "sedes=", "unknown field 'sedes'; did you mean 'seeds'"),
        ("        seeds=(0, 1),\n", "", "no field 'seeds'"),
        ('("LoRA",)}', '("LoRa",)}', "did you mean 'LoRA'"),
        ('against={"Two', 'against={"Tow', "did you mean 'Two towers'"),
        ("        seeds=", '        once=("LoRa",),\n        seeds=', "did you mean 'LoRA'"),
        ("seeds=(0, 1)", "seeds=3", r"suite_x\.py': seeds is 3, expected a tuple of one or more whole numbers, as in"),
        ("seeds=(0, 1)", "seeds=()", r"seeds is \(\), expected a tuple of one or more whole numbers"),
        ('metrics=("nll",)', 'metrics=("nll")', r"metrics is 'nll', expected a tuple of strings, as in \('nll',\)"),
        ('against={"Two towers": ("LoRA",)}', 'against={"Two towers": "LoRA"}', "expected a dict of tuples of strings"),
        ('("configs/base.py", "steps=3")', "()", r"before is \{'base': \(\)\}, expected a dict of tuples of strings"),
        (
            "seeds=(0, 1)",
            "seeds=(1 / 0,)",
            r"suite_x\.py', line 6: found ZeroDivisionError: division by zero, expected",
        ),
        ("return dict(", "dict(", r"get_suite\(\) returns None, expected a dict of fields"),
        ("seeds=(0, 1)", "seeds=(0, 1), split='devel'", "split is 'devel', expected one of train, dev, test, unseen"),
    ],
)
def test_a_wrong_suite_is_one_clear_error(suite_file: Path, old: str, new: str, expected: str) -> None:
    suite_file.write_text(TEXT.replace(old, new), encoding="utf-8")
    with pytest.raises(UserError, match=expected):
        bench.load_suite(suite_file)
    assert bench.main(["--suite", str(suite_file), "--output", str(suite_file.parent / "runs")]) == 2
    assert not (suite_file.parent / "runs").exists()


class Commands:
    """Stands for the processes: notes them and leaves the files that they would."""

    def __init__(self, stop_after: float = math.inf):
        self.asked: list[str] = []
        self._left = stop_after

    def __call__(self, words: Sequence[str], deadline: float, log: Path | None) -> bool:
        if self._left <= 0:
            return False
        self._left -= 1
        workdir = Path(words[words.index("--workdir") + 1])
        workdir.mkdir(parents=True, exist_ok=True)
        self.asked.append(f"{words[0].removeprefix('qaperso.')} {workdir.name}")
        if words[0] == "qaperso.evaluate":
            split, *options = words[4:]
            assert words[3] == "--split" and options == ["--replies", "5"]
            shift = int(workdir.name[-1]) - (0.5 if "towers" in workdir.name else 0.0)
            scores = {"nll": (np.array([1.0, 3.0]) + shift, np.ones(2))}
            compare.save(compare.file_of(workdir, split), Items(("a", "b"), ("q", "r"), ("g", "h"), scores, ""))
        return True


def test_what_is_done_is_left_alone(
    suite_file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    output = suite_file.parent / "runs"
    words = ["--suite", str(suite_file), "--output", str(output)]
    # Stopped while the second cell is evaluated.
    first, second, third = Commands(4), Commands(), Commands()
    monkeypatch.setattr(bench, "_command", first)
    assert bench.main(words) == 0
    assert "1 of 4 cells are done" in capsys.readouterr().out
    monkeypatch.setattr(bench, "_command", second)
    assert bench.main(words) == 0
    assert first.asked[-1] == second.asked[0] == "train lora-0"
    assert first.asked[:3] == ["train before-base", "train two_towers-0", "evaluate two_towers-0"]
    assert second.asked[1:] == [
        "evaluate lora-0",
        *(f"{c} {m}-1" for m in ("two_towers", "lora") for c in ("train", "evaluate")),
    ]
    monkeypatch.setattr(bench, "_command", third)
    assert bench.main([*words, "--table"]) == 0 and not third.asked
    found = json.loads((output / "table.json").read_text(encoding="utf-8"))
    assert found["cells"] == found["of"] == 4
    # (1 + 3) / 2, and one more with the second seed; half less with two towers.
    towers, lora = (found["methods"][m] for m in ("Two towers", "LoRA"))
    assert towers["value"]["nll"]["value"] == 2.0 and lora["value"]["nll"]["value"] == 2.5
    assert towers["difference"]["LoRA"]["nll"] == {"value": -0.5, "low": -0.5, "high": -0.5, "n": 2}
    assert not lora["difference"]
    lines = (output / "table.md").read_text(encoding="utf-8").splitlines()
    assert lines[2].startswith("| Two towers | 2 | 2.000 [")
    assert lines[3] == "| less LoRA | 2 | -0.500 [-0.500, -0.500] |"
    assert lines[4].startswith("| LoRA | 2 | 2.500 [") and not lines[5]


def test_a_suite_on_dev_leaves_the_test_split_unread(suite_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    suite_file.write_text(TEXT.replace("seeds=", 'split="dev",\n        seeds='), encoding="utf-8")
    monkeypatch.setattr(bench, "_command", Commands())
    output = suite_file.parent / "runs"
    assert bench.main(["--suite", str(suite_file), "--output", str(output)]) == 0
    assert len(list(output.glob("*/items_dev.npz"))) == 4 and not list(output.glob("*/items.npz"))
    assert json.loads((output / "table.json").read_text(encoding="utf-8"))["cells"] == 4


def test_no_cell_begins_after_the_deadline(suite_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commands = Commands()
    monkeypatch.setattr(bench, "_command", commands)
    words = ["--suite", str(suite_file), "--output", str(suite_file.parent / "runs"), "--minutes", "0"]
    assert bench.main(words) == 2 and not commands.asked


def test_the_interval_of_several_seeds_knows_that_seeds_differ() -> None:
    # Within a seed every dialogue differs alike: with many dialogues, only the seeds' own spread is left.
    suite = Suite({"A": ("a.py",), "B": ("b.py",)}, (0, 1, 2), {"A": ("B",)}, ("nll",))
    names = tuple(str(i) for i in range(200))
    found = {}
    for seed, gap in zip(suite.seeds, (-1.0, 0.0, 1.0), strict=True):
        for method in suite.methods:
            values = np.random.default_rng(seed).normal(size=200) + (gap if method == "A" else 0.0)
            found[method, seed] = Items(names, names, names, {"nll": (values, np.ones(200))}, "")
    difference = bench.compare(suite, found)["A"]["difference"]["B"]["nll"]
    assert difference["value"] == pytest.approx(0.0, abs=1e-12) and difference["n"] == 3
    assert difference["low"] < -0.6 and difference["high"] > 0.6
    one = {key: x for key, x in found.items() if key[1] == 0}
    assert bench.compare(suite, one)["A"]["difference"]["B"]["nll"]["value"] == -1.0


def test_a_failing_command_stops_the_suite(tmp_path: Path) -> None:
    cell = Cell("A", 0, tmp_path / "run", str(tmp_path / "absent.py"), ())
    with pytest.raises(UserError, match="exit code 2"):
        bench.run_cell(cell, (), math.inf)


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("suite_*.py")), ids=lambda p: p.stem)
def test_shipped_suites(path: Path) -> None:
    suite = bench.load_suite(path)
    for cell in bench.cells(suite, Path("runs")):
        config = configs.load(CONFIGS.parent / cell.config, cell.overrides)
        assert not cell.method or config.seed == cell.seed


def test_the_town_s_baseline_has_as_many_parameters() -> None:
    sizes = []
    for name in ("quickstart", "quickstart_matched"):
        config = configs.load(CONFIGS / f"{name}.py")
        model = configs.load(CONFIGS / "quickstart_base.py").model
        shape = dict(model) | dict(vocab=64, head_dim=model.embed // model.heads, tied=True)
        classes = {"cluster": np.zeros(60, np.int32)}
        setting = Setting(config, DecoderConfig(**shape, eos_ids=(1,)), 1 + 12 + config.data.spare_rows, 16, classes)
        trainable, _ = methods.load(config.method).declare(setting)
        sizes.append(sum(math.prod(spec.shape) for spec in arrays.flat(trainable, arrays.is_spec).values()))
    assert sizes == [311_168, 311_040]


def test_a_cell_of_another_configuration_is_not_taken_for_this_one(tmp_path: Path) -> None:
    file = tmp_path / "x.py"
    file.write_text(
        "from qaperso.config import default\n\n\ndef get_config():\n    return default()\n", encoding="utf-8"
    )
    cell = Cell("A", 1, tmp_path / "run", str(file), ("steps=7", "seed=1"))
    bench.check(cell)
    cell.workdir.mkdir()
    parts = dict.fromkeys(("model", "registry", "clusters", "classes", "base"), {})
    record = {"config": configs.to_json(configs.load(file, cell.overrides)), **parts}
    (cell.workdir / "run.json").write_text(json.dumps(record), encoding="utf-8")
    bench.check(cell)
    with pytest.raises(UserError, match=r"another configuration \(steps: 7 -> 9\); give another --output"):
        bench.check(dataclasses.replace(cell, overrides=("steps=9", "seed=1")))


def test_several_cells_at_a_time_and_one_that_fails(
    suite_file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    commands, together, logs = Commands(), threading.Barrier(2, timeout=30), []

    def command(words: Sequence[str], deadline: float, log: Path | None) -> bool:
        logs.append(log)
        if words[0] == "qaperso.train" and words[4].endswith("-0"):
            together.wait()  # never comes back unless both are under way
            if "lora" in words[4]:
                raise UserError("it broke")
        return commands(words, deadline, log)

    monkeypatch.setattr(bench, "_command", command)
    output = suite_file.parent / "runs"
    words = ["--suite", str(suite_file), "--output", str(output), "--jobs", "2"]
    assert bench.main(words) == 2
    found = capsys.readouterr()
    assert "3 of 4 cells are done" in found.out and "lora-0: it broke" in found.err
    assert output / "two_towers-1.log" in logs
    assert bench.main([*words[:-1], "0"]) == 2 and "--jobs is 0" in capsys.readouterr().err


def test_a_cell_s_log_has_what_its_commands_say(tmp_path: Path) -> None:
    cell, log = Cell("A", 0, tmp_path / "run", str(tmp_path / "absent.py"), ()), tmp_path / "run.log"
    with pytest.raises(UserError, match="run.log"):
        bench.run_cell(cell, (), math.inf, log)
    assert "absent.py' is not a file" in log.read_text(encoding="utf-8")
