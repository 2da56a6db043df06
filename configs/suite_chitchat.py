"""Eight people of the chitchat corpus and the ninety they chatted with, on SmolLM2-135M-Instruct: is who asks used?

Needs `make extras` and docs/results.md's data set in data/chitchat, and a GPU: with --jobs 12 one H100 makes a dozen cells in
eight minutes.
"""

DATA = ("data.path=data/chitchat", "batch.rows=8", "batch.targets=352")
# Rows for the dialogue, and for what stands before it besides.
DIALOGUE, LONG, LONGER = (f"batch.length={512 + more}" for more in (0, 256, 512))
STEPS = ("steps=300", "checkpoint_every=100", "log_every=20")
PROMPTED = {
    "zero-shot": ("zero_shot", DIALOGUE),
    "responder profile": ("rpg", LONG),
    "querier profile": ("qcg", LONG),
    "retrieved examples": ("rag", LONGER),
    "DPL": ("dpl", LONGER),
}
# Learning rates: the best of three on dev, with seed 0; PPlug's is that of its config.
TRAINED = {
    "LoRA": ("sft_matched", 3e-3),
    "LoRA, querier hidden": ("sft_hidden", 3e-3),
    "LoRA and querier rows": ("sft_rows", 3e-3),
    "PPlug": ("pplug", 2e-4),
    "QAR": ("qar", 3e-3),
}
MASKED = {"QAR, names masked": ("qar", 3e-3), "LoRA, names masked": ("sft_matched", 3e-3)}


def get_suite():
    methods = {name: (f"configs/{file}_smollm2.py", *DATA, length) for name, (file, length) in PROMPTED.items()}
    for name, (file, lr) in (TRAINED | MASKED).items():
        words = ("data.names=masked",) if name in MASKED else ()
        methods[name] = (f"configs/{file}_smollm2.py", *DATA, DIALOGUE, *STEPS, f"optimizer.lr={lr}", *words)
    return dict(
        methods=methods,
        seeds=(0, 1, 2),
        once=tuple(PROMPTED),
        against={
            **{name: ("zero-shot",) for name in PROMPTED if name != "zero-shot"},
            "LoRA": ("zero-shot",),
            "LoRA, querier hidden": ("LoRA",),
            "LoRA and querier rows": ("LoRA",),
            "PPlug": ("LoRA",),
            "QAR": ("LoRA", "LoRA and querier rows", "retrieved examples"),
            "QAR, names masked": ("LoRA, names masked",),
        },
        metrics=("reply_nll", "swap_gap", "history_gap", "rouge_l"),
        evaluate=("--awareness", "--paired", "16"),
    )
