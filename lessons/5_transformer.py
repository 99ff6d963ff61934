"""transformer: the original, an encoder and a decoder that translate (Vaswani et al. 2017, arXiv:1706.03762).

The encoder reads the source, each token looking at all others. The decoder writes the target one token at a time: its
tokens look at those before them, and in the cross-attention their queries meet keys and values of the *source*. Which
tokens of the source a written token looks at is a map from one language to the other; where the order of words
differs, it crosses. The task here: numbers in words. 421 is "four hundred and twenty-one" and, in German,
"vierhunderteinundzwanzig": four hundred one and twenty.

The same as in lesson 4: softmax(Q K^T / sqrt(d_k)) V in several heads, the causal mask. New: two sequences and the
attention across; layers with feed-forward networks, a residual sum and a norm (after the sum; GPT, lesson 6, puts it
before); sinusoidal positions; label smoothing; a learning rate that rises and falls; beam search. Names and sections
are the paper's:

    source (B, S), target (B, T) ids   d_model  width of a token's vector      h    heads
    x (B, T, d_model)                  d_ff     width inside feed-forward      d_k  width of a head, d_model / h
    memory (B, S, d_model)             N        layers of each stack           A    attention weights (B, h, T, S)

    python lessons/5_transformer.py --picture=map.png

takes 60 seconds on one core of a server CPU (Intel Xeon; an AMD EPYC: 125): 99.6% to 100.0% of 500 held-out numbers are
right to the letter, by seed and by how the machine rounds, and the map of 421 shows "ein" reading "one" before
"zwanzig" reads "twenty". Languages take longer:

    ... --source=de.txt --target=en.txt --held_out=1000 --d_model=128 --N=3 --d_ff=512 --P_drop=0.1
        --batch_size=128 --steps=4000 --warmup=1000

with Multi30k's 29,000 pairs, and the 1,000 of test 2016 as the last lines of the files: BLEU 38.3 from German to
English, after 124 minutes of CPU time on the EPYC (beside other programs).
"""

import argparse
import math
import re
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn as nn
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

SPECIAL, SPACE = ["<pad>", "<s>", "</s>"], "▁"  # fills short rows, before the first token, after the last; in a token
PAD, START, END = range(3)  # their ids

# -- the model: 3.2 attention, 3.3 feed-forward, 3.5 positions, 3.1 the stacks -----------------------------------------


class MultiHeadAttention(nn.Module):
    def __init__(self, d_model: int, h: int):
        super().__init__()
        self.h, self.d_k = h, d_model // h
        self.W_q, self.W_k, self.W_v, self.W_o = (nn.Linear(d_model, d_model) for _ in range(4))

    def forward(self, x: Tensor, memory: Tensor, mask: Tensor) -> Tensor:
        """x (B, T, d_model) asks, memory (B, S, d_model) answers; mask (B or 1, 1, T or 1, S) says what it may see."""
        projected = self.W_q(x), self.W_k(memory), self.W_v(memory)  # (B, T, d_model), (B, S, d_model) twice
        q, k, v = (y.unflatten(-1, (self.h, self.d_k)).transpose(1, 2) for y in projected)  # (B, h, T or S, d_k)
        scores = q @ k.transpose(-2, -1) / math.sqrt(self.d_k)  # (B, h, T, S)
        self.A = F.softmax(scores.masked_fill(~mask, -math.inf), dim=-1)  # (B, h, T, S), kept for the picture
        return self.W_o((self.A @ v).transpose(1, 2).flatten(2))  # (B, T, d_model): the heads side by side, mixed


class Layer(nn.Module):
    """Of the encoder, or, with cross-attention between its two parts, of the decoder."""

    def __init__(self, d_model: int, h: int, d_ff: int, P_drop: float, cross: bool):
        super().__init__()
        self.attention = MultiHeadAttention(d_model, h)
        self.cross_attention = MultiHeadAttention(d_model, h) if cross else None
        self.feed_forward = nn.Sequential(nn.Linear(d_model, d_ff), nn.ReLU(), nn.Linear(d_ff, d_model))
        self.norm_1, self.norm_2, self.norm_3 = (nn.LayerNorm(d_model) for _ in range(3))  # 2: of cross-attention
        self.drop = nn.Dropout(P_drop)

    def forward(self, x: Tensor, mask: Tensor, memory: Tensor | None = None, seen: Tensor | None = None) -> Tensor:
        x = self.norm_1(x + self.drop(self.attention(x, x, mask)))  # (B, T, d_model)
        if self.cross_attention is not None:
            x = self.norm_2(x + self.drop(self.cross_attention(x, memory, seen)))
        return self.norm_3(x + self.drop(self.feed_forward(x)))


def positions(length: int, d_model: int) -> Tensor:
    """PE(pos, 2i) = sin(pos / 10000^(2i/d_model)), PE(pos, 2i + 1) = cos(the same): (length, d_model)."""
    angle = torch.arange(length)[:, None] / 10000 ** (torch.arange(0, d_model, 2) / d_model)  # (length, d_model / 2)
    return torch.stack((angle.sin(), angle.cos()), dim=-1).flatten(1)


class Transformer(nn.Module):
    def __init__(self, vocab_size: int, d_model: int, N: int, h: int, d_ff: int, P_drop: float):
        super().__init__()
        self.d_model, self.drop = d_model, nn.Dropout(P_drop)
        self.embedding = nn.Embedding(vocab_size, d_model)  # for source, target and output: one matrix (3.4)
        nn.init.normal_(self.embedding.weight, std=d_model**-0.5)
        self.encoder = nn.ModuleList(Layer(d_model, h, d_ff, P_drop, cross=False) for _ in range(N))
        self.decoder = nn.ModuleList(Layer(d_model, h, d_ff, P_drop, cross=True) for _ in range(N))

    def embed(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids) * math.sqrt(self.d_model)  # (B, T, d_model), as large as the positions
        return self.drop(x + positions(ids.size(1), self.d_model))

    def encode(self, source: Tensor) -> tuple[Tensor, Tensor]:
        """(B, S) -> memory (B, S, d_model), and which of its tokens are not padding, (B, 1, 1, S)."""
        x, seen = self.embed(source), (source != PAD)[:, None, None, :]
        for layer in self.encoder:
            x = layer(x, seen)
        return x, seen

    def decode(self, target: Tensor, memory: Tensor, seen: Tensor) -> Tensor:
        """The target so far (B, T) -> logits of the token after each (B, T, vocab_size)."""
        T = target.size(1)
        look_back = torch.ones(1, 1, T, T, dtype=torch.bool).tril()  # token t sees tokens 0 ... t
        x = self.embed(target)
        for layer in self.decoder:
            x = layer(x, look_back, memory, seen)
        return x @ self.embedding.weight.T

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        return self.decode(target, *self.encode(source))


# -- learning: 5.3 the rate, 5.4 label smoothing -----------------------------------------------------------------------


def noam_rate(step: int, d_model: int, warmup: int) -> float:
    """d_model^-0.5 min(step^-0.5, step warmup^-1.5): a line up to step `warmup`, then it falls as 1 / sqrt(step)."""
    return d_model**-0.5 * min(step**-0.5, step * warmup**-1.5)


def smoothed_loss(logits: Tensor, target: Tensor, smoothing: float) -> Tensor:
    """Mean of -sum_v q(v) log p(v), where q is 1 - smoothing at the target plus smoothing / V anywhere; no padding."""
    log_p = logits.log_softmax(dim=-1)  # (B, T, V)
    at_target = log_p.gather(-1, target[:, :, None])[:, :, 0]  # (B, T)
    loss = -(1 - smoothing) * at_target - smoothing * log_p.mean(dim=-1)
    return loss[target != PAD].mean()


def train(model: Transformer, pairs: list, batch_size: int, steps: int, warmup: int, smoothing: float) -> None:
    """Adam with the paper's settings (5.3); `pairs` hold ids: a source, END (S), and START, its target, END (T + 1)."""
    optimizer, started = torch.optim.Adam(model.parameters(), betas=(0.9, 0.98), eps=1e-9), time.monotonic()
    for step in range(1, steps + 1):
        batch = [pairs[i] for i in torch.randint(len(pairs), (batch_size,))]
        source, target = (pad_sequence(side, batch_first=True) for side in zip(*batch, strict=True))
        optimizer.param_groups[0]["lr"] = noam_rate(step, model.d_model, warmup)
        loss = smoothed_loss(model(source, target[:, :-1]), target[:, 1:], smoothing)  # reads T tokens, T are due
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % max(1, steps // 20) == 0:
            print(f"step {step}: loss {loss.item():.3f}, {time.monotonic() - started:.0f} s", flush=True)


# -- writing: 6.1 beam search ------------------------------------------------------------------------------------------


@torch.no_grad()
def translate(model: Transformer, source: list[int], beam: int, alpha: float = 0.6, longest: int = 60) -> list[int]:
    """The likeliest translation that a beam search finds; with beam = 1 it takes the likeliest token each time.

    The `beam` likeliest beginnings are continued together. A finished one has the score log p / ((5 + T) / 6)^alpha,
    because without the penalty (Wu et al. 2016, arXiv:1609.08144) shorter texts are likelier.
    """
    memory, seen = model.encode(torch.tensor([source]))
    begun, scores = torch.tensor([[START]]), torch.zeros(1)  # (n, T), (n): log p of each beginning
    best, best_score = None, -math.inf
    for T in range(1, longest + 1):
        n = len(begun)
        log_p = model.decode(begun, memory.expand(n, -1, -1), seen)[:, -1].log_softmax(dim=-1)  # (n, V)
        scores, chosen = (scores[:, None] + log_p).flatten().topk(min(beam, n * log_p.size(1)))  # of n V continuations
        begun = torch.cat((begun[chosen // log_p.size(1)], chosen[:, None] % log_p.size(1)), dim=1)  # (beam, T + 1)
        finished, penalty = begun[:, -1] == END, ((5 + T) / 6) ** alpha
        for row, score in zip(begun[finished], scores[finished] / penalty, strict=True):
            if score > best_score:
                best, best_score = row[1:-1].tolist(), float(score)
        begun, scores = begun[~finished], scores[~finished]
        # log p only falls; no beginning can win any more if it would lose with the mildest penalty
        if not len(begun) or scores.max() / ((5 + longest) / 6) ** alpha < best_score:
            break
    return begun[0, 1:].tolist() if best is None else best


# -- the texts ---------------------------------------------------------------------------------------------------------


def numbers(count: int, generator: torch.Generator) -> tuple[list[str], list[str]]:
    """Different numbers below a million, 421 not among them, in English and German; short and long ones alike."""
    from num2words import num2words

    drawn = (10 ** (6 * torch.rand(5 * count, generator=generator))).long().unique()
    shuffled = drawn[torch.randperm(len(drawn), generator=generator)].tolist()
    chosen = [n for n in shuffled if n != 421][:count]
    return [num2words(n, lang="en") for n in chosen], [num2words(n, lang="de") for n in chosen]


def number_tokens(text: str) -> list[str]:
    """four hundred and twenty-one -> four hundred and twenty - one; vierhunderteinundzwanzig, likewise, into parts."""
    return re.findall(r"hundred|thousand|hundert|tausend|und|[^\W_]+?(?=hundert|tausend|und|\b)|[-,]", text)


def byte_pairs(texts: list[str], vocab_size: int) -> Callable[[str], list[str]]:
    """text -> tokens by one byte-pair encoding for both languages (5.1): what often stands together is one token."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Metaspace(SPACE)  # a space belongs to the token after it
    bpe.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=vocab_size, show_progress=False))
    return lambda text: bpe.encode(text).tokens[:100]


@torch.no_grad()
def show(model: Transformer, source: list[int], target: list[int], names: list[str], picture: str | None) -> None:
    """Print the cross-attention, and draw it: a row for each token written, a column for each to read."""
    model(torch.tensor([source]), torch.tensor([[START, *target[:-1]]]))  # row t of A writes token t
    A = model.decoder[-1].cross_attention.A[0].mean(dim=0)[: len(target)]  # (T, S), mean of the heads
    read, written = [names[i] for i in source], [names[i] for i in target]
    print("\nwhere each token written looks, in percent\n\n" + " " * 12 + "".join(f"{token:>9}" for token in read))
    for token, shares in zip(written, (100 * A).round().int().tolist(), strict=True):
        print(f"{token:>12}" + "".join(f"{share if share >= 5 else '.':>9}" for share in shares))
    if picture:
        from matplotlib.figure import Figure

        figure = Figure(layout="constrained")
        axes = figure.subplots()
        axes.imshow(A.numpy(), cmap="Blues", vmin=0, vmax=1)
        axes.set_xticks(range(len(read)), read, rotation=90)
        axes.set_yticks(range(len(written)), written)
        figure.savefig(picture, dpi=150)


def main(arguments: list[str] | None = None) -> float:
    """Learn, translate what was held out; returns the percentage of exact matches, or BLEU for files."""
    parser = argparse.ArgumentParser(description="Translate with the original Transformer.")
    files = {"source": "sentences, one a line (default: numbers)", "target": "their translations, likewise"}
    for name, text in (files | {"picture": "draw the cross-attention of one translation, as .png"}).items():
        parser.add_argument(f"--{name}", metavar="FILE", help=text)
    sizes = {"d_model": 64, "N": 2, "h": 4, "d_ff": 256, "steps": 1500, "batch_size": 64, "warmup": 750, "beam": 4}
    sizes |= {"held_out": 500, "vocab_size": 8000}
    for name, default in (sizes | {"P_drop": 0.0, "smoothing": 0.1, "seed": 1}).items():
        parser.add_argument(f"--{name}", type=type(default), default=default, help="(default: %(default)s)")
    args = parser.parse_args(arguments)
    if args.d_model % (2 * args.h) or min(getattr(args, name) for name in sizes) < 1:
        parser.error("sizes are at least 1, and d_model is a multiple of 2 h")
    if bool(args.source) != bool(args.target):
        parser.error("--source and --target are needed together")
    if args.picture and not (args.picture.endswith(".png") and Path(args.picture).parent.is_dir()):
        parser.error(f"--picture={args.picture}: expected a .png file in a folder that exists")
    torch.manual_seed(args.seed)
    try:
        if args.picture:
            import matplotlib  # noqa: F401  before minutes of learning
        if args.source:
            from sacrebleu import corpus_bleu

            texts = (Path(file).read_text(encoding="utf-8") for file in (args.source, args.target))
            sources, targets = (text.strip().split("\n") for text in texts)
            tokens = byte_pairs(sources[: -args.held_out] + targets[: -args.held_out], args.vocab_size)
        else:
            (sources, targets), tokens = numbers(20_000 + args.held_out, torch.default_generator), number_tokens
    except ImportError as error:
        parser.error(f"this needs the package {error.name}: pip install {error.name}")
    except (OSError, UnicodeDecodeError) as error:
        parser.error(str(error))
    if not args.held_out < len(sources) == len(targets):
        parser.error(f"{len(sources)} and {len(targets)} lines: expected as many, and more than --held_out")

    n = len(sources) - args.held_out  # the first n are learnt
    names = SPECIAL + sorted({token for text in sources[:n] + targets[:n] for token in tokens(text)})
    ids = {token: i for i, token in enumerate(names)}

    def encode(text: str) -> list[int]:
        return [ids[token] for token in tokens(text) if token in ids] + [END]

    rows = ((encode(s), [START, *encode(t)]) for s, t in zip(sources[:n], targets[:n], strict=True))
    pairs = [(torch.tensor(source), torch.tensor(target)) for source, target in rows]
    print(f"{n:,} pairs, {args.held_out:,} held out; {len(ids):,} tokens, such as {' '.join(tokens(targets[0]))}")
    model = Transformer(len(ids), args.d_model, args.N, args.h, args.d_ff, args.P_drop)
    train(model, pairs, args.batch_size, args.steps, args.warmup, args.smoothing)

    model.eval()
    written = [[names[i] for i in translate(model, encode(text), args.beam)] for text in sources[n:]]
    written = ["".join(tokens).replace(SPACE, " ").strip() for tokens in written]
    for source, text in list(zip(sources[n:], written, strict=True))[:3]:
        print(f"  {source} -> {text}")
    source = encode(sources[n] if args.source else "four hundred and twenty-one")
    show(model, source, translate(model, source, args.beam), names, args.picture)
    exact = 100 * sum(a == b for a, b in zip(written, targets[n:], strict=True)) / args.held_out
    print(f"\n{exact:.1f}% of {args.held_out} held-out translations are right to the letter")
    if args.source:
        exact = corpus_bleu(written, [targets[n:]]).score
        print(f"BLEU: {exact:.1f}")
    return exact


if __name__ == "__main__":
    main()
