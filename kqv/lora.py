"""Finetuning with few trained weights: LoRA adapters, as the package peft has them, and freezing by name.

LoRA (Hu et al. 2021, arXiv:2106.09685): a matrix W stays as it is, and the product of two thin ones is added to it,
W + alpha/r B A with A (r, in) and B (out, r). B starts at zero, so training starts at the model under the adapter.
"""

import math
from collections.abc import Sequence
from fnmatch import fnmatch
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kqv.errors import UserError

TARGETS = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")


class LoRALinear(nn.Linear):
    """A frozen linear layer plus an adapter for each of its parts (Q, K and V, for instance), `rows` of W each."""

    def __init__(self, linear: nn.Linear, rows: list[int], rank: int, alpha: float):
        super().__init__(linear.in_features, linear.out_features, linear.bias is not None, device="meta")
        self.weight, self.bias = linear.weight, linear.bias
        self.rows, self.scale = rows, alpha / rank
        self.lora_A = nn.Parameter(torch.empty(len(rows), rank, linear.in_features))  # (P, r, in)
        self.lora_B = nn.Parameter(torch.zeros(linear.out_features, rank))  # (out, r)
        for A in self.lora_A:
            nn.init.kaiming_uniform_(A, a=math.sqrt(5))

    def forward(self, x: Tensor) -> Tensor:
        thin = F.linear(x, self.lora_A.flatten(0, 1)).chunk(len(self.rows), dim=-1)  # P x (..., r)
        parts = [F.linear(t, B) for t, B in zip(thin, self.lora_B.split(self.rows), strict=True)]
        return F.linear(x, self.weight, self.bias) + self.scale * torch.cat(parts, dim=-1)  # (..., out)

    def merged(self) -> Tensor:
        """W + alpha/r B A, (out, in)."""
        products = [B @ A for A, B in zip(self.lora_A, self.lora_B.split(self.rows), strict=True)]
        return self.weight + self.scale * torch.cat(products)


def rows_of_parts(name: str, config: Any) -> list[int]:
    """Rows of each part of a layer that has its own adapter: peft's layers, so Q, K and V together only in GPT-2."""
    if name.endswith("c_fc"):
        return [config.n_inner] * (2 if config.mlp == "swiglu" else 1)
    if name.endswith("c_proj"):
        return [config.n_embd]
    queries, keys = config.n_head * config.head_dim, config.n_kv_head * config.head_dim
    return [queries, keys, keys] if config.position == "rope" else [queries + 2 * keys]


def add_lora(model: Any, base: dict[str, str], rank: int, alpha: float, targets: Sequence[str] = TARGETS) -> None:
    """Freeze a model and put adapters beside the linear layers whose names end in one of `targets`, in place.

    `base` tells where the model's own weights are: a checkpoint holds that and the adapters only.
    """
    model.requires_grad_(False)
    linears = {name: module for name, module in model.transformer.h.named_modules() if isinstance(module, nn.Linear)}
    for target in targets:
        chosen = [name for name in linears if name == target or name.endswith("." + target)]
        if not chosen:
            raise UserError(f"lora_targets={target!r}: no layer has this name; expected {' | '.join(TARGETS)}")
        for name in chosen:
            parent, _, attribute = name.rpartition(".")
            rows = rows_of_parts(name, model.config)
            setattr(model.transformer.h.get_submodule(parent), attribute, LoRALinear(linears[name], rows, rank, alpha))
    model.lora = {"base": base, "rank": rank, "alpha": alpha, "targets": list(targets)}


def is_adapted(model: Any) -> bool:
    return hasattr(model, "lora")


def weights_to_save(model: Any) -> dict[str, Any]:
    """A checkpoint's entry "model", and "lora" if the model is adapted: then only the adapters are saved."""
    weights = model.state_dict()
    if not is_adapted(model):
        return {"model": weights}
    return {"model": {name: weights[name] for name in weights if ".lora_" in name}, "lora": model.lora}


def merged_weights(model: Any) -> dict[str, Tensor]:
    """The weights of the plain model that computes the same, under model.py's names."""
    weights = {name: tensor for name, tensor in model.state_dict().items() if ".lora_" not in name}
    for name, module in model.named_modules():
        if isinstance(module, LoRALinear):
            weights[f"{name}.weight"] = module.merged().detach()
    return weights


def freeze(model: Any, patterns: Sequence[str]) -> None:
    """Exclude the weights whose names match one of the patterns ("transformer.wte.*") from training, in place."""
    names = dict(model.named_parameters())
    for pattern in patterns:
        chosen = [name for name in names if fnmatch(name, pattern)]
        if not chosen:
            raise UserError(f"freeze={pattern!r}: matches no weight; there are {', '.join(list(names)[:3])}, ...")
        for name in chosen:
            names[name].requires_grad_(False)
    if patterns and not any(parameter.requires_grad for parameter in model.parameters()):
        raise UserError("freeze: no weight is left to train")


def peft_adapter(model: Any, names: list[tuple[str, tuple[str, ...]]], transposed: bool) -> dict[str, Any]:
    """An adapted model's adapters as peft keeps them: "config" and "weights".

    `names` are ours and theirs of all weights; `transposed` is whether their layers keep W as (in, out).
    """
    targets, weights = set(), {}
    for ours, theirs in names:
        module = model.get_submodule(ours.rpartition(".")[0])
        if not isinstance(module, LoRALinear) or not ours.endswith(".weight"):
            continue
        for name, A, B in zip(theirs, module.lora_A, module.lora_B.split(module.rows), strict=True):
            layer = name.removesuffix(".weight")
            weights |= {
                f"base_model.model.{layer}.lora_{x}.weight": t.detach().clone() for x, t in (("A", A), ("B", B))
            }
            targets.add(".".join(layer.split(".")[-2:]))
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": model.lora["base"]["name"]}
    config |= {"r": model.lora["rank"], "lora_alpha": model.lora["alpha"], "target_modules": sorted(targets)}
    config |= {"lora_dropout": 0.0, "bias": "none", "fan_in_fan_out": transposed, "inference_mode": True}
    return {"config": config, "weights": weights}
