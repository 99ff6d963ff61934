"""Memory and FLOPs of a training step, counted on the step itself.

The step runs on fake tensors, which have shapes but no memory, with the code that trains: the model, its loss, the
optimizers. So a new switch of the model needs no change here.
"""

import weakref
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint as recompute
from torch.utils.flop_counter import FlopCounterMode

from kqv.attention import use_attention
from kqv.build import SkipInit
from kqv.gpu_memory import as_on_gpu
from kqv.loss import NextTokenLoss
from kqv.machine import LOGITS_SHARE
from kqv.optim import make_optimizers
from kqv.settings import TrainConfig

PARTS = ("weights", "optimizer", "gradients", "activations", "temporary")
COUNTED_LAYERS = 3  # a deeper model is counted with 3 and with 2 layers: each further layer needs the difference
MODULES = {"conv_": "convolutions", "ln_": "norms", "_norm": "norms", "attn": "attention", "mlp": "MLP"}

Moments = dict[str, dict[str, int]]  # phase of a step -> part -> bytes at the peak of that phase


def part_of_model(name: str) -> str:
    """The part of the model that a parameter or module belongs to, by its name."""
    return next((part for mark, part in MODULES.items() if mark in name), "embeddings")


class Census(TorchDispatchMode):
    """Counts the bytes of all living storages, by part, and remembers each moment's peak."""

    def __init__(self):
        super().__init__()
        self.storages: dict[int, tuple[str, int]] = {}  # storage -> its part and bytes; views share a storage
        self.alive = dict.fromkeys(PARTS, 0)
        self.moment, self.moments = "", {}
        self.kept: dict[str, int] = {}  # for the backward pass, by part of the model
        self.running = ["loss"]  # the modules that are computing, innermost last

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **kwargs or {})
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self.assign(tensor, "temporary", new_only=True)
        return result

    def assign(self, tensor: Tensor, part: str, new_only: bool = False) -> None:
        """Count a tensor's storage under `part`, for as long as it is alive."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self.storages:
            if new_only:
                return
            before, size = self.storages[key]
            self.alive[before] -= size
        else:
            weakref.finalize(storage, self.release, key)
        self.storages[key] = (part, storage.nbytes())
        self.alive[part] += storage.nbytes()
        if sum(self.alive.values()) > sum(self.moments.get(self.moment, {"": -1}).values()):
            self.moments[self.moment] = dict(self.alive)

    def release(self, key: int) -> None:
        part, size = self.storages.pop(key)
        self.alive[part] -= size

    def begin(self, moment: str) -> None:
        self.moment = moment
        self.moments[moment] = dict(self.alive)

    def keep(self, tensor: Tensor) -> Tensor:
        """Count a tensor that autograd keeps for the backward pass: a hook for saved_tensors_hooks."""
        part, size = self.storages.get(tensor.untyped_storage()._cdata, ("temporary", 0))
        if part == "temporary":
            self.assign(tensor, "activations")
            self.kept[self.running[-1]] = self.kept.get(self.running[-1], 0) + size
        return tensor

    def watch(self, model: nn.Module) -> None:
        """Keep `running` up to date, and count gradients as such."""
        for name, module in model.named_modules():
            if name and not isinstance(module, (nn.ModuleList, nn.ModuleDict)):
                part = part_of_model(name) if name != "lm_head" else "loss"
                part = part if ".h." not in name or part != "embeddings" else None  # a block itself
                if part:
                    module.register_forward_pre_hook(lambda *_, part=part: self.running.append(part))
                    module.register_forward_hook(lambda *_: self.running.pop() and None)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(lambda p: self.assign(p.grad, "gradients"))


# -- a step, and an evaluation -----------------------------------------------------------------------------------------


def fake_model(model_class: type, config: Any) -> nn.Module:
    """A model on fake tensors. Call it within a FakeTensorMode."""
    with torch.device("cpu"), SkipInit():
        return model_class(config)


def count_step(
    model_class: type, config: Any, cfg: TrainConfig, dtype: torch.dtype, gpu: float, earlier: bool, rows: int
) -> Census:
    """The census of one training step after the first, and of an evaluation batch of `rows` windows."""
    with FakeTensorMode(), Census() as census:
        model = fake_model(model_class, config)
        for parameter in model.parameters():
            census.assign(parameter, "weights")
        attention = use_attention(model, cfg.attention, torch.device("cuda" if gpu else "cpu"), dtype)
        if gpu:
            as_on_gpu(model, sdpa=attention == "sdpa")
        census.watch(model)
        optimizers = make_optimizers(model, cfg, dtype)
        gradients = [p for p in model.parameters() if p.requires_grad]
        for parameter in gradients:  # a first step creates the optimizers' states
            parameter.grad = torch.empty_like(parameter)
        for optimizer in optimizers.values():
            optimizer.step()
            for tensor in tree_leaves(list(optimizer.state.values())):
                census.assign(tensor, "optimizer")
        for parameter in gradients:
            parameter.grad = None
        if cfg.activation_checkpointing:
            for block in model.transformer.h:
                forward = partial(recompute, block.forward, use_reentrant=False, preserve_rng_state=False)
                block.forward = partial(keep_input, census, forward)
        run_moments(census, NextTokenLoss(model, LOGITS_SHARE * gpu), gradients, optimizers, cfg, dtype, earlier, rows)
    return census


def keep_input(census: Census, forward: Callable, x: Tensor, *others: Any) -> Tensor:
    """A block's forward pass with activation checkpointing, which keeps only the block's input."""
    census.keep(x)
    return forward(x, *others)


def run_moments(
    census: Census,
    loss_model: nn.Module,
    gradients: list[Tensor],
    optimizers: dict[str, torch.optim.Optimizer],
    cfg: TrainConfig,
    dtype: torch.dtype,
    earlier: bool,
    rows: int,
) -> None:
    """Run the moments of a step that can be its peak, in their order."""
    block_size, autocast = loss_model.model.config.block_size, torch.autocast("cpu", dtype, dtype != torch.float32)
    x, y = (torch.empty(cfg.batch_size, block_size, dtype=torch.int64) for _ in range(2))
    if earlier:  # the sum over the step's earlier micro-batches
        for parameter in gradients:
            parameter.grad = torch.empty_like(parameter)
            census.assign(parameter.grad, "gradients")
    census.begin("forward")
    with torch.autograd.graph.saved_tensors_hooks(census.keep, lambda tensor: tensor), autocast:
        loss = loss_model(x, y)
    census.begin("backward")
    loss.backward()
    del loss
    census.begin("optimizer")
    nn.utils.clip_grad_norm_(gradients, 1.0)
    for optimizer in optimizers.values():
        optimizer.step()
    for parameter in gradients:
        parameter.grad = None
    census.begin("evaluation")
    loss_model.eval()
    with torch.no_grad(), autocast:
        loss_model(*(torch.empty(rows, block_size, dtype=torch.int64) for _ in range(2)))


def memory(
    model_class: type, config: Any, cfg: TrainConfig, dtype: torch.dtype, gpu: float, earlier: bool, rows: int
) -> tuple[Moments, dict[str, int]]:
    """Bytes at each moment of a step of one process with the whole model; and bytes kept for backward, by part.

    `gpu`: bytes of its memory, 0 for a CPU; `earlier`: whether a step has earlier micro-batches than the last.
    """
    depths = sorted({min(config.n_layer, COUNTED_LAYERS), min(config.n_layer, COUNTED_LAYERS - 1)})
    counts = [
        count_step(model_class, replace(config, n_layer=depth), cfg, dtype, gpu, earlier, rows)
        for depth in (depths if config.n_layer > COUNTED_LAYERS else depths[-1:])
    ]
    last, further = counts[-1], config.n_layer - depths[-1]

    def extended(now: dict[str, int], before: dict[str, int]) -> dict[str, int]:
        return {key: size + further * (size - before.get(key, 0)) for key, size in now.items()}

    moments = {name: extended(parts, counts[0].moments[name]) for name, parts in last.moments.items() if name}
    return moments, extended(last.kept, counts[0].kept)


def flops_per_token(model_class: type, config: Any) -> float:
    """FLOPs of forward and backward for one token, counted; the half that the causal mask saves is not taken off.

    Equals GPT.flops_per_token, PaLM's convention (arXiv:2204.02311, B).
    """
    totals = []
    for depth in (1, 2):
        one = replace(config, n_layer=depth, attention="explicit")  # the counter does not see inside fused kernels
        with FakeTensorMode(), FlopCounterMode(display=False) as counter:
            tokens = torch.empty(1, config.block_size, dtype=torch.int64)
            fake_model(model_class, one)(tokens, tokens)[1].backward()
        totals.append(counter.get_total_flops() / config.block_size)
    return totals[0] + (config.n_layer - 1) * (totals[1] - totals[0])
