"""Tokenizers: word level, rebuilt from GGUF metadata, and through a folder."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import gguf as ggml
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qaperso.errors import UserError
from qaperso.models.base import Location
from qaperso.models.tokenizer import load_tokenizer, read_tokenizer, save_tokenizer, word_tokenizer

WORDS = [
    "hello",
    "Where",
    "are",
    "you",
    "don't",
    "l’été",
    "x_1",
    ",",
    ".",
    "?",
    "!",
    ";",
    ":",
    "(",
    "-",
    "'",
    "#",
    "你好",
]
TOKENIZER = word_tokenizer(WORDS)


def encode(text: str) -> list[int]:
    return TOKENIZER(text)["input_ids"]


def test_word_tokenizer_ids():
    assert [TOKENIZER.convert_tokens_to_ids(t) for t in ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "\n")] == [
        0,
        1,
        2,
        3,
    ]
    assert TOKENIZER.convert_ids_to_tokens(list(range(4, len(TOKENIZER)))) == WORDS
    assert (TOKENIZER.unk_token_id, TOKENIZER.pad_token_id, TOKENIZER.bos_token_id, TOKENIZER.eos_token_id) == (
        0,
        0,
        1,
        2,
    )
    assert encode("hello stranger") == [4, 0]
    assert encode("") == []


def test_word_tokenizer_cuts_texts_into_words():
    tokenizer = word_tokenizer(["you and me, you", "me?"])
    assert tokenizer.convert_ids_to_tokens(list(range(3, len(tokenizer)))) == ["\n", "you", "and", "me", ",", "?"]


def test_word_tokenizer_keeps_newlines_and_turns():
    text = "<|im_start|>hello\nWhere are you, hello?\n\ndon't!<|im_end|>\n"
    assert encode(text) == [1, 4, 3, 5, 6, 7, 11, 4, 13, 3, 3, 8, 14, 2, 3]
    assert TOKENIZER.decode(encode(text)) == text
    assert TOKENIZER.decode(encode(text), skip_special_tokens=True) == "hello\nWhere are you, hello?\n\ndon't!\n"
    assert TOKENIZER.decode(encode("  hello ,\n  Where  :  # #")) == "hello,\nWhere: # #"


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 3 + len(WORDS)), max_size=30))
def test_word_tokenizer_encodes_what_it_decodes(ids):
    text = TOKENIZER.decode(ids)
    assert encode(text) == ids
    assert TOKENIZER.decode(encode(text)) == text
    assert not any(blank in text for blank in (" ,", " .", " ?", " !", " ;", " :", " \n", "\n ", "  "))


@pytest.mark.parametrize("model_type", [None, "llama", "qwen2", "qwen3"])
def test_folder_round_trip(tmp_path, model_type):
    """Whatever model the folder is of: transformers' AutoTokenizer would put Qwen2's own rules in the way."""
    save_tokenizer(TOKENIZER, tmp_path)
    if model_type:
        (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    again = load_tokenizer(Location("hf", tmp_path))
    text = "<|im_start|>hello\nWhere are l’été, nobody (x_1)?<|im_end|>\n"
    assert again(text)["input_ids"] == encode(text)
    assert again.decode(encode(text)) == TOKENIZER.decode(encode(text))
    assert again.special_tokens_map == TOKENIZER.special_tokens_map
    assert again.get_vocab() == TOKENIZER.get_vocab()


def test_a_run_keeps_its_tokenizer_in_a_folder(tmp_path):
    save_tokenizer(TOKENIZER, tmp_path / "tokenizer")
    assert load_tokenizer(Location("workdir", tmp_path)).get_vocab() == TOKENIZER.get_vocab()


def test_errors(tmp_path):
    with pytest.raises(UserError, match="base 'random' has no tokenizer"):
        load_tokenizer(Location("random"))
    with pytest.raises(UserError, match=r"no tokenizer\.json, expected one"):
        read_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(UserError, match="the tokenizer cannot be read"):
        read_tokenizer(tmp_path)


def test_import_is_light():
    code = "import sys, qaperso.models.tokenizer; print([m for m in ('torch', 'transformers') if m in sys.modules])"
    root = Path(__file__).parents[1]
    assert subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, check=True).stdout == b"[]\n"


# Byte-level BPE from GGUF metadata


def byte_tokens() -> list[str]:
    """The 256 signs that byte-level BPE writes bytes with (Radford et al., 2019)."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = iter(range(256, 512))
    return [chr(b if b in plain else next(others)) for b in range(256)]


MERGES = ["1 2", "12 3", "h e", "Ġ he", "' s", "e Ì"]
SPECIALS = {"<s>": 3, "<end>": 3, "<tool>": 4}
TEXT = "he's 12345 he\n\n  <tool>he é 你 !?<end>"


def bpe(path: Path, pre: str = "smollm", model: str = "gpt2", leave_out: str = "", **flags) -> Location:
    tokens = [*byte_tokens(), *(m.replace(" ", "") for m in MERGES), "1234", *SPECIALS]
    writer = ggml.GGUFWriter(path, "llama")
    writer.add_tokenizer_model(model)
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    if leave_out != "merges":
        writer.add_token_merges(MERGES)
    writer.add_token_types([SPECIALS.get(token, 1) for token in tokens])
    writer.add_bos_token_id(tokens.index("<s>"))
    writer.add_eos_token_id(tokens.index("<end>"))
    writer.add_chat_template("{{ messages[0].content }}<end>")
    if "bos" in flags:
        writer.add_add_bos_token(flags["bos"])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return Location("gguf", path)


@pytest.mark.parametrize(
    ("pre", "expected"),
    [
        ("smollm", ["1", "2", "3", "4", "5"]),
        ("gpt-2", ["123", "4", "5"]),
        ("qwen2", ["1", "2", "3", "4", "5"]),
        ("llama-bpe", ["123", "4", "5"]),
    ],
)
def test_pre_tokenizers_cut_digits(pre, expected, tmp_path):
    tokenizer = load_tokenizer(bpe(tmp_path / "t.gguf", pre, bos=False))
    assert tokenizer.tokenize("12345") == expected
    assert tokenizer.tokenize("he's he") == ["he", "'s", "Ġhe"]
    assert tokenizer.tokenize("<tool>he<end>") == ["<tool>", "he", "<end>"]
    assert tokenizer.decode(tokenizer(TEXT)["input_ids"]) == TEXT
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == ("<s>", "<end>", None)
    assert tokenizer.decode(tokenizer("<tool>he<end>")["input_ids"], skip_special_tokens=True) == "<tool>he"
    assert tokenizer.apply_chat_template([{"role": "user", "content": "he"}], tokenize=False) == "he<end>"


def test_llama_takes_whole_tokens_and_begins_with_bos(tmp_path):
    tokenizer = load_tokenizer(bpe(tmp_path / "t.gguf", "llama-bpe"))
    assert tokenizer.convert_ids_to_tokens(tokenizer("he")["input_ids"]) == ["<s>", "he"]
    assert tokenizer("he", add_special_tokens=False)["input_ids"] == tokenizer.convert_tokens_to_ids(["he"])


@settings(max_examples=100, deadline=None)
@given(text=st.text(max_size=40))
def test_bpe_round_trip(text, tmp_path_factory):
    path = tmp_path_factory.getbasetemp() / "round_trip.gguf"
    location = Location("gguf", path) if path.exists() else bpe(path)
    tokenizer = load_tokenizer(location)
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_bpe_through_a_folder(tmp_path):
    tokenizer = load_tokenizer(bpe(tmp_path / "t.gguf", "llama-bpe"))
    save_tokenizer(tokenizer, tmp_path / "saved")
    again = read_tokenizer(tmp_path / "saved")
    assert again(TEXT)["input_ids"] == tokenizer(TEXT)["input_ids"]
    assert again.chat_template == tokenizer.chat_template
    assert again.special_tokens_map == tokenizer.special_tokens_map


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model": "llama"}, "tokenizer.ggml.model is 'llama', supported is 'gpt2'"),
        ({"pre": "qwen3"}, "tokenizer.ggml.pre is 'qwen3', not supported; did you mean 'qwen2'?"),
        ({"leave_out": "merges"}, "no metadata key 'tokenizer.ggml.merges'"),
    ],
)
def test_bpe_refuses(changes, said, tmp_path):
    with pytest.raises(UserError) as error:
        load_tokenizer(bpe(tmp_path / "t.gguf", **changes))
    assert said in str(error.value)
