"""Methods: what is trained, what is asked, what the loss is. One file each; a config names its file."""

from __future__ import annotations

import dataclasses
import importlib
import pkgutil
from types import ModuleType
from typing import Any

import numpy as np

from qaperso.errors import UserError, nearest
from qaperso.models.config import DecoderConfig


@dataclasses.dataclass(frozen=True, eq=False)
class Setting:
    """What a method may know besides parameters and batches; fixed for a run.

    Attributes:
      config: the run's configuration.
      model: shape of the base.
      queriers: querier rows, the stranger's and spare ones included.
      clusters: number of query clusters.
      classes: {responder, querier, cluster: int32[C]}, the classes that occur in training.
      norm: mean Euclidean length of the base's token embeddings; measured where the method has soft tokens.
    """

    config: Any
    model: DecoderConfig
    queriers: int
    clusters: int
    classes: dict[str, np.ndarray]
    norm: float = 1.0


def load(name: str) -> ModuleType:
    """The method's module, `qaperso/methods/NAME.py`; it imports from `base.py` whatever it does not define itself.

    Raises:
      UserError: no such method.
    """
    names = [m.name for m in pkgutil.iter_modules(__path__) if m.name != "base"]
    if name not in names:
        raise UserError(f"config.method is '{name}', which is no method{nearest(name, names)}")
    return importlib.import_module(f"{__name__}.{name}")
