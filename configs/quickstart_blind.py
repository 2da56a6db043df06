"""The baseline of the quickstart: plain LoRA on the same base and dialogues, with everybody called "user"."""

import runpy
from pathlib import Path


def get_config():
    c = runpy.run_path(str(Path(__file__).with_name("quickstart.py")))["get_config"]()
    c.method = "sft"
    c.data.names = "masked"
    return c
