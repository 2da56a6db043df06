"""The embedded town: does QAR beat as large a plain LoRA and retrieved examples, with names visible and masked?"""

TOWN = "configs/quickstart.py"
MATCHED = "configs/quickstart_matched.py"
BASELINES = ("LoRA, as many parameters", "retrieved examples")
RETRIEVED = ("method=prompts", "prompts.kind=retrieved", "prompts.examples=4", "prompts.tokens=96", "batch.length=192")


def get_suite():
    base, masked = "base={base}", "data.names=masked"
    return dict(
        before={"base": ("configs/quickstart_base.py",)},
        methods={
            "QAR": (TOWN, base),
            "LoRA, as many parameters": (MATCHED, base),
            "retrieved examples": (TOWN, base, *RETRIEVED),
            "QAR, names masked": (TOWN, base, masked),
            "LoRA, as many parameters, names masked": (MATCHED, base, masked),
            "retrieved examples, names masked": (TOWN, base, masked, *RETRIEVED),
        },
        seeds=(0, 1, 2, 3, 4),
        against={"QAR": BASELINES, "QAR, names masked": tuple(f"{name}, names masked" for name in BASELINES)},
        once=("retrieved examples", "retrieved examples, names masked"),
        metrics=("exact", "exact_heldout", "reply_nll", "swap_gap"),
    )
