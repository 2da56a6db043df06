"""The embedded town: which numbers of QAR's design are best on dev? One at a time is changed; the test split is not read."""

TOWN, BASE = "configs/quickstart.py", "base={base}"


def get_suite():
    changes = {
        "QAR": (),
        "two towers from layer 1 of 3": ("qar.split_layer=1",),
        "two towers from layer 2 of 3": ("qar.split_layer=2",),
        "rank 16": ("qar.rank=16",),
        "rank 64": ("qar.rank=64",),
        "heads of 16": ("qar.head_dim=16",),
        "temperature 0.3": ("qar.temperature=0.3",),
        "weight 0.1": ("qar.weight=0.1",),
        "15 in 100 without their row": ("qar.drop_row=0.15",),
        "plain shuffling": ("batch.queriers=0",),
    }
    return dict(
        before={"base": ("configs/quickstart_base.py",)},
        methods={name: (TOWN, BASE, *words) for name, words in changes.items()},
        seeds=(0, 1, 2),
        against={name: ("QAR",) for name in changes if name != "QAR"},
        metrics=("exact", "exact_heldout", "reply_nll", "swap_gap"),
        split="dev",
    )
