"""Run logging: console lines or a progress bar, metrics.jsonl, config.json, wandb. report.py reads it afterwards."""

import atexit
import json
import math
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kqv.errors import UserError, discard_output
from kqv.rundir import BAD_BATCH, CONFIG, MEASURED, METRICS, read_config, read_metrics, write_whole


@dataclass
class Pace:
    """The work of one iteration, from which its speed follows."""

    tokens_per_iter: int
    flops_per_iter: float  # on one device
    peak_flops: float | None  # of one device, per second; None if unknown: no MFU rather than a wrong one

    def speed(self, seconds: float) -> dict[str, float]:
        """Tokens per second, and the share of the peak that is reached (MFU), of an iteration that took `seconds`."""
        found = {"tokens_per_second": self.tokens_per_iter / seconds}
        return found | ({"mfu": self.flops_per_iter / seconds / self.peak_flops} if self.peak_flops else {})


class Clock:
    """The training clock: seconds spent on steps. It pauses inside `with clock:`, to evaluate, save or draw."""

    def __init__(self, seconds: float, iter_num: int, device: Any):
        self.seconds, self.device, self.started = seconds, device, time.perf_counter()
        self.lap_seconds, self.lap_iter = seconds, iter_num

    def read(self) -> float:
        return self.seconds + time.perf_counter() - self.started

    def lap(self, iter_num: int) -> float:
        """Mean seconds of an iteration since the last lap."""
        now = self.read()
        seconds = (now - self.lap_seconds) / (iter_num - self.lap_iter)
        self.lap_seconds, self.lap_iter = now, iter_num
        return seconds

    def __enter__(self) -> None:
        if self.device.type != "cpu":
            import torch

            torch.accelerator.synchronize()
        self.seconds = self.read()

    def __exit__(self, *_: object) -> None:
        self.started = time.perf_counter()


class Log:
    """A run's output: what it prints and records. Only the main process does so.

    A terminal gets a progress bar below the lines; a pipe gets the lines alone, as nanoGPT prints them.
    """

    def __init__(self, main: bool):
        self.main, self.file, self.wandb, self.progress = main, None, None, None
        self.unwritten = b""  # lines of metrics.jsonl that could not be written, because the disk was full
        self.disk_full = False
        self.shown = {"loss": "", "val": "", "speed": ""}  # on the bar
        atexit.register(self.close)  # also after an error or Ctrl-C, so that the bar restores the terminal

    def say(self, text: str) -> None:
        if not self.main:
            return
        try:
            if self.progress:
                self.progress.console.print(text, markup=False, highlight=False)
            else:
                print(text, flush=True)
        except OSError as error:  # the reader of a pipe has ended, the terminal is closed, the disk is full
            self.progress = None
            discard_output()
            with suppress(OSError):  # with 2>&1 stderr is closed as well
                print(f"the output cannot be written ({error}); the run continues without it", file=sys.stderr)

    def open(
        self, out_dir: Path, settings: dict[str, Any], origin: dict[str, str], iter_num: int, facts: dict[str, Any]
    ) -> dict[str, Any]:
        """Write config.json and open metrics.jsonl; of an earlier record, the lines before iter_num are kept.

        `facts` become entries of config.json. A resumed run keeps its previous "environment"s in "earlier". Returns
        the losses that were measured on the weights of iter_num, which its new line must hold too.
        """
        if not self.main:
            return {}
        path = out_dir / METRICS
        earlier, damaged = read_metrics(path) if iter_num and path.is_file() else ([], [])
        if damaged:
            self.say(f"{path}: ignored {len(damaged)} damaged lines, the first is line {damaged[0]}")
        kept = [record for record in earlier if record["iter"] < iter_num]
        write_whole(path, "".join(json.dumps(record) + "\n" for record in kept))
        contents = {"config": settings, "origin": origin} | facts
        with suppress(UserError):  # damaged as well
            before = read_config(out_dir / CONFIG) if iter_num else {}
            if "environment" in before:
                contents["earlier"] = [*before.get("earlier", []), before["environment"]]
        write_whole(out_dir / CONFIG, json.dumps(contents, indent=2) + "\n")
        self.file = path.open("ab", buffering=0)
        at_start = [record for record in earlier if record["iter"] == iter_num]
        return {key: record[key] for record in at_start for key in MEASURED if key in record}

    def open_bar(self, iter_num: int, max_iters: int) -> None:
        """Show a progress bar from here on, if this is a terminal."""
        if not self.main or not sys.stdout.isatty():
            return
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"), TimeRemainingColumn())
        self.progress = Progress(*columns)
        self.task = self.progress.add_task("", total=max_iters, completed=iter_num)
        self.progress.start()

    def update_bar(self, iterations: int | None = None, **shown: str) -> None:
        self.shown |= shown
        if self.progress:
            description = ", ".join(filter(None, self.shown.values()))
            self.progress.update(self.task, completed=iterations, description=description)

    def open_wandb(
        self, out_dir: Path, project: str, name: str, settings: dict[str, Any], run_id: str | None
    ) -> str | None:
        """Start a run at Weights & Biases, or continue `run_id`; returns its id."""
        if not self.main:
            return None
        import wandb

        try:
            self.wandb = wandb.init(
                project=project, name=name, config=settings, dir=str(out_dir), id=run_id, resume="allow"
            )
        except wandb.errors.Error as error:
            advice = "--wandb_log=False trains without it, WANDB_MODE=offline keeps its data here"
            raise UserError(f"wandb_log: {error}; {advice}") from None
        return self.wandb.id

    def record(self, metrics: dict[str, Any]) -> None:
        """Write one iteration's numbers, one JSON object a line. JSON has no inf or nan: such a number is null."""
        numbers = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in metrics.items()}
        if self.file:
            self.unwritten += json.dumps(numbers).encode() + b"\n"
            try:
                self.unwritten = self.unwritten[self.file.write(self.unwritten) :]
            except OSError as error:  # a full disk may have room later
                if not self.disk_full:
                    self.say(f"NOT RECORDED at iteration {metrics['iter']}: {error}; the run continues")
                self.disk_full = True
            else:
                self.disk_full = False
        if self.wandb:
            if "samples" in numbers:
                import wandb

                numbers["samples"] = wandb.Table(columns=["sample"], data=[[text] for text in numbers["samples"]])
            self.wandb.log(numbers, step=metrics["iter"])

    def evaluated(self, iter_num: int, measured: dict[str, float]) -> None:
        """Show the losses of an evaluation, as nanoGPT prints them."""
        train, val = measured["train_eval_loss"], measured["val_loss"]
        self.say(f"step {iter_num}: train loss {train:.4f}, val loss {val:.4f}")
        self.update_bar(iter_num, val=f"val {val:.4f}")

    def iteration(self, metrics: dict[str, Any], seconds: float) -> None:
        """Show an iteration's loss and speed: on the bar, or in a line as nanoGPT prints it."""
        iter_num, loss = metrics["iter"], f"loss {metrics['train_loss']:.4f}"
        speed = f"{metrics['tokens_per_second']:,.0f} tok/s"
        if "mfu" in metrics:
            speed += f", mfu {metrics['mfu']:.2%}"
        if self.progress:
            self.update_bar(iter_num + 1, loss=loss, speed=speed)
        else:
            self.say(f"iter {iter_num}: {loss}, time {1000 * seconds:.2f}ms, {speed}")

    def samples(self, iter_num: int, texts: list[str]) -> None:
        for number, text in enumerate(texts):
            self.say(f"-- iter {iter_num}, sample {number} --\n{text}")

    def bad_batch(self, out_dir: Path, culprits: dict[str, Any], total: int) -> None:
        """Report that a step was skipped because its loss or gradient is not finite, and record its sequences."""
        path = out_dir / BAD_BATCH
        if self.main:
            write_whole(path, json.dumps(culprits, indent=2) + "\n")
        reason = f"SKIPPED, its loss or gradient is not finite ({total} in all)"
        self.say(f"iter {culprits['iter']}: {reason}; its batch is in {path}")

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
