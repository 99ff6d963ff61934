"""Text to token ids and back: characters, bytes, or GPT-2's byte-pair encoding.

Each tokenizer describes itself as plain JSON. The description travels in meta.json and in checkpoints, so a model is
always decoded with the tokenizer it was trained on.
"""

import pickle
import pickletools
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from kqv.errors import UserError

END_OF_TEXT = "<|endoftext|>"


class Tokenizer:
    """What all have in common; each has its own encode_array, describe, vocab_size, end_of_text and token_bytes."""

    def encode(self, text: str) -> list[int]:
        return self.encode_array(text).tolist()

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        return b"".join([self.token_bytes[index] for index in checked(ids, self.vocab_size)])

    def decode(self, ids: Iterable[int]) -> str:
        return self.decode_bytes(ids).decode("utf-8", errors="replace")


class CharTokenizer(Tokenizer):
    """One id for each character of `chars`, in that order; then, if asked for, one that ends a text."""

    def __init__(self, chars: str, end_of_text: bool = False):
        if not chars or len(set(chars)) != len(chars):
            raise UserError("a character vocabulary must have at least one character, and none of them twice")
        self.chars = chars
        self.end_of_text = len(chars) if end_of_text else None
        self.token_bytes = [utf8(char) for char in chars] + [END_OF_TEXT.encode()] * end_of_text
        self.vocab_size = len(self.token_bytes)
        # id of each code point, -1 where there is none; the last entry stands for all that lie beyond
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
    """The 256 bytes of UTF-8 are ids 0 to 255, and 256 ends a text: nothing to learn, nothing it cannot encode."""

    def __init__(self):
        self.end_of_text = 256
        self.vocab_size = 257
        self.token_bytes = [bytes([value]) for value in range(256)] + [END_OF_TEXT.encode()]

    def encode_array(self, text: str) -> np.ndarray:
        return np.frombuffer(utf8(text), dtype=np.uint8)

    def describe(self) -> dict[str, Any]:
        return {"kind": "byte"}


class GPT2Tokenizer(Tokenizer):
    """GPT-2's byte-pair encoding, by tiktoken, which downloads 1.5 MB the first time. UserError where it cannot."""

    def __init__(self):
        import requests  # tiktoken downloads with it
        import tiktoken

        try:
            self.bpe = tiktoken.get_encoding("gpt2")
        except (requests.RequestException, ValueError) as error:  # ValueError: what came has the wrong checksum
            raise UserError(
                f"could not download GPT-2's BPE files ({type(error).__name__}): connect to the internet once, or set "
                "TIKTOKEN_CACHE_DIR to a folder in which tiktoken has kept them"
            ) from None
        self.end_of_text = self.bpe.eot_token
        self.vocab_size = self.bpe.n_vocab
        self.of_thread = threading.local()
        self.of_thread.bpe = self.bpe

    def encode_array(self, text: str) -> np.ndarray:
        # An encoding is a fifth faster in the thread that used it first (dev/LOG.md): each thread has its own, of 11 MB
        if not hasattr(self.of_thread, "bpe"):
            import tiktoken

            bpe = self.bpe
            self.of_thread.bpe = tiktoken.Encoding(
                bpe.name, pat_str=bpe._pat_str, mergeable_ranks=bpe._mergeable_ranks, special_tokens=bpe._special_tokens
            )
        utf8(text)  # UserError for half a surrogate pair
        # not encode_ordinary: its Python list of ids costs a third of the time, and holds the GIL while it is made
        return self.of_thread.bpe.encode_to_numpy(text, disallowed_special=())

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        return self.bpe.decode_bytes(checked(ids, self.vocab_size))

    def describe(self) -> dict[str, Any]:
        return {"kind": "gpt2"}


def utf8(text: str) -> bytes:
    """`text` as UTF-8. UserError for half a surrogate pair: JSON escapes and odd file names can bring in such."""
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError as error:
        bad = f"U+{ord(text[error.start]):04X}"
        raise UserError(f"character {error.start} of the text is {bad}, half a surrogate pair") from None


def checked(ids: Iterable[int], vocab_size: int) -> list[int]:
    ids = list(ids)
    for index in (min(ids, default=0), max(ids, default=0)):
        if not 0 <= index < vocab_size:
            raise UserError(f"token id {index} is outside the tokenizer's vocabulary of {vocab_size}")
    return ids


def encode_prompt(tokenizer: Tokenizer, text: str) -> list[int]:
    """Ids of `text`, where "<|endoftext|>" means the end-of-text id if the tokenizer has one."""
    if tokenizer.end_of_text is None:
        return tokenizer.encode(text)
    first, *others = map(tokenizer.encode, text.split(END_OF_TEXT))
    return first + [index for ids in others for index in (tokenizer.end_of_text, *ids)]


def from_description(description: Any) -> Tokenizer:
    """The tokenizer whose describe() gave `description`. UserError for anything else."""
    match description:
        case {"kind": "char", "chars": str(chars), "end_of_text": bool(end_of_text)}:
            return CharTokenizer(chars, end_of_text)
        case {"kind": "byte"}:
            return ByteTokenizer()
        case {"kind": "gpt2"}:
            return GPT2Tokenizer()
    raise UserError(f"not the description of a tokenizer: {ascii(description)[:80]}")


# What it takes to pickle dicts, strings and integers. Nothing here can import or call: a pickle of these runs no code.
PLAIN_OPCODES = {
    *("PROTO", "FRAME", "STOP", "MARK", "PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE", "GET", "BINGET", "LONG_BINGET"),
    *("DICT", "EMPTY_DICT", "SETITEM", "SETITEMS", "UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"),
    *("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1"),
}


def read_meta_pkl(path: Path) -> dict[str, Any]:
    """The tokenizer description in nanoGPT's meta.pkl. OSError, or UserError where it is not a character vocabulary.

    Pickles can run any code when they are loaded, so the file's instructions are looked through before it is.
    """
    data = path.read_bytes()
    try:
        for opcode, argument, _ in pickletools.genops(data):
            if opcode.name not in PLAIN_OPCODES:
                raise ValueError(f"{opcode.name} is more than dicts, strings and integers need")
            if opcode.name.endswith("PUT") and argument > len(data):
                raise ValueError("it would fill the memory")  # pickle makes a table as long as the largest number
        meta = pickle.loads(data)
    except (pickle.UnpicklingError, ValueError, LookupError, TypeError, AttributeError, EOFError) as error:
        raise UserError(f"{path}: not a meta.pkl of nanoGPT's: {error}") from None
    match meta:
        case {"vocab_size": int(vocab_size), "itos": dict(itos), "stoi": dict(stoi)}:
            chars = [itos.get(index) for index in range(len(itos))]
            if (
                len(stoi) == len(chars) == vocab_size > 0
                and all(isinstance(char, str) and len(char) == 1 for char in chars)
                and stoi == {char: index for index, char in enumerate(chars)}
            ):
                utf8("".join(chars))
                return {"kind": "char", "chars": "".join(chars), "end_of_text": False}
    raise UserError(f"{path}: its itos and stoi are not one character for each id from 0 to vocab_size - 1")
