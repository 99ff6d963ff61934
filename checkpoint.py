"""Checkpoints: one file with all that a run needs to go on, and a sampler to write. Reads nanoGPT's too.

Nothing but tensors and plain Python values goes in, and nothing in a file is run when it comes out (weights_only).
"""

import contextlib
import os
import pickle
import re
import shutil
import struct
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from model import GPT, GPTConfig

# what unpickling bytes that are not a checkpoint can raise
DAMAGE = (RuntimeError, EOFError, LookupError, TypeError, AttributeError, ValueError, AssertionError, struct.error)


def save(checkpoint: dict[str, Any], out_dir: Path, best: bool, keep_last: int = 0) -> None:
    """Write out_dir/ckpt.pt, and the same as best.pt where it is the best so far, and as ckpt-ITERATION.pt where the
    last few are kept. Whole or not at all: OSError where it could not be written, and what there was is still there.

    The new file takes the old one's place in one rename, after its bytes have reached the disk.
    """
    new = out_dir / "ckpt.pt.new"
    names = ["best.pt"] * best + [f"ckpt-{checkpoint['iter_num']:08d}.pt"] * (keep_last > 0)
    try:
        with new.open("wb") as file:
            try:
                torch.save(checkpoint, file)
            except RuntimeError as error:  # torch's writer does not say why: the disk is full, or a quota is
                raise OSError(f"could not write {new}: {str(error).splitlines()[0]}") from error
            file.flush()
            os.fsync(file.fileno())
        for name in names:
            twin = out_dir / f"{name}.new"
            twin.unlink(missing_ok=True)
            try:
                os.link(new, twin)  # one copy on the disk serves all names
            except OSError:  # a file system without hard links
                shutil.copyfile(new, twin)
            twin.replace(out_dir / name)
        new.replace(out_dir / "ckpt.pt")
    finally:
        with contextlib.suppress(OSError):
            new.unlink(missing_ok=True)
    for old in sorted(out_dir.glob("ckpt-*.pt"))[:-keep_last] if keep_last else []:
        old.unlink()


def find(out_dir: Path) -> list[Path]:
    """The checkpoints there are, those last written first."""
    found = [path for pattern in ("ckpt.pt", "ckpt-*.pt", "best.pt") for path in out_dir.glob(pattern)]
    return sorted(found, key=lambda path: path.stat().st_mtime_ns, reverse=True)  # stable: ckpt.pt before its twins


def load_newest(out_dir: Path, say: Callable[[str], None]) -> dict[str, Any]:
    """The newest checkpoint that is whole, and a line for each newer one that is not. ValueError: there is none."""
    for path in (found := find(out_dir)):
        try:
            return load(path)
        except ValueError as error:
            if path == found[-1]:
                raise
            say(f"{error}; trying the one before it")
    raise ValueError(f"no checkpoint {out_dir / 'ckpt.pt'}")


def load(path: Path, mmap: bool = False) -> dict[str, Any]:
    """Read a checkpoint onto the CPU; ValueError in one line where it is none, is damaged, or would run code.

    Keys: "model" (weights of the bare model), "model_args", "config", "iter_num", "best_val_loss", and where the file
    has them "optimizer", "scaler", "tokenizer", ... With mmap, weights are read from the file when they are used.
    """
    if not path.is_file():
        raise ValueError(f"no checkpoint {path}")
    try:  # what torch.save writes is a zip archive, and so has a checksum of each part
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
    except (zipfile.BadZipFile, NotImplementedError, OSError, *DAMAGE):
        raise ValueError(f"{path} is not a checkpoint, or is cut short") from None
    if damaged:
        raise ValueError(f"{path} is damaged: the checksum of its part {damaged} is wrong")
    try:
        with warnings.catch_warnings():  # of pickle versions that torch does not write
            warnings.simplefilter("ignore")
            checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
        weights = checkpoint["model"]
        plain = {
            "model_args": dict(checkpoint["model_args"]),
            "config": dict(checkpoint.get("config", {})),
            "iter_num": int(checkpoint["iter_num"]),
            "best_val_loss": float(checkpoint["best_val_loss"]),
            "elapsed_seconds": float(checkpoint.get("elapsed_seconds", 0.0)),
        }
        if plain["iter_num"] < 0:
            raise ValueError(f"iter_num {plain['iter_num']}")
        # torch.compile's wrapper leaves a prefix in nanoGPT's files, its old attention a mask
        model = {
            name.removeprefix("_orig_mod."): tensor
            for name, tensor in weights.items()
            if not name.endswith(".attn.bias")
        }
    except pickle.UnpicklingError as error:
        named = re.search(r"GLOBAL:? (\S+)", str(error), re.IGNORECASE)
        reason = f"it would run code ({named[1]})" if named else "not a checkpoint, or cut short"
        raise ValueError(f"{path} was not loaded: {reason}") from None
    except DAMAGE as error:
        detail = str(error).strip().split("\n")[0]
        raise ValueError(f"{path} is damaged or not a checkpoint ({type(error).__name__}: {detail})") from None
    if not all(torch.is_tensor(tensor) and tensor.layout == torch.strided for tensor in model.values()):
        raise ValueError(f"{path} is damaged: not all of its weights are tensors")
    return checkpoint | plain | {"model": model}


def build_model(checkpoint: dict[str, Any], path: Path, **overrides: Any) -> GPT:
    """The checkpoint's model, on the CPU, with `overrides` of its GPTConfig that leave the weights alone (dropout)."""
    try:
        return GPT.from_weights(GPTConfig(**checkpoint["model_args"] | overrides), checkpoint["model"])
    except DAMAGE as error:
        detail = " ".join(str(error).split())[:200]
        raise ValueError(f"{path} is damaged: its weights are not those of its model_args ({detail})") from None
