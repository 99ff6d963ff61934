"""Make a data set from any text: files, folders, JSON lines, or standard input."""

import shutil
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

sys.path[0] = str(Path(__file__).resolve().parents[1])  # kqv, also if not installed; prepare/code.py is not Python's

from kqv import cli
from kqv.documents import find_files, read_documents
from kqv.errors import UserError
from kqv.hub_tokenizer import find_tokenizer
from kqv.suggest import print_next
from kqv.tokenizer import CharTokenizer, Tokenizer
from kqv.writer import dataset_folder, name_of, write_dataset


@dataclass(kw_only=True)
class Text:
    input: Annotated[tuple[str, ...], "file, folder, or - for standard input; can be given more than once"] = ()
    name: Annotated[str | None, "name of the data set; None: that of the input"] = None
    tokenizer: Annotated[
        str,
        "char | byte | gpt2 (a download) | a tokenizer.json or the folder of one | OWNER/NAME on the Hugging Face hub",
    ] = "gpt2"
    val_fraction: Annotated[float, "share of the text for validation"] = 0.1
    field: Annotated[str, "field or column of .jsonl and .parquet files that holds the text"] = "text"
    data_dir: Annotated[str, "folder of data sets"] = "data"


def make_tokenizer(kind: str, files: list[Path], field: str) -> Tokenizer:
    """The tokenizer of that kind or place; "char" has the characters of the files. Raises UserError."""
    if kind != "char":
        return find_tokenizer(kind)
    characters, count = set(), 0
    for count, document in enumerate(read_documents(files, field), 1):  # noqa: B007
        for piece in document:
            characters.update(piece)
    if not characters:
        raise UserError("there is no text in the input")
    return CharTokenizer("".join(sorted(characters)), end_of_text=count > 1)


def main(cfg: Text, origin: dict[str, str]) -> None:
    """Make a data set from any text: files, folders, .jsonl, .parquet, .gz, or standard input.

    python prepare/text.py --input=book.txt --tokenizer=char
    """
    if not cfg.input or "" in cfg.input:
        raise UserError("which text? --input=FILE, --input=FOLDER, or --input=- for standard input")
    name = cfg.name or name_of(cfg.input[0])
    if cfg.name is None and (len(cfg.input) > 1 or cfg.input == ("-",)):
        raise UserError("the data set needs a name: --name=NAME")
    folder = dataset_folder(name, cfg.data_dir, origin)
    with tempfile.TemporaryDirectory() as temporary:
        files = find_files(path for path in cfg.input if path != "-")
        if "-" in cfg.input:
            files.append(Path(temporary) / "standard input")
            with files[-1].open("wb") as spool:
                shutil.copyfileobj(sys.stdin.buffer, spool)
        documents = read_documents(files, cfg.field)
        tokenizer = make_tokenizer(cfg.tokenizer, files, cfg.field)
        packed = any(path.suffix in (".gz", ".parquet") for path in files)
        total_bytes = None if packed else sum(path.stat().st_size for path in files)
        source = f"{', '.join(cfg.input)}, by prepare/text.py"
        meta = write_dataset(folder, documents, tokenizer, source, cfg.val_fraction, total_bytes)
    print_next(folder, meta, origin, finetune=(cfg.tokenizer, "finetune_smollm2"))


if __name__ == "__main__":
    cli.run(main, Text)
