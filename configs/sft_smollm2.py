"""Plain LoRA beside `qar_smollm2.py`: the same base, data, batches, steps and learning rate."""

import runpy
from pathlib import Path


def get_config():
    c = runpy.run_path(str(Path(__file__).with_name("qar_smollm2.py")))["get_config"]()
    c.method = "sft"
    return c
