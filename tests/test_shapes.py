"""The table of shapes: against the model's parameters, torch's FLOP counter, and its own letters put into numbers."""

import math
import re
from dataclasses import fields

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from kqv.settings import Model
from kqv.shapes import Step, fold, forward_steps
from model import GPT, GPTConfig

BASE = {"n_layer": 2, "n_head": 4, "n_embd": 32, "block_size": 16, "vocab_size": 40, "attention": "explicit"}
# for each switch of settings.py: settings that differ in it alone
CHANGES = {
    "n_layer": [({}, {"n_layer": 3})],
    "n_head": [({}, {"n_head": 2})],
    "n_embd": [({}, {"n_embd": 64})],
    "dropout": [({}, {"dropout": 0.1})],
    "bias": [({}, {"bias": False})],
    "position": [({}, {"position": "sinusoidal"}), ({}, {"position": "rope"}), ({}, {"position": "none"})],
    "norm": [({}, {"norm": "rmsnorm"})],
    "mlp": [({}, {"mlp": "gelu_tanh"}), ({}, {"mlp": "relu2"}), ({}, {"mlp": "swiglu"})],
    "n_kv_head": [({}, {"n_kv_head": 2}), ({}, {"n_kv_head": 1})],
    "head_dim": [({}, {"head_dim": 6})],
    "n_inner": [({}, {"n_inner": 40})],
    "qk_norm": [({}, {"qk_norm": True}), ({"norm": "rmsnorm"}, {"qk_norm": True})],
    "short_conv": [({}, {"short_conv": 1}), ({"short_conv": 1}, {"short_conv": 20})],
    "tie_embeddings": [({}, {"tie_embeddings": False})],
    "rope_theta": [({"position": "rope"}, {"rope_theta": 500.0})],
    "norm_eps": [({}, {"norm_eps": 1e-3})],
    "attention": [({}, {"attention": "sdpa"})],
}
CASES = [(name, *pair) for name, pairs in CHANGES.items() for pair in pairs]


def steps_of(*changes: dict, backward: bool = False) -> tuple[GPT, list[Step]]:
    config = dict(BASE)
    for change in changes:
        config |= change
    torch.manual_seed(0)
    model = GPT(GPTConfig(**config))
    idx = torch.randint(40, (3, 16))
    return model, forward_steps(model, idx, idx, GPT, backward)


def in_numbers(symbolic: str, model: GPT) -> tuple[int, ...]:
    c = model.config
    letters = {"B": 3, "T": 16, "C": c.n_embd, "H": c.n_head, "G": c.n_kv_head, "D": c.head_dim, "F": c.n_inner}
    letters |= {"V": c.vocab_size, "n": c.short_conv}
    expression = re.sub(r"(\d)([A-Z])", r"\1*\2", symbolic.replace("·", "*").replace("/", "//"))
    value = eval(expression, {"__builtins__": {}}, letters)
    return value if isinstance(value, tuple) else (value,)


def test_every_switch_is_tried():
    assert CHANGES.keys() == {field.name for field in fields(Model)}


@pytest.mark.parametrize(("name", "base", "change"), CASES)
def test_every_switch_shows_up(name, base, change):
    _, before = steps_of(base)
    _, after = steps_of(base, change)
    assert before != after


@pytest.mark.parametrize(("name", "base", "change"), CASES)
def test_parameters_flops_bytes_and_letters(name, base, change):
    model, steps = steps_of(base, change)
    assert sum(step.parameters for step in steps) == sum(parameter.numel() for parameter in model.parameters())
    idx = torch.zeros(3, 16, dtype=torch.int64)
    with FlopCounterMode(display=False) as counter:
        model(idx, idx)
    assert sum(step.flops for step in steps) == counter.get_total_flops() > 0
    for step in steps:
        size = 8 if step.name == "positions" else 1 if step.name == "causal mask" else 4  # int64, bool, float32
        assert step.bytes == size * math.prod(step.shape)
        assert in_numbers(step.symbolic, model) == step.shape, step.name
        assert step.reason, step.name  # a line that kqv/shapes.py does not know has none
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_the_steps_of_attention_in_order():
    _, steps = steps_of({"position": "rope", "n_kv_head": 2})
    names = [step.name for step in steps if step.layer == 0]
    expected = ["norm", "Q, K, V of all heads", "cut into heads", "queries Q", "keys K", "values V"]
    expected += 2 * ["turned by position (rope)"] + ["keys for each head", "values for each head", "scores Q Kᵀ"]
    expected += ["scores / √D", "causal mask", "masked scores", "attention weights", "weighted values"]
    expected += ["heads joined", "attention projection", "+ attention (residual)"]
    assert names[: len(expected)] == expected
    shapes = {step.name: (step.symbolic, step.shape) for step in steps}
    assert shapes["keys K"] == ("(B, G, T, D)", (3, 2, 16, 8))
    assert shapes["attention weights"] == ("(B, H, T, T)", (3, 4, 16, 16))
    assert steps[0].name == "token embedding" and steps[-1].name == "loss" and steps[-1].shape == ()


def test_gradients_have_the_shapes_of_what_they_are_gradients_of():
    _, steps = steps_of({"position": "rope"}, backward=True)
    without = {step.name for step in steps if step.gradient is None}
    assert without == {"positions", "rope frequencies", "rope angles", "rope cos", "rope sin", "causal mask"}
    assert all(step.gradient in (None, step.shape) for step in steps)


def test_blocks_are_given_once():
    _, steps = steps_of({"n_layer": 3})
    folded = fold(steps)
    assert {times for _, times in folded} == {1, 3}
    assert sum(step.parameters * times for step, times in folded) == sum(step.parameters for step in steps)
