"""The base of `qar_smollm2.py` told about the querier: a profile stands before the dialogue."""

import runpy
from pathlib import Path


def get_config():
    c = runpy.run_path(str(Path(__file__).with_name("rpg_smollm2.py")))["get_config"]()
    c.prompts.kind = "querier"
    return c
