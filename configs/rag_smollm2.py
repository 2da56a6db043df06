"""The base of `qar_smollm2.py` shown what the querier asked before that is most like the query, with the replies."""

import runpy
from pathlib import Path


def get_config():
    c = runpy.run_path(str(Path(__file__).with_name("zero_shot_smollm2.py")))["get_config"]()
    c.prompts.kind = "retrieved"
    c.prompts.examples, c.prompts.tokens = 8, 512
    c.batch.length += c.prompts.tokens  # the dialogue itself has as much room as elsewhere
    return c
