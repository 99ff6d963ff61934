"""Documents -> a data set on disk: token ids in train.bin and val.bin, described by meta.json. kqv/data.py reads it."""

import hashlib
import itertools
import json
import os
import re
import sys
import tempfile
import time
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any, BinaryIO

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

from kqv import ROOT
from kqv.documents import Document
from kqv.errors import UserError
from kqv.splits import choose_by_content, cut_each, warn_of_overlap
from kqv.tokenizer import ByteTokenizer, CharTokenizer, JsonTokenizer, Tokenizer, utf8

Batch = list[tuple[str, str | None]]  # (split, text); text None is the end of a document
Encoded = dict[str, tuple[np.ndarray, int]]  # split -> its next token ids, and the bytes of text they encode

SPLITS = ("train", "val")
FEW_DOCUMENTS = 100  # fewer documents are each cut in two, more are assigned whole
WORKERS = 16  # at most: the thread that reads and writes keeps about 12 busy, and each needs 11 MB
CHUNK = 100_000  # characters encoded at once; measured with tiktoken on 2 cores: 30,000 and 1,000,000 are slower

# BPE works inside words, and in GPT-2's pattern for words, whitespace starts a word or is one by itself. So a word ends
# wherever whitespace follows anything else, and cutting there does not change the ids. (Python's \s has four separators
# that the pattern's does not.) Characters and bytes can be cut anywhere; so a file without whitespace is not held in
# memory as a whole. Other patterns have other words: Llama 3's and Qwen's join punctuation and the line breaks after
# it, and SentencePiece's has none. With those each document is encoded as a whole.
WORD_END = re.compile(r"\S(?=[^\S\x1c-\x1f])")
ANYWHERE = re.compile(r".", re.DOTALL)
NOWHERE = re.compile(r"(?!)")


def name_of(path: str) -> str:
    """The name of a data set made of this file or folder."""
    return Path(path).resolve().name.split(".")[0]


def dataset_folder(name: str, data_dir: str, origin: dict[str, str]) -> Path:
    """DATA_DIR/NAME. The default DATA_DIR is in the checkout, any other is relative to the working directory.

    Raises UserError if the name is not that of a folder in DATA_DIR.
    """
    if not name or Path(name).name != name or name.startswith("."):
        raise UserError(f"name={name!r}: must be the name of a folder to be made in data_dir")
    return (ROOT / "data" if origin["data_dir"] == "default" else Path(data_dir)) / name


def write_dataset(
    folder: Path,
    documents: Iterable[Document],
    tokenizer: Tokenizer,
    source: str,
    val_fraction: float = 0.1,
    total_bytes: int | None = None,
    workers: int | None = None,
) -> dict[str, Any]:
    """Write train.bin, val.bin and meta.json into `folder`, print a summary, and return the content of meta.json.

    Atomic: on failure raises OSError or UserError and leaves the previous files intact. A process that is killed leaves
    them too, or, while it moves the new ones, a folder without val.bin, which kqv/data.py refuses to open. If there are
    several documents, each is followed by the end-of-text id, if the tokenizer has one. `source` says where the text
    came from; `total_bytes`, if known, is for the progress bar.
    """
    if not 0 < val_fraction < 1:
        raise UserError(f"val_fraction={val_fraction}: must be above 0 and below 1")
    documents = iter(documents)
    first = list(itertools.islice(documents, FEW_DOCUMENTS))
    if not first:
        raise UserError(f"there is no text in {source}")
    few = len(first) < FEW_DOCUMENTS
    if few:
        parts, how = cut_each(first, val_fraction), f"the last {val_fraction:g} of each document is val"
    else:
        parts = choose_by_content(itertools.chain(first, documents), val_fraction)
        how = f"{val_fraction:g} of the documents are val, chosen by a hash of their text"
    separate = tokenizer.end_of_text is not None and len(first) > 1
    cut = ANYWHERE if isinstance(tokenizer, CharTokenizer | ByteTokenizer) else WORD_END
    if isinstance(tokenizer, JsonTokenizer) and not tokenizer.has_gpt2_words:
        cut = NOWHERE
    dtype = np.dtype("<u2" if tokenizer.vocab_size <= 2**16 else "<u4")

    workers = workers or min(os.cpu_count() or 1, WORKERS)
    encoded = encode_all(batches(parts, cut, separate), tokenizer, dtype, workers)
    meta = write_encoded(folder, encoded, tokenizer, dtype, f"{source}; {how}", total_bytes)
    if few:  # whole documents are never in both splits
        warn_of_overlap(folder, dtype, 256 if cut is ANYWHERE else 64, tokenizer.end_of_text)
    return meta


def write_encoded(
    folder: Path,
    encoded: Iterable[Encoded],
    tokenizer: Tokenizer,
    dtype: np.dtype,
    source: str,
    total_bytes: int | None = None,
    **more: Any,
) -> dict[str, Any]:
    """write_dataset for ids in place of documents; `more` are further entries of meta.json."""
    with unfinished_folder(folder) as unfinished:
        splits = write_splits(unfinished, with_progress(encoded, total_bytes))
        for split, counts in splits.items():
            if not counts["tokens"]:
                raise UserError(f"nothing for the {split} split: there is too little text in {source}")
        meta = {
            "tokenizer": tokenizer.describe(),
            "dtype": dtype.name,
            "vocab_size": tokenizer.vocab_size,
            "end_of_text": tokenizer.end_of_text,
            "splits": splits,
            "source": source,
            **more,
        }
        with (unfinished / "meta.json").open("w", encoding="utf-8") as file:
            json.dump(meta, file, ensure_ascii=False, indent=1)
            sync(file)
        # val.bin goes first and comes last, so old and new files together are never opened
        (folder / "val.bin").unlink(missing_ok=True)
        for name in ("train.bin", "meta.json", "val.bin"):
            (unfinished / name).replace(folder / name)
    for split, counts in splits.items():
        print(f"{folder / split}.bin: {counts['tokens']:,} tokens from {counts['bytes']:,} bytes of text")
    print(f"{folder / 'meta.json'}: {meta['tokenizer']['kind']} tokenizer, vocabulary of {tokenizer.vocab_size:,}")
    return meta


# -- from text to ids --------------------------------------------------------------------------------------------------


def chunks(pieces: Document, cut: re.Pattern) -> Iterator[str]:
    """The same text in chunks of CHUNK characters or a few more, cut after a match of `cut`."""
    text = ""
    for piece in pieces:
        text += piece
        start = 0
        while found := cut.search(text, start + CHUNK):
            yield text[start : found.end()]
            start = found.end()
        text = text[start:]
    if text:
        yield text


def batches(parts: Iterable[tuple[str, Document]], cut: re.Pattern, separate: bool) -> Iterator[Batch]:
    """Batches of about CHUNK characters; if `separate`, the end of each text that is not empty is marked."""
    batch, size = [], 0
    for split, pieces in parts:
        text = None
        for text in chunks(pieces, cut):
            batch.append((split, text))
            size += len(text)
            if size >= CHUNK:
                yield batch
                batch, size = [], 0
        if separate and text is not None:
            batch.append((split, None))
    yield batch


def encode_batch(batch: Batch, tokenizer: Tokenizer, dtype: np.dtype) -> Encoded:
    result, end = {}, np.array([tokenizer.end_of_text or 0])
    for split in SPLITS:
        texts = [text for name, text in batch if name == split]
        if texts:
            ids = np.concatenate([end if text is None else tokenizer.encode_array(text) for text in texts])
            assert ids.min() >= 0 and ids.max() < tokenizer.vocab_size <= np.iinfo(dtype).max + 1
            result[split] = ids.astype(dtype), sum(len(utf8(text)) for text in texts if text is not None)
    return result


def encode_all(batches: Iterable[Batch], tokenizer: Tokenizer, dtype: np.dtype, workers: int) -> Iterator[Encoded]:
    """Encode on `workers` threads, in order, a few batches ahead. tiktoken and numpy release the GIL."""
    with ThreadPoolExecutor(workers) as pool:
        ahead = deque()
        try:
            for batch in batches:
                ahead.append(pool.submit(encode_batch, batch, tokenizer, dtype))
                if len(ahead) > 2 * workers:
                    yield ahead.popleft().result()
            while ahead:
                yield ahead.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)


# -- to the disk -------------------------------------------------------------------------------------------------------


@contextmanager
def unfinished_folder(folder: Path) -> Iterator[Path]:
    """A temporary folder inside `folder`, which is made for it; `folder` is removed too if it is empty at the end."""
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with tempfile.TemporaryDirectory(prefix="unfinished-", dir=folder) as unfinished:
            yield Path(unfinished)
    finally:
        with suppress(OSError):  # it is not empty
            folder.rmdir()


def write_splits(folder: Path, encoded: Iterable[Encoded]) -> dict[str, dict[str, Any]]:
    """Write the ids to train.bin and val.bin; returns "tokens", "bytes" (of text) and "sha256" of each split."""
    counts = {split: {"tokens": 0, "bytes": 0} for split in SPLITS}
    digests = {split: hashlib.sha256() for split in SPLITS}
    with (folder / "train.bin").open("wb") as train, (folder / "val.bin").open("wb") as val:
        for parts in encoded:
            for split, (ids, n_bytes) in parts.items():
                write(train if split == "train" else val, ids)
                digests[split].update(ids.data)
                counts[split]["tokens"] += len(ids)
                counts[split]["bytes"] += n_bytes
        sync(train)
        sync(val)
    return {split: {**counts[split], "sha256": digests[split].hexdigest()} for split in SPLITS}


def write(file: BinaryIO, ids: np.ndarray) -> None:
    try:
        file.write(ids.data)
    except OSError as error:  # a full disk, for example; the message must name the file
        raise OSError(error.errno, error.strerror, file.name) from error


def sync(file: IO) -> None:
    file.flush()
    os.fsync(file.fileno())


def with_progress(encoded: Iterable[Encoded], total_bytes: int | None) -> Iterator[Encoded]:
    """Pass `encoded` on, and show progress on stderr: a bar on a terminal, else a line every ten seconds."""
    console = Console(stderr=True)
    columns = (BarColumn(), DownloadColumn(), TextColumn("{task.description}"), TimeRemainingColumn())
    tokens, last = 0, time.monotonic()
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=total_bytes)
        for parts in encoded:
            yield parts
            tokens += sum(len(ids) for ids, _ in parts.values())
            n_bytes = sum(n_bytes for _, n_bytes in parts.values())
            bar.update(task, advance=n_bytes, description=f"{tokens:,} tokens")
            if bar.disable and time.monotonic() - last > 10:
                last = time.monotonic()
                print(f"{tokens:,} tokens so far", file=sys.stderr, flush=True)
