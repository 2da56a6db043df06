"""The command that makes data sets: what it writes, that it writes the same however it runs, and what it refuses."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny

from qaperso import prepare
from qaperso.data import clusters, prepared
from qaperso.errors import UserError
from qaperso.types import Dialogue, Turn

HAS_RAY = importlib.util.find_spec("ray") is not None
WORDS = "apple river stone lantern harbour pepper meadow thunder copper window garden ladder velvet anchor".split()


def talk(seed: int, asks: str, answers: str, length: int = 4) -> list[dict[str, str]]:
    """Turns of random words: no two talks are alike."""
    rng = random.Random(seed)
    said = [" ".join(rng.choices(WORDS, k=12)) for _ in range(length)]
    return [{"speaker": (asks, answers)[i % 2], "text": text} for i, text in enumerate(said)]


def scenes(count: int = 60, seed: int = 0) -> list[dict[str, Any]]:
    people = ["ann", "bo", "cy"]
    return [{"group": f"scene {i}", "turns": talk(seed * 10_000 + i, people[i % 3], "rex")} for i in range(count)]


def write(path: Path, items: list[Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(item) + "\n" for item in items), encoding="utf-8")
    return path


def call(source: Path, output: Path, *more: str) -> tuple[int, str, str]:
    words = ["--input", source, "--output", output, "--responder", "rex", "--clusters", "3", *more]
    return tiny.call(prepare.main, *words)


def refused(source: Path, output: Path, *more: str) -> str:
    """The one line of an error that leaves nothing behind."""
    before = sorted(p.name for p in output.parent.iterdir())
    code, out, err = call(source, output, *more)
    lines = err.strip().splitlines()
    assert code == 2 and lines[-1].startswith("error: ") and sum(line.startswith("error:") for line in lines) == 1, err
    assert sorted(p.name for p in output.parent.iterdir()) == before
    return lines[-1]


def stats_of(output: Path) -> dict[str, Any]:
    return json.loads((output / "stats.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(input, output) of one preparation."""
    folder = tmp_path_factory.mktemp("prepare")
    source = write(folder / "scenes.jsonl", scenes())
    code, out, err = call(source, folder / "out")
    assert code == 0, err
    assert "format scenes: " in err and "3 queriers of 1 responders" in out
    return source, folder / "out"


def test_what_is_written(made):
    _, output = made
    dialogues = prepared.read(output)
    assert len(dialogues) == 60 and {d.split for d in dialogues} == {"train", "dev", "test"}
    by_group = {d.group: d for d in dialogues}
    first = by_group["scene 0"]
    expected = scenes()[0]["turns"]
    assert [(t.speaker, t.text) for t in first.turns] == [(t["speaker"], t["text"]) for t in expected]
    assert (first.responder, first.querier, first.replies, first.time) == ("rex", "ann", (1, 3), None)
    listed = [json.loads(line) for line in (output / "splits.jsonl").read_text().splitlines()]
    assert {v["group"]: v["split"] for v in listed} == {d.group: d.split for d in dialogues}
    registry = json.loads((output / "registry.json").read_text())
    assert sum(registry["queriers"]["ann"].values()) == 20 and sum(registry["responders"]["rex"].values()) == 60
    stats = stats_of(output)
    assert {k: v["dialogues"] for k, v in stats["splits"].items()} == {"train": 48, "dev": 6, "test": 6}
    assert sum(row["size"] for row in stats["clusters"]) == 60 and all(row["terms"] for row in stats["clusters"])
    # New queries are assigned at serving as these were.
    artefact = clusters.load(output / prepared.CLUSTERS)
    assert artefact.assign([d.query for d in dialogues]).tolist() == [d.fields["cluster_id"] for d in dialogues]


def test_tensorflow_datasets_reads_it_without_tensorflow(made):
    code = (
        "import sys, tensorflow_datasets as tfds;"
        f"source = tfds.builder_from_directory({str(made[1])!r}).as_data_source('train');"
        "print(len(source), source[0]['responder'].decode(), 'tensorflow' in sys.modules)"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.split() == ["48", "rex", "False"]


def test_a_second_time_does_nothing_and_other_options_are_refused(made):
    source, output = made
    before = tiny.contents(output)
    code, out, err = call(source, output)
    assert (
        code == 0
        and "is prepared from this input with these options already" in err
        and tiny.contents(output) == before
    )
    assert "with other options (seed)" in refused(source, output, "--seed", "5")
    other = write(source.parent / "other.jsonl", scenes(30))
    assert "from other input" in refused(other, output)
    (source.parent / "taken").mkdir(exist_ok=True)
    assert "is no prepared data set" in refused(source, source.parent / "taken")
    assert tiny.contents(output) == before


@pytest.mark.parametrize(
    "how",
    [
        ("--workers", "3"),
        pytest.param(("--engine", "ray", "--workers", "2"), marks=pytest.mark.skipif(not HAS_RAY, reason="needs ray")),
    ],
)
def test_any_number_of_workers_writes_the_same(made, tmp_path, monkeypatch, how):
    """Many shards: the file is read in pieces of 4 kB."""
    monkeypatch.setattr(prepare.shards, "SHARD_BYTES", 4096)
    assert call(made[0], tmp_path / "one")[0] == 0
    assert call(made[0], tmp_path / "many", *how)[0] == 0
    assert tiny.contents(tmp_path / "one") == tiny.contents(tmp_path / "many")
    whole = {d.group: (d.turns, d.split, d.fields) for d in prepared.read(made[1])}
    assert {d.group: (d.turns, d.split, d.fields) for d in prepared.read(tmp_path / "one")} == whole


def test_output_shards(made, tmp_path, monkeypatch):
    monkeypatch.setattr(prepare, "SHARD_RECORDS", 7)
    assert call(made[0], tmp_path / "out")[0] == 0
    assert len(list((tmp_path / "out").glob("*-train.array_record-*"))) == 7
    assert prepared.read(tmp_path / "out") == prepared.read(made[1])


# What must not pass in silence.


def test_planted_duplicate_is_dropped_and_listed(tmp_path):
    items = scenes()
    # The same talk at another place, one word changed; and a whole scene twice, word for word.
    near = json.loads(json.dumps(items[0])) | {"group": "scene 900"}
    near["turns"][0]["text"] = near["turns"][0]["text"].replace(" ", " well ", 1)
    code, out, err = call(write(tmp_path / "in.jsonl", [*items, near, items[3] | {"group": "copy"}]), tmp_path / "out")
    assert code == 0, err
    stats = stats_of(tmp_path / "out")
    assert stats["counts"]["dialogues dropped: near-duplicates"] == 2
    assert len(stats["dropped"]["near-duplicates"]) == 2 and "scene 900" in stats["dropped"]["near-duplicates"][0]
    assert len(prepared.read(tmp_path / "out")) == 60
    code, _, _ = call(tmp_path / "in.jsonl", tmp_path / "kept", "--duplicates", "0")
    kept = prepared.read(tmp_path / "kept")
    assert code == 0 and len(kept) == 62
    assert len({d.split for d in kept if d.group in ("scene 3", "copy")}) == 1


def canonical(number: int, split: str | None = None, **more: Any) -> dict[str, Any]:
    turns = talk(number, "ann", "rex", 2)
    found = {"id": f"d{number}", "responder": "rex", "querier": "ann", "turns": turns, "group": f"g{number}"}
    return found | ({} if split is None else {"split": split}) | more


def test_planted_leak_is_refused_unless_overridden(tmp_path):
    items = [canonical(i, "train" if i < 30 else "test") for i in range(40)]
    leaking = canonical(50, "test", group="g3")
    source = write(tmp_path / "in.jsonl", [*items, leaking])
    how = ("--dev", "0", "--clusters", "2")
    line = refused(source, tmp_path / "out", *how)
    assert "'d3'" in line and "'d50'" in line and "found splits train and test" in line and "'g3'" in line
    code, _, err = call(source, tmp_path / "out", *how, "--allow-leaks")
    assert code == 0, err
    assert "'d50'" in stats_of(tmp_path / "out")["leaks"]
    assert {d.id: d.split for d in prepared.read(tmp_path / "out")}["d50"] == "test"
    code, _, _ = call(source, tmp_path / "drawn", "--clusters", "2", "--ignore-splits")
    assert code == 0 and stats_of(tmp_path / "drawn")["leaks"] == ""


def test_same_text_leak(tmp_path):
    items = [canonical(i, "train" if i < 30 else "test") for i in range(40)]
    copy = canonical(3, "test", id="copy", group="elsewhere")
    line = refused(write(tmp_path / "in.jsonl", [*items, copy]), tmp_path / "out", "--duplicates", "0", "--dev", "0")
    assert "'d3'" in line and "'copy'" in line


def test_files_that_contradict_each_other(tmp_path):
    write(tmp_path / "in" / "a.jsonl", [canonical(i) for i in range(30)])
    other = canonical(5) | {"turns": talk(99, "ann", "rex", 2)}
    write(tmp_path / "in" / "b.jsonl", [canonical(7), other])
    line = refused(tmp_path / "in", tmp_path / "out", "--format", "jsonl")
    assert "a.jsonl" in line and "b.jsonl" in line and "'d5'" in line and "two different texts" in line
    write(tmp_path / "in" / "b.jsonl", [canonical(7)])
    code, _, err = call(tmp_path / "in", tmp_path / "out", "--format", "jsonl", "--clusters", "2")
    assert code == 0, err
    assert stats_of(tmp_path / "out")["counts"]["dialogues dropped: read twice"] == 1


def test_exports_that_overlap(tmp_path):
    """The same days stand in an older and a newer export; the same words at another time are no copy."""

    def export(days: int) -> dict[str, Any]:
        messages = []
        for day in range(days):
            for k, turn in enumerate(talk(day % 25, "Ida", "Noor", 2)):
                who = {"from": turn["speaker"], "from_id": f"user of {turn['speaker']}"}
                at = str(1619863200 + 86400 * day + k)
                messages.append({"type": "message", "date_unixtime": at, "text": turn["text"], **who})
        return {"name": "Ida", "type": "personal_chat", "id": 77, "messages": messages}

    for name, days in (("ChatExport_1", 20), ("ChatExport_2", 30)):
        write(tmp_path / "in" / name / "result.json", [export(days)])
    code, _, err = call(tmp_path / "in", tmp_path / "out", "--responder", "Noor", "--duplicates", "0")
    assert code == 0, err
    # tf.train.Example keeps times as float32.
    expected = [float(np.float32(1619863201 + 86400 * day)) for day in range(30)]
    assert sorted(d.time for d in prepared.read(tmp_path / "out")) == expected
    assert stats_of(tmp_path / "out")["counts"]["dialogues dropped: read twice"] == 20


def test_bad_bytes_lines_and_names(tmp_path):
    good = json.dumps(scenes(1)[0]).encode()
    long = b'{"group": "' + b"x" * (50 * 2**20) + b'"}'
    cases = {
        "encoding": (good + b"\n\xff\xfe\n", "in.jsonl:2: found byte 0xff at offset", "expected UTF-8"),
        "json": (good + b'\n{"group": "g", \n', "in.jsonl:2: found broken JSON", "mend that line"),
        "long": (good + b"\n" + long + b"\n", "in.jsonl:2: found a line of more than 16 MiB", "split it into lines"),
        "path": (good.replace(b"ann", b"../../x"), "in.jsonl:1", "without '..'"),
        "control": (good.replace(b"ann", b"a\\u0007b"), "in.jsonl:1", "control character U+0007"),
        "empty": (b"\n", "in.jsonl: found an empty file", "expected dialogues"),
    }
    for content, *parts in cases.values():
        (tmp_path / "in.jsonl").write_bytes(content)
        line = refused(tmp_path / "in.jsonl", tmp_path / "out", "--format", "scenes")
        assert all(part in line for part in parts), line


def test_truncated_shard(made, tmp_path):
    tiny_copy = tmp_path / "copy"
    shutil.copytree(made[1], tiny_copy)
    shard = next(tiny_copy.glob("*-train.array_record-*"))
    shard.write_bytes(shard.read_bytes()[:-10])
    with pytest.raises(UserError, match=rf"{shard.name}: found \d+ bytes, expected \d+ bytes; prepare the data again"):
        prepared.read(tiny_copy)
    shard.unlink()
    with pytest.raises(UserError, match="found no such file"):
        prepared.read(tiny_copy)


@pytest.mark.parametrize(
    "words, parts",
    [
        (["--responder", "rx"], ["nobody 'rx' who replies", "did you mean 'rex'?"]),
        (["--clusters", "two"], ["--clusters is 'two'"]),
        (["--clusters", "5-3"], ["--clusters is '5-3'"]),
        (["--clusters", "0"], ["found cluster_id None", "give --clusters K"]),
        (["--clusters", "1000"], ["distinct queries"]),
        (["--column", "text"], ["--column is 'text', expected MEANING=NAME"]),
        (["--workers", "0"], ["--workers is 0, expected at least 1"]),
        (["--format", "scene"], ["'scene'", "did you mean 'scenes'?"]),
        (["--min-per-querier", "500"], ["found no dialogue to keep (at most 40 replies of a pair)"]),
        (["--dev", "1.5"], ["dev: found 1.5"]),
        (["--by-time"], ["found no time, expected one to split by time"]),
        (["--pseudonyms", "/dev/null"], ["found a secret of 0 characters, expected 16 or more"]),
        (
            ["--pseudonyms", "gone"],
            ["--pseudonyms gone: found no readable file (No such file", "with a secret", "check"],
        ),
        (
            ["--aliases", "gone"],
            ["--aliases gone: found no readable file (No such file", "lines ALIAS,NAME; check the path"],
        ),
        (["--aliases", "/"], ["--aliases /: found no readable file (Is a directory)"]),
        (["--silence", "-1"], ["--silence is -1.0, expected hours, or 0 for never"]),
        (["--silence", "nan"], ["--silence is nan, expected hours, or 0 for never"]),
        (["--min-per-querier", "-1"], ["--min-per-querier is -1, expected a number of replies, 0 or more"]),
        (["--duplicates", "-0.8"], ["--duplicates is -0.8, expected a similarity from 0.8 to 1, or 0 to keep all"]),
        (["--dev", "-0.1"], ["--dev is -0.1, expected a share from 0"]),
        (["--test", "-0.1"], ["--test is -0.1, expected a share from 0"]),
        (["--unseen", "-0.1"], ["--unseen is -0.1, expected a share from 0"]),
        (["--seed", "-1"], ["--seed is -1, expected a whole number, 0 or more"]),
        (["--encoder", "absent"], ["absent"]),
    ],
)
def test_bad_options(made, tmp_path, words, parts):
    line = refused(made[0], tmp_path / "out", *words)
    assert all(part in line for part in parts), line


def test_paths_of_two_formats(made, tmp_path):
    other = write(tmp_path / "in.jsonl", [canonical(1)])
    words = ["--input", made[0], other, "--output", tmp_path / "out"]
    code, _, err = tiny.call(prepare.main, *words)
    assert code == 2 and "found jsonl" in err and "expected scenes like" in err
    code, _, err = tiny.call(prepare.main, "--input", tmp_path / "gone", "--output", tmp_path / "out")
    assert code == 2 and "found nothing there" in err


@pytest.mark.parametrize(
    ("given", "mend"),
    [
        (("train", "test"), "expected at least 1 to fill dev; give --dev 0, or add groups"),
        (("train", "train"), "expected at least 2 to fill dev, test; give --dev 0 --test 0, or add groups"),
        (("train", None), "found 1 groups without a split"),
        (("train", None), "expected at least 2 to fill dev, test; give --dev 0, or add groups"),
        (("dev", "test"), "expected at least 1 to fill train; add groups"),
    ],
)
def test_given_splits_that_lack_one(tmp_path, given, mend):
    source = write(tmp_path / "in.jsonl", [canonical(i, split) for i, split in enumerate(given)])
    assert mend in refused(source, tmp_path / "out")


def test_unseen_queriers_and_minimum(made, tmp_path):
    assert call(made[0], tmp_path / "out", "--unseen", "0.3")[0] == 0
    dialogues = prepared.read(tmp_path / "out")
    held = {d.querier for d in dialogues if d.split == "unseen"}
    assert len(held) == 1 and held.isdisjoint({d.querier for d in dialogues if d.split == "train"})
    few = [*scenes(), {"group": "x", "turns": talk(777, "guest", "rex")}]
    assert call(write(tmp_path / "in.jsonl", few), tmp_path / "min", "--min-per-querier", "3")[0] == 0
    assert {d.querier for d in prepared.read(tmp_path / "min")} == {"ann", "bo", "cy"}


def test_killed_while_it_works(made, tmp_path):
    """Whenever it is killed, there is either no data set or a whole one; the next run makes the same."""
    words = [sys.executable, "-m", "qaperso.prepare", "--input", str(made[0]), "--responder", "rex", "--clusters", "3"]
    output = tmp_path / "out"
    for wait in (0.0, 0.3):
        process = subprocess.Popen([*words, "--output", str(output)], cwd=tiny.ROOT, stderr=subprocess.DEVNULL)
        partial, start = output.with_name("out.partial"), time.monotonic()
        while not partial.exists() and time.monotonic() - start < 60 and process.poll() is None:
            time.sleep(0.01)
        time.sleep(wait)
        process.send_signal(signal.SIGKILL)
        process.wait()
        if output.exists():
            break
        with pytest.raises(UserError, match="is no prepared data set"):
            prepared.read(partial)
    if not output.exists():
        assert call(made[0], output)[0] == 0
    assert tiny.contents(output) == tiny.contents(made[1])
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_dialogues_survive_the_shard(tmp_path):
    turns = (Turn("r", "你好"), Turn("q", ""), Turn("r", "x" * 300))
    odd = Dialogue("ü\n", "r", "q", turns, "g", 1.5, "train", (0, 2), {"a": [1, {"b": None}], "cluster_id": 4})
    plain = Dialogue("p", "r", "q", turns, "g", None, "train")
    count = prepared.write_shard(tmp_path / prepared.shard_name("train", 0, 1), [(odd, 4), (plain, 2)])
    prepared.write_metadata(tmp_path, {"train": [count]})
    prepared.seal(tmp_path, {})
    first, second = prepared.read(tmp_path)
    assert first == odd
    assert second == dataclasses.replace(plain, fields={"cluster_id": 2})
