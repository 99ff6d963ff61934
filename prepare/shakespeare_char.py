"""Tiny Shakespeare (1 MB), one token for each character."""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])  # kqv, also if not installed; prepare/code.py is not Python's

from kqv import cli
from kqv.documents import Shakespeare, tiny_shakespeare
from kqv.errors import UserError
from kqv.suggest import print_next
from kqv.tokenizer import CharTokenizer
from kqv.writer import dataset_folder, write_dataset


def main(cfg: Shakespeare, origin: dict[str, str]) -> None:
    """Make the data set shakespeare_char: tiny Shakespeare (1 MB), one token for each character."""
    text, source = tiny_shakespeare(cfg.input)
    if not text:
        raise UserError(f"{source} is empty")
    tokenizer = CharTokenizer("".join(sorted(set(text))))
    folder = dataset_folder("shakespeare_char", cfg.data_dir, origin)
    meta = write_dataset(folder, [[text]], tokenizer, f"{source}, by prepare/shakespeare_char.py")
    print_next(folder, meta, origin)


if __name__ == "__main__":
    cli.run(main, Shakespeare)
