"""Train a tokenizer of your own: a byte-level BPE of any size, with GPT-2's words."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # kqv, also from a clone that is not installed

from kqv import cli
from kqv.documents import find_files, read_documents
from kqv.errors import UserError
from kqv.rundir import write_whole
from kqv.tokenizer import END_OF_TEXT
from kqv.writer import dataset_folder


@dataclass(kw_only=True)
class OwnTokenizer:
    input: Annotated[tuple[str, ...], "file or folder to learn from; can be given more than once"] = ()
    vocab_size: Annotated[int, "number of tokens, with 256 for the bytes and the special ones"] = 4096
    special: Annotated[tuple[str, ...], "a special token besides <|endoftext|>; can be given more than once"] = ()
    name: Annotated[str | None, "folder in data_dir; None: that of the input with -bpe"] = None
    field: Annotated[str, "field or column of .jsonl and .parquet files that holds the text"] = "text"
    data_dir: Annotated[str, "folder of data sets"] = "data"


def main(cfg: OwnTokenizer, origin: dict[str, str]) -> None:
    """Train a tokenizer and write DATA_DIR/NAME/tokenizer.json. The same text gives the same file.

    python prepare/tokenizer.py --input=FOLDER --vocab_size=4096
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    if not cfg.input or "" in cfg.input:
        raise UserError("which text? --input=FILE or --input=FOLDER")
    special = [END_OF_TEXT, *cfg.special]
    if cfg.vocab_size < (least := 256 + len(special)):
        raise UserError(f"vocab_size={cfg.vocab_size}: the bytes and special tokens alone are {least}")
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    options = {"special_tokens": special, "initial_alphabet": alphabet, "show_progress": sys.stderr.isatty()}
    pieces = (piece for document in read_documents(find_files(cfg.input), cfg.field) for piece in document)
    bpe.train_from_iterator(pieces, trainers.BpeTrainer(vocab_size=cfg.vocab_size, **options))
    if bpe.get_vocab_size() < cfg.vocab_size:
        most = bpe.get_vocab_size()
        raise UserError(
            f"vocab_size={cfg.vocab_size}: the text has pairs for no more than {most}; pass --vocab_size={most}"
        )
    name = cfg.name or Path(cfg.input[0]).resolve().name.split(".")[0] + "-bpe"
    folder = dataset_folder(name, cfg.data_dir, origin)
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / "tokenizer.json", bpe.to_str(pretty=True))
    print(f"{folder / 'tokenizer.json'}: {cfg.vocab_size:,} tokens")
    inputs = " ".join(f"--input={path}" for path in cfg.input)
    print(f"next: python prepare/text.py {inputs} --tokenizer={folder}")


if __name__ == "__main__":
    cli.run(main, OwnTokenizer)
