"""Checkpoints: one file with all that a run needs to go on, and a sampler to write. Reads nanoGPT's too.

Nothing but tensors and plain Python values goes in, and nothing in a file is run when it comes out (weights_only).
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
from pathlib import Path
from typing import Any, get_type_hints

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from kqv.cli import UserError
from kqv.rundir import snapshots

# what unpickling bytes that are not a checkpoint can raise
DAMAGE = (RuntimeError, EOFError, LookupError, TypeError, AttributeError, ValueError, AssertionError, struct.error)
DAMAGE += (ArithmeticError,)  # float(10**400)
SCALER = {"scale", "growth_factor", "backoff_factor", "growth_interval", "_growth_tracker"}  # GradScaler's state


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
    if keep_last:
        # one of a later iteration is not of this run's past: it was there before the run went back to an earlier state
        past = [path for iter_num, path in snapshots(out_dir).items() if iter_num <= checkpoint["iter_num"]]
        for old in past[keep_last:]:
            old.unlink()


def find(out_dir: Path) -> list[Path]:
    """The checkpoints there are, the last state first, then its predecessors. (Copying a folder loses their times.)"""
    return [path for path in (out_dir / "ckpt.pt", *snapshots(out_dir).values(), out_dir / "best.pt") if path.exists()]


def load_newest(out_dir: Path, say: Callable[[str], None]) -> dict[str, Any]:
    """The newest checkpoint that is whole, and a line for each newer one that is not. UserError: there is none."""
    for path in (found := find(out_dir)):
        try:
            return load(path)
        except UserError as error:
            if path == found[-1]:
                raise
            say(f"{error}; trying the one before it")
    raise UserError(f"no checkpoint {out_dir / 'ckpt.pt'}")


def load(path: Path, mmap: bool = False) -> dict[str, Any]:
    """Read a checkpoint onto the CPU; UserError in one line where it is none, is damaged, or would run code.

    Keys: "model" (weights of the bare model), "model_args", "config", "iter_num", "best_val_loss", and where the file
    has them "optimizer", "scaler", "tokenizer", ... With mmap, weights are read from the file when they are used.
    """
    if not path.is_file():
        raise UserError(f"no checkpoint {path}")
    try:  # what torch.save writes is a zip archive, and so has a checksum of each part
        with zipfile.ZipFile(path) as archive:
            # PyTorch packs nothing; its reader leaves memory as it was where a part is marked as a folder (DOS bit 4)
            odd = (part.filename for part in archive.infolist() if part.compress_type or part.external_attr & 0x10)
            damaged = next(odd, None) or archive.testzip()
    except (zipfile.BadZipFile, NotImplementedError, OSError, *DAMAGE):
        raise UserError(f"{path} is not a checkpoint, or is cut short") from None
    if damaged:
        raise UserError(f"{path} is damaged: the checksum of its part {damaged} is wrong, or it is packed")
    try:
        with warnings.catch_warnings():  # of pickle versions that torch does not write
            warnings.simplefilter("ignore")
            checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
        if not isinstance(checkpoint, dict):
            raise TypeError(f"{type(checkpoint).__name__} where a dict is due")
        weights = checkpoint["model"]
        plain = {
            "model_args": dict(checkpoint["model_args"]),
            "config": dict(checkpoint.get("config", {})),
            "iter_num": checkpoint["iter_num"],
            "best_val_loss": as_float(checkpoint["best_val_loss"]),
            "elapsed_seconds": as_float(checkpoint.get("elapsed_seconds", 0.0)),
        }
        check_loop(checkpoint | plain)
        # torch.compile's wrapper leaves a prefix in nanoGPT's files, its old attention a mask
        model = {
            name.removeprefix("_orig_mod."): tensor
            for name, tensor in weights.items()
            if not name.endswith(".attn.bias")
        }
        check_tensors(model)
        if not mmap:  # whoever maps the file does not want the moments
            for key, due in (("optimizer", {"step", "exp_avg", "exp_avg_sq"}), ("muon", {"momentum_buffer"})):
                for moments in (checkpoint.get(key) or {"state": {}})["state"].values():
                    check_tensors(moments)
                    if missing := due - moments.keys():
                        raise KeyError(f"the optimizer's {min(missing)}")
                    if key == "optimizer" and (moments["step"].numel() != 1 or moments["step"] < 0):
                        raise ValueError("the optimizer's step count is not a possible value")
                    if key == "optimizer" and (moments["exp_avg_sq"] < 0).any():
                        raise ValueError("the optimizer's average of squares cannot be negative")
    except pickle.UnpicklingError as error:
        named = re.search(r"GLOBAL:? (\S+)", str(error), re.IGNORECASE)
        reason = f"it would run code ({named[1]})" if named else "not a checkpoint, or cut short"
        raise UserError(f"{path} was not loaded: {reason}") from None
    except DAMAGE as error:
        detail = str(error).strip().split("\n")[0]
        raise UserError(f"{path} is damaged or not a checkpoint ({type(error).__name__}: {detail})") from None
    return checkpoint | plain | {"model": model}


def as_float(value: Any) -> float:
    if isinstance(value, str):  # float() would read it
        raise TypeError(f"{value[:20]!r} where a number is due")
    return float(value)  # nanoGPT's best_val_loss is a tensor


def check_loop(state: dict[str, Any]) -> None:
    """ValueError where the training loop cannot have saved this."""

    def is_count(value: Any, low: int = 0) -> bool:
        return type(value) is int and low <= value < 2**63

    recent = state.get("recent_losses", [])
    bad_steps, scaler = state.get("bad_steps", [0, 0, -1]), state.get("scaler") or {}
    sound = {
        "iter_num": is_count(state["iter_num"]),
        "sequences": is_count(state.get("sequences", 0)),
        "tokens": is_count(state.get("tokens", 0)),
        "best_val_loss": state["best_val_loss"] >= 0,  # nan is not
        "elapsed_seconds": 0 <= state["elapsed_seconds"] < math.inf,
        "val_loss": isinstance(state.get("val_loss", 0.0), float),  # nan before the first evaluation
        "evals_since_best": is_count(state.get("evals_since_best", 0)),
        "evaluated_iter": is_count(state.get("evaluated_iter", -1), low=-1),
        "bad_steps": isinstance(bad_steps, list) and len(bad_steps) == 3 and all(is_count(n, -1) for n in bad_steps),
        "recent_losses": isinstance(recent, list) and all(isinstance(n, float) and math.isfinite(n) for n in recent),
        "scaler": not scaler or (scaler.keys() == SCALER and all(0 <= as_float(n) < math.inf for n in scaler.values())),
        "tokenizer": isinstance(state.get("tokenizer", {}), dict),
        "wandb_id": isinstance(state.get("wandb_id"), str | None),
    }
    if wrong := [key for key, is_sound in sound.items() if not is_sound]:
        raise ValueError(f"its {wrong[0]} is not a possible value")


def check_tensors(tensors: dict[str, Any]) -> None:
    """ValueError where one is not a whole tensor of finite numbers in memory (but sparse, quantized, expanded, ...)."""
    for name, tensor in tensors.items():
        if not torch.is_tensor(tensor) or tensor.layout != torch.strided or tensor.device.type != "cpu":
            raise ValueError(f"{name} is not a tensor in memory")
        if not tensor.is_floating_point() or tensor.nbytes > tensor.untyped_storage().nbytes():
            raise ValueError(f"{name} is not made of {tensor.numel()} numbers")
        if not tensor.isfinite().all():
            raise ValueError(f"{name} holds numbers that are not all finite: the run had diverged")


def restore_model(saved: dict[str, Any], path: Path, model_class: type, config_class: type, **overrides: Any) -> Any:
    """The checkpoint's model, on the CPU, with `overrides` of its config that leave the weights alone (dropout)."""
    try:
        args, kinds = saved["model_args"], get_type_hints(config_class)
        for key, value in args.items():
            if not isinstance(value, kinds[key] | int) or value != value:  # an int is a float too, but nan is none
                raise TypeError(f"{key}={value!r}")
        weights = {name: tensor.float() for name, tensor in saved["model"].items()}  # if saved as 16 bits
        if args.get("n_layer", 0) > len(weights):  # so many empty layers would take for ever to make
            raise ValueError(f"n_layer={args['n_layer']} and {len(weights)} weights")
        return build_model(model_class, config_class(**args | overrides), weights)
    except DAMAGE as error:
        detail = " ".join(str(error).split())[:200]
        raise UserError(f"{path} is damaged: its weights are not those of its model_args ({detail})") from None


def build_model(model_class: type, config: Any, weights: dict[str, Tensor]) -> Any:
    """A model that takes `weights` (name -> tensor) as its own, without initialising or copying."""
    with torch.device("meta"), SkipInit():
        model = model_class(config)
    if config.tie_embeddings:
        weights = weights | {"lm_head.weight": weights["transformer.wte.weight"]}
    model.load_state_dict(weights, assign=True)
    if config.tie_embeddings:
        model.lm_head.weight = model.transformer.wte.weight
    return model


class SkipInit(TorchFunctionMode):
    """Leave weights as they are: those of "meta" hold nothing, and initialising them would import torch._dynamo."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if getattr(function, "__module__", None) == "torch.nn.init":
            return kwargs["tensor"] if kwargs and "tensor" in kwargs else args[0]
        return function(*args, **kwargs or {})
