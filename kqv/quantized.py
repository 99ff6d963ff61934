"""A model for generation on CPUs: weights stored as the fastest kernels read them, also in 8 bits, and shorter calls.

Each new token reads every weight, so reading them is what a token costs in a large model. Fewer bytes (16 or 8 bits),
and a layout that the kernel need not change, make that faster. In a small model, it is Python's work between the
kernels. Such a model cannot be trained.
"""

import math
import warnings
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kqv.errors import UserError
from kqv.machine import cpu_words

SMALL = 200_000  # weights; products of up to 150,000 are faster without oneDNN, from 260,000 on with it (dev/LOG.md)


class PackedLinear(nn.Module):
    """A linear layer whose weights oneDNN has reordered once; nn.Linear makes it reorder them for each token.

    For a single row of float32, oneDNN reads the weights in their own order: lay_out=False.
    """

    def __init__(self, linear: nn.Linear, lay_out: bool = True):
        super().__init__()
        weight = linear.weight.detach()
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight, None) if lay_out else weight
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")


def in_onednn(linear: nn.Linear, lay_out: bool) -> nn.Module:
    """A PackedLinear in float32; a small layer stays as it is, because oneDNN takes 15 µs longer to start."""
    return PackedLinear(linear, lay_out) if linear.weight.numel() > SMALL else linear


def by_columns(linear: nn.Linear) -> nn.Linear:
    """The layer itself, its weights stored column by column: MKL reads them a tenth faster for a single row."""
    linear.weight.data = linear.weight.data.mT.contiguous().mT
    return linear


FEW_ROWS = 16  # between 10, as fast either way, and 64, three times as slow (dev/LOG.md)


class WeightOnlyLinear(nn.Module):
    """A linear layer from float32 to float32 with weights in 16 bits, for CPUs without products in 16 bits.

    A few rows, and what becomes of them, are rounded to 16 bits; the kernel reads weights at the speed of memory and
    adds in float32. Its time grows with the rows, so for many the weights are converted to float32 for the call.
    """

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.weight = linear.weight.detach()
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        if x.numel() > FEW_ROWS * x.size(-1):
            return F.linear(x, self.weight.float(), self.bias)
        y = F.linear(x.type_as(self.weight), self.weight).type_as(x)
        return y if self.bias is None else y + self.bias


# Without VNNI instructions, fbgemm adds pairs of products in 16 bits, which 7 bits of x do not overflow
LEVELS = 127 if torch.cpu._is_vnni_supported() else 63


class Int8Linear(nn.Module):
    """A linear layer with weights rounded to 8 bits, with a scale for each output, and x too, with one for each row.

    weight (out, in) is about scale[out] * rounded (out, in). Sums of 8-bit products are exact, so a row gives the same
    result alone and in a batch.
    """

    def __init__(self, linear: nn.Linear):
        super().__init__()
        weight = linear.weight.detach().float()  # (out, in)
        self.scale = weight.abs().amax(dim=1).clamp(min=1e-12) / 127  # (out)
        rounded = torch.round(weight / self.scale[:, None]).to(torch.int8)  # (out, in)
        zero_points = torch.zeros(len(weight), dtype=torch.int64)
        with warnings.catch_warnings():  # PyTorch deprecates this tensor format, but not the kernel that reads it
            warnings.simplefilter("ignore")
            packed = torch._make_per_channel_quantized_tensor(rounded, self.scale.double(), zero_points, 0)
        self.packed = torch.ops.quantized.linear_prepack(packed, None)
        self.bias = None if linear.bias is None else linear.bias.detach().float()

    def forward(self, x: Tensor) -> Tensor:
        largest = torch.linalg.vector_norm(x, math.inf, dim=-1, keepdim=True).float()  # (B, T, 1)
        scale = largest.clamp(min=1e-12) / LEVELS
        y = torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32(x / scale, 1.0, LEVELS + 1, self.packed)
        y = y * scale if self.bias is None else torch.addcmul(self.bias, y, scale)
        return y.type_as(x)


def prefers_16_bit_weights(device: torch.device, rows: int, n_embd: int) -> bool:
    """Whether a model generates faster with WeightOnlyLinear than in float32: AVX2 only, a model that is not small.

    `rows` of each product for a new token: one for each sample. For the figures see dev/LOG.md.
    """
    words = cpu_words()
    without_products = "avx2" in words and "avx512f" not in words and torch.backends.mkldnn.is_available()
    return device.type == "cpu" and without_products and rows <= 2 and n_embd >= 256


def pack(model: nn.Module, rows: int, quantize: str | None = None) -> None:
    """Make the model faster in place: its linear layers, and the calls of its blocks; it can only generate afterwards.

    `rows` of each product for a new token: one for each sample. Without `quantize` the results are the same up to
    rounding.
    """
    if kind := faster_linear(model.transformer.wte.weight, rows, quantize):
        for module in list(model.modules()):
            for name, linear in module.named_children():
                if isinstance(linear, nn.Linear):
                    setattr(module, name, kind(linear))
        if kind is WeightOnlyLinear:
            model.float()  # all but the weights in these layers
            # logits of -100, as GPT-2 has them, would be rounded to halves; inputs after a norm do not overflow float16
            model.lm_head.weight = model.lm_head.weight.half()
    call_directly(model)


def faster_linear(weight: Tensor, rows: int, quantize: str | None) -> Callable[[nn.Linear], nn.Module] | None:
    """What replaces a linear layer on the device and in the dtype of `weight`; None, as on GPUs: nothing is faster."""
    if quantize == "int8":
        if weight.device.type != "cpu" or "fbgemm" not in torch.backends.quantized.supported_engines:
            raise UserError(f"quantize='int8': works on x86 CPUs, not on this {weight.device.type} device")
        torch.backends.quantized.engine = "fbgemm"
        return Int8Linear
    if weight.device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return None
    if weight.dtype == torch.float32:
        if rows > 1 or "AuthenticAMD" in cpu_words():  # on which MKL reads large weights half as fast as oneDNN
            return partial(in_onednn, lay_out=rows > 1)
        return by_columns if torch.backends.mkl.is_available() else None
    if weight.dtype == torch.bfloat16:
        return PackedLinear if torch.ops.mkldnn._is_mkldnn_bf16_supported() else WeightOnlyLinear
    return None if torch.ops.mkldnn._is_mkldnn_fp16_supported() else WeightOnlyLinear


def call_directly(model: nn.Module) -> None:
    """Put the weights and the forward functions of all modules in a block where Python finds them first.

    nn.Module searches three dicts for them and looks for hooks at each call: a twentieth of the time of a token of
    GPT-2 on a CPU, a fifth for a small model.
    """
    for block in model.transformer.h:
        for module in block.modules():
            vars(module).update(module.named_parameters(recurse=False))
            for name, child in module.named_children():
                vars(module)[name] = child if name == "attn_dropout" else child.forward  # attention asks it for p
