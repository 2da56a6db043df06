"""The folder of a run, claimed: it is this run's, and nobody else works in it."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator

import jax

from qaperso import checkpoint, storage
from qaperso import config as configs
from qaperso.data.store import Registry
from qaperso.errors import UserError
from qaperso.models import tokenizer as tokenizers
from qaperso.run import RECORD, Run, read_record

TOKENIZER = "tokenizer"


@contextlib.contextmanager
def claimed(run: Run) -> Iterator[None]:
    """Makes the run's folder, or checks that the folder there is this run's; keeps other runs out of it meanwhile.

    What the folder's disk refuses inside of the block becomes a UserError. The first of several processes holds the lock.

    Raises:
      UserError: the folder belongs to another configuration or other data, or is some other folder (nothing is touched), or
        another run works in it.
    """
    folder = run.workdir
    check(run)
    if jax.process_index() != 0:
        with storage.plainly(folder):
            yield
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{folder} cannot be made ({error.strerror}); give another --workdir") from error
    with storage.locked(folder), storage.plainly(folder):
        check(run)  # somebody may have been quicker
        if not (folder / RECORD).exists():
            tokenizers.save_tokenizer(run.tokenizer, folder / TOKENIZER)
            checkpoint.write_json(folder / RECORD, run.record)
        yield


def check(run: Run) -> None:
    """Makes sure that the run's folder is its own, new or empty.

    Raises:
      UserError: it is not.
    """
    folder = run.workdir
    # Listed before it is asked for its record, which the first process may be writing now.
    inside = {path.name for path in folder.iterdir()} if folder.is_dir() else {""} if folder.exists() else set()
    if (folder / RECORD).exists():
        old = read_record(folder)
        if Registry.from_json(old["registry"]).forgotten:
            raise UserError(
                f"{folder}: somebody was forgotten in this run, and its data still has them; train anew without them with"
                f" python -m qaperso.forget --workdir {folder} --retrain NEW"
            )
        changed = configs.differences(configs.from_json(old["config"]), run.config)
        if changed:
            raise UserError(
                f"{folder} is the workdir of another config ({'; '.join(changed[:4])}{'; ...' if changed[4:] else ''}); "
                "give another --workdir, or the config it was made with"
            )
        for part, what in (("model", "base's shape"), ("registry", "queriers"), ("classes", "data"), ("base", "base")):
            if json.loads(json.dumps(run.record[part])) != old[part]:
                raise UserError(f"{folder}: the {what} changed since this run began; give another --workdir")
        return
    # A start that was killed before it wrote its record has left its lock, and parts of what comes before the record.
    started = storage.LOCK in inside and inside <= {storage.LOCK, TOKENIZER, f"{RECORD}.partial"}
    if inside and not started:
        raise UserError(f"{folder} exists and is not a run's folder; give a --workdir that is new or empty")
