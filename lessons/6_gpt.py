"""gpt: the decoder of lesson 5 alone, trained on one text; then its weights in the repository's model.py.

A GPT is a function of two things, tokens and weights, and here it is written as one: `gpt(idx, w, n_head)`, where w is
a dict from names to tensors. The names are GPT-2's, under which model.py, train.py and sample.py keep their weights
too. So the weights move over as they are, and both must give the same logits.

The same as in lesson 5: embed, then attention and a feed-forward network around which the input is carried on, then a
head. Attention is lesson 4's, from masked scores to several heads. New: no encoder, and so no cross-attention, for the
text before is all there is to read; the norm stands before each branch, not after the sum, and a last one before the
head; positions are learnt; GELU for ReLU; Adam is written out.

    python lessons/6_gpt.py

takes 90 seconds on one core of a server CPU (Intel Xeon; an AMD EPYC: 4 minutes): held-out loss 1.36 nats per character
(seeds 2 and 3: 1.37 and 1.29; seed 1 on the EPYC, which rounds otherwise: 1.38), where a blind guess costs 4.63, and
the logits of model.py are the same.
"""

import argparse
import math
import sys
import time
from copy import deepcopy
from pathlib import Path
from pydoc_data.topics import topics  # the text behind Python's help("while"): the language reference

import torch
from torch import Tensor
from torch.nn import functional as F

B, T = 16, 64  # windows of the text in a batch, characters in a window
Weights = dict[str, Tensor]  # below, V is the number of different characters, C = n_embd, H = n_head, D = C / H

# -- the model ---------------------------------------------------------------------------------------------------------


def new_weights(V: int, C: int, n_layer: int, generator: torch.Generator) -> Weights:
    """As GPT-2 begins: matrices from a normal distribution of 0.02, gains one, biases zero."""
    w = {"wte.weight": torch.empty(V, C), "wpe.weight": torch.empty(T, C)}  # a vector for each character, each place
    for h in (f"h.{i}" for i in range(n_layer)):
        matrices = {"attn.c_attn": (3 * C, C), "attn.c_proj": (C, C), "mlp.c_fc": (4 * C, C), "mlp.c_proj": (C, 4 * C)}
        for name, shape in matrices.items():
            w |= {f"{h}.{name}.weight": torch.empty(shape), f"{h}.{name}.bias": torch.zeros(shape[0])}
        for name in ("ln_1", "ln_2"):
            w |= {f"{h}.{name}.weight": torch.ones(C), f"{h}.{name}.bias": torch.zeros(C)}
    w |= {"ln_f.weight": torch.ones(C), "ln_f.bias": torch.zeros(C)}
    for name, p in w.items():
        # 2 n_layer branches add to x; with this scale their sum has the size of one
        std = 0.02 / math.sqrt(2 * n_layer) if name.endswith("c_proj.weight") else 0.02
        if p.dim() == 2:
            p.normal_(std=std, generator=generator)
    return {f"transformer.{name}": p for name, p in w.items()}


def linear(x: Tensor, w: Weights, name: str) -> Tensor:
    return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]  # (B, T, n) -> (B, T, m); the weight is kept as (m, n)


def layer_norm(x: Tensor, w: Weights, name: str) -> Tensor:
    """The channels of each token with mean 0 and variance 1, then a gain and a bias for each: arXiv:1607.06450."""
    x = x - x.mean(dim=-1, keepdim=True)
    return x / torch.sqrt((x * x).mean(dim=-1, keepdim=True) + 1e-5) * w[f"{name}.weight"] + w[f"{name}.bias"]


def gelu(x: Tensor) -> Tensor:
    """x times the probability that a standard normal number is below x, a smooth ReLU: arXiv:1606.08415."""
    return x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))


def attention(x: Tensor, w: Weights, name: str, n_head: int) -> Tensor:
    """softmax(Q K^T / sqrt(D) + mask) V in each head; x (B, T, C) -> (B, T, C)."""
    t = x.size(1)
    qkv = linear(x, w, f"{name}.c_attn").chunk(3, dim=-1)  # three of (B, T, C): one matrix makes them all
    q, k, v = (y.unflatten(-1, (n_head, -1)).transpose(1, 2) for y in qkv)  # (B, H, T, D)
    scores = q @ k.transpose(-2, -1) / math.sqrt(q.size(-1))  # (B, H, T, T)
    future = torch.ones(t, t, dtype=torch.bool).triu(1)  # True where the key comes after the query
    y = scores.masked_fill(future, -math.inf).softmax(dim=-1) @ v  # (B, H, T, D)
    return linear(y.transpose(1, 2).flatten(2), w, f"{name}.c_proj")  # the heads side by side, then mixed


def gpt(idx: Tensor, w: Weights, n_head: int) -> Tensor:
    """idx (B, T) -> logits (B, T, V) of the character after each."""
    x = w["transformer.wte.weight"][idx] + w["transformer.wpe.weight"][: idx.size(1)]  # (B, T, C) + (T, C)
    n_layer = sum(name.endswith("ln_1.weight") for name in w)
    for h in (f"transformer.h.{i}" for i in range(n_layer)):
        x = x + attention(layer_norm(x, w, f"{h}.ln_1"), w, f"{h}.attn", n_head)  # each token reads those before it
        hidden = gelu(linear(layer_norm(x, w, f"{h}.ln_2"), w, f"{h}.mlp.c_fc"))  # (B, T, 4 C)
        x = x + linear(hidden, w, f"{h}.mlp.c_proj")  # each token on its own
    # the head is the table of embeddings again (arXiv:1608.05859): which character's vector is x most like?
    return layer_norm(x, w, "transformer.ln_f") @ w["transformer.wte.weight"].T


# -- learning and writing ----------------------------------------------------------------------------------------------


def loss_of(idx: Tensor, w: Weights, n_head: int) -> Tensor:
    """Mean of -log p(next character), in nats; idx (B, T + 1): all but the last are read, all but the first are due."""
    return F.cross_entropy(gpt(idx[:, :-1], w, n_head).flatten(0, 1), idx[:, 1:].flatten())


def windows(text: Tensor, starts: Tensor) -> Tensor:
    return text[starts[:, None] + torch.arange(T + 1)]  # (B, T + 1)


def train(text: Tensor, w: Weights, n_head: int, steps: int, generator: torch.Generator) -> None:
    """Adam (Kingma & Ba 2014, arXiv:1412.6980), which changes the weights in place."""
    beta_1, beta_2, eps, started = 0.9, 0.99, 1e-8, time.monotonic()
    m, v = ({name: torch.zeros_like(p) for name, p in w.items()} for _ in range(2))
    for step in range(1, steps + 1):
        for p in w.values():
            p.requires_grad_(True)
        loss = loss_of(windows(text, torch.randint(len(text) - T, (B,), generator=generator)), w, n_head)
        gradients = torch.autograd.grad(loss, list(w.values()))
        rate = 3e-3 * (1 - step / (steps + 1)) * min(1, step / 20)  # up over 20 steps, then down to 0
        for (name, p), g in zip(w.items(), gradients, strict=True):
            m[name] = beta_1 * m[name] + (1 - beta_1) * g  # mean of the last gradients
            v[name] = beta_2 * v[name] + (1 - beta_2) * g * g  # and of their squares
            m_hat, v_hat = m[name] / (1 - beta_1**step), v[name] / (1 - beta_2**step)  # both means began at zero
            w[name] = p.detach() - rate * m_hat / (v_hat.sqrt() + eps)
        if step % max(1, steps // 20) == 0:
            print(f"step {step}: loss {loss.item():.4f}, {time.monotonic() - started:.0f} s", flush=True)


@torch.no_grad()
def held_out_loss(text: Tensor, w: Weights, n_head: int) -> float:
    """The loss on 500 windows that are the same each time, spread evenly over the text."""
    starts = torch.linspace(0, len(text) - T - 1, 500).long()
    return sum(loss_of(windows(text, part), w, n_head).item() * len(part) for part in starts.split(50)) / len(starts)


@torch.no_grad()
def write(idx: Tensor, n: int, w: Weights, n_head: int, generator: torch.Generator | None = None) -> Tensor:
    """idx (B, T) and n more characters, each drawn from what the model expects; without a generator, the likeliest."""
    for _ in range(n):
        p = gpt(idx[:, -T:], w, n_head)[:, -1].softmax(dim=-1)  # (B, V)
        new = p.argmax(dim=-1, keepdim=True) if generator is None else torch.multinomial(p, 1, generator=generator)
        idx = torch.cat((idx, new), dim=1)
    return idx


# -- the same weights in model.py --------------------------------------------------------------------------------------

ADDS = """\
what model.py adds         why                                                       paper (arXiv)
KVCache                    a new token computes only its own query, key and value    Shazeer 2019, 1911.02150
attention=sdpa             one kernel that never stores the (T, T) weights           Dao et al. 2022, 2205.14135
dropout                    a large model on a small text overfits later              Hinton et al. 2012, 1207.0580
position=rope              scores depend on the distance, not on the place           Su et al. 2021, 2104.09864
norm=rmsnorm               no mean and no bias: less work, as good                   Zhang & Sennrich 2019, 1910.07467
mlp=swiglu                 a gate for each hidden channel: lower loss                Shazeer 2020, 2002.05202
mlp=relu2                  the square of ReLU: cheaper than a gate                   So et al. 2021, 2109.08668
n_kv_head                  heads share keys and values: a smaller cache              Ainslie et al. 2023, 2305.13245
qk_norm                    scores cannot grow without bound in training              Henry et al. 2020, 2010.04245
short_conv                 a token knows its neighbours before attention finds them  Allen-Zhu 2025, 2512.17351
temperature, top_k, top_p  fewer slips into the unlikely when it writes              Holtzman et al. 2019, 1904.09751"""


def in_model_py(w: Weights, V: int, C: int, n_layer: int, n_head: int) -> torch.nn.Module:
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the folder of model.py
    from model import GPT, GPTConfig

    model = GPT(GPTConfig(block_size=T, vocab_size=V, n_layer=n_layer, n_head=n_head, n_embd=C)).eval()
    model.load_state_dict(w | {"lm_head.weight": w["transformer.wte.weight"]})
    return model


def compare(idx: Tensor, w: Weights, model: torch.nn.Module, n_head: int) -> None:
    """idx (B, T): equal logits; and the likeliest continuation of its first character, without and with a cache."""
    w_64, model_64 = {name: p.double() for name, p in w.items()}, deepcopy(model).double()  # to see past rounding
    with torch.no_grad():
        difference = (gpt(idx, w_64, n_head) - model_64(idx, idx)[0]).abs().max().item()
    print(f"the same weights in model.py: logits differ by at most {difference:.1e} in float64")
    assert difference < 1e-9, "gpt() is not what model.py computes"
    started = time.perf_counter()
    ours = write(idx[:1, :1], T - 1, w, n_head)
    here = time.perf_counter() - started
    theirs = torch.cat([idx[:1, :1], *model.generate(idx[:1, :1], T - 1, [torch.Generator()], temperature=0)], dim=1)
    there = time.perf_counter() - started - here
    assert ours.equal(theirs), "the likeliest characters differ"
    print(f"the likeliest {T - 1} characters are the same; here they took {here:.2f} s, with its cache {there:.2f} s")


def main(arguments: list[str] | None = None) -> float:
    """Train, write, compare; returns the held-out loss."""
    parser = argparse.ArgumentParser(description="Train a GPT on one text; then run its weights in model.py.")
    sizes = {"n_embd": (96, "channels"), "n_layer": (3, "blocks"), "n_head": (4, "heads"), "steps": (2000, "batches")}
    for name, (default, what) in (sizes | {"seed": (1, "of all that is drawn")}).items():
        parser.add_argument(f"--{name}", type=int, default=default, help=f"{what} (default: %(default)s)")
    parser.add_argument("--text", metavar="FILE", type=Path, help="learn this text (default: Python's reference)")
    args = parser.parse_args(arguments)
    if min(getattr(args, name) for name in sizes) < 1 or args.n_embd % args.n_head:
        parser.error("sizes are at least 1, and n_embd is a multiple of n_head")
    try:
        text = args.text.read_text(encoding="utf-8") if args.text else "\n\n".join(topics.values())
    except (OSError, UnicodeDecodeError) as error:
        parser.error(f"--text={args.text}: {error}")
    if len(text) < 20 * T:
        parser.error(f"--text={args.text}: {len(text)} characters; at least {20 * T} are needed")

    generator = torch.Generator().manual_seed(args.seed)
    letters = sorted(set(text))
    ids = torch.tensor([letters.index(letter) for letter in text])
    learnt, held_out = ids[: len(ids) * 9 // 10], ids[len(ids) * 9 // 10 :]  # the end of the text is held out
    w = new_weights(len(letters), args.n_embd, args.n_layer, generator)
    print(f"{len(learnt):,} characters to learn, {len(held_out):,} held out; {len(letters)} different ones, so that a")
    print(f"blind guess costs {math.log(len(letters)):.4f} nats; {sum(p.numel() for p in w.values()):,} weights")
    train(learnt, w, args.n_head, args.steps, generator)
    w = {name: p.detach() for name, p in w.items()}
    loss = held_out_loss(held_out, w, args.n_head)
    print(f"held-out loss: {loss:.4f}")
    written = write(held_out[None, :T], 400, w, args.n_head, generator)[0, T:]
    print("\nit writes:\n" + "".join(letters[i] for i in written) + "\n")
    model = in_model_py(w, len(letters), args.n_embd, args.n_layer, args.n_head)
    compare(held_out[: 4 * T].view(4, T), w, model, args.n_head)
    print(f"\n{ADDS}")
    return loss


if __name__ == "__main__":
    main()
