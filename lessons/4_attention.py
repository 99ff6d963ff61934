"""attention: from a loop that averages the past to softmax(Q K^T / sqrt(D)) V in several heads, step by step.

A step that is written as a loop comes back as a product of matrices, and an assert holds that both give the same
numbers; every shape is printed. Then one layer of attention learns to answer "what came after this letter the last
time?", and its map is drawn, so that one sees where it looks.

The same as in lesson 3: letters are vectors, torch finds the gradients, the training loop. New: what was one function
there, `attend`, is taken apart. Nothing else of the Transformer is used: no MLP, no norm, no residual, no positions.

    python lessons/4_attention.py --picture=map.png

takes 10 seconds on two cores of a server CPU (AMD EPYC): 0.9999 of the answers are right. A layer whose letters do not
know the one before them is right in 0.0388: it sees which letters came, not which came after which.
"""

import argparse
import math
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

B, T, C, H = 2, 8, 32, 4  # of steps 1 to 9: sequences, tokens in each, channels of a token, heads
LETTERS, N = "abcdefghijklmnopqrstuvwxyz", 8  # of step 10; a sequence is N letters, then the same N again


def step(title: str) -> None:
    print(f"\n{title}\n{'-' * len(title)}")


def shape(name: str, letters: str, x: Tensor) -> None:
    print(f"  {name:32} {letters:13} {tuple(x.shape)}")


def averages(x: Tensor) -> None:
    step("1. A token learns of its past: the average, in two loops")
    y = torch.zeros_like(x)
    for b in range(B):
        for t in range(T):
            y[b, t] = x[b, : t + 1].mean(dim=0)  # (t + 1, C) -> (C)
    shape("x, the tokens", "(B, T, C)", x)
    shape("y, the mean of the past of each", "(B, T, C)", y)

    step("2. The same as one product with a triangular matrix")
    weights = torch.ones(T, T).tril()  # row t: 1 up to column t, then 0
    weights = weights / weights.sum(dim=1, keepdim=True)  # each row sums to 1
    assert torch.allclose(weights @ x, y, atol=1e-6)  # (T, T) @ (B, T, C) -> (B, T, C)
    shape("weights", "(T, T)", weights)
    for row in weights[:3]:
        print("   ", " ".join(f"{w:.2f}" for w in row))

    step("3. The same as a softmax of equal scores, the future masked")
    assert torch.allclose(causal_softmax(torch.zeros(T, T)), weights)
    print("  equal scores give the average; other scores give other shares, and still no look ahead")


def causal_softmax(scores: Tensor) -> Tensor:
    """scores (..., T, T) -> weights: none below 0, each row sums to 1, and exp(-inf) = 0 for what is yet to come."""
    future = torch.ones(scores.shape[-2:]).triu(1) == 1  # (T, T)
    return scores.masked_fill(future, -math.inf).softmax(dim=-1)


def attention(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """q, k, v (..., T, D) -> softmax(Q K^T / sqrt(D) + mask) V (..., T, D), and its weights (..., T, T)."""
    weights = causal_softmax(q @ k.transpose(-2, -1) / math.sqrt(q.size(-1)))
    return weights @ v, weights


def queries_keys_values(q: Tensor, k: Tensor, v: Tensor) -> None:
    step("4. Scores that depend on the tokens: what t asks (query) times what s offers (key), in two loops")
    scores = torch.full((B, T, T), -math.inf)
    for t in range(T):
        for s in range(t + 1):
            scores[:, t, s] = (q[:, t] * k[:, s]).sum(dim=-1)  # (B, C) -> (B)
    assert torch.allclose(scores, (q @ k.transpose(-2, -1)).masked_fill(scores.isinf(), -math.inf), atol=1e-5)
    shape("q, k", "(B, T, C)", q)
    shape("scores = q @ k^T", "(B, T, T)", scores)

    step("5. Why divide by sqrt(D): 64 keys; queries and keys have variance 1")
    print(f"  entropy of the weights in nats; evenly spread it would be log 64 = {math.log(64):.2f}")
    print(f"  {'D':>5}  {'variance of q.k':>15}  {'entropy':>7}  {'of q.k / sqrt(D)':>16}  {'entropy':>7}")
    for D in (4, 16, 64, 256, 1024):
        raw = torch.randn(256, D) @ torch.randn(D, 64)
        log_p, log_p_scaled = raw.log_softmax(dim=-1), (raw / math.sqrt(D)).log_softmax(dim=-1)
        entropies = [-(log.exp() * log).sum(dim=-1).mean() for log in (log_p, log_p_scaled)]
        print(f"  {D:>5}  {raw.var():>15.1f}  {entropies[0]:>7.2f}  {raw.var() / D:>16.2f}  {entropies[1]:>7.2f}")
    print("  not divided, wide heads start out sure of one key, where softmax is flat and hardly learns")

    step("6. Attention: the values, mixed in the shares that the scores give")
    y, weights = attention(q, k, v)
    shares = (scores / math.sqrt(C)).exp()  # softmax, written out
    shares = shares / shares.sum(dim=-1, keepdim=True)
    for t in range(T):
        mixed = sum(shares[:, t, s, None] * v[:, s] for s in range(t + 1))  # (B, 1) * (B, C) -> (B, C)
        assert torch.allclose(mixed, y[:, t], atol=1e-5)
    assert torch.allclose(y, F.scaled_dot_product_attention(q, k, v, is_causal=True), atol=1e-5)  # torch's own
    shape("weights = softmax(scores)", "(B, T, T)", weights)
    shape("y = weights @ v", "(B, T, C)", y)


def split(x: Tensor, heads: int) -> Tensor:
    """(B, T, C) -> (B, H, T, D): a head is one more dimension of independent products, as a sequence is."""
    return x.view(*x.shape[:2], heads, -1).transpose(1, 2)


def multi_head(x: Tensor, w_q: Tensor, w_k: Tensor, w_v: Tensor, w_o: Tensor, heads: int) -> tuple[Tensor, Tensor]:
    """x (B, T, C) -> (B, T, C), and the weights (B, H, T, T)."""
    y, weights = attention(split(x @ w_q, heads), split(x @ w_k, heads), split(x @ w_v, heads))  # (B, H, T, D)
    return y.transpose(1, 2).flatten(2) @ w_o, weights  # the heads side by side again, (B, T, H * D), then mixed


def heads_and_order(x: Tensor, w: Tensor) -> None:
    step("7. Several heads: several questions at once, each with C / H channels; first in a loop")
    w_q, w_k, w_v, w_o = w  # (C, C) each
    heads = [range(h * C // H, (h + 1) * C // H) for h in range(H)]  # the columns of each head
    looped = torch.cat([attention(x @ w_q[:, h], x @ w_k[:, h], x @ w_v[:, h])[0] for h in heads], dim=-1) @ w_o
    y, weights = multi_head(x, *w, H)
    assert torch.allclose(looped, y, atol=1e-5)
    shape("q, k, v of all heads", "(B, H, T, D)", split(x @ w_q, H))
    shape("weights", "(B, H, T, T)", weights)
    shape("y", "(B, T, C)", y)

    step("8. The past does not see the future: another last token changes no earlier result")
    other = torch.cat((x[:, :-1], torch.randn(B, 1, C)), dim=1)
    changed = multi_head(other, *w, H)[0]
    assert torch.allclose(changed[:, :-1], y[:, :-1], atol=1e-5)
    assert not torch.allclose(changed[:, -1], y[:, -1], atol=1e-2)
    print("  so what follows each of the T tokens can be learnt in one pass")

    step("9. Attention does not know order: shuffle the past, and the last token reads the same")
    shuffled = torch.cat((x[:, torch.arange(T - 1).flip(0)], x[:, -1:]), dim=1)
    assert torch.allclose(multi_head(shuffled, *w, H)[0][:, -1], y[:, -1], atol=1e-5)
    wpe = torch.randn(T, C)  # a vector for each place, added to the token that stands there
    placed, moved = multi_head(x + wpe, *w, H)[0], multi_head(shuffled + wpe, *w, H)[0]
    assert not torch.allclose(moved[:, -1], placed[:, -1], atol=1e-2)
    print("  with a vector for each place added to the tokens, it does not")


# -- step 10: what came after this letter the last time? ---------------------------------------------------------------


def repeats(batch_size: int) -> Tensor:
    """(batch_size, 2 N): N different letters, and the same again; from N on, the first half tells what comes next."""
    return torch.rand(batch_size, len(LETTERS)).argsort(dim=1)[:, :N].repeat(1, 2)


def predict(p: dict[str, Tensor], idx: Tensor) -> tuple[Tensor, Tensor]:
    """idx (B, T) -> logits (B, T, V) of the letter after each, and the weights (B, 1, T, T) of the one head.

    The answer has to be found by the letter before it, so each vector is of a letter and of the one before. In a GPT an
    earlier layer brings the latter; with it this is an induction head (Olsson et al. 2022, arXiv:2209.11895).
    """
    x = p["wte"][idx]  # (B, T, C)
    if "before" in p:
        x = x + F.pad(p["before"][idx[:, :-1]], (0, 0, 1, 0))  # zero for the first letter
    y, weights = multi_head(x, p["w_q"], p["w_k"], p["w_v"], p["w_o"], heads=1)
    return y @ p["head"], weights


def learn(knows_before: bool, steps: int, width: int = 64) -> tuple[dict[str, Tensor], float]:
    """The parameters, trained on sequences that are new each time, and the share of right answers on 1000 more."""
    V, square = len(LETTERS), (width, width)
    shapes = {"wte": (V, width), "w_q": square, "w_k": square, "w_v": square, "w_o": square, "head": (width, V)}
    shapes |= {"before": (V, width)} if knows_before else {}
    p = {name: (torch.randn(size) / math.sqrt(width)).requires_grad_() for name, size in shapes.items()}
    optimizer = torch.optim.Adam(p.values(), lr=3e-3)
    for i in range(steps + 1):
        idx = repeats(64 if i < steps else 1000)
        logits, targets = predict(p, idx)[0][:, N:].flatten(0, 1), idx.roll(-1, dims=1)[:, N:].flatten()
        if i == steps:
            return p, (logits.argmax(dim=-1) == targets).float().mean().item()
        loss = F.cross_entropy(logits, targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if (i + 1) % 100 == 0:
            print(f"  step {i + 1} of {steps}: loss {loss.item():.4f}", flush=True)


def draw(file: str, letters: str, weights: Tensor) -> None:
    from matplotlib.figure import Figure

    axes = (figure := Figure(layout="constrained")).subplots()
    axes.imshow(weights.numpy(), cmap="Blues", vmin=0, vmax=1)
    axes.set_xticks(range(len(letters)), list(letters))
    axes.set_yticks(range(len(letters)), list(letters))
    axes.set(xlabel="the letter looked at", ylabel="the letter that looks")
    figure.savefig(file, dpi=150)


def main(argv: list[str] | None = None) -> float:
    parser = argparse.ArgumentParser(description="Attention, step by step, and a map of what one layer has learnt.")
    parser.add_argument("--steps", type=int, default=300, help="steps of training (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=1, help="(default: %(default)s)")
    parser.add_argument("--picture", metavar="FILE.png", help="draw the map")
    args = parser.parse_args(argv)
    if args.steps < 1:
        parser.error(f"--steps={args.steps}: expected at least 1")
    if args.picture and not (args.picture.endswith(".png") and Path(args.picture).parent.is_dir()):
        parser.error(f"--picture={args.picture}: expected a .png file in a folder that exists")
    if args.picture and find_spec("matplotlib") is None:
        parser.error("--picture needs matplotlib: pip install matplotlib")
    torch.manual_seed(args.seed)
    x, w = torch.randn(B, T, C), torch.randn(4, C, C) / math.sqrt(C)
    averages(x)
    queries_keys_values(x @ w[0], x @ w[1], x @ w[2])
    heads_and_order(x, w)

    step("10. One layer learns: what came after this letter the last time?")
    print("  each letter knows only itself:")
    _, blind = learn(False, args.steps)
    print("  each letter knows itself and the one before:")
    p, accuracy = learn(True, args.steps)
    idx = repeats(1)
    letters, weights = "".join(LETTERS[i] for i in idx[0]), predict(p, idx)[1][0, 0].detach()  # (T, T)
    print("\n  who (row) looks at whom (column): in the second half, at the letter that came next the last time\n")
    print("   ", " ".join(letters))
    for letter, row in zip(letters, weights.tolist(), strict=True):
        print(f"  {letter}", " ".join(" .:-=+*#%@"[min(int(10 * share), 9)] for share in row).rstrip())
    if args.picture:
        draw(args.picture, letters, weights)
    print(f"\nright answers: {accuracy:.4f}; without knowing the letter before: {blind:.4f}")
    return accuracy


if __name__ == "__main__":
    torch.set_num_threads(1)  # the products are small: several threads would mostly wait for each other
    main()
