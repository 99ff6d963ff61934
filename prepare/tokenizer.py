"""Train a tokenizer of your own: a byte-level BPE of any size, with GPT-2's words."""

import re
import shlex
import sys
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

sys.path[0] = str(Path(__file__).resolve().parents[1])  # kqv, also if not installed; prepare/code.py is not Python's

from kqv import cli
from kqv.documents import find_files, read_documents
from kqv.errors import UserError
from kqv.repositories import FIM, find_repositories, read_sources, without_duplicates
from kqv.rundir import write_whole
from kqv.suggest import script_path
from kqv.tokenizer import END_OF_TEXT
from kqv.writer import WORD_END, chunks, dataset_folder, name_of


@dataclass(kw_only=True)
class OwnTokenizer:
    input: Annotated[tuple[str, ...], "file or folder to learn from; can be given more than once"] = ()
    code: Annotated[bool, "read what prepare/code.py would of these folders; with tokens to fill in the middle"] = False
    vocab_size: Annotated[int, "number of tokens, with 256 for the bytes and the special ones"] = 4096
    special: Annotated[tuple[str, ...], "a special token besides <|endoftext|>; can be given more than once"] = ()
    name: Annotated[str | None, "folder in data_dir; None: that of the input with -bpe"] = None
    field: Annotated[str, "field or column of .jsonl and .parquet files that holds the text"] = "text"
    data_dir: Annotated[str, "folder of data sets"] = "data"

    def __post_init__(self):
        if not self.input or "" in self.input:
            raise UserError("which text? --input=FILE or --input=FOLDER")
        if self.code:
            self.special = (*FIM, *(token for token in self.special if token not in FIM))
        special = [END_OF_TEXT, *self.special]
        if self.vocab_size < (least := 256 + len(special)):
            raise UserError(f"vocab_size={self.vocab_size}: the bytes and special tokens alone are {least}")
        for token in self.special:
            # no word of GPT-2's has both punctuation and letters, so that no text becomes such a token
            if not re.fullmatch(r"<\S*[A-Za-z]\S*>", token) or special.count(token) > 1:
                raise UserError(f"special={token!r}: must be like <|name|>, without spaces, and given once")


def train_bpe(texts: Iterable[str], vocab_size: int, special: Iterable[str]) -> str:
    """The tokenizer.json of a BPE: the special tokens, the bytes, then pairs of tokens that occur more than once.

    Raises UserError if the texts have too few such pairs.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    options = {"special_tokens": [END_OF_TEXT, *special], "initial_alphabet": pre_tokenizers.ByteLevel.alphabet()}
    options |= {"min_frequency": 2, "show_progress": sys.stderr.isatty()}
    bpe.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=vocab_size, **options))
    if (most := bpe.get_vocab_size()) < vocab_size:
        raise UserError(
            f"vocab_size={vocab_size}: the text has pairs for no more than {most}; pass --vocab_size={most}"
        )
    return bpe.to_str(pretty=True)


def main(cfg: OwnTokenizer, origin: dict[str, str]) -> None:
    """Train a tokenizer and write DATA_DIR/NAME/tokenizer.json. The same text gives the same file.

    python prepare/tokenizer.py --input=FOLDER --vocab_size=4096
    """
    name = cfg.name or name_of(cfg.input[0]) + "-bpe"
    folder = dataset_folder(name, cfg.data_dir, origin)
    if cfg.code:
        sources = read_sources(find_repositories(cfg.input, left_out := defaultdict(list)), (), left_out)
        documents = ([source.text] for source in without_duplicates(sources, left_out))
    else:
        documents = read_documents(find_files(cfg.input), cfg.field)
    texts = (text for document in documents for text in chunks(document, WORD_END))
    text = train_bpe(texts, cfg.vocab_size, cfg.special)
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / "tokenizer.json", text)
    print(f"{folder / 'tokenizer.json'}: {cfg.vocab_size:,} tokens")
    words = [script_path("prepare/code.py"), *cfg.input]
    if not cfg.code:
        words = [script_path("prepare/text.py"), *(f"--input={path}" for path in cfg.input)]
    words += [f"--tokenizer={folder}", *([f"--data_dir={cfg.data_dir}"] if origin["data_dir"] != "default" else [])]
    print("next:", shlex.join(["python", *words]))


if __name__ == "__main__":
    cli.run(main, OwnTokenizer)
