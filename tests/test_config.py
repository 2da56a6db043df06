"""Configurations: keys, types, choices, overrides, records."""

from __future__ import annotations

import ast
import dataclasses
import json
import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qaperso import config as configs
from qaperso.errors import UserError
from qaperso.models.config import DecoderConfig

ROOT = Path(__file__).resolve().parent.parent
FILES = sorted(p for p in (ROOT / "configs").glob("*.py") if not p.name.startswith("suite_"))


def write(folder: Path, body: str) -> Path:
    """A config file whose get_config() runs `body` on the default, `c`."""
    path = folder / "some.py"
    path.write_text(
        f"from qaperso.config import default\n\ndef get_config():\n    c = default()\n    {body}\n    return c\n"
    )
    return path


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    return write(tmp_path, "pass")


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_every_shipped_config_loads_and_survives_its_record(path):
    config = configs.load(path)
    data = json.loads(json.dumps(configs.to_json(config)))
    again = configs.from_json(data)
    assert again == config and configs.differences(config, again) == []
    assert type(again.sharding) is tuple and all(type(rule) is tuple for rule in again.sharding)


@pytest.mark.parametrize(
    ("override", "key", "value"),
    [
        ("optimizer.lr=3e-4", "optimizer.lr", 3e-4),
        ("lora.alpha=8", "lora.alpha", 8.0),
        ("steps=7", "steps", 7),
        ("qar.querier_embedding=False", "qar.querier_embedding", False),
        ("data.path=a=b.jsonl", "data.path", "a=b.jsonl"),
        ("data.path=7", "data.path", "7"),
        ("mesh.data=-1", "mesh.data", -1),
        ("sharding=((':embed$', None),)", "sharding", ((":embed$", None),)),
    ],
)
def test_override_takes_the_type_of_the_default(plain, override, key, value):
    found = configs.get(configs.load(plain, [override]), key)
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optimiser.lr=1", r"unknown key 'config\.optimiser\.lr'; did you mean 'optimizer\.lr'\?"),
        ("lora.rnak=1", r"unknown key 'config\.lora\.rnak'; did you mean 'lora\.rank'\?"),
        ("lora=1", r"unknown key 'config\.lora'"),
        ("steps", r"'--config\.steps' has no value; write --config\.steps=VALUE"),
        ("steps=ten", r"config\.steps must be int like 1000, found 'ten'"),
        ("steps=1.5", r"config\.steps must be int like 1000, found '1\.5'"),
        ("steps=True", r"config\.steps must be int like 1000, found 'True'"),
        ("qar.querier_embedding=1", r"config\.qar\.querier_embedding must be bool like True, found '1'"),
        ("optimizer.lr=fast", r"config\.optimizer\.lr must be float like 0\.001, found 'fast'"),
        ("sharding=heads", r"config\.sharding must be tuple like \(.*found 'heads'"),
        ("sharding=(5,)", r"config\.sharding holds 5, expected pairs of a regex and a mesh axis"),
        ("batch.per_querier=1", r"config\.batch\.per_querier is 1, expected 2 or more"),
        ("batch.queriers=-1", r"config\.batch\.queriers is -1, expected 0 or more"),
        ("dtype=float16", r"config\.dtype is 'float16', expected one of 'float32', 'bfloat16'"),
        ("qar.contrast=batch", r"config\.qar\.contrast is 'batch', expected one of 'none', 'in_batch', 'prototypes'"),
        ("data.names=hidden", r"config\.data\.names is 'hidden', expected one of 'visible', 'responder', 'masked'"),
        ("prompts.kind=rag", r"config\.prompts\.kind is 'rag', expected one of 'zero_shot', 'responder', 'querier'"),
        ("prompts.examples=0", r"config\.prompts\.examples is 0, expected more than 0"),
        ("prompts.tokens=-1", r"config\.prompts\.tokens is -1, expected more than 0"),
        ("steps=0", r"config\.steps is 0, expected more than 0"),
        ("method=dpl", r"config\.prompts\.tokens is 256, which leaves nothing of batch\.length=256 to the dialogue"),
        ("batch.rows=-4", r"config\.batch\.rows is -4, expected more than 0"),
        ("model.kv_heads=0", r"config\.model\.kv_heads is 0, expected more than 0"),
        ("seed=-1", r"config\.seed is -1, expected 0 or more"),
        ("lora.dropout=1.0", r"config\.lora\.dropout is 1\.0, expected a share"),
        ("optimizer.spike=1.0", r"config\.optimizer\.spike is 1\.0, expected 0 or more than 1"),
        ("optimizer.spike=-3.0", r"config\.optimizer\.spike is -3\.0, expected 0 or more"),
        ("generate.top_p=0", r"config\.generate\.top_p is 0\.0, expected more than 0, at most 1"),
        ("compat=paper", r"config\.compat='paper' needs qar\.contrast='prototypes' and batch\.dialogues=1"),
    ],
)
def test_wrong_overrides_name_key_and_mend(plain, override, message):
    with pytest.raises(UserError, match=message):
        configs.load(plain, [override])


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("c.lora.rnak = 4", r"some\.py', line 5: unknown key 'config\.lora\.rnak'; did you mean 'lora\.rank'\?$"),
        ("c.stesp = 4", r"some\.py', line 5: unknown key 'config\.stesp'; did you mean 'steps'\?$"),
        (
            "c['batch']['row'] = 4",
            r"some\.py', line 5: unknown key 'config\.batch\.row'; did you mean 'batch\.rows'\?$",
        ),
        (
            "c.batch.update(row=4)",
            r"some\.py', line 5: unknown key 'config\.batch\.row'; did you mean 'batch\.rows'\?$",
        ),
        (
            "c.steps = c.batch.row",
            r"some\.py', line 5: unknown key 'config\.batch\.row'; did you mean 'batch\.rows'\?$",
        ),
        ("c.steps = 'many'", r"some\.py', line 5: config\.steps must be int like 1000, found str 'many'$"),
        ("c.batch.rows = 1.5", r"some\.py', line 5: config\.batch\.rows must be int like 8, found float 1\.5$"),
        ("c.method = 4", r"some\.py', line 5: config\.method must be str like 'qar', found int 4$"),
        (
            "c.batch = 4",
            r"line 5: config\.batch is a section, found int 4; set its keys, such as config\.batch\.accumulate$",
        ),
        ("c.steps = None", r"some\.py': config\.steps must be int like 1000, found NoneType None$"),
        ("c.steps = True", r"some\.py': config\.steps must be int like 1000, found bool True$"),
        ("c = None", r"get_config\(\) must return what default\(\) gives"),
        ("c = c.lora", r"get_config\(\) must return what default\(\) gives"),
        ("c.steps = undefined", r"some\.py', line 5: found NameError: name 'undefined' is not defined, expected code"),
        (
            "c.steps = = 4",
            r"some\.py', line 5: found SyntaxError: invalid syntax, expected code that runs; mend that line$",
        ),
        ("c.steps = 1 / 0", r"some\.py', line 5: found ZeroDivisionError: division by zero, expected code that runs"),
        ("assert not c", r"some\.py', line 5: found AssertionError, expected code that runs; mend that line$"),
        ("raise SystemExit('one\\ntwo')", r"some\.py', line 5: found SystemExit: one two, expected code that runs"),
        ("c.seed = {}['x']", r"some\.py', line 5: found KeyError: 'x', expected code that runs"),
        ("c.steps.x = 4", r"some\.py', line 5: found AttributeError: 'int' object has no attribute 'x', expected code"),
        ("import json; json.loads('{')", r"some\.py', line 5: found JSONDecodeError: Expecting property name"),
        ("c.qar.memory = 'fifo'", r"config\.qar\.memory is 'fifo', expected one of 'means', 'bank'"),
    ],
)
def test_wrong_files_are_one_error(tmp_path, body, message):
    with pytest.raises(UserError, match=message):
        configs.load(write(tmp_path, body))


def test_errors_name_the_file_where_they_were_raised(tmp_path):
    write(tmp_path, "c.batch.row = 4")
    other = tmp_path / "other.py"
    run = 'runpy.run_path(str(Path(__file__).with_name("some.py")))'
    other.write_text(f"import runpy\nfrom pathlib import Path\nget_config = {run}['get_config']\n")
    with pytest.raises(UserError, match=r"some\.py', line 5: unknown key 'config\.batch\.row'; did you mean"):
        configs.load(other)
    write(tmp_path, "pass").open("a").write(
        "\nVARIANTS = {'a': {'batch.row': 4}, 'b': {'bach.rows': 4}, 'c': {'steps': 'x'}}\n"
    )
    for name, message in (
        ("a", r"some\.py': unknown key 'config\.batch\.row'; did you mean 'batch\.rows'\?$"),
        ("b", r"some\.py': unknown key 'config\.bach\.rows'; did you mean 'batch\.rows'\?$"),
        ("c", r"some\.py': config\.steps must be int like 1000, found str 'x'$"),
    ):
        with pytest.raises(UserError, match=message):
            configs.load(f"{tmp_path / 'some.py'}:{name}")


def test_missing_files_name_the_nearest(tmp_path, plain):
    with pytest.raises(UserError, match=r"som\.py' is not a file; did you mean 'some\.py'\?"):
        configs.load(tmp_path / "som.py")
    (tmp_path / "empty.py").write_text("")
    with pytest.raises(UserError, match=r"empty\.py' defines no get_config\(\)"):
        configs.load(tmp_path / "empty.py")


def test_integers_become_floats_where_floats_are_meant(tmp_path):
    config = configs.load(write(tmp_path, "c.optimizer.lr = 1"), ["qar.weight=2"])
    assert (config.optimizer.lr, config.qar.weight) == (1.0, 2.0)
    assert type(config.optimizer.lr) is float and type(config.qar.weight) is float


def test_differences_leave_operational_keys_out():
    old, new = configs.default(), configs.default()
    new.checkpoint_every, new.log_every, new.keep_best, new.peak_flops = 1, 2, 3, 4.0
    new.keep_latest, new.mesh.fsdp, new.sharding = 7, 2, ()
    assert configs.differences(old, new) == []
    new.seed, new.lora.rank = 1, 4
    assert configs.differences(old, new) == ["lora.rank: 16 -> 4", "seed: 0 -> 1"]


def test_records_of_other_versions_are_refused():
    data = configs.to_json(configs.default())
    with pytest.raises(UserError, match=r"unknown config\.qar\.colour"):
        configs.from_json({**data, "qar": {**data["qar"], "colour": 1}})
    del data["lora"]["rank"]
    with pytest.raises(UserError, match=r"no config\.lora\.rank"):
        configs.from_json(data)


@settings(max_examples=20, deadline=None)
@given(st.floats(min_value=1e-30, max_value=1e30), st.text(), st.lists(st.text(min_size=1), max_size=3))
def test_records_keep_every_digit_and_letter(lr, path, axes):
    config = configs.default()
    config.optimizer.lr, config.data.path, config.sharding = lr, path, tuple((axis, None) for axis in axes)
    again = configs.from_json(json.loads(json.dumps(configs.to_json(config))))
    assert again.optimizer.lr == lr and again.data.path == path and again.sharding == config.sharding


def reads() -> set[tuple[str, str]]:
    """(name before the dot, attribute) of every attribute read in the package but in config.py."""
    found = set()
    for path in (ROOT / "qaperso").rglob("*.py"):
        if path.name == "config.py" and path.parent.name == "qaperso":
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute):
                before = ast.unparse(node.value).split(".")[-1]
                found.add((before, node.attr))
    return found


def test_every_key_is_read_somewhere():
    found = reads()
    shape = {field.name for field in dataclasses.fields(DecoderConfig)}
    unread = []
    for key in configs.keys(configs.default()):
        *folders, leaf = key.split(".")
        # Sections are read through their own name, its first letter, or NAME_config.
        owners = {folders[0], folders[0][0], f"{folders[0]}_config"} if folders else {"config"}
        # The sizes of a random base are handed on as a whole.
        if not any((owner, leaf) in found for owner in owners) and not (folders == ["model"] and leaf in shape):
            unread.append(key)
    assert unread == []


def test_every_choice_is_told_apart_somewhere():
    text = "\n".join(p.read_text(encoding="utf-8") for p in (ROOT / "qaperso").rglob("*.py") if p.name != "config.py")
    for key, choices in configs.CHOICES.items():
        assert key in configs.keys(configs.default())
        # Of n choices one may be the default branch; a dtype is handed to JAX as it is.
        named = [c for c in choices if re.search(rf"[\"']{re.escape(c)}[\"']", text)]
        assert len(named) >= len(choices) - 1 or key == "dtype", key
