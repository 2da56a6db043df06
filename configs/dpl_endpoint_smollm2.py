"""`dpl_smollm2.py` with the differences and profiles of an OpenAI-compatible endpoint, which QAPERSO_API_BASE names."""

import runpy
from pathlib import Path


def get_config():
    c = runpy.run_path(str(Path(__file__).with_name("dpl_smollm2.py")))["get_config"]()
    c.dpl.writer = "endpoint"
    return c
