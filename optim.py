"""The optimizer and its learning rate."""

import math

import torch
from torch import nn


def adamw(model: nn.Module, learning_rate: float, betas: tuple[float, float], weight_decay: float) -> torch.optim.AdamW:
    """AdamW (arXiv:1711.05101), fused, in nanoGPT's two groups: matrices and embeddings decay, gains and biases do not.

    The order of groups and parameters is nanoGPT's too, so that its optimizer states load.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in trained if p.dim() >= 2], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=learning_rate, betas=betas, fused=True)


def load_state(optimizer: torch.optim.Optimizer, saved: dict) -> None:
    """Continue from a saved state: its moments, but the settings (betas, decay, ...) that this run asked for.

    Moments of position embeddings longer than the model's, which crop_block_size has shortened, are cut to fit.
    """
    current = optimizer.state_dict()["param_groups"]
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    try:
        groups = [now | {"params": then["params"]} for now, then in zip(current, saved["param_groups"], strict=True)]
        indices = [index for group in groups for index in group["params"]]
        state = {index: dict(saved["state"][index]) for index in indices if index in saved["state"]}
        for index, parameter in zip(indices, parameters, strict=True):
            for key, value in state.get(index, {}).items():
                if key != "step":
                    state[index][key] = value = value[: len(parameter)]
                    if value.shape != parameter.shape:
                        raise ValueError(f"{key} of shape {tuple(value.shape)} for weights of {tuple(parameter.shape)}")
                    if hasattr(parameter, "full_tensor"):  # shared out by FSDP: each process takes its part
                        from torch.distributed.tensor import distribute_tensor

                        mesh, placements = parameter.device_mesh, parameter.placements
                        state[index][key] = distribute_tensor(value.to(mesh.device_type), mesh, placements)
    except (KeyError, TypeError, AttributeError, ValueError, IndexError) as error:
        raise ValueError(f"the checkpoint's optimizer state is damaged or another model's: {error}") from None
    optimizer.load_state_dict({"state": state, "param_groups": groups})


def learning_rate_at(
    iter_num: int, learning_rate: float, min_lr: float, warmup_iters: int, lr_decay_iters: int
) -> float:
    """Linear warm-up, then a cosine down to min_lr at lr_decay_iters (arXiv:1608.03983), then min_lr."""
    if iter_num < warmup_iters:
        return learning_rate * (iter_num + 1) / (warmup_iters + 1)
    if iter_num >= lr_decay_iters:
        return min_lr
    progress = (iter_num - warmup_iters) / (lr_decay_iters - warmup_iters)  # 0 ... 1
    return min_lr + 0.5 * (1 + math.cos(math.pi * progress)) * (learning_rate - min_lr)
