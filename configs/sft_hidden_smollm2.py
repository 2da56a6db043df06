"""A control of `sft_matched_smollm2.py` that cannot know who asks: every querier is called "user"."""

import runpy
from pathlib import Path


def get_config():
    c = runpy.run_path(str(Path(__file__).with_name("sft_matched_smollm2.py")))["get_config"]()
    c.data.names = "responder"
    return c
