"""Lesson 5: the Transformer as it was published, an encoder and a decoder that translate.

Vaswani et al. 2017, *Attention Is All You Need*, arXiv:1706.03762; the letters are the paper's. Attention is that of
lesson 4. New is that there are two sequences. The encoder reads the source, each token looking at all others. The
decoder writes the target one token at a time: its tokens look at those before them (the causal mask), and in the
cross-attention their queries meet keys and values of the *source*. Where a word of the target looks is a map from one
language to the other, and where the languages differ in order, its lines cross.

    source (B, S), target (B, T) ids   d_model  width of a token's vector      h    heads
    x (B, T, d_model)                  d_ff     width inside feed-forward      d_k  width of a head, d_model / h
    memory (B, S, d_model)             N        layers of each stack           A    attention weights (B, h, T, S)

The task: numbers in words, from English to German. 421 is "four hundred and twenty-one" and
"vierhunderteinundzwanzig", four hundred one and twenty: the last two are said in the other order.

    python lessons/5_transformer.py     FIGURES

What if ...
    --N=1                  there is one layer each?
    --h=1                  one head must look at all at once?
    --smoothing=0          the target is one-hot?
    --warmup=1             the first steps are full ones?
    the causal mask is left out (`look_back` all True)?  The loss falls to nothing, and not one number is right.
    the positions are left out?
"""

import argparse
import gzip
import math
import time
from collections.abc import Iterator
from importlib.util import find_spec

import torch
import torch.nn as nn
from torch import Tensor
from torch.nn import functional as F

PAD, START, END = 0, 1, 2  # ids: fills short rows; before the first token; after the last one
SPECIAL = ["<pad>", "<s>", "</s>"]


# -- the model: 3.2 attention, 3.3 feed-forward, 3.5 positions, 3.1 the stacks -----------------------------------------


class MultiHeadAttention(nn.Module):
    def __init__(self, d_model: int, h: int):
        super().__init__()
        self.h, self.d_k = h, d_model // h
        self.W_q, self.W_k, self.W_v, self.W_o = (nn.Linear(d_model, d_model) for _ in range(4))

    def forward(self, x: Tensor, memory: Tensor, mask: Tensor) -> Tensor:
        """x (B, T, d_model) asks, memory (B, S, d_model) answers; mask (B or 1, 1, T or 1, S) says what it may see."""
        q = self.W_q(x).unflatten(-1, (self.h, self.d_k)).transpose(1, 2)  # (B, h, T, d_k)
        k = self.W_k(memory).unflatten(-1, (self.h, self.d_k)).transpose(1, 2)  # (B, h, S, d_k)
        v = self.W_v(memory).unflatten(-1, (self.h, self.d_k)).transpose(1, 2)  # (B, h, S, d_k)
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
        self.norm_1, self.norm_2, self.norm_3 = (nn.LayerNorm(d_model) for _ in range(3))
        self.drop = nn.Dropout(P_drop)

    def forward(self, x: Tensor, mask: Tensor, memory: Tensor | None = None, seen: Tensor | None = None) -> Tensor:
        x = self.norm_1(x + self.drop(self.attention(x, x, mask)))  # norm after the sum, as in the paper; GPT-2: before
        if self.cross_attention is not None:
            x = self.norm_2(x + self.drop(self.cross_attention(x, memory, seen)))  # (B, T, d_model)
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


def padded(rows: list[list[int]]) -> Tensor:
    length = max(map(len, rows))
    return torch.tensor([row + [PAD] * (length - len(row)) for row in rows])


def batches(pairs: list[tuple[list[int], list[int]]], size: int, generator: torch.Generator) -> Iterator[list]:
    """Epoch after epoch in random order."""
    while True:
        order = torch.randperm(len(pairs), generator=generator).tolist()
        for start in range(0, len(order), size):
            yield [pairs[i] for i in order[start : start + size]]


def train(model: Transformer, draw: Iterator[list], steps: int, warmup: int, smoothing: float) -> None:
    """Adam with the paper's settings (5.3), on `steps` batches that `draw` yields."""
    optimizer, started = torch.optim.Adam(model.parameters(), betas=(0.9, 0.98), eps=1e-9), time.monotonic()
    model.train()
    for step in range(1, steps + 1):
        batch = next(draw)
        source = padded([s for s, _ in batch])  # (B, S)
        target = padded(
            [[START, *t, END] for _, t in batch]
        )  # (B, T + 1): read all but the last, predict from the second
        optimizer.param_groups[0]["lr"] = noam_rate(step, model.d_model, warmup)
        loss = smoothed_loss(model(source, target[:, :-1]), target[:, 1:], smoothing)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % max(1, steps // 20) == 0:
            print(f"step {step}: loss {loss:.3f}, {time.monotonic() - started:.0f} s", flush=True)


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


# -- data, and the picture ---------------------------------------------------------------------------------------------


def numbers(count: int, generator: torch.Generator) -> tuple[list[str], list[str]]:
    """Different random numbers below a million in English and in German words."""
    from num2words import num2words

    chosen = torch.randperm(1_000_000, generator=generator)[:count].tolist()
    return [num2words(n, lang="en") for n in chosen], [num2words(n, lang="de") for n in chosen]


def read_lines(path: str) -> list[str]:
    with (gzip.open if path.endswith(".gz") else open)(path, "rt", encoding="utf-8") as file:
        return [line.strip() for line in file]


def learn_pieces(texts: list[str], vocab_size: int):
    """One byte-pair encoding for both languages (5.1), a tokenizers.Tokenizer: frequent neighbours become one token."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    bpe, options = Tokenizer(models.BPE()), {"special_tokens": SPECIAL, "show_progress": False}
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    bpe.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=vocab_size, **options))
    return bpe


def show_cross_attention(model: Transformer, bpe, text: str, picture: str | None) -> None:
    """Print which token of the source each token written reads most, for each head of the last layer; draw it all."""
    source, written = bpe.encode(text), translate(model, bpe.encode(text).ids, beam=1)
    with torch.no_grad():
        model(torch.tensor([source.ids]), torch.tensor([[START, *written]]))
    A = model.decoder[-1].cross_attention.A[
        0, :, :-1
    ]  # (h, T, S): the row that wrote a token is that of the one before
    target = [bpe.id_to_token(index) for index in written]
    print(f"\n{text} -> {bpe.decode(written)}\n  written     most read by head 0, 1, ...")
    for t, token in enumerate(target):
        print(f"  {token:12}" + "".join(f"{source.tokens[int(weights[t].argmax())]:11}" for weights in A).rstrip())
    if picture:
        from matplotlib.figure import Figure

        figure = Figure(figsize=(3.5 * len(A), 4), layout="constrained")
        for axes, weights in zip(figure.subplots(1, len(A), squeeze=False)[0], A.tolist(), strict=True):
            axes.imshow(weights, cmap="Blues", vmin=0, vmax=1)
            axes.set_xticks(range(len(source)), source.tokens, rotation=90)
            axes.set_yticks(range(len(target)), target)
        figure.savefig(picture)


def main(arguments: list[str] | None = None) -> float:
    """Train, translate what was held out; returns the percentage of exact matches, or BLEU for files."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    for name in ("source", "target", "test_source", "test_target"):
        parser.add_argument(f"--{name}", metavar="FILE", help="sentences, one a line, .gz or not (numbers in words)")
    parser.add_argument("--vocab_size", type=int, help="tokens of both languages together (numbers 100, files 8000)")
    sizes = {"d_model": 128, "N": 2, "h": 4, "d_ff": 512, "steps": 1000, "batch_size": 128, "warmup": 800, "beam": 4}
    for name, default in (sizes | {"seed": 1}).items():
        parser.add_argument(f"--{name}", type=int, default=default, help=f"({default})")
    parser.add_argument("--P_drop", type=float, default=0.0, help="dropout, for little text (0)")
    parser.add_argument("--smoothing", type=float, default=0.1, help="label smoothing (0.1)")
    parser.add_argument("--picture", metavar="FILE.png", help="draw the cross-attention of one translation")
    args = parser.parse_args(arguments)
    for package in ("tokenizers", "sacrebleu" if args.source else "num2words"):
        if find_spec(package) is None:
            parser.error(f"this needs the package {package}: pip install {package}")
    if args.d_model % (2 * args.h) or min(getattr(args, name) for name in sizes) < 1:
        parser.error("sizes are at least 1, and d_model is a multiple of 2 h")
    generator = torch.Generator().manual_seed(args.seed)
    torch.manual_seed(args.seed)
    files = [args.source, args.target, args.test_source, args.test_target]
    if any(files) and not all(files):
        parser.error("--source and --target, --test_source and --test_target are needed together")
    try:
        texts = [read_lines(file) for file in files] if all(files) else []
    except (OSError, UnicodeDecodeError) as error:
        parser.error(str(error))
    if not texts:
        english, german = numbers(20_500, generator)
        texts = [english[500:], german[500:], english[:500], german[:500]]
    if len(texts[0]) != len(texts[1]) or len(texts[2]) != len(texts[3]):
        parser.error("a text and its translation have as many lines")
    bpe = learn_pieces([*texts[0], *texts[1]], args.vocab_size or (8000 if args.source else 100))
    pairs = [(bpe.encode(s).ids[:100], bpe.encode(t).ids[:100]) for s, t in zip(*texts[:2], strict=True) if s and t]
    example = " ".join(bpe.encode(texts[1][0]).tokens)
    print(f"{len(pairs):,} pairs and {len(texts[2]):,} held out; {bpe.get_vocab_size():,} tokens: {example}")
    model = Transformer(bpe.get_vocab_size(), args.d_model, args.N, args.h, args.d_ff, args.P_drop)
    train(model, batches(pairs, args.batch_size, generator), args.steps, args.warmup, args.smoothing)

    model.eval()
    written = [bpe.decode(translate(model, bpe.encode(text).ids, args.beam)) for text in texts[2]]
    for text, translation in list(zip(texts[2], written, strict=True))[:3]:
        print(f"  {text} -> {translation}")
    show_cross_attention(model, bpe, texts[2][0] if args.source else "four hundred and twenty-one", args.picture)
    if args.source:
        import sacrebleu

        bleu = sacrebleu.corpus_bleu(written, [texts[3]]).score
        print(f"\nBLEU {bleu:.1f} on {len(written):,} held-out sentences")
        return bleu
    exact = 100 * sum(a == b for a, b in zip(written, texts[3], strict=True)) / len(written)
    print(f"\n{exact:.1f}% of {len(written)} held-out numbers are right to the letter")
    return exact


if __name__ == "__main__":
    main()
