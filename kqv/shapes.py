"""The forward pass as a table: each step with its shape, parameters, FLOPs and bytes, read off a real forward pass.

A step is a line of model.py that computes tensors. A TorchFunctionMode records every call of PyTorch together with the
line that made it. A second model with the same switches, whose sizes are all different, tells which letter each number
of a shape stands for.
"""

import inspect
import linecache
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from kqv.step_names import MODULES, STEPS
from kqv.tables import Table

SHOWN = ("layer_norm", "rms_norm", "gelu", "dropout", "rpow", "div", "masked_fill")  # operations with their numbers


@dataclass
class Step:
    """One step of a forward pass. `shape` is (): a single number, `symbolic` the same in model.py's letters."""

    name: str
    reason: str
    operation: str  # the function of PyTorch that was called last, and its numbers
    line: int  # in model.py
    layer: int | None  # the block, None outside
    shape: tuple[int, ...]
    symbolic: str = ""
    parameters: int = 0  # weights used here for the first time; tied ones count once
    flops: int = 0  # of matrix products, a multiply and an add each
    bytes: int = 0  # of the result
    gradient: tuple[int, ...] | None = None
    result: Tensor | None = field(default=None, repr=False, compare=False)  # while it is needed


@dataclass
class Line:
    """What one line of model.py, within one module, has computed so far."""

    module: str  # the innermost one
    number: int
    code: str
    operation: str = ""
    results: list[Tensor] = field(default_factory=list)  # of all its calls, in order
    changes: bool = False  # not only views of the same shape
    computes: bool = False  # not only views
    parameters: int = 0
    flops: int = 0


class Recorder(TorchFunctionMode):
    """Records what each line of model.py computes, in order."""

    def __init__(self, model: nn.Module, counter: FlopCounterMode):
        super().__init__()
        self.file, self.counter = inspect.getsourcefile(type(model)), counter
        self.running = [""]  # names of the modules that are computing, innermost last
        self.lines: list[Line] = []
        self.unseen = {id(parameter): parameter.numel() for parameter in model.parameters()}
        self.handles = []
        for name, module in model.named_modules():
            if name and not isinstance(module, (nn.ModuleList, nn.ModuleDict, nn.Identity)):
                self.handles.append(module.register_forward_pre_hook(lambda *_, name=name: self.running.append(name)))
                self.handles.append(module.register_forward_hook(lambda *_: self.running.pop() and None))

    def __torch_function__(self, function, types, args=(), kwargs=None):
        before = self.counter.get_total_flops()
        result = function(*args, **kwargs or {})
        results = [result] if isinstance(result, Tensor) else result
        if isinstance(results, (tuple, list)) and results and all(isinstance(item, Tensor) for item in results):
            inputs = [item for item in [*args, *(kwargs or {}).values()] if isinstance(item, Tensor)]
            operation = function.__name__.strip("_")
            if operation in SHOWN:
                numbers = (item for item in [*args, *(kwargs or {}).values()] if isinstance(item, (float, str)))
                shown = (f"{item:g}" if isinstance(item, float) else item for item in numbers)
                operation = " ".join([operation, *shown])
            line = self.line()
            if line:
                self.note(line, operation, inputs, list(results), self.counter.get_total_flops() - before)
        return result

    def line(self) -> Line | None:
        """The line of model.py that is running: the last one again, or a new one. None outside model.py."""
        frame = sys._getframe(2)
        while frame and frame.f_code.co_filename != self.file:
            frame = frame.f_back
        if frame is None:
            return None
        last, place = self.lines[-1] if self.lines else None, (self.running[-1], frame.f_lineno)
        if last is None or (last.module, last.number) != place:
            self.lines.append(Line(*place, linecache.getline(self.file, frame.f_lineno).strip()))
        return self.lines[-1]

    def note(self, line: Line, operation: str, inputs: list[Tensor], results: list[Tensor], flops: int) -> None:
        storages = {item.untyped_storage()._cdata: item.shape for item in inputs}
        for result in results:
            before = storages.get(result.untyped_storage()._cdata)
            line.computes |= before is None
            line.changes |= before != result.shape
        fixed = any(isinstance(item, nn.Parameter) and not item.requires_grad for item in inputs)
        line.operation, line.flops = operation + " (fixed weights)" * fixed, line.flops + flops
        line.results += results
        line.parameters += sum(self.unseen.pop(id(item), 0) for item in inputs)


def steps_of(lines: list[Line]) -> list[Step]:
    """The lines that compute something, or have a name and change a shape, as steps.

    Parameters and FLOPs of the other lines are counted in the next step.
    """
    steps, parameters, flops = [], 0, 0
    for line in lines:
        parameters, flops = parameters + line.parameters, flops + line.flops
        by_module = next((step for end, step in MODULES.items() if f".{line.module}".endswith(f".{end}")), None)
        named = by_module or next((step for text, step in STEPS.items() if text in line.code), None)
        if not line.computes and not (named and line.changes):
            continue
        names, reasons = (text.split(" | ") for text in named or (line.code, ""))
        layer = int(line.module.split(".")[2]) if line.module.startswith("transformer.h.") else None
        for number, result in enumerate(line.results[-len(names) :]):
            reason = reasons[min(number, len(reasons) - 1)]
            step = Step(names[number], reason, line.operation, line.number, layer, tuple(result.shape), result=result)
            step.parameters, step.flops, step.bytes = parameters, flops, result.nbytes
            steps.append(step)
            parameters, flops = 0, 0
    return steps


def trace(model: nn.Module, idx: Tensor, targets: Tensor, backward: bool) -> list[Step]:
    """The steps of model(idx, targets), and with `backward` the shapes of their gradients."""
    with FlopCounterMode(display=False) as counter, Recorder(model, counter) as recorder:
        _, loss = model(idx, targets)
    for handle in recorder.handles:
        handle.remove()
    steps = steps_of(recorder.lines)
    assert counter.get_total_flops() == sum(step.flops for step in steps) and not recorder.unseen
    if backward:
        for step in steps:
            if step.result.requires_grad:
                step.result.retain_grad()
        loss.backward()
        model.zero_grad()
    for step in steps:
        if backward and step.result.grad is not None:
            step.gradient = tuple(step.result.grad.shape)
        step.result = None
    return steps


# -- letters for numbers -----------------------------------------------------------------------------------------------


def twin(config: Any) -> tuple[Any, dict[int, str]]:
    """A config with the same switches and sizes that are all different, and what each number then stands for."""
    B, T, C, D, F, V, H, n = 5, 41, 104, 22, 71, 97, 6, min(config.short_conv, 2)
    G = H if config.n_kv_head == config.n_head else 3
    sizes = {"block_size": T, "vocab_size": V, "n_layer": config.n_layer, "n_head": H, "n_embd": C, "n_kv_head": G}
    letters = {B: "B", T: "T", C: "C", D: "D", F: "F", V: "V", H: "H", G: "H" if G == H else "G"}
    joined = "3H" if G == H else "H+2G"
    letters |= {H * D: "H·D", 2 * F: "2F", D // 2: "D/2", C // 2: "C/2", H + 2 * G: joined, B * T: "B·T"}
    letters |= {(H + 2 * G) * D: f"({joined})·D"}
    if n:
        letters |= {T + n: "n+T"}
    return replace(config, **sizes, head_dim=D, n_inner=F, short_conv=n), letters


def forward_steps(
    model: nn.Module, idx: Tensor, targets: Tensor, make: Callable[[Any], nn.Module], backward: bool = False
) -> list[Step]:
    """The steps of model(idx, targets), idx and targets (B, T). `make` builds a model from a config."""
    config, letters = twin(model.config)
    model.train(model.config.dropout > 0)  # so that dropout is a step if there is any
    steps = trace(model, idx, targets, backward)
    tokens = torch.zeros(5, config.block_size, dtype=torch.int64)
    other = make(config).train(model.training)
    for step, same in zip(steps, trace(other, tokens, tokens, backward=False), strict=True):
        assert (step.name, step.line, step.layer) == (same.name, same.line, same.layer)
        step.symbolic = "(" + ", ".join(letters.get(size, str(size)) for size in same.shape) + ")"
    return steps


def fold(steps: list[Step]) -> list[tuple[Step, int]]:
    """The steps with blocks that are alike given once: (step, in how many blocks it is the same)."""
    blocks: dict[int, list[Step]] = {}
    for step in steps:
        if step.layer is not None:
            blocks.setdefault(step.layer, []).append(step)
    alike = all(
        [replace(step, layer=0) for step in block] == [replace(step, layer=0) for step in blocks[0]]
        for block in blocks.values()
    )
    if not alike:
        return [(step, 1) for step in steps]
    return [(step, len(blocks) if step.layer == 0 else 1) for step in steps if not step.layer]


def table_of(steps: list[Step], backward: bool) -> Table:
    """The steps as a table, blocks that are alike once; with `backward` also the shapes of gradients."""
    heading = ["step", "shape", "in numbers", *(["gradient"] if backward else []), "weights", "FLOPs", "bytes"]
    table, inside_block = [[*heading, "operation", "model.py", "why"]], False
    for step, blocks in fold(steps):
        if blocks > 1 and not inside_block:
            table.append([f"each of {blocks} blocks:", *[""] * (len(table[0]) - 1)])
        inside_block = blocks > 1
        row = ["  " * inside_block + step.name, step.symbolic, str(step.shape)]
        row += [str(step.gradient or "-")] if backward else []
        row += [f"{number:,}" if number else "-" for number in (step.parameters, step.flops)]
        table.append([*row, f"{step.bytes:,}", step.operation, str(step.line), step.reason])
    return table
