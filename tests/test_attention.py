"""attention.py: chunks against PyTorch's fused kernel, and the choice by device, dtype and context."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from kqv.attention import LONGEST, ROWS, chunked_attention, use_attention
from model import GPT, GPTConfig, causal_mask, sdpa_attention

NO_DROPOUT = nn.Dropout(0.0)


def queries_keys_values(T: int, G: int, dtype: torch.dtype) -> list[torch.Tensor]:
    draw = torch.Generator().manual_seed(0)
    shapes = [(2, 4, T, 8), (2, G, T, 8), (2, G, T, 8)]
    return [torch.randn(shape, generator=draw).to(dtype).requires_grad_() for shape in shapes]


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 0.03)])
@pytest.mark.parametrize("T, G", [(1, 4), (7, 4), (ROWS, 2), (ROWS + 1, 1), (2 * ROWS + 50, 4)])
def test_chunks_give_the_result_and_the_gradients_of_the_fused_kernel(T, G, dtype, tolerance):
    results = []
    for attention, kind in ((sdpa_attention, torch.float32), (chunked_attention, dtype)):
        inputs = queries_keys_values(T, G, dtype)
        with torch.autocast("cpu", torch.bfloat16, enabled=kind != torch.float32):
            y = attention(*(x.to(kind) for x in inputs), NO_DROPOUT)
        assert y.dtype == kind
        y.square().sum().backward()
        results.append([y.detach().float(), *(x.grad.float() for x in inputs)])
    for ours, theirs in zip(results[1], results[0], strict=True):
        assert (ours - theirs).norm() <= tolerance * (1 + theirs.norm())


def test_float32_queries_of_a_norm_meet_bfloat16_values():
    q, k, v = queries_keys_values(9, 4, torch.float32)
    assert chunked_attention(q, k, v.bfloat16(), NO_DROPOUT).dtype == torch.bfloat16


def test_with_a_mask_or_without_gradients_it_is_the_fused_kernel():
    q, k, v = queries_keys_values(7, 2, torch.float32)
    mask = causal_mask(7, 7, q.device).flip(0, 1)
    expected = F.scaled_dot_product_attention(q, k, v, mask, enable_gqa=True)
    assert torch.equal(chunked_attention(q, k, v, NO_DROPOUT, mask), expected)
    with torch.no_grad():
        expected = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        assert torch.equal(chunked_attention(q, k, v, NO_DROPOUT), expected)


def test_dropout_drops_weights():
    q, k, v = queries_keys_values(300, 4, torch.float32)
    ones = torch.ones_like(v).requires_grad_()
    torch.manual_seed(0)
    y = chunked_attention(q, k, ones, nn.Dropout(0.5))  # each row's weights sum to 1 on average
    assert y[:, :, 100:].std() > 0.01 and y.mean().item() == pytest.approx(1, abs=0.02)


@pytest.mark.parametrize(
    "wanted, device, dtype, block_size, dropout, chosen",
    [
        ("auto", "cpu", torch.bfloat16, 64, 0.0, "chunked"),
        ("auto", "cpu", torch.bfloat16, LONGEST + 1, 0.0, "sdpa"),
        ("auto", "cpu", torch.float32, 64, 0.0, "sdpa"),
        ("auto", "cpu", torch.float32, 64, 0.1, "chunked"),
        ("auto", "cpu", torch.float32, LONGEST + 1, 0.1, "sdpa"),
        ("auto", "cuda", torch.bfloat16, 64, 0.1, "sdpa"),
        ("chunked", "cpu", torch.float32, 64, 0.0, "chunked"),
        ("sdpa", "cpu", torch.bfloat16, 64, 0.0, "sdpa"),
    ],
)
def test_the_fastest_is_chosen(wanted, device, dtype, block_size, dropout, chosen):
    model = GPT(GPTConfig(vocab_size=8, block_size=block_size, n_layer=1, n_head=2, n_embd=8, dropout=dropout))
    assert use_attention(model, wanted, torch.device(device), dtype) == chosen
    used = model.transformer.h[0].attn.attention
    assert used is (chunked_attention if chosen == "chunked" else sdpa_attention)
