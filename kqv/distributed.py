"""One run in several processes: gradients averaged, the model sharded, decisions taken together; torch.compile.

DDP (arXiv:2006.15704): each process has the whole model. FSDP (arXiv:2304.11277): each keeps its share of every weight
and of the optimizer's state, and a block's weights are gathered for as long as it computes.
"""

import os
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from kqv.cli import UserError
from kqv.log import Log


def init_distributed(backend: str) -> dist.ProcessGroup:
    """Become one of the processes that torchrun has started; returns a group for what need not pass through a GPU."""
    store, rank, world_size = next(dist.rendezvous("env://"))
    # When torchrun starts its processes again it keeps the store where they look each other up: on one node the count
    # of restarts tells old addresses from new. (Each node keeps its own count; README.md says what several nodes need.)
    one_node = os.environ.get("GROUP_WORLD_SIZE", "1") == "1"
    store = dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") if one_node else "any", store)
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size)
    return dist.new_group(backend="gloo")


def any_process(yes: bool, group: dist.ProcessGroup | None) -> bool:
    """Whether any process says yes. `group`: one of gloo's, so that no GPU is waited for; None: one process alone."""
    if group is None:
        return yes
    vote = torch.tensor([yes], dtype=torch.uint8)
    dist.all_reduce(vote, op=dist.ReduceOp.MAX, group=group)
    return bool(vote.item())


def is_sharded(value: Any) -> bool:
    return hasattr(value, "full_tensor")  # a DTensor


def shard(loss_model: nn.Module, device: torch.device) -> None:
    """Share the model of a NextTokenLoss out over the processes, in place: its weights become DTensors."""
    from torch.distributed.fsdp import fully_shard  # half a second that other runs need not wait

    mesh = dist.device_mesh.init_device_mesh(device.type, (dist.get_world_size(),))
    for block in loss_model.model.transformer.h:
        fully_shard(block, mesh=mesh)
    fully_shard(loss_model, mesh=mesh)


def wrap(model: nn.Module, device: torch.device) -> nn.Module:
    """The model as it is trained: with several processes, one whose gradients are averaged over them."""
    if not dist.is_initialized() or is_sharded(next(model.parameters())):  # which averages them itself
        return model
    return DistributedDataParallel(model, device_ids=[device.index] if device.type == "cuda" else None)


def average_gradients(model: nn.Module, now: bool) -> None:
    """Whether the next backward pass averages gradients over the processes: the last one of a step is enough."""
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
    """A whole tensor, which every process has, sharded as `like` is; as it is where `like` is not."""
    if not is_sharded(like):
        return value
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(value.to(like.device_mesh.device_type), like.device_mesh, like.placements)


def try_compile(
    model: nn.Module, wanted: bool | str, device: torch.device, batch: tuple, autocast: torch.autocast, log: Log
) -> tuple[nn.Module, nn.Module]:
    """The model under torch.compile, to evaluate with, and the same wrapped, to train with.

    It is tried on one step's work, so that the run's clock starts when all is compiled. Where "auto" finds that it
    fails here, a line says why and the model stays as it is: in all processes, if it fails in one.
    """
    if wanted is False or (wanted == "auto" and device.type != "cuda"):
        return model, wrap(model, device)
    log.say("compiling the model (takes a minute, --compile=False goes without)")
    if device.type == "cpu":  # else compiled code lets threads add up the embedding's gradients in any order
        torch.use_deterministic_algorithms(True)
    reason = None
    try:
        compiled = torch.compile(model, dynamic=False)
        # through the wrapper: DDP has the graph cut where gradients can be sent while others are still computed
        wrapped = wrap(compiled, device)
        average_gradients(wrapped, now=False)
        with autocast:
            loss = wrapped(*batch)
        loss.backward()
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, ImportError) as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
    model.zero_grad(set_to_none=True)
    reasons = [reason]
    if dist.is_initialized():
        reasons = [None] * dist.get_world_size()
        dist.all_gather_object(reasons, reason)
    reason = next(filter(None, reasons), None)
    if reason is None:
        return compiled, wrapped
    if wanted is True:
        raise UserError(f"compile=True: torch.compile does not work here: {reason}")
    log.say(f"going on without torch.compile, which does not work here: {reason}")
    return model, wrap(model, device)
