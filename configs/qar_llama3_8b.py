"""QAR on Llama-3.1-8B-Instruct: `configs/qar_llama3_8b.py` in published sizes, `configs/qar_llama3_8b.py:v5e-16` for those chips.

Published (arXiv 2412.11736): rank 64 for Llama, LoRA of rank 16, rows of one dialogue and 592 tokens, heads of 512,
learning rate 2e-4 after 20 steps of warm-up. Ours: four dialogues a step are contrasted with each other, since prototypes,
as published, of so few have nothing to be compared with for epochs. The variants, of many more, have prototypes; they pack
rows and spread parameters over all chips; docs/scale.md has what `python -m qaperso.plan` says of some of them.
--config.data.path=DIR names what `python -m qaperso.prepare` made.
"""

from qaperso.config import default

PACKED = {"batch.length": 640, "batch.targets": 320, "batch.dialogues": 4, "mesh.data": 1, "mesh.fsdp": -1}
PACKED |= {"qar.contrast": "prototypes", "qar.drop_row": 0.15}
VARIANTS = {
    "v5e-16": PACKED | {"batch.rows": 64, "remat": "dots"},
    "v5e-256": PACKED | {"batch.rows": 1024, "remat": "dots"},
    "v5p-128": PACKED | {"batch.rows": 512, "remat": "dots"},
    "v6e-64": PACKED | {"batch.rows": 256, "remat": "dots"},
    "h100-1": PACKED | {"batch.rows": 16, "remat": "dots"},
    "h100-8": PACKED | {"batch.rows": 160, "remat": "dots"},
}


def get_config():
    c = default()
    c.base = "meta-llama/Llama-3.1-8B-Instruct"
    c.method = "qar"
    c.dtype = "bfloat16"
    c.data.format = "prepared"
    c.data.clusters = 0
    c.batch.rows, c.batch.length, c.batch.targets, c.batch.dialogues = 4, 592, 592, 1
    c.lora.rank, c.lora.alpha, c.lora.dropout = 16, 8.0, 0.05
    c.qar.rank = 64
    c.qar.contrast, c.qar.drop_row = "in_batch", 0.3
    c.qar.head_dim, c.qar.weight, c.qar.temperature = 512, 0.5, 0.1
    c.optimizer.lr, c.optimizer.warmup = 2e-4, 20
    return c
