"""Tokenizers of Hugging Face folders <-> ours: what a folder holds, and what export.py writes into one."""

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

from kqv.errors import UserError
from kqv.hub_files import GPT2_SIZES, TOKENIZER, find_pretrained, read_json
from kqv.tokenizer import (
    BYTE_OF,
    END_OF_TEXT,
    ByteTokenizer,
    CharTokenizer,
    GPT2Tokenizer,
    JsonTokenizer,
    Tokenizer,
    from_description,
    special_token,
)

SPECIAL = ("bos_token", "eos_token", "pad_token", "unk_token")
CHARACTER_OF = {byte: char for char, byte in BYTE_OF.items()}


# -- theirs to ours ----------------------------------------------------------------------------------------------------


def pretrained_description(name: str) -> dict[str, Any]:
    """describe() of a model's tokenizer: of the tokenizer.json in its folder; a GPT-2 has GPT-2's without one.

    `name`: see find_pretrained, or a tokenizer.json itself. Raises UserError.
    """
    if name in GPT2_SIZES and not Path(name).is_dir():
        return {"kind": "gpt2"}  # needs no download of the weights
    path = Path(name) if Path(name).suffix == ".json" else find_pretrained(name, TOKENIZER) / "tokenizer.json"
    if not path.is_file():
        config = path.parent / "config.json"
        if config.is_file() and read_json(config).get("model_type") == "gpt2":
            return {"kind": "gpt2"}
        raise UserError(f"{path}: no such file; the tokenizer of a model lies beside its config.json")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise UserError(f"{path}: not UTF-8 text") from None
    config_file, template = path.parent / "tokenizer_config.json", path.parent / "chat_template.jinja"
    config = read_json(config_file) if config_file.is_file() else {}
    if template.is_file():
        config["chat_template"] = template.read_text(encoding="utf-8")
    if chars := character_vocabulary(text):
        return CharTokenizer(*chars).describe()
    kept = {key: special_token(config, key) for key in (*SPECIAL, "chat_template")}
    kept = {key: value for key, value in kept.items() if value is not None}
    return {"kind": "json", "text": text} | ({"config": kept} if kept else {})


def find_tokenizer(name: str) -> Tokenizer:
    """ "byte", "gpt2", or the tokenizer of a model; for its `name` see pretrained_description. Raises UserError."""
    if name == "byte":
        return ByteTokenizer()
    if name == "gpt2":
        return GPT2Tokenizer("--tokenizer=byte and --tokenizer=char need no download")
    return from_description(pretrained_description(name))


def character_vocabulary(text: str) -> tuple[str, bool] | None:
    """The characters of a tokenizer.json that tokenizer_files wrote for a CharTokenizer, and whether it has an end."""
    try:
        match json.loads(text):
            case {"model": {"vocab": dict(vocab), "merges": []}, "pre_tokenizer": None, "decoder": {"type": "Fuse"}}:
                chars = "".join(token for token in vocab if len(token) == 1)
                return chars, END_OF_TEXT in text
    except ValueError:
        pass  # JsonTokenizer says what is wrong with it
    return None


# -- ours to theirs ----------------------------------------------------------------------------------------------------


def tokenizer_files(tokenizer: Tokenizer, block_size: int) -> tuple[dict[str, str], dict[str, int | None]]:
    """The files with which AutoTokenizer makes this tokenizer, and bos_token_id, eos_token_id and pad_token_id.

    Without an end of text the tokenizer has no special tokens (decoding would leave them out), a text begins with a
    newline, as in sample.py, or else the first token, and generation has no token to stop at.
    """
    import tokenizers

    if isinstance(tokenizer, JsonTokenizer):
        bpe, config = tokenizers.Tokenizer.from_str(tokenizer.text), dict(tokenizer.config)
    else:
        bpe, config = as_bpe(tokenizer), {}
    if tokenizer.end_of_text is not None:
        end = special_token(config, "eos_token") or bpe.id_to_token(tokenizer.end_of_text)
        config = {"bos_token": end, "eos_token": end, "pad_token": end} | config
        ids = {f"{name}_id": bpe.token_to_id(config[name]) for name in SPECIAL[:3]}
    else:
        start = bpe.token_to_id("\n") or 0
        ids = {"bos_token_id": start, "eos_token_id": None, "pad_token_id": start}
    config |= {"tokenizer_class": "PreTrainedTokenizerFast"}  # transformers 4 has no TokenizersBackend
    config |= {"clean_up_tokenization_spaces": False, "model_max_length": block_size}
    config |= {"model_input_names": ["input_ids", "attention_mask"]}  # GPT-2 would add an embedding of token_type_ids
    files = {"tokenizer.json": bpe.to_str(pretty=True)}
    if template := config.get("chat_template"):
        files["chat_template.jinja"] = template
    return files | {"tokenizer_config.json": json.dumps(config, indent=2, ensure_ascii=False)}, ids


def as_bpe(tokenizer: Tokenizer) -> Any:
    """GPT-2's BPE, characters or bytes as a tokenizers.Tokenizer. Bytes and characters are a BPE without merges."""
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers

    end, merges = tokenizer.end_of_text, []
    tokens = tokenizer.token_bytes[:end] if not isinstance(tokenizer, GPT2Tokenizer) else gpt2_tokens(tokenizer)
    if tokenizer.describe()["kind"] == "char":
        vocab = {char: index for index, char in enumerate(tokenizer.chars)}
        bpe = tokenizers.Tokenizer(models.BPE(vocab, []))
        bpe.decoder = decoders.Fuse()
    else:
        if isinstance(tokenizer, GPT2Tokenizer):
            merges = gpt2_merges(tokens)
        vocab = {as_characters(token): index for index, token in enumerate(tokens)}
        bpe = tokenizers.Tokenizer(models.BPE(vocab, [tuple(map(as_characters, pair)) for pair in merges]))
        words = isinstance(tokenizer, GPT2Tokenizer)
        bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=words)
        bpe.decoder = decoders.ByteLevel()
    if end is not None:
        bpe.add_special_tokens([END_OF_TEXT])
        assert bpe.token_to_id(END_OF_TEXT) == end
    return bpe


def as_characters(token: bytes) -> str:
    return "".join(CHARACTER_OF[byte] for byte in token)


def gpt2_tokens(tokenizer: GPT2Tokenizer) -> list[bytes]:
    return [tokenizer.decode_bytes([index]) for index in range(tokenizer.end_of_text)]


def gpt2_merges(tokens: list[bytes]) -> list[tuple[bytes, bytes]]:
    """The pair of tokens that each longer token was merged from, in order: applying all earlier merges leaves two."""
    rank, merges = {token: index for index, token in enumerate(tokens)}, []
    for index, token in enumerate(tokens):
        parts = [bytes([byte]) for byte in token]
        while len(parts) > 2:
            pairs = [rank.get(a + b, index) for a, b in pairwise(parts)]
            at = pairs.index(min(pairs))
            parts[at : at + 2] = [parts[at] + parts[at + 1]]
        if len(parts) == 2:
            merges.append((parts[0], parts[1]))
    return merges
