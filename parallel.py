"""One run in several processes: gradients averaged, decisions taken together; and the model under torch.compile."""

from contextlib import nullcontext

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from record import Log


def agree(mine: bool, group: dist.ProcessGroup | None) -> bool:
    """Whether any process says yes. `group`: one of gloo's, so that no GPU is waited for; None: one process alone."""
    if group is None:
        return mine
    vote = torch.tensor([mine], dtype=torch.uint8)
    dist.all_reduce(vote, op=dist.ReduceOp.MAX, group=group)
    return bool(vote.item())


def wrap(model: nn.Module, device: torch.device) -> nn.Module:
    """The model as it is trained: with several processes, one that averages its gradients over them."""
    if not dist.is_initialized():
        return model
    return DistributedDataParallel(model, device_ids=[device.index] if device.type == "cuda" else None)


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
    reason = None
    try:
        compiled = torch.compile(model, dynamic=False)
        # through the wrapper: DDP has the graph cut where gradients can be sent while others are still computed
        wrapped = wrap(compiled, device)
        with wrapped.no_sync() if wrapped is not compiled else nullcontext(), autocast:
            wrapped(*batch)[1].backward()
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
        raise ValueError(f"compile=True: torch.compile does not work here: {reason}")
    log.say(f"going on without torch.compile, which does not work here: {reason}")
    return model, wrap(model, device)
