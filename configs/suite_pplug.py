"""The embedded town, names hidden: what PPlug makes of a history beside a prompt that quotes it, and what its parts are worth."""

TOWN, BASE = "configs/pplug_town.py", "base={base}"
PROMPTED = ("method=prompts", "pplug.encoder=")
RETRIEVED = ("prompts.kind=retrieved", "prompts.examples=4", "prompts.tokens=96", "batch.length=192")


def get_suite():
    return dict(
        before={"base": ("configs/quickstart_base.py",)},
        methods={
            "PPlug": (TOWN, BASE),
            "PPlug on differences": (TOWN, BASE, "pplug.differences=True"),
            "PPlug, one token": (TOWN, BASE, "pplug.tokens=1"),
            "PPlug, published temperature": (TOWN, BASE, "pplug.temperature=1.0"),
            "PPlug, no dropout of history": (TOWN, BASE, "pplug.dropout=0.0"),
            "zero-shot": (TOWN, BASE, *PROMPTED),
            "retrieved examples": (TOWN, BASE, *PROMPTED, *RETRIEVED),
        },
        seeds=(0, 1, 2),
        once=("zero-shot", "retrieved examples"),
        against={
            "PPlug": ("zero-shot", "retrieved examples"),
            "PPlug on differences": ("PPlug", "zero-shot"),
            "PPlug, one token": ("PPlug",),
            "PPlug, published temperature": ("PPlug",),
            "PPlug, no dropout of history": ("PPlug",),
        },
        metrics=("exact", "exact_heldout", "reply_nll", "history_gap", "swap_gap"),
    )
