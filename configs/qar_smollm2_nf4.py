"""`qar_smollm2.py` over a base whose kernels are kept in 4 bits (QLoRA)."""

import runpy
from pathlib import Path


def get_config():
    c = runpy.run_path(str(Path(__file__).with_name("qar_smollm2.py")))["get_config"]()
    c.quantize = "nf4"
    return c
