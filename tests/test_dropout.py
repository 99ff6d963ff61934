"""dropout.py against the binomial distribution and nn.Dropout."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from kqv.dropout import FastDropout, use_fast_dropout
from model import GPT, GPTConfig


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("p", [0.001, 0.1, 0.5, 0.9])
def test_a_share_p_is_dropped_and_the_rest_is_scaled(p, dtype):
    torch.manual_seed(0)
    n = 400_003  # not a multiple of the four values that share a draw
    x = torch.ones(n, dtype=dtype, requires_grad=True)
    y = FastDropout(p)(x)
    dropped = (y == 0).double()
    assert abs(dropped.mean().item() - p) < 5 * math.sqrt(p * (1 - p) / n) + 2**-17
    rounding = 2**-8 if dtype == torch.bfloat16 else 2e-4
    assert y.unique().tolist() == pytest.approx([0, 1 / (1 - p)], rel=rounding)
    y.sum().backward()
    assert torch.equal(x.grad, y.detach())  # of ones: what multiplied x


def test_neighbours_are_independent():
    """The correlation of the dropped places with those 1 to 8 later is noise."""
    torch.manual_seed(0)
    n = 400_000
    kept = (FastDropout(0.3)(torch.ones(n)) != 0).double()
    kept = (kept - kept.mean()) / kept.std()
    for lag in range(1, 9):
        assert abs((kept[lag:] * kept[:-lag]).mean().item()) < 5 / math.sqrt(n)


def test_it_differs_in_each_call_and_comes_again_with_the_seed():
    x, runs = torch.ones(3, 5, 7), []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        drop = FastDropout(0.5)
        runs.append(torch.stack((drop(x), drop(x))))
    assert torch.equal(runs[0], runs[1]) and not torch.equal(runs[0], runs[2])
    assert not torch.equal(runs[0][0], runs[0][1])


def test_nothing_is_dropped_outside_training_or_at_zero():
    x = torch.randn(4, 6)
    assert torch.equal(FastDropout(0.5).eval()(x), x) and torch.equal(FastDropout(0.0)(x), x)


def test_nearly_everything_can_be_dropped():
    y = FastDropout(1 - 1e-9)(torch.ones(1000))
    assert y.isfinite().all() and (y != 0).sum() < 5


def test_places_that_are_not_in_a_row():
    torch.manual_seed(0)
    x = torch.randn(300, 200).T
    y = FastDropout(0.5)(x)
    kept = y != 0
    torch.testing.assert_close(y[kept], 2 * x[kept])


@pytest.mark.parametrize("device, kind", [("cpu", FastDropout), ("cuda", nn.Dropout)])
def test_a_model_on_a_cpu_gets_it(device, kind):
    model = GPT(GPTConfig(vocab_size=8, block_size=8, n_layer=1, n_head=2, n_embd=8, dropout=0.3, attention="explicit"))
    use_fast_dropout(model, torch.device(device))
    found = [module for module in model.modules() if isinstance(module, nn.Dropout)]
    assert len(found) == 4 and {type(module) for module in found} == {kind} and found[0].p == 0.3
    idx = torch.zeros(2, 8, dtype=torch.long)
    assert not torch.equal(model(idx, idx)[0], model(idx, idx)[0])
    assert torch.equal(model.eval()(idx, idx)[0], model(idx, idx)[0])


def test_on_average_a_model_learns_as_with_torchs():
    """The mean gradient over many draws is that with nn.Dropout, within the noise of the draws."""
    x, w = torch.randn(64, 32, generator=torch.Generator().manual_seed(0)), torch.zeros(32, 1, requires_grad=True)
    gradients = []
    for drop in (FastDropout(0.3), nn.Dropout(0.3)):
        torch.manual_seed(1)
        draws = torch.stack([torch.autograd.grad(F.softplus(drop(x) @ w + 1).sum(), w)[0] for _ in range(2000)])
        gradients.append((draws.mean(dim=0), draws.std(dim=0) / math.sqrt(2000)))
    (ours, noise), (theirs, their_noise) = gradients
    assert ((ours - theirs).abs() < 5 * (noise**2 + their_noise**2).sqrt()).all()
