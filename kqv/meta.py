"""What a data set's folder says about it: meta.json, which kqv/writer.py writes, or nanoGPT's meta.pkl."""

import json
import pickle
import pickletools
from pathlib import Path
from typing import Any

from kqv.errors import UserError
from kqv.tokenizer import GPT2_VOCAB_SIZE, from_description, utf8

# The entry of meta.json that is true if ids with the highest bit set are read and not learned: a prompt, whose
# response is to be learned. The bit is in the token files, so that nothing can come between ids and mask.
MASKED = "masked"


def mask_bit(dtype: str) -> int:
    return 2**15 if dtype == "uint16" else 2**31


# All that a pickle of dicts, strings and integers needs. None of these opcodes imports or calls anything.
PLAIN_OPCODES = {
    *("PROTO", "FRAME", "STOP", "MARK", "PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE", "GET", "BINGET", "LONG_BINGET"),
    *("DICT", "EMPTY_DICT", "SETITEM", "SETITEMS", "UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"),
    *("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1"),
}


def read_meta(folder: Path) -> dict[str, Any]:
    """The description of a data set: "tokenizer", "vocab_size", "dtype" and "splits" (empty if unknown).

    It comes from meta.json, or from nanoGPT's meta.pkl (characters); without either the tokens are GPT-2's.
    Raises UserError if the file is damaged.
    """
    if (folder / "meta.json").exists():
        return read_meta_json(folder / "meta.json")
    tokenizer, vocab_size = {"kind": "gpt2"}, GPT2_VOCAB_SIZE
    if (folder / "meta.pkl").exists():
        tokenizer = read_meta_pkl(folder / "meta.pkl")
        vocab_size = len(tokenizer["chars"])
    return {"tokenizer": tokenizer, "vocab_size": vocab_size, "dtype": "uint16", "splits": {}}


def read_meta_json(path: Path) -> dict[str, Any]:
    """The description that kqv/writer.py wrote, or one with empty "splits". Raises UserError if it is damaged."""
    try:
        match meta := json.loads(path.read_text(encoding="utf-8")):
            case {"tokenizer": tokenizer, "vocab_size": int(size), "dtype": "uint16" | "uint32", "splits": splits}:
                expected = GPT2_VOCAB_SIZE if tokenizer == {"kind": "gpt2"} else from_description(tokenizer).vocab_size
                if size != expected:
                    raise UserError(f"vocab_size {size} is not its tokenizer's, {expected}")
                match splits:
                    case {"train": {"tokens": int(), "bytes": int()}, "val": {"tokens": int(), "bytes": int()}}:
                        return meta
                if splits == {}:
                    return meta
        raise UserError("not the description of a data set")
    except (ValueError, UserError) as error:
        raise UserError(f"{path} is damaged: {error}; prepare the data again") from None


def read_meta_pkl(path: Path) -> dict[str, Any]:
    """The tokenizer description in nanoGPT's meta.pkl. Raises UserError if that is not a character vocabulary.

    Loading a pickle can run any code, so its opcodes are checked first.
    """
    data = path.read_bytes()
    try:
        for opcode, argument, _ in pickletools.genops(data):
            if opcode.name not in PLAIN_OPCODES:
                raise ValueError(f"{opcode.name} is more than dicts, strings and integers need")
            if opcode.name.endswith("PUT") and argument > len(data):  # pickle allocates a table of that many entries
                raise ValueError("loading it would fill the memory")
        meta = pickle.loads(data)
    except (
        pickle.UnpicklingError,
        ValueError,
        LookupError,
        TypeError,
        AttributeError,
        EOFError,
        OverflowError,
    ) as error:
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
