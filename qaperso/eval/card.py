"""The model card of an exported run: what it is, what it learned from, how it was scored, how to use it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qaperso.eval import report
from qaperso.run import Run

# What the folder of each format is used with, and how; {0} is the folder, {1} a querier, {2} a responder.
USES = {
    "qaperso": """    python -m qaperso.chat --workdir {0} --querier NAME --responder "{2}"

opens this folder, or its Hub name, like any run's; `python -m qaperso.evaluate` does too, where the data is at hand.""",
    "merged": """    from transformers import AutoModelForCausalLM, AutoTokenizer
    model, tokenizer = (kind.from_pretrained("{0}") for kind in (AutoModelForCausalLM, AutoTokenizer))
    asked = [{{"role": "{1}", "content": "..."}}]
    inputs = tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    print(tokenizer.decode(model.generate(**inputs)[0]))

A message's role is what its speaker is called, here by `data.names='{3}'`; `responder=NAME` says who replies.""",
    "peft": """    from peft import PeftModel
    from transformers import AutoModelForCausalLM
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("{4}"), "{0}")

The tokeniser beside it has the layout of turns as its chat template: a message's role is what its speaker is called, here by
`data.names='{3}'`; `responder=NAME` says who replies.""",
}
LIBRARIES = {"qaperso": "qaperso", "merged": "transformers", "peft": "peft"}


def text(run: Run, step: int, kind: str, evaluation: Mapping[str, Any] | None, folder: str, beside: bool) -> str:
    """The card, Markdown with the Hub's front matter.

    Args:
      run: that is exported.
      step: of its checkpoint.
      kind: the format, see `export`.
      evaluation: what `evaluate` wrote, or None.
      folder: name of the folder.
      beside: whether the base is in it too.
    """
    config, names = run.config, run.registry
    base = run.record["base"]["name"]
    hidden = MASKS[config.data.names]
    told = f"{folder}/base" if beside else base
    front = ["---", f"library_name: {LIBRARIES[kind]}", "tags: [personalisation, querier-aware]", "---"]
    lines = [
        *front,
        f"# {folder}",
        "",
        "Replies as a person would, and to each querier as that person would to them. Trained with qaperso"
        f" (`config.method='{config.method}'`) on the base `{base}`; checkpoint {step} of {config.steps} steps, the one best on dev.",
        "",
        "## Use",
        "",
        USES[kind].format(folder, hidden, names.responders[0], config.data.names, told),
        "",
        "## Data",
        "",
        *_data(run),
        "",
        "## Evaluation",
        "",
        *_evaluation(evaluation, step),
        "",
        "## Limits",
        "",
        "It says what people of its data would have said, true or not, and was made to sound like one of them. Rows and names of"
        " its queriers are in it: whoever has it can ask as any of them. Forgetting somebody in the run it came from does not"
        " reach copies.",
        "",
    ]
    return "\n".join(lines)


# What a querier's role is called.
MASKS = {"visible": "NAME", "responder": "user", "masked": "user"}


def _data(run: Run) -> list[str]:
    data, names = run.config.data, run.registry
    source = (
        f"a prepared data set, `{Path(data.path).name}`"
        if data.format == "prepared"
        else f"the embedded world ({data.format})"
    )
    lines = [
        f"From {source}: {len(names.known)} queriers, {len(names.responders)} responders,"
        f" {run.setting.clusters} clusters of queries."
    ]
    try:
        stats = json.loads((Path(data.path) / "stats.json").read_text(encoding="utf-8")) if data.path else {}
        rows = [(name, s["dialogues"], s["replies"], s["groups"]) for name, s in stats.get("splits", {}).items()]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        rows = []
    if rows:
        lines += ["", "| split | dialogues | replies | groups |", "|---|---|---|---|"]
        lines += [f"| {name} | {dialogues:,} | {replies:,} | {groups:,} |" for name, dialogues, replies, groups in rows]
    return lines


def _evaluation(evaluation: Mapping[str, Any] | None, step: int) -> list[str]:
    if evaluation is None:
        return ["It was not evaluated when it was exported."]
    lines = [f"By `qaperso.evaluate` on the {evaluation['split']} split, with 95% intervals."]
    if evaluation["step"] != step:
        lines.append(f"These figures are of checkpoint {evaluation['step']}, not of this one.")
    lines += ["", "| metric | value | n |", "|---|---|---|"]
    for name, metric in evaluation["metrics"].items():
        value = report.interval(metric)
        lines.append(f"| {name} | {metric.get('note', '-') if value == '-' else value} | {metric.get('n', '')} |")
    return lines
