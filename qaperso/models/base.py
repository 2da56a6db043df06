"""Finds what the `base` setting names: a folder, a file, a file of an installed package, or a model on the Hub."""

from __future__ import annotations

import dataclasses
import importlib.util
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np

from qaperso.errors import UserError, nearest

# What a download takes: configuration, tokenizer and safetensors in the top folder; not other formats of the weights.
DOWNLOAD = ("*.json", "model*.safetensors", "*.model", "*.txt", "*.jinja")


@dataclasses.dataclass(frozen=True)
class Location:
    """Where base weights come from.

    Attributes:
      kind: "random" (no weights, path is None), "hf" (a folder with config.json and safetensors), "gguf" (a file) or
        "workdir" (the folder of an earlier run).
      path: the folder or file.
    """

    kind: str
    path: Path | None = None


@dataclasses.dataclass(frozen=True)
class Tensor:
    """One tensor of a weight file, not read yet.

    Attributes:
      shape: as PyTorch has it: a linear layer's weight is [out, in].
      read: reads it from the file, or what slices of its dimensions take of it.
    """

    shape: tuple[int, ...]
    read: Callable[..., np.ndarray]


def locate(base: str) -> Location:
    """Finds base weights.

    Args:
      base: "random"; a path; `package:NAME/FILE`, a file or folder inside an installed package, which is not imported;
        or `organisation/name`, a model on the Hugging Face Hub, downloaded into the Hub's cache unless it is there.

    Raises:
      UserError: nothing is there, or it is none of the supported kinds.
    """
    if base == "random":
        return Location("random")
    if base.startswith("package:"):
        return _classify(_in_package(base), base)
    path = Path(base).expanduser()
    if path.exists():
        return _classify(path, base)
    if re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", base) and not base.endswith((".gguf", ".safetensors", ".json")):
        return _classify(_download(base), base)
    hint = _siblings(path) or f"; there is no folder {path.parent} either"
    raise UserError(
        f"base '{base}': no such file or folder{hint} (expected 'random', a path, 'package:NAME/FILE' or "
        "'organisation/name' on the Hugging Face Hub)"
    )


def _siblings(path: Path) -> str:
    """What is there in place of a path, as `nearest` says it; "" where its folder is not there or empty."""
    return nearest(path.name, [p.name for p in path.parent.iterdir()]) if path.parent.is_dir() else ""


def _classify(path: Path, base: str) -> Location:
    if path.is_file():
        if path.suffix == ".gguf":
            return Location("gguf", path)
        raise UserError(f"base '{base}': a {path.suffix or 'plain'} file, expected a .gguf file or a folder of weights")
    if (path / "config.json").is_file() and any(path.glob("*.safetensors")):
        return Location("hf", path)
    if (path / "run.json").is_file():
        return Location("workdir", path)
    found = ", ".join(sorted(p.name for p in path.iterdir())[:8]) or "nothing"
    raise UserError(
        f"base '{base}': the folder holds {found}; expected config.json and *.safetensors (a model) or run.json (a "
        "run's folder); weights in another format must be saved as safetensors first"
    )


def _in_package(base: str) -> Path:
    name, _, file = base.removeprefix("package:").partition("/")
    if not name.isidentifier() or not file:
        raise UserError(f"base '{base}': expected package:NAME/FILE with NAME an importable top-level package")
    spec = importlib.util.find_spec(name)
    if spec is None:
        raise UserError(f"base '{base}': package '{name}' is not installed; mend: pip install {name.replace('_', '-')}")
    for folder in spec.submodule_search_locations or ():
        if (Path(folder) / file).exists():
            return Path(folder) / file
    files = {p.name for folder in spec.submodule_search_locations or () for p in Path(folder).iterdir()}
    raise UserError(f"base '{base}': package '{name}' has no file '{file}'{nearest(file, files)}")


def _download(name: str) -> Path:
    import huggingface_hub
    from huggingface_hub import errors

    missing, hint = f"base '{name}': no folder of that name is here", _siblings(Path(name).expanduser())
    try:
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=list(DOWNLOAD), ignore_patterns=["*/*"]))
    except errors.HFValidationError as error:
        raise UserError(f"base '{name}': no such folder, and not a valid Hub name: {error}") from error
    except errors.GatedRepoError as error:
        raise UserError(
            f"base '{name}': access to this model is restricted; accept its terms at https://huggingface.co/{name} and "
            "log in with `hf auth login`"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise UserError(
            f"{missing}, and no such model on the Hugging Face Hub; check the spelling, or, if the model is private, log "
            f"in with `hf auth login`{hint}"
        ) from error
    except errors.LocalEntryNotFoundError as error:
        raise UserError(
            f"{missing}; a model of that name is not whole in the Hub's cache, and the Hub cannot be reached (offline, or "
            f"HF_HUB_OFFLINE is set); give a folder, or download the model where there is a connection{hint}"
        ) from error
    except Exception as error:  # The connection, the server or the disk fails with errors of several libraries.
        raise UserError(f"{missing}, and downloading from the Hugging Face Hub failed: {error}{hint}") from error
