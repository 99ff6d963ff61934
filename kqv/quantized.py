"""Linear layers that hold their weights as the CPU's fastest kernels read them: to generate with, not to train.

Generating reads every weight for every token, so a token takes as long as reading them: fewer bytes (16 bits, 8 bits)
and kernels that need not arrange them anew are all there is to gain.
"""

import math
import warnings
from functools import partial

import torch
from torch import Tensor, nn

from kqv.errors import UserError
from kqv.machine import cpu_words


class PackedLinear(nn.Module):
    """The same product by oneDNN, from weights laid out once, which it would otherwise arrange anew for each token.

    For a single row of float32 it has nothing to arrange: there `lay_out` False reads the weights as they are.
    """

    def __init__(self, linear: nn.Linear, lay_out: bool = True):
        super().__init__()
        weight = linear.weight.detach()
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight, None) if lay_out else weight
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")


# fbgemm adds pairs of products in 16 bits where the CPU has no VNNI instructions: 7 bits of x do not overflow them
LEVELS = 127 if torch.cpu._is_vnni_supported() else 63


class Int8Linear(nn.Module):
    """The product with weights rounded to 8 bits, one scale for each output, and x to as many, one scale for each row.

    The 8-bit products add up exactly, so a row is the same alone and in a batch.
    """

    def __init__(self, linear: nn.Linear):
        super().__init__()
        weight = linear.weight.detach().float()  # (out, in)
        self.scale = weight.abs().amax(dim=1).clamp(min=1e-12) / 127  # (out)
        rounded = torch.round(weight / self.scale[:, None]).to(torch.int8)  # (out, in)
        zero_points = torch.zeros(len(weight), dtype=torch.int64)
        with warnings.catch_warnings():  # the kernel's own format is on its way out, the kernel is not
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


def pack(model: nn.Module, batch_size: int, quantize: str | None = None) -> None:
    """Replace the model's linear layers by ones that read their weights faster; the model can then only generate.

    Without `quantize` the results are the same but for rounding. Nothing changes where nothing is gained: on GPUs, and
    for a single sample in float32 on Intel's CPUs, where PyTorch already reads as fast as memory can be read. (On AMD's
    its library for that, MKL, reads half as fast.)
    """
    weight = model.transformer.wte.weight
    if quantize == "int8":
        if weight.device.type != "cpu" or "fbgemm" not in torch.backends.quantized.supported_engines:
            raise UserError(f"quantize='int8': works on x86 CPUs, not on {weight.device.type} here")
        torch.backends.quantized.engine = "fbgemm"
        kind = Int8Linear
    elif weight.device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return
    else:
        as_it_is = weight.dtype == torch.float32 and batch_size == 1
        gains = {torch.float32: not as_it_is or "AuthenticAMD" in cpu_words()}
        gains[torch.bfloat16] = torch.ops.mkldnn._is_mkldnn_bf16_supported()
        if not gains.get(weight.dtype, False):
            return
        kind = partial(PackedLinear, lay_out=not as_it_is)
    for module in list(model.modules()):
        for name, linear in module.named_children():
            if isinstance(linear, nn.Linear):
                setattr(module, name, kind(linear))
