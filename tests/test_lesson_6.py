"""Lesson 6 against model.py, PyTorch's own layers and torch.optim."""

import re

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tests.lessons import load

lesson = load("6_gpt")


def weights(V: int = 30, C: int = 16, n_layer: int = 2) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    w = lesson.new_weights(V, C, n_layer, generator)
    return {name: p + 0.2 * torch.randn(p.shape, generator=generator) for name, p in w.items()}


def test_logits_and_gradients_are_those_of_model_py():
    w, idx = weights(), torch.randint(30, (3, 20), generator=torch.Generator().manual_seed(1))
    theirs = lesson.in_model_py(w, 30, 16, 2, 4)
    logits, loss = theirs(idx[:, :-1], idx[:, 1:])
    torch.testing.assert_close(lesson.gpt(idx[:, :-1], w, 4), logits, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(lesson.loss_of(idx, w, 4), loss, rtol=1e-5, atol=1e-5)
    for p in w.values():
        p.requires_grad_(True)
    gradients = torch.autograd.grad(lesson.loss_of(idx, w, 4), list(w.values()))
    loss.backward()
    expected = dict(theirs.named_parameters())
    for name, gradient in zip(w, gradients, strict=True):
        torch.testing.assert_close(gradient, expected[name].grad, rtol=1e-4, atol=1e-6)


def test_the_layers_are_pytorchs():
    x = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(2))
    w = {"n.weight": torch.randn(16), "n.bias": torch.randn(16)}
    torch.testing.assert_close(lesson.layer_norm(x, w, "n"), F.layer_norm(x, (16,), w["n.weight"], w["n.bias"]))
    torch.testing.assert_close(lesson.gelu(x), F.gelu(x))


def test_a_later_character_changes_nothing_before_it():
    w, idx = weights(), torch.randint(30, (1, 20), generator=torch.Generator().manual_seed(1))
    other = idx.clone()
    other[0, 12] = (idx[0, 12] + 1) % 30
    before, after = lesson.gpt(idx, w, 4), lesson.gpt(other, w, 4)
    torch.testing.assert_close(before[:, :12], after[:, :12])
    assert (before[:, 12:] - after[:, 12:]).abs().max() > 1e-3


def test_training_is_torchs_adam():
    """The same batches, rates and betas in torch.optim.Adam give the same weights."""
    text = torch.randint(10, (400,), generator=torch.Generator().manual_seed(3))
    w = lesson.new_weights(10, 8, 1, torch.Generator().manual_seed(4))
    theirs = {name: nn.Parameter(p.clone()) for name, p in w.items()}
    lesson.train(text, w, 2, 5, torch.Generator().manual_seed(5))
    optimizer, generator = (
        torch.optim.Adam(theirs.values(), betas=(0.9, 0.99), eps=1e-8),
        torch.Generator().manual_seed(5),
    )
    for step in range(1, 6):
        starts = torch.randint(len(text) - lesson.T, (lesson.B,), generator=generator)
        idx = torch.stack([text[start : start + lesson.T + 1] for start in starts])
        optimizer.param_groups[0]["lr"] = 3e-3 * (1 - step / 6) * min(1, step / 20)
        optimizer.zero_grad()
        lesson.loss_of(idx, theirs, 2).backward()
        optimizer.step()
    for name, p in w.items():
        torch.testing.assert_close(p, theirs[name].data, rtol=1e-4, atol=1e-6)


def test_it_begins_as_model_py_does():
    w = lesson.new_weights(500, 64, 8, torch.Generator().manual_seed(0))
    theirs = dict(lesson.in_model_py(w, 500, 64, 8, 4).named_parameters())
    assert {name: p.shape for name, p in w.items()} == {name: p.shape for name, p in theirs.items()}
    fresh = type(lesson.in_model_py(w, 500, 64, 8, 4))  # model.GPT, which draws its own
    expected = fresh(lesson.in_model_py(w, 500, 64, 8, 4).config).named_parameters()
    for name, p in expected:
        assert w[name].mean().item() == pytest.approx(p.mean().item(), abs=2e-3), name
        assert w[name].std().item() == pytest.approx(p.std().item(), rel=0.05), name


def test_it_writes_what_model_py_writes_also_past_the_window():
    w, idx = weights(), torch.randint(30, (2, 5), generator=torch.Generator().manual_seed(1))
    model, n = lesson.in_model_py(w, 30, 16, 2, 4), lesson.T + 10
    expected = idx
    for _ in range(n):
        likeliest = model(expected[:, -lesson.T :])[0][:, -1].argmax(dim=-1, keepdim=True)
        expected = torch.cat((expected, likeliest), dim=1)
    assert lesson.write(idx, n, w, 4).equal(expected)


def test_it_draws_each_character_as_often_as_the_model_expects():
    w, idx = weights(V=5), torch.tensor([[1, 2, 3]]).expand(20_000, -1)
    drawn = lesson.write(idx, 1, w, 4, torch.Generator().manual_seed(0))[:, -1]
    expected = lesson.gpt(idx[:1], w, 4)[0, -1].softmax(dim=-1)
    torch.testing.assert_close(drawn.bincount(minlength=5) / 20_000, expected, rtol=0, atol=0.02)


def test_the_held_out_loss_is_the_mean_over_windows_from_end_to_end():
    w, text = weights(), torch.randint(30, (700,), generator=torch.Generator().manual_seed(1))
    starts = torch.linspace(0, len(text) - lesson.T - 1, 500).long()
    assert starts[-1] + lesson.T == len(text) - 1
    losses = []
    for start in starts.tolist():
        logits = lesson.gpt(text[None, start : start + lesson.T], w, 4)[0]
        losses.append(F.cross_entropy(logits, text[start + 1 : start + lesson.T + 1]).item())
    assert lesson.held_out_loss(text, w, 4) == pytest.approx(sum(losses) / 500, abs=1e-5)


def test_a_short_run_learns_and_prints_what_the_page_says(tmp_path, capsys):
    (tmp_path / "text.txt").write_text("the keys and the values of the queries, then the keys again.\n" * 60)
    options = ["--steps=60", "--n_embd=32", "--n_layer=1", "--n_head=2", f"--text={tmp_path / 'text.txt'}"]
    assert lesson.main(options) < 2.0
    printed = capsys.readouterr().out
    assert re.search(r"logits differ by at most [\d.e-]+", printed) and "KVCache" in printed
    for wrong in (["--text=nowhere"], ["--n_head=5"]):
        with pytest.raises(SystemExit) as stop:
            lesson.main(wrong)
        assert stop.value.code == 2 and capsys.readouterr().err.strip()


@pytest.mark.slow
def test_the_figure_of_the_head():
    assert lesson.main([]) < 1.75
