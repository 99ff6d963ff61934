"""The loss of a model's predictions, in chunks if its vocabulary is large.

The logits, (B*T, V), of a large vocabulary would be the largest tensor of a step by far; here they never exist as a
whole. N below is B*T, the number of predictions.
"""

import math

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

LARGE_VOCAB = 4096  # on CPUs chunks are a quarter faster from here on, as fast at 1000, slower at 65: dev/LOG.md


class LinearCrossEntropy(torch.autograd.Function):
    """F.cross_entropy(x @ weight.T, targets, ignore_index=-1), a chunk of rows at a time; N is B*T.

    The gradients are made along with the loss, while a chunk's logits are there, so that each is computed once only;
    backward multiplies them by what comes from above. (torch's own, new in 2.13, does not follow autocast.)
    """

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, targets: Tensor, training: bool) -> Tensor:
        rows = min(len(x), max(512, math.ceil(len(x) / 8)))  # fewer would leave matrix products too small
        device = x.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        exact = torch.promote_types(dtype, torch.float32)  # of the softmax
        head, loss = weight.to(dtype), x.new_zeros((), dtype=exact)
        logits = head.new_empty(rows, len(head))  # (n, V) of each chunk in turn: fresh memory is slow to write to
        if training:
            grad_x, grad_weight = torch.empty_like(x), torch.zeros_like(weight)
        for start in range(0, len(x), rows):
            part, y = x[start : start + rows].to(dtype), targets[start : start + rows, None]  # (n, C), (n, 1)
            counts = y != -1
            y = y.where(counts, 0)
            chunk = torch.mm(part, head.t(), out=logits[: len(part)])  # (n, V)
            p = chunk.to(exact)
            p -= p.amax(dim=1, keepdim=True)
            of_target = p.gather(1, y)  # (n, 1)
            total = p.exp_().sum(dim=1, keepdim=True)  # (n, 1)
            loss += ((total.log() - of_target) * counts).sum()
            if training:  # d loss / d logits is p / total, the softmax, less 1 for the target
                p = chunk.copy_(p.scatter_add_(1, y, -total).mul_(counts / total))
                grad_x[start : start + rows] = p @ head  # (n, C)
                if dtype == weight.dtype:
                    grad_weight.addmm_(p.t(), part)  # (V, n) @ (n, C)
                else:
                    grad_weight += p.t() @ part
            del p  # before there is the next
        n = (targets != -1).sum()
        if training:
            ctx.save_for_backward(grad_x, grad_weight, n)
        return loss / n

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        grad_x, grad_weight, n = ctx.saved_tensors
        grad = grad / n
        return grad_x.mul_(grad), grad_weight.mul_(grad), None, None


class TiedEmbedding(torch.autograd.Function):
    """weight[idx], and the weight again, as the head's. One function for both lets backward add the embedding's
    gradient to the head's in place; autograd would build a second (V, C), mostly zeros, and add the two."""

    @staticmethod
    def forward(ctx, idx: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(idx)
        return F.embedding(idx, weight), weight.view_as(weight)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor, grad_weight: Tensor) -> tuple[None, Tensor]:
        idx, grad = ctx.saved_tensors[0].flatten(), grad.flatten(0, 1).type_as(grad_weight)  # (N), (N, C)
        # threads add in any order, so sums round differently each time: in index_put_ on CPUs, in index_add_ on GPUs
        if grad.is_cuda:
            return None, grad_weight.index_put_((idx,), grad, accumulate=True)
        return None, grad_weight.index_add_(0, idx, grad)


class NextTokenLoss(nn.Module):
    """What training and evaluation run: a GPT with its loss. (idx, targets), (B, T) each -> mean loss in nats.

    The numbers are those of GPT.forward; a large vocabulary takes less memory and time.
    """

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, idx: Tensor, targets: Tensor) -> Tensor:
        model = self.model
        if model.config.vocab_size < LARGE_VOCAB:
            return model(idx, targets)[1]  # a name for the logits, (B, T, V), would keep them alive
        head = model.lm_head.weight  # (V, C)
        if model.config.tie_embeddings:
            x, head = TiedEmbedding.apply(idx, head)  # (B, T, C), (V, C)
        else:
            x = model.transformer.wte(idx)  # (B, T, C)
        x = model.hidden_states(x).flatten(0, 1)  # (N, C)
        return LinearCrossEntropy.apply(x, head, targets.flatten(), torch.is_grad_enabled())
