"""The optimizers and their learning rate."""

import inspect
import math
from collections.abc import Iterable
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn
from torch._utils import _flatten_dense_tensors as flatten
from torch._utils import _unflatten_dense_tensors as unflatten

from kqv.distributed import distribute_like
from kqv.errors import UserError
from kqv.settings import TrainConfig

# Optimizers keep some functions out of torch.compile, and import all of torch._dynamo for that: 1.5 s, half of what a
# run on a CPU needs until its first step. Nothing here compiles optimizers, so these functions serve as they are.
for method in ("add_param_group", "zero_grad", "state_dict", "load_state_dict"):
    function = inspect.unwrap(getattr(torch.optim.Optimizer, method))
    function.__dynamo_disable = function


class AdamW(torch.optim.AdamW):
    step = torch.no_grad()(inspect.unwrap(torch.optim.AdamW.step))


def adamw(parameters: Iterable[Tensor], learning_rate: float, betas: tuple[float, float], weight_decay: float) -> AdamW:
    """Fused AdamW (arXiv:1711.05101) in two groups: matrices and embeddings decay, gains and biases do not.

    Groups and parameters are in nanoGPT's order, so that its optimizer states load.
    """
    trained = [p for p in parameters if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.dim() >= 2], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.dim() < 2], "weight_decay": 0.0},
    ]
    return AdamW(groups, lr=learning_rate, betas=betas, fused=True)


def split_for_muon(model: nn.Module) -> tuple[list[Tensor], list[Tensor]]:
    """The blocks' matrices, for Muon; and the rest (embeddings, head, short convolutions, gains, biases), for AdamW."""
    matrices = [p for p in model.transformer.h.parameters() if p.dim() == 2 and p.requires_grad]
    chosen = set(matrices)
    return matrices, [parameter for parameter in model.parameters() if parameter not in chosen]


class Muon(torch.optim.Optimizer):
    """Momentum SGD with an orthogonalised update, so that a matrix learns rare directions as fast as frequent ones.

    Jordan et al. 2024, kellerjordan.github.io/posts/muon. Differs from torch.optim.Muon in three ways: the coefficients
    are the Polar Express's, all matrices are updated together, in few kernels with products in `dtype`, and with
    found_inf = 1 a step changes nothing, as with fused AdamW.
    """

    found_inf: Tensor | None = None

    def __init__(self, matrices: list[Tensor], lr: float, momentum: float, weight_decay: float, dtype: torch.dtype):
        shapes = dict.fromkeys(matrix.shape for matrix in matrices)
        same_shape = [[matrix for matrix in matrices if matrix.shape == shape] for shape in shapes]
        super().__init__(
            [{"params": group} for group in same_shape], {"lr": lr, "momentum": momentum, "weight_decay": weight_decay}
        )
        self.dtype = dtype
        same_shape.sort(key=lambda group: smaller_side(group[0]))  # in the memory; in checkpoints as they come
        self.matrices = [matrix for group in same_shape for matrix in group]
        self.stacks = [torch.empty(len(group), *group[0].shape, device="meta") for group in same_shape]  # the shapes
        self.momentum = matrices[0].new_zeros(sum(matrix.numel() for matrix in matrices))  # of all, one after the other
        self.point_states_at_momentum()

    def point_states_at_momentum(self) -> None:
        for matrix, view in zip(self.matrices, unflatten(self.momentum, self.matrices), strict=True):
            if "momentum_buffer" in self.state[matrix]:  # as it was loaded
                view.copy_(self.state[matrix]["momentum_buffer"])
            self.state[matrix]["momentum_buffer"] = view

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self.momentum = torch.zeros_like(self.momentum)  # a new one: the states may be views of the old one
        self.point_states_at_momentum()

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        settings = self.param_groups[0]  # the groups differ in nothing but the shape
        lr, momentum = settings["lr"], settings["momentum"]
        gradient = flatten([matrix.grad for matrix in self.matrices])  # (N)
        if self.found_inf is not None:  # a bad step changes nothing; decided on the device, without waiting for it
            good = self.found_inf == 0
            torch.where(good, gradient, self.momentum, out=gradient)
            lr = lr * good
        self.momentum.lerp_(gradient, 1 - momentum)
        update = gradient.lerp_(self.momentum, momentum)  # Nesterov momentum
        stacks = unflatten(update.to(self.dtype), self.stacks)  # (n, rows, columns) each
        stacks = [x for _, same_side in groupby(stacks, smaller_side) for x in orthogonalize(list(same_side))]
        torch._foreach_mul_(stacks, [math.sqrt(max(1, x.size(1) / x.size(2))) for x in stacks])
        update = flatten(stacks).float() * lr  # (N)
        torch._foreach_mul_(self.matrices, 1 - lr * settings["weight_decay"])
        torch._foreach_sub_(self.matrices, unflatten(update, self.matrices))


# (a, b, c) of each step of the Polar Express (Amsel et al. 2025, arXiv:2505.16932). Together they map singular values
# from [0.001, 1] into [0.4, 1.6], as near to 1 as four steps can. SAFETY: rounding may push a singular value above 1
POLAR_EXPRESS = (
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
)
SAFETY = 1.01


def smaller_side(matrices: Tensor) -> int:
    return min(matrices.shape[-2:])


def is_tall(matrices: Tensor) -> bool:
    return matrices.size(-2) > matrices.size(-1)


def orthogonalize(stacks: list[Tensor]) -> list[Tensor]:
    """Replace the singular values of each matrix by about 1, without computing them; in the dtype of the stacks.

    stacks: (n, rows, columns) each, with one smaller side, M, for all. A step maps all singular values at once by
    p(x) = a x + b x^3 + c x^5. That is X -> P X with P = a I + b G + c G^2, and G = X X^T -> P G P. So two steps need
    two products with X, and otherwise those of matrices (M, M). Before the next two, G is computed from X again,
    because each step makes rounding errors of G larger.
    """
    stacks = [x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7) for x in stacks]  # no singular value above 1
    steps = [(a / SAFETY, b / SAFETY**3, c / SAFETY**5) for a, b, c in POLAR_EXPRESS]
    for (a, b, c), (d, e, f) in zip(steps[::2], steps[1::2], strict=True):
        gram = torch.cat([x.mT @ x if is_tall(x) else x @ x.mT for x in stacks])  # G (N, M, M)
        first = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)  # P - a I
        half = torch.baddbmm(gram, first, gram, beta=a)  # P G
        gram = torch.baddbmm(half, half, first, beta=a)  # P G P
        second = torch.baddbmm(gram, gram, gram, beta=e, alpha=f)  # Q - d I, for the second step's Q
        first.diagonal(dim1=1, dim2=2).add_(a)  # P
        both = torch.baddbmm(first, second, first, beta=d).split([len(x) for x in stacks])  # Q P
        stacks = [x @ qp if is_tall(x) else qp @ x for x, qp in zip(stacks, both, strict=True)]
    return stacks


def make_optimizers(model: nn.Module, cfg: TrainConfig, dtype: torch.dtype) -> dict[str, torch.optim.Optimizer]:
    """AdamW, and with optimizer=muon also Muon for the blocks' matrices, by their names in a checkpoint.

    `dtype` is that of the run's products. In 16 bits Muon's are bfloat16, because float16's range does not hold them.
    """
    matrices, rest = split_for_muon(model) if cfg.optimizer == "muon" else ([], model.parameters())
    optimizers = {"optimizer": adamw(rest, cfg.learning_rate, (cfg.beta1, cfg.beta2), cfg.weight_decay)}
    if matrices:
        product_dtype = torch.float32 if dtype == torch.float32 else torch.bfloat16
        optimizers["muon"] = Muon(matrices, cfg.muon_lr, cfg.muon_momentum, cfg.weight_decay, product_dtype)
    return optimizers


def learning_rates(optimizers: dict[str, torch.optim.Optimizer]) -> list[float]:
    """The learning rates of all groups of all optimizers, in order."""
    return [group["lr"] for optimizer in optimizers.values() for group in optimizer.param_groups]


def set_learning_rates(
    optimizers: dict[str, torch.optim.Optimizer], peaks: list[float], lr: float, peak: float
) -> None:
    """Set each group's rate to its own peak times lr / peak, so that all groups follow one schedule."""
    groups = (group for optimizer in optimizers.values() for group in optimizer.param_groups)
    for group, peak_of_group in zip(groups, peaks, strict=True):
        group["lr"] = peak_of_group * lr / peak if peak else 0.0


def load_states(
    optimizers: dict[str, torch.optim.Optimizer], scaler: torch.amp.GradScaler, saved: dict[str, Any]
) -> None:
    """Load the states in a checkpoint. Raises UserError if they are damaged, or of another model."""
    for name, optimizer in optimizers.items():
        load_state(optimizer, saved.get(name, {}))
    if scaler.is_enabled() and saved.get("scaler"):
        scaler.load_state_dict(saved["scaler"])


def load_state(optimizer: torch.optim.Optimizer, saved: dict) -> None:
    """Load a saved state's moments; settings (betas, decay, ...) stay those of this run.

    Moments of position embeddings that crop_block_size has shortened are cut to fit.
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
                    value = value[: len(parameter)]
                    if value.shape != parameter.shape:
                        raise ValueError(f"{key} of shape {tuple(value.shape)} for weights of {tuple(parameter.shape)}")
                    state[index][key] = distribute_like(value, like=parameter)
    except (KeyError, TypeError, AttributeError, ValueError, IndexError) as error:
        raise UserError(f"the checkpoint's optimizer state is damaged, or not this run's: {error}") from None
    optimizer.load_state_dict({"state": state, "param_groups": groups})


def learning_rate_at(
    iter_num: int,
    learning_rate: float,
    min_lr: float,
    warmup_iters: int,
    lr_decay_iters: int,
    schedule: str = "cosine",
    decay_fraction: float = 1.0,
) -> float:
    """The learning rate of an iteration: linear warm-up, decay to min_lr at lr_decay_iters, then min_lr.

    cosine: decay along half a cosine (arXiv:1608.03983). wsd (warm-up, stable, decay; arXiv:2404.06395): at the peak
    until the last decay_fraction of lr_decay_iters, then linear.
    """
    if iter_num < warmup_iters:
        return learning_rate * (iter_num + 1) / (warmup_iters + 1)
    if iter_num >= lr_decay_iters:
        return min_lr
    if schedule == "wsd":
        left = (lr_decay_iters - iter_num) / max(1, decay_fraction * lr_decay_iters)
        return min_lr + min(1.0, left) * (learning_rate - min_lr)
    progress = (iter_num - warmup_iters) / (lr_decay_iters - warmup_iters)  # 0 ... 1
    return min_lr + 0.5 * (1 + math.cos(math.pi * progress)) * (learning_rate - min_lr)
