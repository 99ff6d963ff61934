"""Packed and 8-bit linear layers against plain ones."""

import copy

import pytest
import torch

from kqv.quantized import FEW_ROWS, Int8Linear, PackedLinear, WeightOnlyLinear, pack, prefers_16_bit_weights
from model import GPT, GPTConfig

needs_onednn = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="PyTorch without oneDNN")


def logits(dtype: torch.dtype, quantize: str | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits (3, V) of one prompt three times, plain and packed."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=32, vocab_size=301, n_layer=2, n_head=4, n_embd=64)).to(dtype).eval()
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    idx = torch.randint(301, (1, 20)).expand(3, -1)
    with torch.inference_mode():
        plain = model(idx)[0][:, -1].float()
        pack(model, 3, quantize)
        assert not any(type(module) is torch.nn.Linear for module in model.modules())
        alone, together = model(idx[:1])[0][:, -1].float(), model(idx)[0][:, -1].float()
    torch.testing.assert_close(together, alone.expand(3, -1), rtol=1e-5, atol=1e-5 if dtype == torch.float32 else 0.05)
    return plain, together


@needs_onednn
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
def test_packed_products_are_the_plain_ones(monkeypatch, dtype, tolerance):
    monkeypatch.setattr("kqv.quantized.SMALL", 0)
    if dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        pytest.skip("a CPU without bfloat16 products")
    plain, together = logits(dtype)
    assert (together - plain).norm() < tolerance * plain.norm()
    linear = torch.nn.Linear(64, 48, bias=False, dtype=dtype)
    x = torch.randn(2, 5, 64, dtype=dtype)
    torch.testing.assert_close(PackedLinear(linear)(x), linear(x), rtol=tolerance, atol=tolerance)


@needs_onednn
@pytest.mark.parametrize("vendor, kind", [("AuthenticAMD", PackedLinear), ("GenuineIntel", torch.nn.Linear)])
def test_a_single_sample_in_float32_is_read_by_the_library_that_reads_faster(monkeypatch, vendor, kind):
    by_columns = kind is torch.nn.Linear and torch.backends.mkl.is_available()
    monkeypatch.setattr("kqv.quantized.cpu_words", lambda: {vendor})
    monkeypatch.setattr("kqv.quantized.SMALL", 64 * 64)  # c_proj of attention stays as it is
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=32, vocab_size=301, n_layer=2, n_head=4, n_embd=64)).eval()
    idx = torch.randint(301, (1, 20))
    with torch.inference_mode():
        plain = model(idx)[0]
        pack(model, rows=1)
        assert type(model.lm_head) is kind
        assert type(dict(model.named_modules())["transformer.h.0.attn.c_proj"]) is torch.nn.Linear
        assert model.lm_head.weight.mT.is_contiguous() is by_columns
        torch.testing.assert_close(model(idx)[0], plain)
        cached = torch.cat(list(model.generate(idx, 10, [torch.Generator()], temperature=0)), dim=1)
        whole = torch.cat(list(model.generate(idx, 10, [torch.Generator()], temperature=0, kv_cache=False)), dim=1)
    assert torch.equal(cached, whole)


@needs_onednn
@pytest.mark.parametrize("dtype, unit", [(torch.bfloat16, 2**-8), (torch.float16, 2**-11)], ids=str)
@pytest.mark.parametrize("tokens", [1, FEW_ROWS // 2, FEW_ROWS])
def test_weights_alone_are_in_16_bits_on_cpus_without_such_products(monkeypatch, dtype, unit, tokens):
    for name in ("_is_mkldnn_bf16_supported", "_is_mkldnn_fp16_supported"):
        monkeypatch.setattr(torch.ops.mkldnn, name, lambda: False)
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=32, vocab_size=301, n_layer=2, n_head=4, n_embd=64)).to(dtype).eval()
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    in_float32 = copy.deepcopy(model).float()  # the same weights, nothing else rounded
    pack(model, rows=2)
    assert model.lm_head.weight.dtype == torch.float16
    linear = dict(model.named_modules())["transformer.h.1.mlp.c_fc"]
    assert type(linear) is WeightOnlyLinear and linear.weight.dtype == dtype
    x = torch.randn(2, tokens, 64)
    exact = torch.nn.functional.linear(x, linear.weight.float(), linear.bias)  # (2, tokens, 256)
    # x and y are rounded in few rows, by half a unit each; nothing is in more
    worst = 1.01 * unit / 2 * (torch.nn.functional.linear(x.abs(), linear.weight.float().abs()) + exact.abs() + 1)
    assert ((linear(x) - exact).abs() <= (worst if 2 * tokens <= FEW_ROWS else 1e-5)).all()
    idx = torch.randint(301, (2, tokens))
    with torch.inference_mode():
        logits, expected = model(idx)[0], in_float32(idx)[0]
    assert logits.dtype == torch.float32
    assert (logits - expected).norm() < 4 * unit * expected.norm()


@needs_onednn
def test_large_logits_are_not_rounded_to_halves(monkeypatch):
    """GPT-2's are near -100, where numbers in bfloat16 are 0.5 apart, so that likely tokens would be equally likely."""
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=32, vocab_size=301, n_layer=1, n_head=4, n_embd=64, tie_embeddings=False)).eval()
    model.transformer.ln_f.bias.data.fill_(1)
    model.lm_head.weight.data -= 100 / 64
    model.bfloat16()
    in_float32 = copy.deepcopy(model).float()
    pack(model, rows=1)
    idx = torch.tensor([[5]])
    with torch.inference_mode():
        logits, expected = model(idx)[0], in_float32(idx)[0]
    assert expected.mean() < -90
    assert (logits - expected).abs().max() < 0.1


@needs_onednn
def test_16_bit_weights_are_for_one_or_two_rows_where_reading_is_all(monkeypatch):
    cpu, words = torch.device("cpu"), set()
    monkeypatch.setattr("kqv.quantized.cpu_words", lambda: words)
    assert not prefers_16_bit_weights(cpu, 1, 768)  # a CPU that is not known
    words |= {"AuthenticAMD", "avx2"}
    assert prefers_16_bit_weights(cpu, 1, 768) and prefers_16_bit_weights(cpu, 2, 256)
    assert not prefers_16_bit_weights(cpu, 3, 768) and not prefers_16_bit_weights(cpu, 1, 192)
    assert not prefers_16_bit_weights(torch.device("meta"), 1, 768)
    with monkeypatch.context() as patch:
        patch.setattr("torch.backends.mkldnn.is_available", lambda: False)
        assert not prefers_16_bit_weights(cpu, 1, 768)
    words.add("avx512f")  # where PyTorch computes in bfloat16 by oneDNN, with or without instructions for it
    assert not prefers_16_bit_weights(cpu, 1, 768)


@pytest.mark.parametrize("quantize", [None, "int8"])
def test_every_part_of_a_block_works_after_packing(monkeypatch, quantize):
    monkeypatch.setattr("kqv.quantized.SMALL", 0)
    if quantize and "fbgemm" not in torch.backends.quantized.supported_engines:
        pytest.skip("not an x86 CPU")
    parts = {"position": "rope", "norm": "rmsnorm", "mlp": "swiglu", "qk_norm": True, "short_conv": 2, "n_kv_head": 2}
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=32, vocab_size=301, n_layer=2, n_head=4, n_embd=64, **parts)).eval()
    idx = torch.randint(301, (1, 20))
    weights = {name: weight.clone() for name, weight in model.state_dict().items()}
    with torch.inference_mode():
        plain = model(idx)[0]
        pack(model, 1, quantize)
        packed = model(idx)[0]
    assert (packed - plain).norm() < (0.05 if quantize else 1e-6) * plain.norm()
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, weights[name])


@pytest.mark.skipif("fbgemm" not in torch.backends.quantized.supported_engines, reason="not an x86 CPU")
def test_int8_weights_are_within_half_a_step_and_logits_within_five_percent():
    torch.manual_seed(0)
    linear = torch.nn.Linear(64, 48)
    torch.backends.quantized.engine = "fbgemm"
    quantized, x = Int8Linear(linear), torch.randn(7, 64)
    weight = torch.ops.quantized.linear_unpack(quantized.packed)[
        0
    ].dequantize()  # the weights that the kernel multiplies by
    assert ((weight - linear.weight).abs() <= 0.5001 * quantized.scale[:, None]).all()
    # x is off by at most half a step of its row, and errors of both signs partly cancel
    expected = torch.nn.functional.linear(x, weight, linear.bias)
    worst = 0.5 * x.abs().amax(dim=1, keepdim=True) / 63 * weight.abs().sum(dim=1)
    assert ((quantized(x) - expected).abs() <= worst + 1e-5).all()
    plain, together = logits(torch.float32, "int8")
    assert 0 < (together - plain).norm() < 0.05 * plain.norm()
