"""Lesson 2: an engine that finds the derivatives by itself, with numbers that remember how they were made.

Lesson 1 worked out dC/dw by hand, for one network. Here each number keeps which numbers it was made of, and how fast
it changes with each of them: the local derivative, a short formula for each of +, *, **, exp, tanh and relu. Walked
backwards from the end, the chain rule does the rest, for any expression:

    a = Value(3.0); b = a * a + a; b.backward(); a.grad      # 7.0, which is 2a + 1

That is what loss.backward() does in PyTorch and in the lessons from here on, there for tensors. The idea, the example
and the two moons are those of Andrej Karpathy's micrograd (github.com/karpathy/micrograd).

The same as in lesson 1: layers z = w a + b, a random start, gradient descent. New: nobody writes (BP1) to (BP4), the
units are relu, and the cost is the hinge loss, with a penalty on large weights. All points are one batch.

    python lessons/2_micrograd.py    100% of 100 points (seeds 1 to 5: 97% to 100%), 99.6% of 500 new ones; 25 s on
                                     two cores of a server CPU (AMD EPYC), of which it uses one
"""

from __future__ import annotations

import argparse
import gc
import math
import random
from importlib.util import find_spec
from itertools import count, pairwise
from pathlib import Path

numbers = count()  # 0, 1, 2, ...


class Value:
    """A number that remembers how it was made. After end.backward(), value.grad is d end / d value."""

    def __init__(self, data: float, parents: tuple[Value, ...] = (), local: tuple[float, ...] = ()):
        self.data = data
        self.grad = 0.0
        self.parents = parents  # the values that this one was made of,
        self.local = local  # and d self / d parent for each of them
        self.number = next(numbers)  # higher than that of its parents

    # each line below: the result, what it was made of, and the derivative with respect to each of these

    def __add__(self, other: Value | float) -> Value:
        other = other if isinstance(other, Value) else Value(other)
        return Value(self.data + other.data, (self, other), (1.0, 1.0))  # d(a + b)/da = 1, d(a + b)/db = 1

    def __mul__(self, other: Value | float) -> Value:
        other = other if isinstance(other, Value) else Value(other)
        return Value(self.data * other.data, (self, other), (other.data, self.data))  # d(ab)/da = b, d(ab)/db = a

    def __pow__(self, n: float) -> Value:  # n is a plain number
        return Value(self.data**n, (self,), (n * self.data ** (n - 1),))  # d(a^n)/da = n a^(n-1)

    def exp(self) -> Value:
        e = math.exp(self.data)
        return Value(e, (self,), (e,))  # d(e^a)/da = e^a

    def tanh(self) -> Value:
        t = math.tanh(self.data)
        return Value(t, (self,), (1 - t * t,))  # d tanh(a)/da = 1 - tanh(a)^2

    def relu(self) -> Value:
        return Value(max(0.0, self.data), (self,), (float(self.data > 0),))  # d max(0, a)/da = 1 if a > 0, else 0

    # the rest is made of these

    def __neg__(self) -> Value:
        return self * -1

    def __sub__(self, other: Value | float) -> Value:
        return self + -other

    def __rsub__(self, other: float) -> Value:  # 1 - a: Python asks a, because a float cannot subtract a Value
        return -self + other

    def __truediv__(self, other: Value | float) -> Value:
        return self * other**-1

    def __rtruediv__(self, other: float) -> Value:
        return self**-1 * other

    __radd__, __rmul__ = __add__, __mul__

    def __repr__(self) -> str:
        return f"Value({self.data:.4f}, grad {self.grad:.4f})"

    def backward(self) -> None:
        """Add d self / d value to the grad of every value that self was made of, directly or not."""
        found, waiting = {self}, [self]
        while waiting:
            for parent in waiting.pop().parents:
                if parent not in found:
                    found.add(parent)
                    waiting.append(parent)
        for value in found:
            if value.parents:
                value.grad = 0.0  # those without parents, the weights, add up over several calls, as in PyTorch
        self.grad += 1.0  # d self / d self
        # A value hands on its grad when it is complete: after all that was made of it. A value is made after its
        # parents, so from the youngest to the oldest is such an order (a topological one).
        for value in sorted(found, key=lambda value: value.number, reverse=True):
            for parent, local in zip(value.parents, value.local, strict=True):
                parent.grad += local * value.grad  # the chain rule; +=, because a value may be used more than once


def example(a: Value, b: Value) -> Value:
    """The expression in micrograd's README: it shows off every operation, and uses its parts again and again."""
    c = a + b
    d = a * b + b**3
    c = c + c + 1
    c = c + 1 + c - a
    d = d + d * 2 + (b + a).relu()
    d = d + 3 * d + (b - a).relu()
    f = (c - d) ** 2
    return f / 2 + 10 / f


# -- a network made of Values ----------------------------------------------------------------------------------------

Layer = tuple[list[list[Value]], list[Value]]  # w[j][k] and b[j], as in lesson 1


def new_mlp(sizes: list[int], rng: random.Random) -> list[Layer]:
    """Random weights for layers of these sizes; biases start at 0."""
    layers = []
    for n_in, n_out in pairwise(sizes):
        std = math.sqrt(2 / n_in)  # not 1/sqrt(n_in): relu lets half through, He et al. 2015, arXiv:1502.01852
        w = [[Value(rng.gauss(0, std)) for _ in range(n_in)] for _ in range(n_out)]
        layers.append((w, [Value(0.0) for _ in range(n_out)]))
    return layers


def mlp(x: list[float], layers: list[Layer]) -> list[Value]:
    """What the last layer says about the point x; one number each time, where lesson 1 had a matrix."""
    for i, (w, b) in enumerate(layers):  # z_j is the sum of w_jk x_k over k, plus b_j
        z = [sum((w_jk * x_k for w_jk, x_k in zip(w_j, x, strict=True)), b_j) for w_j, b_j in zip(w, b, strict=True)]
        x = [z_j.relu() for z_j in z] if i < len(layers) - 1 else z
    return x


def hinge_loss(scores: list[Value], labels: list[int], parameters: list[Value], penalty: float = 1e-4) -> Value:
    """The mean of max(0, 1 - label * score): nothing to pay where the score is right and at least 1 away from 0."""
    hinge = sum((1 - label * score).relu() for score, label in zip(scores, labels, strict=True)) / len(labels)
    return hinge + penalty * sum(p * p for p in parameters)  # large weights make a jagged border


def moons(n: int, noise: float, rng: random.Random) -> tuple[list[list[float]], list[int]]:
    """n points of two half circles that reach into each other, label -1 above and +1 below."""
    angles = [math.pi * i / (n // 2 - 1) for i in range(n // 2)]
    above = [(math.cos(angle), math.sin(angle)) for angle in angles]
    below = [(1 - math.cos(angle), 0.5 - math.sin(angle)) for angle in angles]
    points = [[x + rng.gauss(0, noise), y + rng.gauss(0, noise)] for x, y in above + below]
    return points, [-1] * len(above) + [1] * len(below)


def accuracy(scores: list[Value], labels: list[int]) -> float:
    return sum(score.data * label > 0 for score, label in zip(scores, labels, strict=True)) / len(labels)


def draw(file: str, points: list[list[float]], labels: list[int], layers: list[Layer]) -> None:
    """The points, and the score everywhere between them: the border is where it is 0."""
    from matplotlib.figure import Figure

    xs, ys = [-1.75 + 0.075 * i for i in range(61)], [-1.25 + 0.075 * i for i in range(41)]
    scores = [[mlp([x, y], layers)[0].data for x in xs] for y in ys]
    ax = (figure := Figure(figsize=(7, 5), layout="constrained")).subplots()
    figure.colorbar(ax.contourf(xs, ys, scores, levels=[-9, -3, -1, 0, 1, 3, 9], cmap="RdBu", extend="both"))
    ax.contour(xs, ys, scores, levels=[0], colors="black")
    ax.scatter(*zip(*points, strict=True), c=labels, cmap="RdBu", edgecolors="black")
    figure.savefig(file)


def comma_separated(text: str) -> list[int]:
    return [int(n) for n in text.split(",") if n]


def main(arguments: list[str] | None = None) -> float:
    """The example, then the moons with a line every 10 steps; returns the accuracy on the points learned from."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--hidden", type=comma_separated, default=[16, 16], help="units of the hidden layers (16,16)")
    parser.add_argument("--steps", type=int, default=100, help="steps of gradient descent (100)")
    parser.add_argument("--points", type=int, default=100, help="points to learn from (100)")
    parser.add_argument("--noise", type=float, default=0.1, help="how far points lie from the half circles (0.1)")
    parser.add_argument("--seed", type=int, default=1, help="of all that is random (1)")
    parser.add_argument("--picture", metavar="FILE.png", help="draw the points and the border that was learned")
    args = parser.parse_args(arguments)
    if args.picture and find_spec("matplotlib") is None:
        parser.error("this needs the package matplotlib: pip install matplotlib")
    if args.picture and not (args.picture.endswith(".png") and Path(args.picture).parent.is_dir()):
        parser.error(f"--picture={args.picture}: expected a .png file in a folder that exists")
    if min(*args.hidden, args.steps, args.points // 2 - 1) < 1:
        parser.error("--hidden and --steps must be at least 1, --points at least 4")

    a, b = Value(-4.0), Value(2.0)
    g = example(a, b)
    g.backward()
    print(f"the example: g = {g.data:.4f}, dg/da = {a.grad:.4f}, dg/db = {b.grad:.4f}")

    rng = random.Random(args.seed)
    points, labels = moons(args.points, args.noise, rng)
    layers = new_mlp([2, *args.hidden, 1], rng)
    parameters = [p for w, b in layers for row in [*w, b] for p in row]  # all weights and biases
    for step in range(args.steps):
        scores = [mlp(point, layers)[0] for point in points]
        loss = hinge_loss(scores, labels, parameters)
        for p in parameters:
            p.grad = 0.0
        loss.backward()
        eta = 1 - 0.9 * step / args.steps  # large steps first, small ones to settle
        for p in parameters:
            p.data -= eta * p.grad
        if step % 10 == 0:
            print(f"step {step:3}: loss {loss.data:.4f}, accuracy {100 * accuracy(scores, labels):.0f}%")
    learned = accuracy([mlp(point, layers)[0] for point in points], labels)
    points_new, labels_new = moons(500, args.noise, rng)
    new = accuracy([mlp(point, layers)[0] for point in points_new], labels_new)
    print(f"accuracy {100 * learned:.0f}% on the {len(points)} points learned from, {100 * new:.1f}% on 500 new ones")
    if args.picture:
        draw(args.picture, points, labels, layers)
    return learned


if __name__ == "__main__":
    gc.disable()  # values never form a circle, so Python need not look for circles: half the time
    main()
