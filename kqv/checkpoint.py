"""Checkpoints: one file with everything to resume a run or to sample from it. Reads nanoGPT's files too.

A file holds tensors and plain Python values only. Loading it executes nothing (weights_only).
"""

import contextlib
import math
import os
import pickle
import re
import shutil
import struct
import warnings
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, BinaryIO

import torch

from kqv.errors import UserError
from kqv.machine import utc_now
from kqv.rundir import BEST, LAST, checkpoints, snapshot_name, snapshots

# errors that unpickling a damaged file can raise
DAMAGE = (RuntimeError, EOFError, LookupError, TypeError, AttributeError, ValueError, AssertionError, struct.error)
DAMAGE += (ArithmeticError,)  # float(10**400)
SCALER = {"scale", "growth_factor", "backoff_factor", "growth_interval", "_growth_tracker"}  # GradScaler's state
MOMENTS = {"optimizer": {"step", "exp_avg", "exp_avg_sq"}, "muon": {"momentum_buffer"}}  # of AdamW, of Muon


@dataclass
class LoopState:
    """State of the training loop besides weights and optimizers; a checkpoint holds each field under its name."""

    iter_num: int = 0  # updates that the weights have had
    sequences: int = 0  # sequences consumed, which is also the place of the next one in the run's order
    tokens: int = 0  # tokens consumed
    elapsed_seconds: float = 0.0  # of the training clock
    val_loss: float = math.nan  # of the last evaluation
    best_val_loss: float = math.inf
    evals_since_best: int = 0  # compared with patience
    evaluated_iter: int = -1  # of the last evaluation that was counted, which a resumed run repeats
    bad_steps: list[int] = field(default_factory=lambda: [0, 0, -1])  # the fields of bad_steps.Skipped
    recent_losses: list[float] = field(default_factory=list)
    wandb_id: str | None = None

    @classmethod
    def from_checkpoint(cls, saved: dict[str, Any], sequences_per_iter: int, tokens_per_iter: int) -> "LoopState":
        """The saved state. Counts that nanoGPT's and older files lack are computed from iter_num."""
        iter_num = saved["iter_num"]
        counted = {"sequences": iter_num * sequences_per_iter, "tokens": iter_num * tokens_per_iter}
        counted["val_loss"] = saved["best_val_loss"]
        return cls(**counted | {entry.name: saved[entry.name] for entry in fields(cls) if entry.name in saved})

    def progress(self, elapsed_seconds: float) -> dict[str, Any]:
        """The first entries of a line of metrics.jsonl."""
        return {"iter": self.iter_num, "time": utc_now(), "elapsed_seconds": elapsed_seconds, "tokens": self.tokens}

    def evaluated(self, val_loss: float) -> bool:
        """Record an evaluation; returns whether it is the best so far."""
        improved = val_loss < self.best_val_loss
        self.val_loss, self.best_val_loss = val_loss, min(val_loss, self.best_val_loss)
        if self.iter_num != self.evaluated_iter:  # else it was counted before the run was resumed
            self.evals_since_best = 0 if improved else self.evals_since_best + 1
        self.evaluated_iter = self.iter_num
        return improved

    def forget_best(self) -> None:
        """Reset best loss and patience: losses on other data, or with another context, cannot be compared."""
        self.best_val_loss, self.evals_since_best, self.evaluated_iter, self.recent_losses = math.inf, 0, -1, []


# -- saving ------------------------------------------------------------------------------------------------------------


class ErrorKeeper:
    """A file that keeps the OSError of a failed write, because torch.save raises a RuntimeError without the reason."""

    def __init__(self, file: BinaryIO):
        self.file, self.error = file, None

    def write(self, data: Any) -> int:
        try:
            return self.file.write(data)
        except OSError as error:
            self.error = error
            raise

    def flush(self) -> None:
        self.file.flush()


def save(checkpoint: dict[str, Any], out_dir: Path, best: bool, keep_last: int = 0) -> None:
    """Write out_dir/ckpt.pt; if `best` the same as best.pt, and if keep_last as ckpt-ITERATION.pt.

    Atomic: on failure raises OSError and leaves the previous files intact. The new file is fsynced, then renamed.
    """
    new = out_dir / f"{LAST}.new"
    names = [BEST] * best + [snapshot_name(checkpoint["iter_num"])] * (keep_last > 0)
    try:
        with new.open("wb") as file:
            writer = ErrorKeeper(file)
            try:
                torch.save(checkpoint, writer)
            except (RuntimeError, OSError) as error:
                reason = writer.error or OSError(str(error).splitlines()[0])
                raise OSError(f"could not write {new}: {reason.strerror or reason}") from error
            file.flush()
            os.fsync(file.fileno())
        for name in names:
            twin = out_dir / f"{name}.new"
            twin.unlink(missing_ok=True)
            try:
                os.link(new, twin)  # all names share one copy on the disk
            except OSError:  # a file system without hard links
                shutil.copyfile(new, twin)
            twin.replace(out_dir / name)
        new.replace(out_dir / LAST)
    finally:
        with contextlib.suppress(OSError):
            new.unlink(missing_ok=True)
    if keep_last:
        # snapshots of later iterations stay: they are from before the run was resumed from an earlier state
        past = [path for iter_num, path in snapshots(out_dir).items() if iter_num <= checkpoint["iter_num"]]
        for old in past[keep_last:]:
            old.unlink()


# -- loading -----------------------------------------------------------------------------------------------------------


def load_newest(out_dir: Path, say: Callable[[str], None]) -> dict[str, Any]:
    """The newest checkpoint that is not damaged; each damaged one gets a line. Raises UserError if there is none."""
    for path in (found := checkpoints(out_dir)):
        try:
            return load(path)
        except UserError as error:
            if path == found[-1]:
                raise
            say(f"{error}; trying the one before it")
    raise UserError(f"no checkpoint {out_dir / LAST}")


def load(path: Path, mmap: bool = False) -> dict[str, Any]:
    """Read a checkpoint onto the CPU. Raises UserError if it is damaged, no checkpoint, or would run code.

    Keys: "model" (weights of the bare model), "model_args", "config", "iter_num", "best_val_loss", and if the file has
    them "optimizer", "scaler", "tokenizer", ... With mmap, a weight is read from the file when it is used.
    """
    if not path.is_file():
        raise UserError(f"no checkpoint {path}")
    check_archive(path)
    try:
        with warnings.catch_warnings():  # about pickle protocols that torch does not write
            warnings.simplefilter("ignore")
            checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
        if not isinstance(checkpoint, dict):
            raise TypeError(f"{type(checkpoint).__name__} instead of a dict")
        # nanoGPT's files may have the prefix of torch.compile's wrapper, and the mask of its slow attention
        weights = {
            name.removeprefix("_orig_mod."): tensor
            for name, tensor in checkpoint["model"].items()
            if not name.endswith(".attn.bias")
        }
        checkpoint |= {
            "model": weights,
            "model_args": dict(checkpoint["model_args"]),
            "config": dict(checkpoint.get("config", {})),
            "best_val_loss": as_float(checkpoint["best_val_loss"]),
            "elapsed_seconds": as_float(checkpoint.get("elapsed_seconds", 0.0)),
        }
        check_loop(checkpoint)
        check_tensors(weights)
        if not mmap:  # else the moments are not used, and checking would read them
            check_moments(checkpoint)
    except pickle.UnpicklingError as error:
        named = re.search(r"GLOBAL:? (\S+)", str(error), re.IGNORECASE)
        reason = f"it would run code ({named[1]})" if named else "not a checkpoint, or cut short"
        raise UserError(f"{path} was not loaded: {reason}") from None
    except DAMAGE as error:
        detail = str(error).strip().split("\n")[0]
        raise UserError(f"{path} is damaged or not a checkpoint ({type(error).__name__}: {detail})") from None
    return checkpoint


def check_archive(path: Path) -> None:
    """Raise UserError if the file is not a zip archive, as torch.save writes, or if a checksum is wrong."""
    try:
        with zipfile.ZipFile(path) as archive:
            # PyTorch compresses nothing. Its reader leaves memory unset if a part is marked as a folder (DOS bit 4)
            odd = (part.filename for part in archive.infolist() if part.compress_type or part.external_attr & 0x10)
            damaged = next(odd, None) or archive.testzip()
    except (zipfile.BadZipFile, NotImplementedError, OSError, *DAMAGE):
        raise UserError(f"{path} is not a checkpoint, or is cut short") from None
    if damaged:
        raise UserError(f"{path} is damaged: the checksum of its part {damaged} is wrong, or it is compressed")


def as_float(value: Any) -> float:
    if isinstance(value, str):  # float() would read it
        raise TypeError(f"{value[:20]!r} instead of a number")
    return float(value)  # nanoGPT's best_val_loss is a tensor


def check_loop(checkpoint: dict[str, Any]) -> None:
    """Raise ValueError if the training loop cannot have saved these values."""

    def is_count(value: Any, low: int = 0) -> bool:
        return type(value) is int and low <= value < 2**63

    state = LoopState.from_checkpoint(checkpoint, 0, 0)
    scaler = checkpoint.get("scaler") or {}
    possible = {
        "iter_num": is_count(state.iter_num),
        "sequences": is_count(state.sequences),
        "tokens": is_count(state.tokens),
        "best_val_loss": state.best_val_loss >= 0,  # nan is not
        "elapsed_seconds": 0 <= state.elapsed_seconds < math.inf,
        "val_loss": isinstance(state.val_loss, float),  # nan before the first evaluation
        "evals_since_best": is_count(state.evals_since_best),
        "evaluated_iter": is_count(state.evaluated_iter, low=-1),
        "bad_steps": isinstance(state.bad_steps, list) and [is_count(n, -1) for n in state.bad_steps] == [True] * 3,
        "recent_losses": isinstance(state.recent_losses, list)
        and all(isinstance(n, float) and math.isfinite(n) for n in state.recent_losses),
        "scaler": not scaler or (scaler.keys() == SCALER and all(0 <= as_float(n) < math.inf for n in scaler.values())),
        "tokenizer": isinstance(checkpoint.get("tokenizer", {}), dict),
        "wandb_id": isinstance(state.wandb_id, str | None),
    }
    if wrong := [key for key, is_possible in possible.items() if not is_possible]:
        raise ValueError(f"its {wrong[0]} is not a possible value")


def check_tensors(tensors: dict[str, Any]) -> None:
    """Raise ValueError if one is not a dense tensor of finite numbers, but sparse, quantized, expanded, ..."""
    for name, tensor in tensors.items():
        if not torch.is_tensor(tensor) or tensor.layout != torch.strided or tensor.device.type != "cpu":
            raise ValueError(f"{name} is not a tensor in memory")
        if not tensor.is_floating_point() or tensor.nbytes > tensor.untyped_storage().nbytes():
            raise ValueError(f"{name} is not made of {tensor.numel()} numbers")
        if not tensor.isfinite().all():
            raise ValueError(f"{name} holds numbers that are not all finite: the run had diverged")


def check_moments(checkpoint: dict[str, Any]) -> None:
    """Raise KeyError or ValueError if AdamW and Muon cannot have saved these states."""
    for key, names in MOMENTS.items():
        for moments in (checkpoint.get(key) or {"state": {}})["state"].values():
            check_tensors(moments)
            if missing := names - moments.keys():
                raise KeyError(f"the optimizer's {min(missing)}")
            if "step" in names and (moments["step"].numel() != 1 or moments["step"] < 0):
                raise ValueError("the optimizer's step count is not a possible value")
            if "exp_avg_sq" in names and (moments["exp_avg_sq"] < 0).any():
                raise ValueError("the optimizer's average of squares cannot be negative")
