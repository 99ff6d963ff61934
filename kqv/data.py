"""Token files -> training batches and evaluation windows. kqv/writer.py writes the files.

A data set is a folder that holds one of

- train.bin, val.bin (raw little-endian token ids) and meta.json, as prepare/ writes them,
- nanoGPT's train.bin and val.bin, with or without meta.pkl,
- the shards of llm.c and modded-nanogpt: *train*.bin and *val*.bin, each with a header.
"""

import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from kqv import ROOT
from kqv.errors import UserError
from kqv.meta import MASKED, mask_bit, read_meta
from kqv.tokenizer import from_description

if TYPE_CHECKING:
    from torch import Tensor

EVAL_BATCH = 12  # windows per unit of eval_iters: nanoGPT's default batch_size, so batch_size does not change the loss
EVAL_TOKENS = 4096  # tokens in one evaluation forward pass: fixed, so that rounding does not depend on batch_size
SHARD_MAGIC, SHARD_VERSION, SHARD_HEADER = 20240520, 1, 256  # llm.c: 256 int32, the third is the number of tokens
VERIFY_BYTES = 2**27  # files up to this size are read and verified when they are opened, which takes 0.1 s


def find_dataset(data_dir: str, dataset: str) -> Path:
    """The folder of a data set, in data_dir here or in the checkout. Raises UserError if there is none."""
    for folder in (Path(data_dir) / dataset, ROOT / data_dir / dataset):
        if folder.is_dir():
            return folder
    script = f"prepare/{dataset}.py"
    if not (ROOT / script).is_file():
        script = f"prepare/text.py --name={dataset} --input=..."
    raise UserError(f"dataset={dataset!r}: no folder {Path(data_dir) / dataset}; make it with: python {script}")


def open_tokens(path: Path, dtype: str, recorded: dict[str, Any], vocab_size: int, masked: bool) -> np.ndarray:
    """Memory-map the token ids of one file: (n,) of `dtype`, or of uint16 if the file is a shard with a header.

    `recorded` is the entry of meta.json for this split, or {}; for `masked` see meta.MASKED. Raises UserError if the
    file is damaged.
    """
    size, header = path.stat().st_size, np.fromfile(path, dtype="<i4", count=3).tolist()
    if SHARD_MAGIC in header[:1]:
        dtype, offset = "uint16", 4 * SHARD_HEADER
        if header[1:] != [SHARD_VERSION, (size - offset) / 2]:
            raise UserError(f"{path} is damaged: {size} bytes, but its header (magic, version, tokens) is {header}")
    else:
        offset = 0
        if size % np.dtype(dtype).itemsize:
            raise UserError(f"{path} is damaged: {size} bytes are not a whole number of {dtype} ids")
    n = (size - offset) // np.dtype(dtype).itemsize
    if n != recorded.get("tokens", n):
        raise UserError(f"{path} is damaged: {n:,} tokens, but meta.json records {recorded['tokens']:,}")
    if n < 2:
        raise UserError(f"{path} has {n} tokens: nothing to learn from")
    # a plain array, because slicing an np.memmap takes three times as long
    tokens = np.asarray(np.memmap(path, np.dtype(dtype).newbyteorder("<"), mode="r", offset=offset))
    if size <= VERIFY_BYTES:
        if "sha256" in recorded and hashlib.sha256(tokens).hexdigest() != recorded["sha256"]:
            raise UserError(f"{path} is damaged: its SHA-256 is not the one in meta.json; prepare the data again")
        check_ids(tokens & (mask_bit(dtype) - 1) if masked else tokens, vocab_size, path)
    return tokens


def check_ids(tokens: np.ndarray, vocab_size: int, path: Path) -> None:
    """Raise UserError if an id is outside the vocabulary. (A GPU would only report a failed assertion.)"""
    if (largest := int(tokens.max())) >= vocab_size:
        raise UserError(
            f"{path} has the id {largest}, beyond the vocabulary of {vocab_size}: made for another tokenizer?"
        )


class Split:
    """The tokens of "train" or "val", and their windows: T = block_size inputs and, one token later, T targets."""

    def __init__(self, folder: Path, name: str, block_size: int, meta: dict[str, Any]):
        """Open the files of one split. Raises UserError if they are missing, damaged or too short for block_size."""
        paths = [folder / f"{name}.bin"]
        if not paths[0].is_file():
            paths = sorted(folder.glob(f"*{name}*.bin"))
        if not paths:
            raise UserError(f"{folder} has no {name}.bin")
        self.block_size, self.vocab_size, self.path = block_size, meta["vocab_size"], folder / f"{name}.bin"
        recorded, masked = meta["splits"].get(name, {}), meta.get(MASKED, False)
        self.mask_bit = mask_bit(meta["dtype"]) if masked else None
        self.shards = [open_tokens(path, meta["dtype"], recorded, self.vocab_size, masked) for path in paths]
        self.tokens = sum(map(len, self.shards))
        self.bytes = None if masked else recorded.get("bytes")  # the loss is that of some of the text only
        for path, shard in zip(paths, self.shards, strict=True):
            if len(shard) <= block_size:  # a window reads T + 1 tokens
                raise UserError(
                    f"block_size={block_size}: {path} has {len(shard):,} tokens and must have more; "
                    f"the longest block_size that fits is {len(shard) - 1}"
                )
        self.views = [sliding_window_view(shard, block_size + 1) for shard in self.shards]  # (n - T, T + 1) each
        self.windows = np.array([max(1, (len(shard) - block_size) // block_size) for shard in self.shards])
        self.epoch = lru_cache(maxsize=2)(self._epoch)

    def _epoch(self, seed: int, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The order of one epoch's windows, and the offset of the first window in each shard."""
        random = np.random.default_rng((seed, epoch))
        slack = [len(shard) - 1 - n * self.block_size for shard, n in zip(self.shards, self.windows, strict=True)]
        # each epoch shifts the cuts, so that windows do not always begin at the same places
        offsets = random.integers(np.minimum(slack, self.block_size - 1) + 1)
        return random.permutation(np.arange(self.windows.sum(), dtype=np.uint32)), offsets

    def batch(self, seed: int, first: int, batch_size: int) -> "tuple[Tensor, Tensor]":
        """Training sequences first ... first + batch_size - 1 of the run's order: x and y, (B, T) int64 each.

        A pure function. Each epoch contains every window once, in an order that depends on the seed and the epoch. So
        steps, micro-steps and ranks that take disjoint parts of the order get disjoint windows, and a resumed run
        replays nothing.
        """
        import torch  # imported here, because prepare/ does not need it

        T, bounds = self.block_size, self.windows.cumsum()
        total = int(bounds[-1])
        tokens = np.empty((batch_size, T + 1), dtype=self.shards[0].dtype)  # too large a batch fails here
        for epoch in range(first // total, (first + batch_size - 1) // total + 1):
            order, offsets = self.epoch(seed, epoch)
            begin = epoch * total  # the epoch's first sequence
            windows = order[max(first - begin, 0) : first + batch_size - begin].astype(np.int64)
            shards = np.searchsorted(bounds, windows, side="right")
            starts = offsets[shards] + (windows - (bounds - self.windows)[shards]) * T
            rows = tokens[max(begin - first, 0) :][: len(windows)]
            for shard in set(shards.tolist()):
                chosen = shards == shard
                rows[chosen] = self.views[shard][starts[chosen]]
        x, y = self.inputs_and_targets(tokens)
        return torch.from_numpy(x.astype(np.int64)), torch.from_numpy(y.astype(np.int64))

    def inputs_and_targets(self, tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Windows (B, T + 1) as stored -> x and y, (B, T) each; y is -1 where nothing is to be learned."""
        if self.mask_bit is None:
            check_ids(tokens, self.vocab_size, self.path)
            return tokens[:, :-1], tokens[:, 1:]
        ids = tokens & (self.mask_bit - 1)
        check_ids(ids, self.vocab_size, self.path)
        return ids[:, :-1], np.where(tokens[:, 1:] & self.mask_bit, -1, ids[:, 1:].astype(np.int64))

    def eval_windows(self, limit: int = 0) -> np.ndarray:
        """(n, 2), shard and start of each: adjacent windows over the whole split, or `limit` of them, evenly spaced."""
        bounds = np.cumsum([-(-(len(shard) - 1) // self.block_size) for shard in self.shards])
        n = min(limit or int(bounds[-1]), int(bounds[-1]))
        windows = np.arange(n) * int(bounds[-1]) // n
        shards = np.searchsorted(bounds, windows, side="right")
        return np.stack((shards, (windows - np.append(0, bounds)[shards]) * self.block_size), axis=1)

    def eval_batches(
        self, windows: np.ndarray, rank: int = 0, world_size: int = 1
    ) -> "Iterator[tuple[int, Tensor, Tensor]]":
        """Yield this rank's evaluation batches: (number of the batch, x, y), x and y (rows, T); y is -1 past the end.

        Every rank gets the same number of batches, as FSDP requires, so a rank's last one can be all padding.
        """
        import torch

        rows, T = max(1, min(EVAL_TOKENS // self.block_size, len(windows))), self.block_size
        batches = -(-len(windows) // rows)
        for number in range(rank, world_size * -(-batches // world_size), world_size):
            x, y = np.zeros((rows, T), dtype=np.int64), np.full((rows, T), -1, dtype=np.int64)
            for row, (shard, start) in enumerate(windows[number * rows : (number + 1) * rows]):
                window = self.shards[shard][None, start : start + T + 1]  # shorter at the end
                n = window.shape[1] - 1
                x[row, :n], y[row, :n] = self.inputs_and_targets(window)
            yield number, torch.from_numpy(x), torch.from_numpy(y)


@dataclass
class Dataset:
    """A run's data set, and its fixed evaluation windows."""

    folder: Path
    meta: dict[str, Any]
    splits: dict[str, Split]  # "train" and "val"
    windows: dict[str, np.ndarray]  # of each split, (n, 2) from Split.eval_windows

    def describe(self) -> dict[str, Any]:
        """The entry for config.json."""
        tokenizer = self.meta["tokenizer"]["kind"]
        return {"folder": str(self.folder), "tokenizer": tokenizer, "splits": self.meta["splits"]}

    def end_of_text(self) -> int:
        """The id that divides documents. Raises UserError if the tokenizer has none."""
        end = from_description(self.meta["tokenizer"]).end_of_text
        if end is None:
            raise UserError(f"document_mask: the tokenizer of {self.folder} has no end of text between documents")
        return end

    @property
    def fingerprint(self) -> dict[str, Any]:
        """SHA-256 of each split, or its number of tokens: stored in checkpoints, to notice that the data changed."""
        recorded = self.meta["splits"]
        return {name: recorded.get(name, {}).get("sha256", split.tokens) for name, split in self.splits.items()}


def open_dataset(data_dir: str, dataset: str, block_size: int, eval_iters: int) -> Dataset:
    """Open a data set, with EVAL_BATCH * eval_iters evaluation windows; 0: the whole split. Raises UserError."""
    folder = find_dataset(data_dir, dataset)
    meta = read_meta(folder)
    splits = {name: Split(folder, name, block_size, meta) for name in ("train", "val")}
    windows = {"val": splits["val"].eval_windows(EVAL_BATCH * eval_iters)}
    # as many windows as for val, also if eval_iters=0 evaluates the whole of val
    windows["train"] = splits["train"].eval_windows(len(windows["val"]))
    return Dataset(folder, meta, splits, windows)


def padded_vocab_size(vocab_size: int) -> int:
    """The vocabulary size of a new model: above 1024, rounded up to a multiple of 64 for the tensor cores."""
    return 64 * math.ceil(vocab_size / 64) if vocab_size > 1024 else vocab_size


class MicroBatches:
    """One process's micro-batches, starting at sequence `first` of the run's order. One is always read ahead."""

    def __init__(self, split: Split, seed: int, first: int, batch_size: int, micro_steps: int, processes: Any):
        self.split, self.seed, self.device = split, seed, processes.device
        self.batch_size, self.micro_steps = batch_size, micro_steps  # sequences in each; micro-batches in a step
        self.place = first + processes.rank * batch_size  # first sequence of the micro-batch to read next
        self.stride = processes.world_size * batch_size
        self.read()

    def read(self) -> None:
        """Set `next` to x and y, (B, T) each, on the device. The copy from pinned memory overlaps with computing."""
        x, y = self.split.batch(self.seed, self.place, self.batch_size)
        if self.device.type == "cuda":
            x, y = x.pin_memory(), y.pin_memory()
        self.next = x.to(self.device, non_blocking=True), y.to(self.device, non_blocking=True)
        self.place += self.stride

    def first_sequences(self, steps: int) -> list[int]:
        """The first sequence of each micro-batch of a past step: 0 is the last step, -1 the one before."""
        start = self.place - self.stride + (steps - 1) * self.micro_steps * self.stride
        return [start + micro_step * self.stride for micro_step in range(self.micro_steps)]
