"""Twelve of Shakespeare's characters on SmolLM2-135M-Instruct: does QAR use who asks, and what does it cost?

Needs `make smollm2` and the README's data set in data/shakespeare. About twenty minutes a trained cell on two cores.
"""

PATH = "data.path=data/shakespeare"
# Nothing is trained: the base with what stands before the dialogue.
PROMPTED = {
    "zero-shot": "zero_shot",
    "responder profile": "rpg",
    "querier profile": "qcg",
    "retrieved examples": "rag",
    "DPL": "dpl",
}
TRAINED = {
    "LoRA": "sft_matched",
    "LoRA, querier hidden": "sft_hidden",
    "LoRA and querier rows": "sft_rows",
    "PPlug": "pplug",
    "QAR": "qar",
}


def get_suite():
    return dict(
        methods={name: (f"configs/{file}_smollm2.py", PATH) for name, file in (PROMPTED | TRAINED).items()},
        seeds=(0, 1, 2),
        once=tuple(PROMPTED),
        against={
            **{name: ("zero-shot",) for name in PROMPTED if name != "zero-shot"},
            "LoRA": ("zero-shot",),
            "LoRA, querier hidden": ("LoRA",),
            "PPlug": ("zero-shot",),
            "LoRA and querier rows": ("LoRA",),
            "QAR": ("LoRA", "LoRA and querier rows", "zero-shot"),
        },
        metrics=("reply_nll", "swap_gap", "history_gap", "rouge_l"),
        evaluate=("--awareness",),
    )
