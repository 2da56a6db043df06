"""DPL on the town's reviews beside the base without history and with retrieved reviews; its choices one by one."""

TOWN = "configs/dpl_town.py"


def get_suite():
    return dict(
        before={},
        methods={
            # As much room for the dialogue as where something stands before it.
            "zero-shot": (TOWN, "method=prompts", "prompts.kind=zero_shot", "batch.length=128"),
            "retrieved examples": (TOWN, "method=prompts", "prompts.kind=retrieved"),
            "DPL": (TOWN,),
            "DPL, least similar others": (TOWN, "dpl.select=least_similar"),
            "DPL, random others": (TOWN, "dpl.select=random"),
            "DPL, rating and title told": (TOWN, "dpl.gold=True"),
        },
        seeds=(0, 1, 2),
        against={"DPL": ("zero-shot", "retrieved examples", "DPL, least similar others", "DPL, random others")},
        metrics=("exact", "length", "warmth", "order", "reply_nll", "swap_gap"),
    )
