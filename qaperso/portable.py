"""A run in one folder that can be copied anywhere: what `export --format qaperso` writes and `run.open_run` reads.

run.json                 the record, with `exported`: the checkpoint's step, sha256 of each file of weights
base/                    the frozen base: config.json and safetensors; not there where everything was trained
trainable.safetensors    what was trained
memory.safetensors       state of the method, where it has any
tokenizer/  enrolled/    as in any run's folder
clusters.npz  README.md  eval.json      by which new queries are assigned; the model card; figures, where present
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from qaperso import arrays
from qaperso.data import prepared
from qaperso.errors import UserError
from qaperso.models import base as bases
from qaperso.models.base import Location

Tree = Any
BASE, TRAINABLE, MEMORY = "base", "trainable.safetensors", "memory.safetensors"


def find(workdir: Path) -> Path:
    """The folder of a run: as given, or where nothing is there and it can be a Hub name, downloaded into the Hub's cache.

    Raises:
      UserError: the Hub has no such thing, or cannot be reached.
    """
    if workdir.exists() or not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", str(workdir)):
        return workdir
    # A folder that is not there looks the same; only what else is wrong with it can tell.
    if workdir.parent.is_dir():
        return workdir
    import huggingface_hub

    try:
        return Path(huggingface_hub.snapshot_download(str(workdir)))
    except Exception as error:  # The connection, the server or the disk fails with errors of several libraries.
        line = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(
            f"'{workdir}' is no folder here, and could not be had from the Hugging Face Hub ({line}); check the spelling"
        ) from error


def is_exported(record: Mapping[str, Any]) -> bool:
    """Whether a record is of a run in this form."""
    return "exported" in record


def base_of(workdir: Path, record: Mapping[str, Any]) -> Location:
    """Where the frozen base of a recorded run is.

    Raises:
      UserError: it is gone.
    """
    if is_exported(record):
        return Location("hf", workdir / BASE) if record["base"]["path"] else Location("random")
    name, path = record["base"]["name"], record["base"]["path"]
    try:
        return bases.locate(name)
    except UserError:
        # The name may have been relative to another folder.
        if not path or not Path(path).exists():
            raise
        return bases.locate(path)


def write(folder: Path, trainable: Tree, memory: Tree) -> dict[str, str]:
    """Writes what was trained, and the method's state where there is any; returns {file: sha256}."""
    from safetensors.numpy import save_file

    digests = {}
    for name, tree in ((TRAINABLE, trainable), (MEMORY, memory)):
        leaves = {path: np.ascontiguousarray(np.asarray(leaf)) for path, leaf in arrays.flat(tree).items()}
        if leaves:
            save_file(leaves, folder / name)
            digests[name] = prepared.digest(folder / name)
    return digests


def read(folder: Path, record: Mapping[str, Any], trainable: Tree, memory: Tree) -> tuple[Tree, Tree, int]:
    """What `write` wrote, shaped and sharded like the given (abstract) trees, and the step it is of.

    Raises:
      UserError: a file is missing, damaged or of another model.
    """
    digests = record["exported"]["files"]
    trees = (_read(folder / name, digests.get(name), like) for name, like in ((TRAINABLE, trainable), (MEMORY, memory)))
    return *trees, record["exported"]["step"]


def _read(path: Path, expected: str | None, like: Tree) -> Tree:
    from safetensors.numpy import load_file

    if not jax.tree.leaves(like):
        return like
    if not path.is_file() or prepared.digest(path) != expected:
        found = "a file with another sha256 than run.json says" if path.is_file() else "no such file"
        raise UserError(f"{path}: found {found}; copy the exported folder again, whole")
    tensors, wanted = load_file(path), arrays.flat(like)
    for name in sorted(set(tensors) | set(wanted)):
        found = (tensors[name].shape, str(tensors[name].dtype)) if name in tensors else "absent"
        declared = (tuple(wanted[name].shape), str(wanted[name].dtype)) if name in wanted else "no such array"
        if found != declared:
            raise UserError(f"{path}: '{name}' is {found}, the configuration declares {declared}; export the run again")
    leaves = [jax.device_put(tensors[name], leaf.sharding) for name, leaf in wanted.items()]
    return jax.tree.unflatten(jax.tree.structure(like), leaves)
