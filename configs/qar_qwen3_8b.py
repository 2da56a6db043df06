"""`qar_qwen2_5_7b.py` on Qwen3-8B."""

import runpy
from pathlib import Path

QWEN = runpy.run_path(str(Path(__file__).with_name("qar_qwen2_5_7b.py")))
VARIANTS = QWEN["VARIANTS"]


def get_config():
    c = QWEN["get_config"]()
    c.base = "Qwen/Qwen3-8B"
    return c
