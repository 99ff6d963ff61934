"""One run in several processes: connecting them, sums and votes, DDP and FSDP; and torch.compile.

DDP (arXiv:2006.15704): each process has the whole model. FSDP (arXiv:2304.11277): each process holds a share of every
weight and of the optimizer's state, and gathers a block's weights while that block computes.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint as recompute

from kqv.errors import UserError
from kqv.machine import resolve_device


@dataclass
class Processes:
    """This process among those of the run. Without torchrun there is only this one."""

    rank: int
    world_size: int
    device: torch.device
    host_group: dist.ProcessGroup | None = None  # a gloo group, for values in CPU memory; None without torchrun

    @property
    def main(self) -> bool:
        """Whether this process reads and writes out_dir and prints."""
        return self.rank == 0

    @property
    def connected(self) -> bool:
        """Whether torchrun has started this process; it may have started only one."""
        return self.host_group is not None

    def any(self, yes: bool) -> bool:
        """Whether `yes` is true in any process. Does not wait for a GPU."""
        if not self.connected:
            return yes
        vote = torch.tensor([yes], dtype=torch.uint8)
        dist.all_reduce(vote, op=dist.ReduceOp.MAX, group=self.host_group)
        return bool(vote.item())

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum of this tensor over the processes, on the device."""
        if self.connected:
            tensor = tensor.to(self.device, copy=True)
            dist.all_reduce(tensor)
        return tensor

    def gather(self, value: Any) -> list[Any]:
        """The values of all processes, by rank. They are sent as pickles."""
        if not self.connected:
            return [value]
        values = [None] * self.world_size
        dist.all_gather_object(values, value, group=self.host_group)
        return values

    def broadcast(self, value: Any) -> Any:
        """The main process's value."""
        if not self.connected:
            return value
        values = [value]
        dist.broadcast_object_list(values, group=self.host_group)
        return values.pop()

    def close(self) -> None:
        if self.connected:
            dist.destroy_process_group()


def read_environment() -> tuple[int, int, int]:
    """RANK, LOCAL_RANK, WORLD_SIZE as torchrun sets them; 0, 0, 1 without RANK. Raises UserError if invalid."""
    if "RANK" not in os.environ:  # some clusters set WORLD_SIZE for every command
        return 0, 0, 1
    keys = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    texts = {key: os.environ.get(key, "") for key in keys}
    numbers = [texts["RANK"], os.environ.get("LOCAL_RANK", texts["RANK"]), texts["WORLD_SIZE"]]
    if (
        not all(text.isdecimal() for text in numbers)
        or not texts["MASTER_ADDR"]
        or not texts["MASTER_PORT"].isdecimal()
    ):
        given = ", ".join(f"{key}={text!r}" for key, text in texts.items())
        raise UserError(f"{given}: not what torchrun sets; start several processes with it, or unset RANK for one")
    rank, local_rank, world_size = map(int, numbers)
    if rank >= world_size:
        raise UserError(f"RANK={rank}: must be below WORLD_SIZE={world_size}")
    return rank, local_rank, world_size


def connect(device: str, backend: str) -> Processes:
    """Connect to the other processes that torchrun started; without torchrun, this is the only process."""
    rank, local_rank, world_size = read_environment()
    processes = Processes(rank, world_size, resolve_device(device, local_rank))
    on_gpu = processes.device.type == "cuda"
    if on_gpu:
        torch.cuda.set_device(processes.device)
        torch.set_float32_matmul_precision("high")  # TF32 for the remaining float32 products
    if "RANK" in os.environ:
        store, rank, world_size = next(dist.rendezvous("env://"))
        # torchrun keeps the store of addresses if it restarts its processes. On one node the restart count tells old
        # addresses from new ones. (Each node has its own count, so several nodes need docs/nodes.md's setting.)
        one_node = os.environ.get("GROUP_WORLD_SIZE", "1") == "1"
        store = dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") if one_node else "any", store)
        backend = ("nccl" if on_gpu else "gloo") if backend == "auto" else backend
        dist.init_process_group(backend, store=store, rank=rank, world_size=world_size)
        processes.host_group = dist.new_group(backend="gloo")
    return processes


# -- the model in several processes ------------------------------------------------------------------------------------


def recompute_activations(model: nn.Module) -> None:
    """Keep only each block's input for the backward pass, which recomputes the rest (arXiv:1604.06174)."""
    for block in model.transformer.h:
        block.forward = partial(recompute, block.forward, use_reentrant=False)


def is_sharded(value: Any) -> bool:
    return hasattr(value, "full_tensor")  # a DTensor


def shard(loss_model: nn.Module, device: torch.device) -> None:
    """Shard a NextTokenLoss over the processes, in place: its model's weights become DTensors."""
    from torch.distributed.fsdp import fully_shard  # its import takes half a second

    mesh = dist.device_mesh.init_device_mesh(device.type, (dist.get_world_size(),))
    for block in loss_model.model.transformer.h:
        fully_shard(block, mesh=mesh)
    fully_shard(loss_model, mesh=mesh)


def wrap(model: nn.Module, processes: Processes) -> nn.Module:
    """The model, wrapped in DDP if several processes are to average its gradients."""
    if not processes.connected or is_sharded(next(model.parameters())):  # FSDP averages gradients itself
        return model
    device = processes.device
    return DistributedDataParallel(model, device_ids=[device.index] if device.type == "cuda" else None)


def average_gradients(model: nn.Module, now: bool) -> None:
    """Synchronise gradients in the next backward pass or not: only the last micro-step of a step needs to."""
    if isinstance(model, DistributedDataParallel):
        model.require_backward_grad_sync = now
    elif hasattr(model, "set_requires_gradient_sync"):  # an FSDPModule
        model.set_requires_gradient_sync(now)


def gather_full(value: Any, main: bool) -> Any:
    """A state dict with whole tensors instead of shards, in the main process; every process must call it."""
    if isinstance(value, dict):
        return {key: gather_full(item, main) for key, item in value.items()}
    if is_sharded(value):
        full = value.full_tensor()
        return full.cpu() if main else None
    return value


def distribute_like(value: Tensor, like: Tensor) -> Tensor:
    """Shard `value`, which every process holds, as `like` is sharded; returns it unchanged if `like` is not."""
    if not is_sharded(like):
        return value
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(value.to(like.device_mesh.device_type), like.device_mesh, like.placements)


COMPILE_SECONDS = 20  # what compiling takes on a GPU, about; its cache makes a second run's shorter


def seconds_saved(flops: float, peak: float | None, iterations: int) -> float:
    """About how much shorter these iterations of `flops` each are on a GPU of this peak, if they are compiled.

    Compiled training reaches about 40% of the peak, uncompiled 25%.
    """
    return iterations * flops / (peak or 1e14) * (1 / 0.25 - 1 / 0.4)


def compile_and_wrap(
    loss_model: nn.Module,
    wanted: bool | str,
    saved: float,
    batch: tuple[Tensor, Tensor],
    autocast: torch.autocast,
    processes: Processes,
    say: Callable[[str], None],
) -> nn.Module:
    """Compile a NextTokenLoss in place; returns it, wrapped for several processes.

    wanted="auto" compiles on GPUs, if that saves more seconds than it takes (`saved`: see seconds_saved). The blocks
    are the same code, so one of them is compiled for all; and the loss. A forward and a backward pass do it here, so
    that the training clock starts afterwards. If it fails in one process, "auto" continues without, with the reason.
    """
    device = processes.device
    if wanted == "auto" and device.type != "cuda":
        wanted = False
    if wanted == "auto" and saved <= COMPILE_SECONDS:
        say(f"not compiling: it takes about {COMPILE_SECONDS} s, and would save {saved:.0f} (--compile does it)")
        wanted = False
    if not wanted:
        return wrap(loss_model, processes)
    say("compiling the model, which takes some seconds on a GPU, a minute on a CPU (--compile=False trains without)")
    if device.type == "cpu":  # else the threads of compiled code add up the embedding's gradients in any order
        torch.use_deterministic_algorithms(True)
    # one block has so few kernels that starting processes to compile them takes longer than compiling them
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
    reason, blocks = None, loss_model.model.transformer.h
    try:
        for block in blocks:
            block.compile(dynamic=False)
        loss_model.loss = torch.compile(loss_model.loss, dynamic=False)
        with autocast:
            loss = loss_model(*batch)
        loss.backward()
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, ImportError) as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
    loss_model.zero_grad(set_to_none=True)
    reason = next(filter(None, processes.gather(reason)), None)
    if reason and wanted is True:
        raise UserError(f"compile=True: torch.compile does not work here: {reason}")
    if reason:
        say(f"continuing without torch.compile, which does not work here: {reason}")
        uncompile(loss_model)
    return wrap(loss_model, processes)


def uncompile(loss_model: nn.Module) -> None:
    """Let a NextTokenLoss run as it was before compile_and_wrap."""
    for block in loss_model.model.transformer.h:
        block._compiled_call_impl = None
    loss_model.__dict__.pop("loss", None)
