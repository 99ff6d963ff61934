"""Text to token ids and back: characters, bytes, GPT-2's byte-pair encoding (BPE), or that of a tokenizer.json.

A tokenizer's describe() is plain JSON. meta.json and checkpoints hold it, so that a model's output is always decoded
with the tokenizer that it was trained with.
"""

import json
import re
import threading
from collections.abc import Iterable
from functools import cached_property
from typing import Any

import numpy as np

from kqv.errors import UserError

END_OF_TEXT = "<|endoftext|>"
GPT2_VOCAB_SIZE = 50257  # a GPT2Tokenizer knows it too, but may have to download its files


class Tokenizer:
    """Base class. Subclasses define encode_array, describe, vocab_size, end_of_text (an id or None) and token_bytes."""

    def encode(self, text: str) -> list[int]:
        return self.encode_array(text).tolist()

    def encode_prompt(self, text: str) -> list[int]:
        """The ids of `text`; "<|endoftext|>" in it becomes the end-of-text id if the tokenizer has one."""
        if self.end_of_text is None:
            return self.encode(text)
        first, *others = map(self.encode, text.split(END_OF_TEXT))
        return first + [index for ids in others for index in (self.end_of_text, *ids)]

    def encode_special(self, text: str) -> list[int]:
        """The ids of a part of a text, with special tokens."""
        return self.encode_prompt(text)

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        return b"".join([self.token_bytes[index] for index in valid_ids(ids, self.vocab_size)])

    def decode(self, ids: Iterable[int]) -> str:
        return self.decode_bytes(ids).decode("utf-8", errors="replace")


class CharTokenizer(Tokenizer):
    """One id for each character of `chars`, in that order; with `end_of_text`, the next id marks the end of a text."""

    def __init__(self, chars: str, end_of_text: bool = False):
        if not chars or len(set(chars)) != len(chars):
            raise UserError("a character vocabulary needs at least one character, and each only once")
        self.chars = chars
        self.end_of_text = len(chars) if end_of_text else None
        self.token_bytes = [utf8(char) for char in chars] + [END_OF_TEXT.encode()] * end_of_text
        self.vocab_size = len(self.token_bytes)
        # code point -> id, -1 if it has none; the last entry serves all higher code points
        self.id_of = np.full(max(map(ord, chars)) + 2, -1, dtype=np.int32)
        self.id_of[[ord(char) for char in chars]] = range(len(chars))

    def encode_array(self, text: str) -> np.ndarray:
        points = np.frombuffer(text.encode("utf-32-le", errors="surrogatepass"), dtype="<u4")
        ids = self.id_of[np.minimum(points, len(self.id_of) - 1)]
        if (ids < 0).any():
            missing = sorted({chr(point) for point in points[ids < 0]})
            shown = ", ".join(map(repr, missing[:10])) + (", ..." if len(missing) > 10 else "")
            raise UserError(f"{len(missing)} of the text's characters are not in the vocabulary: {shown}")
        return ids

    def describe(self) -> dict[str, Any]:
        return {"kind": "char", "chars": self.chars, "end_of_text": self.end_of_text is not None}


class ByteTokenizer(Tokenizer):
    """Ids 0 to 255 are the bytes of UTF-8, so any text can be encoded; 256 marks the end of a text."""

    def __init__(self):
        self.end_of_text = 256
        self.vocab_size = 257
        self.token_bytes = [bytes([value]) for value in range(256)] + [END_OF_TEXT.encode()]

    def encode_array(self, text: str) -> np.ndarray:
        return np.frombuffer(utf8(text), dtype=np.uint8)

    def describe(self) -> dict[str, Any]:
        return {"kind": "byte"}


class GPT2Tokenizer(Tokenizer):
    """GPT-2's BPE, by tiktoken, which downloads 1.5 MB on first use.

    Raises UserError if the download fails; `alternative` is what the message then suggests.
    """

    def __init__(self, alternative: str = ""):
        import requests  # tiktoken downloads with it
        import tiktoken

        try:
            self.bpe = tiktoken.get_encoding("gpt2")
        except (requests.RequestException, ValueError) as error:  # ValueError: the download has the wrong checksum
            raise UserError(
                f"could not download GPT-2's BPE files ({type(error).__name__}): connect to the internet once, or set "
                "TIKTOKEN_CACHE_DIR to a folder in which tiktoken has kept them" + (alternative and f"; {alternative}")
            ) from None
        self.end_of_text = self.bpe.eot_token
        self.vocab_size = self.bpe.n_vocab
        self.of_thread = threading.local()
        self.of_thread.bpe = self.bpe

    def encode_array(self, text: str) -> np.ndarray:
        # tiktoken is a fifth faster in the thread that used an Encoding first, so each thread has one (11 MB each)
        if not hasattr(self.of_thread, "bpe"):
            import tiktoken

            bpe = self.bpe
            self.of_thread.bpe = tiktoken.Encoding(
                bpe.name, pat_str=bpe._pat_str, mergeable_ranks=bpe._mergeable_ranks, special_tokens=bpe._special_tokens
            )
        utf8(text)  # raises UserError for half a surrogate pair
        # not encode_ordinary: building its Python list takes a third of the time and holds the GIL
        return self.of_thread.bpe.encode_to_numpy(text, disallowed_special=())

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        return self.bpe.decode_bytes(valid_ids(ids, self.vocab_size))

    def describe(self) -> dict[str, Any]:
        return {"kind": "gpt2"}


class JsonTokenizer(Tokenizer):
    """The BPE of a tokenizer.json, the format of Hugging Face's library tokenizers: byte-level, or with spaces as "▁".

    `text` is the file's contents; `config` has the names of its special tokens and its chat template, as in
    tokenizer_config.json. Special tokens in a text are plain text for encode, and special for encode_prompt.
    """

    def __init__(self, text: str, config: dict[str, Any] | None = None):
        import tokenizers

        self.text, self.config = text, config or {}
        try:
            self.bpe = tokenizers.Tokenizer.from_str(text)
            described = json.loads(text)
            decoder, words = described["decoder"], described.get("pre_tokenizer") or {}
            kinds = {part["type"] for part in decoder.get("decoders", [decoder])}
        except Exception as error:  # the library raises Exception itself
            raise UserError(f"not a tokenizer.json ({' '.join(str(error).split())[:100]})") from None
        if not kinds & {"ByteLevel", "ByteFallback"}:
            raise UserError(f"its decoder is {'/'.join(sorted(kinds))}, and only those of byte-level BPE are known")
        self.bpe.encode_special_tokens = True
        self.vocab_size = self.bpe.get_vocab_size()
        ends = (END_OF_TEXT, special_token(self.config, "eos_token"))
        self.end_of_text = next((id for end in ends if (id := self.bpe.token_to_id(end or "")) is not None), None)
        self.adds_space = "Strip" in kinds  # in front of a text, and decoding takes it away
        to_bytes = byte_level_bytes if "ByteLevel" in kinds else byte_fallback_bytes
        added = self.bpe.get_added_tokens_decoder()
        # whether a text falls into GPT-2's words and nothing else, so that it can be cut between them (kqv/writer.py)
        self.has_gpt2_words = words.get("type") == "ByteLevel" and words.get("use_regex", True)
        self.has_gpt2_words &= not words.get("add_prefix_space", True) and self.bpe.normalizer is None
        self.has_gpt2_words &= all(token.special for token in added.values())
        whole = {index: token.content for index, token in added.items()}
        tokens = [self.bpe.id_to_token(index) or "" for index in range(self.vocab_size)]
        self.token_bytes = [
            utf8(whole[index]) if index in whole else to_bytes(token) for index, token in enumerate(tokens)
        ]

    def encode_array(self, text: str) -> np.ndarray:
        utf8(text)  # raises UserError for half a surrogate pair
        return np.array(self.bpe.encode(text, add_special_tokens=False).ids, dtype=np.int64)

    @cached_property
    def of_prompt(self) -> Any:
        """The same tokenizer, for which special tokens in a text are special."""
        import tokenizers

        return tokenizers.Tokenizer.from_str(self.text)

    def encode_prompt(self, text: str) -> list[int]:
        utf8(text)
        return self.of_prompt.encode(text).ids

    def encode_special(self, text: str) -> list[int]:
        utf8(text)
        return self.of_prompt.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Iterable[int]) -> str:
        text = super().decode(ids)
        return text.removeprefix(" ") if self.adds_space else text

    def describe(self) -> dict[str, Any]:
        return {"kind": "json", "text": self.text} | ({"config": self.config} if self.config else {})


def special_token(config: dict[str, Any], name: str) -> str | None:
    """A special token's text in a tokenizer_config.json, where it can also be a table with its "content"."""
    token = config.get(name)
    token = token.get("content") if isinstance(token, dict) else token
    return token if isinstance(token, str) else None


def byte_level_bytes(token: str) -> bytes:
    return bytes(BYTE_OF.get(char, 0) for char in token)


def byte_fallback_bytes(token: str) -> bytes:
    """ "▁" is a space, "<0x0A>" a byte."""
    return bytes([int(token[3:5], 16)]) if re.fullmatch("<0x[0-9A-F]{2}>", token) else utf8(token.replace("▁", " "))


def byte_of_character() -> dict[str, int]:
    """The byte for which a character stands in the tokens of a byte-level BPE: GPT-2's table.

    Printable characters of Latin-1 stand for themselves; the other bytes, in order, are characters from 256 on.
    """
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}


BYTE_OF = byte_of_character()


def utf8(text: str) -> bytes:
    """`text` as UTF-8. Raises UserError for half a surrogate pair, which JSON escapes and arguments can contain."""
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError as error:
        bad = f"U+{ord(text[error.start]):04X}"
        raise UserError(f"character {error.start} of the text is {bad}, half a surrogate pair") from None


def valid_ids(ids: Iterable[int], vocab_size: int) -> list[int]:
    """`ids` as a list. Raises UserError if one of them is outside the vocabulary."""
    ids = list(ids)
    for index in (min(ids, default=0), max(ids, default=0)):
        if not 0 <= index < vocab_size:
            raise UserError(f"token id {index} is outside the tokenizer's vocabulary of {vocab_size}")
    return ids


def from_description(description: Any) -> Tokenizer:
    """The tokenizer whose describe() returned `description`. Raises UserError for anything else."""
    match description:
        case {"kind": "char", "chars": str(chars), "end_of_text": bool(end_of_text)}:
            return CharTokenizer(chars, end_of_text)
        case {"kind": "byte"}:
            return ByteTokenizer()
        case {"kind": "gpt2"}:
            return GPT2Tokenizer()
        case {"kind": "json", "text": str(text), "config": dict(config)}:
            return JsonTokenizer(text, config)
        case {"kind": "json", "text": str(text)}:
            return JsonTokenizer(text)
    raise UserError(f"not the description of a tokenizer: {ascii(description)[:80]}")
