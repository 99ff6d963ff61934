"""Attention maps, losses of tokens, the logit lens and positions: against Hugging Face, closed forms, the model."""

import math

import pytest
import torch
import transformers
from torch.nn import functional as F

import model as model_module
from kqv.build import build_model
from kqv.inside import attention_maps, label, position_table, rollout, similarity_by_distance, strongest, token_losses
from kqv.tokenizer import ByteTokenizer, CharTokenizer, GPT2Tokenizer
from model import GPT, GPTConfig, explicit_attention
from tests.test_model import SMALL, llama_weights, make, tokens

CHARS = CharTokenizer("".join(map(chr, range(33, 33 + 61))))


def test_attention_is_that_of_hugging_face_gpt2(tmp_path):
    torch.manual_seed(0)
    sizes = {"vocab_size": 61, "n_positions": 16, "n_embd": 32, "n_layer": 3, "n_head": 4, "initializer_range": 0.3}
    hf = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, attn_implementation="eager")).eval()
    hf.save_pretrained(tmp_path)
    idx = tokens(1, 16)
    with torch.no_grad():
        expected = torch.cat(hf(idx, output_attentions=True).attentions)  # (L, H, T, T)
    maps = attention_maps(GPT.from_pretrained(str(tmp_path)), idx, explicit_attention)
    torch.testing.assert_close(maps, expected, rtol=0, atol=1e-5)


def test_attention_with_rope_and_grouped_queries_is_that_of_hugging_face_llama():
    torch.manual_seed(0)
    sizes = {"vocab_size": 61, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2, "head_dim": 10}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 16, "rms_norm_eps": 1e-6}
    hf_config = transformers.LlamaConfig(**sizes, initializer_range=0.3, tie_word_embeddings=False)
    hf_config._attn_implementation = "eager"
    hf = transformers.LlamaForCausalLM(hf_config).eval()
    switches = {"position": "rope", "norm": "rmsnorm", "mlp": "swiglu", "norm_eps": 1e-6, "tie_embeddings": False}
    switches |= {"n_kv_head": 2, "head_dim": 10, "n_inner": 40, "bias": False}
    config = GPTConfig(block_size=16, vocab_size=61, n_layer=2, n_head=4, n_embd=32, **switches)
    idx = tokens(1, 16)
    with torch.no_grad():
        expected = torch.cat(hf(idx, output_attentions=True).attentions)
    maps = attention_maps(build_model(GPT, config, llama_weights(hf)), idx, explicit_attention)
    torch.testing.assert_close(maps, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("switches", [{}, {"position": "rope", "n_kv_head": 1}, {"short_conv": 2, "qk_norm": True}])
def test_maps_are_causal_and_capturing_leaves_the_model_as_it_was(switches):
    model, idx = make(**switches), tokens(1, 12)
    with torch.no_grad():
        before = model(idx, idx)[0]
    maps = attention_maps(model, idx, explicit_attention)
    assert maps.shape == (2, 4, 12, 12)
    torch.testing.assert_close(maps.sum(dim=-1), torch.ones(2, 4, 12))
    assert maps.triu(1).count_nonzero() == 0
    with torch.no_grad():
        assert torch.equal(model(idx, idx)[0], before)
    assert all(block.attn.attention is model_module.sdpa_attention for block in model.transformer.h)
    assert not any(module._forward_hooks for module in model.modules())


def test_rollout():
    eye = torch.eye(3).expand(2, 4, 3, 3)
    assert torch.equal(rollout(eye), torch.eye(3))
    first = torch.tensor([1.0, 0, 0]).expand(1, 1, 3, 3)  # every query reads the first token alone
    assert rollout(first)[2].tolist() == [0.5, 0, 0.5]
    two = rollout(first.expand(2, 1, 3, 3))
    assert two[2].tolist() == [0.75, 0, 0.25]


def test_strongest_keys():
    maps = torch.zeros(2, 2, 3, 3)
    maps[1, 0, 2, 1], maps[0, 1, 2, 2], maps[0, 0, 1, 1] = 0.9, 0.5, 1.0
    assert strongest(maps, query=2, count=2) == [(1, 0, 1, pytest.approx(0.9)), (0, 1, 2, pytest.approx(0.5))]


# -- losses ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("switches", [{}, {"position": "rope", "short_conv": 2}])
def test_losses_average_to_the_models(switches):
    model, idx = make(**switches), tokens(1, 17)
    found = token_losses(model, idx[0].tolist(), CHARS)
    with torch.no_grad():
        logits, loss = model(idx[:, :-1], idx[:, 1:])
    assert found.windows == 1 and found.losses[0] is None and len(found.losses) == 17
    assert sum(found.losses[1:]) / 16 == pytest.approx(loss.item(), abs=1e-5) == pytest.approx(found.loss, abs=1e-5)
    assert found.bits_per_byte == pytest.approx(loss.item() / math.log(2), abs=1e-5)  # each character is a byte
    probs = F.softmax(logits[0], dim=-1)
    for position in range(1, 17):
        best = probs[position - 1].topk(5)
        assert [token for token, _ in found.top[position]] == best.indices.tolist()
        assert [p for _, p in found.top[position]] == pytest.approx(best.values.tolist(), abs=1e-5)
        assert found.lens[-1][position] == found.top[position][0]  # the last layer is the model itself
    assert [len(layer) for layer in found.lens] == [17, 17] and found.lens[0] != found.lens[1]


def test_the_lens_of_the_first_layer_is_the_model_without_the_second():
    model, idx = make(), tokens(1, 9)
    found = token_losses(model, idx[0].tolist(), CHARS)
    del model.transformer.h[1]
    with torch.no_grad():
        logits = model(idx[:, :-1], idx[:, 1:])[0][0]
    assert [pair[0] for pair in found.lens[0][1:]] == logits.argmax(dim=-1).tolist()


@pytest.mark.parametrize("n", [1, 2, 16, 17, 18, 24, 25, 100])
def test_long_texts_are_read_in_windows(n):
    model, ids = make(), tokens(1, n)[0].tolist()
    found = token_losses(model, ids, CHARS)
    assert len(found.losses) == len(found.top) == len(found.lens[0]) == n
    for position in {1, 15, 16, 17, 23, 24, 40, n - 1} & set(range(1, n)):
        # the window that reads it: the first, or one that begins at a multiple of half of block_size
        start = 0 if position <= 16 else 8 * ((position - 17) // 8 + 1)
        context = torch.tensor([ids[start:position]])
        with torch.no_grad():
            logits = model(context)[0][0, -1]
        assert found.losses[position] == pytest.approx(
            F.cross_entropy(logits, torch.tensor(ids[position])).item(), abs=1e-4
        )


# -- labels ------------------------------------------------------------------------------------------------------------


def test_labels_can_be_seen(gpt2_bpe):
    characters = " \n\t\x00\x1b\u202eמ漢🙂é<"
    tokenizer = CharTokenizer(characters)
    labels = [label(tokenizer, index) for index in range(len(characters))]
    assert labels == ["␣", "⏎", "⇥", "\\x00", "\\x1b", "\\u202e", "מ", "漢", "🙂", "é", "<"]
    assert [label(ByteTokenizer(), token) for token in (65, 32, 0xE6, 256)] == ["A", "␣", "\\xe6", "<|endoftext|>"]
    gpt2 = GPT2Tokenizer()
    assert [label(gpt2, token) for token in gpt2.encode(" world")] == ["␣world"]
    assert all(label(gpt2, token).isprintable() for token in gpt2.encode("漢字 🙂 مرحبا\r\n"))


# -- positions ---------------------------------------------------------------------------------------------------------


def test_similarity_of_positions():
    config = GPTConfig(n_layer=1, n_head=2, n_embd=16, block_size=20, vocab_size=9, position="sinusoidal")
    table = position_table(model_module, GPT(config))
    assert table.shape == (20, 16)
    distances = torch.arange(20.0)
    frequencies = 10000 ** (-torch.arange(0, 16, 2) / 16)
    expected = torch.cos(torch.outer(distances, frequencies)).mean(dim=1)  # sin a sin b + cos a cos b = cos (a - b)
    torch.testing.assert_close(similarity_by_distance(model_module, config, table), expected, rtol=0, atol=1e-5)

    rope = GPTConfig(n_layer=1, n_head=2, n_embd=16, block_size=20, vocab_size=9, position="rope", rope_theta=500.0)
    table = position_table(model_module, GPT(rope))
    assert table.shape == (20, 16)  # 8 cosines, 8 sines
    frequencies = 500 ** (-torch.arange(0, 8, 2) / 8)
    expected = torch.cos(torch.outer(distances, frequencies)).mean(dim=1)
    torch.testing.assert_close(similarity_by_distance(model_module, rope, table), expected, rtol=0, atol=1e-5)


def test_a_learned_table_is_the_models():
    model = make()
    assert torch.equal(position_table(model_module, model), model.transformer.wpe.weight)
    assert position_table(model_module, GPT(SMALL)).shape == (16, 32)
