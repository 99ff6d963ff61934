"""Tiny Shakespeare (1 MB), one token for each character."""

import hashlib
import http.client
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from text import TextFile
from writer import dataset_folder, say_next, write_dataset

import config
from tokenizer import CharTokenizer

URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"


@dataclass(kw_only=True)
class Shakespeare:
    input: Annotated[str | None, "take the text from this file; None: download it"] = None
    data_dir: Annotated[str, "folder of data sets"] = "data"


def read_text(path: str | None) -> tuple[str, str]:
    """The text of the file, or else tiny Shakespeare from the net; and where it came from. ValueError, OSError."""
    if path is not None:
        return "".join(TextFile(Path(path))), path
    try:
        with urllib.request.urlopen(URL, timeout=60) as response:
            data = response.read()
    except (OSError, http.client.HTTPException) as error:
        raise OSError(f"could not download {URL} ({error}): get it another way and give it as --input=FILE") from error
    if hashlib.sha256(data).hexdigest() != SHA256:
        raise ValueError(f"{URL} gave {len(data):,} bytes that are not tiny Shakespeare: give the text as --input=FILE")
    return data.decode("utf-8"), URL


def main(cfg: Shakespeare, origin: dict[str, str]) -> None:
    """Make the data set shakespeare_char: tiny Shakespeare (1 MB), one token for each character."""
    text, source = read_text(cfg.input)
    if not text:
        raise ValueError(f"{source} is empty")
    folder = dataset_folder("shakespeare_char", cfg.data_dir, origin)
    tokenizer = CharTokenizer("".join(sorted(set(text))))
    write_dataset(folder, [[text]], tokenizer, f"{source}, by prepare/shakespeare_char.py")
    say_next("configs/train_shakespeare_char.py", folder, origin)


if __name__ == "__main__":
    config.run(main, Shakespeare)
