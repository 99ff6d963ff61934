"""model.py against Hugging Face's models, closed forms, and itself computed another way."""

import itertools
import json
import math
import pickle
from dataclasses import replace

import pytest
import torch
import transformers
from torch import nn
from torch.nn import functional as F
from transformers.generation import logits_process

from kqv.build import build_model, crop_block_size
from kqv.errors import UserError
from model import (
    ACTIVATIONS,
    GPT,
    NORMS,
    POSITIONS,
    GPTConfig,
    KVCache,
    ShortConv,
    explicit_attention,
    next_token,
    sdpa_attention,
    sinusoidal_table,
)

SMALL = GPTConfig(block_size=16, vocab_size=61, n_layer=2, n_head=4, n_embd=32, bias=False)
SWITCHES = [
    *({"position": p, "norm": n, "mlp": m} for p, n, m in itertools.product(POSITIONS, NORMS, ACTIVATIONS)),
    {"n_kv_head": 2, "position": "rope"},
    {"n_kv_head": 1, "attention": "explicit"},
    {"qk_norm": True, "head_dim": 12},
    {"tie_embeddings": False, "bias": True, "n_inner": 40},
    {"short_conv": 1, "position": "none"},
    {"short_conv": 20, "position": "rope"},  # longer than the context
]


def make(config: GPTConfig = SMALL, **changes: object) -> GPT:
    """A model in which every weight matters: larger than at initialisation, no gain at 1, no bias at 0."""
    torch.manual_seed(0)
    model = GPT(replace(config, **({"head_dim": None, "n_kv_head": None, "n_inner": None} | changes))).eval()
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.2 * torch.randn_like(parameter)
    return model


def tokens(*shape: int, vocab_size: int = 61) -> torch.Tensor:
    return torch.randint(vocab_size, shape, generator=torch.Generator().manual_seed(1))


def seeds(n: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(i) for i in range(n)]


def greedy(model: GPT, idx: torch.Tensor, n: int, **options: object) -> torch.Tensor:
    return torch.cat(list(model.generate(idx, n, seeds(len(idx)), temperature=0, **options)), dim=1)


# -- against Hugging Face ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("activation", ["gelu_new", "gelu"])
@pytest.mark.parametrize("options", [{}, {"n_inner": 48}, {"tie_word_embeddings": False}])
def test_logits_and_loss_are_those_of_hugging_face_gpt2(tmp_path, activation, options):
    torch.manual_seed(0)
    sizes = {"vocab_size": 61, "n_positions": 16, "n_embd": 32, "n_layer": 3, "n_head": 4}
    hf = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(**sizes, activation_function=activation, initializer_range=0.3, **options)
    ).eval()
    hf.save_pretrained(tmp_path)
    idx = tokens(2, 16)
    model = GPT.from_pretrained(str(tmp_path)).eval()
    with torch.no_grad():
        expected = hf(idx, labels=idx)
        logits, loss = model(idx[:, :-1], idx[:, 1:])
    torch.testing.assert_close(logits, expected.logits[:, :-1], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(loss, expected.loss, rtol=1e-5, atol=1e-5)


def llama_weights(hf: nn.Module) -> dict[str, torch.Tensor]:
    """Hugging Face's Llama or Qwen3 under our names: q, k, v are one matrix, and gate and up are one."""
    state = hf.state_dict()
    weights = {
        "transformer.wte.weight": state["model.embed_tokens.weight"],
        "transformer.ln_f.weight": state["model.norm.weight"],
        "lm_head.weight": state["lm_head.weight"],
    }
    for i in range(hf.config.num_hidden_layers):
        theirs, ours = f"model.layers.{i}.", f"transformer.h.{i}."
        attention = [state[f"{theirs}self_attn.{name}_proj.weight"] for name in "qkv"]
        mlp = [state[f"{theirs}mlp.{name}_proj.weight"] for name in ("gate", "up")]
        weights |= {
            f"{ours}attn.c_attn.weight": torch.cat(attention),
            f"{ours}mlp.c_fc.weight": torch.cat(mlp),
            f"{ours}attn.c_proj.weight": state[f"{theirs}self_attn.o_proj.weight"],
            f"{ours}mlp.c_proj.weight": state[f"{theirs}mlp.down_proj.weight"],
            f"{ours}ln_1.weight": state[f"{theirs}input_layernorm.weight"],
            f"{ours}ln_2.weight": state[f"{theirs}post_attention_layernorm.weight"],
        }
        for name in ("q_norm", "k_norm"):
            if f"{theirs}self_attn.{name}.weight" in state:
                weights[f"{ours}attn.{name}.weight"] = state[f"{theirs}self_attn.{name}.weight"]
    return weights


@pytest.mark.parametrize("family", ["Llama", "Qwen3"])
def test_rope_rmsnorm_swiglu_gqa_and_qk_norm_are_those_of_hugging_face(family):
    torch.manual_seed(0)
    hf_config = getattr(transformers, f"{family}Config")(
        vocab_size=61,
        hidden_size=32,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=10,
        max_position_embeddings=16,
        rms_norm_eps=1e-6,
        initializer_range=0.3,
        tie_word_embeddings=False,
    )
    hf = getattr(transformers, f"{family}ForCausalLM")(hf_config).eval()
    config = GPTConfig(
        block_size=16,
        vocab_size=61,
        n_layer=2,
        n_head=4,
        n_kv_head=2,
        n_embd=32,
        head_dim=10,
        n_inner=40,
        position="rope",
        norm="rmsnorm",
        mlp="swiglu",
        qk_norm=family == "Qwen3",
        bias=False,
        tie_embeddings=False,
        norm_eps=1e-6,
    )
    for name, parameter in hf.named_parameters():
        if "norm" in name:
            parameter.data += 0.3 * torch.randn_like(parameter)
    model = build_model(GPT, config, llama_weights(hf)).eval()
    idx = tokens(2, 16)
    with torch.no_grad():
        torch.testing.assert_close(model(idx, idx)[0], hf(idx).logits, rtol=1e-5, atol=1e-5)


def test_greedy_tokens_are_those_of_hugging_face_generate(tmp_path):
    torch.manual_seed(0)
    hf = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=61, n_positions=32, n_embd=32, n_layer=2, n_head=4, initializer_range=0.3)
    ).eval()
    hf.save_pretrained(tmp_path)
    idx = tokens(3, 5)
    expected = hf.generate(idx, max_new_tokens=20, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert greedy(GPT.from_pretrained(str(tmp_path)).eval(), idx, 20).tolist() == expected[:, 5:].tolist()


@pytest.mark.parametrize(
    "change", [{"model_type": "llama"}, {"activation_function": "relu"}, {"n_embd": None}, {"n_embd": "wide"}]
)
def test_folders_that_are_not_gpt2_are_refused(tmp_path, change):
    hf = transformers.GPT2Config(vocab_size=61, n_positions=16, n_embd=32, n_layer=1, n_head=4).to_dict()
    (tmp_path / "config.json").write_text(json.dumps(hf | change))
    with pytest.raises(UserError, match=r"config\.json"):
        GPT.from_pretrained(str(tmp_path))
    with pytest.raises(UserError, match=r"nowhere: no such folder"):
        GPT.from_pretrained(str(tmp_path / "nowhere"))


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
@pytest.mark.parametrize("content", [b"", b"junk" * 99, pickle.dumps({"a": print}), b"other sizes"])
def test_damaged_gpt2_weights_are_named(tmp_path, name, content):
    hf = transformers.GPT2Config(vocab_size=61, n_positions=16, n_embd=32, n_layer=1, n_head=4)
    hf.to_json_file(tmp_path / "config.json", use_diff=False)
    (tmp_path / name).write_bytes(content)
    if content == b"other sizes":
        (tmp_path / name).unlink()
        transformers.GPT2LMHeadModel(transformers.GPT2Config(n_embd=16, n_layer=1, n_head=1)).save_pretrained(tmp_path)
        hf.to_json_file(tmp_path / "config.json", use_diff=False)
    with pytest.raises(UserError, match=str(tmp_path)) as caught:
        GPT.from_pretrained(str(tmp_path))
    assert "damaged" in str(caught.value) or "are not those of its config.json" in str(caught.value)


# -- attention ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("T, S", [(1, 1), (7, 7), (1, 9), (4, 9)])
@pytest.mark.parametrize("G", [1, 2, 4])
def test_explicit_attention_is_sdpa(T, S, G):
    torch.manual_seed(0)
    q, k, v = torch.randn(2, 4, T, 8), torch.randn(2, G, S, 8), torch.randn(2, G, S, 8)
    dropout = nn.Dropout(0.0)
    torch.testing.assert_close(explicit_attention(q, k, v, dropout), sdpa_attention(q, k, v, dropout))


def test_a_hook_sees_the_attention_maps():
    model, maps = make(attention="explicit"), []
    model.transformer.h[1].attn.attn_dropout.register_forward_hook(lambda *call: maps.append(call[-1]))
    model(tokens(3, 10))
    (weights,) = maps
    assert weights.shape == (3, 4, 10, 10)
    assert weights.triu(1).count_nonzero() == 0  # nothing is read from the future
    torch.testing.assert_close(weights.sum(dim=-1), torch.ones(3, 4, 10))


@pytest.mark.parametrize("switches", SWITCHES, ids=str)
def test_a_token_never_sees_its_future_and_sees_all_its_past(switches):
    model = make(**switches)
    embedded = []
    model.transformer.wte.register_forward_hook(lambda *call: embedded.append(call[-1]) or call[-1].retain_grad())
    idx, t = tokens(1, 12), 6
    logits, _ = model(idx, idx)
    logits[0, t].square().sum().backward()
    reached = embedded[0].grad[0].abs().sum(dim=-1) > 0  # (T): does token s matter for the prediction at t?
    assert reached.tolist() == [s <= t for s in range(12)]


@pytest.mark.parametrize("attention", ["sdpa", "explicit"])
def test_dropout_is_there_in_training_alone(attention):
    model, idx = make(dropout=0.5, attention=attention), tokens(2, 8)
    assert torch.equal(model(idx)[0], model(idx)[0])
    model.train()
    assert not torch.equal(model(idx)[0], model(idx)[0])


def test_the_short_convolution_is_pytorchs_depthwise_one():
    config = replace(SMALL, short_conv=3)
    conv, x = ShortConv(config, place=0), torch.randn(2, 16, 32)
    nn.init.normal_(conv.weight)
    own = torch.ones(32, 1, 1)  # a token's own weight
    weight = torch.cat((conv.weight.permute(2, 1, 0), own), dim=2)  # (C, 1, n + 1)
    expected = F.conv1d(x.transpose(1, 2), weight, padding=3, groups=32)[..., :16].transpose(1, 2)
    torch.testing.assert_close(conv(x, None), expected)
    # and piece by piece; some pieces are shorter than the convolution
    cache = KVCache(config, 2, like=x)
    pieces = [conv(piece, cache) for piece in x.split((9, 1, 1, 5), dim=1)]
    torch.testing.assert_close(torch.cat(pieces, dim=1), conv(x, None))


# -- positions ---------------------------------------------------------------------------------------------------------


def test_the_sinusoidal_table_is_the_formula():
    table = sinusoidal_table(50, 12)
    for pos, i in itertools.product(range(50), range(6)):
        angle = pos / 10000 ** (2 * i / 12)
        assert table[pos, 2 * i].item() == pytest.approx(math.sin(angle), abs=1e-6)
        assert table[pos, 2 * i + 1].item() == pytest.approx(math.cos(angle), abs=1e-6)


def test_the_sinusoidal_table_is_the_models_and_is_not_trained():
    model = make(position="sinusoidal")
    assert torch.equal(model.transformer.wpe.weight, sinusoidal_table(16, 32))
    model(tokens(2, 16), tokens(2, 16))[1].backward()
    assert model.transformer.wpe.weight.grad is None


def test_order_matters_but_without_positions_only_what_came_before():
    idx = tokens(1, 8)
    swapped = idx[:, [1, 0, *range(2, 8)]]
    for position in POSITIONS:
        # one layer: in a second layer the causal mask would distinguish positions
        model = make(position=position, n_layer=1)
        same = torch.allclose(model(idx)[0], model(swapped)[0], atol=1e-5)
        assert same == (position == "none")


# -- generation --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("switches", SWITCHES, ids=str)
def test_cached_greedy_is_uncached(switches):
    model, idx = make(**switches), tokens(3, 4)
    assert greedy(model, idx, 12).tolist() == greedy(model, idx, 12, kv_cache=False).tolist()


@pytest.mark.parametrize("short_conv", [0, 2])
def test_a_shared_prompt_is_the_prompt_of_each_row(short_conv):
    model, idx = make(short_conv=short_conv), tokens(1, 40)
    for kv_cache in (True, False):
        shared = model.generate(idx, 30, seeds(4), kv_cache=kv_cache)
        apart = model.generate(idx.expand(4, -1), 30, seeds(4), kv_cache=kv_cache)
        assert torch.equal(torch.cat(list(shared), dim=1), torch.cat(list(apart), dim=1))


def test_a_shared_prompt_is_read_once():
    model, rows = make(), []
    model.transformer.wte.register_forward_hook(lambda module, args, output: rows.append(len(args[0])))
    assert len(list(model.generate(tokens(1, 4), 3, seeds(5)))) == 3
    assert rows == [1, 5, 5]


def test_the_cache_refills_from_the_most_recent_half():
    model, idx = make(), tokens(2, 4)
    everything = torch.cat((idx, greedy(model, idx, 60)), dim=1)
    start = 0
    for end in range(4, 64):  # the token at `end` is predicted from those at start ... end - 1
        if end - start > 16:
            start = end - 8
        logits, _ = model(everything[:, start:end])
        assert logits[:, -1].argmax(dim=-1).tolist() == everything[:, end].tolist()


def test_a_prompt_longer_than_the_context_is_read_from_its_end():
    model, idx = make(), tokens(2, 40)
    for kv_cache in (True, False):
        assert greedy(model, idx, 1, kv_cache=kv_cache).tolist() == greedy(model, idx[:, -16:], 1).tolist()


def test_a_context_of_one_token():
    assert greedy(make(block_size=1), tokens(2, 1), 5).shape == (2, 5)


def test_a_row_is_the_same_alone_and_in_a_batch():
    model, idx = make(), tokens(1, 4).expand(5, -1)
    together = torch.cat(list(model.generate(idx, 30, seeds(5), top_k=20)), dim=1)
    alone = torch.cat(list(model.generate(idx[:1], 30, seeds(5)[3:4], top_k=20)), dim=1)
    assert together[3].tolist() == alone[0].tolist()
    assert len({tuple(row) for row in together.tolist()}) == 5


def test_ids_the_tokenizer_lacks_are_never_sampled():
    model = make()
    model.lm_head.weight.data[50:] = 9.0 * model.lm_head.weight.data[:1].sign()  # padding ids get the highest logits
    new = torch.cat(list(model.generate(tokens(4, 4, vocab_size=50), 50, seeds(4), vocab_size=50)), dim=1)
    assert new.max() < 50


def test_logits_that_are_not_finite_are_an_error():
    model = make()
    model.lm_head.weight.data[3] = math.nan
    with pytest.raises(FloatingPointError, match="logits are not all finite"):
        next(model.generate(tokens(1, 4), 3, seeds(1)))


# -- next_token --------------------------------------------------------------------------------------------------------


def uniform(n: int) -> torch.Tensor:
    return torch.rand(n, 1, generator=torch.Generator().manual_seed(0))


def support(**options: object) -> list[set[int]]:
    """The tokens that can be drawn, found by drawing many times."""
    logits = torch.randn(3, 40, generator=torch.Generator().manual_seed(5))
    rows = logits.repeat_interleave(20_000, dim=0)
    drawn = next_token(rows, uniform(len(rows)), **options).view(3, -1)
    return [set(row.tolist()) for row in drawn]


@pytest.mark.parametrize(
    "options, warpers",
    [
        ({"top_k": 7}, [logits_process.TopKLogitsWarper(7)]),
        ({"top_p": 0.7}, [logits_process.TopPLogitsWarper(0.7)]),
        ({"min_p": 0.15}, [logits_process.MinPLogitsWarper(0.15)]),
        ({"top_k": 10, "top_p": 0.8}, [logits_process.TopKLogitsWarper(10), logits_process.TopPLogitsWarper(0.8)]),
        ({"top_p": 1e-9}, [logits_process.TopKLogitsWarper(1)]),
    ],
)
def test_filters_keep_what_hugging_faces_keep(options, warpers):
    scores = torch.randn(3, 40, generator=torch.Generator().manual_seed(5))
    for warper in warpers:
        scores = warper(None, scores)
    assert support(**options) == [set(row.isfinite().nonzero().flatten().tolist()) for row in scores]


def test_draws_follow_the_distribution():
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0, -9.0])
    n = 200_000
    drawn = next_token(logits.expand(n, -1), uniform(n), temperature=0.7)
    frequency = torch.bincount(drawn.flatten(), minlength=5) / n
    torch.testing.assert_close(frequency, (logits / 0.7).softmax(dim=-1), rtol=0, atol=5 / math.sqrt(n))


def test_top_k_keeps_k_also_where_tokens_tie():
    drawn = next_token(torch.zeros(5000, 6), uniform(5000), top_k=2)
    assert len(drawn.unique()) == 2


def test_temperature_zero_is_greedy_and_top_k_larger_than_the_vocabulary_is_all():
    logits = torch.tensor([[0.1, 0.3, 0.2]])
    for options in ({"temperature": 0}, {"temperature": 1e-4, "top_k": 200}, {"temperature": 1e-40}):
        assert next_token(logits, uniform(1), **options).tolist() == [[1]]


def test_repetition_penalty_is_hugging_faces():
    logits, seen = torch.randn(2, 12, generator=torch.Generator().manual_seed(3)), torch.tensor([[1, 4, 4], [0, 2, 11]])
    expected = logits_process.RepetitionPenaltyLogitsProcessor(5.0)(seen, logits).argmax(dim=-1)
    assert next_token(logits, uniform(2), 0, repetition_penalty=5.0, seen=seen).flatten().tolist() == expected.tolist()


# -- construction ------------------------------------------------------------------------------------------------------


def test_gpt2_has_the_published_number_of_parameters():
    with torch.device("meta"):
        model = GPT(GPTConfig(vocab_size=50257))
    assert sum(parameter.numel() for parameter in model.parameters()) == 124_439_808
    assert model.num_params() == 124_439_808 - 1024 * 768
    # PaLM, appendix B: 6 N + 12 L H Q T
    assert model.flops_per_token() == 6 * model.num_params() + 12 * 12 * 12 * 64 * 1024


def test_untied_embeddings_are_looked_up_not_multiplied():
    tied, untied = make(), make(tie_embeddings=False)
    assert tied.num_params() == untied.num_params()
    assert tied.lm_head.weight is tied.transformer.wte.weight
    assert untied.lm_head.weight is not untied.transformer.wte.weight


def test_initial_weights_are_gpt2s():
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=500, block_size=256, n_layer=8, n_head=4, n_embd=256))
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            assert parameter.count_nonzero() == 0
        elif "ln_" in name:
            assert (parameter == 1).all()
        else:
            expected = 0.02 / math.sqrt(16) if name.endswith("c_proj.weight") else 0.02
            assert parameter.std().item() == pytest.approx(expected, rel=0.02), name
    _, loss = model(tokens(8, 64, vocab_size=500), tokens(8, 64, vocab_size=500).flip(0))
    assert loss.item() == pytest.approx(math.log(500), abs=0.1)


def test_targets_of_minus_one_do_not_count():
    model, idx = make(), tokens(1, 10)
    targets = idx.roll(-1, 1)
    masked = targets.clone()
    masked[:, 4:] = -1
    torch.testing.assert_close(model(idx, masked)[1], model(idx[:, :4], targets[:, :4])[1])


@pytest.mark.parametrize("position", POSITIONS)
def test_cropping_changes_nothing_within_the_shorter_context(position):
    model, idx = make(position=position), tokens(2, 8)
    before = model(idx)[0]
    crop_block_size(model, 8)
    assert torch.equal(model(idx)[0], before)
    rebuilt = build_model(GPT, model.config, model.state_dict()).eval()
    assert torch.equal(rebuilt(idx)[0], before)
    with pytest.raises(AssertionError, match="block_size=8"):
        model(tokens(2, 9))


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"n_embd": 30}, "n_embd=30 is not divisible by n_head=4"),
        ({"n_kv_head": 3}, "n_head=4 is not divisible by n_kv_head=3"),
        ({"rope_theta": 0.0}, "rope_theta=0.0: must be above 0"),
        ({"head_dim": 5, "position": "rope"}, "head_dim=5 is odd"),
        ({"n_embd": 15, "head_dim": 4, "position": "sinusoidal"}, "n_embd=15 is odd"),
        ({"position": "alibi"}, "position='alibi'"),
        ({"mlp": ["gelu"]}, "mlp="),
        ({"dropout": 1.5}, "dropout=1.5"),
        ({"n_layer": 0}, "n_layer=0"),
        ({"n_layer": "many"}, "n_layer='many'"),
    ],
)
def test_impossible_models_are_named(wrong, message):
    with pytest.raises(ValueError, match=message):
        GPTConfig(**({"n_head": 4, "n_embd": 32} | wrong))
