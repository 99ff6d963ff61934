"""What a run says while it works: lines or a progress bar, metrics.jsonl, config.json, and wandb where asked for.

report.py reads it afterwards.
"""

import atexit
import json
import math
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

from kqv.cli import UserError, discard_output
from kqv.rundir import MEASURED, read_config, read_metrics, write_whole


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
        with suppress(UserError):  # damaged as well
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
            raise UserError(
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
