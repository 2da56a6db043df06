"""python -m qaperso.export --workdir DIR --output NEW --format peft|merged|qaperso

Writes the checkpoint of a run that was best on dev as a folder of its own:

    peft      LoRA of a run of method sft, for the peft library
    merged    a plain decoder (LoRA added to its kernels, in float32, or what full fine-tuning gave), for transformers
    qaperso   a run of any method with all it needs, which chat and evaluate open as --workdir, from there or from the Hub

--published FILE puts the weights of the published QAR implementation, its state dict as safetensors, in the place of those of a
run of the same shape with config.compat="paper", which gives base, tokeniser and names.

Exit codes: 0 done, 2 bad input; then nothing was written.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import json
import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qaperso import checkpoint, people, portable
from qaperso.data import prepared
from qaperso.data.text import MASKED
from qaperso.errors import UserError, command
from qaperso.eval import card
from qaperso.mesh import start_runtime
from qaperso.models import hf, lora, published, quantized
from qaperso.models import tokenizer as tokenizers
from qaperso.models.base import Location
from qaperso.run import RECORD, Run, load_weights, open_run, restore
from qaperso.types import RESPONDER

Tree = Any
FORMATS = ("peft", "merged", "qaperso")
EVALUATION = "eval.json"


def export(workdir: Path, output: Path, kind: str, weights: Path | None = None) -> int:
    """Writes a run's best checkpoint as a folder, whole or not at all; returns the checkpoint's step.

    Args:
      workdir: of the run.
      output: the new folder.
      kind: one of `FORMATS`.
      weights: a file of the published implementation's, to be put in the place of the run's own.

    Raises:
      UserError: the run cannot be written in that form, somebody's row was fitted on another checkpoint, or the folder is not
        empty or cannot be made.
    """
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UserError(
            f"{output}: exists already, expected a new or empty folder; choose another --output or remove it"
        )
    run = open_run(workdir, enrolled=False)
    trainable, memory, step = restore(run)
    check(run, trainable, kind)
    if weights is not None:
        if run.config.compat != "paper":
            raise UserError(
                f"--published needs a run with config.compat='paper', and {workdir} is none; train one for a step"
            )
        trainable, memory = published.take(published.read(weights), trainable, memory, str(weights))
    partial = output.with_name(f".{output.name}.{os.getpid()}.partial")
    try:
        partial.mkdir(parents=True)
        if kind == "qaperso":
            _write_run(partial, run, trainable, memory, step)
        else:
            _write_plain(partial, run, trainable, kind)
        told = _evaluation(run.workdir), output.name, (partial / portable.BASE).is_dir()
        (partial / "README.md").write_text(card.text(run, step, kind, *told), encoding="utf-8")
        if output.exists():
            output.rmdir()
        os.replace(partial, output)
    except OSError as error:
        raise UserError(f"{output}: cannot be written: {error}; choose another --output") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return step


def check(run: Run, trainable: Tree, kind: str) -> None:
    """Makes sure that a format can hold a run.

    Raises:
      UserError: it cannot; why, and which can.
    """
    parts, method = set(trainable), run.config.method
    if kind == "qaperso":
        if run.method.reads_history(run.setting) and run.config.data.format == "prepared":
            raise UserError(
                f"config.method='{method}' replies from the history in '{run.config.data.path}', which is no part of an export;"
                " copy the run's folder and that data set instead"
            )
        return
    if not parts:
        raise UserError(
            f"config.method='{method}' trains nothing, so there is nothing to write as {kind}; take its base"
        )
    if "tower" in parts:
        raise UserError(
            f"config.method='{method}' answers by querier rows or a tower of their own, which no plain decoder has: as {kind} it"
            " would answer everybody alike; write it with --format qaperso"
        )
    if kind == "peft" and parts == {"base"}:
        raise UserError(
            "config.trainable='all' trained the whole decoder, so there is no adapter; write it with --format merged"
        )
    if parts not in ({"lora"}, {"base"}):
        rest = ", ".join(sorted(parts - {"lora", "base"}))
        raise UserError(
            f"config.method='{method}' needs {rest} too, which {kind} cannot hold; write it with --format qaperso"
        )


def adapter(tree: Tree) -> dict[str, np.ndarray]:
    """Stacked LoRA as the tensors of a peft adapter, [r, in] and [out, r] for each layer's projection.

    Args:
      tree: see `lora.declare`; not scaled, since peft multiplies by alpha / r itself.
    """
    tensors = {}
    for target, ab in tree.items():
        name = f"base_model.model.{hf.NAMES[f'layers/{target}'][0]}"
        for part, letter in (("a", "A"), ("b", "B")):
            for i, value in enumerate(np.asarray(ab[part], np.float32)):
                tensors[name.format(i).replace(".weight", f".lora_{letter}.weight")] = np.ascontiguousarray(value.T)
    return tensors


def adapter_config(run: Run, base: str | None) -> dict[str, Any]:
    """What `adapter_config.json` says; `base` is what peft is to load the base by, None where it comes along."""
    settings = run.config.lora
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": settings.rank,
        "lora_alpha": settings.alpha,
        "lora_dropout": settings.dropout,
        "target_modules": [f"{target}_proj" for target in lora.TARGETS],
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }


def chat_template(run: Run) -> str:
    """The run's layout of turns as a Jinja template for `apply_chat_template`.

    A message's "role" is what its speaker is called in training: their name, or "user" and "assistant" where `data.names` hides
    it. The reply is the run's first responder's, or `responder`'s where the template is told so.
    """
    t = run.template
    bos, start, between, end = (
        _quoted(run.tokenizer.decode(list(ids), skip_special_tokens=False))
        for ids in (t.bos, t.start, t.between, (*t.end, *t.after))
    )
    who = MASKED[RESPONDER] if run.config.data.names == "masked" else run.registry.responders[0]
    turn = f"{start} + message['role'] + {between} + message['content'] + {end}"
    asked = f"{start} + (responder | default({_quoted(who)})) + {between}"
    each = f"{{% for message in messages %}}{{{{ {turn} }}}}{{% endfor %}}"
    return f"{{{{ {bos} }}}}{each}{{% if add_generation_prompt %}}{{{{ {asked} }}}}{{% endif %}}"


def _quoted(text: str) -> str:
    """A text as a literal of Jinja, which would read JSON's two escapes of a rare character as two halves."""
    return json.dumps(text, ensure_ascii=False)


def _write_plain(folder: Path, run: Run, trainable: Tree, kind: str) -> None:
    """An adapter, with its base where that is no model folder, or a merged decoder; and the tokeniser."""
    from safetensors.numpy import save_file

    model = run.setting.model
    if kind == "peft":
        location = portable.base_of(run.workdir, run.record)
        own = location.kind == "hf" and not portable.is_exported(run.record)
        settings = adapter_config(run, run.record["base"]["name"] if own else None)
        save_file(adapter(trainable["lora"]), folder / "adapter_model.safetensors", metadata={"format": "pt"})
        checkpoint.write_json(folder / "adapter_config.json", settings)
        if not own:
            hf.save(folder / portable.BASE, _plain_base(run), model)
    else:
        # What the run computes with, quantised or not.
        params = jax.tree.map(lambda x: x.astype(jnp.float32), quantized.plain(run.params_of(trainable)))
        if "lora" in trainable:
            params = lora.merge(params, lora.scaled(trainable["lora"], run.config.lora.alpha, run.config.lora.rank))
        # Written into a folder that is not there yet, then taken out of it.
        hf.save(folder / "model", params, model)
        for file in (folder / "model").iterdir():
            file.rename(folder / file.name)
        (folder / "model").rmdir()
        checkpoint.write_json(folder / "generation_config.json", generation_config(run))
    tokenizer = copy.deepcopy(run.tokenizer)
    tokenizer.chat_template = chat_template(run)
    tokenizers.save_tokenizer(tokenizer, folder)


def generation_config(run: Run) -> dict[str, Any]:
    """What `generation_config.json` says: how the run's own replies are drawn."""
    g, model = run.config.generate, run.setting.model
    drawn = (
        {"do_sample": True, "temperature": g.temperature, "top_p": g.top_p} if g.temperature else {"do_sample": False}
    )
    ids = {"bos_token_id": model.bos_id, "eos_token_id": list(model.eos_ids), "pad_token_id": model.eos_ids[0]}
    return {**ids, "max_new_tokens": g.max_new_tokens, **drawn}


def _plain_base(run: Run) -> Tree:
    """The frozen base as it was before it was quantised: whoever opens it quantises it again, to the same bits."""
    if not run.config.quantize:
        return run.base
    location = portable.base_of(run.workdir, run.record)
    return load_weights(location, run.setting.model, jnp.dtype(run.config.dtype), run.mesh, run.config)


def _write_run(folder: Path, run: Run, trainable: Tree, memory: Tree, step: int) -> None:
    """See `portable` for what is written."""
    later = people.read(run.workdir)
    # Rows that were fitted beside other weights are told of here: nobody could open the copy, nor fit them anew in it.
    people.placed(trainable, later, step, run.workdir)
    base = {"name": run.record["base"]["name"], "path": "", "sha256": "random"}
    if run.base:
        hf.save(folder / portable.BASE, _plain_base(run), run.setting.model, jnp.dtype(run.config.dtype))
        base |= {"path": portable.BASE, "sha256": hf.fingerprint(Location("hf", folder / portable.BASE))}
    files = portable.write(folder, trainable, memory)
    checkpoint.write_json(folder / RECORD, run.record | {"base": base, "exported": {"step": step, "files": files}})
    tokenizers.save_tokenizer(run.tokenizer, folder / "tokenizer")
    for person in later:
        # Their rows, and not what they said.
        people.write(folder, dataclasses.replace(person, dialogues=()))
    clusters = [run.workdir / prepared.CLUSTERS]
    clusters += [Path(run.config.data.path) / prepared.CLUSTERS] if run.config.data.path else []
    for source in (*(path for path in clusters if path.is_file()), run.workdir / EVALUATION):
        if source.is_file():
            shutil.copyfile(source, folder / source.name)


def _evaluation(workdir: Path) -> dict[str, Any] | None:
    """What `evaluate` wrote last of the test split; None where there is nothing, or nothing that can be read."""
    try:
        found = json.loads((workdir / EVALUATION).read_text(encoding="utf-8"))
        return found if found["metrics"] is not None and found["step"] is not None else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


@command
def main(arguments: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m qaperso.export",
        description=__doc__,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--workdir", required=True, metavar="DIR")
    parser.add_argument("--output", required=True, metavar="NEW")
    parser.add_argument("--format", required=True, choices=FORMATS)
    parser.add_argument("--published", type=Path, metavar="FILE", help="weights of the published QAR implementation")
    known = parser.parse_args(arguments)
    start_runtime(alone=True)
    output = Path(known.output)
    if output.name in ("", ".."):
        raise UserError(
            f"--output is '{known.output}', expected the name of a new folder, which replaces it when it is whole"
        )
    step = export(Path(known.workdir), output, known.format, known.published)
    print(
        f"{output}: checkpoint {step} of {known.workdir} as {known.format}; {output / 'README.md'} says how to use it"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
