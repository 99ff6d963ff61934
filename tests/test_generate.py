"""generate.py against the model's forward pass."""

import pytest
import torch

from kqv.generate import CompiledForward
from tests.test_model import SWITCHES, greedy, make, tokens


@pytest.fixture
def shapes(monkeypatch) -> list:
    """The compiled function's inputs, the new tokens and their positions. (Here it runs without compiling.)"""
    found = []

    def compile(forward, **options):
        def step(idx, cache):
            found.append((idx.shape, cache[0].positions(1).shape))
            return forward(idx, cache=cache)

        return step

    monkeypatch.setattr(torch, "compile", compile)
    return found


@pytest.mark.parametrize("switches", SWITCHES, ids=str)
def test_steps_of_constant_shape_make_the_same_tokens(switches, shapes):
    model, idx = make(**switches), tokens(3, 4)
    written = greedy(model, idx, 40, forward=CompiledForward(model))  # the cache is refilled twice
    assert written.tolist() == greedy(model, idx, 40).tolist()
    assert len(shapes) > 30 and set(shapes) == {((3, 1), (1,))}


@pytest.mark.parametrize("block_size", [2, 3])
def test_short_contexts_are_refilled_in_steps_of_constant_shape_too(block_size, shapes):
    model, idx = make(block_size=block_size), tokens(1, 1)
    assert greedy(model, idx, 12, forward=CompiledForward(model)).tolist() == greedy(model, idx, 12).tolist()
