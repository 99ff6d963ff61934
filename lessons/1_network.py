"""Lesson 1: a network learns to read digits, and every derivative is written by hand.

The network of chapter 1 of Michael Nielsen's book *Neural Networks and Deep Learning*: sigmoid units, the quadratic
cost, gradient descent on mini-batches. The gradients come from backpropagation, the equations (BP1) to (BP4) of
chapter 2, one line of code each. This is the whole of learning: compute an output, measure how wrong it is, find for
each weight which way the error falls, take a small step. A GPT is trained by the same loop.

An image is a row of numbers, and the images of a mini-batch are the rows of one matrix, so one product serves them all
(the book writes an image as a column: its w a is our a @ w.T):

    x (B, n_0)            B images of n_0 pixels, from 0 (paper) to 1 (ink)
    z = a @ w.T + b       (B, n_out); a (B, n_in), w (n_out, n_in), b (n_out). w[j, k] leads from unit k to unit j
    a = sigmoid(z)        (B, n_out), what the next layer reads; a[i, j] of the last layer: how much image i is a j
    y (B, 10)             what the last layer should say: 1 at the right digit, 0 elsewhere
    delta = dC_x/dz       (B, n_out), the error of the units: how the cost C_x of an image changes with their z

Held-out accuracy of seed 1 (seeds 1 to 5), and CPU time on two cores of a server CPU (AMD EPYC):

    python lessons/1_network.py                  97.22% (96.39 to 97.78)   4 s   scikit-learn's 1,797 digits of 8 x 8
    python lessons/1_network.py --data=FOLDER    93.30% (93.20 to 94.50)  10 s   9,000 of MNIST's, 1,000 others held out

FOLDER holds MNIST's or Fashion-MNIST's four IDX files, gzipped or not.
"""

import argparse
import gzip
import zlib
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path

import numpy as np
from numpy import ndarray as Array


def sigmoid(z: Array) -> Array:
    return (1 + np.tanh(z / 2)) / 2  # 1 / (1 + exp(-z)), written so that exp cannot overflow


def sigmoid_prime(z: Array) -> Array:
    return sigmoid(z) * (1 - sigmoid(z))


def new_network(sizes: list[int], rng: np.random.Generator) -> tuple[list[Array], list[Array]]:
    """Random weights (n_out, n_in) and biases (n_out) for each layer after the pixels."""
    weights, biases = [], []
    for n_in, n_out in pairwise(sizes):
        # z adds up n_in products: weights of size 1/sqrt(n_in) keep it near 1, where a sigmoid is steep and learns fast
        weights.append(rng.normal(0, 1 / np.sqrt(n_in), (n_out, n_in)))
        biases.append(rng.normal(0, 1, n_out))
    return weights, biases


def forward(x: Array, weights: list[Array], biases: list[Array]) -> tuple[list[Array], list[Array]]:
    """The z of each layer, and what each layer puts out, the pixels first: activations[i + 1] = sigmoid(zs[i])."""
    zs, activations = [], [x]
    for w, b in zip(weights, biases, strict=True):
        zs.append(activations[-1] @ w.T + b)  # (B, n_in) @ (n_in, n_out) + (n_out) -> (B, n_out)
        activations.append(sigmoid(zs[-1]))
    return zs, activations


def cost(x: Array, y: Array, weights: list[Array], biases: list[Array]) -> float:
    """The quadratic cost C: the mean over the images of C_x = |a - y|^2 / 2."""
    _, activations = forward(x, weights, biases)
    return float(np.sum((activations[-1] - y) ** 2) / 2 / len(x))


def backprop(x: Array, y: Array, weights: list[Array], biases: list[Array]) -> tuple[list[Array], list[Array]]:
    """dC/dw and dC/db of each layer, in the shapes of `weights` and `biases`."""
    zs, activations = forward(x, weights, biases)
    grad_w, grad_b = [], []
    delta = (activations[-1] - y) * sigmoid_prime(zs[-1])  # (BP1) (B, 10): dC_x/da times da/dz
    for i in reversed(range(len(weights))):  # from the last layer to the first
        grad_b.insert(0, delta.mean(axis=0))  # (BP3) (n_out): z = ... + b, so dC_x/db is delta
        grad_w.insert(0, delta.T @ activations[i] / len(x))  # (BP4) (n_out, B) @ (B, n_in): dC_x/dw_jk = delta_j a_k
        if i > 0:  # a unit's error: those of the units that read it, by the weights with which they do
            delta = (delta @ weights[i]) * sigmoid_prime(zs[i - 1])  # (BP2) (B, n_out) @ (n_out, n_in) -> (B, n_in)
    return grad_w, grad_b


def gradient_check(x: Array, y: Array, weights: list[Array], biases: list[Array], rng: np.random.Generator) -> float:
    """How far backprop is from slopes measured by moving one weight a little: 0 is equal, 1 is all wrong."""
    by_backprop, by_moving, h = [], [], 1e-5  # needs no calculus, but two forward passes for each weight
    grad_w, grad_b = backprop(x, y, weights, biases)
    for values, gradient in zip(weights + biases, grad_w + grad_b, strict=True):
        for i in rng.choice(values.size, min(values.size, 100), replace=False):
            kept = values.flat[i]
            values.flat[i] = kept + h
            above = cost(x, y, weights, biases)
            values.flat[i] = kept - h
            below = cost(x, y, weights, biases)
            values.flat[i] = kept
            by_moving.append((above - below) / (2 * h))
            by_backprop.append(gradient.flat[i])
    a, b = np.array(by_backprop), np.array(by_moving)
    return float(np.linalg.norm(a - b) / (np.linalg.norm(a) + np.linalg.norm(b)))


# -- data, picture, training -----------------------------------------------------------------------------------------


def read_idx(folder: Path, name: str, n_dims: int) -> Array:
    """An array in MNIST's format: 0, 0, 8 for "bytes", n_dims; each dimension, in 4 bytes; then the bytes."""
    path = next(folder.glob(f"{name}?idx{n_dims}-ubyte*"), None)
    if path is None:
        raise ValueError(f"{folder} has no file {name}-idx{n_dims}-ubyte or {name}-idx{n_dims}-ubyte.gz")
    raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    start = 4 + 4 * n_dims
    shape = tuple(np.frombuffer(raw[4:start], dtype=">i4"))  # the high byte comes first
    if raw[:4] != bytes([0, 0, 8, n_dims]) or len(raw) != start + np.prod(shape, dtype=int):
        raise ValueError(f"{path} is not a whole IDX file of bytes with {n_dims} dimension(s)")
    return np.frombuffer(raw, dtype=np.uint8, offset=start).reshape(shape)


def load(data: str | None, rng: np.random.Generator) -> list[Array]:
    """Images (N, 8, 8) or (N, 28, 28) and labels (N) to learn from, and the same held out."""
    if data:
        kinds = [(part, *kind) for part in ("train", "t10k") for kind in (("images", 3), ("labels", 1))]
        images, labels, held_images, held_labels = (read_idx(Path(data), f"{a}-{b}", n) for a, b, n in kinds)
        if not 0 < len(images) == len(labels) or not 0 < len(held_images) == len(held_labels):
            raise ValueError(f"{data} does not hold one label for each image")
        return [images / 255, labels, held_images / 255, held_labels]
    from sklearn.datasets import load_digits

    digits = load_digits()
    held, learn = np.split(rng.permutation(len(digits.target)), [360])
    return [digits.images[learn] / 16, digits.target[learn], digits.images[held] / 16, digits.target[held]]


def draw(file: str, w: Array, images: Array, labels: Array, answers: Array) -> None:
    """The weights of 30 units of the first layer, and under them 10 of the images that were misread."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 5), layout="constrained")
    figure.suptitle("what units of the first layer look for (red: ink excites, blue: ink calms), and misread images")
    axes = figure.subplots(4, 10).flat
    for ax in axes:
        ax.axis("off")
    for ax, row in zip(axes[:30], w, strict=False):
        ax.imshow(row.reshape(images.shape[1:]), cmap="RdBu_r", vmin=-abs(row).max(), vmax=abs(row).max())
    for ax, i in zip(axes[30:], np.flatnonzero(answers != labels), strict=False):
        ax.imshow(images[i], cmap="gray_r")
        ax.set_title(f"{labels[i]}, read as {answers[i]}", fontsize=8)
    figure.savefig(file)


def main(arguments: list[str] | None = None) -> float:
    """Train with a line for each epoch; returns the held-out accuracy."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", metavar="FOLDER", help="folder of MNIST's IDX files (default: scikit-learn's digits)")
    parser.add_argument("--hidden", default="30", help="units of the hidden layers: 30, or 30,20, or nothing (30)")
    parser.add_argument("--epochs", type=int, default=30, help="how often each image is learned from (30)")
    parser.add_argument("--batch_size", type=int, default=10, help="images of a mini-batch, B (10)")
    parser.add_argument("--eta", type=float, default=3.0, help="learning rate: how long a step is (3)")
    parser.add_argument("--seed", type=int, default=1, help="of all that is random (1)")
    parser.add_argument("--picture", metavar="FILE.png", help="draw the first layer's weights and what was misread")
    args = parser.parse_args(arguments)
    for package, module, needed in (("scikit-learn", "sklearn", not args.data), ("matplotlib",) * 2 + (args.picture,)):
        if needed and find_spec(module) is None:
            parser.error(f"this needs the package {package}: pip install {package}")
    try:
        rng = np.random.default_rng(args.seed)
        hidden = [int(n) for n in args.hidden.split(",") if n]
        if min(*hidden, args.epochs, args.batch_size) < 1:
            raise ValueError("--hidden, --epochs and --batch_size must be at least 1")
        if args.picture and not (args.picture.endswith(".png") and Path(args.picture).parent.is_dir()):
            raise ValueError(f"--picture={args.picture}: expected a .png file in a folder that exists")
        images, labels, held_images, held_labels = load(args.data, rng)
    except (OSError, ValueError, EOFError, zlib.error) as error:
        parser.error(str(error))

    x, held_x = images.reshape(len(images), -1), held_images.reshape(len(held_images), -1)  # (N, n_0): an image a row
    y = np.eye(max(10, labels.max() + 1))[labels]  # (N, 10): 1 at the right digit
    sizes = [x.shape[1], *hidden, y.shape[1]]
    weights, biases = new_network(sizes, rng)
    print(f"{len(x):,} images to learn from, {len(held_x):,} held out; units of the layers: {sizes}")
    difference = gradient_check(x[:10], y[:10], weights, biases, rng)
    print(f"gradient check: backprop and measured slopes differ by {difference:.0e} of their size")
    for epoch in range(1, args.epochs + 1):
        order = rng.permutation(len(x))
        for start in range(0, len(x), args.batch_size):
            batch = order[start : start + args.batch_size]
            grad_w, grad_b = backprop(x[batch], y[batch], weights, biases)
            for values, gradient in zip(weights + biases, grad_w + grad_b, strict=True):
                values -= args.eta * gradient  # downhill, in place: the gradient points to where the cost grows
        answers = forward(held_x, weights, biases)[1][-1].argmax(axis=1)  # (N): the digit whose unit says most
        accuracy = float((answers == held_labels).mean())
        print(f"epoch {epoch:2}: cost {cost(x, y, weights, biases):.4f}, held-out accuracy {100 * accuracy:.2f}%")
    if args.picture:
        draw(args.picture, weights[0], held_images, held_labels, answers)
    return accuracy


if __name__ == "__main__":
    main()
