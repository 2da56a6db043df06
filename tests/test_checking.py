"""Annotations are checked under test; see `checking.py`."""

from __future__ import annotations

import jaxtyping
import numpy as np
import pytest
from beartype.roar import BeartypeCallHintParamViolation

from qaperso import losses
from qaperso.data import town


def test_shapes_are_checked() -> None:
    two, three = np.zeros((2, 4), np.float32), np.zeros((3, 5), np.float32)
    with pytest.raises(jaxtyping.TypeCheckError):
        losses.info_nce(two, three, np.ones((2, 3), bool), np.ones((2, 3), bool), 1.0)


def test_other_types_are_checked() -> None:
    with pytest.raises(BeartypeCallHintParamViolation):
        town.expand(1)
