"""python -m qaperso.prepare --input PATH [PATH ...] --output DIR [--format NAME] [--responder NAME ...]

Reads chats, scripts or benchmark files and writes a prepared data set, which --config.data.path names in training: cleaned
two-party dialogues, without near-duplicates, split by group, clustered by query. Running it again does nothing; a run
that was interrupted leaves nothing that looks finished. Exit codes: 0 done, 2 bad input.
"""

from __future__ import annotations

import argparse
import collections
import hashlib
import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qaperso import engine
from qaperso.data import clean, clusters, formats, prepared, shards
from qaperso.data.formats.common import normal
from qaperso.data.merge import Merged, Merging, merge
from qaperso.data.topics import Topics, find_clusters
from qaperso.errors import UserError, command, nearest
from qaperso.mesh import make_mesh
from qaperso.models.embedder import load_embedder

# Dialogues of an output shard.
SHARD_RECORDS = 20_000

# Numbers that are not negative, and what each is to be.
NOT_NEGATIVE = {
    "silence": "hours, or 0 for never",
    "min_per_querier": "a number of replies, 0 or more",
    "duplicates": "a similarity from 0.8 to 1, or 0 to keep all",
    "dev": "a share from 0 up to, not including, 1",
    "test": "a share from 0 up to, not including, 1",
    "unseen": "a share from 0 up to, not including, 1",
    "seed": "a whole number, 0 or more",
}
# Files that options name, and what is to be in them.
FILES = {"aliases": 'names as {"NAME": ["ALIAS", ...]} or lines ALIAS,NAME', "pseudonyms": "a secret of 16 characters"}


def prepare(options: argparse.Namespace) -> dict[str, Any]:
    """Makes the data set; returns its statistics.

    Raises:
      UserError: bad input, an output folder that holds something else, or dialogues that leak from split to split.
    """
    paths, output = [Path(p) for p in options.input], Path(options.output)
    for path in paths:
        if not path.exists():
            raise UserError(f"{path}: found nothing there, expected a file or a folder; check --input")
    # As JSON gives it back, since it is compared with what a manifest says.
    made_from = json.loads(json.dumps({"options": _recorded(options), "input": shards.fingerprint(paths)}))
    if _is_made(output, made_from):
        print(f"{output} is prepared from this input with these options already", file=sys.stderr)
        return json.loads((output / "stats.json").read_text(encoding="utf-8"))
    partial = output.with_name(output.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        (partial / "work").mkdir(parents=True)
    except OSError as error:
        raise UserError(f"{output} cannot be made ({error.strerror}); give another --output") from error
    try:
        stats = _write(options, paths, partial)
        shutil.rmtree(partial / "work")
        prepared.seal(partial, made_from)
        partial.rename(output)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return stats


def _recorded(options: argparse.Namespace) -> dict[str, Any]:
    """Options that decide what is written; no secret, path of this machine, or name that is to be hidden is among them."""
    found = {k: v for k, v in vars(options).items() if k not in ("input", "output", "workers", "engine")}
    for key, expected in FILES.items():
        try:
            found[key] = prepared.digest(Path(found[key])) if found[key] else None
        except OSError as error:
            raise UserError(
                f"--{key} {found[key]}: found no readable file ({error.strerror}), expected one with {expected}; "
                "check the path"
            ) from error
    found["encoder"] = Path(options.encoder).name if options.encoder else None
    if options.pseudonyms:
        known = json.dumps([found["pseudonyms"], options.responder])
        found["responder"] = hashlib.sha256(known.encode()).hexdigest()
    return found


def _is_made(output: Path, made_from: dict[str, Any]) -> bool:
    if not output.exists():
        return False
    if not (output / prepared.MANIFEST).is_file():
        raise UserError(f"{output} exists and is no prepared data set; give an --output that is not there yet")
    found = prepared.manifest(output)["made_from"]
    if found != made_from:
        changed = [k for k in made_from["options"] if found["options"].get(k) != made_from["options"][k]]
        what = f"with other options ({', '.join(changed)})" if changed else "from other input"
        raise UserError(f"{output} was prepared {what}; give another --output, or remove it first")
    return True


def _write(options: argparse.Namespace, paths: list[Path], folder: Path) -> dict[str, Any]:
    """Everything between reading and the manifest."""
    kind, why = (options.format, "as asked") if options.format else _detect(paths)
    print(f"format {kind}: {why}", file=sys.stderr)
    reading = shards.Reading(
        format=kind,
        responders=tuple(options.responder),
        columns=dict(options.column),
        aliases=clean.read_aliases(Path(options.aliases)) if options.aliases else {},
        silence=options.silence * 3600,
        scrub=options.scrub,
        keep_splits=not options.ignore_splits,
    )
    unread = shards.unread(kind, paths)
    if unread:
        print(
            f"files not read as {kind}: {len(unread):,}, first {unread[0]}; prepare other formats apart",
            file=sys.stderr,
        )
    with engine.start(options.engine, options.workers) as run:
        tasks = shards.read_tasks(reading, paths, folder / "work")
        columns = list(run(shards.read_shard, tasks))
        names = frozenset().union(*(own.speakers for own in columns))
        idle = sorted(reading.aliases.keys() - frozenset().union(*(own.aliases for own in columns)))
        if idle:
            first = f"{idle[0]!r}{nearest(idle[0], names)}"
            print(f"aliases that nobody goes by: {len(idle):,}, first {first}", file=sys.stderr)
        files = [task.target for task in tasks]
        rules = Merging(
            responders=reading.responders,
            min_per_querier=options.min_per_querier,
            threshold=options.duplicates,
            by_time=options.by_time,
            dev=options.dev,
            test=options.test,
            unseen=options.unseen,
            seed=options.seed,
            allow_leaks=options.allow_leaks,
        )
        merged = merge(columns, files, rules, unread)
        if options.pseudonyms:
            # Those who never speak to anybody who was asked for may be spoken of.
            hidden = clean.Pseudonyms(_secret(Path(options.pseudonyms)), names)
            renamed, counts = zip(*run(shards.rename_shard, [(file, hidden) for file in files]), strict=True)
            merged = merged.renamed(renamed, sum(counts, collections.Counter()))
        cluster, report = find_clusters(_topics(options), merged, files, run, folder)
        lengths = _write_splits(merged, cluster, files, run, folder)
    prepared.write_metadata(folder, lengths)
    _write_json(folder / "registry.json", merged.registry())
    lines = (json.dumps({"group": group, "split": split}) for group, split in merged.group_splits())
    (folder / "splits.jsonl").write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    # The reason names files, whose names may be those of people.
    told = "run without pseudonyms to see" if options.pseudonyms else why
    stats = {"format": {"name": kind, "why": told}, **merged.stats, "clusters": report}
    _write_json(folder / "stats.json", stats)
    return stats


def _detect(paths: Sequence[Path]) -> tuple[str, str]:
    """The format that all paths have, and why."""
    found = [formats.detect(path) for path in paths]
    for path, (name, why) in zip(paths, found, strict=True):
        if name != found[0][0]:
            raise UserError(f"{path}: found {name} ({why}), expected {found[0][0]} like {paths[0]}; prepare them apart")
    return found[0]


def _topics(options: argparse.Namespace) -> Topics:
    settings = options.clusters, options.query, options.seed
    if not options.encoder:
        return Topics(*settings)
    embed = load_embedder(options.encoder, make_mesh(-1, 1, 1))
    return Topics(*settings, Path(options.encoder).name, embed)


def _secret(path: Path) -> str:
    try:
        secret = path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"--pseudonyms {path}: found no readable text file ({error}), expected a file with a secret"
        ) from error
    if len(secret) < 16:
        raise UserError(
            f"--pseudonyms {path}: found a secret of {len(secret)} characters, expected 16 or more; lengthen it"
        )
    return secret


def _write_splits(
    merged: Merged, cluster: Any, files: list[Path], run: engine.Map, folder: Path
) -> dict[str, list[int]]:
    """Writes every split's shards; returns the number of records of each."""
    tasks, counts = [], {}
    for split in merged.splits():
        places = merged.places(split)
        count = max(-(-len(places) // SHARD_RECORDS), 1)
        counts[split] = count
        for k in range(count):
            part = places[k * SHARD_RECORDS : (k + 1) * SHARD_RECORDS]
            parts = tuple((files[s], rows, cluster[at]) for s, rows, at in merged.by_shard(part))
            tasks.append(shards.WriteTask(folder / prepared.shard_name(split, k, count), parts))
    written = iter(run(shards.write_shard, tasks))
    return {split: [next(written) for _ in range(count)] for split, count in counts.items()}


def _write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def summary(stats: dict[str, Any]) -> str:
    """What a person wants to see at the end."""
    lines = [f"{name}: {value:,}" for name, value in stats["counts"].items()]
    for split, s in stats["splits"].items():
        lines.append(f"{split}: {s['dialogues']:,} dialogues, {s['replies']:,} replies, {s['groups']:,} groups")
    lines.append(f"{stats['queriers']:,} queriers of {stats['responders']:,} responders")
    if stats["leaks"]:
        lines.append(f"LEAK: {stats['leaks']}")
    if all("terms" in row for row in stats["clusters"]):
        lines.append(clusters.format_report(stats["clusters"]))
    return "\n".join(lines)


def _pair(text: str) -> tuple[str, str]:
    meaning, sign, name = text.partition("=")
    if not sign:
        raise UserError(f"--column is '{text}', expected MEANING=NAME such as text=Message")
    return meaning, name


def _clusters(text: str) -> tuple[int, int]:
    low, sign, high = text.partition("-")
    try:
        bounds = int(low), int(high) if sign else int(low)
    except ValueError:
        bounds = (-1, -1)
    if bounds != (0, 0) and not 1 <= bounds[0] <= bounds[1]:
        raise UserError(
            f"--clusters is '{text}', expected a number, a range such as 4-16, or 0 for the data's own clusters"
        )
    return bounds


@command
def main(arguments: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m qaperso.prepare", description=__doc__, allow_abbrev=False)
    add = parser.add_argument
    add("--input", required=True, nargs="+", metavar="PATH", help="files or folders")
    add("--output", required=True, metavar="DIR", help="of the prepared data set; must not be there yet")
    add("--format", metavar="NAME", help=f"one of {', '.join(formats.FORMATS)}; default: found out")
    add("--responder", nargs="+", default=[], metavar="NAME", help="whose replies to keep; default: everybody's")
    add("--column", nargs="+", default=[], metavar="MEANING=NAME", help="columns of a table, such as text=Message")
    add("--aliases", metavar="FILE", help='names that mean one person: {"NAME": ["ALIAS", ...]} or lines ALIAS,NAME')
    add("--silence", type=float, default=6.0, metavar="HOURS", help="a longer silence begins a new session; 0 = never")
    add("--min-per-querier", type=int, default=1, metavar="N", help="leave out pairs with fewer replies")
    add("--duplicates", type=float, default=0.8, metavar="J", help="similarity of near-duplicates; 0 = keep all")
    add("--scrub", action="store_true", help="replace addresses, phone and card numbers in texts")
    add("--pseudonyms", metavar="FILE", help="replace names by pseudonyms made with the secret in FILE")
    add("--ignore-splits", action="store_true", help="draw splits anew where the data gives some")
    add("--by-time", action="store_true", help="the newest groups become test and dev")
    add("--dev", type=float, default=0.1, metavar="SHARE")
    add("--test", type=float, default=0.1, metavar="SHARE")
    add("--unseen", type=float, default=0.0, metavar="SHARE", help="of queriers, who are held out whole")
    add("--allow-leaks", action="store_true", help="only count what stands in two splits")
    add("--clusters", default="4-16", metavar="K|LOW-HIGH", help="how many; a range is decided by silhouette")
    add("--query", default="last", choices=("last", "all"), help="what is clustered: the querier's last turn, or all")
    add(
        "--encoder",
        metavar="DIR",
        help="sentence encoder, or base model whose mean state is clustered; default: TF-IDF",
    )
    add("--seed", type=int, default=0)
    add("--workers", type=int, default=1, metavar="N")
    add("--engine", default="local", choices=engine.ENGINES)
    options = parser.parse_args(arguments)
    for name, expected in NOT_NEGATIVE.items():
        if not (value := getattr(options, name)) >= 0:  # nor is it NaN
            raise UserError(f"--{name.replace('_', '-')} is {value}, expected {expected}")
    # As readers give names: a name that is copied from a file's may come in pieces (NFD).
    options.responder = [normal(name) for name in options.responder]
    options.column = [_pair(text) for text in options.column]
    options.clusters = _clusters(options.clusters)
    print(summary(prepare(options)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
