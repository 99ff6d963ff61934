"""generate.py against GPT.generate. (Recording a CUDA graph is in test_gpu.py: on a CPU the step runs as it is.)"""

import math

import pytest
import torch
from torch import nn

from kqv.generate import ROOM, FastGeneration, one_query_attention
from model import KVCache, explicit_attention, next_token
from tests.test_model import SWITCHES, make, seeds, tokens


def fast(model) -> FastGeneration:
    return FastGeneration(model, KVCache, next_token, compile=False)


def written(generate, idx, n, samples=3, **options) -> list[list[int]]:
    return torch.cat(list(generate(idx, n, seeds(samples), **options)), dim=1).tolist()


@pytest.mark.parametrize("switches", SWITCHES, ids=str)
def test_it_writes_what_the_plain_loop_writes(switches):
    model, idx = make(**switches), tokens(3, 4)
    expected = written(model.generate, idx, 40, temperature=0)  # the cache is refilled twice
    assert written(fast(model), idx, 40, temperature=0) == expected


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 0.7, "top_k": 5},
        {"top_p": 0.8, "vocab_size": 50},
        {"min_p": 0.05},
        {"temperature": 0.9, "repetition_penalty": 1.7},
    ],
    ids=str,
)
@pytest.mark.parametrize("T", [1, 4, 16, 40])
def test_each_option_and_length_of_the_prompt_gives_the_plain_loops_draws(options, T):
    model, idx = make(), tokens(1, T, vocab_size=50)
    expected = written(model.generate, idx, 30, samples=4, **options)
    assert written(fast(model), idx, 30, samples=4, **options) == expected
    assert written(fast(model), idx, 30, samples=1, **options) == expected[:1]


@pytest.mark.parametrize("block_size", [1, 2, 3])
def test_short_contexts(block_size):
    model, idx = make(block_size=block_size), tokens(1, 1)
    assert written(fast(model), idx, 12) == written(model.generate, idx, 12)


def test_the_step_is_kept_between_prompts_and_made_anew_for_longer_texts_and_other_settings():
    model = make(short_conv=2)
    generate, steps = fast(model), []
    for T, n, samples, options in [
        (30, 9, 2, {}),
        (5, 20, 2, {}),
        (3, ROOM + 1, 2, {}),
        (5, 9, 1, {}),
        (5, 9, 1, {"top_k": 3}),
    ]:
        idx = tokens(1, T)
        assert written(generate, idx, n, samples, **options) == written(model.generate, idx, n, samples, **options)
        steps.append(generate.step)
    assert steps[0] is steps[1] and len({id(step) for step in steps}) == 4


def test_every_token_has_the_same_shapes_on_the_same_memory():
    model, found = make(position="rope", n_kv_head=2), set()
    generate = fast(model)

    def forward(idx, cache):
        found.add((idx.shape, cache[0].position.data_ptr(), cache[0].k.data_ptr(), cache[0].k.shape))
        return model(idx, cache=cache)

    generate.forward = forward
    assert len(written(generate, tokens(1, 4), 40)[0]) == 40
    assert len(found) == 1


def test_logits_that_are_not_finite_are_an_error_and_draw_no_impossible_id():
    model = make()
    model.lm_head.weight.data[3] = math.nan
    generate = fast(model)
    with pytest.raises(FloatingPointError, match="logits are not all finite"):
        next(generate(tokens(1, 4), 3, seeds(1)))
    assert generate.step.tokens.min() >= 0 and generate.step.tokens.max() < model.config.vocab_size


@pytest.mark.parametrize("G", [1, 2, 4])
def test_attention_of_one_query_is_the_formula(G):
    draw = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(shape, generator=draw) for shape in ((2, 4, 1, 8), (2, G, 9, 8), (2, G, 9, 8)))
    empty = torch.arange(9) > 5
    for hidden, added in ((None, None), (~empty[None], torch.zeros(9).masked_fill(empty, -math.inf))):
        expected = explicit_attention(q, k, v, nn.Dropout(0.0), hidden)
        torch.testing.assert_close(one_query_attention(q, k, v, nn.Dropout(0.0), added), expected)


def test_numbers_drawn_at_once_are_those_drawn_one_by_one():
    at_once = torch.rand(1000, generator=torch.Generator().manual_seed(7))
    generator = torch.Generator().manual_seed(7)
    assert torch.equal(at_once, torch.cat([torch.rand(1, generator=generator) for _ in range(1000)]))
