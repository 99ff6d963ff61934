"""The forward and backward pass of a training step; one GPU records them once as CUDA graphs, and then replays them.

A small model's kernels take less time than launching them one by one from Python, and a large one's leave gaps.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from kqv.distributed import average_gradients
from kqv.errors import UserError


@dataclass
class Passes:
    """Computes the gradients of micro-batches. Each pass adds to those of the passes before it in a step."""

    model: nn.Module  # with its loss, compiled or wrapped as it is to be used
    autocast: torch.autocast
    scaler: torch.amp.GradScaler
    micro_steps: int  # passes in a step
    # of a step's first pass and of its others: the graph, and the loss that it computes
    graphs: list[tuple[torch.cuda.CUDAGraph, Tensor]] = field(default_factory=list)
    batch: tuple[Tensor, Tensor] | None = None  # what the graphs read
    # Loss of the last pass, with autograd's graph. If that were freed within the step, the heap would shrink and grow
    # again in each step, which costs 7% of a small model's step on a CPU (dev/LOG.md)
    last_loss: Tensor | None = None

    def __call__(self, micro_step: int, x: Tensor, y: Tensor) -> Tensor:
        """Compute the gradients of x, y (B, T); returns the loss's share of the step's mean, on the device."""
        if not self.graphs:
            average_gradients(self.model, now=micro_step == self.micro_steps - 1)
            self.last_loss = self.compute(x, y)
            return self.last_loss.detach()
        for recorded, new in zip(self.batch, (x, y), strict=True):
            recorded.copy_(new)
        graph, loss = self.graphs[min(micro_step, 1)]
        graph.replay()
        return loss

    def compute(self, x: Tensor, y: Tensor) -> Tensor:
        with self.autocast:
            loss = self.model(x, y) / self.micro_steps
        self.scaler.scale(loss).backward()
        return loss

    def record(self, x: Tensor, y: Tensor) -> None:
        """Record the passes of micro-batches of this shape. Raises UserError if something in them cannot be recorded.

        The gradients stay where they are from now on: a step's first pass overwrites them.
        """
        self.batch = x.clone(), y.clone()
        torch.cuda.empty_cache()  # another stream cannot use what earlier passes have left
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # kernels are loaded and chosen in a few passes before
            for _ in range(3):
                self.compute(*self.batch)
        torch.cuda.current_stream().wait_stream(stream)
        self.model.zero_grad(set_to_none=True)
        pool, graphs = torch.cuda.graph_pool_handle(), []
        try:
            for _ in range(min(2, self.micro_steps)):  # with no gradients yet, a pass stores them, else it adds
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph, pool=pool):
                    loss = self.compute(*self.batch)
                graphs.append((graph, loss.detach()))
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            reason = " ".join(str(error).split())[:200]
            raise UserError(f"cuda_graph: recording failed ({reason}); --cuda_graph=False trains without") from None
        self.graphs = graphs

    def forget_gradients(self) -> None:
        """Free the gradients after a step, unless they are overwritten in place."""
        if not self.graphs:
            self.model.zero_grad(set_to_none=True)
