"""attention: from a loop that averages the past to softmax(Q K^T / sqrt(D)) V in several heads, step by step.

Each step says in a loop what the next one says in matrices, and an assert holds that both give the same numbers; each
shape is printed. At the end one layer of attention learns, in some seconds, to find what followed a letter the last
time, and its map is drawn, so that one sees where it looks.

The same as in lesson 3: letters are vectors, torch finds the gradients, the training loop. New: `attend`, one line
there, is taken apart here. Nothing else of the Transformer is used: no MLP, no norm, no residual.
"""

import argparse
import math
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

B, T, C, H = 2, 8, 32, 4  # sequences, tokens of each, channels of a token, heads
LETTERS = "abcdefghijklmnopqrstuvwxyz"
N = 8  # letters of a sequence before it repeats itself


def step(title: str) -> None:
    print(f"\n{title}\n{'-' * len(title)}")


def shape(name: str, letters: str, x: Tensor) -> None:
    print(f"  {name:32} {letters:13} {tuple(x.shape)}")


# -- from the average of the past to weights that depend on the tokens -------------------------------------------------


def average_in_loops(x: Tensor) -> Tensor:
    """y[b, t] = mean of x[b, 0], ..., x[b, t]: the plainest way for a token to learn of those before it."""
    y = torch.zeros_like(x)
    for b in range(x.size(0)):
        for t in range(x.size(1)):
            y[b, t] = x[b, : t + 1].mean(dim=0)  # (t + 1, C) -> (C)
    return y


def average_by_matrix(x: Tensor) -> tuple[Tensor, Tensor]:
    """The same as a product: row t of the weights is 1 / (t + 1) up to column t, then 0."""
    weights = torch.ones(x.size(1), x.size(1)).tril()  # (T, T), lower triangular
    weights = weights / weights.sum(dim=1, keepdim=True)  # each row sums to 1
    return weights @ x, weights  # (T, T) @ (B, T, C) -> (B, T, C)


def causal_softmax(scores: Tensor) -> Tensor:
    """scores (..., T, T) -> weights: at least 0, each row sums to 1, and exp(-inf) = 0 for what is yet to come."""
    future = torch.ones(scores.shape[-2:]).triu(1) == 1  # (T, T)
    return scores.masked_fill(future, -math.inf).softmax(dim=-1)


def attention_in_loops(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """One sequence, one head, q, k, v (T, D): each token asks each token up to itself, and mixes their answers."""
    y = torch.zeros_like(v)
    for t in range(len(q)):
        match = torch.stack([q[t] @ k[s] for s in range(t + 1)]) / math.sqrt(q.size(-1))  # what t asks, what s offers
        share = match.exp() / match.exp().sum()  # the softmax, written out
        for s in range(t + 1):
            y[t] += share[s] * v[s]
    return y


def attention(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """q, k, v (..., T, D) -> softmax(Q K^T / sqrt(D) + mask) V (..., T, D), and the weights (..., T, T)."""
    scores = q @ k.transpose(-2, -1) / math.sqrt(q.size(-1))
    weights = causal_softmax(scores)
    return weights @ v, weights


# -- several heads -----------------------------------------------------------------------------------------------------


def heads_in_a_loop(x: Tensor, w_q: Tensor, w_k: Tensor, w_v: Tensor, w_o: Tensor, heads: int) -> Tensor:
    """Each head is an attention of its own, on its own D columns of the matrices; their results stand side by side."""
    D = w_q.size(1) // heads
    results = []
    for h in range(heads):
        own = slice(h * D, (h + 1) * D)
        y, _ = attention(x @ w_q[:, own], x @ w_k[:, own], x @ w_v[:, own])  # (B, T, D)
        results.append(y)
    return torch.cat(results, dim=-1) @ w_o  # (B, T, H * D) @ (C, C): mixes what the heads found


def split(x: Tensor, heads: int) -> Tensor:
    """(B, T, C) -> (B, H, T, D): a head is one more dimension that the products run over side by side."""
    return x.view(*x.shape[:2], heads, -1).transpose(1, 2)


def multi_head(x: Tensor, w_q: Tensor, w_k: Tensor, w_v: Tensor, w_o: Tensor, heads: int) -> tuple[Tensor, Tensor]:
    """The same without a loop: (B, T, C) -> (B, T, C), and the weights (B, H, T, T)."""
    y, weights = attention(split(x @ w_q, heads), split(x @ w_k, heads), split(x @ w_v, heads))  # (B, H, T, D)
    return y.transpose(1, 2).flatten(2) @ w_o, weights


# -- the steps ---------------------------------------------------------------------------------------------------------


def averages(x: Tensor) -> None:
    step("1. A token learns of its past: the average")
    shape("x, the tokens", "(B, T, C)", x)
    looped = average_in_loops(x)
    shape("average in two loops", "(B, T, C)", looped)

    step("2. The same as one product with a triangular matrix")
    product, weights = average_by_matrix(x)
    assert torch.allclose(product, looped, atol=1e-6)
    shape("weights", "(T, T)", weights)
    print("  rows 0, 1, 2 of the weights:", *[[round(w, 2) for w in row[:4].tolist()] for row in weights[:3]])

    step("3. The same as the softmax of equal scores, with the future masked")
    soft = causal_softmax(torch.zeros(T, T))
    assert torch.allclose(soft, weights)
    assert torch.allclose(soft @ x, looped, atol=1e-6)
    print("  zero scores give the average; other scores will give other shares, and still no look ahead")


def queries_keys_values(x: Tensor, w_q: Tensor, w_k: Tensor, w_v: Tensor) -> None:
    step("4. Scores that depend on the tokens: what one asks (query) times what another offers (key)")
    q, k, v = x @ w_q, x @ w_k, x @ w_v
    shape("q, k, v", "(B, T, C)", q)
    scores = q @ k.transpose(-2, -1)
    assert torch.allclose(scores[1, 5, 2], q[1, 5] @ k[1, 2], atol=1e-5)  # one score is one product of two vectors
    shape("scores = q @ k^T", "(B, T, T)", scores)

    step("5. Why divide by sqrt(D): 64 keys, queries and keys of unit variance")
    print(f"  entropy of the weights, in nats; evenly spread it would be log 64 = {math.log(64):.2f}")
    print(f"  {'D':>5}{'variance of scores':>20}{'entropy':>10}{'after / sqrt(D):  variance':>28}{'entropy':>10}")
    for D in (4, 16, 64, 256, 1024):
        raw = torch.randn(256, D) @ torch.randn(D, 64)
        scaled = raw / math.sqrt(D)
        print(f"  {D:>5}{raw.var():>20.1f}{entropy(raw):>10.2f}{scaled.var():>28.2f}{entropy(scaled):>10.2f}")
    print("  unscaled, a wide head starts out sure of one token: its softmax is flat there and hardly learns")

    step("6. Attention: the values, mixed by the weights")
    y, weights = attention(q, k, v)
    for b in range(B):
        assert torch.allclose(y[b], attention_in_loops(q[b], k[b], v[b]), atol=1e-5)
    assert torch.allclose(y, F.scaled_dot_product_attention(q, k, v, is_causal=True), atol=1e-5)  # torch's own
    shape("weights = softmax(scores)", "(B, T, T)", weights)
    shape("y = weights @ v", "(B, T, C)", y)


def entropy(scores: Tensor) -> Tensor:
    return -(scores.softmax(dim=-1) * scores.log_softmax(dim=-1)).sum(dim=-1).mean()


def heads_and_order(x: Tensor, w_q: Tensor, w_k: Tensor, w_v: Tensor, w_o: Tensor) -> None:
    step("7. Several heads: several questions at once")
    y, weights = multi_head(x, w_q, w_k, w_v, w_o, H)
    assert torch.allclose(y, heads_in_a_loop(x, w_q, w_k, w_v, w_o, H), atol=1e-5)
    shape("q, k, v of all heads", "(B, H, T, D)", split(x @ w_q, H))
    shape("weights", "(B, H, T, T)", weights)
    shape("y, heads side by side, mixed", "(B, T, C)", y)

    step("8. Nothing flows back: another last token changes no earlier result")
    other = x.clone()
    other[:, -1] = torch.randn(C)
    changed, _ = multi_head(other, w_q, w_k, w_v, w_o, H)
    assert torch.equal(changed[:, :-1], y[:, :-1])
    assert not torch.allclose(changed[:, -1], y[:, -1], atol=1e-3)
    print("  so all T predictions of a sequence can be trained at once")

    step("9. Without positions, attention does not know order")
    shuffled = torch.cat((x[:, torch.randperm(T - 1)], x[:, -1:]), dim=1)
    mixed, _ = multi_head(shuffled, w_q, w_k, w_v, w_o, H)
    assert torch.allclose(mixed[:, -1], y[:, -1], atol=1e-5)  # the last token reads a bag of tokens
    print("  past tokens shuffled: the last token reads the same")
    wpe = torch.randn(T, C)  # a vector for each place
    placed, mixed = (multi_head(z + wpe, w_q, w_k, w_v, w_o, H)[0] for z in (x, shuffled))
    assert not torch.allclose(mixed[:, -1], placed[:, -1], atol=1e-3)
    print("  with a vector for each place added, it does not")


# -- a task: what came after this letter the last time? ----------------------------------------------------------------


def repeats(batch_size: int) -> Tensor:
    """(batch_size, 2 N): N different letters, then the same again. The second half can be known from the first."""
    first = torch.rand(batch_size, len(LETTERS)).argsort(dim=1)[:, :N]
    return first.repeat(1, 2)


def init(width: int = 64) -> dict[str, Tensor]:
    V = len(LETTERS)
    shapes = {"wte": (V, width), "before": (V, width), "head": (width, V)}
    shapes |= {name: (width, width) for name in ("w_q", "w_k", "w_v", "w_o")}
    return {name: (torch.randn(size) / math.sqrt(width)).requires_grad_() for name, size in shapes.items()}


def predict(p: dict[str, Tensor], idx: Tensor, knows_before: bool) -> tuple[Tensor, Tensor]:
    """idx (B, T) -> logits (B, T, V), and the weights (B, 1, T, T) of the one head.

    To answer, a letter must be found by the letter before it: so each vector holds both. In a GPT an earlier layer
    brings that letter; with it this is an induction head (Olsson et al. 2022, arXiv:2209.11895).
    """
    x = p["wte"][idx]  # (B, T, C)
    if knows_before:
        x = x + F.pad(p["before"][idx[:, :-1]], (0, 0, 1, 0))  # (B, T, C), zero for the first letter
    y, weights = multi_head(x, p["w_q"], p["w_k"], p["w_v"], p["w_o"], heads=1)
    return y @ p["head"], weights


def train(p: dict[str, Tensor], steps: int, knows_before: bool) -> float:
    """Train on sequences that are new each time; the share of right answers in the second half of 1000 others."""
    optimizer = torch.optim.Adam(p.values(), lr=3e-3)

    def second_half(batch_size: int) -> tuple[Tensor, Tensor]:
        idx = repeats(batch_size)
        logits, _ = predict(p, idx, knows_before)
        return logits[:, N:].flatten(0, 1), idx.roll(-1, dims=1)[:, N:].flatten()  # the letter after each

    for i in range(steps):
        loss = F.cross_entropy(*second_half(64))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if (i + 1) % 100 == 0:
            print(f"  step {i + 1} of {steps}: loss {loss.item():.4f}", flush=True)
    with torch.no_grad():
        logits, targets = second_half(1000)
    return (logits.argmax(dim=-1) == targets).float().mean().item()


def text_map(letters: str, weights: Tensor) -> Iterator[str]:
    """weights (T, T) as lines: a row is the letter that looks, a column the letter looked at, darker is more."""
    yield "    " + " ".join(letters)
    for letter, row in zip(letters, weights.tolist(), strict=True):
        yield f"  {letter} " + " ".join(" .:-=+*#%@"[min(int(w * 10), 9)] for w in row)


def draw(file: str, letters: str, weights: Tensor) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    plt.imshow(weights, cmap="Blues", vmin=0, vmax=1)
    plt.xticks(range(len(letters)), list(letters))
    plt.yticks(range(len(letters)), list(letters))
    plt.xlabel("the letter looked at")
    plt.ylabel("the letter that looks")
    plt.savefig(file, dpi=150)


def main(argv: list[str] | None = None) -> float:
    parser = argparse.ArgumentParser(description="Attention, step by step, and a map of what one layer has learnt.")
    parser.add_argument("--steps", type=int, default=500, help="steps of training (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=1, help="(default: %(default)s)")
    parser.add_argument("--picture", metavar="FILE", help="draw the map")
    args = parser.parse_args(argv)

    torch.manual_seed(args.seed)
    x = torch.randn(B, T, C)
    w_q, w_k, w_v, w_o = torch.randn(4, C, C) / math.sqrt(C)
    averages(x)
    queries_keys_values(x, w_q, w_k, w_v)
    heads_and_order(x, w_q, w_k, w_v, w_o)

    step("10. A task: what came after this letter the last time?")
    print("  trained on letters that know only themselves:")
    blind = train(init(), args.steps, knows_before=False)
    print("  trained on letters that know the one before them:")
    p = init()
    accuracy = train(p, args.steps, knows_before=True)
    idx = repeats(1)
    letters = "".join(LETTERS[i] for i in idx[0])
    with torch.no_grad():
        weights = predict(p, idx, knows_before=True)[1][0, 0]  # (T, T)
    print(
        "\n  the map: from the second half on, each letter looks at the one that followed it before",
        *text_map(letters, weights),
        sep="\n",
    )
    if args.picture:
        draw(args.picture, letters, weights)
    print(f"\nright answers: {accuracy:.4f}, without knowing the letter before: {blind:.4f}")
    return accuracy


if __name__ == "__main__":
    main()
