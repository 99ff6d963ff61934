"""lessons/1_network.py: its gradients against torch's, its data files, and the figure in its head."""

import gzip
import struct

import numpy as np
import pytest
import torch

from tests.lessons import load


@pytest.fixture(scope="module")
def lesson():
    return load("1_network")


def network_and_batch(lesson, sizes: list[int], B: int = 7):
    rng = np.random.default_rng(0)
    weights, biases = lesson.new_network(sizes, rng)
    return rng.random((B, sizes[0])), np.eye(sizes[-1])[rng.integers(sizes[-1], size=B)], weights, biases


def torch_cost(x, y, weights: list[torch.Tensor], biases: list[torch.Tensor]) -> torch.Tensor:
    a = torch.tensor(x)
    for w, b in zip(weights, biases, strict=True):
        a = torch.sigmoid(torch.nn.functional.linear(a, w, b))
    return torch.nn.functional.mse_loss(a, torch.tensor(y), reduction="sum") / 2 / len(x)


SIZES = pytest.mark.parametrize("sizes", [[12, 10], [12, 9, 10], [12, 9, 8, 7, 10]], ids=str)


@SIZES
def test_backprop_is_torchs_autograd(lesson, sizes):
    x, y, weights, biases = network_and_batch(lesson, sizes)
    theirs = [torch.tensor(values, requires_grad=True) for values in weights + biases]
    cost = torch_cost(x, y, theirs[: len(weights)], theirs[len(weights) :])
    cost.backward()
    assert lesson.cost(x, y, weights, biases) == pytest.approx(cost.item(), rel=1e-12)
    grad_w, grad_b = lesson.backprop(x, y, weights, biases)
    for gradient, their in zip(grad_w + grad_b, theirs, strict=True):
        np.testing.assert_allclose(gradient, their.grad.numpy(), rtol=1e-9, atol=1e-15)


@SIZES
def test_gradient_check_accepts_backprop_and_leaves_the_weights_alone(lesson, sizes):
    x, y, weights, biases = network_and_batch(lesson, sizes)
    before = [values.copy() for values in weights + biases]
    assert lesson.gradient_check(x, y, weights, biases, np.random.default_rng(0)) < 1e-8
    assert all((values == kept).all() for values, kept in zip(weights + biases, before, strict=True))


def test_gradient_check_sees_a_wrong_sign(lesson, monkeypatch):
    x, y, weights, biases = network_and_batch(lesson, [12, 9, 10])
    right = lesson.backprop
    monkeypatch.setattr(lesson, "backprop", lambda *a: (right(*a)[0], [-gradient for gradient in right(*a)[1]]))
    assert lesson.gradient_check(x, y, weights, biases, np.random.default_rng(0)) > 0.1


def test_sigmoid_is_torchs_and_cannot_overflow(lesson):
    z = np.array([-1e4, -750, -30, -1, 0, 1, 30, 750, 1e4])
    with np.errstate(all="raise"):
        np.testing.assert_allclose(lesson.sigmoid(z), torch.sigmoid(torch.tensor(z)).numpy(), atol=1e-15)


def test_the_figure_of_the_head(lesson, capsys):
    assert lesson.main([]) == pytest.approx(0.9722, abs=0.01)  # 350 of 360
    out = capsys.readouterr().out
    assert "1,437 images to learn from, 360 held out; units of the layers: [64, 30, 10]" in out
    assert out.count("\nepoch ") == 30


@pytest.mark.slow
def test_scikit_learns_network_of_the_same_units_reads_as_well(lesson):
    from sklearn.neural_network import MLPClassifier

    images, labels, held_images, held_labels = lesson.load(None, np.random.default_rng(1))
    theirs = MLPClassifier((30,), activation="logistic", solver="sgd", learning_rate_init=0.3, batch_size=10)
    theirs.set_params(momentum=0, max_iter=30, random_state=1, tol=0)
    with pytest.warns(match="Maximum iterations"):
        theirs.fit(images.reshape(len(images), -1), labels)
    accuracy = theirs.score(held_images.reshape(len(held_images), -1), held_labels)
    assert lesson.main([]) == pytest.approx(accuracy, abs=0.02)


# -- MNIST's files ---------------------------------------------------------------------------------------------------


def write_idx(path, array: np.ndarray) -> None:
    raw = struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape) + array.astype(np.uint8).tobytes()
    path.write_bytes(gzip.compress(raw) if path.suffix == ".gz" else raw)


@pytest.fixture(params=["", ".gz"], ids=["plain", "gzip"])
def folder(request, tmp_path):
    """scikit-learn's digits as the four files of MNIST."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    for part, rows in {"train": slice(0, 800), "t10k": slice(800, 1000)}.items():
        write_idx(tmp_path / f"{part}-images-idx3-ubyte{request.param}", digits.images[rows] * 255 // 16)
        write_idx(tmp_path / f"{part}-labels-idx1-ubyte{request.param}", digits.target[rows])
    return tmp_path


def test_reads_and_learns_from_mnists_files(lesson, folder, capsys):
    from sklearn.datasets import load_digits

    images, labels, held_images, held_labels = lesson.load(str(folder), np.random.default_rng(0))
    assert images.shape == (800, 8, 8) and held_images.shape == (200, 8, 8) and images.max() == 1.0
    assert (labels == load_digits().target[:800]).all() and (held_labels == load_digits().target[800:1000]).all()
    np.testing.assert_array_equal(held_images * 255, load_digits().images[800:1000] * 255 // 16)
    assert lesson.main([f"--data={folder}", "--epochs=5"]) > 0.8
    assert "800 images to learn from, 200 held out" in capsys.readouterr().out


def error_line(lesson, capsys, *arguments: str) -> str:
    with pytest.raises(SystemExit) as stop:
        lesson.main(list(arguments))
    assert stop.value.code == 2
    return capsys.readouterr().err.splitlines()[-1]


def test_what_is_wrong_with_the_files_is_said_in_a_line(lesson, folder, capsys, tmp_path):
    path = next(folder.glob("t10k-labels*"))
    whole = path.read_bytes()
    assert "no file train-images-idx3-ubyte" in error_line(lesson, capsys, f"--data={tmp_path / 'none'}")
    for cut in (0, 3, 8, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:cut])
        assert "error: " in error_line(lesson, capsys, f"--data={folder}")
    path.write_bytes(b"\x1f\x8b\x08\x00\x00\x00\x00\x00\x00\x03" + b"\xff" * 30)
    assert "error: " in error_line(lesson, capsys, f"--data={folder}")
    write_idx(path, np.zeros(199))
    assert "one label for each image" in error_line(lesson, capsys, f"--data={folder}")
    write_idx(path, np.zeros((200, 1, 1)))
    assert "is not a whole IDX file of bytes with 1 dimension" in error_line(lesson, capsys, f"--data={folder}")


# -- the command -----------------------------------------------------------------------------------------------------


def test_command_draws_and_explains_itself(command, tmp_path):
    done = command("lessons/1_network.py", "--epochs", "1", "--hidden=12", "--picture=seen.png")
    assert done.code == 0 and "epoch  1: cost" in done.out
    assert (tmp_path / "seen.png").read_bytes()[:4] == b"\x89PNG"
    text = command("lessons/1_network.py", "--help").out
    assert all(option in text for option in ("--data", "--hidden", "--eta", "--seed", "--picture"))


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--hidden=30,x", "invalid literal"),
        ("--hidden=0", "at least 1"),
        ("--epochs=0", "at least 1"),
        ("--batch_size=0", "at least 1"),
        ("--eta=fast", "invalid float"),
        ("--seed=-1", "non-negative"),
        ("--picture=none/seen.png", "folder that exists"),
        ("--picture=seen.doc", "expected a .png file"),
    ],
)
def test_wrong_arguments(lesson, capsys, argument, message):
    assert message in error_line(lesson, capsys, argument)


def test_a_missing_package_is_named(lesson, capsys, monkeypatch):
    monkeypatch.setattr(lesson, "find_spec", lambda name: None)
    assert "pip install scikit-learn" in error_line(lesson, capsys)
    assert "pip install matplotlib" in error_line(lesson, capsys, "--data=here", "--picture=seen.png")
