"""The base of `qar_smollm2.py` shown the end of all that the responder and the querier have said to each other."""

import runpy
from pathlib import Path


def get_config():
    c = runpy.run_path(str(Path(__file__).with_name("zero_shot_smollm2.py")))["get_config"]()
    c.prompts.kind = "history"
    c.prompts.tokens = 1024
    c.batch.length += c.prompts.tokens  # the dialogue itself has as much room as elsewhere
    c.batch.rows = 2
    return c
