"""Metrics of a run: JSON lines (the record), TensorBoard, and a progress line."""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
from tensorboardX import SummaryWriter
from tqdm import tqdm


class MetricsWriter:
    """Appends to `metrics.jsonl` and TensorBoard files; only the first process of a run writes."""

    def __init__(self, workdir: Path, start: int):
        """Cuts what a killed run wrote after the checkpoint of step `start` that it now continues from."""
        self._path = workdir / "metrics.jsonl"
        # Step 0 has a line of its own, which a run from the start writes again.
        cut_back(self._path, start or -1)
        self._file = self._path.open("a", encoding="utf-8")
        self._board = SummaryWriter(str(workdir / "tensorboard"), purge_step=start + 1 if start else None)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """One line; values keep all their digits."""
        self._file.write(json.dumps({"step": step, **values}) + "\n")
        self._file.flush()
        for name, value in values.items():
            self._board.add_scalar(name, value, step)

    def close(self) -> None:
        """Flushes everything."""
        self._file.close()
        self._board.close()


def cut_back(path: Path, step: int) -> None:
    """Keeps the lines of steps up to `step`; a last line that a kill cut in half goes too."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
        except (json.JSONDecodeError, KeyError, TypeError):
            continue
    partial = path.with_name(path.name + ".partial")
    partial.write_text("".join(kept), encoding="utf-8")
    partial.replace(path)


class Meter:
    """Speed since the last report."""

    def __init__(self, flops: tuple[float, float], peak_flops: float, steps: int):
        """`flops` of a token and of a prediction, see `step.step_flops`."""
        self._flops, self._peak, self._steps = flops, peak_flops, steps
        self._time, self._tokens, self._work, self._step = time.perf_counter(), 0.0, 0.0, None

    def count(self, tokens: float, predicted: float) -> None:
        """Adds a finished step's tokens (padding left out) and predictions."""
        self._tokens += tokens
        self._work += tokens * self._flops[0] + predicted * self._flops[1]

    def report(self, step: int) -> dict[str, float]:
        """tokens_per_second, mfu (share of the peak), eta (seconds) since the last report."""
        now = time.perf_counter()
        seconds, tokens, work = max(now - self._time, 1e-9), self._tokens, self._work
        done = step - self._step if self._step is not None else 0
        self._time, self._tokens, self._work, self._step = now, 0.0, 0.0, step
        eta = (self._steps - step) * seconds / done if done else math.nan
        return {"tokens_per_second": tokens / seconds, "mfu": work / seconds / self._peak, "eta": eta}


def measure_peak(dtype: str, size: int = 2048) -> float:
    """FLOP/s of all local devices in a square matmul with float32 sums, the best of a few; MFU is a share of it."""
    count = jax.local_device_count()
    x = jnp.ones((count, size, size), dtype)

    def square(a: jax.Array) -> jax.Array:
        return jnp.matmul(a, a, preferred_element_type=jnp.float32)

    multiply = jax.pmap(square) if count > 1 else jax.jit(square)
    multiply(x).block_until_ready()
    best = float("inf")
    for _ in range(4):
        start = time.perf_counter()
        multiply(x).block_until_ready()
        best = min(best, time.perf_counter() - start)
    return 2.0 * count * size**3 / best


class Progress:
    """A progress bar on a terminal; elsewhere one line a report."""

    def __init__(self, start: int, steps: int):
        self._steps = steps
        self._bar = tqdm(total=steps, initial=start, unit="step", dynamic_ncols=True, disable=None)

    def show(self, step: int, values: Mapping[str, float]) -> None:
        """Step, losses, speed, MFU, time left."""
        text = " ".join(f"{k}={v:.4f}" for k, v in values.items() if k in ("loss", "lm", "contrast", "dev_nll"))
        if "mfu" in values:
            text += f" {values['tokens_per_second']:,.0f} tokens/s mfu={values['mfu']:.1%}"
        if not self._bar.disable:
            self._bar.update(step - self._bar.n)
            self._bar.set_postfix_str(text)
            return
        eta = values.get("eta", math.nan)
        left = "" if math.isnan(eta) else f" eta={int(eta) // 60}m{int(eta) % 60:02d}s"
        print(f"step {step}/{self._steps} {text}{left}", file=sys.stderr, flush=True)

    def close(self) -> None:
        """Ends the line."""
        self._bar.close()
