"""Replies to a split's dialogues, kept in a file while they are written, so that an evaluation that was stopped goes on.

The file has one JSON object a line, see `FIELDS`. Replies are appended as each batch of them is finished; once all are
there, the lines are put into the data's order. A reply is what it would be alone, so a file that was resumed is the file of
an uninterrupted evaluation, byte for byte. Of several processes that evaluate together the first has the file.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from qaperso import reply
from qaperso.batching import Model
from qaperso.data.store import Store
from qaperso.data.text import Encoded
from qaperso.errors import UserError
from qaperso.generate import Sampling
from qaperso.mesh import told
from qaperso.run import Run

Record = dict[str, Any]
# Replies that are written to the file together; twice the slots of `reply.replies`, so that few of these idle.
CHUNK = 64
FIELDS = {
    "id": str,  # of the dialogue
    "split": str,
    "querier": str,
    "responder": str,
    "query": str,
    "reference": str,  # the true reply
    "reply": str,  # the model's; "" where it says nothing
    "group": str,
    "seed": int,  # of this reply's random numbers
    "step": int,  # of the checkpoint
    "sampling": dict,  # new_tokens, temperature, top_p
    "prompt": str,  # digest of all that the model reads and of the querier's row
}


def file_of(workdir: Path, split: str, stem: str = "predictions") -> Path:
    """Where replies to a split lie: STEM.jsonl for the test split, STEM_SPLIT.jsonl for another."""
    return workdir / (f"{stem}.jsonl" if split == "test" else f"{stem}_{split}.jsonl")


def read(path: Path) -> list[Record]:
    """The records of a file.

    Raises:
      UserError: it is not there, cannot be read, or a line is corrupt (a last line that was cut off is dropped with a
        warning).
    """
    try:
        return _parse(path.read_bytes(), path)
    except FileNotFoundError as error:
        raise UserError(f"{path} is not there; run python -m qaperso.evaluate --workdir {path.parent} first") from error
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); run python -m qaperso.evaluate again") from error


def collect(
    run: Run,
    model: Callable[[], Model],
    store: Store,
    split: str,
    indices: Sequence[int] | np.ndarray,
    step: int,
    path: Path,
) -> list[Record]:
    """Replies to dialogues: those that the file has already, and the others, which are written and added to it.

    A line is reused where everything in it but the reply is what would be written now. Lines of other dialogues of the
    split stay where step and sampling are the same. All others are dropped; the file is then written anew, whole or not
    at all.

    Args:
      run: who replies.
      model: gives it ready to reply (`batching.prepare`); called where a reply is missing.
      store: of the run's data.
      split: whose dialogues these are.
      indices: of the dialogues in the store, whose prompts must fit a row.
      step: of the checkpoint.
      path: of the file; it need not exist.

    Returns:
      A record for each index, in their order.

    Raises:
      UserError: a line of the file is corrupt (a last line that was cut off is dropped with a warning), or a query is
        longer than a row.
    """
    prompts = {int(i): reply.make_prompt(run, store.dialogues[i]) for i in indices}
    asked = {i: _record(run, store, i, split, step, prompt) for i, prompt in prompts.items()}
    order = {store.dialogues[i].id: n for n, i in enumerate(store.split(split).tolist())}
    raw = told(path.read_bytes() if jax.process_index() == 0 and path.exists() else b"")
    kept = _still_true(_parse(raw, path), asked.values(), order, _sampling(run), split, step)
    records = {r["id"]: r for r in sorted(kept, key=lambda r: order[r["id"]])}
    _replace(path, records.values())

    left = [i for i, record in asked.items() if record["id"] not in records]
    # Short ones first: the cache is as long as the longest under way needs.
    left.sort(key=lambda i: len(prompts[i].tokens))
    if left:
        ready = model()
        # The others write the same replies to nowhere.
        sink = path if jax.process_index() == 0 else Path(os.devnull)
        with sink.open("ab") as file, tqdm(total=len(left), unit="reply", dynamic_ncols=True, disable=None) as bar:
            for start in range(0, len(left), CHUNK):
                part = left[start : start + CHUNK]
                dialogues, rows = [store.dialogues[i] for i in part], store.row[part].tolist()
                how = [Sampling(**asked[i]["sampling"], seed=asked[i]["seed"]) for i in part]
                written = reply.replies(ready, dialogues, rows, how)
                fresh = [asked[i] | {"reply": text} for i, text in zip(part, written, strict=True)]
                records |= {r["id"]: r for r in fresh}
                file.write(_lines(fresh))
                file.flush()
                bar.update(len(part))
        _replace(path, sorted(records.values(), key=lambda r: order[r["id"]]))
    return [records[record["id"]] for record in asked.values()]


def _sampling(run: Run) -> dict[str, int | float]:
    g = run.config.generate
    return {"new_tokens": g.max_new_tokens, "temperature": g.temperature, "top_p": g.top_p}


def _record(run: Run, store: Store, index: int, split: str, step: int, prompt: Encoded) -> Record:
    """What is known of a dialogue before its reply, which is "" here."""
    d = store.dialogues[index]
    digest = hashlib.sha256(f"{int(store.row[index])} {d.responder}\n".encode())
    for part in (prompt.tokens, prompt.role):
        digest.update(np.asarray(part, np.int32).tobytes())
    for _, column in sorted(prompt.columns.items()):
        digest.update(column.tobytes())
    return {
        "id": d.id,
        "split": split,
        "querier": d.querier,
        "responder": d.responder,
        "query": d.query,
        "reference": d.reply,
        "reply": "",
        "group": d.group,
        # A dialogue's seed is its own, whichever others are asked.
        "seed": np.random.SeedSequence([run.config.seed, index]).generate_state(1).item(),
        "step": step,
        "sampling": _sampling(run),
        "prompt": digest.hexdigest(),
    }


def _still_true(
    found: Iterable[Record],
    asked: Iterable[Record],
    known: Mapping[str, int],
    sampling: Mapping[str, int | float],
    split: str,
    step: int,
) -> list[Record]:
    """The records that would be written again as they are, but for the reply; of an id the first."""
    wanted = {record["id"]: record for record in asked}
    common = {"split": split, "step": step, "sampling": sampling}
    kept: dict[str, Record] = {}
    for record in found:
        name = record["id"]
        if name in wanted:
            same = record | {"reply": ""} == wanted[name]
        else:
            same = name in known and all(record[k] == v for k, v in common.items())
        if same:
            kept.setdefault(name, record)
    return list(kept.values())


def _parse(raw: bytes, path: Path) -> list[Record]:
    *lines, rest = raw.split(b"\n")
    if rest:
        print(f"{path}, line {len(lines) + 1}: cut off, as by a kill; it is left out", file=sys.stderr)
    return [_parse_line(line, f"{path}, line {number}") for number, line in enumerate(lines, 1)]


def _parse_line(line: bytes, place: str) -> Record:
    mend = "delete the line, and its reply is written again"
    try:
        record = json.loads(line.decode())
    except ValueError as error:
        raise UserError(f"{place}: not JSON ({error}); {mend}") from error
    if not isinstance(record, dict):
        raise UserError(f"{place}: found {type(record).__name__}, expected a JSON object; {mend}")
    for name, kind in FIELDS.items():
        if type(record.get(name)) is not kind:
            what = f"{record[name]!r:.60}" if name in record else "nothing"
            raise UserError(f"{place}: '{name}' is {what}, expected {kind.__name__}; {mend}")
    return record


def _lines(records: Iterable[Record]) -> bytes:
    return "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records).encode()


def _replace(path: Path, records: Iterable[Record]) -> None:
    """Writes the file anew, whole or not at all, where its content is to change; the first process does."""
    new = _lines(records)
    if jax.process_index() == 0 and new != (path.read_bytes() if path.exists() else b""):
        partial = path.with_name(path.name + ".partial")
        partial.write_bytes(new)
        partial.replace(path)
