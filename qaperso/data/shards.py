"""The per-shard half of data preparation: each function takes one task, shares nothing, and leaves a file or columns."""

from __future__ import annotations

import collections
import dataclasses
import hashlib
import pickle
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from qaperso.data import clean, duplicates, formats, prepared, runs
from qaperso.data import clusters as topics
from qaperso.data.features import count_terms, draw_queries, query_text
from qaperso.data.formats.common import writable
from qaperso.data.splits import text_key
from qaperso.errors import UserError
from qaperso.types import Dialogue

# Bytes of a JSON-lines file that make one shard, whatever the number of workers.
SHARD_BYTES = 8 * 2**20


@dataclasses.dataclass(frozen=True)
class Reading:
    """What is done to every record while it is read.

    Attributes:
      format: a name of `formats.FORMATS`.
      responders: whose replies to keep; empty: everybody's.
      columns: meaning -> column name, for tables.
      aliases: alias -> name.
      silence: seconds after which a new session begins; 0 = never.
      scrub: whether personal data in texts becomes placeholders.
      keep_splits: whether splits that the data gives are kept.
    """

    format: str
    responders: tuple[str, ...] = ()
    columns: Mapping[str, str] = dataclasses.field(default_factory=dict)
    aliases: Mapping[str, str] = dataclasses.field(default_factory=dict)
    silence: float = 0.0
    scrub: bool = False
    keep_splits: bool = True


@dataclasses.dataclass(frozen=True)
class ReadTask:
    """Bytes [start, stop) of a unit, and the file for its dialogues; `prefix` makes ids of several units unique."""

    reading: Reading
    unit: Path
    start: int
    stop: int | None
    prefix: str
    target: Path


@dataclasses.dataclass(frozen=True)
class Columns:
    """What the merge needs to know of a shard's dialogues, a list entry each.

    Attributes:
      source: where they were read.
      ids, responders, queriers, groups, times, given: of the records; `given` is the split that the data gives.
      replies: how many replies a dialogue has.
      keys: digest of the dialogue's texts.
      speakers: everybody who speaks, whoever was asked for.
      aliases: those that somebody goes by.
      counts: what was read, dropped and changed.
    """

    source: str
    ids: list[str]
    responders: list[str]
    queriers: list[str]
    groups: list[str]
    times: list[float | None]
    given: list[str | None]
    replies: list[int]
    keys: list[bytes]
    speakers: frozenset[str]
    aliases: frozenset[str]
    counts: collections.Counter


def read_tasks(reading: Reading, paths: list[Path], folder: Path) -> list[ReadTask]:
    """One task a unit, or a byte range of a file of JSON lines; the same whatever the number of workers.

    Raises:
      UserError: nothing to read.
    """
    module = formats.load(reading.format)
    units = [(path, unit) for path in paths for unit in module.units(path)]
    tasks = []
    for path, unit in units:
        inside = unit.relative_to(path) if unit != path else Path(unit.name)
        # Lines of the canonical format carry ids of their own; elsewhere ids are unique within a unit only.
        own = len(units) == 1 or reading.format == "jsonl"
        prefix = "" if own else writable(inside.with_suffix("").as_posix()) + "/"
        size = unit.stat().st_size if module.LINES and unit.is_file() else 0
        for start in range(0, max(size, 1), SHARD_BYTES):
            stop = None if start + SHARD_BYTES >= size else start + SHARD_BYTES
            tasks.append(ReadTask(reading, unit, start, stop, prefix, folder / f"{len(tasks):06d}.pkl"))
    return tasks


def unread(format: str, paths: list[Path]) -> list[str]:
    """Files in folders of the input that the format's reader leaves alone, as they are called there, sorted.

    Hidden files do not count, nor what a reader looks up beside its units (`beside`, of a format that has it).
    """
    module = formats.load(format)
    beside = getattr(module, "beside", lambda unit: ())
    units = [unit for path in paths for unit in module.units(path)]
    read = {file.resolve() for unit in units for file in (unit, *beside(unit))}
    inside = {(file.relative_to(path), file) for path in paths if path.is_dir() for file in formats.visible(path)}
    return sorted(writable(name.as_posix()) for name, file in inside if file.resolve() not in read)


def read_shard(task: ReadTask) -> Columns:
    """Reads, cleans and cuts one unit; leaves its dialogues and their MinHash signatures in files."""
    reading, counts = task.reading, collections.Counter()
    module = formats.load(reading.format)
    asked = frozenset(reading.responders)
    dialogues: list[Dialogue] = []
    speakers: set[str] = set()
    aliases: set[str] = set()
    for record in module.read(task.unit, counts, reading.columns, task.start, task.stop):
        counts["records"] += 1
        if reading.aliases:
            aliases |= clean.speakers(record) & reading.aliases.keys()
            record = clean.rename(record, reading.aliases)
        record = clean.scrub_texts(record, counts) if reading.scrub else record
        speakers |= clean.speakers(record)
        if not reading.keep_splits:
            record = dataclasses.replace(record, split=None)
        for dialogue in runs.cut(record, asked, reading.silence):
            dialogues.append(dataclasses.replace(dialogue, id=task.prefix + dialogue.id))
    save(task.target, dialogues)
    np.save(task.target.with_suffix(".npy"), duplicates.signatures([duplicates.dialogue_text(d) for d in dialogues]))
    return Columns(
        source=str(task.unit),
        ids=[d.id for d in dialogues],
        responders=[d.responder for d in dialogues],
        queriers=[d.querier for d in dialogues],
        groups=[d.group for d in dialogues],
        times=[d.time for d in dialogues],
        given=[d.split for d in dialogues],
        replies=[max(len(d.replies), 1) for d in dialogues],
        keys=[text_key(d) for d in dialogues],
        speakers=frozenset(speakers),
        aliases=frozenset(aliases),
        counts=counts,
    )


def save(path: Path, dialogues: list[Dialogue]) -> None:
    """A shard's dialogues, for the stages after; a file of this run's own folder, never of a user's."""
    with path.open("wb") as file:
        pickle.dump(dialogues, file, pickle.HIGHEST_PROTOCOL)


def saved(path: Path) -> list[Dialogue]:
    """What `save` wrote."""
    with path.open("rb") as file:
        return pickle.load(file)


def chosen(path: Path, rows: np.ndarray) -> list[Dialogue]:
    """Some of a shard's dialogues, in the order of `rows`."""
    dialogues = saved(path)
    return [dialogues[i] for i in rows]


def rename_shard(task: tuple[Path, clean.Pseudonyms]) -> tuple[list[tuple[str, str, str]], collections.Counter]:
    """Puts pseudonyms for names in a shard; returns every dialogue's (responder, querier, group), and counts."""
    path, names = task
    counts: collections.Counter = collections.Counter()
    renamed = [names.apply(d, counts) for d in saved(path)]
    save(path, renamed)
    return [(d.responder, d.querier, d.group) for d in renamed], counts


def queries_of(task: tuple[Path, np.ndarray, str]) -> tuple[list[str], list[str]]:
    """Query texts and queriers of a shard's dialogues at `rows`."""
    path, rows, turns = task
    dialogues = chosen(path, rows)
    return [query_text(d, turns) for d in dialogues], [d.querier for d in dialogues]


def terms_of(task: tuple[Path, np.ndarray, str]) -> collections.Counter:
    """In how many queries of a shard each word occurs."""
    return count_terms(queries_of(task)[0])


def draw_of(task: tuple[Path, np.ndarray, str, int, int]) -> list[tuple[bytes, str]]:
    """A sample of a shard's queries at `rows`, those of training: (path, rows, turns, limit, seed)."""
    path, rows, turns, limit, seed = task
    return draw_queries((dataclasses.replace(d, split="train") for d in chosen(path, rows)), limit, seed, turns)


def assign_shard(task: tuple[Path, np.ndarray, str, Path]) -> tuple[np.ndarray, list[topics.Tally]]:
    """Clusters of a shard's dialogues at `rows`, int32[n], and what the report counts: (path, rows, turns, artefact)."""
    path, rows, turns, artefact = task
    clusters = topics.load(artefact)
    texts, queriers = queries_of((path, rows, turns))
    return clusters.assign(texts), topics.tally(clusters, texts, queriers)


def given_clusters(task: tuple[Path, np.ndarray]) -> np.ndarray:
    """The clusters that the data gives to a shard's dialogues at `rows`, int32[n]."""
    found = [(d.id, d.fields.get("cluster_id")) for d in chosen(*task)]
    for name, cluster in found:
        if isinstance(cluster, bool) or not isinstance(cluster, int) or not 0 <= cluster < 2**31:
            found = repr(cluster)[:40]
            raise UserError(f"dialogue {name!r}: found cluster_id {found}, expected a number; give --clusters K")
    return np.array([cluster for _, cluster in found], np.int32)


@dataclasses.dataclass(frozen=True)
class WriteTask:
    """An output shard, and the places of its dialogues: (shard file, row numbers, clusters)."""

    target: Path
    parts: tuple[tuple[Path, np.ndarray, np.ndarray], ...]


def write_shard(task: WriteTask) -> int:
    """Writes one ArrayRecord file; returns its number of records."""

    def pairs() -> Iterator[tuple[Dialogue, int]]:
        for path, rows, cluster in task.parts:
            yield from zip(chosen(path, rows), map(int, cluster), strict=True)

    return prepared.write_shard(task.target, pairs())


def fingerprint(paths: list[Path]) -> dict[str, Any]:
    """What a preparation was made from: number of visible files, bytes, and a sha256 over names and contents."""
    files = sorted(
        {
            (f.relative_to(p) if f != p else Path(f.name), f)
            for p in paths
            for f in ([p] if p.is_file() else formats.visible(p))
        }
    )
    total, size, count = hashlib.sha256(), 0, 0
    for name, file in files:
        try:
            content = prepared.digest(file)
        except OSError as error:
            raise UserError(f"{file} cannot be read ({error.strerror}); check the path") from error
        total.update(f"{name.as_posix()}\0{content}\n".encode("utf-8", "surrogateescape"))
        size, count = size + file.stat().st_size, count + 1
    return {"files": count, "bytes": size, "sha256": total.hexdigest()}
