"""Make a data set from any text: files, folders, JSON lines, or standard input."""

import gzip
import json
import shutil
import sys
import tempfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, TextIO

from writer import Document, dataset_folder, say_next, write_dataset

import config
from tokenizer import ByteTokenizer, CharTokenizer, GPT2Tokenizer, Tokenizer, utf8

PIECE = 2**20  # characters read at once


@dataclass(kw_only=True)
class Text:
    input: Annotated[tuple[str, ...], "file, folder, or - for standard input; can be given more than once"] = ()
    name: Annotated[str | None, "name of the data set; None: that of the input"] = None
    tokenizer: Annotated[Literal["char", "byte", "gpt2"], "characters, bytes, or GPT-2's byte pairs"] = "gpt2"
    val_fraction: Annotated[float, "share of the text that is kept for validation"] = 0.1
    field: Annotated[str, "where .jsonl and .parquet files have their text"] = "text"
    data_dir: Annotated[str, "folder of data sets"] = "data"


@dataclass
class TextFile:
    """A document that is a file, of any size. Reading it raises ValueError where it is not UTF-8 text, and OSError."""

    path: Path

    def __iter__(self) -> Iterator[str]:
        with open_text(self.path) as file:
            while piece := file.read(PIECE):
                if "\0" in piece:
                    raise ValueError(f"{self.path}: not text, it has zero bytes")
                yield piece


@contextmanager
def open_text(path: Path) -> Iterator[TextIO]:
    # utf-8-sig: a byte order mark at its start is not text
    with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8-sig") as file:
        try:
            yield file
        except (UnicodeDecodeError, gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise ValueError(f"{path}: not UTF-8 text ({error})") from None


def find_files(inputs: tuple[str, ...]) -> list[Path]:
    """The files named, and the ones in the folders named: sorted, without hidden ones and ones that are not text."""
    found, skipped = [], []
    for path in map(Path, inputs):
        if not path.is_dir():
            if not path.exists():
                raise ValueError(f"input={str(path)!r}: no such file or folder")
            if not path.is_file():
                raise ValueError(f"{path} can be read only once: pipe it into this command, with --input=-")
            found.append(path)
            continue
        for file in sorted(path.rglob("*")):
            hidden = any(part.startswith(".") for part in file.relative_to(path).parts)
            if file.is_file() and not hidden:
                (found if file.suffix == ".parquet" or is_text(file) else skipped).append(file)
    if skipped:
        names = ", ".join(str(path) for path in skipped[:10]) + (", ..." if len(skipped) > 10 else "")
        print(f"skipped, not UTF-8 text: {len(skipped)} files ({names})", file=sys.stderr)
    return found


def is_text(path: Path) -> bool:
    with suppress(ValueError):
        return all(True for _ in TextFile(path))
    return False


def read_documents(files: list[Path], field: str) -> Iterator[Document]:
    """Each row of a .jsonl or .parquet file is a document, and so is each other file."""
    for path in files:
        kind = Path(path.name.removesuffix(".gz")).suffix
        if kind == ".parquet":
            yield from ([text] for text in parquet_rows(path, field))
        elif kind == ".jsonl":
            yield from ([text] for text in json_rows(path, field))
        else:
            yield TextFile(path)


def json_rows(path: Path, field: str) -> Iterator[str]:
    with open_text(path) as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
                if not isinstance(row, dict) or not isinstance(row.get(field), str):
                    raise ValueError(f"no text in the field {field!r}")
                utf8(row[field])
            except ValueError as error:
                raise ValueError(f"{path}, line {number}: {error}") from None
            yield row[field]


def parquet_rows(path: Path, field: str) -> Iterator[str]:
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            if field not in file.schema_arrow.names:
                raise ValueError(f"no column {field!r}; it has {', '.join(file.schema_arrow.names)}")
            for batch in file.iter_batches(columns=[field]):
                yield from (text or "" for text in batch.column(0).cast("large_string").to_pylist())
    except (ValueError, NotImplementedError) as error:  # pyarrow's own are among them
        raise ValueError(f"{path}: {error}") from None


def make_tokenizer(kind: str, files: list[Path], field: str) -> Tokenizer:
    if kind != "char":
        return ByteTokenizer() if kind == "byte" else GPT2Tokenizer()
    characters, count = set(), 0
    for count, document in enumerate(read_documents(files, field), 1):  # noqa: B007
        for piece in document:
            characters.update(piece)
    if not characters:
        raise ValueError("there is no text in the input")
    return CharTokenizer("".join(sorted(characters)), end_of_text=count > 1)


def main(cfg: Text, origin: dict[str, str]) -> None:
    """Make a data set from any text.

    python prepare/text.py --input=book.txt --tokenizer=char
    """
    if not cfg.input or "" in cfg.input:
        raise ValueError("which text? --input=FILE, --input=FOLDER, or --input=- for standard input")
    name = cfg.name or Path(cfg.input[0]).resolve().name.split(".")[0]
    if cfg.name is None and (len(cfg.input) > 1 or cfg.input == ("-",)):
        raise ValueError("the data set needs a name: --name=NAME")
    if Path(name).name != name or name.startswith("."):
        raise ValueError(f"name={name!r}: must be the name of a folder to be made in data_dir")
    with tempfile.TemporaryDirectory() as temporary:
        files = find_files(tuple(path for path in cfg.input if path != "-"))
        if "-" in cfg.input:
            files.append(Path(temporary) / "standard input")
            with files[-1].open("wb") as spool:
                shutil.copyfileobj(sys.stdin.buffer, spool)
        folder = dataset_folder(name, cfg.data_dir, origin)
        documents = read_documents(files, cfg.field)
        tokenizer = make_tokenizer(cfg.tokenizer, files, cfg.field)
        packed = any(path.suffix in (".gz", ".parquet") for path in files)
        total_bytes = None if packed else sum(path.stat().st_size for path in files)
        source = f"{', '.join(cfg.input)}, by prepare/text.py"
        write_dataset(folder, documents, tokenizer, source, cfg.val_fraction, total_bytes)
    say_next("" if cfg.tokenizer == "gpt2" else "configs/train_shakespeare_char.py", folder, origin)


if __name__ == "__main__":
    config.run(main, Text)
