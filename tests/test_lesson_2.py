"""lessons/2_micrograd.py: its engine against torch's autograd, and the figures in its head."""

import random
import re

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from tests.lessons import load

lesson = load("2_micrograd")
Value = lesson.Value


def test_the_line_in_the_head():
    scope = {"Value": Value}
    line = next(line for line in lesson.__doc__.splitlines() if "b.backward()" in line)
    *statements, last = line.partition("#")[0].strip().split("; ")
    exec("\n".join(statements), scope)
    assert eval(last, scope) == 7.0 and "# 7.0," in line


def test_the_example_of_micrograds_readme():
    a, b = Value(-4.0), Value(2.0)
    g = lesson.example(a, b)
    g.backward()
    assert [f"{x:.4f}" for x in (g.data, a.grad, b.grad)] == ["24.7041", "138.8338", "645.5773"]
    ta, tb = (torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in (-4.0, 2.0))
    tg = lesson.example(ta, tb)
    tg.backward()
    assert (g.data, a.grad, b.grad) == pytest.approx((tg.item(), ta.grad.item(), tb.grad.item()), rel=1e-12)


# each is computed by Value and by torch, with the same words; a square and a half keep it where it is defined
OPERATIONS = {
    "a + b": lambda a, b: a + b,
    "a - b": lambda a, b: a - b,
    "a * b": lambda a, b: a * b,
    "a / b": lambda a, b: a / (b * b + 0.5),
    "-a": lambda a, b: -a,
    "a + 2": lambda a, b: a + 2,
    "2 + a": lambda a, b: 2 + a,
    "a - 2": lambda a, b: a - 2,
    "1.5 - a": lambda a, b: 1.5 - a,
    "3 * a": lambda a, b: 3 * a,
    "a / 4": lambda a, b: a / 4,
    "3 / a": lambda a, b: 3 / (a * a + 0.5),
    "a**2": lambda a, b: a**2,
    "a**3": lambda a, b: a**3,
    "a**-1.5": lambda a, b: (a * a + 0.5) ** -1.5,
    "a**0.5": lambda a, b: (a * a + 0.5) ** 0.5,
    "exp": lambda a, b: a.exp(),
    "tanh": lambda a, b: a.tanh(),
    "relu": lambda a, b: a.relu(),
}
LEAVES = st.lists(st.floats(-3, 3), min_size=1, max_size=4)
STEPS = st.lists(st.tuples(st.sampled_from(sorted(OPERATIONS)), st.integers(0, 99), st.integers(0, 99)), max_size=25)


@settings(max_examples=300, deadline=None)
@given(LEAVES, STEPS)
def test_any_expression_has_torchs_gradients(leaves, steps):
    """Each step takes any of the numbers so far, so many are used more than once, and some never."""
    ours = [Value(x) for x in leaves]
    theirs = [torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in leaves]
    for name, i, j in steps:
        i, j = i % len(ours), j % len(ours)
        assume(name != "relu" or ours[i].data == theirs[i].item() == 0 or abs(ours[i].data) > 1e-9)  # rounded across 0
        ours.append(OPERATIONS[name](ours[i], ours[j]))
        theirs.append(OPERATIONS[name](theirs[i], theirs[j]))
        if abs(ours[-1].data) > 3:  # else powers of powers overflow
            ours.append(ours.pop().tanh())
            theirs.append(theirs.pop().tanh())
    for their in theirs:
        their.retain_grad()
    ours[-1].backward()
    theirs[-1].backward()
    for our, their in zip(ours, theirs, strict=True):
        assert our.data == pytest.approx(their.item(), rel=1e-6, abs=1e-6)
        assert our.grad == pytest.approx(0 if their.grad is None else their.grad.item(), rel=1e-6, abs=1e-6)


@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize("x", [-1.7, -0.3, 0.4, 2.1])
def test_each_operation_has_torchs_gradient(name, x):
    a, b = Value(x), Value(0.7)
    OPERATIONS[name](a, b).backward()
    ta, tb = (torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in (x, 0.7))
    OPERATIONS[name](ta, tb).backward()
    assert a.grad == pytest.approx(ta.grad.item(), rel=1e-12)
    assert b.grad == pytest.approx(0 if tb.grad is None else tb.grad.item(), rel=1e-12)


def test_gradients_add_up_over_calls_as_torchs_do():
    a, ta = Value(1.5), torch.tensor(1.5, requires_grad=True)
    y, ty = a * a * a + a.exp(), ta * ta * ta + ta.exp()
    for _ in range(3):
        y.backward()
        ty.backward(retain_graph=True)
    assert a.grad == pytest.approx(ta.grad.item(), rel=1e-6)
    a.backward()  # a number that is made of nothing
    ta.backward()
    assert a.grad == pytest.approx(ta.grad.item(), rel=1e-6)


def test_long_expressions_do_not_end_in_the_recursion_limit():
    a = Value(2.0)
    total = a
    for _ in range(100_000):
        total = total + a
    total.backward()
    assert a.grad == 100_001
    del total


def test_the_network_of_lesson_1_has_the_gradients_worked_out_there():
    lesson_1 = load("1_network")
    rng = np.random.default_rng(0)
    weights, biases = lesson_1.new_network([4, 3, 2], rng)
    x, y = rng.random((5, 4)), np.eye(2)[[0, 1, 1, 0, 1]]
    layers = [
        ([[Value(v) for v in row] for row in w], [Value(v) for v in b]) for w, b in zip(weights, biases, strict=True)
    ]
    cost = Value(0.0)
    for image, wanted in zip(x, y, strict=True):
        a = [Value(pixel) for pixel in image]
        for w, b in layers:
            z = [
                sum((w_jk * a_k for w_jk, a_k in zip(w_j, a, strict=True)), b_j) for w_j, b_j in zip(w, b, strict=True)
            ]
            a = [1 / (1 + (-z_j).exp()) for z_j in z]
        cost = cost + sum((a_j - y_j) ** 2 for a_j, y_j in zip(a, wanted, strict=True)) / 2 / len(x)
    cost.backward()
    assert cost.data == pytest.approx(lesson_1.cost(x, y, weights, biases), rel=1e-12)
    for (w, b), grad_w, grad_b in zip(layers, *lesson_1.backprop(x, y, weights, biases), strict=True):
        np.testing.assert_allclose([[value.grad for value in row] for row in w], grad_w, rtol=1e-9)
        np.testing.assert_allclose([value.grad for value in b], grad_b, rtol=1e-9)


# -- the moons -------------------------------------------------------------------------------------------------------


def test_the_moons_are_scikit_learns():
    from sklearn.datasets import make_moons

    points, labels = lesson.moons(60, 0.0, random.Random(0))
    their_points, their_labels = make_moons(60, shuffle=False)
    np.testing.assert_allclose(points, their_points, atol=1e-15)
    assert labels == [2 * label - 1 for label in their_labels]
    noisy, _ = lesson.moons(2000, 0.1, random.Random(0))
    assert np.std(np.array(noisy) - make_moons(2000, shuffle=False)[0]) == pytest.approx(0.1, rel=0.05)


def torch_mlp(layers) -> torch.nn.Sequential:
    """The same network in torch, with the same weights."""
    modules = []
    for w, b in layers:
        linear = torch.nn.Linear(len(w[0]), len(w), dtype=torch.float64)
        linear.weight.data = torch.tensor([[value.data for value in row] for row in w], dtype=torch.float64)
        linear.bias.data = torch.tensor([value.data for value in b], dtype=torch.float64)
        modules += [linear, torch.nn.ReLU()]
    return torch.nn.Sequential(*modules[:-1])


def torch_loss(network: torch.nn.Sequential, points, labels) -> torch.Tensor:
    """hinge_embedding_loss is max(0, margin - x) where y = -1."""
    margins = network(torch.tensor(points, dtype=torch.float64)).flatten() * torch.tensor(labels)
    hinge = torch.nn.functional.hinge_embedding_loss(margins, -torch.ones_like(margins))
    return hinge + 1e-4 * sum(p.square().sum() for p in network.parameters())


def test_the_networks_loss_and_gradients_are_torchs():
    rng = random.Random(0)
    points, labels = lesson.moons(10, 0.1, rng)
    layers = lesson.new_mlp([2, 5, 4, 1], rng)
    parameters = [p for w, b in layers for row in [*w, b] for p in row]
    loss = lesson.hinge_loss([lesson.mlp(point, layers)[0] for point in points], labels, parameters)
    loss.backward()
    network = torch_mlp(layers)
    theirs = torch_loss(network, points, labels)
    theirs.backward()
    assert loss.data == pytest.approx(theirs.item(), rel=1e-12)
    grads = torch.cat([p.grad.flatten() for p in network.parameters()])  # weight, bias, weight, ... as in parameters
    np.testing.assert_allclose([p.grad for p in parameters], grads, rtol=1e-9, atol=1e-15)


def losses_of_torch(sizes: list[int], points: int, steps: int) -> list[float]:
    """The losses of every tenth step, and the last accuracy, of the same start trained by torch.optim.SGD."""
    rng = random.Random(1)
    data, labels = lesson.moons(points, 0.1, rng)
    network = torch_mlp(lesson.new_mlp(sizes, rng))
    optimizer = torch.optim.SGD(network.parameters(), lr=1.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - 0.9 * step / steps)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = torch_loss(network, data, labels)
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    return losses[::10]


def losses_in(out: str) -> list[float]:
    return [float(loss) for loss in re.findall(r"^step +\d+: loss ([\d.]+)", out, re.M)]


def test_training_follows_torchs(capsys):
    assert lesson.main(["--hidden=6,5", "--points=20", "--steps=50"]) > 0.8
    assert losses_in(capsys.readouterr().out) == pytest.approx(losses_of_torch([2, 6, 5, 1], 20, 50), abs=6e-5)


@pytest.mark.slow
def test_the_figures_of_the_head(kqv):
    done = kqv("lessons/2_micrograd.py")
    assert done.returncode == 0, done.stderr
    assert "g = 24.7041, dg/da = 138.8338, dg/db = 645.5773" in done.stdout
    learned, new = re.findall(r"([\d.]+)% on", done.stdout)
    assert float(learned) >= 99 and float(new) >= 99  # 100 and 99.6 where measured
    assert losses_in(done.stdout) == pytest.approx(losses_of_torch([2, 16, 16, 1], 100, 100), abs=6e-5)


# -- the command -----------------------------------------------------------------------------------------------------


def test_command_draws_and_explains_itself(tmp_path, capsys):
    picture = tmp_path / "moons.png"
    lesson.main(["--hidden=", "--points", "4", "--steps=1", f"--picture={picture}"])
    assert picture.read_bytes()[:4] == b"\x89PNG"
    with pytest.raises(SystemExit) as stop:
        lesson.main(["--help"])
    assert stop.value.code == 0
    out = capsys.readouterr().out
    assert all(option in out for option in ("--hidden", "--steps", "--points", "--noise", "--seed", "--picture"))


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--hidden=16,x", "invalid comma_separated value"),
        ("--hidden=0", "at least 1"),
        ("--steps=0", "at least 1"),
        ("--points=3", "at least 4"),
        ("--noise=loud", "invalid float"),
        ("--picture=none/moons.png", "folder that exists"),
        ("--picture=moons.doc", "expected a .png file"),
    ],
)
def test_wrong_arguments(capsys, argument, message):
    with pytest.raises(SystemExit) as stop:
        lesson.main([argument])
    assert stop.value.code == 2 and message in capsys.readouterr().err.splitlines()[-1]


def test_missing_matplotlib_is_named(capsys, monkeypatch):
    monkeypatch.setattr(lesson, "find_spec", lambda name: None)
    with pytest.raises(SystemExit):
        lesson.main(["--picture=moons.png"])
    assert "pip install matplotlib" in capsys.readouterr().err
