"""One run in several processes: who they are, what they decide together, how they share the model; torch.compile.

DDP (arXiv:2006.15704): each process has the whole model. FSDP (arXiv:2304.11277): each keeps its share of every weight
and of the optimizer's state, and a block's weights are gathered for as long as it computes.
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
    """The processes of a run, as one of them sees them. Without torchrun there is one."""

    rank: int
    world_size: int
    device: torch.device
    host_group: dist.ProcessGroup | None = None  # of gloo's, for what need not pass through a GPU; None: one process

    @property
    def main(self) -> bool:
        """Whether this process reads and writes out_dir and prints."""
        return self.rank == 0

    @property
    def connected(self) -> bool:
        """Whether torchrun has started this process; it may have started only one."""
        return self.host_group is not None

    def any(self, yes: bool) -> bool:
        """Whether any process says yes; no GPU is waited for."""
        if not self.connected:
            return yes
        vote = torch.tensor([yes], dtype=torch.uint8)
        dist.all_reduce(vote, op=dist.ReduceOp.MAX, group=self.host_group)
        return bool(vote.item())

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum of the processes' tensors, one of each, on the device."""
        if self.connected:
            tensor = tensor.to(self.device, copy=True)
            dist.all_reduce(tensor)
        return tensor

    def gather(self, value: Any) -> list[Any]:
        """Every process's value, by rank; it is pickled on its way."""
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
    """RANK, LOCAL_RANK and WORLD_SIZE, as torchrun sets them; 0, 0, 1 without RANK. UserError if they make no sense."""
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
    """Become one of the processes that torchrun has started, on its own device; or the only one, without torchrun."""
    rank, local_rank, world_size = read_environment()
    processes = Processes(rank, world_size, resolve_device(device, local_rank))
    on_gpu = processes.device.type == "cuda"
    if on_gpu:
        torch.cuda.set_device(processes.device)
        torch.set_float32_matmul_precision("high")  # TF32, where float32 is left
    if "RANK" in os.environ:
        store, rank, world_size = next(dist.rendezvous("env://"))
        # When torchrun starts its processes again it keeps the store in which they look each other up: on one node the
        # count of restarts tells old addresses from new. (Each node keeps its own count; docs/nodes.md has the rest.)
        one_node = os.environ.get("GROUP_WORLD_SIZE", "1") == "1"
        store = dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") if one_node else "any", store)
        backend = ("nccl" if on_gpu else "gloo") if backend == "auto" else backend
        dist.init_process_group(backend, store=store, rank=rank, world_size=world_size)
        processes.host_group = dist.new_group(backend="gloo")
    return processes


# -- the model in several processes ------------------------------------------------------------------------------------


def recompute_activations(model: nn.Module) -> None:
    """Keep of each block only its input for the backward pass, which computes the rest again (arXiv:1604.06174)."""
    for block in model.transformer.h:
        block.forward = partial(recompute, block.forward, use_reentrant=False)


def is_sharded(value: Any) -> bool:
    return hasattr(value, "full_tensor")  # a DTensor


def shard(loss_model: nn.Module, device: torch.device) -> None:
    """Share a NextTokenLoss out over the processes, in place: the weights of its model become DTensors."""
    from torch.distributed.fsdp import fully_shard  # half a second that other runs need not wait

    mesh = dist.device_mesh.init_device_mesh(device.type, (dist.get_world_size(),))
    for block in loss_model.model.transformer.h:
        fully_shard(block, mesh=mesh)
    fully_shard(loss_model, mesh=mesh)


def wrap(model: nn.Module, processes: Processes) -> nn.Module:
    """The model as it is trained: with several processes, one whose gradients are averaged over them."""
    if not processes.connected or is_sharded(next(model.parameters())):  # FSDP averages them itself
        return model
    device = processes.device
    return DistributedDataParallel(model, device_ids=[device.index] if device.type == "cuda" else None)


def average_gradients(model: nn.Module, now: bool) -> None:
    """Set whether the next backward pass averages gradients over the processes: only a step's last one needs to."""
    if isinstance(model, DistributedDataParallel):
        model.require_backward_grad_sync = now
    elif hasattr(model, "set_requires_gradient_sync"):  # an FSDPModule, which tells its blocks
        model.set_requires_gradient_sync(now)


def gather_full(value: Any, main: bool) -> Any:
    """A state dict with its sharded tensors put together, in the main process; every process must call it."""
    if isinstance(value, dict):
        return {key: gather_full(item, main) for key, item in value.items()}
    if is_sharded(value):
        full = value.full_tensor()
        return full.cpu() if main else None
    return value


def distribute_like(value: Tensor, like: Tensor) -> Tensor:
    """A whole tensor, which every process has, sharded as `like` is; unchanged if `like` is not sharded."""
    if not is_sharded(like):
        return value
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(value.to(like.device_mesh.device_type), like.device_mesh, like.placements)


def compile_and_wrap(
    model: nn.Module,
    wanted: bool | str,
    batch: tuple[Tensor, Tensor],
    autocast: torch.autocast,
    processes: Processes,
    say: Callable[[str], None],
) -> tuple[nn.Module, nn.Module]:
    """The model under torch.compile, to evaluate with, and the same wrapped, to train with.

    It is tried on one step's work, so that the run's clock starts when all is compiled. If "auto" finds that it fails
    in one process, a line says why and the model stays as it is in all of them.
    """
    device = processes.device
    if wanted is False or (wanted == "auto" and device.type != "cuda"):
        return model, wrap(model, processes)
    say("compiling the model (takes a minute, --compile=False goes without)")
    if device.type == "cpu":  # else compiled code lets threads add up the embedding's gradients in any order
        torch.use_deterministic_algorithms(True)
    reason = None
    try:
        compiled = torch.compile(model, dynamic=False)
        # through the wrapper: DDP has the graph cut where gradients can be sent while others are still computed
        wrapped = wrap(compiled, processes)
        average_gradients(wrapped, now=False)
        with autocast:
            loss = wrapped(*batch)
        loss.backward()
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, ImportError) as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
    model.zero_grad(set_to_none=True)
    reason = next(filter(None, processes.gather(reason)), None)
    if reason is None:
        return compiled, wrapped
    if wanted is True:
        raise UserError(f"compile=True: torch.compile does not work here: {reason}")
    say(f"going on without torch.compile, which does not work here: {reason}")
    return model, wrap(model, processes)
