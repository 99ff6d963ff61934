"""A run's folder: names of its files, its lock, moving an earlier run aside, reading metrics and config."""

import json
import os
import re
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from kqv.errors import UserError

LAST, BEST = "ckpt.pt", "best.pt"  # the last state; the one with the lowest validation loss
METRICS, CONFIG, PICTURE, BAD_BATCH = "metrics.jsonl", "config.json", "loss.png", "bad_batch.json"
MEASURED = ("train_eval_loss", "val_loss", "val_bpb")  # by an evaluation


def files_of_run(folder: Path) -> list[Path]:
    names = (LAST, BEST, METRICS, CONFIG, BAD_BATCH, PICTURE)
    return [*(path for name in names if (path := folder / name).exists()), *snapshots(folder).values()]


def snapshot_name(iter_num: int) -> str:
    return f"ckpt-{iter_num:08d}.pt"


def snapshots(folder: Path) -> dict[int, Path]:
    """The ckpt-ITERATION.pt files of --keep_last by iteration, the latest first. Other names are the user's."""
    matches = [(re.fullmatch(r"ckpt-(\d{8,})\.pt", path.name), path) for path in folder.glob("ckpt-*.pt")]
    return dict(sorted(((int(found[1]), path) for found, path in matches if found), reverse=True))


def checkpoints(folder: Path) -> list[Path]:
    """The existing checkpoints, the last state first. (Ordered by name: copying a folder can lose the file times.)"""
    return [path for path in (folder / LAST, *snapshots(folder).values(), folder / BEST) if path.exists()]


def last_iteration(folder: Path) -> int:
    """The last iteration that the folder's metrics.jsonl records; -1 if it has none."""
    path = folder / METRICS
    records, _ = read_metrics(path) if path.is_file() else ([], [])
    return max((record["iter"] for record in records), default=-1)


def put_aside(out_dir: Path) -> Path | None:
    """Move an earlier run's files to out_dir/previous, and return that folder; None if there is no earlier run.

    Replaces previous/ unless that holds a longer run; then previous-2 is used, and so on.
    """
    found = files_of_run(out_dir)
    if not any(path.suffix == ".pt" for path in found):
        return None
    previous, number, reached = out_dir / "previous", 1, last_iteration(out_dir)
    while last_iteration(previous) > reached:
        number += 1
        previous = out_dir / f"previous-{number}"
    previous.mkdir(exist_ok=True)
    for path in files_of_run(previous):
        path.unlink()
    for path in found:
        path.rename(previous / path.name)
    return previous


def check_folder(out_dir: Path) -> None:
    """Raise UserError if out_dir, or a part of its path, is a file."""
    for path in (out_dir, *out_dir.parents):
        if path.exists():
            if not path.is_dir():
                raise UserError(f"out_dir={str(out_dir)!r}: {path} is a file, not a folder")
            return


def hold(out_dir: Path) -> IO:
    """Make the folder and lock it until the returned file is closed. Raises UserError if another run holds the lock."""
    out_dir.mkdir(parents=True, exist_ok=True)
    file = (out_dir / ".lock").open("w", encoding="utf-8")
    try:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(f"{out_dir} is in use: another run is writing to it") from None
    except (ImportError, OSError):  # Windows, and file systems without locks
        pass
    return file


# -- reading what a run recorded ---------------------------------------------------------------------------------------


@dataclass
class RunRecord:
    """What a run recorded: the lines of its metrics.jsonl, at least one, and its config.json."""

    name: str
    records: list[dict[str, Any]]
    recorded: dict[str, Any]
    damaged: list[int]  # line numbers in metrics.jsonl that were ignored

    def having(self, key: str) -> list[dict[str, Any]]:
        """The records in which `key` was measured."""
        return [record for record in self.records if record.get(key) is not None]

    def best(self) -> dict[str, Any] | None:
        """The record with the lowest validation loss, the first of equals; None before the first evaluation."""
        return min(self.having("val_loss"), key=lambda record: record["val_loss"], default=None)


def read_run(path: Path) -> RunRecord:
    """The record in a run's folder, or in a file with the lines that train.py, ours or nanoGPT's, printed.

    Raises UserError if there is no record, or if config.json is damaged.
    """
    if path.is_file():
        return RunRecord(printable(str(path)), read_printed_lines(path), {}, [])
    metrics = path / METRICS
    if not path.is_dir():
        raise UserError(f"no folder {path}")
    if not metrics.is_file():
        raise UserError(f"{path} has no {METRICS}, so it is not the out_dir of a run")
    records, damaged = read_metrics(metrics)
    if not records:
        raise UserError(f"{metrics}: no iteration is recorded yet")
    return RunRecord(printable(str(path)), records, read_config(path / CONFIG), damaged)


def printable(text: str) -> str:
    """`text` without control characters, which could change a terminal, and without half surrogate pairs."""
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)


def read_printed_lines(path: Path) -> list[dict[str, Any]]:
    """Records from lines as nanoGPT prints them; the training clock is the sum of the iterations' times."""
    records, elapsed, before = {}, 0.0, -1
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        if step := re.match(r"step (\d+): train loss ([\d.]+), val loss ([\d.]+)", line):
            record = records.setdefault(int(step[1]), {"iter": int(step[1]), "elapsed_seconds": elapsed})
            record |= {"train_eval_loss": float(step[2]), "val_loss": float(step[3])}
        elif step := re.match(r"iter (\d+): loss ([\d.]+), time ([\d.]+)ms", line):
            iter_num, seconds = int(step[1]), float(step[3]) / 1000
            began = elapsed + seconds * (iter_num - before - 1)  # iterations without a line took as long
            record = records.setdefault(iter_num, {"iter": iter_num})
            record |= {"elapsed_seconds": began, "train_loss": float(step[2])}
            elapsed, before = began + seconds, iter_num
    if not records:
        raise UserError(f"{path}: no lines as train.py prints them, and not a folder")
    return [records[iter_num] for iter_num in sorted(records)]


def is_record(value: Any) -> bool:
    """Whether a line of metrics.jsonl holds one iteration's numbers; all but the first three may be null or absent."""
    if not isinstance(value, dict):
        return False
    numbers = [value.get(key) for key in ("iter", "tokens", "elapsed_seconds")]
    numbers += [value[key] for key in ("tokens_per_second", "train_loss", *MEASURED) if value.get(key) is not None]
    return all(isinstance(number, (int, float)) and abs(number) < 1e300 for number in numbers)  # not inf, not nan


def read_metrics(path: Path) -> tuple[list[dict[str, Any]], list[int]]:
    """The records, and the numbers of damaged lines. An incomplete last line, which a kill leaves, is ignored."""
    records, damaged = [], []
    *lines, _ = path.read_text(encoding="utf-8", errors="replace").split("\n")
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            record = None
        if is_record(record):
            records.append(record)
        else:
            damaged.append(number)
    return records, damaged


def read_config(path: Path) -> dict[str, Any]:
    """A run's config.json; empty if there is none. Raises UserError if it is damaged."""
    try:
        contents = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: damaged ({error})") from None
    kinds = {"config": dict, "environment": dict, "earlier": list, "parameters": int}
    if not isinstance(contents, dict) or any(
        not isinstance(contents.get(k, kind()), kind) for k, kind in kinds.items()
    ):
        raise UserError(f"{path}: damaged (not what train.py writes)")
    return contents


def write_whole(path: Path, contents: str | bytes) -> None:
    """Write a small file atomically: on failure raises OSError and leaves the previous file intact."""
    new = path.with_name(path.name + ".new")
    try:
        with new.open("wb") as file:
            file.write(contents.encode("utf-8") if isinstance(contents, str) else contents)
            file.flush()
            os.fsync(file.fileno())
        new.replace(path)
    except OSError as error:
        with suppress(OSError):
            new.unlink()
        raise OSError(error.errno, error.strerror, str(path)) from error
