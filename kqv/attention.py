"""Which attention is the fastest on a device; and one for training on CPUs, made of matrix products."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

# Queries in a chunk. Fewer waste less on the future, but their products are smaller (dev/LOG.md)
ROWS = 256
LONGEST = 1024  # tokens; PyTorch's fused kernel, whose work grows as fast but whose memory does not, is as fast there


def use_attention(model: nn.Module, wanted: str, device: torch.device, dtype: torch.dtype) -> str:
    """Put in the attention to train with; returns which: "sdpa", "explicit" (the model's own) or "chunked".

    `wanted` is one of those, or "auto", the fastest. On CPUs the backward pass of PyTorch's fused kernel is slow in 16
    bits: it takes two to four times as long as the products of which it consists. With dropout PyTorch does not use
    that kernel on CPUs, but computes step by step, with its own slower dropout.
    """
    if wanted == "auto":
        slow = dtype != torch.float32 or model.config.dropout > 0
        wanted = "chunked" if device.type == "cpu" and slow and model.config.block_size <= LONGEST else "sdpa"
    if wanted == "chunked":
        for block in model.transformer.h:
            block.attn.attention = chunked_attention
    return wanted


def chunked_attention(q: Tensor, k: Tensor, v: Tensor, dropout: nn.Dropout, mask: Tensor | None = None) -> Tensor:
    """softmax(Q K^T / sqrt(D) + causal mask) V, ROWS queries at a time, the products and the weights in v's dtype.

    q (B, H, T, D), k and v (B, G, S, D) -> (B, H, T, D). A chunk of queries meets only the keys up to its last. Without
    gradients, or with a mask, it is PyTorch's fused kernel, whose forward pass is fast.
    """
    B, H, T, D = q.shape
    q, k = q.type_as(v), k.type_as(v)
    if mask is not None or k.size(2) != T or not torch.is_grad_enabled():
        dropout_p = dropout.p if dropout.training else 0.0
        return F.scaled_dot_product_attention(q, k, v, mask, dropout_p, mask is None, enable_gqa=k.size(1) != H)
    k, v = (x.repeat_interleave(H // x.size(1), dim=1).flatten(0, 1) for x in (k, v))  # (B*H, T, D)
    q = q.flatten(0, 1)
    future = q.new_full((T, T), -math.inf).triu(1)  # added to the scores; 0 for the past
    chunks = []
    with torch.autocast(q.device.type, enabled=False):  # which on GPUs would store the weights in float32
        for start in range(0, T, ROWS):
            end = min(start + ROWS, T)
            scores = torch.baddbmm(
                future[start:end, :end], q[:, start:end], k[:, :end].mT, alpha=1 / math.sqrt(D)
            )  # (B*H, n, end)
            chunks.append(dropout(F.softmax(scores, dim=-1)) @ v[:, :end])  # (B*H, n, D)
    return (torch.cat(chunks, dim=1) if len(chunks) > 1 else chunks[0]).view(B, H, T, D)
