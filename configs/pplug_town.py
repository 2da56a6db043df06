"""PPlug on the embedded town: history alone tells the frozen base who asks; names are hidden."""

from qaperso.config import default


def get_config():
    c = default()
    c.base = "runs/quickstart_base"
    c.method = "pplug"
    c.remat = "dots"
    c.data.names = "masked"
    c.pplug.encoder = "base"  # nothing to download
    c.pplug.history, c.pplug.query = 128, 32
    c.pplug.tokens = 8
    c.pplug.temperature = 0.05
    c.batch.rows, c.batch.length, c.batch.targets, c.batch.dialogues = 10, 96, 64, 2
    c.batch.queriers = 0  # nothing is contrasted: plain shuffling
    c.optimizer.lr, c.optimizer.warmup = 6e-3, 30
    c.steps = 900
    c.checkpoint_every = 300
    return c
