"""How much of the validation split is also in the training split."""

import sys
from pathlib import Path

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

SAMPLES = 1000  # stretches of the validation split that are looked for
STEP = 8  # looked for at every 8th place alone: a stretch has 8 versions, each one id further on, and one fits there
BLOCK = 2**18  # ids of the training split that are looked through at once
FACTORS = np.array([0x9E3779B1, 0x85EBCA77, 0xC2B2AE3D, 0x27D4EB2F, 0x165667B1, 0xB55A4F09], np.uint32)  # any odd ones


def shared_stretches(folder: Path, dtype: np.dtype, length: int, end_of_text: int | None) -> tuple[int, int]:
    """Of up to 1,000 stretches of val.bin, `length` ids each: how many are also in train.bin, and how many there are.

    They are taken at equal distances, none across an end of text; copies count once. One pass, in bounded memory.
    """
    val = np.memmap(folder / "val.bin", dtype, "r")
    last = len(val) - (length + STEP - 1)
    if last < 0:
        return 0, 0
    starts = np.arange(0, last + 1, max(STEP, last // SAMPLES + 1))
    versions = sliding_window_view(val, length)[starts[:, None] + np.arange(STEP)]  # (SAMPLES, STEP, length)
    if end_of_text is not None:
        versions = versions[(versions != end_of_text).all(axis=(1, 2))]
    wanted = {window.tobytes(): number for number, stretch in enumerate(versions) for window in stretch}
    likely = np.zeros(2**20, bool)  # for each hash; it rules out most of the training split
    likely[hashes(versions.reshape(-1, length))] = True
    found, ids = set(), np.empty(0, dtype)
    with (folder / "train.bin").open("rb") as file:
        while len(block := np.fromfile(file, dtype, BLOCK)):
            ids = np.concatenate([ids, block])
            if len(ids) >= length:
                windows = sliding_window_view(ids, length)[::STEP]
                found.update(wanted.get(window.tobytes()) for window in windows[likely[hashes(windows)]])
                ids = ids[len(windows) * STEP :]
    return len(found - {None}), len(set(wanted.values()))


def hashes(windows: np.ndarray) -> np.ndarray:
    """20 bits from six ids of each window: (N, length) -> (N,)."""
    six = windows[:, np.linspace(0, windows.shape[1] - 1, len(FACTORS)).astype(int)].astype(np.uint32)
    return (six @ FACTORS) >> np.uint32(12)


def warn_of_overlap(folder: Path, dtype: np.dtype, length: int, end_of_text: int | None) -> None:
    """Warn on stderr if more than a hundredth of the validation split is also in the training split."""
    shared, total = shared_stretches(folder, dtype, length, end_of_text)
    if shared > total / 100:  # less is a licence or a refrain
        print(
            f"warning: {shared} of {total} stretches of the validation split ({shared / total:.1%}), {length} tokens "
            "each, are also in the training split",
            file=sys.stderr,
        )
