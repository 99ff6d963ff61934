"""Evaluation: the loss on fixed windows, the same for any batch size and number of processes."""

import math
from pathlib import Path

import numpy as np
import torch
from torch import nn

from kqv.data import Dataset, Split
from kqv.distributed import Processes
from kqv.errors import UserError


@torch.no_grad()
def evaluate(
    model: nn.Module, split: Split, windows: np.ndarray, autocast: torch.autocast, processes: Processes
) -> float:
    """Mean loss on fixed windows, in nats per token. Every process computes its share; all return the same value.

    The value is bit for bit the same for any batch size and number of processes: each batch of windows is summed by
    one process, in one shape, and the sums are added in one order.
    """
    model.eval()
    losses = []
    for number, x, y in split.eval_batches(windows, processes.rank, processes.world_size):
        with autocast:
            loss = model(x.to(processes.device), y.to(processes.device))
        if tokens := int((y >= 0).sum()):  # a batch of padding only keeps the processes in step
            losses.append((number, loss, tokens))
    model.train()
    sums = torch.zeros(len(windows), 2, dtype=torch.float64)  # by batch: loss in nats, tokens
    for number, loss, tokens in losses:
        sums[number] = torch.tensor([loss.item() * tokens, tokens])
    # each row is zero except in one process, so the sum is exact
    total, tokens = processes.sum(sums).cpu().sum(dim=0).tolist()
    return total / tokens


def evaluate_splits(
    model: nn.Module, dataset: Dataset, autocast: torch.autocast, processes: Processes
) -> dict[str, float]:
    """The losses on both splits, in nats per token, and on val in bits per byte if the data set counts bytes."""
    splits, windows = dataset.splits, dataset.windows
    train, val = (evaluate(model, splits[name], windows[name], autocast, processes) for name in ("train", "val"))
    measured = {"train_eval_loss": train, "val_loss": val}
    if splits["val"].bytes:
        measured["val_bpb"] = val / math.log(2) * splits["val"].tokens / splits["val"].bytes
    return measured


def check_finite(val_loss: float, iter_num: int, out_dir: Path) -> None:
    """Raise UserError if the run has diverged."""
    if not math.isfinite(val_loss):
        raise UserError(f"val_loss is {val_loss} at iteration {iter_num}; {out_dir} has the last checkpoint")
