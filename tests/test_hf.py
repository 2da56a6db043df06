"""Hugging Face folders in and out: configuration, locating, loading, saving, and equal logits with transformers."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import PartitionSpec
from safetensors.numpy import load_file, save_file

from qaperso.arrays import map_specs, shardings
from qaperso.errors import UserError
from qaperso.models import decoder, hf
from qaperso.models.base import Location, locate
from qaperso.models.config import DecoderConfig, RopeScaling, from_hf, to_hf

TINY = DecoderConfig(vocab=48, embed=32, layers=3, heads=4, kv_heads=2, head_dim=8, mlp=40, tied=False)
LLAMA3 = RopeScaling(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position=64)
VARIANTS = {
    "llama": dataclasses.replace(TINY, rope_theta=500.0, bos_id=1, eos_ids=(2, 5)),
    "llama-tied-scaled": dataclasses.replace(TINY, tied=True, rope_theta=5000.0, rope_scaling=LLAMA3),
    "llama-wide-heads": dataclasses.replace(TINY, head_dim=16, kv_heads=1),
    "qwen2": dataclasses.replace(TINY, family="qwen2", qkv_bias=True, eos_ids=(7,)),
    "qwen2-tied": dataclasses.replace(TINY, family="qwen2", qkv_bias=True, tied=True, kv_heads=4),
    "qwen3": dataclasses.replace(TINY, family="qwen3", qk_norm=True, head_dim=16),
    "qwen3-tied": dataclasses.replace(TINY, family="qwen3", qk_norm=True, tied=True, norm_eps=1e-5),
}


def random_tree(config: DecoderConfig, seed: int = 0) -> dict:
    """Random values everywhere, so that no norm scale is 1 and no bias 0."""
    rng = np.random.default_rng(seed)
    return map_specs(
        lambda _, spec: jnp.asarray(rng.normal(spec.init == "ones", 0.2, spec.shape), jnp.float32),
        decoder.declare(config),
    )


def assert_equal(a: dict, b: dict) -> None:
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


def our_logits(params: dict, tokens: np.ndarray, config: DecoderConfig) -> np.ndarray:
    position = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    ones = jnp.ones(tokens.shape, jnp.int32)
    hidden = decoder.forward(params, jnp.asarray(tokens), position, ones, ones > 0, config)
    return np.asarray(decoder.logits(params, hidden, config))


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    hf.save(tmp_path / "model", random_tree(TINY), TINY)
    return tmp_path / "model"


def edit(path: Path, change) -> None:
    """Rewrites model.safetensors after change(tensors)."""
    tensors = load_file(path / "model.safetensors")
    change(tensors)
    save_file(tensors, path / "model.safetensors")


# Configuration


@pytest.mark.parametrize("name", VARIANTS)
def test_config_round_trip(name):
    assert from_hf(json.loads(json.dumps(to_hf(VARIANTS[name]))), "config.json") == VARIANTS[name]


SIZES = {"vocab_size": 10, "hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 12}
MINIMAL = {"model_type": "llama", **SIZES}


def test_config_defaults():
    assert from_hf(MINIMAL, "c") == DecoderConfig(10, 8, 2, 2, 2, 4, 12, max_position=2048)
    assert from_hf({**MINIMAL, "model_type": "qwen3"}, "c").head_dim == 128
    windows_no_layer_uses = {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 2}
    assert from_hf({**MINIMAL, "model_type": "qwen2", **windows_no_layer_uses}, "c").qkv_bias


def test_config_of_transformers_4_and_5_agree():
    scaling = {"type": "llama3", "factor": 8, "low_freq_factor": 1, "high_freq_factor": 4}
    four = {**MINIMAL, "rope_theta": 5e5, "rope_scaling": {**scaling, "original_max_position_embeddings": 64}}
    five = {
        **MINIMAL,
        "rope_parameters": {**to_hf(VARIANTS["llama-tied-scaled"])["rope_parameters"], "rope_theta": 5e5},
    }
    assert from_hf(four, "c") == from_hf(five, "c")
    assert from_hf(four, "c").rope_scaling == LLAMA3
    assert from_hf({**four, "rope_scaling": None}, "c").rope_theta == 5e5


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"model_type": "gpt2"}, "model_type is 'gpt2', supported are llama, qwen2, qwen3"),
        ({"vocab_size": None}, "no vocab_size, expected an integer"),
        ({"hidden_size": "8"}, "hidden_size is '8', expected an integer"),
        ({"num_key_value_heads": 3}, "num_attention_heads is 2, expected a multiple of num_key_value_heads 3"),
        ({"head_dim": 3}, "head_dim is 3, expected an even number"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu', supported is 'silu'"),
        ({"attention_bias": True}, "attention_bias is true"),
        ({"mlp_bias": True}, "mlp_bias is true"),
        ({"rms_norm_eps": 0}, "rms_norm_eps is 0, expected a number above 0"),
        ({"eos_token_id": "x"}, "eos_token_id is 'x', expected a token id"),
        ({"rope_scaling": {"rope_type": "yarn"}}, "rope_scaling.rope_type is 'yarn', supported are"),
        ({"rope_parameters": {"rope_type": "llama3", "factor": 8}}, "rope_parameters: low_freq_factor is None"),
        ({"rope_parameters": 3}, "rope_parameters is 3, expected an object"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
        ({"model_type": "qwen2", "use_sliding_window": True, "max_window_layers": 1}, "is true"),
        ({"model_type": "qwen2", "layer_types": ["full_attention", "sliding_attention"]}, "sliding_attention"),
        ({"model_type": "qwen3", "attention_bias": True}, "attention_bias is true"),
    ],
)
def test_config_refuses(change, said):
    with pytest.raises(UserError) as error:
        from_hf({**MINIMAL, **change}, "some/config.json")
    assert str(error.value).startswith("some/config.json") and said in str(error.value)


def test_load_config_adds_the_ends_of_generation_config_and_names_a_broken_file(saved):
    (saved / "generation_config.json").write_text('{"eos_token_id": [4, 9]}')
    text = json.loads((saved / "config.json").read_text())
    (saved / "config.json").write_text(json.dumps({**text, "eos_token_id": 9}))
    assert hf.load_config(Location("hf", saved)) == dataclasses.replace(TINY, eos_ids=(9, 4))
    (saved / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"config\.json: not JSON"):
        hf.load_config(Location("hf", saved))


# Locating


def test_locate_kinds(saved, tmp_path):
    assert locate("random") == Location("random")
    assert locate(str(saved)) == Location("hf", saved)
    (tmp_path / "x.gguf").touch()
    assert locate(str(tmp_path / "x.gguf")) == Location("gguf", tmp_path / "x.gguf")
    (tmp_path / "run.json").touch()
    assert locate(str(tmp_path)) == Location("workdir", tmp_path)


def test_locate_in_package_without_importing_it(tmp_path, monkeypatch):
    package = tmp_path / "loud_package"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    (package / "w.gguf").touch()
    monkeypatch.syspath_prepend(str(tmp_path))
    assert locate("package:loud_package/w.gguf") == Location("gguf", package / "w.gguf")
    with pytest.raises(UserError, match=r"no file 'v\.gguf'; did you mean 'w\.gguf'"):
        locate("package:loud_package/v.gguf")


@pytest.mark.parametrize(
    ("base", "said"),
    [
        ("package:no_such_pkg/x", "package 'no_such_pkg' is not installed; mend: pip install no-such-pkg"),
        ("package:json", "expected package:NAME/FILE"),
        ("./nowhere/model.gguf", "no such file or folder; there is no folder nowhere either"),
        ("gpt", "expected 'random', a path"),
    ],
)
def test_locate_refuses(base, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as error:
        locate(base)
    assert f"base '{base}'" in str(error.value) and said in str(error.value)


def test_locate_refuses_folders_and_files_of_other_kinds(tmp_path):
    (tmp_path / "pytorch_model.bin").touch()
    with pytest.raises(UserError, match=r"holds pytorch_model\.bin; expected config\.json and \*\.safetensors"):
        locate(str(tmp_path))
    with pytest.raises(UserError, match=r"a \.bin file, expected a \.gguf file"):
        locate(str(tmp_path / "pytorch_model.bin"))


def locate_offline(base: str, cache: Path) -> str:
    """What locate gives in a process that may not reach the Hub."""
    code = (
        "import sys; from qaperso.models.base import locate; from qaperso.errors import UserError\n"
        "try: print(*vars(locate(sys.argv[1])).values())\n"
        "except UserError as error: print(error)"
    )
    root = str(Path(__file__).parents[1])
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(cache), "PYTHONPATH": root}
    words = [sys.executable, "-c", code, base]
    return subprocess.run(words, env=env, cwd=root, capture_output=True, text=True, check=True).stdout


def test_locate_hub_cache(saved, tmp_path):
    model = tmp_path / "cache" / "models--org--tiny"
    snapshot = model / "snapshots" / ("a" * 40)
    snapshot.parent.mkdir(parents=True)
    saved.rename(snapshot)
    (model / "refs").mkdir()
    (model / "refs" / "main").write_text("a" * 40)
    assert locate_offline("org/tiny", tmp_path / "cache") == f"hf {snapshot}\n"
    said = locate_offline("tests/planned.py", tmp_path / "cache")
    assert said.startswith("base 'tests/planned.py': no folder of that name is here; a model of that name is not whole")
    assert said.endswith("; did you mean 'planted.py'?\n")


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("GatedRepoError", "access to this model is restricted; accept its terms at https://huggingface.co/org/model"),
        ("RepositoryNotFoundError", "no folder of that name is here, and no such model on the Hugging Face Hub; check"),
        ("LocalEntryNotFoundError", "the Hub cannot be reached"),
        ("HFValidationError", "not a valid Hub name"),
        ("OSError", "no folder of that name is here, and downloading from the Hugging Face Hub failed: broken"),
    ],
)
def test_locate_hub_errors(kind, said, monkeypatch):
    import huggingface_hub
    from huggingface_hub import errors as hub_errors

    kinds = {**vars(hub_errors), "OSError": OSError}

    def fail(name, **_):
        error = kinds[kind].__new__(kinds[kind])
        error.args = ("broken",)
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(UserError) as error:
        locate("org/model")
    assert said in str(error.value)


# Loading and saving


@pytest.mark.parametrize("name", VARIANTS)
def test_save_load_round_trip(name, tmp_path):
    config, tree = VARIANTS[name], random_tree(VARIANTS[name])
    hf.save(tmp_path / "a" / "model", tree, config)
    location = locate(str(tmp_path / "a" / "model"))
    assert hf.load_config(location) == config
    assert_equal(hf.load_params(location, config, jnp.float32), tree)
    assert [p.name for p in (tmp_path / "a").iterdir()] == ["model"]


def test_dtypes(tmp_path):
    tree = random_tree(TINY)
    rounded = jax.tree.map(lambda x: x.astype(jnp.bfloat16), tree)
    hf.save(tmp_path / "m", tree, TINY, jnp.bfloat16)
    assert load_file(tmp_path / "m" / "model.safetensors")["lm_head.weight"].dtype == ml_dtypes.bfloat16
    assert json.loads((tmp_path / "m" / "config.json").read_text())["dtype"] == "bfloat16"
    assert_equal(hf.load(tmp_path / "m", TINY, jnp.float32), jax.tree.map(lambda x: x.astype(jnp.float32), rounded))
    hf.save(tmp_path / "n", tree, TINY)
    loaded = hf.load(tmp_path / "n", TINY, jnp.bfloat16)
    assert {x.dtype for x in jax.tree.leaves(loaded)} == {jnp.dtype(jnp.bfloat16)}
    assert_equal(loaded, rounded)
    hf.save(tmp_path / "o", rounded, TINY, jnp.float16)
    assert_equal(hf.load(tmp_path / "o", TINY, jnp.bfloat16)["embed"], rounded["embed"])


def test_sharded_files_equal_one_file(saved, tmp_path):
    tree = random_tree(TINY)
    hf.save(tmp_path / "sharded", tree, TINY, max_shard_bytes=20_000)
    files = sorted(p.name for p in (tmp_path / "sharded").glob("*.safetensors"))
    assert len(files) > 2 and files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    assert all((tmp_path / "sharded" / f).stat().st_size < 25_000 for f in files)
    index = json.loads((tmp_path / "sharded" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 4 * sum(x.size for x in jax.tree.leaves(tree))
    assert_equal(hf.load(tmp_path / "sharded", TINY, jnp.float32), hf.load(saved, TINY, jnp.float32))
    (tmp_path / "sharded" / files[1]).unlink()
    with pytest.raises(UserError, match=f"names {files[1]}, not found beside it"):
        hf.load(tmp_path / "sharded", TINY, jnp.float32)


def test_shardings_are_followed(saved):
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:4]), ("fsdp",), axis_types=(jax.sharding.AxisType.Auto,))
    wanted = shardings(decoder.declare(TINY), mesh, [(":embed", "fsdp")])
    placed = hf.load(saved, TINY, jnp.float32, wanted)
    assert jax.tree.map(lambda x: x.sharding, placed) == wanted
    assert placed["layers"]["gate"].sharding.spec == PartitionSpec(None, "fsdp", None)
    assert_equal(placed, random_tree(TINY))


def test_save_refuses_what_is_there(saved):
    before = (saved / "model.safetensors").read_bytes()
    with pytest.raises(UserError, match="exists already"):
        hf.save(saved, random_tree(TINY, 3), TINY)
    assert (saved / "model.safetensors").read_bytes() == before


def test_a_failed_save_leaves_nothing(tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError("no space left")

    monkeypatch.setattr("safetensors.numpy.save_file", full)
    with pytest.raises(UserError, match="cannot be written: no space left"):
        hf.save(tmp_path / "m", random_tree(TINY), TINY)
    assert list(tmp_path.iterdir()) == []


def test_save_refuses_another_tree(tmp_path):
    with pytest.raises(ValueError, match="not what the configuration declares"):
        hf.save(tmp_path / "m", random_tree(VARIANTS["qwen2"]), TINY)


def test_rotary_buffers_are_ignored(saved):
    edit(saved, lambda t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(4, np.float32)}))
    assert_equal(hf.load(saved, TINY, jnp.float32), random_tree(TINY))


NORM = "model.layers.1.input_layernorm.weight"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t: t.pop(NORM), f"1 tensor missing: '{NORM}', expected shape (32,)"),
        (lambda t: t.update({NORM + "s": t.pop(NORM)}), f"'{NORM}', expected shape (32,) for the first; did you mean"),
        (lambda t: t.update(extra=np.ones((2, 3), np.float32)), "1 tensor unknown: 'extra', the first of shape (2, 3)"),
        (
            lambda t: t.update({NORM: np.ones((1, 32), np.float32)}),
            f"'{NORM}' has shape (1, 32), expected (32,) from the configuration",
        ),
        (
            lambda t: t.update({"model.layers.0.mlp.up_proj.weight": np.ones((32, 40), np.float32)}),
            "'model.layers.0.mlp.up_proj.weight' has shape (32, 40), expected (40, 32)",
        ),
        (lambda t: t.pop("lm_head.weight"), "no tensor 'lm_head.weight', expected one of shape (48, 32) since tie"),
        (lambda t: t.update({NORM: np.ones(32, np.int8)}), f"'{NORM}' is of type I8, expected one of F64, F32"),
    ],
)
def test_load_is_strict(saved, change, said):
    edit(saved, change)
    with pytest.raises(UserError) as error:
        hf.load(saved, TINY, jnp.float32)
    assert said in str(error.value) and str(saved) in str(error.value)


def test_tied_head_may_repeat_the_embedding_only(tmp_path):
    config = VARIANTS["qwen2-tied"]
    tree = random_tree(config)
    hf.save(tmp_path / "m", tree, config)
    edit(tmp_path / "m", lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].copy()}))
    assert_equal(hf.load(tmp_path / "m", config, jnp.float32), tree)
    edit(tmp_path / "m", lambda t: t["lm_head.weight"].__setitem__((3, 4), 9.0))
    with pytest.raises(UserError, match=r"lm_head\.weight differs from model\.embed_tokens\.weight although tie_word"):
        hf.load(tmp_path / "m", config, jnp.float32)


def test_damaged_and_absent_files(saved):
    file = saved / "model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(UserError, match=r"model\.safetensors: not a whole safetensors file"):
        hf.load(saved, TINY, jnp.float32)
    file.unlink()
    with pytest.raises(UserError, match=r"neither model\.safetensors nor"):
        hf.load(saved, TINY, jnp.float32)


def test_fingerprint(saved, tmp_path):
    data = (saved / "model.safetensors").read_bytes()
    assert hf.fingerprint(Location("hf", saved)) == hashlib.sha256(data).hexdigest()
    hf.save(tmp_path / "two", random_tree(TINY), TINY, max_shard_bytes=20_000)
    joined = b"".join(p.read_bytes() for p in sorted((tmp_path / "two").glob("*.safetensors")))
    assert hf.fingerprint(Location("hf", tmp_path / "two")) == hashlib.sha256(joined).hexdigest()
    assert hf.fingerprint(Location("random")) == "random"
    with pytest.raises(UserError, match="base of kind 'workdir': no weight files there"):
        hf.fingerprint(Location("workdir", tmp_path))


@pytest.mark.parametrize("name", VARIANTS)
def test_transformers_agrees(name, tmp_path):
    """It loads what we save, gives equal logits, and we load what it saves."""
    torch = pytest.importorskip("torch")
    import transformers

    config, tree = VARIANTS[name], random_tree(VARIANTS[name])
    hf.save(tmp_path / "ours", tree, config, max_shard_bytes=30_000)
    model, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(info.values()), info
    assert type(model).__name__ == f"{config.family.capitalize()}ForCausalLM"
    tokens = np.random.default_rng(0).integers(0, config.vocab, (2, 90))
    with torch.no_grad():
        theirs = model(torch.from_numpy(tokens)).logits.numpy()
    np.testing.assert_allclose(our_logits(tree, tokens, config), theirs, atol=1e-4)

    model.save_pretrained(tmp_path / "theirs")
    location = locate(str(tmp_path / "theirs"))
    assert hf.load_config(location) == config
    assert_equal(hf.load_params(location, config, jnp.float32), tree)
