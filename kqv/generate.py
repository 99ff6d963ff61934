"""Fast generation for sample.py: a forward pass that is compiled once and used for every new token.

A compiled graph needs the same shapes for each token. So attention here reads all block_size places of the cache, and a
mask hides those that are not yet filled.
"""

from typing import Any

import torch
from torch import Tensor, nn


class FixedShapeCache:
    """A view of one layer's KVCache for one new token, at `position` (1): its shapes do not depend on its length."""

    def __init__(self, layer: Any, position: Tensor):
        self.k, self.v, self.recent, self.position, self.length = layer.k, layer.v, layer.recent, position, 0

    def positions(self, T: int) -> Tensor:
        return self.position  # (1)

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Write k, v (B, G, 1, D); return all places, (B, G, S, D), and the mask (1, S) of the filled."""
        k, v = self.k.index_copy_(2, self.position, k), self.v.index_copy_(2, self.position, v)
        return k, v, self.position[:, None] >= torch.arange(k.size(2), device=k.device)


class CompiledForward:
    """model.forward, compiled for one new token; prompts and refills, whose lengths differ, run uncompiled."""

    def __init__(self, model: nn.Module):
        self.model = model
        mode = "reduce-overhead" if model.lm_head.weight.is_cuda else None  # on GPUs a step is one CUDA graph
        self.compiled = torch.compile(model.forward, fullgraph=True, dynamic=False, mode=mode)

    def __call__(self, idx: Tensor, cache: list[Any]) -> tuple[Tensor, None]:
        length = cache[0].length
        if length == 0:
            for layer in cache:
                for tensor in (layer.k, layer.v, *layer.recent):
                    tensor.zero_()  # unfilled places have weight 0, but 0 * nan would be nan
                    torch._dynamo.mark_static_address(tensor, guard=False)  # so that CUDA graphs can write to it
            return self.model(idx, cache=cache)
        position = torch.full((1,), length, device=idx.device)
        logits = self.compiled(idx, cache=[FixedShapeCache(layer, position) for layer in cache])
        for layer in cache:
            layer.length += 1
        return logits
