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
    Variant(
        "dot",
        "causal attention with dot products",
        "The baseline: 2.33 with a spread of 0.03 over the seeds, so differences below 0.03 say little. Its text has "
        "the spaces, line ends and endings of Python's words, and few words yet.",
    ),
    Variant(
        "squares",
        "scores are products of squares",
        "0.05 worse than dot, and worse with each seed. Scores are never negative, so a query can prefer a token, but "
        "cannot turn one away, except by raising the scores of all others; that probably is the price.",
        attention=squares_attention,
    ),
    Variant(
        "unscaled",
        "scores are not divided by sqrt(D)",
        "0.14 worse than dot, with each seed. Scores are 5.7 times as large (D is 32), so each step of the optimizer "
        "moves the softmax that much further, and probably it settles on a few tokens before the model knows which "
        "ones matter.",
        attention=unscaled_attention,
    ),
    Variant(
        "other-triangle",
        "a token sees itself and the future only",
        "The loss falls to 0.11, because the token to predict is in sight: the model learns to copy it. What is left "
        "is the last position of the window, which sees itself alone; there generation happens, so the text is "
        "letters without sense.",
        attention=other_triangle_attention,
    ),
    Variant(
        "no-mask",
        "a token sees all tokens",
        "It cheats: the loss is 0.12, a twentieth of dot's, and the text is nearly all spaces. It has learnt to look "
        "up the next token; when it generates, there is none to look up, and only 1 in 32 training positions taught "
        "it to predict.",
        attention=unmasked_attention,
    ),
    Variant(
        "no-residual",
        "branches replace x, instead of adding to it",
        "It learns how often each character occurs and nothing else: guessing from these counts has a loss of 3.27 as "
        "well. Without the sum a token's identity, and the gradient on its way back, must pass through all eight "
        "branches.",
        block=block_without_residual,
    ),
    Variant(
        "no-positions",
        "no position embedding",
        "0.03 worse than dot, with each seed, but hardly more than the spread. The causal mask tells the first token "
        "from the last, because one sees few tokens and the other many; within 32 characters this goes a long way.",
        flags=("--position=none",),
    ),
    Variant(
        "one-head",
        "one wide head instead of several",
        "0.02 worse than dot, with each seed, but less than the spread: 300 steps are too few to need several heads. "
        "One head reads one mixture of tokens in each layer, four heads read four, with the same number of weights.",
        flags=("--n_head=1",),
    ),
    Variant(
        "no-dropout",
        "no dropout",
        "0.06 better than dot, with each seed. Dropout is against learning by heart, and in 300 steps the model sees "
        "less than 2% of the text, each part once: there is nothing to learn by heart yet, and dropout is only noise.",
        flags=("--dropout=0",),
    ),
    Variant(
        "post-norm",
        "normalisation after each branch",
        "0.04 better than dot, with each seed, and a seventh of its spread. With 4 layers and a warm-up the "
        "original order of 2017 does no harm; the trouble that pre-norm cures is reported for deep stacks, which this "
        "one is not.",
        block=post_norm_block,
    ),
    Variant(
        "no-warmup",
        "the full learning rate from the first step",
        "0.28 worse than dot, with each seed, although only 50 of the 300 steps differ. Full steps along the first "
        "gradients, while the optimizer's averages hold nothing yet, take the weights to where the other 250 steps do "
        "not repair them.",
        flags=("--warmup_iters=0",),
    ),
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
