"""`qar_llama3_8b.py` on Llama-3.1-70B-Instruct, with variants of its own."""

import runpy
from pathlib import Path

SMALLER = runpy.run_path(str(Path(__file__).with_name("qar_llama3_8b.py")))
PACKED = SMALLER["PACKED"]
VARIANTS = {
    "v5e-256": PACKED | {"batch.rows": 512},
    "v5p-128": PACKED | {"batch.rows": 384, "remat": "dots"},
    "v6e-64": PACKED | {"batch.rows": 256},
    "h100-8": PACKED | {"batch.rows": 96},
}


def get_config():
    c = SMALLER["get_config"]()
    c.base = "meta-llama/Llama-3.1-70B-Instruct"
    return c
