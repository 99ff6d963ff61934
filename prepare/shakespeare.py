"""Tiny Shakespeare (1 MB) in GPT-2's byte-pair encoding."""

from shakespeare_char import Shakespeare, read_text
from writer import dataset_folder, say_next, write_dataset

import config
from tokenizer import GPT2Tokenizer


def main(cfg: Shakespeare, origin: dict[str, str]) -> None:
    """Make the data set shakespeare: tiny Shakespeare (1 MB) in GPT-2's byte-pair encoding, to finetune GPT-2 on."""
    tokenizer = GPT2Tokenizer()
    text, source = read_text(cfg.input)
    folder = dataset_folder("shakespeare", cfg.data_dir, origin)
    write_dataset(folder, [[text]], tokenizer, f"{source}, by prepare/shakespeare.py")
    say_next("configs/finetune_shakespeare.py", folder, origin)


if __name__ == "__main__":
    config.run(main, Shakespeare)
