"""The variants of a transformer that experiments.py compares: each changes one part, from outside model.py."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

Attention = Callable[..., Tensor]


# -- attention ---------------------------------------------------------------------------------------------------------
# Each has the signature of model.explicit_attention after its first argument, which is that function.


def squares_attention(
    explicit: Attention, q: Tensor, k: Tensor, v: Tensor, dropout: nn.Dropout, mask: Tensor | None = None
) -> Tensor:
    """Scores are sums of q^2 k^2: a channel raises the score also where query and key have opposite signs."""
    return explicit(q * q, k * k, v, dropout, mask)


def unscaled_attention(
    explicit: Attention, q: Tensor, k: Tensor, v: Tensor, dropout: nn.Dropout, mask: Tensor | None = None
) -> Tensor:
    """Scores are Q K^T, not divided by sqrt(D)."""
    return explicit(q * q.size(-1) ** 0.5, k, v, dropout, mask)


def other_triangle_attention(
    explicit: Attention, q: Tensor, k: Tensor, v: Tensor, dropout: nn.Dropout, mask: Tensor | None = None
) -> Tensor:
    """Each token sees itself and the tokens after it. The last query meets the last key."""
    T, S = q.size(2), k.size(2)
    return explicit(q, k, v, dropout, torch.ones(T, S, dtype=torch.bool, device=q.device).triu(S - T))


def unmasked_attention(
    explicit: Attention, q: Tensor, k: Tensor, v: Tensor, dropout: nn.Dropout, mask: Tensor | None = None
) -> Tensor:
    """Each token sees all tokens."""
    return explicit(q, k, v, dropout, torch.ones(q.size(2), k.size(2), dtype=torch.bool, device=q.device))


def block_without_residual(self: nn.Module, x: Tensor, rope: Any, cache: Any) -> Tensor:
    """Block.forward in which each branch replaces x, (B, T, C), and is not added to it."""
    x = self.attn(self.ln_1(self.conv_1(x, cache)), rope, cache)
    return self.mlp(self.conv_2(self.ln_2(x), cache))


def post_norm_block(self: nn.Module, x: Tensor, rope: Any, cache: Any) -> Tensor:
    """Block.forward that normalises the sum after each branch, as in 2017, and not the branch's input."""
    x = self.conv_1(x, cache)
    x = self.ln_1(x + self.attn(x, rope, cache))
    return self.ln_2(x + self.mlp(self.conv_2(x, cache)))


@dataclass(frozen=True)
class Variant:
    """One change to the model or its training, and what it did with WHATIF's settings on the standard library."""

    name: str
    title: str
    outcome: str = ""
    flags: tuple[str, ...] = ()
    attention: Attention | None = None
    block: Callable[..., Tensor] | None = None


VARIANTS = (
    Variant("dot", "causal attention with dot products"),
    Variant("squares", "scores are products of squares", attention=squares_attention),
    Variant("unscaled", "scores are not divided by sqrt(D)", attention=unscaled_attention),
    Variant("other-triangle", "a token sees itself and the future only", attention=other_triangle_attention),
    Variant("no-mask", "a token sees all tokens", attention=unmasked_attention),
    Variant("no-residual", "branches replace x, instead of adding to it", block=block_without_residual),
    Variant("no-positions", "no position embedding", flags=("--position=none",)),
    Variant("one-head", "one wide head instead of several", flags=("--n_head=1",)),
    Variant("no-dropout", "no dropout", flags=("--dropout=0",)),
    Variant("post-norm", "normalisation after each branch", block=post_norm_block),
    Variant("no-warmup", "the full learning rate from the first step", flags=("--warmup_iters=0",)),
)


@contextmanager
def in_place(model: ModuleType, variant: Variant) -> Iterator[None]:
    """Within it, models are built and run with this variant; afterwards model.py is as it was."""
    explicit, forward = model.ATTENTIONS["explicit"], model.Block.forward
    try:
        if variant.attention:
            model.ATTENTIONS["explicit"] = partial(variant.attention, explicit)
        if variant.block:
            model.Block.forward = variant.block
        yield
    finally:
        model.ATTENTIONS["explicit"], model.Block.forward = explicit, forward
