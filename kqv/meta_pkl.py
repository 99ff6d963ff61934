"""nanoGPT's meta.pkl: a character vocabulary in a pickle, read without running what a pickle can hold."""

import pickle
import pickletools
from pathlib import Path
from typing import Any

from kqv.errors import UserError
from kqv.tokenizer import utf8

# All that a pickle of dicts, strings and integers needs. None of these opcodes imports or calls anything.
PLAIN_OPCODES = {
    *("PROTO", "FRAME", "STOP", "MARK", "PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE", "GET", "BINGET", "LONG_BINGET"),
    *("DICT", "EMPTY_DICT", "SETITEM", "SETITEMS", "UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"),
    *("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1"),
}


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
