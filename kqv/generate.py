"""Fast generation for sample.py: for each new token the same steps run on the same memory, so a GPU can replay them.

A token's kernels take less time than launching them one by one from Python. So a GPU records them once as a CUDA graph,
from the forward pass to the drawn token, and replays the graph for each token. Nothing in it waits for the host, which
reads tokens while later ones are computed. All shapes must be the same for each token: attention reads all block_size
places of the cache, and a mask hides those that are not yet filled.
"""

import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

AHEAD = 8  # tokens that the GPU may be ahead of what is read from it
ROOM = 1024  # tokens: a longer text than the last one makes new memory, and a new graph, in steps of this size


class FixedShapeCache:
    """A view of one layer's KVCache for one new token, at `position` (1): its shapes do not depend on its length.

    `mask` (S) is added to the scores: 0 where the cache is filled, else -inf.
    """

    def __init__(self, layer: Any, position: Tensor, mask: Tensor):
        self.k, self.v, self.recent, self.length = layer.k, layer.v, layer.recent, 0
        self.position, self.mask = position, mask

    def positions(self, T: int) -> Tensor:
        return self.position  # (1)

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Write k, v (B, G, 1, D); return all places, (B, G, S, D), and the mask (S)."""
        return self.k.index_copy_(2, self.position, k), self.v.index_copy_(2, self.position, v), self.mask


def one_query_attention(q: Tensor, k: Tensor, v: Tensor, dropout: nn.Dropout, mask: Tensor | None = None) -> Tensor:
    """Attention of one new token, q (B, H, 1, D), in few kernels; of several tokens, PyTorch's fused kernel.

    `mask` (S) is added to the scores. The H / G heads that share a key/value head are the rows of one product, so keys
    and values are not repeated.
    """
    B, H, T, D = q.shape
    if mask is None:
        return F.scaled_dot_product_attention(q, k, v, is_causal=T > 1, enable_gqa=k.size(1) != H)
    k, v = k.flatten(0, 1), v.flatten(0, 1)  # (B*G, S, D)
    q = q.reshape(len(k), -1, D)  # (B*G, H/G, D)
    scores = torch.baddbmm(mask, q, k.mT, alpha=1 / math.sqrt(D))  # (B*G, H/G, S)
    return torch.bmm(F.softmax(scores, dim=-1), v).view(B, H, T, D)


class TokenStep:
    """The work for one new token of each of B sequences, on memory of its own; on GPUs a CUDA graph.

    `tokens` (B, N) are the prompt and the new tokens, `place` (1) is where the next one goes, `position` (1) where the
    last one goes in the cache. `drawn` (B, N) are the new tokens alone, `count` (1) of them, -1 if no logit was finite.
    """

    def __init__(
        self,
        forward: Callable[..., tuple[Tensor, None]],
        cache: list[Any],
        next_token: Callable[..., Tensor],
        room: int,
        vocab_size: int | None,
        sampling: dict[str, Any],
    ):
        self.forward, self.cache, self.next_token = forward, cache, next_token
        self.vocab_size, self.sampling = vocab_size, sampling
        for layer in cache:
            layer.k.zero_(), layer.v.zero_()  # places that are not filled have weight 0, but 0 * nan would be nan
        B, device = len(cache[0].k), cache[0].k.device
        self.tokens = torch.zeros(B, room, dtype=torch.int64, device=device)
        self.drawn, self.u = torch.zeros_like(self.tokens), torch.zeros(B, room, device=device)
        self.place, self.position, self.count = torch.zeros(3, 1, dtype=torch.int64, device=device)
        self.graph = None
        if device.type == "cuda":
            self.record()

    def record(self) -> None:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # kernels load, and torch.compile compiles, in a few runs before
            for _ in range(3):
                self.place.fill_(1)
                self.position.zero_(), self.count.zero_()
                self.compute()
        torch.cuda.current_stream().wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.compute()

    def start(self, idx: Tensor, u: Tensor) -> None:
        """Take a prompt, idx (1 or B, T), and the numbers in [0, 1) by which n tokens will be drawn, u (B, n)."""
        self.tokens[:] = idx[:, :1]  # what repetition_penalty finds in unused places must be in the prompt
        self.tokens[:, : idx.size(1)] = idx
        self.u[:, : u.size(1)] = u
        self.place.fill_(idx.size(1))
        self.count.zero_()

    def fill(self, model: nn.Module, idx: Tensor) -> None:
        """Fill the empty cache with idx (1 or B, T), the last T tokens, and draw the next one."""
        for layer in self.cache:
            layer.clear()
        self.draw(model(idx, cache=self.cache)[0])
        self.position.fill_(idx.size(1))

    def advance(self) -> None:
        """Put the last token into the cache, and draw the next one."""
        if self.graph is None:
            self.compute()
        else:
            self.graph.replay()

    def compute(self) -> None:
        new = self.tokens.index_select(1, self.place - 1)  # (B, 1)
        k = self.cache[0].k  # (B, G, S, D)
        empty = torch.arange(k.size(2), device=k.device) > self.position  # (S)
        mask = k.new_zeros(empty.shape).masked_fill(empty, -math.inf)
        logits, _ = self.forward(new, cache=[FixedShapeCache(layer, self.position, mask) for layer in self.cache])
        self.position += 1
        self.draw(logits)

    def draw(self, logits: Tensor) -> None:
        """Draw and write each sequence's next token; logits (1 or B, 1, V)."""
        logits = logits[:, -1, : self.vocab_size].expand(len(self.tokens), -1)  # (B, V)
        finite = logits.sum(dtype=torch.float32).isfinite()  # if one is nan or inf, so is the sum
        u = self.u.index_select(1, self.count)  # (B, 1)
        new = self.next_token(logits.where(finite, 0), u, seen=self.tokens, **self.sampling)  # (B, 1)
        self.tokens.index_copy_(1, self.place, new)
        self.drawn.index_copy_(1, self.count, new.where(finite, -1))
        self.place += 1
        self.count += 1


class FastGeneration:
    """GPT.generate with a KV cache, for many tokens; its memory and its graph are kept for the next prompt.

    `new_cache` is KVCache of model.py. The model's attention is replaced, so it cannot be trained afterwards.
    """

    def __init__(
        self, model: nn.Module, new_cache: Callable[..., Any], next_token: Callable[..., Tensor], compile: bool
    ):
        self.model, self.new_cache, self.next_token = model, new_cache, next_token
        for block in model.transformer.h:
            block.attn.attention = one_query_attention
        self.forward = torch.compile(model.forward, fullgraph=True, dynamic=False) if compile else model.forward
        self.made_for, self.step = None, None

    def step_for(self, batch_size: int, length: int, vocab_size: int | None, sampling: dict[str, Any]) -> TokenStep:
        """The last prompt's TokenStep, or a new one if that was for other settings or is too short."""
        settings = (batch_size, vocab_size, sampling)
        if settings != self.made_for or length > self.step.tokens.size(1):
            self.made_for, self.step = settings, None  # frees its memory first
            like = self.model.transformer.wte.weight
            cache = [self.new_cache(self.model.config, batch_size, like) for _ in self.model.transformer.h]
            room = ROOM * math.ceil(length / ROOM)
            self.step = TokenStep(self.forward, cache, self.next_token, room, vocab_size, sampling)
        return self.step

    @torch.inference_mode()
    def __call__(
        self,
        idx: Tensor,
        max_new_tokens: int,
        generators: Sequence[torch.Generator],
        vocab_size: int | None = None,
        **sampling: float | None,
    ) -> Iterator[Tensor]:
        """As GPT.generate: yield the next token of each sequence, (B, 1), in CPU memory."""
        block_size, end, held = self.model.config.block_size, idx.size(1), 0
        step = self.step_for(len(generators), end + max_new_tokens, vocab_size, sampling)
        # n numbers at once are the n that a generator gives one by one
        step.start(idx, torch.stack([torch.rand(max_new_tokens, generator=generator) for generator in generators]))
        unread = deque()
        for number in range(max_new_tokens):
            if number == 0 or held == block_size:
                last = idx[:, -block_size:] if number == 0 else step.tokens[:, end - max(1, block_size // 2) : end]
                step.fill(self.model, last)
                held = last.size(1)
            else:
                step.advance()
                held += 1
            end += 1
            unread.append(Reading(step.drawn[:, number : number + 1]))
            if len(unread) > (AHEAD if idx.is_cuda else 0):
                yield unread.popleft().wait()
        for reading in unread:
            yield reading.wait()


class Reading:
    """New tokens, (B, 1), on their way to CPU memory, while the GPU computes on."""

    def __init__(self, new: Tensor):
        self.tokens = new.to("cpu", non_blocking=True, copy=True)
        self.arrived = torch.cuda.Event() if new.is_cuda else None
        if self.arrived:
            self.arrived.record()

    def wait(self) -> Tensor:
        if self.arrived:
            self.arrived.synchronize()
        if (self.tokens < 0).any():
            raise FloatingPointError("the logits are not all finite")
        return self.tokens
