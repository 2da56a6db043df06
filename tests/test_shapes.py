"""Published shapes have as many parameters as the published models."""

from __future__ import annotations

import math

import pytest

from qaperso import arrays
from qaperso.models import decoder, shapes

# As the models' cards give them.
COUNTS = {
    "meta-llama/Llama-2-70b-hf": 68_976_648_192,
    "meta-llama/Llama-3.1-8B-Instruct": 8_030_261_248,
    "meta-llama/Llama-3.1-70B-Instruct": 70_553_706_496,
    "Qwen/Qwen2.5-0.5B-Instruct": 494_032_768,
    "Qwen/Qwen2.5-7B-Instruct": 7_615_616_512,
    "Qwen/Qwen3-8B": 8_190_735_360,
}


@pytest.mark.parametrize("name", shapes.PUBLISHED)
def test_parameters(name: str) -> None:
    specs = arrays.flat(decoder.declare(shapes.PUBLISHED[name]), arrays.is_spec)
    assert sum(math.prod(s.shape) for s in specs.values()) == COUNTS[name]
