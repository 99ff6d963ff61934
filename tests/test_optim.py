"""optim.py against PyTorch's own schedulers and a census of the parameters."""

import pytest
import torch
from torch.optim.lr_scheduler import CosineAnnealingLR

from model import GPT, GPTConfig
from optim import adamw, learning_rate_at


def test_cosine_is_pytorchs():
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=6e-4)
    scheduler = CosineAnnealingLR(optimizer, T_max=90, eta_min=6e-5)
    for iter_num in range(10, 100):
        ours = learning_rate_at(iter_num, 6e-4, 6e-5, warmup_iters=10, lr_decay_iters=100)
        assert ours == pytest.approx(scheduler.get_last_lr()[0], rel=1e-6)
        optimizer.step()
        scheduler.step()


@pytest.mark.parametrize("warmup_iters, lr_decay_iters", [(10, 100), (0, 100), (10, 10), (20, 10), (0, 0)])
def test_warm_up_rises_to_the_peak_and_the_end_is_min_lr(warmup_iters, lr_decay_iters):
    rates = [learning_rate_at(i, 1.0, 0.1, warmup_iters, lr_decay_iters) for i in range(200)]
    warmup = rates[:warmup_iters]
    assert warmup == pytest.approx([(i + 1) / (warmup_iters + 1) for i in range(warmup_iters)])
    after = rates[warmup_iters:]
    assert after == sorted(after, reverse=True) and after[-1] == 0.1
    assert all(0 < rate <= 1 for rate in rates)


def test_groups_hold_each_parameter_once_and_only_matrices_decay():
    model = GPT(GPTConfig(vocab_size=61, block_size=16, n_layer=2, n_head=2, n_embd=16, position="sinusoidal"))
    decayed, others = adamw(model, 1e-3, (0.9, 0.95), 0.1).param_groups
    ours = [id(parameter) for group in (decayed, others) for parameter in group["params"]]
    assert sorted(ours) == sorted(id(p) for p in model.parameters() if p.requires_grad)
    assert {p.dim() for p in decayed["params"]} == {2} and {p.dim() for p in others["params"]} == {1}
    assert (decayed["weight_decay"], others["weight_decay"]) == (0.1, 0.0)
