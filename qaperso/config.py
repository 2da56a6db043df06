"""Configurations: a short Python file that starts from `default()`, and overrides from the command line."""

from __future__ import annotations

import ast
import json
import runpy
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from qaperso.errors import UserError, nearest, running

# Keys that may differ between a run and its resumption: they change no number that training computes.
OPERATIONAL = (
    *("checkpoint_every", "log_every", "keep_latest", "keep_best", "max_skipped", "peak_flops"),
    *("mesh", "sharding", "vectors"),
)
CHOICES = {
    "compat": ("", "paper"),
    "dtype": ("float32", "bfloat16"),
    "quantize": ("", "int8", "nf4"),
    "remat": ("full", "dots"),
    "trainable": ("adapters", "all"),
    "data.format": ("synthetic", "synthetic_base", "synthetic_reviews", "prepared"),
    "data.names": ("visible", "responder", "masked"),
    "data.labels": ("reply", "all"),
    "qar.contrast": ("none", "in_batch", "prototypes"),
    "qar.memory": ("means", "bank"),
    "prompts.kind": ("zero_shot", "responder", "querier", "retrieved", "history"),
    "dpl.writer": ("base", "endpoint"),
    "dpl.select": ("kmeans", "least_similar", "random"),
}


# Bounds of numbers. Dotted folders stand for all that is in them.
POSITIVE = (
    *("steps", "log_every", "checkpoint_every", "dev_dialogues", "keep_latest", "model", "batch", "lora.rank"),
    *("qar.rank", "qar.head_dim", "qar.bank_size", "qar.temperature", "data.per_pair", "data.count"),
    *("optimizer.lr", "optimizer.clip", "generate.max_new_tokens", "prompts.examples", "prompts.tokens"),
    *("dpl.representatives", "dpl.words", "dpl.new_tokens"),
    *("pplug.history", "pplug.query", "pplug.tokens", "pplug.temperature"),
)
NOT_NEGATIVE = (
    *(
        "seed",
        "data.seed",
        "data.clusters",
        "data.spare_rows",
        "data.context",
        "batch.queriers",
        "keep_best",
        "max_skipped",
        "qar.split_layer",
    ),
    *("optimizer.warmup", "optimizer.final", "optimizer.weight_decay", "optimizer.spike"),
    *("generate.temperature", "peak_flops"),
)
SHARES = ("lora.dropout", "qar.drop_row", "pplug.dropout")


def default() -> ConfigDict:
    """Every key there is, with its default. Lengths are tokens, learning rates per step, weights dimensionless."""
    c = ConfigDict()
    c.seed = 0
    c.steps = 1000
    c.method = "qar"  # a file in qaperso/methods
    c.compat = ""  # "paper" = the published numerics
    c.base = "random"  # folder, .gguf file, package:NAME/FILE, Hub name, workdir, or "random" with `model`
    c.trainable = "adapters"  # or "all"
    c.dtype = "float32"  # of the base and of activations; trainables are float32
    c.quantize = ""  # what a frozen base's kernels are kept in: "int8", "nf4", or "" = `dtype`
    c.remat = "full"  # what the backward pass recomputes; "dots" keeps matmul outputs
    c.model = ConfigDict(dict(embed=128, layers=4, heads=4, kv_heads=2, mlp=384))  # for base = "random"
    c.data = ConfigDict(
        dict(
            format="synthetic",
            path="",  # of a prepared data set
            per_pair=6,  # embedded world: dialogues for each intent and querier
            count=4000,  # embedded base world: dialogues
            seed=0,
            names="visible",  # "masked": speakers are called user and assistant; "responder": only the querier is hidden
            labels="reply",  # "all": every responder turn is learned
            context=5,  # turns that a reply of a long dialogue sees at least, where they fit
            clusters=16,  # 0 = as given by the data
            spare_rows=4,
            without=(),  # queriers who are left out: names, or what the receipts of qaperso.forget call them
        )
    )
    # Bounds of a row and a batch; `queriers` x `per_querier` dialogues of one cluster meet in a batch (0 = plain shuffling).
    c.batch = ConfigDict(dict(rows=8, length=256, targets=128, dialogues=8, accumulate=1, queriers=2, per_querier=2))
    c.lora = ConfigDict(dict(rank=16, alpha=16.0, dropout=0.05))
    c.qar = ConfigDict(
        dict(
            rank=16,
            split_layer=0,  # layers below it have one tower
            querier_embedding=True,
            drop_row=0.15,
            contrast="in_batch",
            memory="means",
            decay=0.9,
            bank_size=64,
            head_dim=64,
            weight=0.5,
            temperature=0.1,
        )
    )
    # A preface: replies it shows (in a profile, or with their queries), and tokens it takes at most.
    c.prompts = ConfigDict(dict(kind="zero_shot", examples=4, tokens=256))
    c.dpl = ConfigDict(
        dict(
            writer="base",  # who states differences and profiles: the base itself, or the environment's "endpoint"
            representatives=4,  # others that a record is compared with, at most
            select="kmeans",  # which others
            gold=False,  # tell the true review's rating and title, as published
            words=80,  # of a record or of an answer that are quoted at most
            new_tokens=160,  # of an answer that the base writes at most
        )
    )
    # Soft tokens from the querier's history (methods pplug, qar).
    c.pplug = ConfigDict(
        dict(
            encoder="",  # "base" = the base's own token embeddings; else a sentence encoder's folder, package:NAME/FILE or Hub name
            history=512,  # items, the most recent
            query=128,  # tokens of a query that are read
            tokens=1,  # soft tokens that the history becomes; one more is the instruction's
            temperature=1.0,  # of the weights of items
            dropout=0.5,  # of items in training, at most
            differences=False,  # an item is told by what sets it apart from what others got on the same occasion
        )
    )
    c.vectors = ""  # folder that keeps vectors of history from run to run; "" = made anew whenever a run is opened
    c.optimizer = ConfigDict(
        dict(
            lr=1e-3,
            warmup=20,
            final=0.1,
            b1=0.9,
            b2=0.95,
            eps=1e-8,
            weight_decay=0.0,
            clip=1.0,
            spike=0.0,  # medians of recent gradient norms above which an update is left out; 0 = never, else above 1
        )
    )
    c.generate = ConfigDict(dict(max_new_tokens=64, temperature=0.0, top_p=1.0))
    c.mesh = ConfigDict(dict(data=-1, fsdp=1, tensor=1))
    # (regex on `path:axis`, mesh axis); the first match decides.
    c.sharding = (
        (":embed$", "fsdp"),
        (":(heads|kv_heads|mlp|vocab)$", "tensor"),
        (":classes$", "fsdp"),
    )
    c.log_every = 10
    c.checkpoint_every = 200  # validates on dev, then saves
    c.dev_dialogues = 200  # read at each validation, evenly spread over the split
    c.keep_latest = 2
    c.keep_best = 1
    c.max_skipped = 10  # updates left out (numbers not finite, or a spike) before the run stops
    c.peak_flops = 0.0  # of all devices, FLOP/s; 0 = measured by a matmul at start
    return c.lock()


def load(path: str | Path, overrides: Sequence[str] = ()) -> ConfigDict:
    """Reads `get_config()` of a Python file and applies overrides like `optimizer.lr=3e-4`.

    `FILE.py:NAME` applies the overrides under NAME in the file's `VARIANTS`, {name: {dotted key: value}}, before them.

    Raises:
      UserError: no such file or variant, no `get_config`, an unknown key, a value of the wrong type, or whatever the
        file raises.
    """
    file, _, variant = str(path).partition(".py:")
    path = Path(f"{file}.py" if variant else path)
    if not path.is_file():
        near = nearest(path.name, [p.name for p in path.parent.glob("*.py")]) if path.parent.is_dir() else ""
        raise UserError(f"config '{path}' is not a file{near}")
    with running("config", path, _refused):
        get_config = runpy.run_path(str(path)).get("get_config")
        if get_config is None:
            raise UserError(f"config '{path}' defines no get_config()")
        config = get_config()
        if variant:
            known = variants(path)
            if variant not in known:
                raise UserError(f"config '{path}' has no variant '{variant}'{nearest(variant, known)}")
            config.update_from_flattened_dict(known[variant])
    if not isinstance(config, ConfigDict) or keys(config) != keys(default()):
        raise UserError(f"config '{path}': get_config() must return what default() gives, with values changed")
    plain = default()
    for key in keys(config):  # ml_collections lets None pass for anything, and True for 1
        value, old = get(config, key), get(plain, key)
        if not isinstance(value, type(old)) or isinstance(value, bool) != isinstance(old, bool):
            raise UserError(f"config '{path}': {_mistyped(key, old, value)}")
    return changed(config, overrides)


def _refused(error: BaseException) -> str:
    """What a configuration refused, as a command line would be told; "" of an error that came from elsewhere."""
    frame = list(traceback.walk_tb(error.__traceback__))[-1][0]
    node, key = frame.f_locals.get("self"), frame.f_locals.get("key", frame.f_locals.get("attribute"))
    if not isinstance(node, ConfigDict) or not isinstance(error, AttributeError | KeyError | TypeError):
        return ""
    known = default()
    folders = [name for name in known if isinstance(known[name], ConfigDict) and set(known[name]) == set(node)]
    full = f"{folders[0]}.{key}" if folders else str(key)
    if key not in node:
        return f"unknown key 'config.{full}'{nearest(full, keys(known))}"
    return _mistyped(full, node[key], frame.f_locals.get("value")) if isinstance(error, TypeError) else ""


def _mistyped(key: str, old: Any, value: Any) -> str:
    """That a file gives a key a value of another type than it has."""
    found = f"found {type(value).__name__} {value!r}"
    if isinstance(old, ConfigDict):
        return f"config.{key} is a section, {found}; set its keys, such as config.{key}.{next(iter(old))}"
    return f"config.{key} must be {type(old).__name__} like {old!r}, {found}"


def changed(config: ConfigDict, overrides: Sequence[str]) -> ConfigDict:
    """The configuration with overrides like `optimizer.lr=3e-4` applied to it, in place.

    Raises:
      UserError: an unknown key, or a value of the wrong type or out of bounds.
    """
    for text in overrides:
        key, sign, value = text.partition("=")
        if not sign:
            raise UserError(f"override '--config.{text}' has no value; write --config.{text}=VALUE")
        _override(config, key, value)
    _check(config)
    return config


def variants(path: Path) -> dict[str, dict[str, Any]]:
    """The named sets of overrides that a config file has beside `get_config`, {name: {dotted key: value}}.

    Raises:
      UserError: whatever the file raises.
    """
    with running("config", path):
        return runpy.run_path(str(path)).get("VARIANTS", {})


def overrides(words: Sequence[str], options: str) -> list[str]:
    """`KEY=VALUE` of each `--config.KEY=VALUE` or `--config.KEY VALUE`: what else stands on a command line.

    Args:
      words: what the command's own parser did not know.
      options: its own options, for the message.

    Raises:
      UserError: a word that is neither.
    """
    found = []
    for i, text in enumerate(words):
        if text.startswith("--config."):
            value = text.removeprefix("--config.")
            if "=" not in value and i + 1 < len(words) and not words[i + 1].startswith("--"):
                value += "=" + words[i + 1]
            found.append(value)
        elif not (i and words[i - 1].startswith("--config.") and "=" not in words[i - 1]):
            raise UserError(f"unknown argument '{text}'; options are {options} and --config.KEY=VALUE")
    return found


def keys(config: ConfigDict, prefix: str = "") -> list[str]:
    """Dotted names of all leaves."""
    names: list[str] = []
    for name in sorted(config):
        value = config[name]
        names += keys(value, f"{prefix}{name}.") if isinstance(value, ConfigDict) else [prefix + name]
    return names


def get(config: ConfigDict, key: str) -> Any:
    """The value of a dotted key."""
    for name in key.split("."):
        config = config[name]
    return config


def _override(config: ConfigDict, key: str, text: str) -> None:
    if key not in keys(config):
        raise UserError(f"unknown key 'config.{key}'{nearest(key, keys(config))}")
    *folders, leaf = key.split(".")
    node = get(config, ".".join(folders)) if folders else config
    old = node[leaf]
    try:
        value = text if isinstance(old, str) else ast.literal_eval(text)
    except (ValueError, SyntaxError):
        value = text
    if isinstance(old, float) and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if type(value) is not type(old):
        raise UserError(f"config.{key} must be {type(old).__name__} like {old!r}, found {text!r}")
    node[leaf] = value


def _check(config: ConfigDict) -> None:
    for key, choices in CHOICES.items():
        value = get(config, key)
        if value not in choices:
            shown = ", ".join(map(repr, choices))
            raise UserError(f"config.{key} is {value!r}, expected one of {shown}")
    for key in keys(config):
        value, folder = get(config, key), key.split(".")[0]
        if (key in POSITIVE or folder in POSITIVE) and key not in NOT_NEGATIVE and value <= 0:
            raise UserError(f"config.{key} is {value}, expected more than 0")
        if key in NOT_NEGATIVE and value < 0:
            raise UserError(f"config.{key} is {value}, expected 0 or more")
        if key in SHARES and not 0 <= value < 1:
            raise UserError(f"config.{key} is {value}, expected a share from 0 up to, not including, 1")
    if config.batch.per_querier < 2:
        raise UserError(
            f"config.batch.per_querier is {config.batch.per_querier}, expected 2 or more: an anchor and a partner"
        )
    if not 0 < config.generate.top_p <= 1:
        raise UserError(f"config.generate.top_p is {config.generate.top_p}, expected more than 0, at most 1")
    if 0 < config.optimizer.spike <= 1:
        raise UserError(
            f"config.optimizer.spike is {config.optimizer.spike}, expected 0 or more than 1: a median is no spike"
        )
    for name in config.data.without:
        if not isinstance(name, str) or not name:
            raise UserError(f"config.data.without holds {name!r}, expected names of queriers, as in ('ida',)")
    for rule in config.sharding:
        if not (isinstance(rule, tuple) and len(rule) == 2 and isinstance(rule[0], str)):
            raise UserError(f"config.sharding holds {rule!r}, expected pairs of a regex and a mesh axis")
    if config.method in ("prompts", "dpl") and (config.compat or config.trainable != "adapters"):
        raise UserError(f"config.method='{config.method}' needs compat='' and trainable='adapters': it trains nothing")
    shown = config.method == "dpl" or (config.method == "prompts" and config.prompts.kind != "zero_shot")
    if shown and config.prompts.tokens >= config.batch.length:
        raise UserError(
            f"config.prompts.tokens is {config.prompts.tokens}, which leaves nothing of batch.length={config.batch.length} "
            "to the dialogue itself; raise batch.length by as much"
        )
    if config.quantize and config.trainable == "all":
        raise UserError(
            f"config.quantize='{config.quantize}' needs trainable='adapters': a base that is trained is float32; set one of the two"
        )
    if config.pplug.encoder and (
        config.method not in ("pplug", "qar") or config.compat or config.trainable != "adapters"
    ):
        raise UserError(
            f"config.pplug.encoder is '{config.pplug.encoder}', which needs method='pplug' or 'qar', compat='' and "
            "trainable='adapters'; set it to ''"
        )
    if config.method == "pplug" and not config.pplug.encoder:
        raise UserError(
            "config.method='pplug' needs config.pplug.encoder: 'base', or a sentence encoder's folder or Hub name"
        )
    if config.compat == "paper" and (config.qar.contrast, config.batch.dialogues) != ("prototypes", 1):
        raise UserError("config.compat='paper' needs qar.contrast='prototypes' and batch.dialogues=1, as published")


def to_json(config: ConfigDict) -> dict[str, Any]:
    """A plain JSON object."""
    return json.loads(config.to_json_best_effort())


def from_json(data: dict[str, Any]) -> ConfigDict:
    """The inverse of `to_json`.

    Raises:
      UserError: a key is missing or unknown, as in a record written by another version.
    """
    config, found = default(), ConfigDict(data)
    known, given = keys(config), keys(found)
    for key in sorted(set(known) ^ set(given)):
        what = "no" if key in known else "an unknown"
        raise UserError(f"the run's record has {what} config.{key}; it was written by another version")
    for key in known:
        value = get(found, key)
        *folders, leaf = key.split(".")
        node = get(config, ".".join(folders)) if folders else config
        node[leaf] = _tuples(value) if isinstance(node[leaf], tuple) else value
    return config


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, list | tuple) else value


def differences(old: ConfigDict, new: ConfigDict) -> list[str]:
    """`key: old -> new` for every key that changes what training computes."""
    return [
        f"{key}: {get(old, key)!r} -> {get(new, key)!r}"
        for key in keys(new)
        if key.split(".")[0] not in OPERATIONAL and get(old, key) != get(new, key)
    ]
