"""Tiny Shakespeare (1 MB) in GPT-2's byte-pair encoding."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # kqv, also from a clone that is not installed

from kqv import cli
from kqv.documents import tiny_shakespeare
from kqv.errors import UserError
from kqv.settings import Shakespeare
from kqv.tokenizer import GPT2Tokenizer
from kqv.writer import dataset_folder, print_next, small_model_config, write_dataset


def main(cfg: Shakespeare, origin: dict[str, str]) -> None:
    """Make the data set shakespeare: tiny Shakespeare (1 MB) in GPT-2's byte-pair encoding, to finetune GPT-2 on."""
    try:
        tokenizer = GPT2Tokenizer()
    except UserError as error:
        raise UserError(f"{error}; prepare/shakespeare_char.py does without") from None
    text, source = tiny_shakespeare(cfg.input)
    folder = dataset_folder("shakespeare", cfg.data_dir, origin)
    write_dataset(folder, [[text]], tokenizer, f"{source}, by prepare/shakespeare.py")
    config_file = small_model_config() if small_model_config().endswith("cpu") else "finetune_shakespeare"
    print_next(folder, config_file, origin)


if __name__ == "__main__":
    cli.run(main, Shakespeare)
