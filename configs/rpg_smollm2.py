"""The base of `qar_smollm2.py` told about the responder: a profile stands before the dialogue."""

import runpy
from pathlib import Path


def get_config():
    c = runpy.run_path(str(Path(__file__).with_name("zero_shot_smollm2.py")))["get_config"]()
    c.prompts.kind = "responder"
    c.prompts.tokens = 256
    c.batch.length += c.prompts.tokens  # the dialogue itself has as much room as elsewhere
    return c
