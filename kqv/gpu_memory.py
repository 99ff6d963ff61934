"""What GPU kernels keep for the backward pass, for census.py, which runs a step on fake tensors of the CPU."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode


class FusedAttention(torch.autograd.Function):
    """Attention as CUDA kernels compute it: they keep q, k, v, the result and the logarithm of each row's sum."""

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        y = torch.empty_like(q)
        ctx.save_for_backward(q, k, v, y, q.new_empty(q.shape[:3], dtype=torch.float32))
        return y

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, ...]:
        return tuple(torch.empty_like(tensor) for tensor in ctx.saved_tensors[:3])


class FusedNorm(torch.autograd.Function):
    """RMSNorm as one kernel, which keeps its input and a number for each row."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight, x.new_empty(x.shape[:-1]))
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor]:
        return tuple(torch.empty_like(tensor) for tensor in ctx.saved_tensors[:2])


class Float32Softmax(TorchFunctionMode):
    """Within it softmax computes in float32, as under CUDA's autocast."""

    def __torch_function__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        args = (args[0].float(), *args[1:]) if function is F.softmax else args
        return function(*args, **(kwargs or {}))


def softmax_in_float32(attention: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
    with Float32Softmax():
        return attention(*tensors)


def as_on_gpu(model: nn.Module, sdpa: bool) -> None:
    """Make attention, dropout and norms keep the tensors that they keep on a GPU."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Dropout) and module.p:
            module.forward = lambda x, p=module.p: torch.native_dropout(x, p, True)[0]  # keeps one byte per number
        elif isinstance(module, nn.RMSNorm):
            module.forward = lambda x, weight=module.weight: FusedNorm.apply(x, weight)
        elif isinstance(module, nn.LayerNorm):  # in float32 under CUDA's autocast
            module.forward = lambda x, own=module.forward: own(x.float())
        elif name.endswith(".attn") and sdpa:
            module.attention = lambda q, k, v, dropout, mask=None: FusedAttention.apply(q, k, v)
        elif name.endswith(".attn"):
            module.attention = partial(softmax_in_float32, module.attention)
