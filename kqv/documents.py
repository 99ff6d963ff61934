"""From files to documents: text files, folders, JSON lines, parquet, .gz, and the texts that prepare/ downloads.

A document is an iterable of strings, the pieces of its text in order, that can be gone through more than once; so a
file of any size can be one, and memory stays bounded.
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
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from kqv.errors import UserError
from kqv.tokenizer import utf8

Document = Iterable[str]

PIECE = 2**20  # characters read at once
SHAKESPEARE_URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"


@dataclass
class TextFile:
    """A document that is a file, of any size. Reading it raises UserError if it is not UTF-8 text, and OSError."""

    path: Path

    def __iter__(self) -> Iterator[str]:
        with open_text(self.path) as file:
            while piece := file.read(PIECE):
                if "\0" in piece:
                    raise UserError(f"{self.path}: not text, it has zero bytes")
                yield piece


@contextmanager
def open_text(path: Path) -> Iterator[TextIO]:
    # utf-8-sig: a byte order mark at its start is not text
    with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8-sig") as file:
        try:
            yield file
        except UnicodeDecodeError as error:
            raise UserError(f"{path}: not UTF-8 text ({error})") from None
        except EOFError:
            raise UserError(f"{path}: the gzip file is cut short") from None
        except (gzip.BadGzipFile, zlib.error) as error:
            raise UserError(f"{path}: not a gzip file, or damaged ({error})") from None


def find_files(inputs: tuple[str, ...]) -> list[Path]:
    """The files named, and the ones in the folders named: sorted, without hidden ones and ones that are not text."""
    found, skipped = [], []
    for path in map(Path, inputs):
        if not path.is_dir():
            if not path.exists():
                raise UserError(f"input={str(path)!r}: no such file or folder")
            if not path.is_file():
                raise UserError(f"{path} can be read only once: pipe it into this command, with --input=-")
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
    with suppress(UserError):
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
                    raise UserError(f"no text in the field {field!r}")
                utf8(row[field])
            except (ValueError, UserError) as error:
                raise UserError(f"{path}, line {number}: {error}") from None
            yield row[field]


def parquet_rows(path: Path, field: str) -> Iterator[str]:
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            if field not in file.schema_arrow.names:
                raise UserError(f"no column {field!r}; it has {', '.join(file.schema_arrow.names)}")
            for batch in file.iter_batches(columns=[field]):
                yield from (text or "" for text in batch.column(0).cast("large_string").to_pylist())
    except (ValueError, UserError, NotImplementedError) as error:  # pyarrow's own are among them
        raise UserError(f"{path}: {error}") from None


def tiny_shakespeare(path: str | None) -> tuple[str, str]:
    """The text of the file, or tiny Shakespeare from the net if there is none; and where it came from.

    Raises UserError if it is another text, and OSError if it cannot be had.
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
    """The first `limit` documents of a repository on the Hugging Face hub, as they come in, or of files; the source."""
    if inputs:
        source, documents = ", ".join(inputs), read_documents(find_files(inputs), "text")
    else:
        from datasets import load_dataset

        source = f"huggingface.co/datasets/{repository}" + (f", {subset}" if subset else "")
        documents = ([row["text"]] for row in load_dataset(repository, subset, split="train", streaming=True))
    if limit is not None:
        source, documents = f"the first {limit} of {source}", itertools.islice(documents, limit)
    return documents, source


# -- which text goes to which split: both ways give (split, pieces of text) --------------------------------------------


def cut_each(documents: list[Document], val_fraction: float) -> Iterator[tuple[str, Document]]:
    for document in documents:
        length = sum(map(len, document))
        cut = int(length * (1 - val_fraction))
        yield "train", between(document, 0, cut)
        yield "val", between(document, cut, length)


def between(pieces: Document, start: int, stop: int) -> Iterator[str]:
    position = 0
    for piece in pieces:
        yield piece[max(start - position, 0) : max(stop - position, 0)]
        position += len(piece)


def choose_by_content(documents: Iterable[Document], val_fraction: float) -> Iterator[tuple[str, Document]]:
    """By content, so that all copies of a document are on one side. The first is val, so that val is never empty."""
    first = None
    for document in documents:
        digest = hashlib.sha256()
        for piece in document:
            digest.update(utf8(piece))
        first = first or digest.digest()
        share = int.from_bytes(digest.digest()[:8], "big") / 2**64
        yield "val" if share < val_fraction or digest.digest() == first else "train", document
