"""optim.py against PyTorch's schedulers, torch.optim.Muon, and counts of the parameters."""

import subprocess
import sys

import pytest
import torch
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR

from kqv.optim import POLAR_EXPRESS, SAFETY, Muon, adamw, learning_rate_at, orthogonalize, split_for_muon
from model import GPT, GPTConfig
from tests.conftest import ROOT


def test_cosine_is_pytorchs():
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=6e-4)
    scheduler = CosineAnnealingLR(optimizer, T_max=90, eta_min=6e-5)
    for iter_num in range(10, 100):
        ours = learning_rate_at(iter_num, 6e-4, 6e-5, warmup_iters=10, lr_decay_iters=100)
        assert ours == pytest.approx(scheduler.get_last_lr()[0], rel=1e-6)
        optimizer.step()
        scheduler.step()


@pytest.mark.parametrize("decay_fraction", [0.25, 1.0])
def test_the_end_of_wsd_is_pytorchs_line_and_before_it_nothing_changes(decay_fraction):
    decay_iters = int(80 * decay_fraction)
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=6e-4)
    scheduler = LinearLR(optimizer, start_factor=1.0, end_factor=0.1, total_iters=decay_iters)
    rates = [learning_rate_at(i, 6e-4, 6e-5, 0, 80, "wsd", decay_fraction) for i in range(100)]
    assert set(rates[: 80 - decay_iters]) <= {6e-4}
    for rate in rates[80 - decay_iters :]:
        assert rate == pytest.approx(scheduler.get_last_lr()[0], rel=1e-6)
        optimizer.step()
        scheduler.step()


@pytest.mark.parametrize("schedule", ["cosine", "wsd"])
@pytest.mark.parametrize("warmup_iters, lr_decay_iters", [(10, 100), (0, 100), (10, 10), (20, 10), (0, 0)])
def test_warm_up_rises_to_the_peak_and_the_end_is_min_lr(warmup_iters, lr_decay_iters, schedule):
    rates = [learning_rate_at(i, 1.0, 0.1, warmup_iters, lr_decay_iters, schedule) for i in range(200)]
    warmup = rates[:warmup_iters]
    assert warmup == pytest.approx([(i + 1) / (warmup_iters + 1) for i in range(warmup_iters)])
    after = rates[warmup_iters:]
    assert after == sorted(after, reverse=True) and after[-1] == 0.1
    assert all(0 < rate <= 1 for rate in rates)


def test_groups_hold_each_parameter_once_and_only_matrices_decay():
    model = GPT(GPTConfig(vocab_size=61, block_size=16, n_layer=2, n_head=2, n_embd=16, position="sinusoidal"))
    decayed, others = adamw(model.parameters(), 1e-3, (0.9, 0.95), 0.1).param_groups
    ours = [id(parameter) for group in (decayed, others) for parameter in group["params"]]
    assert sorted(ours) == sorted(id(p) for p in model.parameters() if p.requires_grad)
    assert {p.dim() for p in decayed["params"]} == {2} and {p.dim() for p in others["params"]} == {1}
    assert (decayed["weight_decay"], others["weight_decay"]) == (0.1, 0.0)


def test_adamw_is_pytorchs_fused_one_to_the_bit():
    first, gradients = matrices_and_gradients(steps=4)
    ours, theirs = ([matrix.clone().requires_grad_() for matrix in first] for _ in range(2))
    groups = [{"params": theirs, "weight_decay": 0.1}, {"params": [], "weight_decay": 0.0}]
    pytorchs = torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.95), fused=True)
    pairs = ((ours, adamw(ours, 1e-2, (0.9, 0.95), 0.1)), (theirs, pytorchs))
    for step, gradient in enumerate(gradients):
        for matrices, optimizer in pairs:
            for matrix, grad in zip(matrices, gradient, strict=True):
                matrix.grad = grad * (torch.nan if step == 2 else 1)
            optimizer.grad_scale, optimizer.found_inf = None, torch.tensor(float(step == 2))
            optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_optimizing_does_not_wait_for_the_compilers_import():
    program = """
import sys, torch
from kqv.optim import Muon, adamw
weights = [torch.randn(4, 4, requires_grad=True) for _ in range(2)]
for optimizer in (adamw(weights[:1], 1e-3, (0.9, 0.95), 0.1), Muon(weights[1:], 0.02, 0.9, 0.1, torch.float32)):
    for weight in weights:
        weight.grad = torch.ones(4, 4)
    optimizer.step()
    optimizer.zero_grad()
    optimizer.load_state_dict(optimizer.state_dict())
assert "torch._dynamo" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", program], check=True, cwd=ROOT)


# -- Muon --------------------------------------------------------------------------------------------------------------


def matrices_and_gradients(steps: int) -> tuple[list[torch.Tensor], list[list[torch.Tensor]]]:
    draw = torch.Generator().manual_seed(0)
    shapes = [(48, 16), (16, 16), (8, 16), (16, 64), (48, 16), (16, 64), (16, 8)]
    first = [torch.randn(shape, generator=draw) for shape in shapes]
    return first, [[torch.randn(shape, generator=draw) for shape in shapes] for _ in range(steps)]


JORDAN = (3.4445, -4.775, 2.0315)  # the coefficients of torch.optim.Muon, for each step


@pytest.mark.parametrize("dtype, bound", [(torch.float32, 0.015), (torch.bfloat16, 0.025)])
def test_muon_with_pytorchs_coefficients_is_pytorchs_but_for_rounding(monkeypatch, dtype, bound):
    monkeypatch.setattr("kqv.optim.POLAR_EXPRESS", 6 * (JORDAN,))
    monkeypatch.setattr("kqv.optim.SAFETY", 1)
    first, gradients = matrices_and_gradients(steps=5)
    ours, theirs = ([matrix.clone().requires_grad_() for matrix in first] for _ in range(2))
    optimizers = (
        Muon(ours, lr=0.02, momentum=0.9, weight_decay=0.1, dtype=dtype),
        torch.optim.Muon(theirs, lr=0.02, momentum=0.9, weight_decay=0.1, nesterov=True, ns_steps=6),
    )
    for gradient in gradients:
        for matrices, optimizer in zip((ours, theirs), optimizers, strict=True):
            for matrix, grad in zip(matrices, gradient, strict=True):
                matrix.grad = grad.clone()
            optimizer.step()
    for start, a, b in zip(first, ours, theirs, strict=True):
        moved = (b - start).norm()
        assert moved > 0.1 and (a - b).norm() < bound * moved  # PyTorch's rounds to 8 bits of mantissa in each product


@pytest.mark.parametrize("shape", [(3, 20, 50), (2, 50, 20), (1, 32, 32)])
def test_orthogonalized_matrices_keep_their_directions_and_have_singular_values_near_one(shape):
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    u, s, v = torch.linalg.svd(matrices, full_matrices=False)
    s = s / s.norm(dim=1, keepdim=True)
    far = s > 0.001
    for a, b, c in POLAR_EXPRESS:  # the same polynomials applied to the singular values
        s = a * (s / SAFETY) + b * (s / SAFETY) ** 3 + c * (s / SAFETY) ** 5
    expected = u @ torch.diag_embed(s) @ v
    (ours,) = orthogonalize([matrices])
    torch.testing.assert_close(ours, expected, atol=1e-4, rtol=1e-4)
    assert ((s > 0.4) & (s < 1.6))[far].all()


def test_muon_and_adamw_get_all_parameters_each_once():
    model = GPT(GPTConfig(vocab_size=61, block_size=16, n_layer=2, n_head=2, n_embd=16, qk_norm=True))
    matrices, rest = split_for_muon(model)
    optimizers = [adamw(rest, 1e-3, (0.9, 0.95), 0.1), Muon(matrices, 0.02, 0.95, 0.1, torch.float32)]
    ours = [id(p) for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]]
    assert sorted(ours) == sorted(id(p) for p in model.parameters())
    names = {id(p): name for name, p in model.named_parameters()}
    by_muon = {names[id(p)] for group in optimizers[1].param_groups for p in group["params"]}
    assert len(by_muon) == 8 and all(name.startswith("transformer.h.") and "norm" not in name for name in by_muon)


def test_momentum_is_kept_by_a_saved_state_also_by_its_own():
    first, gradients = matrices_and_gradients(steps=3)
    results = []
    for how in ("not", "own", "another's"):
        matrices = [matrix.clone().requires_grad_() for matrix in first]
        muon = Muon(matrices, lr=0.02, momentum=0.9, weight_decay=0.1, dtype=torch.float32)
        for gradient in gradients:
            for matrix, grad in zip(matrices, gradient, strict=True):
                matrix.grad = grad.clone()
            muon.step()
            if how == "own":
                muon.load_state_dict(muon.state_dict())
            elif how == "another's":
                saved, muon = muon.state_dict(), Muon(matrices, 0.02, 0.9, 0.1, torch.float32)
                muon.load_state_dict(saved)
        results.append(matrices)
    for others in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], others, strict=True))


def test_a_bad_step_changes_nothing():
    first, (good, bad, again) = matrices_and_gradients(steps=3)
    results = []
    for gradients in ([good, bad, again], [good, again]):
        matrices = [matrix.clone().requires_grad_() for matrix in first]
        muon = Muon(matrices, lr=0.02, momentum=0.9, weight_decay=0.1, dtype=torch.float32)
        for gradient in gradients:
            muon.found_inf = torch.tensor(float(gradient is bad))
            for matrix, grad in zip(matrices, gradient, strict=True):
                matrix.grad = grad * (torch.nan if gradient is bad else 1)
            muon.step()
        results.append(matrices)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
