"""A control of `qar_smollm2.py`: `sft_matched_smollm2.py` with a learned row for each querier at the input."""

import runpy
from pathlib import Path


def get_config():
    c = runpy.run_path(str(Path(__file__).with_name("sft_matched_smollm2.py")))["get_config"]()
    c.method = "sft_rows"
    return c
