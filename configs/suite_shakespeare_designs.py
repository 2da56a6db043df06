"""Twelve of Shakespeare's characters on SmolLM2-135M-Instruct: which design of QAR is best on dev? The test split is not read.

One part at a time is changed; steps and all else are alike. Needs what `suite_shakespeare.py` needs; about twenty minutes a cell
on one core.
"""

PATH = "data.path=data/shakespeare"


def get_suite():
    changes = {
        "QAR": (),
        "no contrast": ("qar.contrast=none",),
        "a tenth without their row": ("qar.drop_row=0.1",),
        "rank 64": ("qar.rank=64",),
        "three times the rate": ("optimizer.lr=3e-3",),
    }
    methods = {name: ("configs/qar_smollm2.py", PATH, *words) for name, words in changes.items()}
    others = {
        "two towers from layer 20": "qar_smollm2_split",
        "LoRA": "sft_matched_smollm2",
        "LoRA and querier rows": "sft_rows_smollm2",
    }
    methods |= {name: (f"configs/{file}.py", PATH) for name, file in others.items()}
    return dict(
        methods=methods,
        seeds=(0,),
        against={name: ("QAR",) for name in methods if name != "QAR"} | {"QAR": ("LoRA",)},
        metrics=("reply_nll", "swap_gap"),
        evaluate=("--replies", "0"),
        split="dev",
    )
