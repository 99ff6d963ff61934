"""Bad steps: skipped because loss or gradient is not finite; and loss spikes, which are only reported."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from kqv.checkpoint import LoopState
from kqv.data import MicroBatches
from kqv.distributed import Processes
from kqv.errors import UserError
from kqv.log import Log
from kqv.rundir import BAD_BATCH

RECENT = 50  # logged losses that a new one is compared with
SPIKE = 6  # standard deviations above their mean


@dataclass
class Skipped:
    """How many steps were skipped, and the iteration of the last one."""

    in_a_row: int = 0
    total: int = 0
    last_iter: int = -1


class BadSteps:
    """Counts skipped steps on the device, so that no step waits for it, and remembers recent losses."""

    def __init__(self, skipped: list[int], recent_losses: list[float], most: int, device: torch.device):
        """`skipped`: the fields of Skipped, in order, as a checkpoint holds them. `most`: allowed in a row."""
        self.most = most
        self.counts = torch.tensor(skipped, device=device)
        self.reported = skipped[1]
        self.loss = torch.zeros((), device=device)  # this process's loss in the last skipped step
        self.recent_losses = recent_losses

    def count(self, is_bad: Tensor, iter_num: int, own_loss: Tensor) -> None:
        """Count a step. `is_bad`, a boolean on the device, tells whether it was skipped."""
        in_a_row, total, last_iter = self.counts
        last_iter = torch.where(is_bad, iter_num, last_iter)
        self.counts = torch.stack(((in_a_row + 1) * is_bad, total + is_bad, last_iter))
        self.loss = torch.where(is_bad, own_loss, self.loss)

    def newly_skipped(self) -> Skipped | None:
        """The counts if steps were skipped since the last call, else None. Waits for the device."""
        skipped = Skipped(*self.counts.tolist())
        if skipped.total == self.reported:
            return None
        self.reported = skipped.total
        return skipped

    def spike(self, loss: float) -> float | None:
        """Remember `loss`; returns by how many standard deviations it exceeds the recent mean, if more than SPIKE."""
        recent, above = self.recent_losses, 0.0
        if len(recent) >= RECENT // 2:
            above = float((loss - np.mean(recent)) / (np.std(recent, ddof=1) + 1e-12))
        if np.isfinite(loss):
            self.recent_losses = [*recent, loss][-RECENT:]
        return above if above > SPIKE else None

    def report(
        self,
        state: LoopState,
        train_loss: float,
        batches: MicroBatches,
        processes: Processes,
        log: Log,
        out_dir: Path,
    ) -> dict[str, float]:
        """Print newly skipped steps, and a loss spike; returns their entries for metrics.jsonl.

        Raises UserError if too many steps in a row were skipped.
        """
        found = {}
        if skipped := self.newly_skipped():
            found["bad_steps"] = skipped.total
            culprit = {"rank": processes.rank, "loss": str(self.loss.item())}
            culprit["sequences"] = batches.first_sequences(skipped.last_iter - state.iter_num)
            ranks = processes.gather(culprit)
            batch = {"iter": skipped.last_iter, "batch_size": batches.batch_size, "ranks": ranks}
            log.bad_batch(out_dir, batch, skipped.total)
            if skipped.in_a_row >= self.most:
                raise UserError(
                    f"{skipped.in_a_row} steps in a row without a finite loss and gradient, up to iteration "
                    f"{skipped.last_iter}: see {out_dir / BAD_BATCH}; {out_dir} has the last checkpoint"
                )
        if above := self.spike(train_loss):
            found["loss_spike"] = above
            deviations = f"{train_loss:.4f} is {above:.1f} standard deviations above the mean of the last {RECENT}"
            log.say(f"iter {state.iter_num}: loss spike, {deviations}")
        return found
