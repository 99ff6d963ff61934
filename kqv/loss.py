"""The training loss; for large vocabularies it is computed in chunks of predictions.

With a large vocabulary the logits, (B*T, V), would be by far the largest tensor of a step. In chunks they never exist
as a whole. N below is B*T, the number of predictions.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

LARGE_VOCAB = 4096  # on CPUs chunks are a quarter faster at this size, as fast at 1000, slower at 65: dev/LOG.md

BYTES_OF_LOGIT = 8  # of a logit at the peak, with its gradient: 2 + 2 in 16 bits, 4 for the softmax


class LinearCrossEntropy(torch.autograd.Function):
    """F.cross_entropy(x @ weight.T, targets, ignore_index=-1), a chunk of rows at a time; N is B*T.

    forward also computes the gradients, while a chunk's logits exist, so that logits are computed only once; backward
    scales them by the incoming gradient. (PyTorch 2.13 has such a function, but it ignores autocast.)
    """

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, targets: Tensor, training: bool) -> Tensor:
        rows = min(len(x), max(512, math.ceil(len(x) / 8)))  # smaller matrix products would be slower
        device = x.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        exact = torch.promote_types(dtype, torch.float32)  # of the softmax
        head, loss = weight.to(dtype), x.new_zeros((), dtype=exact)
        logits = head.new_empty(rows, len(head))  # (n, V), reused by each chunk: new memory is slow to write to
        learn_head = training and ctx.needs_input_grad[1]
        grad_x, grad_weight = torch.empty_like(x) if training else None, None
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
                if learn_head and grad_weight is None:
                    grad_weight = (p.t() @ part).to(weight.dtype)  # (V, n) @ (n, C)
                elif learn_head and dtype == weight.dtype:
                    grad_weight.addmm_(p.t(), part)
                elif learn_head:
                    grad_weight += p.t() @ part
            del p  # before the next chunk allocates its own
        n = (targets != -1).sum().clamp(min=1)  # a batch can be all prompt
        if training:
            ctx.save_for_backward(grad_x, grad_weight, n)
        return loss / n

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        grad_x, grad_weight, n = ctx.saved_tensors
        grad = grad / n
        return grad_x.mul_(grad), None if grad_weight is None else grad_weight.mul_(grad), None, None


class TiedEmbedding(torch.autograd.Function):
    """weight[idx] (B, T, C), and weight (V, C) for the head: one function for both uses of a tied weight.

    So backward adds the embedding's gradient to the head's in place. Autograd would build a second (V, C), mostly
    zeros, and add the two.
    """

    @staticmethod
    def forward(ctx, idx: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(idx)
        return F.embedding(idx, weight), weight.view_as(weight)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor, grad_weight: Tensor) -> tuple[None, Tensor]:
        idx, grad = ctx.saved_tensors[0].flatten(), grad.flatten(0, 1).type_as(grad_weight)  # (N), (N, C)
        # not index_put_: on CPUs its threads add in any order, on GPUs it is slow where one id is frequent
        return None, grad_weight.index_add_(0, idx, grad)


class Documents:
    """Several documents in a sequence, in the place of model.py's KVCache: none sees another, each has its positions.

    idx (B, T); a document begins with the id end_of_text, as a prompt of that id alone does. What comes before the
    first such id is a document too, the rest of one.
    """

    length = 0  # no tokens are cached

    def __init__(self, idx: Tensor, end_of_text: int, config: Any):
        begins, place = idx == end_of_text, torch.arange(idx.size(1), device=idx.device)  # (B, T), (T)
        number = begins.cumsum(dim=1)  # (B, T)
        self.mask = (number[:, :, None] == number[:, None, :]).tril()[:, None]  # (B, 1, T, T)
        # rope needs distances only, which are the same counted from any place
        relative = config.position == "rope"
        self.pos = place if relative else place - (begins * place).cummax(dim=1).values  # (T) or (B, T)

    def positions(self, T: int) -> Tensor:
        return self.pos

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return k, v, self.mask


class NextTokenLoss(nn.Module):
    """A GPT with its loss, for training and evaluation: (idx, targets), (B, T) each -> mean loss in nats.

    The loss is that of GPT.forward; with a large vocabulary it takes less memory, and on CPUs less time. `room`: bytes
    that the logits may take as a whole; on GPUs that is faster. `end_of_text`: tokens of different documents in a
    sequence do not see each other; each document begins with this id.
    """

    def __init__(self, model: nn.Module, room: float = 0, end_of_text: int | None = None):
        super().__init__()
        self.model, self.room, self.end_of_text = model, room, end_of_text

    def forward(self, idx: Tensor, targets: Tensor) -> Tensor:
        model = self.model
        head, V = model.lm_head.weight, model.config.vocab_size  # (V, C)
        chunks = V >= LARGE_VOCAB and idx.numel() * V * BYTES_OF_LOGIT > self.room
        if V >= LARGE_VOCAB and model.config.tie_embeddings:
            x, head = TiedEmbedding.apply(idx, head)  # (B, T, C), (V, C)
        else:
            x = model.transformer.wte(idx)  # (B, T, C)
        device = x.device.type
        if torch.is_autocast_enabled(device):
            x = x.to(torch.get_autocast_dtype(device))  # so is the residual stream; the loss is as good (dev/LOG.md)
        documents = None if self.end_of_text is None else Documents(idx, self.end_of_text, model.config)
        x = model.hidden_states(x, documents and [documents] * model.config.n_layer)
        return self.loss(x, head, targets, chunks)

    def loss(self, x: Tensor, head: Tensor, targets: Tensor, chunks: bool) -> Tensor:
        """The loss of the head's inputs x (B, T, C), for head (V, C)."""
        x, targets = x.flatten(0, 1), targets.flatten()  # (N, C), (N)
        if chunks:
            return LinearCrossEntropy.apply(x, head, targets, torch.is_grad_enabled())
        loss = F.cross_entropy(F.linear(x, head), targets, ignore_index=-1, reduction="sum")
        return loss / (targets != -1).sum().clamp(min=1)
