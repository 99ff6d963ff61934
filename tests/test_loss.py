"""loss.py against F.cross_entropy, and a large vocabulary against a small one."""

import math
from collections.abc import Callable

import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from kqv.loss import LARGE_VOCAB, LinearCrossEntropy, NextTokenLoss
from tests.test_model import make, tokens


def loss_and_gradients(loss: Callable[..., torch.Tensor], *inputs: torch.Tensor) -> list[torch.Tensor]:
    value = loss(*inputs)
    return [value.detach(), *torch.autograd.grad(3 * value, inputs)]  # 3: the incoming gradient matters


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(
    "rows", [1, 512, 700, 4500]
)  # less than one chunk, one chunk, chunks with a rest, larger chunks with a rest
def test_the_loss_in_chunks_is_cross_entropy(rows, dtype):
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(rows, 24, generator=generator, dtype=dtype).requires_grad_()
    weight = torch.randn(300, 24, generator=generator, dtype=dtype).requires_grad_()
    targets = tokens(rows, vocab_size=300)
    targets[1::3] = -1
    targets[600:] = -1
    chunked = loss_and_gradients(lambda x, weight: LinearCrossEntropy.apply(x, weight, targets, True), x, weight)
    plain = loss_and_gradients(lambda x, weight: F.cross_entropy(x @ weight.t(), targets, ignore_index=-1), x, weight)
    torch.testing.assert_close(chunked, plain)
    with torch.no_grad():
        assert torch.equal(LinearCrossEntropy.apply(x, weight, targets, False), chunked[0])


def test_the_loss_in_chunks_of_no_target_is_zero_and_wrong_ones_are_refused():
    x, weight = torch.randn(2, 300, 8, generator=torch.Generator().manual_seed(2))
    assert LinearCrossEntropy.apply(x, weight, torch.full((300,), -1), False) == 0
    for wrong in (-2, 300):
        with pytest.raises((RuntimeError, IndexError), match="out of bounds"):
            LinearCrossEntropy.apply(x, weight, torch.full((300,), wrong), False)


@pytest.mark.parametrize(
    "dtype, scale, tolerance",
    [(torch.float32, 1, 1e-5), (torch.bfloat16, 1, 0.03), (torch.float16, 1, 0.01), (torch.float16, 2**16, 0.01)],
    ids=str,
)
@pytest.mark.parametrize("tied", [True, False])
def test_a_large_vocabulary_is_trained_on_as_a_small_one(monkeypatch, tied, dtype, scale, tolerance):
    model = make(vocab_size=LARGE_VOCAB, block_size=300, tie_embeddings=tied, position="rope")
    idx = tokens(3, 300, vocab_size=50)  # each many times
    targets = tokens(3, 300, vocab_size=LARGE_VOCAB).masked_fill(idx == 7, -1)

    def train() -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        model.zero_grad()
        for micro_batch in (slice(2), slice(2, 3)):  # the second adds to the first's gradients
            with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
                loss = NextTokenLoss(model)(idx[micro_batch], targets[micro_batch])
            (scale * loss).backward()
        return loss.detach(), {name: parameter.grad / scale for name, parameter in model.named_parameters()}

    loss, gradients = train()
    with torch.no_grad(), torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        evaluated = NextTokenLoss(model)(idx[2:], targets[2:])
    torch.testing.assert_close(evaluated, loss)
    monkeypatch.setattr("kqv.loss.LARGE_VOCAB", math.inf)
    plain_loss, plain = train()
    torch.testing.assert_close(loss, plain_loss, rtol=tolerance, atol=0)
    for name, gradient in gradients.items():
        assert (gradient - plain[name]).norm() <= tolerance * plain[name].norm(), name


@pytest.mark.parametrize("tied", [True, False])
def test_the_gradients_of_a_large_vocabulary_are_the_same_each_time(tied):
    model = make(vocab_size=LARGE_VOCAB, block_size=256, tie_embeddings=tied, n_layer=1)
    idx, found = tokens(8, 256, vocab_size=5), []
    threads = torch.get_num_threads()
    torch.set_num_threads(2)  # the threads must not race when they add up a token's many gradients
    for _ in range(4):
        model.zero_grad()
        NextTokenLoss(model)(idx, idx).backward()
        found.append(model.transformer.wte.weight.grad.clone())
    torch.set_num_threads(threads)
    assert all(torch.equal(gradient, found[0]) for gradient in found)


class LargestTensor(TorchDispatchMode):
    numel = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **kwargs or {})
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            self.numel = max(self.numel, tensor.numel() if isinstance(tensor, torch.Tensor) else 0)
        return result


@pytest.mark.parametrize("training", [True, False])
def test_the_logits_of_a_large_vocabulary_are_never_there_at_once(training):
    model = make(vocab_size=LARGE_VOCAB, block_size=512)
    idx = tokens(4, 512, vocab_size=LARGE_VOCAB)
    with LargestTensor() as largest, torch.set_grad_enabled(training):
        loss = NextTokenLoss(model)(idx, idx.roll(-1, 1))
        if training:
            loss.backward()
    assert largest.numel == 512 * LARGE_VOCAB  # of 2048 rows
