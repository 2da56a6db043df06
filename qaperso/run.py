"""A run: everything a configuration stands for, and its folder.

Train, evaluate, chat and whatever serves a model open runs here, so they cannot disagree.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from qaperso import arrays, checkpoint, methods, people, portable
from qaperso import config as configs
from qaperso.data import load, paper, text
from qaperso.data.plan import Shape
from qaperso.data.store import Registry, Store, without
from qaperso.data.text import (
    Encoded,
    Front,
    Template,
    Tokenizer,
    encode_dialogue,
    scored_turns,
    template_of,
    turn_size,
)
from qaperso.errors import UserError
from qaperso.mesh import make_mesh, mesh_over
from qaperso.methods import Setting
from qaperso.methods.base import Reader, open_reader
from qaperso.models import base as bases
from qaperso.models import decoder, hf, lora, quantized, shapes
from qaperso.models import tokenizer as tokenizers
from qaperso.models.base import Location
from qaperso.models.config import DecoderConfig, RopeScaling
from qaperso.people import Person
from qaperso.types import Dialogue, Example, Turn

Tree = Any
RECORD = "run.json"
CHECKPOINTS = "checkpoints"


@dataclasses.dataclass(frozen=True, eq=False)
class Run:
    """An opened run.

    Attributes:
      workdir: its folder.
      setting: config, base's shape, sizes.
      method: the module of `config.method`.
      mesh: of the devices.
      registry: names of queriers and responders.
      tokenizer, template: of the base.
      base: frozen parameters; {} when everything is trained.
      record: what `run.json` holds.
      store: the data whose history the method reads; None where it was opened without.
      people: who came after training; they are in `registry` and in `store` too.
      reader: what the method looks dialogues up with; None where it looks nothing up.
    """

    workdir: Path
    setting: Setting
    method: ModuleType
    mesh: Mesh
    registry: Registry
    tokenizer: Tokenizer
    template: Template
    base: Tree
    record: dict
    store: Store | None = None
    people: tuple[Person, ...] = ()
    reader: Reader | None = None

    @property
    def config(self) -> Any:
        """The run's configuration."""
        return self.setting.config

    @property
    def shape(self) -> Shape:
        """Bounds of a batch."""
        b = self.config.batch
        return Shape(b.rows, b.length, b.targets, b.dialogues)

    def params_of(self, trainable: Tree) -> Tree:
        """The decoder's parameters: the trained ones where everything is trained, else the frozen base."""
        return trainable.get("base", self.base)

    def examples(self, store: Store, split: str, limit: int | None = None) -> tuple[list[Example], int]:
        """Tokenised dialogues of a split (at most `limit`, evenly spread), and how many replies were left out as too long."""
        # Every split but training predicts replies only: scores compare runs whatever they learned from.
        labels = self.config.data.labels if split == "train" else "reply"
        encode = functools.partial(self.encode, labels=labels)
        chosen = store.split(split, limit)
        self.annotate([store.dialogues[i] for i in chosen])
        return load.encode_split(store, chosen, encode, self.shape, labels)

    def encode(self, dialogue: Dialogue, labels: str = "reply", past: Dialogue | None = None) -> list[Encoded]:
        """Tokens of a dialogue, with what the method puts before it, as sequences that fit a row each; with the history of
        whoever asks the same in `past`, told under the querier's name."""
        batch, data = self.config.batch, self.config.data
        turns, responder = dialogue.turns, dialogue.responder
        if self.config.compat == "paper":
            found = paper.encode_train(self.tokenizer, self.template, turns, responder, batch.length)
            fits = found is not None and found.predicted.sum() <= batch.targets
            return [dataclasses.replace(found, replies=1)] if fits else []
        asked = scored_turns(turns, responder, dialogue.replies, labels)
        return encode_dialogue(
            self.tokenizer,
            self.template,
            turns[: asked[-1] + 1] if asked else (),
            responder,
            length=self.room,
            targets=batch.targets,
            replies=asked,
            context=data.context,
            names=data.names,
            fronts=[self.front(past or dialogue, i, dialogue.querier) for i in asked],
        )

    @property
    def places(self) -> int:
        """How many soft tokens stand before each dialogue's own tokens."""
        return self.reader.places if self.reader else 0

    @property
    def room(self) -> int:
        """How many tokens of a row a dialogue's own turns may take: what its method puts before them has the others."""
        return self.config.batch.length - self.places - self.method.preface_tokens(self.setting)

    def front(self, dialogue: Dialogue, reply: int = -1, name: str | None = None) -> Front:
        """What the method puts before a dialogue of which turn number `reply` is asked for; that turn is blank."""
        return Front(self.preface(dialogue, reply, name), self.places, self.columns(dialogue, reply))

    def preface(self, dialogue: Dialogue, reply: int = -1, name: str | None = None) -> tuple[Turn, ...]:
        """The turns of `front`, in which the querier is called by `name`; None = their own."""
        size = functools.partial(turn_size, self.tokenizer, self.template)
        return tuple(
            self.method.preface(self.setting, self.store, dialogue.until(reply), name or dialogue.querier, size)
        )

    def annotate(self, dialogues: Sequence[Dialogue]) -> Counter[str]:
        """Has a language model asked at once what the prefaces of these dialogues need; counts, none by most methods."""
        if self.setting.notes is None:
            return Counter()
        asked = [d.until(i) for d in dialogues for i in scored_turns(d.turns, d.responder, d.replies, "reply")]
        return self.method.annotate(self.setting, self.store, asked)

    def columns(self, dialogue: Dialogue, reply: int = -1) -> Mapping[str, Any]:
        """What the method looks up for turn number `reply` of a dialogue, which is blank; see `types.Example`."""
        return self.reader.columns(dialogue.until(reply)) if self.reader else {}


def new_run(config: Any, workdir: Path) -> tuple[Run, Store]:
    """Makes a run of a configuration; writes nothing.

    Raises:
      UserError: data or base do not fit the configuration.
    """
    method = methods.load(config.method)
    store = load.load_store(config.data)
    store = paper.class_grid(store) if config.compat == "paper" else store
    location = bases.locate(config.base)
    tokenizer = _tokenizer(config, location)
    template = template_of(tokenizer)
    model = _model(config, location, tokenizer)
    mesh = make_mesh(config.mesh.data, config.mesh.fsdp, config.mesh.tensor)
    if config.batch.rows % (mesh.shape["data"] * mesh.shape["fsdp"]):
        raise UserError(
            f"batch.rows={config.batch.rows} is not a multiple of the {mesh.shape['data'] * mesh.shape['fsdp']} devices "
            "of the mesh's data and fsdp axes"
        )
    clusters = 1 + max(int(store.cluster.max()), config.data.clusters - 1)
    setting = Setting(config, model, store.registry.rows, clusters, store.classes, notes=methods.notes(method, workdir))
    record = {
        "config": configs.to_json(config),
        "model": dataclasses.asdict(model),
        "registry": store.registry.to_json(),
        "clusters": clusters,
        "classes": {k: v.tolist() for k, v in store.classes.items()},
    }
    base, digest = load_base(config, location, model, mesh)
    path = str(location.path.resolve()) if location.path else ""
    record["base"] = {"name": config.base, "path": path, "sha256": digest}
    setting, reader = open_reader(setting, method, store, tokenizer, base, mesh)
    return Run(
        workdir, setting, method, mesh, store.registry, tokenizer, template, base, record, store, reader=reader
    ), store


def open_run(workdir: Path, enrolled: bool = True) -> Run:
    """Opens a run that was trained or exported before, with the base it was trained on.

    Args:
      workdir: its folder, or the Hub name of one that was exported.
      enrolled: whether those who came after training are in it.

    Raises:
      UserError: no run there; its base is gone or has changed, or the data has, where its method reads history.
    """
    workdir = portable.find(workdir)
    record = read_record(workdir)
    config = configs.from_json(record["config"])
    model = _model_from_json(record["model"])
    location = portable.base_of(workdir, record)
    mesh = mesh_over(config.mesh)
    tokenizer = tokenizers.load_tokenizer(Location("workdir", workdir))
    classes = {k: jax.device_get(jnp.asarray(v, jnp.int32)) for k, v in record["classes"].items()}
    later = people.read(workdir) if enrolled else ()
    registry = people.joined(Registry.from_json(record["registry"]), later, workdir)
    method = methods.load(config.method)
    setting = Setting(config, model, registry.rows, record["clusters"], classes, notes=methods.notes(method, workdir))
    base, digest = load_base(config, location, model, mesh)
    if digest != record["base"]["sha256"]:
        raise UserError(
            f"{workdir}: its base '{record['base']['name']}' has changed since training (sha256 {digest[:12]}, recorded "
            f"{record['base']['sha256'][:12]}); bring the old weights back or train again"
        )
    store = None
    if method.reads_history(setting):
        store = people.with_history(_store_again(workdir, config, record), registry, later)
    setting, reader = open_reader(setting, method, store, tokenizer, base, mesh)
    template = template_of(tokenizer)
    return Run(workdir, setting, method, mesh, registry, tokenizer, template, base, record, store, later, reader)


def _store_again(workdir: Path, config: Any, record: dict) -> Store:
    """The data of a run that was made before, checked against its record."""
    try:
        store = without(load.load_store(config.data), Registry.from_json(record["registry"]).forgotten)
    except UserError as error:
        raise UserError(f"{workdir}: config.method='{config.method}' reads the history of its data: {error}") from error
    found = {"registry": store.registry.to_json(), "classes": {k: v.tolist() for k, v in store.classes.items()}}
    for part, what in json.loads(json.dumps(found)).items():
        if what != record[part]:
            raise UserError(
                f"{workdir}: config.method='{config.method}' reads the history of its data, which has changed since the "
                f"run was made ({part}); bring the old data back, or make the run again"
            )
    return store


def read_record(workdir: Path) -> dict:
    """The run's `run.json`.

    Raises:
      UserError: there is none, or it is broken.
    """
    path = workdir / RECORD
    if not path.is_file():
        raise UserError(f"'{workdir}' is no run: it has no {RECORD}; train first, or give the right --workdir")
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is broken ({error}); the run cannot be opened") from error
    parts = ("config", "model", "registry", "clusters", "classes", "base")
    missing = [part for part in parts if not isinstance(record, dict) or part not in record]
    if missing:
        raise UserError(f"{path} has no '{missing[0]}'; it is not the record of a run, or of another version")
    return record


def declare(run: Run) -> tuple[Tree, Tree]:
    """Declarations of the run's trainable and memory trees."""
    return run.method.declare(run.setting)


def initialise(run: Run) -> tuple[Tree, Tree]:
    """First values of the trainable and memory trees, on the mesh; a base that is trained starts from its weights."""
    trainable, memory = declare(run)
    own = {k: v for k, v in trainable.items() if k != "base"}
    key = jax.random.key(run.config.seed)
    place = functools.partial(arrays.shardings, mesh=run.mesh, rules=run.config.sharding)
    values = jax.jit(lambda k: arrays.initialise(own, k), out_shardings=place(own))(key)
    if run.reader:
        values = run.reader.start(values)
    if "base" in trainable:
        location = bases.locate(run.config.base)
        values["base"] = load_weights(location, run.setting.model, jnp.float32, run.mesh, run.config)
    return values, jax.jit(lambda k: arrays.initialise(memory, k), out_shardings=place(memory))(key)


def restore(run: Run, step: int | None = None) -> tuple[Tree, Tree, int]:
    """Trained parameters and memory: of a step, or of the checkpoint best on dev; with the rows of the run's `people`.

    Raises:
      UserError: no such checkpoint, or one that somebody's row was not fitted on.
    """
    folder = run.workdir / CHECKPOINTS

    def like(specs: Tree) -> Tree:
        place = arrays.shardings(specs, run.mesh, run.config.sharding)
        return jax.tree.map(
            lambda s, p: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=p), arrays.abstract(specs), place
        )

    wanted = tuple(map(like, declare(run)))
    if portable.is_exported(run.record):
        trainable, memory, step = portable.read(run.workdir, run.record, *wanted)
    else:
        step = checkpoint.choose(folder) if step is None else step
        trainable, memory = checkpoint.load_trainable(folder, step, *wanted)
    return people.placed(trainable, run.people, step, run.workdir), memory, step


def load_base(config: Any, location: Location, model: DecoderConfig, mesh: Mesh) -> tuple[Tree, str]:
    """The frozen base on the mesh ({} when everything is trained) and a sha256 of where it came from."""
    if config.trainable == "all":
        return {}, _digest(location)
    return load_weights(location, model, jnp.dtype(config.dtype), mesh, config, config.quantize), _digest(location)


def load_weights(location: Location, model: DecoderConfig, dtype: Any, mesh: Mesh, config: Any, kind: str = "") -> Tree:
    """A decoder's parameters from any kind of base, each array on its shards; `kind` as `quantized.declare` takes it."""
    specs = decoder.declare(model, dtype)
    whole, place = (arrays.shardings(s, mesh, config.sharding) for s in (specs, quantized.declare(specs, kind)))
    if location.kind == "random":
        # Not the key of the trainables: a base that stays the same under another method.
        key = jax.random.fold_in(jax.random.key(config.seed), 1)
        return quantized.compress(jax.jit(lambda k: arrays.initialise(specs, k), out_shardings=whole)(key), kind, place)
    if location.kind != "workdir":
        return hf.load_params(location, model, dtype, place, kind)
    earlier = open_run(location.path)
    trainable, _, _ = restore(earlier)
    if trainable.keys() & {"tower", "plug"}:
        raise UserError(
            f"config.base '{location.path}' is a run with two towers, querier rows or a user embedder, which no single "
            "decoder can replace"
        )
    params, own = quantized.plain(earlier.params_of(trainable)), earlier.config.lora
    if "lora" in trainable:
        params = lora.merge(params, lora.scaled(trainable["lora"], own.alpha, own.rank))
    params = jax.tree.map(lambda x, p: jax.device_put(x.astype(dtype), p), params, whole)
    return quantized.compress(params, kind, place)


def _digest(location: Location) -> str:
    if location.kind != "workdir":
        return hf.fingerprint(location)
    # A run is its configuration and the weights that are read from it.
    record = read_record(location.path)
    digest = hashlib.sha256(json.dumps(record["config"], sort_keys=True).encode())
    if portable.is_exported(record):
        digest.update(json.dumps(record["exported"], sort_keys=True).encode())
        return digest.hexdigest()
    folder = location.path / CHECKPOINTS / str(checkpoint.choose(location.path / CHECKPOINTS)) / "trainable"
    for file in sorted(p for p in folder.rglob("*") if p.is_file()):
        digest.update(str(file.relative_to(folder)).encode())
        digest.update(file.read_bytes())
    return digest.hexdigest()


def shape_of(config: Any) -> DecoderConfig:
    """Shape of a configuration's base, without its weights; that of a model in `shapes.PUBLISHED` without the Hub."""
    if config.base in shapes.PUBLISHED:
        return shapes.PUBLISHED[config.base]
    location = bases.locate(config.base)
    return _model(config, location, _tokenizer(config, location))


def _tokenizer(config: Any, location: Location) -> Tokenizer:
    if location.kind != "random":
        return tokenizers.load_tokenizer(location)
    if not config.data.format.startswith("synthetic"):
        raise UserError(
            f"config.base='random' has a tokeniser for the embedded world only, not for data.format="
            f"'{config.data.format}'; name a pretrained base"
        )
    return tokenizers.word_tokenizer(load.words(config.data))


def _model(config: Any, location: Location, tokenizer: Tokenizer) -> DecoderConfig:
    end = template_of(tokenizer).end[0]
    if location.kind == "random":
        m = config.model
        if m.heads % m.kv_heads or m.embed % m.heads:
            raise UserError(f"config.model: heads={m.heads} must divide embed={m.embed} and be a multiple of kv_heads")
        shape = dict(m) | {"vocab": len(tokenizer), "head_dim": m.embed // m.heads, "tied": True}
        return DecoderConfig(**shape, eos_ids=(end,))
    if location.kind == "workdir":
        return _model_from_json(read_record(location.path)["model"])
    model = hf.load_config(location)
    text.check_template(template_of(tokenizer), model.vocab)
    return dataclasses.replace(model, eos_ids=(end, *(i for i in model.eos_ids if i != end)))


def _model_from_json(data: dict) -> DecoderConfig:
    scaling = data["rope_scaling"] and RopeScaling(**data["rope_scaling"])
    return DecoderConfig(**(data | {"rope_scaling": scaling, "eos_ids": tuple(data["eos_ids"])}))
