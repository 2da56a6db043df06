"""Shapes of published models, as their `config.json` on the Hub gives them: for plans, which need no weights."""

from __future__ import annotations

from qaperso.models.config import FAMILIES, DecoderConfig, RopeScaling


def _shape(
    family: str, vocab: int, embed: int, layers: int, heads: int, kv_heads: int, mlp: int, **more
) -> DecoderConfig:
    sizes = dict(vocab=vocab, embed=embed, layers=layers, heads=heads, kv_heads=kv_heads, mlp=mlp)
    return DecoderConfig(**sizes, family=family, head_dim=embed // heads, **FAMILIES[family], **more)


_LLAMA3 = dict(
    rope_theta=5e5, rope_scaling=RopeScaling(8.0, 1.0, 4.0, 8192), norm_eps=1e-5, max_position=131072, bos_id=128000
)
_LLAMA3_CHAT = _LLAMA3 | {"eos_ids": (128001, 128008, 128009)}
_QWEN = dict(rope_theta=1e6, bos_id=151643, eos_ids=(151645, 151643))

PUBLISHED: dict[str, DecoderConfig] = {
    "meta-llama/Llama-2-70b-hf": _shape(
        "llama", 32000, 8192, 80, 64, 8, 28672, norm_eps=1e-5, max_position=4096, bos_id=1, eos_ids=(2,)
    ),
    "meta-llama/Llama-3.1-8B-Instruct": _shape("llama", 128256, 4096, 32, 32, 8, 14336, **_LLAMA3_CHAT),
    "meta-llama/Llama-3.1-70B-Instruct": _shape("llama", 128256, 8192, 80, 64, 8, 28672, **_LLAMA3_CHAT),
    "Qwen/Qwen2.5-0.5B-Instruct": _shape("qwen2", 151936, 896, 24, 14, 2, 4864, tied=True, max_position=32768, **_QWEN),
    "Qwen/Qwen2.5-7B-Instruct": _shape("qwen2", 152064, 3584, 28, 28, 4, 18944, max_position=32768, **_QWEN),
    "Qwen/Qwen3-8B": _shape("qwen3", 151936, 4096, 36, 32, 8, 12288, max_position=40960, **_QWEN),
}
