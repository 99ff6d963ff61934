"""Token files -> batches to train on and windows to evaluate on. No other room reads .bin files.

A data set is a folder with train.bin, val.bin (raw little-endian token ids) and meta.json, as prepare/ writes them, or
nanoGPT's (meta.pkl or no meta at all), or llm.c's and modded-nanogpt's shards (*train*.bin, *val*.bin with a header).
"""

import hashlib
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from kqv import ROOT
from kqv.errors import UserError
from kqv.tokenizer import from_description, read_meta_pkl

if TYPE_CHECKING:
    from torch import Tensor

EVAL_BATCH = 12  # windows for each of eval_iters: nanoGPT's batch_size, so that ours does not change what is measured
EVAL_TOKENS = 4096  # tokens of one evaluation forward: fixed, so that rounding cannot depend on batch_size
SHARD_MAGIC, SHARD_VERSION, SHARD_HEADER = 20240520, 1, 256  # llm.c: 256 int32, the third is the number of tokens
VERIFY_BYTES = 2**27  # files up to this size are read whole and checked when they are opened, a tenth of a second


def find_dataset(data_dir: str, dataset: str) -> Path:
    """The folder of a data set: in data_dir from here, or else beside the code. UserError says how to make it."""
    for folder in (Path(data_dir) / dataset, ROOT / data_dir / dataset):
        if folder.is_dir():
            return folder
    own = f"python prepare/{dataset}.py"
    command = (
        own
        if (ROOT / "prepare" / f"{dataset}.py").is_file()
        else f"python prepare/text.py --name={dataset} --input=..."
    )
    raise UserError(f"dataset={dataset!r}: no folder {Path(data_dir) / dataset}; make it with: {command}")


def read_meta(folder: Path) -> dict:
    """What a data set says of itself: "tokenizer", "vocab_size", "dtype", and "splits", empty if it says nothing.

    Without meta.json, meta.pkl (nanoGPT's characters) is read; without both the tokens are taken for GPT-2's.
    """
    if (folder / "meta.json").exists():
        path = folder / "meta.json"
        try:
            meta = json.loads(path.read_text(encoding="utf-8"))
            whole = isinstance(meta["tokenizer"], dict) and isinstance(meta["vocab_size"], int)
            counts = [split[key] for split in meta["splits"].values() for key in ("tokens", "bytes")]
            whole = whole and meta["dtype"] in ("uint16", "uint32") and set(meta["splits"]) in ({"train", "val"}, set())
            whole = whole and all(type(n) is int and 0 <= n < 2**63 for n in counts)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise UserError(f"{path} is damaged ({type(error).__name__}: {error}); prepare the data again") from None
        if not whole:
            raise UserError(f"{path} is damaged: not the description of a data set; prepare the data again")
        gpt2 = meta["tokenizer"] == {"kind": "gpt2"}  # from_description might have to download it
        try:
            vocab_size = 50257 if gpt2 else from_description(meta["tokenizer"]).vocab_size
        except UserError as error:
            raise UserError(f"{path} is damaged: {error}") from None
        if meta["vocab_size"] != vocab_size:
            raise UserError(f"{path} is damaged: vocab_size {meta['vocab_size']} is not its tokenizer's")
        return meta
    tokenizer, vocab_size = {"kind": "gpt2"}, 50257
    if (folder / "meta.pkl").exists():
        tokenizer = read_meta_pkl(folder / "meta.pkl")
        vocab_size = len(tokenizer["chars"])
    return {"tokenizer": tokenizer, "vocab_size": vocab_size, "dtype": "uint16", "splits": {}}


def open_tokens(path: Path, dtype: str, stated: dict | None, vocab_size: int) -> np.ndarray:
    """Memory-map the ids of one file, (n,). Raises UserError if they are not what the file or its meta.json states."""
    size = path.stat().st_size
    header = np.fromfile(path, dtype="<i4", count=3)
    magic, version, n = map(int, header) if len(header) == 3 else (0, 0, 0)
    fits = version == SHARD_VERSION and size == 4 * SHARD_HEADER + 2 * n  # also if the magic number is damaged
    if magic == SHARD_MAGIC or fits:
        offset, dtype = 4 * SHARD_HEADER, "uint16"
        if magic != SHARD_MAGIC or not fits:
            raise UserError(
                f"{path} is damaged: magic number {magic}, version {version}, {size} bytes, and its header states "
                f"{n} tokens"
            )
    else:
        n, offset = size // np.dtype(dtype).itemsize, 0
        if size % np.dtype(dtype).itemsize:
            raise UserError(f"{path} is damaged: {size} bytes are not a whole number of {dtype} ids")
        if stated and n != stated["tokens"]:
            raise UserError(f"{path} is damaged: {n:,} tokens where meta.json states {stated['tokens']:,}")
    if n < 2:
        raise UserError(f"{path} has {n} tokens: nothing to learn from")
    tokens = np.memmap(path, dtype=np.dtype(dtype).newbyteorder("<"), mode="r", offset=offset, shape=(n,))
    if size <= VERIFY_BYTES:
        if stated and "sha256" in stated and hashlib.sha256(tokens).hexdigest() != stated["sha256"]:
            raise UserError(f"{path} is damaged: its SHA-256 is not the one in meta.json; prepare the data again")
        check_ids(tokens, vocab_size, path)
    return tokens


def check_ids(tokens: np.ndarray, vocab_size: int, path: Path) -> None:
    if (largest := int(tokens.max())) >= vocab_size:
        raise UserError(
            f"{path} has the id {largest}, beyond the vocabulary of {vocab_size}: made for another tokenizer?"
        )


class Split:
    """The tokens of "train" or "val", cut into windows of block_size = T inputs and their T targets, one further on."""

    def __init__(self, folder: Path, name: str, block_size: int, meta: dict):
        paths = [folder / f"{name}.bin"]
        if not paths[0].is_file():
            paths = sorted(folder.glob(f"*{name}*.bin"))
        if not paths:
            raise UserError(f"{folder} has no {name}.bin")
        self.block_size, self.vocab_size, self.path = block_size, meta["vocab_size"], folder / f"{name}.bin"
        stated = meta["splits"].get(name)
        self.shards = [open_tokens(path, meta["dtype"], stated, self.vocab_size) for path in paths]
        self.tokens = sum(len(shard) for shard in self.shards)
        self.bytes = stated["bytes"] if stated else None
        for path, shard in zip(paths, self.shards, strict=True):  # a window reads T + 1 tokens
            if len(shard) <= block_size:
                raise UserError(
                    f"block_size={block_size}: {path} has {len(shard):,} tokens and must have more; "
                    f"the longest block_size that fits is {len(shard) - 1}"
                )
        self.windows = np.array([max(1, (len(shard) - block_size) // block_size) for shard in self.shards])
        self.epoch = lru_cache(maxsize=2)(self._epoch)

    def _epoch(self, seed: int, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The order of one epoch's windows, and where the first window of each shard starts."""
        random = np.random.default_rng((seed, epoch))
        slack = [len(shard) - 1 - n * self.block_size for shard, n in zip(self.shards, self.windows, strict=True)]
        # each epoch shifts the cuts, so that windows do not always begin at the same places
        starts = random.integers(np.minimum(slack, self.block_size - 1) + 1)
        return random.permutation(np.arange(self.windows.sum(), dtype=np.uint32)), starts

    def batch(self, seed: int, first: int, batch_size: int) -> "tuple[Tensor, Tensor]":
        """Sequences first ... first + batch_size - 1 of the run's endless order: x and y, (B, T) int64 each.

        The order depends on the seed alone: every epoch has each window once, in an order of its own. Whoever asks
        for disjoint stretches (each step, micro-step, rank) gets disjoint windows, and resuming replays nothing.
        """
        import torch  # here, so that prepare/ need not wait for it

        T, bounds = self.block_size, self.windows.cumsum()
        total = int(bounds[-1])
        tokens = np.empty((batch_size, T + 1), dtype=np.int64)  # if memory is too small for it, that shows at once
        places = np.arange(first, first + batch_size)
        for epoch in range(first // total, (first + batch_size - 1) // total + 1):
            order, offsets = self.epoch(seed, epoch)
            rows = np.flatnonzero(places // total == epoch)
            windows = order[places[rows] % total].astype(np.int64)
            shards = np.searchsorted(bounds, windows, side="right")
            starts = offsets[shards] + (windows - (bounds - self.windows)[shards]) * T
            for shard in np.unique(shards):
                there = shards == shard
                tokens[rows[there]] = self.shards[shard][starts[there, None] + np.arange(T + 1)]
        check_ids(tokens, self.vocab_size, self.path)
        tokens = torch.from_numpy(tokens)
        return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()

    def eval_windows(self, limit: int = 0) -> np.ndarray:
        """(n, 2): shard and start of windows side by side over the whole split, or `limit` of them, evenly spaced."""
        bounds = np.cumsum([-(-(len(shard) - 1) // self.block_size) for shard in self.shards])
        n = min(limit or int(bounds[-1]), int(bounds[-1]))
        windows = np.arange(n) * int(bounds[-1]) // n
        shards = np.searchsorted(bounds, windows, side="right")
        return np.stack((shards, (windows - np.append(0, bounds)[shards]) * self.block_size), axis=1)

    def eval_batches(
        self, windows: np.ndarray, rank: int = 0, world_size: int = 1
    ) -> "Iterator[tuple[int, Tensor, Tensor]]":
        """This rank's share of the evaluation: (number of the batch, x, y), all of one shape; y is -1 past the end.

        Every rank gets as many, as FSDP wants, so the last can lie past the end as a whole.
        """
        import torch

        rows, T = max(1, min(EVAL_TOKENS // self.block_size, len(windows))), self.block_size
        batches = -(-len(windows) // rows)
        for number in range(rank, world_size * -(-batches // world_size), world_size):
            tokens = np.full((rows, T + 1), -1, dtype=np.int64)
            for row, (shard, start) in zip(tokens, windows[number * rows : (number + 1) * rows], strict=False):
                window = self.shards[shard][start : start + T + 1]
                row[: len(window)] = window
            check_ids(tokens, self.vocab_size, self.path)
            tokens = torch.from_numpy(tokens)
            yield number, tokens[:, :-1].clamp(min=0), tokens[:, 1:]


@dataclass
class Dataset:
    """The data set of a run, and the fixed windows on which it evaluates."""

    folder: Path
    meta: dict[str, Any]
    splits: dict[str, Split]  # train and val
    windows: dict[str, np.ndarray]

    def describe(self) -> dict[str, Any]:
        """What config.json says of the data."""
        tokenizer = self.meta["tokenizer"]["kind"]
        return {"folder": str(self.folder), "tokenizer": tokenizer, "splits": self.meta["splits"]}

    @property
    def fingerprint(self) -> dict[str, Any]:
        """What a checkpoint remembers of the data, to notice if they change."""
        stated = self.meta["splits"]
        return {name: stated.get(name, {}).get("sha256", split.tokens) for name, split in self.splits.items()}


def open_dataset(data_dir: str, dataset: str, block_size: int, eval_iters: int) -> Dataset:
    """The data set DATA_DIR/DATASET, with eval_iters batches of evaluation windows; 0: windows over the whole split."""
    folder = find_dataset(data_dir, dataset)
    meta = read_meta(folder)
    splits = {name: Split(folder, name, block_size, meta) for name in ("train", "val")}
    windows = {"val": splits["val"].eval_windows(EVAL_BATCH * eval_iters)}
    # train loss is measured on as many windows as val loss, also if eval_iters=0 asks for the whole of val
    windows["train"] = splits["train"].eval_windows(len(windows["val"]))
    return Dataset(folder, meta, splits, windows)


def padded_vocab_size(vocab_size: int) -> int:
    """The vocabulary of a new model: rounded up to a multiple of 64, for the tensor cores, where that adds little."""
    return 64 * math.ceil(vocab_size / 64) if vocab_size > 1024 else vocab_size


class MicroBatches:
    """One process's micro-batches, from sequence `first` of the run's order on; the next is read ahead of its use."""

    def __init__(self, split: Split, seed: int, first: int, batch_size: int, micro_steps: int, processes: Any):
        self.split, self.seed, self.device = split, seed, processes.device
        self.batch_size, self.micro_steps = batch_size, micro_steps  # sequences of one; how many of them in a step
        self.place = first + processes.rank * batch_size  # of the first sequence of the one to be read
        self.stride = processes.world_size * batch_size
        self.read()

    def read(self) -> None:
        """Make `next`, x and y (B, T) each, on the device; pinned memory is copied while a GPU computes."""
        x, y = self.split.batch(self.seed, self.place, self.batch_size)
        if self.device.type == "cuda":
            x, y = x.pin_memory(), y.pin_memory()
        self.next = x.to(self.device, non_blocking=True), y.to(self.device, non_blocking=True)
        self.place += self.stride

    def first_sequences(self, steps: int) -> list[int]:
        """The first sequence of each micro-batch of the step just done, or of the one `steps` (at most 0) from it."""
        start = self.place - self.stride + (steps - 1) * self.micro_steps * self.stride
        return [start + micro_step * self.stride for micro_step in range(self.micro_steps)]
