"""Plain fine-tuning: LoRA on the seven projections, or everything with trainable = "all" (the baseline "FT")."""

from qaperso.methods.base import (
    condition,
    counts,
    declare,
    embeddings,
    joint,
    loss,
    preface,
    preface_tokens,
    reader,
    reads_history,
    remember,
    weights,
)
