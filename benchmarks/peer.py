"""The peer: transformers with a peft LoRA in torch, as a program of its own, for `common.Worker`.

LoRA of the same rank and scale on the same seven projections, AdamW on the adapters, no clipping (which ours does), and no
gradient checkpointing where it is not asked for. Adapters are float32, peft's default, or of the model's dtype.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

import common
import numpy as np

from qaperso.models.config import DecoderConfig, to_hf
from qaperso.models.lora import TARGETS

# torch's name for "no loss here".
IGNORED = -100
# Of the model and of the adapters.
DTYPES = (("float32", "float32"), ("bfloat16", "float32"), ("bfloat16", "bfloat16"))


def padded(tokens: Sequence[np.ndarray], predicted: Sequence[np.ndarray]) -> dict[str, np.ndarray]:
    """Sequences side by side, padded to the longest: input_ids, attention_mask, labels, int64[B, S]."""
    size = (len(tokens), max(map(len, tokens)))
    batch = {
        "input_ids": np.zeros(size, np.int64),
        "attention_mask": np.zeros(size, np.int64),
        "labels": np.full(size, IGNORED, np.int64),
    }
    for r, (row, label) in enumerate(zip(tokens, predicted, strict=True)):
        batch["input_ids"][r, : len(row)] = row
        batch["attention_mask"][r, : len(row)] = 1
        batch["labels"][r, : len(row)] = np.where(label, row, IGNORED)
    if batch["attention_mask"].all():
        # Without a mask torch's attention takes its faster, causal path.
        del batch["attention_mask"]
    return batch


def build(spec: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """For `common.serve`.

    Args:
      spec: model: DecoderConfig; batches: dicts of `padded`; attention: "eager" or "sdpa"; dtype: of the model;
        adapters: dtype of the adapters; rank, alpha: of LoRA; lr: of AdamW; threads; device: torch's name;
        checkpointing: whether layers are computed again in the backward pass.
    """
    import peft
    import torch
    import transformers

    torch.set_num_threads(spec["threads"])
    torch.manual_seed(0)
    dtype = getattr(torch, spec["dtype"])
    names = to_hf(spec["model"])
    config = transformers.AutoConfig.for_model(names.pop("model_type"), **names)
    if spec["device"] != "cpu":
        torch.set_float32_matmul_precision("high")  # TF32, as JAX has it on GPUs
    with torch.device(spec["device"]):
        model = transformers.AutoModelForCausalLM.from_config(
            config, attn_implementation=spec["attention"], dtype=dtype
        )
    lora = peft.LoraConfig(
        r=spec["rank"],
        lora_alpha=spec["alpha"],
        lora_dropout=0.0,
        target_modules=[f"{name}_proj" for name in TARGETS],
        task_type="CAUSAL_LM",
    )
    model = peft.get_peft_model(model, lora, autocast_adapter_dtype=spec["adapters"] == "float32")
    if spec["checkpointing"]:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=spec["lr"], weight_decay=0.0)
    batches = [{k: torch.from_numpy(v).to(spec["device"]) for k, v in batch.items()} for batch in spec["batches"]]

    def steps(numbers: list[int]) -> list[float]:
        found = []
        for number in numbers:
            start = time.perf_counter()
            loss = model(**batches[number % len(batches)], use_cache=False).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            loss.item()
            found.append(time.perf_counter() - start)
        return found

    def peak(dtype: str, size: int) -> float:
        x = torch.ones((size, size), dtype=getattr(torch, dtype))
        x @ x
        best = float("inf")
        for _ in range(4):
            start = time.perf_counter()
            x @ x
            best = min(best, time.perf_counter() - start)
        return 2.0 * size**3 / best

    facts = {
        "trainable": sum(p.numel() for p in trained),
        "adapters": str(trained[0].dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
    }
    return facts, {"steps": steps, "peak": peak}


def worker(
    model: DecoderConfig,
    batches: Sequence[Mapping[str, np.ndarray]],
    *,
    attention: str,
    dtype: str,
    adapters: str,
    lora: Any,
    lr: float,
    threads: int,
    warm_up: Sequence[int] = (0, 0),
) -> common.Worker:
    """Starts a peer for these batches; the warm-up's steps are done."""
    spec = dict(model=model, batches=list(batches), attention=attention, dtype=dtype, adapters=adapters, lr=lr)
    spec |= {"rank": lora.rank, "alpha": lora.alpha, "threads": threads, "device": "cpu", "checkpointing": False}
    made = common.Worker("peer.py", spec)
    made.seconds(warm_up)
    return made


if __name__ == "__main__":
    common.serve(build)
