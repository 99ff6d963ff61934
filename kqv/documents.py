"""Files and downloads -> documents: text files, folders, JSON lines, parquet, .gz, and the texts of prepare/.

A document is an iterable of strings, the pieces of its text in order, that can be iterated more than once. So a file of
any size can be a document, and memory stays bounded.
"""

import gzip
import hashlib
import http.client
import itertools
import json
import sys
import urllib.request
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TextIO

from kqv.errors import UserError
from kqv.settings import at_least
from kqv.tokenizer import utf8

Document = Iterable[str]

PIECE = 2**20  # characters read at once
NAMED = 10  # skipped files that are listed
SHAKESPEARE_URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"


@dataclass
class TextFile:
    """A text file as a document. Iterating raises UserError if it is not UTF-8 text, or a damaged .gz."""

    path: Path

    def __iter__(self) -> Iterator[str]:
        with open_text(self.path) as file:
            while piece := file.read(PIECE):
                if "\0" in piece:
                    raise UserError(f"{self.path}: not text, it has zero bytes")
                yield piece


@contextmanager
def open_text(path: Path) -> Iterator[TextIO]:
    """Open a text file, .gz or not. Raises UserError, also while it is read, if it is damaged or not UTF-8."""
    # utf-8-sig: a byte order mark at the start is not text
    with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8-sig") as file:
        try:
            yield file
        except UnicodeDecodeError as error:
            raise UserError(f"{path}: not UTF-8 text ({error})") from None
        except EOFError:
            raise UserError(f"{path}: the gzip file is cut short") from None
        except (gzip.BadGzipFile, zlib.error) as error:
            raise UserError(f"{path}: not a gzip file, or damaged ({error})") from None


def find_files(inputs: Iterable[str]) -> list[Path]:
    """The files in `inputs`, and those inside its folders, sorted, except hidden files and files that are not text.

    Skipped files are listed on stderr. Raises UserError if an input does not exist or is not a regular file.
    """
    files, skipped = [], []
    for path in map(Path, inputs):
        if not path.exists():
            raise UserError(f"input={str(path)!r}: no such file or folder")
        if path.is_dir():
            for file in visible_files(path):
                problem = None if file.suffix == ".parquet" else find_problem(file)
                if problem:
                    skipped.append(problem)
                else:
                    files.append(file)
        elif path.is_file():
            files.append(path)
        else:  # a pipe: encoding characters reads the text twice
            raise UserError(f"{path} can be read only once: pipe it into this command, with --input=-")
    if skipped:
        more = [f"and {len(skipped) - NAMED} more"] if len(skipped) > NAMED else []
        print("\n  ".join([f"skipped, not text: {len(skipped)} files", *skipped[:NAMED], *more]), file=sys.stderr)
    return files


def visible_files(folder: Path) -> Iterator[Path]:
    """The files below `folder`, sorted, except those whose name or folder starts with a dot."""
    for path in sorted(folder.rglob("*")):
        if path.is_file() and not any(part.startswith(".") for part in path.relative_to(folder).parts):
            yield path


def find_problem(path: Path) -> str | None:
    """Why a file cannot be read as text, or None if it can."""
    try:
        for _ in TextFile(path):
            pass
    except UserError as error:
        return str(error)
    return None


def read_documents(files: list[Path], field: str) -> Iterator[Document]:
    """Each row of a .jsonl or .parquet file is a document, its text in `field`; so is each other file as a whole."""
    for path in files:
        kind = Path(path.name.removesuffix(".gz")).suffix
        if kind == ".parquet":
            yield from ([text] for text in parquet_rows(path, field))
        elif kind == ".jsonl":
            yield from ([text] for text in json_rows(path, field))
        else:
            yield TextFile(path)


def json_lines(path: Path) -> Iterator[tuple[str, Any]]:
    """Where each line of a file of JSON lines is, and its value; blank lines are skipped. Raises UserError."""
    with open_text(path) as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            where = f"{path}, line {number}"
            try:
                value = json.loads(line)
            except ValueError as error:
                raise UserError(f"{where}: {error}") from None
            yield where, value


def json_rows(path: Path, field: str) -> Iterator[str]:
    for where, row in json_lines(path):
        if not isinstance(row, dict) or not isinstance(row.get(field), str):
            raise UserError(f"{where}: no text in the field {field!r}")
        try:
            utf8(row[field])
        except UserError as error:
            raise UserError(f"{where}: {error}") from None
        yield row[field]


def parquet_rows(path: Path, field: str) -> Iterator[str]:
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            if field not in file.schema_arrow.names:
                raise UserError(f"no column {field!r}; it has {', '.join(file.schema_arrow.names)}")
            for batch in file.iter_batches(columns=[field]):
                yield from (text or "" for text in batch.column(0).cast("large_string").to_pylist())
    except (ValueError, UserError, NotImplementedError) as error:  # pyarrow's errors are subclasses
        raise UserError(f"{path}: {error}") from None


# -- the downloads of prepare/: (text or documents, their source) ------------------------------------------------------


@dataclass(kw_only=True)
class Shakespeare:
    """Settings of prepare/shakespeare.py and prepare/shakespeare_char.py."""

    input: Annotated[str | None, "file with the text; None: download it"] = None
    data_dir: Annotated[str, "folder of data sets"] = "data"


@dataclass(kw_only=True)
class WebText:
    """Settings of prepare/openwebtext.py and prepare/fineweb.py."""

    limit: Annotated[int | None, "use only the first N documents; None: all"] = None
    input: Annotated[tuple[str, ...], ".parquet or .jsonl files, or a folder of them, instead of the download"] = ()
    val_fraction: Annotated[float, "share of the documents for validation"] = 0.0005
    data_dir: Annotated[str, "folder of data sets"] = "data"

    def __post_init__(self):
        at_least(self, 1, "limit")


def tiny_shakespeare(path: str | None) -> tuple[str, str]:
    """The text of the file `path`, or tiny Shakespeare, downloaded; and its source.

    Raises UserError if the download is another text, OSError if it fails.
    """
    if path is not None:
        return "".join(TextFile(Path(path))), path
    try:
        with urllib.request.urlopen(SHAKESPEARE_URL, timeout=60) as response:
            data = response.read()
    except (OSError, http.client.HTTPException) as error:
        raise OSError(
            f"could not download {SHAKESPEARE_URL} ({error}): get it another way and give it as --input=FILE"
        ) from error
    if hashlib.sha256(data).hexdigest() != SHAKESPEARE_SHA256:
        raise UserError(
            f"{SHAKESPEARE_URL} gave {len(data):,} bytes that are not tiny Shakespeare: give the text as --input=FILE"
        )
    return data.decode("utf-8"), SHAKESPEARE_URL


def web_documents(
    inputs: tuple[str, ...], limit: int | None, repository: str, subset: str | None = None
) -> tuple[Iterable[Document], str]:
    """The first `limit` documents of the files `inputs`, or of a repository on the Hugging Face hub; and their source.

    The hub's are streamed: training data can be made while it is downloaded.
    """
    if inputs:
        source, documents = ", ".join(inputs), read_documents(find_files(inputs), "text")
    else:
        from datasets import load_dataset

        source = f"huggingface.co/datasets/{repository}" + (f", {subset}" if subset else "")
        documents = ([row["text"]] for row in load_dataset(repository, subset, split="train", streaming=True))
    if limit is not None:
        source, documents = f"the first {limit} of {source}", itertools.islice(documents, limit)
    return documents, source
