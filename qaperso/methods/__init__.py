"""Methods: what is trained, what is asked, what the loss is. One file each; a config names its file."""

from __future__ import annotations

import dataclasses
import importlib
import pkgutil
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from qaperso.errors import UserError, nearest
from qaperso.models.config import DecoderConfig
from qaperso.notes import Notes


@dataclasses.dataclass(frozen=True, eq=False)
class Setting:
    """What a method may know besides parameters and batches; fixed for a run.

    Attributes:
      config: the run's configuration.
      model: shape of the base.
      queriers: querier rows, the stranger's and spare ones included.
      clusters: number of query clusters.
      classes: {responder, querier, cluster: int32[C]}, the classes that occur in training.
      notes: what a language model answers; None where the method asks none (it has no `annotate`).
      norm: mean Euclidean length of the base's token embeddings; measured where the method has soft tokens.
    """

    config: Any
    model: DecoderConfig
    queriers: int
    clusters: int
    classes: dict[str, np.ndarray]
    norm: float = 1.0
    notes: Notes | None = None


def notes(method: ModuleType, folder: Path) -> Notes | None:
    """Where a run keeps what a language model answers; None for methods that ask none."""
    return Notes(folder) if hasattr(method, "annotate") else None


def load(name: str) -> ModuleType:
    """The method's module, `qaperso/methods/NAME.py`; it imports from `base.py` whatever it does not define itself.

    Raises:
      UserError: no such method.
    """
    names = [m.name for m in pkgutil.iter_modules(__path__) if m.name != "base"]
    if name not in names:
        raise UserError(f"config.method is '{name}', which is no method{nearest(name, names)}")
    return importlib.import_module(f"{__name__}.{name}")
