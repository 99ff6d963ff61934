"""Inside a trained model, on one text: what attends to what, the loss of each token, what each layer would say.

B is 1 here. T tokens, H heads and V different tokens are model.py's letters; L is n_layer.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kqv.tokenizer import Tokenizer

TOP = 5  # alternatives that are shown for each token
INVISIBLE = {" ": "␣", "\n": "⏎", "\t": "⇥", "\r": "␍"}


def label(tokenizer: Tokenizer, token: int) -> str:
    """A token as text that can be seen: spaces and line ends as signs, the rest of what does not print escaped.

    A token that is only a part of a UTF-8 character is shown as its bytes.
    """
    data = tokenizer.decode_bytes([token])
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError:
        return "".join(f"\\x{byte:02x}" if byte > 126 or byte < 33 else chr(byte) for byte in data)
    shown = (INVISIBLE.get(c) or (c if c.isprintable() else c.encode("unicode_escape").decode()) for c in text)
    return "".join(shown)


# -- attention ---------------------------------------------------------------------------------------------------------


@torch.inference_mode()
def attention_maps(model: nn.Module, idx: Tensor, explicit: Callable[..., Tensor]) -> Tensor:
    """The attention weights of all heads, (L, H, T, T), on idx (1, T): row t is the mixture that token t reads.

    `explicit` is model.py's explicit_attention. It takes the place of the model's attention for this one pass; forward
    hooks on attn_dropout, through which the weights go, keep them.
    """
    maps, handles = [], []
    fused = [block.attn.attention for block in model.transformer.h]
    try:
        for block in model.transformer.h:
            block.attn.attention = explicit
            keep = block.attn.attn_dropout.register_forward_hook(lambda _, __, weights: maps.append(weights[0]))
            handles.append(keep)
        model.eval()(idx)
    finally:
        for block, attention in zip(model.transformer.h, fused, strict=True):
            block.attn.attention = attention
        for handle in handles:
            handle.remove()
    return torch.stack(maps).float()


def rollout(maps: Tensor) -> Tensor:
    """Attention through all layers: maps (L, H, T, T) -> (T, T), rows sum to 1. Abnar & Zuidema, arXiv:2005.00928.

    Each layer passes on half of the residual stream and half of the mean of its heads.
    """
    T = maps.size(-1)
    result = torch.eye(T)
    for layer in maps.mean(dim=1):  # (T, T)
        result = (0.5 * layer + 0.5 * torch.eye(T)) @ result
    return result


def strongest(maps: Tensor, query: int, count: int = TOP) -> list[tuple[int, int, int, float]]:
    """The strongest keys of one query over all heads of maps (L, H, T, T): (layer, head, key, weight), sorted."""
    weights = maps[:, :, query, : query + 1]  # (L, H, query + 1)
    values, places = weights.flatten().topk(min(count, weights.numel()))
    found = []
    for value, place in zip(values.tolist(), places.tolist(), strict=True):
        layer_head, key = divmod(place, query + 1)
        found.append((*divmod(layer_head, maps.size(1)), key, value))
    return found


# -- the loss of each token --------------------------------------------------------------------------------------------


@dataclass
class TokenLosses:
    """What a model says of a text of N tokens. The first token has no context, so nothing is said of it."""

    losses: list[float | None]  # nats
    top: list[list[tuple[int, float]] | None]  # the likeliest tokens in its place, and their probabilities
    lens: list[list[tuple[int, float] | None]]  # [layer][token]: what this layer would have predicted in its place
    loss: float  # mean, nats per token
    bits_per_byte: float
    windows: int  # of at most block_size tokens each, in which the text was read

    def in_text(self, ids: list[int], tokenizer: Tokenizer) -> dict[str, Any]:
        """The same with labels in place of ids, in values that JSON can hold."""

        def labelled(pair: tuple[int, float] | None) -> list[Any] | None:
            return pair and [label(tokenizer, pair[0]), pair[1]]

        numbers = {"tokens": [label(tokenizer, token) for token in ids], "losses": self.losses}
        numbers["top"] = [pairs and [labelled(pair) for pair in pairs] for pairs in self.top]
        numbers["lens"] = [[labelled(pair) for pair in layer] for layer in self.lens]
        return numbers | {"loss": self.loss, "bits_per_byte": self.bits_per_byte}


@torch.inference_mode()
def token_losses(model: nn.Module, ids: list[int], tokenizer: Tokenizer) -> TokenLosses:
    """The loss of each token of a text, and what each layer would say (logit lens: the head after every block).

    A text longer than block_size is read in windows that overlap by half, so that each token has context.
    """
    size = model.config.block_size
    losses: list[float | None] = [None]
    top: list[list[tuple[int, float]] | None] = [None]
    lens: list[list[tuple[int, float] | None]] = [[None] for _ in model.transformer.h]
    start, windows = 0, 0
    while len(losses) < len(ids) or not windows:
        window = ids[start : start + size + 1]
        x = torch.tensor([window[:size]])  # (1, T)
        layers = hidden_by_layer(model, x)  # (L, T, C)
        first = len(losses) - 1 - start  # earlier positions were read in the window before
        targets = torch.tensor(window[first + 1 :], dtype=torch.int64)  # (n)
        for layer, hidden in enumerate(layers):
            logits = model.lm_head(hidden[first : first + len(targets)]).float()  # (n, V)
            probs = F.softmax(logits[:, : tokenizer.vocab_size], dim=-1)  # (n, V)
            best = probs.max(dim=-1)
            lens[layer] += zip(best.indices.tolist(), best.values.tolist(), strict=True)
        # logits and probs are now the last layer's, the model's own
        losses += F.cross_entropy(logits, targets, reduction="none").tolist()
        likeliest = probs.topk(min(TOP, tokenizer.vocab_size))
        for indices, values in zip(likeliest.indices.tolist(), likeliest.values.tolist(), strict=True):
            top.append(list(zip(indices, values, strict=True)))
        windows, start = windows + 1, len(losses) - 1 - size // 2
    total = sum(losses[1:])
    n_bytes = len(tokenizer.decode_bytes(ids[1:]))
    mean = total / max(1, len(ids) - 1)
    return TokenLosses(losses, top, lens, mean, total / math.log(2) / max(1, n_bytes), windows)


def hidden_by_layer(model: nn.Module, idx: Tensor) -> list[Tensor]:
    """What the head would read after each block, idx (1, T) -> L times (T, C); the last is what it does read."""
    outputs: list[Tensor] = []
    handles = [block.register_forward_hook(lambda _, __, x: outputs.append(x)) for block in model.transformer.h]
    try:
        model.eval().hidden_states(model.transformer.wte(idx))
    finally:
        for handle in handles:
            handle.remove()
    return [model.transformer.ln_f(x)[0] for x in outputs]


# -- positions ---------------------------------------------------------------------------------------------------------


def position_table(model_module: Any, model: nn.Module) -> Tensor:
    """A model's positions, a row for each: its table (block_size, C), or rope's cosines and sines (block_size, 2 D)."""
    config = model.config
    if config.position == "rope":
        pos = torch.arange(config.block_size)
        return torch.cat(model_module.rotary_table(pos, config.head_dim, config.rope_theta), dim=1)
    return model.transformer.wpe.weight.detach().float()


def similarity_by_distance(model_module: Any, config: Any, table: Tensor) -> Tensor:
    """The mean similarity of two positions, by their distance: (block_size). 1 at distance 0.

    A table: the cosine of the angle between two rows. rope: the product of a query and an equal key (all ones), turned
    by two positions, against the same at distance 0.
    """
    if config.position == "rope":
        ones = torch.ones(1, 1, config.block_size, config.head_dim)  # (B, H, T, D)
        rows = model_module.rotate(ones, *table.chunk(2, dim=1))[0, 0]  # (T, D)
    else:
        rows = table
    rows = rows / rows.norm(dim=1, keepdim=True).clamp(min=1e-12)
    products = rows @ rows.T  # (T, T)
    return torch.stack([products.diagonal(distance).mean() for distance in range(len(rows))])
