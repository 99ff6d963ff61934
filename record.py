"""What a run says while it works: lines or a progress bar, metrics.jsonl, config.json, and wandb where asked for.

report.py reads it afterwards.
"""

import atexit
import json
import math
import os
import platform
import re
import subprocess
import sys
from contextlib import suppress
from datetime import datetime, timezone
from pathlib import Path
from typing import IO, Any

from config import ROOT, discard_output
from hardware import cpu_name, ram_bytes

MEASURED = ("train_eval_loss", "val_loss", "val_bpb")  # by an evaluation


def files_of_run(folder: Path) -> list[Path]:
    names = ("ckpt.pt", "best.pt", "metrics.jsonl", "config.json", "bad_batch.json", "loss.png")
    return [*(path for name in names if (path := folder / name).exists()), *snapshots(folder).values()]


def snapshots(folder: Path) -> dict[int, Path]:
    """By iteration, the latest first, the ckpt-ITERATION.pt of --keep_last; not what somebody calls ckpt-good.pt."""
    matches = [(re.fullmatch(r"ckpt-(\d{8,})\.pt", path.name), path) for path in folder.glob("ckpt-*.pt")]
    return dict(sorted(((int(found[1]), path) for found, path in matches if found), reverse=True))


def last_iteration(folder: Path) -> int:
    """Of the run in this folder, by its metrics.jsonl; -1 where there is none."""
    path = folder / "metrics.jsonl"
    records, _ = read_metrics(path) if path.is_file() else ([], [])
    return max((record["iter"] for record in records), default=-1)


class Log:
    """One run's record. What processes other than the main one say is dropped.

    On a terminal a progress bar stands below the lines; in a pipe there are the lines alone, as nanoGPT prints them.
    """

    def __init__(self, main: bool):
        self.main, self.file, self.wandb, self.progress = main, None, None, None
        self.unwritten, self.full = b"", False  # of metrics.jsonl: what a full disk did not take, and that it is full
        self.unread = False  # whether nobody reads what is printed any more: `head` has gone, or `tee`
        atexit.register(self.close)  # also after an error or Ctrl-C: the bar must give the terminal back

    def say(self, text: str) -> None:
        if not self.main:
            return
        try:
            if self.progress:
                self.progress.console.print(text, markup=False, highlight=False)
            else:
                print(text, flush=True)
        except OSError as error:  # a pipe whose reader has gone, a terminal that is closed, a log on a full disk
            self.unread, self.progress = True, None
            discard_output()
            with suppress(OSError):  # 2>&1
                print(f"nobody reads the output any more ({error}): saving after this step", file=sys.stderr)

    def put_aside(self, out_dir: Path) -> None:
        """Move an earlier run's files to out_dir/previous: a command repeated by mistake must not cost a run.

        What was there goes, unless that run had come further; then it is previous-2, and so on.
        """
        found = files_of_run(out_dir)
        if not any(path.suffix == ".pt" for path in found):
            return
        previous, number, reached = out_dir / "previous", 1, last_iteration(out_dir)
        while last_iteration(previous) > reached:
            number += 1
            previous = out_dir / f"previous-{number}"
        previous.mkdir(exist_ok=True)
        for path in files_of_run(previous):
            path.unlink()
        for path in found:
            path.rename(previous / path.name)
        self.say(f"{out_dir} has an earlier run: it is now in {previous}")

    def open(
        self,
        out_dir: Path,
        settings: dict[str, Any],
        origin: dict[str, str],
        iter_num: int,
        max_iters: int,
        facts: dict[str, Any],
    ) -> dict[str, Any]:
        """Begin metrics.jsonl and config.json; of an earlier record, what came before iter_num stays.

        `facts` go into config.json as they are; where a run is resumed, its earlier "environment"s stay in "earlier".
        Returns what was measured on the weights of iter_num already, which the new record of it is to hold too.
        """
        if not self.main:
            return {}
        path = out_dir / "metrics.jsonl"
        earlier, damaged = read_metrics(path) if iter_num and path.is_file() else ([], [])
        if damaged:  # no reason to lose the run as well
            self.say(f"{path}: left out {len(damaged)} damaged lines, the first is line {damaged[0]}")
        kept = [record for record in earlier if record["iter"] < iter_num]
        write_whole(path, "".join(json.dumps(record) + "\n" for record in kept))
        contents = {"config": settings, "origin": origin} | facts
        with suppress(ValueError):  # damaged as well
            before = read_config(out_dir / "config.json") if iter_num else {}
            if "environment" in before:
                contents["earlier"] = [*before.get("earlier", []), before["environment"]]
        write_whole(out_dir / "config.json", json.dumps(contents, indent=2) + "\n")
        self.file = path.open("ab", buffering=0)
        if sys.stdout.isatty():
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

            columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"), TimeRemainingColumn())
            self.progress = Progress(*columns)
            self.task = self.progress.add_task("", total=max_iters, completed=iter_num)
            self.progress.start()
        at_start = [record for record in earlier if record["iter"] == iter_num]
        return {key: record[key] for record in at_start for key in MEASURED if key in record}

    def open_wandb(
        self, out_dir: Path, project: str, name: str, settings: dict[str, Any], run_id: str | None
    ) -> str | None:
        """Start a run, or continue `run_id`; returns its id."""
        if not self.main:
            return None
        import wandb

        try:
            self.wandb = wandb.init(
                project=project, name=name, config=settings, dir=str(out_dir), id=run_id, resume="allow"
            )
        except wandb.errors.Error as error:
            raise ValueError(
                f"wandb_log: {error}; --wandb_log=False goes without, WANDB_MODE=offline keeps it here"
            ) from None
        return self.wandb.id

    def record(self, metrics: dict[str, Any]) -> None:
        """One iteration's numbers, one JSON object a line. JSON has no inf or nan: such a number is null."""
        numbers = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in metrics.items()}
        if self.file:
            self.unwritten += json.dumps(numbers).encode() + b"\n"
            try:
                self.unwritten = self.unwritten[self.file.write(self.unwritten) :]
            except OSError as error:  # a disk that is full now may not be later
                if not self.full:
                    self.say(f"NOT RECORDED at iteration {metrics['iter']}: {error}; the run goes on")
                self.full = True
            else:
                self.full = False
        if self.wandb:
            if "samples" in numbers:
                import wandb

                numbers["samples"] = wandb.Table(columns=["sample"], data=[[text] for text in numbers["samples"]])
            self.wandb.log(numbers, step=metrics["iter"])

    def iteration(self, metrics: dict[str, Any], seconds: float, val_loss: float) -> None:
        """What an iteration says of itself: on the bar, or in a line as nanoGPT prints it."""
        iter_num, loss = metrics["iter"], f"loss {metrics['train_loss']:.4f}"
        speed = f"{metrics['tokens_per_second']:,.0f} tok/s" + (
            f", mfu {metrics['mfu']:.2%}" if "mfu" in metrics else ""
        )
        if self.progress:
            self.progress.update(self.task, completed=iter_num + 1, description=f"{loss}, val {val_loss:.4f}, {speed}")
        else:
            self.say(f"iter {iter_num}: {loss}, time {1000 * seconds:.2f}ms, {speed}")

    def samples(self, iter_num: int, texts: list[str]) -> None:
        """What the model writes by now."""
        for number, text in enumerate(texts):
            self.say(f"-- iter {iter_num}, sample {number} --\n{text}")

    def bad_batch(self, out_dir: Path, culprits: dict[str, Any], count: int) -> None:
        """A step was skipped because its loss or gradient was not finite: say so, and record its sequences."""
        if self.main:
            write_whole(out_dir / "bad_batch.json", json.dumps(culprits, indent=2) + "\n")
        self.say(
            f"iter {culprits['iter']}: SKIPPED, its loss or gradient is not finite ({count} in all); "
            f"its batch is in {out_dir / 'bad_batch.json'}"
        )

    def close(self) -> None:
        atexit.unregister(self.close)
        if self.progress:
            self.progress.stop()
        if self.file:
            with suppress(OSError):
                self.file.write(self.unwritten)
            self.file.close()
        if self.wandb:
            self.wandb.finish()


def hold(out_dir: Path) -> IO:
    """Keep other runs out of this folder until the returned file is closed. ValueError where one has it."""
    file = (out_dir / ".lock").open("w", encoding="utf-8")
    try:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ValueError(f"{out_dir} is in use: another run is writing to it") from None
    except (ImportError, OSError):  # Windows, and file systems without locks
        pass
    return file


def utc_now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="milliseconds")


def is_record(value: Any) -> bool:
    """Whether a line of metrics.jsonl holds one iteration's numbers; any but the first three can be null or absent."""
    if not isinstance(value, dict):
        return False
    numbers = [value.get(key) for key in ("iter", "tokens", "elapsed_seconds")]
    numbers += [value[key] for key in ("tokens_per_second", "train_loss", *MEASURED) if value.get(key) is not None]
    return all(isinstance(number, (int, float)) and abs(number) < 1e300 for number in numbers)  # nor inf, nor nan


def read_metrics(path: Path) -> tuple[list[dict[str, Any]], list[int]]:
    """The records there are, and the numbers of damaged lines. A last line cut short by a kill is neither."""
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


def describe_environment(device_name: str) -> dict[str, Any]:
    """What a run's speed and numbers depend on besides its settings, in plain JSON values; None: not known here.

    "commit" and "dirty" (tracked files differ from the commit) are of the code; "ram_bytes" is all of the machine's.
    """
    import numpy as np
    import torch

    tracked = git("ls-files", "--", "model.py")  # else the folder only lies inside somebody's other repository
    changes = git("--no-optional-locks", "status", "--porcelain", "--untracked-files=no") if tracked else None
    return {
        "started": utc_now(),
        "command": list(sys.argv),
        "commit": git("rev-parse", "HEAD") if tracked else None,
        "dirty": None if changes is None else changes != "",
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "numpy": np.__version__,
        "cuda": torch.version.cuda if torch.cuda.is_available() else None,
        "platform": platform.platform(),
        "device": device_name,
        "cpu": cpu_name(),
        "cpu_cores": os.cpu_count(),
        "ram_bytes": ram_bytes(),
    }


def git(*arguments: str) -> str | None:
    """What git says about the project; None where there is no git, or no repository."""
    try:
        command = ["git", "-C", str(ROOT), *arguments]
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def read_config(path: Path) -> dict[str, Any]:
    """A run's config.json; empty where there is none. ValueError where it is damaged."""
    try:
        contents = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: damaged ({error})") from None
    kinds = {"config": dict, "environment": dict, "earlier": list, "parameters": int}
    sound = isinstance(contents, dict) and all(isinstance(contents.get(k, kind()), kind) for k, kind in kinds.items())
    if not sound:
        raise ValueError(f"{path}: damaged (not what train.py writes)")
    return contents


def write_whole(path: Path, contents: str | bytes) -> None:
    """Write a small file so that at no moment half of it is there."""
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
