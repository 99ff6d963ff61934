"""Documents -> a data set on disk: train.bin, val.bin and meta.json, all of them or none."""

import hashlib
import itertools
import json
import os
import re
import shlex
import sys
import tempfile
import time
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import IO, Any, BinaryIO

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

from kqv import ROOT
from kqv.documents import Document, choose_by_content, cut_each
from kqv.errors import UserError
from kqv.machine import has_nvidia_driver
from kqv.overlap import warn_of_overlap
from kqv.tokenizer import ByteTokenizer, CharTokenizer, Tokenizer, utf8

Batch = list[tuple[str, str | None]]  # (split, text); None for a text is the end of a document
Encoded = dict[str, tuple[np.ndarray, int]]  # split -> its next token ids, and the bytes of text they stand for

SPLITS = ("train", "val")
FEW_DOCUMENTS = 100  # fewer are too few to give whole ones away
WORKERS = 16  # at most: the one thread that reads and writes has work for about 12, and each of them needs 11 MB
CHUNK = 100_000  # characters encoded at once; measured with tiktoken on 2 cores: 30,000 and 1,000,000 are slower

# Byte-pair encoding works inside words, and in GPT-2's pattern for words whitespace is only ever at the start of one or
# a word by itself. So where whitespace follows anything else a word ends, whatever the text around it; to cut there
# does not change the ids. Characters and bytes can be cut anywhere, so a file without any whitespace is not held whole.
WORD_END = re.compile(r"\S(?=\s)")
ANYWHERE = re.compile(r".", re.DOTALL)


def dataset_folder(name: str, data_dir: str, origin: dict[str, str]) -> Path:
    """DATA_DIR/NAME; the default DATA_DIR is beside the code, any other is relative to the working directory."""
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
    """Write train.bin, val.bin and meta.json into `folder`, all of them or none; print and return what was made.

    `source` tells in words where the text came from. `total_bytes`, if known, is for the progress bar. A document is
    followed by the end-of-text id, if the tokenizer has one and there is more than one document. Raises UserError
    if a split would be empty, and OSError.
    """
    if not 0 < val_fraction < 1:
        raise UserError(f"val_fraction={val_fraction}: must be above 0 and below 1")
    documents = iter(documents)
    first = list(itertools.islice(documents, FEW_DOCUMENTS))
    if not first:
        raise UserError(f"there is no text in {source}")
    separate = tokenizer.end_of_text is not None and len(first) > 1
    if len(first) < FEW_DOCUMENTS:
        parts, how = cut_each(first, val_fraction), f"the last {val_fraction:g} of each document is val"
    else:
        parts = choose_by_content(itertools.chain(first, documents), val_fraction)
        how = f"{val_fraction:g} of the documents are val, chosen by a hash of their text"
    end = ANYWHERE if isinstance(tokenizer, CharTokenizer | ByteTokenizer) else WORD_END
    dtype = np.dtype("<u2" if tokenizer.vocab_size <= 2**16 else "<u4")

    folder.mkdir(parents=True, exist_ok=True)
    try:
        with tempfile.TemporaryDirectory(prefix="unfinished-", dir=folder) as unfinished:
            workers = workers or min(os.cpu_count() or 1, WORKERS)
            encoded = encode_all(batches(parts, end, separate), tokenizer, dtype, workers)
            splits = write_splits(Path(unfinished), with_progress(encoded, total_bytes))
            for split, counts in splits.items():
                if not counts["tokens"]:
                    raise UserError(f"nothing for the {split} split: there is too little text in {source}")
            meta = {
                "tokenizer": tokenizer.describe(),
                "dtype": dtype.name,
                "vocab_size": tokenizer.vocab_size,
                "end_of_text": tokenizer.end_of_text,
                "splits": splits,
                "source": f"{source}; {how}",
            }
            with (Path(unfinished) / "meta.json").open("w", encoding="utf-8") as file:
                json.dump(meta, file, ensure_ascii=False, indent=1)
                sync(file)
            # meta.json goes first and comes last: if there is one, the files beside it are the ones it describes
            for name in ("meta.json", "train.bin", "val.bin"):
                (folder / name).unlink(missing_ok=True)
            for name in ("train.bin", "val.bin", "meta.json"):
                (Path(unfinished) / name).rename(folder / name)
    finally:
        with suppress(OSError):
            folder.rmdir()  # takes only an empty folder: one that this call made for nothing
    for split, counts in splits.items():
        print(f"{folder / split}.bin: {counts['tokens']:,} tokens from {counts['bytes']:,} bytes of text")
    print(f"{folder / 'meta.json'}: {meta['tokenizer']['kind']} tokenizer, vocabulary of {tokenizer.vocab_size:,}")
    if len(first) < FEW_DOCUMENTS:  # if whole documents are chosen, none is in both splits
        warn_of_overlap(folder, dtype, 256 if end is ANYWHERE else 64, meta["end_of_text"])
    return meta


def print_next(folder: Path, config_file: str, origin: dict[str, str]) -> None:
    """Print the command that trains on the data set just made, in an out_dir of its own."""
    words = ["python", "train.py", f"configs/{config_file}.py"]
    if config_file.removeprefix("train_").removeprefix("finetune_").removesuffix("_cpu") != folder.name:
        words += [f"--dataset={folder.name}", f"--out_dir=out-{folder.name}"]
    if origin["data_dir"] != "default":
        words.append(f"--data_dir={folder.parent}")
    print("next:", shlex.join(words))


def small_model_config() -> str:
    """The config of a small model that suits this machine."""
    return "train_shakespeare_char" if has_nvidia_driver() else "train_shakespeare_char_cpu"


# -- from text to ids --------------------------------------------------------------------------------------------------


def chunks(pieces: Document, end: re.Pattern) -> Iterator[str]:
    """The same text, in pieces of about CHUNK characters, cut where `end` matches."""
    text = ""
    for piece in pieces:
        text += piece
        start = 0
        while found := end.search(text, start + CHUNK):
            yield text[start : found.end()]
            start = found.end()
        text = text[start:]
    if text:
        yield text


def batches(parts: Iterable[tuple[str, Document]], end: re.Pattern, separate: bool) -> Iterator[Batch]:
    """Batches of about CHUNK characters each; where they are to be separate, each document is followed by its end."""
    batch, size = [], 0
    for split, pieces in parts:
        text = None
        for text in chunks(pieces, end):
            batch.append((split, text))
            size += len(text)
            if size >= CHUNK:
                yield batch
                batch, size = [], 0
        if separate and text is not None:
            batch.append((split, None))
    yield batch


def encode_batch(batch: Batch, tokenizer: Tokenizer, dtype: np.dtype) -> Encoded:
    result = {}
    for split in SPLITS:
        texts = [text for of, text in batch if of == split]
        if texts:
            end = np.array([tokenizer.end_of_text or 0])
            ids = np.concatenate([end if text is None else tokenizer.encode_array(text) for text in texts])
            assert ids.min() >= 0 and ids.max() < tokenizer.vocab_size <= np.iinfo(dtype).max + 1
            result[split] = ids.astype(dtype), sum(len(utf8(text)) for text in texts if text is not None)
    return result


def encode_all(batches: Iterable[Batch], tokenizer: Tokenizer, dtype: np.dtype, workers: int) -> Iterator[Encoded]:
    """Encode on `workers` threads (tiktoken and numpy work outside the GIL), in order, a few batches ahead."""
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


def write_splits(folder: Path, encoded: Iterable[Encoded]) -> dict[str, dict[str, Any]]:
    """Append what comes to the .bin files; return the tokens, bytes of text and SHA-256 of each split."""
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
    except OSError as error:  # the disk is full, say: the message would not tell which
        raise OSError(error.errno, error.strerror, file.name) from error


def sync(file: IO) -> None:
    file.flush()
    os.fsync(file.fileno())


def with_progress(encoded: Iterable[Encoded], total_bytes: int | None) -> Iterator[Encoded]:
    """Pass on what comes and show how far it is on stderr: a bar on a terminal, else a line every ten seconds."""
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
