"""Tokenizers: of a model folder, rebuilt from a GGUF file, or one word a token for tests and toy worlds."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qaperso.errors import UserError, nearest
from qaperso.models import gguf
from qaperso.models.base import Location

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

# Special tokens of word tokenizers, ids 0, 1, 2. The first stands for unknown words and padding too.
WORD_SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")

# How the pre-tokenizers that llama.cpp names cut text before byte-level BPE: Llama 3's and Qwen2's published patterns
# differ in how many digits stay together.
_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_PATTERNS = {"llama-bpe": _PATTERN % "{1,3}", "qwen2": _PATTERN % ""}
_PRE_TOKENIZERS = ("smollm", "gpt-2", *_PATTERNS)

# A newline is a token; so is a word, with its apostrophe if it has one, and any other sign but blanks.
_WORD = r"\n|\w+(?:['’]\w+)?|[^\w\s]"
# Blanks to take out after words were joined by blanks.
_CLOSE_UP = r" (?=[,.?!;:\n]|<\|im_end\|>|<\|endoftext\|>)|(?<=\n|<\|im_start\|>|<\|endoftext\|>) "


def load_tokenizer(location: Location) -> PreTrainedTokenizerFast:
    """Loads the tokenizer of a model folder ("hf"), of a run ("workdir": its folder `tokenizer`) or of a GGUF file.

    Raises:
      UserError: there is none, or one of an unsupported kind.
    """
    if location.kind == "random" or location.path is None:
        raise UserError("base 'random' has no tokenizer: build one from the data's words, or name a model's folder")
    if location.kind == "gguf":
        return _from_gguf(location.path)
    return read_tokenizer(location.path / "tokenizer" if location.kind == "workdir" else location.path)


def read_tokenizer(path: Path) -> PreTrainedTokenizerFast:
    """Loads a tokenizer from a folder's `tokenizer.json`, with its special tokens and chat template.

    Raises:
      UserError: the folder has no whole tokenizer.
    """
    from transformers import PreTrainedTokenizerFast

    if not (path / "tokenizer.json").is_file():
        raise UserError(f"{path}: no tokenizer.json, expected one; save the model's fast tokenizer into this folder")
    try:
        # Not AutoTokenizer: where config.json says qwen2 it replaces what tokenizer.json says by Qwen2's own rules.
        return PreTrainedTokenizerFast.from_pretrained(str(path), local_files_only=True)
    except Exception as error:  # The tokenizers library raises bare Exception.
        raise UserError(f"{path}: the tokenizer cannot be read: {error}; save it again") from error


def save_tokenizer(tokenizer: PreTrainedTokenizerFast, path: Path) -> None:
    """Writes a tokenizer into a folder, from where `read_tokenizer` gives it back."""
    tokenizer.save_pretrained(str(path))


def word_tokenizer(words: Sequence[str]) -> PreTrainedTokenizerFast:
    """A tokenizer with one token a word, punctuation mark or newline.

    Decoding gives readable text: words joined by blanks, none before `, . ? ! ; :` or about newlines.

    Args:
      words: the vocabulary in order of ids; texts are cut into their words, repeated words count once.

    Returns:
      Tokenizer with ids 0, 1, 2 for WORD_SPECIALS, 3 for the newline, then the words. Unknown words become id 0.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    cut = pre_tokenizers.Split(Regex(_WORD), "removed", invert=True)
    pieces = [*WORD_SPECIALS, "\n", *(piece for word in words for piece, _ in cut.pre_tokenize_str(word))]
    vocabulary = {piece: i for i, piece in enumerate(dict.fromkeys(pieces))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=WORD_SPECIALS[0]))
    tokenizer.pre_tokenizer = cut
    # WordPiece only joins with blanks here: "##", which would suppress one, is two tokens to this pre-tokenizer.
    join = decoders.WordPiece(prefix="##", cleanup=False)
    tokenizer.decoder = decoders.Sequence([join, decoders.Fuse(), decoders.Replace(Regex(_CLOSE_UP), "")])
    tokenizer.add_special_tokens(_added(WORD_SPECIALS, special=True))
    unknown, start, end = WORD_SPECIALS
    return _wrap(tokenizer, unk_token=unknown, pad_token=unknown, bos_token=start, eos_token=end)


def _from_gguf(path: Path) -> PreTrainedTokenizerFast:
    """Rebuilds a byte-level BPE tokenizer from a GGUF file's metadata."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

    fields = gguf.metadata(path)
    model, pre = fields.get("tokenizer.ggml.model"), fields.get("tokenizer.ggml.pre", "gpt-2")
    if model != "gpt2":
        raise UserError(
            f"{path}: tokenizer.ggml.model is {model!r}, supported is 'gpt2' (byte-level BPE); use the model's folder of "
            "safetensors and tokenizer.json"
        )
    if pre not in _PRE_TOKENIZERS:
        raise UserError(f"{path}: tokenizer.ggml.pre is {pre!r}, not supported{nearest(pre, _PRE_TOKENIZERS)}")
    for key in ("tokens", "merges", "token_type"):
        if f"tokenizer.ggml.{key}" not in fields:
            raise UserError(f"{path}: no metadata key 'tokenizer.ggml.{key}', expected a whole tokenizer")
    tokens: list[str] = fields["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"]]
    # Llama 3 takes a piece that is a token as that token even where merges would not lead to it.
    whole = pre == "llama-bpe"
    vocabulary = {token: i for i, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, ignore_merges=whole, fuse_unk=False))
    if pre == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pre not in _PATTERNS)
    first = pre_tokenizers.Digits(individual_digits=True) if pre == "smollm" else None
    if pre in _PATTERNS:
        first = pre_tokenizers.Split(Regex(_PATTERNS[pre]), "isolated")
    tokenizer.pre_tokenizer = byte_level if first is None else pre_tokenizers.Sequence([first, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    kinds = fields["tokenizer.ggml.token_type"]
    for kind, special in ((3, True), (4, False)):  # ggml: 3 control, 4 user-defined
        tokenizer.add_tokens(_added([t for t, k in zip(tokens, kinds, strict=True) if k == kind], special))

    ids = {name: fields.get(f"tokenizer.ggml.{name}_token_id") for name in ("bos", "eos", "unknown", "padding")}
    names = {"bos": "bos_token", "eos": "eos_token", "unknown": "unk_token", "padding": "pad_token"}
    special = {names[name]: tokens[i] for name, i in ids.items() if i is not None and i < len(tokens)}
    if fields.get("tokenizer.ggml.add_bos_token", whole) and "bos_token" in special:
        bos = special["bos_token"]
        begin = processors.TemplateProcessing(f"{bos} $A", f"{bos} $A {bos} $B", [(bos, vocabulary[bos])])
        tokenizer.post_processor = begin
    wrapped = _wrap(tokenizer, **special)
    wrapped.chat_template = fields.get("tokenizer.chat_template")
    return wrapped


def _added(tokens: Sequence[str], special: bool) -> list[Any]:
    from tokenizers import AddedToken

    return [AddedToken(token, special=special, normalized=False) for token in tokens]


def _wrap(tokenizer: Any, **special: str) -> PreTrainedTokenizerFast:
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, **special)
