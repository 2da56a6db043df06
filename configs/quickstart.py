"""QAR on the embedded town: who asks decides the reply; the tiny base stays frozen."""

from qaperso.config import default


def get_config():
    c = default()
    c.base = "runs/quickstart_base"
    c.method = "qar"
    c.remat = "dots"
    c.qar.contrast = "in_batch"
    c.qar.drop_row = 0.5  # only dialogues without their row are contrasted: half of them, so that there are pairs
    c.qar.rank = 32
    c.lora.rank, c.lora.alpha, c.lora.dropout = 16, 32.0, 0.0
    c.batch.rows, c.batch.length, c.batch.targets, c.batch.dialogues = 10, 96, 64, 2
    c.optimizer.lr, c.optimizer.warmup = 8e-3, 30
    c.steps = 450
    c.checkpoint_every = 150
    return c
