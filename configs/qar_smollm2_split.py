"""`qar_smollm2.py` with one tower in the lower two thirds of the layers.

Cheaper (docs/speed.md), at a price where who asks matters (docs/results.md).
"""

import runpy
from pathlib import Path


def get_config():
    c = runpy.run_path(str(Path(__file__).with_name("qar_smollm2.py")))["get_config"]()
    c.qar.split_layer = 20
    return c
