"""Train and validation splits: which text goes to which, and how much of val is also in train."""

import hashlib
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from kqv.documents import Document
from kqv.tokenizer import utf8

SAMPLES = 1000  # stretches of val that are searched for in train
STEP = 8  # train is compared at every 8th place only, so each stretch is searched for in 8 versions, shifted by one id
BLOCK = 2**18  # ids of train that are searched at once
FACTORS = np.array([0x9E3779B1, 0x85EBCA77, 0xC2B2AE3D, 0x27D4EB2F, 0x165667B1, 0xB55A4F09], np.uint32)  # any odd ones

# -- which text goes to which split: these yield (split, pieces of the text) -------------------------------------------


def cut_each(documents: Iterable[Document], val_fraction: float) -> Iterator[tuple[str, Document]]:
    """Cut each document in two: its start is train, its end val."""
    for document in documents:
        length = sum(map(len, document))
        cut = int(length * (1 - val_fraction))
        yield "train", between(document, 0, cut)
        yield "val", between(document, cut, length)


def between(pieces: Document, start: int, stop: int) -> Iterator[str]:
    """Characters start ... stop - 1 of a document, in pieces."""
    position = 0
    for piece in pieces:
        yield piece[max(start - position, 0) : max(stop - position, 0)]
        position += len(piece)


def choose_by_content(documents: Iterable[Document], val_fraction: float) -> Iterator[tuple[str, Document]]:
    """Assign whole documents by a hash of their text, so that copies go to the same split.

    The first document is val, so that val is never empty.
    """
    first = None
    for document in documents:
        digest = hashlib.sha256()
        for piece in document:
            digest.update(utf8(piece))
        first = first or digest.digest()
        yield split_of(digest.digest(), first, val_fraction), document


def split_of(digest: bytes, first: bytes, val_fraction: float) -> str:
    """The split that a hash chooses. What is equal to the first is val."""
    share = int.from_bytes(digest[:8], "big") / 2**64
    return "val" if share < val_fraction or digest == first else "train"


# -- how much of val is also in train ----------------------------------------------------------------------------------


def warn_of_overlap(folder: Path, dtype: np.dtype, length: int, end_of_text: int | None) -> None:
    """Warn on stderr if more than a hundredth of val.bin is also in train.bin."""
    shared, total = shared_stretches(folder, dtype, length, end_of_text)
    if shared > total / 100:  # less is a licence or a refrain
        print(
            f"warning: {shared} of {total} stretches of the validation split ({shared / total:.1%}), {length} tokens "
            "each, are also in the training split",
            file=sys.stderr,
        )


def shared_stretches(folder: Path, dtype: np.dtype, length: int, end_of_text: int | None) -> tuple[int, int]:
    """How many of about SAMPLES stretches of val.bin, `length` ids each, are also in train.bin; and their number.

    Stretches are evenly spaced and contain no end of text; equal ones count once. One pass, in bounded memory.
    """
    val = np.memmap(folder / "val.bin", dtype, "r")
    last = len(val) - (length + STEP - 1)
    if last < 0:
        return 0, 0
    starts = np.arange(0, last + 1, max(STEP, last // SAMPLES + 1))
    stretches = sliding_window_view(val, length)[starts[:, None] + np.arange(STEP)]  # (SAMPLES, STEP, length)
    if end_of_text is not None:
        stretches = stretches[(stretches != end_of_text).all(axis=(1, 2))]
    number_of = {version.tobytes(): number for number, versions in enumerate(stretches) for version in versions}
    candidates = np.zeros(2**20, bool)  # by hash: excludes most windows of train quickly
    candidates[hashes(stretches.reshape(-1, length))] = True
    shared, ids = set(), np.empty(0, dtype)
    with (folder / "train.bin").open("rb") as file:
        while len(block := np.fromfile(file, dtype, BLOCK)):
            ids = np.concatenate([ids, block])
            if len(ids) >= length:
                windows = sliding_window_view(ids, length)[::STEP]
                shared.update(number_of.get(window.tobytes()) for window in windows[candidates[hashes(windows)]])
                ids = ids[len(windows) * STEP :]
    return len(shared - {None}), len(set(number_of.values()))


def hashes(windows: np.ndarray) -> np.ndarray:
    """A hash of 20 bits, from six ids of each window: (N, length) -> (N,)."""
    six = windows[:, np.linspace(0, windows.shape[1] - 1, len(FACTORS)).astype(int)].astype(np.uint32)
    return (six @ FACTORS) >> np.uint32(12)
