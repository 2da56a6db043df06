"""`qar_llama3_8b.py` on Qwen2.5-7B-Instruct; published rank 16 for Qwen. Updates of tenfold gradients are left out (ours)."""

import runpy
from pathlib import Path

LLAMA = runpy.run_path(str(Path(__file__).with_name("qar_llama3_8b.py")))
VARIANTS = LLAMA["VARIANTS"]


def get_config():
    c = LLAMA["get_config"]()
    c.base = "Qwen/Qwen2.5-7B-Instruct"
    c.qar.rank = 16
    c.optimizer.spike = 10.0
    return c
