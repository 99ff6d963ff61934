"""makemore: one list of words, seven models that learn to make more words like them, one table of their losses.

Every model answers the same question: after the letters so far, how likely is each letter to be the next? Its loss is
the mean of -log p(the letter that came), in nats; to guess evenly among V letters costs log V. Each rung of the ladder
takes away a limit of the rung before it:

    counted      how often each letter came after each letter: a table of counts, nothing is trained
    bigram       the same table, found by gradient descent; it ends where counting ends
    mlp          sees 3 letters, each as a vector: what is learnt of one serves those like it (Bengio et al. 2003)
    batchnorm    the same; what enters tanh is normalised over the batch (Ioffe & Szegedy 2015, arXiv:1502.03167)
    gru          reads letter by letter into a state, so it can know them all (Cho et al. 2014, arXiv:1406.1078)
    attention    looks straight at each letter so far: no state to squeeze them through (lesson 4 takes it apart)
    transformer  attention, then an MLP for each letter, and that again, each time on normalised input (lesson 5)

The same as in lesson 2: forward, backward, step. New: torch finds the gradients, the data are words, and the figure
is the loss on words that no model was trained on. On one core of a server CPU (Intel Xeon):

                                                  counted  mlp   batchnorm  gru   attention  transformer
    python lessons/3_makemore.py           1.8 min   2.59  2.08       2.09  1.95       2.26         2.00
    ... --words=names.txt, makemore's      1.5 min   2.45  2.12       2.13  2.01       2.13         1.99

Attention alone sees every letter and yet loses to an MLP that sees three: without an MLP it cannot combine what it
saw. The GRU is as good as the Transformer: words are short, and a state holds them.
"""

import argparse
import math
import random
import re
import sysconfig
import time
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

WINDOW = 3  # letters that the MLPs see
C, HIDDEN = 64, 128  # width of a letter's vector; of the MLPs' hidden layer and of the GRU's state
H, LAYERS, DROPOUT = 4, 2, 0.1  # heads of attention; layers of the transformer, and what it forgets while it learns
Parameters = dict[str, Tensor]

# -- the words ---------------------------------------------------------------------------------------------------------


def stdlib_words() -> list[str]:
    """The words in the Python sources that came with this Python: English, and what programmers made of it."""
    library, words = Path(sysconfig.get_path("stdlib")), set()
    for path in library.rglob("*.py"):
        if {"site-packages", "dist-packages", "test", "tests", "idlelib"}.isdisjoint(path.relative_to(library).parts):
            text = path.read_text(encoding="utf-8", errors="ignore")
            words.update(re.findall(r"(?<![\w.\\])[a-z]{3,15}(?![\w(])", text))  # neither x.word nor word(...)
    return sorted(words)


def encode(words: list[str], letters: str) -> tuple[Tensor, Tensor]:
    """idx and targets, (N, T) each: .emma -> emma. Letter 0 is ".", where words begin and end; target -1 is none."""
    T = max(map(len, words)) + 1
    idx, targets = torch.zeros(len(words), T, dtype=torch.long), torch.full((len(words), T), -1)
    for row, word in enumerate(words):
        ids = torch.tensor([letters.index(letter) for letter in word])
        idx[row, 1 : len(word) + 1] = ids
        targets[row, : len(word)], targets[row, len(word)] = ids, 0
    return idx, targets


# -- the parameters ----------------------------------------------------------------------------------------------------


def shapes(name: str, V: int, T: int) -> dict[str, tuple[int, ...]]:
    layer = {"qkv": (C, 3 * C), "proj": (C, C), "up": (C, 4 * C), "down": (4 * C, C)}
    mlp = {"wte": (V, C), "W1": (WINDOW * C, HIDDEN), "b1": (HIDDEN,), "W2": (HIDDEN, V), "b2": (V,)}
    gates = {"Wx": (C, 3 * HIDDEN), "bx": (3 * HIDDEN,), "Wh": (HIDDEN, 3 * HIDDEN), "bh": (3 * HIDDEN,)}
    return {
        "counted": {"W": (V, V)},
        "bigram": {"W": (V, V)},
        "mlp": mlp,
        "batchnorm": mlp | {"gain": (HIDDEN,), "mean": (HIDDEN,), "var": (HIDDEN,)},
        "gru": {"wte": (V, C), **gates, "W2": (HIDDEN, V), "b2": (V,)},
        "attention": {"wte": (V, C), "wpe": (T, C), "qkv": (C, 3 * C), "proj": (C, C), "head": (C, V)},
        "transformer": {"wte": (V, C), "wpe": (T, C), "head": (C, V)}
        | {f"{key}{i}": shape for i in range(LAYERS) for key, shape in layer.items()},
    }[name]


def init(name: str, V: int, T: int) -> Parameters:
    """A product with W (n, m) sums n terms and so has n times their variance: W / sqrt(n) keeps the size."""
    p = {}
    for key, shape in shapes(name, V, T).items():
        if len(shape) == 1:
            p[key] = torch.ones(shape) if key in ("gain", "var") else torch.zeros(shape)
        else:
            p[key] = torch.randn(shape) / (1 if key in ("wte", "wpe") else math.sqrt(shape[0]))  # these are looked up
        p[key].requires_grad_(key not in ("mean", "var"))
    return p


# -- the models: parameters p and letters idx (B, T) -> logits (B, T, V) of the letter after each ----------------------


def count(p: Parameters, idx: Tensor, targets: Tensor, smoothing: float = 1.0) -> None:
    """Fill W with the log of how often each letter follows each. The smoothing gives pairs that never came a chance."""
    real, n = targets >= 0, torch.full_like(p["W"], smoothing)
    n.index_put_((idx[real], targets[real]), torch.ones(()), accumulate=True)
    p["W"].data = (n / n.sum(dim=1, keepdim=True)).log()  # softmax(log p) = p: log p can stand as logits


def bigram(p: Parameters, idx: Tensor, training: bool = False) -> Tensor:
    return p["W"][idx]  # the product of a one-hot vector and W picks a row of W


def windows(p: Parameters, idx: Tensor) -> Tensor:
    """The vectors of the last WINDOW letters side by side, (B, T, WINDOW * C). Before the word there are more "."."""
    return p["wte"][F.pad(idx, (WINDOW - 1, 0)).unfold(1, WINDOW, 1)].flatten(2)


def mlp(p: Parameters, idx: Tensor, training: bool = False) -> Tensor:
    h = torch.tanh(windows(p, idx) @ p["W1"] + p["b1"])  # (B, T, HIDDEN)
    return h @ p["W2"] + p["b2"]


def normalise(p: Parameters, h: Tensor, training: bool) -> Tensor:
    """h (N, HIDDEN): each channel minus its mean, over its deviation; of this batch in training, else running ones."""
    if not training:
        return p["gain"] * (h - p["mean"]) / (p["var"] + 1e-5).sqrt() + p["b1"]
    mean, var, N = h.mean(dim=0), h.var(dim=0, correction=0), len(h)
    p["mean"].lerp_(mean.detach(), 0.1)
    p["var"].lerp_(var.detach() * N / (N - 1), 0.1)
    return p["gain"] * (h - mean) / (var + 1e-5).sqrt() + p["b1"]


def batchnorm(p: Parameters, idx: Tensor, training: bool = False) -> Tensor:
    h = (windows(p, idx) @ p["W1"]).flatten(0, 1)  # (B * T, HIDDEN)
    h = torch.tanh(normalise(p, h, training)).view(*idx.shape, HIDDEN)
    return h @ p["W2"] + p["b2"]


def states(p: Parameters, x: Tensor) -> Tensor:
    """The GRU: x (B, T, C) -> its state after each letter, (B, T, HIDDEN)."""
    h, hs = x.new_zeros(x.size(0), HIDDEN), []
    for xt in (x @ p["Wx"] + p["bx"]).unbind(1):  # (B, 3 * HIDDEN): one letter after another, never side by side
        (xr, xz, xn), (hr, hz, hn) = xt.chunk(3, dim=1), (h @ p["Wh"] + p["bh"]).chunk(3, dim=1)
        r, z = torch.sigmoid(xr + hr), torch.sigmoid(xz + hz)  # reset: what n may use of h; update: what stays
        n = torch.tanh(xn + r * hn)  # the new state, if nothing stays
        h = (1 - z) * n + z * h
        hs.append(h)
    return torch.stack(hs, dim=1)


def gru(p: Parameters, idx: Tensor, training: bool = False) -> Tensor:
    return states(p, p["wte"][idx]) @ p["W2"] + p["b2"]


def attend(x: Tensor, qkv: Tensor, proj: Tensor) -> Tensor:
    """softmax(Q K^T / sqrt(D) + mask) V in H heads, then their mixture: x (B, T, C) -> (B, T, C)."""
    B, T, _ = x.shape
    q, k, v = (x @ qkv).view(B, T, 3, H, C // H).permute(2, 0, 3, 1, 4)  # (B, H, T, D) each
    scores = q @ k.transpose(-2, -1) / math.sqrt(C // H)  # (B, H, T, T)
    scores = scores.masked_fill(torch.ones(T, T).tril() == 0, -math.inf)  # no letter looks at a later one
    return (scores.softmax(dim=-1) @ v).transpose(1, 2).flatten(2) @ proj


def attention(p: Parameters, idx: Tensor, training: bool = False) -> Tensor:
    x = p["wte"][idx] + p["wpe"][: idx.size(1)]  # (B, T, C) + (T, C)
    return (x + attend(x, p["qkv"], p["proj"])) @ p["head"]


def transformer(p: Parameters, idx: Tensor, training: bool = False) -> Tensor:
    x = p["wte"][idx] + p["wpe"][: idx.size(1)]
    for i in range(LAYERS):
        y = attend(F.layer_norm(x, (C,)), p[f"qkv{i}"], p[f"proj{i}"])
        x = x + F.dropout(y, DROPOUT, training)
        y = F.gelu(F.layer_norm(x, (C,)) @ p[f"up{i}"]) @ p[f"down{i}"]
        x = x + F.dropout(y, DROPOUT, training)
    return F.layer_norm(x, (C,)) @ p["head"]


MODELS = {  # the function, its learning rate, and its share of --steps: the transformer learns longest
    "counted": (bigram, 0.0, 0),
    "bigram": (bigram, 0.1, 1),
    "mlp": (mlp, 0.01, 1),
    "batchnorm": (batchnorm, 0.01, 1),
    "gru": (gru, 0.004, 1),
    "attention": (attention, 0.01, 1),
    "transformer": (transformer, 0.004, 3),
}

# -- training, measuring, making ---------------------------------------------------------------------------------------


def train(name: str, p: Parameters, idx: Tensor, targets: Tensor, steps: int) -> None:
    model, lr, share = MODELS[name]
    steps *= share
    optimizer = torch.optim.AdamW([w for w in p.values() if w.requires_grad], lr, betas=(0.9, 0.99), fused=True)
    for step in range(steps):
        for group in optimizer.param_groups:  # a short warm-up, then down to zero along a line
            group["lr"] = lr * min(1, (step + 1) / 100) * (1 - step / steps)
        batch = torch.randint(len(idx), (64,))
        T = int((targets[batch] >= 0).sum(dim=1).max())  # the longest word of the batch
        logits = model(p, idx[batch, :T], training=True)
        loss = F.cross_entropy(logits.flatten(0, 1), targets[batch, :T].flatten(), ignore_index=-1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if (step + 1) % 500 == 0:
            print(f"{name}: step {step + 1} of {steps}, loss of this batch {loss.item():.3f}", flush=True)


@torch.no_grad()
def losses(name: str, p: Parameters, idx: Tensor, targets: Tensor) -> Tensor:
    """-log p of every target, (N, T); nan where there is none."""
    loss = F.cross_entropy(MODELS[name][0](p, idx).transpose(1, 2), targets, ignore_index=-1, reduction="none")
    return loss.masked_fill(targets < 0, math.nan)


@torch.no_grad()
def make_words(name: str, p: Parameters, letters: str, longest: int, n: int = 8) -> list[str]:
    idx = torch.zeros(n, 1, dtype=torch.long)
    for _ in range(longest):
        probs = MODELS[name][0](p, idx)[:, -1].softmax(dim=-1)  # (n, V)
        idx = torch.cat((idx, probs.multinomial(1)), dim=1)
    return ["".join(letters[i] for i in row[1:]).split(".")[0] for row in idx.tolist()]


def draw(file: str, by_place: dict[str, list[float]]) -> None:
    from matplotlib.figure import Figure

    axes = (figure := Figure(layout="constrained")).subplots()
    for name, loss in by_place.items():
        axes.plot(range(1, len(loss) + 1), loss, marker=".", label=name)
    axes.set(xlabel="place of the letter in the word", ylabel="held-out loss, nats")
    axes.legend()
    figure.savefig(file, dpi=150)


def main(argv: list[str] | None = None) -> float:
    parser = argparse.ArgumentParser(description="Seven models that make more words, and one table of their losses.")
    parser.add_argument("--words", metavar="FILE", help="one word a line (default: words of Python's own sources)")
    parser.add_argument("--models", default=",".join(MODELS), help="which, in which order (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=2000, help="transformer: three times that (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=1, help="(default: %(default)s)")
    parser.add_argument("--picture", metavar="FILE.png", help="draw the loss at each place of the word")
    args = parser.parse_args(argv)
    names = args.models.split(",")
    if args.picture and not (args.picture.endswith(".png") and Path(args.picture).parent.is_dir()):
        parser.error(f"--picture={args.picture}: expected a .png file in a folder that exists")
    if args.picture and find_spec("matplotlib") is None:
        parser.error("--picture needs matplotlib: pip install matplotlib")
    if args.steps < 1:
        parser.error(f"--steps={args.steps}: expected at least 1")
    if wrong := [name for name in names if name not in MODELS]:
        parser.error(f"--models={args.models}: there is no {wrong[0]!r}, only {','.join(MODELS)}")
    try:
        words = Path(args.words).read_text(encoding="utf-8").split() if args.words else stdlib_words()
    except (OSError, UnicodeDecodeError) as error:
        parser.error(f"--words={args.words}: {error}")
    words = sorted(set(words))  # a word that stands twice could be trained on and held out
    if len(words) < 10 or any("." in word for word in words):
        parser.error(f"--words={args.words}: expected at least 10 words, without full stops")

    random.Random(args.seed).shuffle(words)
    letters = "." + "".join(sorted(set("".join(words))))
    idx, targets = encode(words, letters)
    held_out, V, T = len(words) // 10, len(letters), idx.size(1)
    print(f"{len(words)} words, {held_out} of them held out; to guess evenly among {V} letters costs {math.log(V):.4f}")
    rows, by_place = [], {}
    for name in names:
        torch.manual_seed(args.seed)
        start, p = time.process_time(), init(name, V, T)
        if name == "counted":
            count(p, idx[held_out:], targets[held_out:])
        else:
            train(name, p, idx[held_out:], targets[held_out:], args.steps)
        seconds, size = time.process_time() - start, sum(w.numel() for w in p.values() if w.requires_grad)
        seen = losses(name, p, idx[held_out : 2 * held_out], targets[held_out : 2 * held_out]).nanmean().item()
        loss = losses(name, p, idx[:held_out], targets[:held_out])  # (N, T)
        by_place[name] = loss[:, :12].nanmean(dim=0).tolist()
        made = " ".join(make_words(name, p, letters, T - 1))
        rows.append(f"{name:12}{size:>10}{seen:>9.4f}{loss.nanmean():>10.4f}{seconds:>9.0f}  {made}")
    print(f"\n{'model':12}{'parameters':>10}{'train':>9}{'held out':>10}{'seconds':>9}  makes", *rows, sep="\n")
    if args.picture:
        draw(args.picture, by_place)
    print(f"held-out loss of the {names[-1]}: {loss.nanmean():.4f} nats")
    return loss.nanmean().item()


if __name__ == "__main__":
    torch.set_num_threads(1)  # the products are small: several threads would mostly wait for each other
    main()
