"""Tiny Shakespeare (1 MB), in GPT-2's byte-pair encoding."""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])  # kqv, also if not installed; prepare/code.py is not Python's

from kqv import cli
from kqv.documents import Shakespeare, tiny_shakespeare
from kqv.suggest import print_next
from kqv.tokenizer import GPT2Tokenizer
from kqv.writer import dataset_folder, write_dataset


def main(cfg: Shakespeare, origin: dict[str, str]) -> None:
    """Make the data set shakespeare: tiny Shakespeare (1 MB) in GPT-2's byte-pair encoding, to finetune GPT-2 on."""
    tokenizer = GPT2Tokenizer("prepare/shakespeare_char.py does not need them")
    text, source = tiny_shakespeare(cfg.input)
    folder = dataset_folder("shakespeare", cfg.data_dir, origin)
    meta = write_dataset(folder, [[text]], tokenizer, f"{source}, by prepare/shakespeare.py")
    print_next(folder, meta, origin, gpu_config="finetune_shakespeare")


if __name__ == "__main__":
    cli.run(main, Shakespeare)
