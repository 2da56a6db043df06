"""The base of `qar_smollm2.py` told how the responder's replies to this querier differ from those to others (DPL).

It states the differences itself. A base of this size does that badly: see docs/methods.md, and `dpl_endpoint_smollm2.py`.
"""

import runpy
from pathlib import Path


def get_config():
    c = runpy.run_path(str(Path(__file__).with_name("zero_shot_smollm2.py")))["get_config"]()
    c.method = "dpl"
    c.prompts.examples, c.prompts.tokens = 4, 512
    c.batch.length += c.prompts.tokens  # the dialogue itself has as much room as elsewhere
    return c
