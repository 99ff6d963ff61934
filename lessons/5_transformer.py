"""Lesson 5: the Transformer as it was published, an encoder and a decoder that translate.

Vaswani et al. 2017, *Attention Is All You Need*, arXiv:1706.03762; the letters are the paper's. Attention is that of
lesson 4. New is that there are two sequences. The encoder reads the source, each token looking at all others. The
decoder writes the target one token at a time: its tokens look at those before them (the causal mask), and in the
cross-attention their queries meet keys and values of the *source*. Where a word of the target looks is a map from one
language to the other, and where the languages differ in order, its lines cross.

    source (B, S), target (B, T) ids   d_model  width of a token's vector      h    heads
    x (B, T, d_model)                  d_ff     width inside feed-forward      d_k  width of a head, d_model / h
    memory (B, S, d_model)             N        layers of each stack           A    attention weights (B, h, T, S)

The task: numbers in words, from English to German. 421 is "four hundred and twenty-one", and "vierhunderteinundzwanzig",
four hundred one and twenty: the last two are said in the other order.

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
from pathlib import Path

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
        """x (B, T, d_model) asks, memory (B, S, d_model) answers; mask (B or 1, 1, T or 1, S), True where it may look."""
        q = self.W_q(x).unflatten(-1, (self.h, self.d_k)).transpose(1, 2)  # (B, h, T, d_k)
        k = self.W_k(memory).unflatten(-1, (self.h, self.d_k)).transpose(1, 2)  # (B, h, S, d_k)
        v = self.W_v(memory).unflatten(-1, (self.h, self.d_k)).transpose(1, 2)  # (B, h, S, d_k)
        scores = q @ k.transpose(-2, -1) / math.sqrt(self.d_k)  # (B, h, T, S)
        self.A = F.softmax(scores.masked_fill(~mask, -math.inf), dim=-1)  # (B, h, T, S), kept for the picture
        return self.W_o((self.A @ v).transpose(1, 2).flatten(2))  # (B, T, d_model): the heads side by side, mixed


def feed_forward(d_model: int, d_ff: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(d_model, d_ff), nn.ReLU(), nn.Linear(d_ff, d_model))


class EncoderLayer(nn.Module):
    def __init__(self, d_model: int, h: int, d_ff: int, P_drop: float):
        super().__init__()
        self.attention, self.feed_forward = MultiHeadAttention(d_model, h), feed_forward(d_model, d_ff)
        self.norm_1, self.norm_2, self.drop = nn.LayerNorm(d_model), nn.LayerNorm(d_model), nn.Dropout(P_drop)

    def forward(self, x: Tensor, seen: Tensor) -> Tensor:
        x = self.norm_1(x + self.drop(self.attention(x, x, seen)))  # (B, S, d_model)
        return self.norm_2(x + self.drop(self.feed_forward(x)))  # norm after the sum, as in the paper; GPT-2: before


class DecoderLayer(nn.Module):
    def __init__(self, d_model: int, h: int, d_ff: int, P_drop: float):
        super().__init__()
        self.attention, self.cross_attention = MultiHeadAttention(d_model, h), MultiHeadAttention(d_model, h)
        self.feed_forward, self.drop = feed_forward(d_model, d_ff), nn.Dropout(P_drop)
        self.norm_1, self.norm_2, self.norm_3 = (nn.LayerNorm(d_model) for _ in range(3))

    def forward(self, x: Tensor, memory: Tensor, look_back: Tensor, seen: Tensor) -> Tensor:
        x = self.norm_1(x + self.drop(self.attention(x, x, look_back)))  # (B, T, d_model)
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
        self.encoder = nn.ModuleList(EncoderLayer(d_model, h, d_ff, P_drop) for _ in range(N))
        self.decoder = nn.ModuleList(DecoderLayer(d_model, h, d_ff, P_drop) for _ in range(N))

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
            x = layer(x, memory, look_back, seen)
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
    """Epoch after epoch in random order, pairs of about the same length together, so that there is little padding."""
    while True:
        order = torch.randperm(len(pairs), generator=generator).tolist()
        for start in range(0, len(order), 50 * size):
            chosen = sorted(order[start : start + 50 * size], key=lambda i: (len(pairs[i][1]), i))
            groups = [chosen[at : at + size] for at in range(0, len(chosen), size)]
            for group in torch.randperm(len(groups), generator=generator).tolist():
                yield [pairs[i] for i in groups[group]]


def train(
    model: Transformer, pairs: list, steps: int, batch_size: int, warmup: int, smoothing: float, seed: int
) -> None:
    optimizer = torch.optim.Adam(model.parameters(), betas=(0.9, 0.98), eps=1e-9)
    source_of_batches, started = batches(pairs, batch_size, torch.Generator().manual_seed(seed)), time.monotonic()
    model.train()
    for step in range(1, steps + 1):
        batch = next(source_of_batches)
        source, target = (
            padded([s for s, _ in batch]),
            padded([[START, *t, END] for _, t in batch]),
        )  # (B, S), (B, T + 1)
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
    best, best_score = [], -math.inf
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
    return best or begun[0, 1:].tolist()


# -- data --------------------------------------------------------------------------------------------------------------


def numbers(count: int, generator: torch.Generator) -> tuple[list[str], list[str]]:
    """Different random numbers below a million in English and in German words."""
    from num2words import num2words

    chosen = torch.randperm(1_000_000, generator=generator)[:count].tolist()
    return [num2words(n, lang="en") for n in chosen], [num2words(n, lang="de") for n in chosen]


def read_lines(path: str) -> list[str]:
    with (gzip.open if path.endswith(".gz") else open)(path, "rt", encoding="utf-8") as file:
        return [line.strip() for line in file]


def learn_pieces(texts: list[str], vocab_size: int):  # noqa: ANN201  a tokenizers.Tokenizer
    """One byte-pair encoding for both languages (5.1): frequent pairs of neighbours become one token."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    bpe.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=SPECIAL, show_progress=False)
    )
    return bpe


def draw(file: str, A: Tensor, source: list[str], target: list[str]) -> None:
    """The cross-attention A (h, T, S) of one layer, a picture for each head."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4 * len(A), 4.5), layout="constrained")
    for head, (axes, weights) in enumerate(zip(figure.subplots(1, len(A), squeeze=False)[0], A, strict=True)):
        axes.imshow(weights, cmap="Blues", vmin=0, vmax=1)
        axes.set_xticks(range(len(source)), source, rotation=90)
        axes.set_yticks(range(len(target)), target)
        axes.set_title(f"head {head}: each token written (rows) reads from the source")
    figure.savefig(file)


def show_cross_attention(model: Transformer, bpe, text: str, picture: str | None) -> None:
    """Print the source token that each token of the translation of `text` reads most, over the heads of the last layer."""
    source = bpe.encode(text)
    written = translate(model, source.ids, beam=1)
    with torch.no_grad():
        model(torch.tensor([source.ids]), torch.tensor([[START, *written]]))
    A = model.decoder[-1].cross_attention.A[0, :, :-1]  # (h, T, S): the row of a token is that of the one before it
    target = [bpe.id_to_token(index) for index in written]
    print(f"\n{text} -> {bpe.decode(written)}; each token written, and what its heads read most:")
    for t, token in enumerate(target):
        print(f"  {token:12}", *(f"{source.tokens[int(weights[t].argmax())]:10}" for weights in A))
    if picture:
        draw(picture, A, source.tokens, target)


def main(arguments: list[str] | None = None) -> float:
    """Train, translate what was held out; returns the share of exact matches in percent, or BLEU for files."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--source", metavar="FILE", help="sentences, one a line, .gz or not (numbers in English words)")
    parser.add_argument("--target", metavar="FILE", help="their translations")
    parser.add_argument("--test_source", metavar="FILE", help="sentences that are held out (the last 500)")
    parser.add_argument("--test_target", metavar="FILE", help="their translations")
    parser.add_argument("--vocab_size", type=int, help="tokens of both languages together (numbers: 100, files: 8000)")
    sizes = {"d_model": 128, "N": 2, "h": 4, "d_ff": 512, "steps": 1200, "batch_size": 128, "warmup": 400, "beam": 4}
    for name, default in (sizes | {"seed": 1}).items():
        parser.add_argument(f"--{name}", type=int, default=default, help=f"({default})")
    parser.add_argument("--P_drop", type=float, default=0.0, help="dropout, for little text (0)")
    parser.add_argument("--smoothing", type=float, default=0.1, help="label smoothing (0.1)")
    parser.add_argument("--picture", metavar="FILE.png", help="draw the cross-attention of one translation")
    args = parser.parse_args(arguments)
    files = (args.source, args.target)
    for package, needed in (("tokenizers", True), ("num2words", not args.source), ("sacrebleu", args.source)):
        if needed and find_spec(package) is None:
            parser.error(f"this needs the package {package}: pip install {package}")
    if (
        any(files) != all(files)
        or bool(args.test_source) != bool(args.test_target)
        or (args.test_source and not args.source)
    ):
        parser.error("texts come in pairs: --source and --target, and if you like --test_source and --test_target")

    torch.manual_seed(args.seed)
    try:
        texts = (
            [read_lines(file) for file in files]
            if args.source
            else numbers(20_000, torch.Generator().manual_seed(args.seed))
        )
        held = [read_lines(file) for file in (args.test_source, args.test_target)] if args.test_source else None
    except (OSError, UnicodeDecodeError) as error:
        parser.error(str(error))
    if held is None:
        held, texts = [side[-500:] for side in texts], [side[:-500] for side in texts]
    if not len(texts[0]) == len(texts[1]) > 0 or not len(held[0]) == len(held[1]) > 0:
        parser.error(
            f"{len(texts[0])} sentences and {len(texts[1])} translations, {len(held[0])} and {len(held[1])} held out"
        )
    bpe = learn_pieces([*texts[0], *texts[1]], args.vocab_size or (8000 if args.source else 100))
    pairs = [(bpe.encode(s).ids, bpe.encode(t).ids) for s, t in zip(*texts, strict=True)]
    pairs = [(s, t) for s, t in pairs if 0 < len(s) <= 100 and len(t) <= 100]
    print(
        f"{len(pairs):,} pairs, {len(held[0]):,} held out; {bpe.get_vocab_size():,} tokens, such as {' '.join(bpe.encode(texts[1][0]).tokens)}"
    )
    model = Transformer(bpe.get_vocab_size(), args.d_model, args.N, args.h, args.d_ff, args.P_drop)
    train(model, pairs, args.steps, args.batch_size, args.warmup, args.smoothing, args.seed)

    model.eval()
    written = [bpe.decode(translate(model, bpe.encode(text).ids, args.beam)) for text in held[0]]
    for text, translation in list(zip(held[0], written, strict=True))[:3]:
        print(f"  {text} -> {translation}")
    show_cross_attention(model, bpe, held[0][0] if args.source else "four hundred and twenty-one", args.picture)
    if args.source:
        import sacrebleu

        bleu = sacrebleu.corpus_bleu(written, [held[1]]).score
        print(f"\nBLEU {bleu:.1f} on {len(written):,} held-out sentences")
        return bleu
    exact = 100 * sum(a == b for a, b in zip(written, held[1], strict=True)) / len(written)
    print(f"\n{exact:.1f}% of {len(written)} held-out numbers are right to the letter")
    return exact


if __name__ == "__main__":
    main()
