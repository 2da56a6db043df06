"""The embedded town: what each part of QAR is worth. One part at a time is changed; steps and all else are alike."""

TOWN, BASE = "configs/quickstart.py", "base={base}"


def get_suite():
    changes = {
        "QAR": (),
        "no contrast": ("qar.contrast=none",),
        "no clusters": ("data.clusters=1",),
        "prototypes, decayed means": ("qar.contrast=prototypes",),
        "prototypes, bank": ("qar.contrast=prototypes", "qar.memory=bank"),
        "no querier rows": ("qar.querier_embedding=False",),
        "rows, but one tower": ("method=sft_rows",),
    }
    return dict(
        before={"base": ("configs/quickstart_base.py",)},
        methods={name: (TOWN, BASE, *words) for name, words in changes.items()},
        seeds=(0, 1, 2),
        against={name: ("QAR",) for name in changes if name != "QAR"},
        metrics=("exact", "exact_heldout", "reply_nll", "swap_gap"),
    )
