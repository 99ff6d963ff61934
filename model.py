"""The whole transformer: a GPT reads tokens and predicts, at each position, the next token.

Every shape below is written in these letters:

    B  batch, sequences side by side        V  vocab_size, number of different tokens
    T  time, tokens of each sequence        C  n_embd, channels: the width of the residual stream
    H  n_head, heads that ask (queries)     G  n_kv_head, heads that answer (keys, values); G = H unless set
    D  head_dim, width of a head, C / H     S  tokens attended to: T, or cached + T when generating
    F  n_inner, width inside the MLP, 4 C

The path of a batch through the model:

    idx (B, T) -> token + position embedding -> x (B, T, C)
    n_layer times:  x = x + attention(norm(x))     each token collects information from the tokens before it
                    x = x + mlp(norm(x))           each token is processed on its own
                    (short_conv: first mixes x, and the MLP's input, with the last few tokens)
    norm -> head -> logits (B, T, V): softmax(logits[b, t]) is the distribution of token t + 1 of sequence b

Blocks only *add* to x, the residual stream (He et al. 2015, arXiv:1512.03385), so information and gradients have a
direct path through. Normalising before each branch, not after it, keeps deep stacks trainable (GPT-2, Radford et al.
2019). Attention is from Vaswani et al. 2017, arXiv:1706.03762. The defaults, and the names of the weights, are GPT-2's.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn as nn
from torch import Tensor
from torch.nn import functional as F


@dataclass(kw_only=True)
class GPTConfig:
    block_size: int = 1024  # longest context, in tokens
    vocab_size: int = 50304  # GPT-2's 50257, rounded up to a multiple of 64 for the tensor cores
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    dropout: float = 0.0
    bias: bool = True  # in linear layers and LayerNorm, as GPT-2 has them
    position: str = "learned"  # learned | sinusoidal | rope | none
    norm: str = "layernorm"  # layernorm | rmsnorm
    mlp: str = "gelu"  # gelu | gelu_tanh | relu2 | swiglu
    n_kv_head: int | None = None  # None: n_head
    head_dim: int | None = None  # None: n_embd / n_head
    n_inner: int | None = None  # None: 4 n_embd; swiglu has a third matrix, so 8/3 n_embd
    qk_norm: bool = False
    short_conv: int = 0  # number of earlier tokens that each token is mixed with, twice in each block
    tie_embeddings: bool = True
    rope_theta: float = 10000.0
    norm_eps: float = 1e-5
    attention: str = "sdpa"  # sdpa | explicit: two ways to compute the same

    def __post_init__(self):
        choices = {"position": POSITIONS, "norm": NORMS, "mlp": ACTIVATIONS, "attention": ATTENTIONS}
        for key, accepted in choices.items():
            if getattr(self, key) not in tuple(accepted):
                raise ValueError(f"{key}={getattr(self, key)!r}: expected {' | '.join(accepted)}")
        sizes = ("block_size", "vocab_size", "n_layer", "n_head", "n_embd", "n_kv_head", "head_dim", "n_inner")
        for key, least in (dict.fromkeys(sizes, 1) | {"short_conv": 0}).items():
            value = getattr(self, key)
            if value is not None and not (isinstance(value, int) and value >= least):
                raise ValueError(f"{key}={value!r}: expected an int, at least {least}")
        if self.head_dim is None and self.n_embd % self.n_head:
            raise ValueError(f"n_embd={self.n_embd} is not divisible by n_head={self.n_head}")
        self.head_dim = self.head_dim or self.n_embd // self.n_head
        self.n_kv_head = self.n_kv_head or self.n_head
        self.n_inner = self.n_inner or (8 * math.ceil(self.n_embd / 3) if self.mlp == "swiglu" else 4 * self.n_embd)
        impossible = {
            f"dropout={self.dropout}: must be at least 0 and below 1": not 0 <= self.dropout < 1,
            f"n_head={self.n_head} is not divisible by n_kv_head={self.n_kv_head}": self.n_head % self.n_kv_head,
            f"rope_theta={self.rope_theta}: must be above 0": not 0 < self.rope_theta < math.inf,
            f"head_dim={self.head_dim} is odd, and rope turns pairs": self.position == "rope" and self.head_dim % 2,
            f"n_embd={self.n_embd} is odd, and sines come in pairs": self.position == "sinusoidal" and self.n_embd % 2,
        }
        if wrong := [message for message, is_wrong in impossible.items() if is_wrong]:
            raise ValueError(wrong[0])


# -- positions: without them, attention would see a set of tokens, not a sequence --------------------------------------

POSITIONS = ("learned", "sinusoidal", "rope", "none")


def sinusoidal_table(block_size: int, n_embd: int) -> Tensor:
    """PE(pos, 2i) = sin(pos / 10000^(2i/C)), PE(pos, 2i+1) = cos(the same); (block_size, C). arXiv:1706.03762, 3.5."""
    pos = torch.arange(block_size, dtype=torch.float64)[:, None]  # (T, 1)
    angle = pos / 10000 ** (torch.arange(0, n_embd, 2, dtype=torch.float64) / n_embd)  # (T, C/2)
    return torch.stack((angle.sin(), angle.cos()), dim=-1).flatten(1).float()  # (T, C): sin, cos, sin, cos, ...


def rotary_table(pos: Tensor, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """cos and sin, (T, D) each, of the angles by which rope turns each pair of channels at the positions `pos` (T)."""
    frequency = theta ** (-torch.arange(0, head_dim, 2, device=pos.device, dtype=torch.float32) / head_dim)  # (D/2)
    angle = torch.outer(pos.float(), frequency).repeat(1, 2)  # (T, D): channel i is paired with i + D/2
    return angle.cos(), angle.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each pair of channels of x (B, H, T, D) by its angle, so that the product of a query and a key depends on
    the distance between their positions: RoPE, Su et al. 2021, arXiv:2104.09864."""
    left, right = x.chunk(2, dim=-1)  # (B, H, T, D/2) each
    return (x * cos + torch.cat((-right, left), dim=-1) * sin).type_as(x)


# -- attention -------------------------------------------------------------------------------------------------------


def causal_mask(T: int, S: int, device: torch.device) -> Tensor:
    """(T, S), True where query t may look at key s: never at a later token. The last query meets the last key."""
    return torch.ones(T, S, dtype=torch.bool, device=device).tril(S - T)


def explicit_attention(q: Tensor, k: Tensor, v: Tensor, dropout: nn.Dropout, mask: Tensor | None = None) -> Tensor:
    """softmax(Q K^T / sqrt(D) + mask) V, written out. q (B, H, T, D), k and v (B, G, S, D) -> (B, H, T, D).

    `mask` (T, S) is causal_mask unless given. The weights pass through `dropout`, so a forward hook on that module
    sees the (B, H, T, S) attention maps.
    """
    k = k.repeat_interleave(q.size(1) // k.size(1), dim=1)  # (B, H, S, D): H/G query heads share one key/value head
    v = v.repeat_interleave(q.size(1) // v.size(1), dim=1)  # (B, H, S, D)
    scores = q @ k.transpose(-2, -1)  # (B, H, T, S): how well what t asks for matches what s offers
    # A sum of D products of unit variance has variance D. Without scaling, the softmax would be nearly one-hot from the
    # start, and its gradient nearly zero.
    scores = scores / math.sqrt(q.size(-1))
    mask = causal_mask(q.size(2), k.size(2), q.device) if mask is None else mask
    # exp(-inf) = 0: a token gives no weight to its future, so all T predictions can be trained in one pass
    scores = scores.masked_fill(~mask, -math.inf)
    weights = F.softmax(scores, dim=-1)  # (B, H, T, S): row t is the mixture that token t reads, it sums to 1
    return dropout(weights) @ v  # (B, H, T, S) @ (B, H, S, D) -> (B, H, T, D)


def sdpa_attention(q: Tensor, k: Tensor, v: Tensor, dropout: nn.Dropout, mask: Tensor | None = None) -> Tensor:
    """The same in one fused kernel, which need not store the (T, S) weights (FlashAttention, arXiv:2205.14135)."""
    T, S = q.size(2), k.size(2)
    # is_causal aligns the first query with the first key: correct only if T == S. A single query may see every key.
    is_causal = mask is None and T == S
    mask = causal_mask(T, S, q.device) if mask is None and 1 < T < S else mask
    dropout_p = dropout.p if dropout.training else 0.0
    return F.scaled_dot_product_attention(q, k, v, mask, dropout_p, is_causal, enable_gqa=q.size(1) != k.size(1))


ATTENTIONS = {"sdpa": sdpa_attention, "explicit": explicit_attention}


class KVCache:
    """One layer's keys and values of the tokens so far, (B, G, block_size, D) each, allocated once, filled in place.

    The mask hides the future, so keys and values of past tokens never change; a new token only adds its own.
    """

    def __init__(self, config: GPTConfig, batch_size: int, like: Tensor):
        shape = (batch_size, config.n_kv_head, config.block_size, config.head_dim)
        self.k, self.v = like.new_empty(shape), like.new_empty(shape)
        # the last few inputs of the block's two short convolutions, (B, short_conv, C) each
        self.recent = [like.new_zeros(batch_size, config.short_conv, config.n_embd) for _ in range(2)]
        self.length = 0  # tokens held, S before the next append

    def clear(self) -> None:
        self.length = 0
        for recent in self.recent:
            recent.zero_()

    def positions(self, T: int) -> Tensor:
        """Positions (T) of the next T tokens."""
        return torch.arange(self.length, self.length + T, device=self.k.device)

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Add k, v (B or 1, G, T, D); return all, (B or 1, G, S, D), and the mask for attention: None, causal_mask."""
        end = self.length + k.size(2)
        self.k[:, :, self.length : end] = k
        self.v[:, :, self.length : end] = v
        self.length = end
        return self.k[: len(k), :, :end], self.v[: len(v), :, :end], None


class CausalSelfAttention(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.n_head, self.n_kv_head, self.head_dim = config.n_head, config.n_kv_head, config.head_dim
        # one matrix computes queries, keys and values of all heads: one large product instead of many small ones
        self.c_attn = nn.Linear(config.n_embd, (self.n_head + 2 * self.n_kv_head) * self.head_dim, bias=config.bias)
        self.c_proj = nn.Linear(self.n_head * self.head_dim, config.n_embd, bias=config.bias)
        # normalised queries and keys keep the scores from growing during training (arXiv:2010.04245)
        qk_norm = NORMS[config.norm] if config.qk_norm else lambda *_: nn.Identity()
        self.q_norm, self.k_norm = qk_norm(config, self.head_dim), qk_norm(config, self.head_dim)
        self.attn_dropout, self.resid_dropout = nn.Dropout(config.dropout), nn.Dropout(config.dropout)
        self.attention = ATTENTIONS[config.attention]

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor] | None, cache: KVCache | None) -> Tensor:
        B, T, _ = x.shape
        # Each token has a query (what it looks for), a key (what it can be found by) and a value (what it passes on).
        qkv = self.c_attn(x).view(B, T, -1, self.head_dim).transpose(1, 2)  # (B, H + 2G, T, D)
        q, k, v = qkv.split((self.n_head, self.n_kv_head, self.n_kv_head), dim=1)  # (B, H, T, D), 2 x (B, G, T, D)
        q, k = self.q_norm(q), self.k_norm(k)
        if rope is not None:
            q, k = rotate(q, *rope), rotate(k, *rope)
        k, v, mask = (k, v, None) if cache is None else cache.append(k, v)  # (B, G, S, D) twice, (T, S)
        y = self.attention(q, k, v, self.attn_dropout, mask)  # (B, H, T, D)
        y = y.transpose(1, 2).reshape(B, T, -1)  # (B, T, H*D): the heads side by side
        return self.resid_dropout(self.c_proj(y))  # (B, T, C): mixes the heads' results


# -- the rest of a block ---------------------------------------------------------------------------------------------


def relu2(x: Tensor) -> Tensor:
    x = F.relu(x)
    return x * x  # a third faster than square(), forward and backward


def swiglu(x: Tensor) -> Tensor:
    gate, up = x.chunk(2, dim=-1)  # (B, T, F) each
    return F.silu(gate) * up


class RMSNorm(nn.RMSNorm):
    """x / sqrt(mean(x^2) + eps), times a gain (arXiv:1910.07467); computed in float32, returned in x's dtype."""

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.normalized_shape, self.weight.type_as(x), self.eps)


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,  # Hendrycks & Gimpel 2016, arXiv:1606.08415
    "gelu_tanh": partial(F.gelu, approximate="tanh"),  # the approximation that GPT-2 was trained with
    "relu2": relu2,  # So et al. 2021, arXiv:2109.08668
    "swiglu": swiglu,  # Shazeer 2020, arXiv:2002.05202
}

NORMS: dict[str, Callable[[GPTConfig, int], nn.Module]] = {
    "layernorm": lambda config, width: nn.LayerNorm(width, eps=config.norm_eps, bias=config.bias),
    "rmsnorm": lambda config, width: RMSNorm(width, eps=config.norm_eps),
}


class ShortConv(nn.Module):
    """x[t] + w[n-1] x[t-1] + ... + w[0] x[t-n], with weights for each channel; before the first token x is zero.

    So a token knows its neighbours before attention has learnt to find them: Canon layers (Allen-Zhu 2025,
    arXiv:2512.17351). With n = short_conv = 0 there are no weights, and x is returned unchanged.
    """

    def __init__(self, config: GPTConfig, place: int):
        super().__init__()
        self.place = place  # index of its inputs in KVCache.recent
        weight = nn.Parameter(torch.empty(config.short_conv, 1, config.n_embd)) if config.short_conv else None
        self.register_parameter("weight", weight)  # (n, 1, C)

    def forward(self, x: Tensor, cache: KVCache | None) -> Tensor:
        if self.weight is None:
            return x
        n, T = len(self.weight), x.size(1)
        if cache is None:
            padded = F.pad(x, (0, 0, n, 0))  # (B, n + T, C)
        else:
            recent = cache.recent[self.place]  # (B, n, C): the n tokens before x, then the last n of both
            padded = torch.cat((recent[: len(x)], x), dim=1)  # (B, n + T, C)
            recent.copy_(padded[:, T:])
        for i, weight in enumerate(self.weight.type_as(x)):
            x = x + weight * padded[:, i : i + T]  # (B, T, C)
        return x


class MLP(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        width = 2 * config.n_inner if config.mlp == "swiglu" else config.n_inner  # swiglu: gate and up side by side
        self.c_fc = nn.Linear(config.n_embd, width, bias=config.bias)
        self.c_proj = nn.Linear(config.n_inner, config.n_embd, bias=config.bias)
        self.activation = ACTIVATIONS[config.mlp]
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        x = self.activation(self.c_fc(x))  # (B, T, F)
        return self.dropout(self.c_proj(x))  # (B, T, C)


class Block(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.ln_1 = NORMS[config.norm](config, config.n_embd)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = NORMS[config.norm](config, config.n_embd)
        self.mlp = MLP(config)
        self.conv_1, self.conv_2 = ShortConv(config, place=0), ShortConv(config, place=1)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor] | None, cache: KVCache | None) -> Tensor:
        x = self.conv_1(x, cache)  # (B, T, C)
        x = x + self.attn(self.ln_1(x), rope, cache)  # (B, T, C)
        return x + self.mlp(self.conv_2(self.ln_2(x), cache))  # (B, T, C)


# -- the model -------------------------------------------------------------------------------------------------------


class GPT(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config = config
        self.transformer = nn.ModuleDict()
        self.transformer["wte"] = nn.Embedding(config.vocab_size, config.n_embd)
        if config.position in ("learned", "sinusoidal"):
            self.transformer["wpe"] = nn.Embedding(config.block_size, config.n_embd)
        if config.position == "sinusoidal":
            table = sinusoidal_table(config.block_size, config.n_embd)
            self.transformer.wpe.weight = nn.Parameter(table, requires_grad=False)
        self.transformer["drop"] = nn.Dropout(config.dropout)
        self.transformer["h"] = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.transformer["ln_f"] = NORMS[config.norm](config, config.n_embd)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.init_weights()
        if config.tie_embeddings:  # one vector for a token as input and as prediction (arXiv:1608.05859)
            self.lm_head.weight = self.transformer.wte.weight

    def init_weights(self) -> None:
        for name, parameter in self.named_parameters():
            # 2 n_layer branches add to the residual stream; with this scale their sum has the size of one (GPT-2, 2.3)
            std = 0.02 / math.sqrt(2 * self.config.n_layer) if name.endswith("c_proj.weight") else 0.02
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
            elif parameter.dim() == 1:  # gains of the norms
                nn.init.ones_(parameter)
            elif parameter.requires_grad:  # all but the sinusoidal table
                nn.init.normal_(parameter, std=std)

    def forward(
        self, idx: Tensor, targets: Tensor | None = None, cache: list[KVCache] | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """idx (B, T) -> logits (B, T, V), and the mean loss in nats against targets (B, T); target -1 is ignored.

        Without targets: the last position's logits, (B, 1, V), and None. With a cache, idx continues the cached tokens.
        """
        x = self.hidden_states(self.transformer.wte(idx), cache)  # (B, T, C)
        if targets is None:
            return self.lm_head(x[:, -1:]), None
        logits = self.lm_head(x)  # (B, T, V)
        return logits, F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1)

    def hidden_states(self, x: Tensor, cache: list[KVCache] | None = None) -> Tensor:
        """Token embeddings (B, T, C) -> the head's input (B, T, C). kqv/loss.py computes its own loss from it."""
        c, end = self.config, x.size(1) + (0 if cache is None else cache[0].length)
        assert end <= c.block_size, f"{end} tokens do not fit block_size={c.block_size}"
        pos = torch.arange(end, device=x.device) if cache is None else cache[0].positions(x.size(1))  # (T)
        if "wpe" in self.transformer:
            x = x + self.transformer.wpe(pos).type_as(x)  # (B, T, C) + (T, C)
        rope = rotary_table(pos, c.head_dim, c.rope_theta) if c.position == "rope" else None  # (T, D) twice
        x = self.transformer.drop(x)
        for layer, block in enumerate(self.transformer.h):
            x = block(x, rope, None if cache is None else cache[layer])  # (B, T, C)
        return self.transformer.ln_f(x)

    def num_params(self) -> int:
        """Number of weights in matrix products: all, except embeddings that are only looked up."""
        looked_up = ["wpe"] * ("wpe" in self.transformer) + ["wte"] * (not self.config.tie_embeddings)
        n = sum(parameter.numel() for parameter in self.parameters())
        return n - sum(self.transformer[name].weight.numel() for name in looked_up)

    def flops_per_token(self, T: int | None = None) -> int:
        """FLOPs of forward and backward for one token of T (default block_size), as PaLM counts (arXiv:2204.02311, B).

        Each weight: a multiply and an add forward, twice that backward, 6 in all. Each layer: 2 T H D for Q K^T and
        as many for weights @ V, three times. By convention the causal mask saves nothing.
        """
        c = self.config
        return 6 * self.num_params() + 12 * c.n_layer * c.n_head * c.head_dim * (T or c.block_size)

    @torch.inference_mode()
    def generate(
        self,
        idx: Tensor,
        max_new_tokens: int,
        generators: Sequence[torch.Generator],
        vocab_size: int | None = None,
        kv_cache: bool = True,
        **sampling: float | None,
    ) -> Iterator[Tensor]:
        """Continue idx (B, T): yield the next token of each sequence, (B, 1), max_new_tokens times.

        Each sequence draws from its own generator, on the CPU; idx (1, T) is a prompt that all sequences share, and is
        read once. Ids from `vocab_size` on (padding of the head) are never drawn. For `sampling` see next_token.
        A full cache is refilled with the last block_size / 2 tokens, so that the cost of a token stays bounded;
        kv_cache=False recomputes the last block_size tokens for each. kqv/generate.py does the same faster on GPUs.
        """
        block_size, B = self.config.block_size, len(generators)
        blocks, like = self.transformer.h, self.transformer.wte.weight
        cache = [KVCache(self.config, B, like) for _ in blocks] if kv_cache else None
        new, idx = idx[:, -block_size:], idx.expand(B, -1)  # (1 or B, T), (B, T)
        for _ in range(max_new_tokens):
            if cache is None:
                new = idx[:, -block_size:]
            elif cache[0].length + new.size(1) > block_size:
                for layer in cache:
                    layer.clear()
                new = idx[:, -max(1, block_size // 2) :]
            logits = self(new, cache=cache)[0][:, -1, :vocab_size].expand(B, -1)  # (1 or B, 1, V) -> (B, V)
            if not logits.sum(dtype=torch.float32).isfinite():  # if one is nan or inf, so is the sum
                raise FloatingPointError("the logits are not all finite")
            u = torch.cat([torch.rand(1, generator=generator) for generator in generators])[:, None]  # (B, 1)
            new = next_token(logits, u.to(idx.device), seen=idx, **sampling)  # (B, 1)
            idx = torch.cat((idx, new), dim=1)  # (B, T + 1)
            yield new

    @classmethod
    def from_pretrained(cls, name: str, dropout: float = 0.0) -> "GPT":
        """Weights from Hugging Face: gpt2 | gpt2-medium | gpt2-large | gpt2-xl, or a folder in its format."""
        from kqv.hub import load_pretrained  # the rest of this file needs only torch

        return load_pretrained(cls, GPTConfig, name, dropout)


# -- sampling --------------------------------------------------------------------------------------------------------


def next_token(
    logits: Tensor,
    u: Tensor,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    repetition_penalty: float = 1.0,
    seen: Tensor | None = None,
) -> Tensor:
    """Draw a token for each row: logits (B, V), and a number from [0, 1) for each row, u (B, 1) -> (B, 1).

    temperature 0 takes the likeliest token. top_k keeps the k likeliest; top_p the likeliest whose probabilities add up
    to top_p (arXiv:1904.09751); min_p those at least min_p times as likely as the likeliest (arXiv:2407.01082).
    repetition_penalty makes the tokens in seen (B, T) less likely (arXiv:1909.05858).
    """
    logits = logits.float()
    if repetition_penalty != 1:
        score = logits.gather(1, seen)  # (B, T)
        penalized = torch.where(score > 0, score / repetition_penalty, score * repetition_penalty)
        logits = logits.scatter(1, seen, penalized)
    if temperature < 1e-5:  # dividing by it could overflow
        return logits.argmax(dim=-1, keepdim=True)
    logits, ids = logits.topk(min(top_k or logits.size(-1), logits.size(-1)))  # (B, k) each, the likeliest first
    probs = F.softmax(logits / temperature, dim=-1)
    if top_p is not None:
        probs = probs.masked_fill(probs.cumsum(dim=-1) - probs >= top_p, 0)  # always keeps the first
    if min_p is not None:
        probs = probs.masked_fill(probs < min_p * probs[:, :1], 0)
    cumulative = probs.cumsum(dim=-1)  # its inverse at u is the draw: the same on every device
    return ids.gather(1, torch.searchsorted(cumulative, u * cumulative[:, -1:]))
