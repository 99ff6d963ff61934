"""hub.py against transformers: tiny random models of each family, and folders that are refused."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from kqv import hub
from kqv.errors import UserError
from kqv.tokenizer import JsonTokenizer, from_description
from model import GPT
from tests.test_model import greedy, tokens

SIZES = {"vocab_size": 300, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2}
SIZES |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 10, "max_position_embeddings": 64}


def save(folder: Path, family: str, shards: bool = False, **options: object) -> transformers.PreTrainedModel:
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**SIZES | {"initializer_range": 0.2} | options)
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.data += 0.3 * torch.randn_like(parameter)
    model.save_pretrained(folder, max_shard_size="10KB" if shards else "1GB")
    return model


@pytest.mark.parametrize(
    "family, options",
    [
        ("Llama", {}),
        ("Llama", {"tie_word_embeddings": True, "rms_norm_eps": 1e-5}),
        ("Llama", {"rope_parameters": {"rope_theta": 500.0, "rope_type": "default"}, "shards": True}),
        ("Mistral", {"sliding_window": None}),
        ("Qwen3", {}),
        ("Qwen3", {"tie_word_embeddings": True, "num_key_value_heads": 1}),
    ],
    ids=str,
)
def test_logits_and_greedy_tokens_are_those_of_transformers(tmp_path, family, options):
    theirs = save(tmp_path, family, **options)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 2) == bool(options.get("shards"))
    ours, idx = GPT.from_pretrained(str(tmp_path)).eval(), tokens(2, 20, vocab_size=300)
    with torch.no_grad():
        torch.testing.assert_close(ours(idx, idx)[0], theirs(idx).logits, rtol=1e-5, atol=1e-5)
    expected = theirs.generate(idx, max_new_tokens=40, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert greedy(ours, idx, 40).tolist() == expected[:, 20:].tolist()
    assert greedy(ours, idx[:1], 64).tolist() == [refilled_greedy(theirs, idx[0].tolist(), 64, block_size=64)]


def refilled_greedy(theirs: transformers.PreTrainedModel, seen: list[int], count: int, block_size: int) -> list[int]:
    """Greedy tokens whose context, when it is full, starts again from its last half, as the cache here does."""
    start, prompt = 0, len(seen)
    for _ in range(count):
        if len(seen) - start > block_size:
            start = len(seen) - block_size // 2
        with torch.no_grad():
            seen = [*seen, int(theirs(torch.tensor([seen[start:]])).logits[0, -1].argmax())]
    return seen[prompt:]


def test_the_rope_base_of_older_config_files(tmp_path):
    theirs = save(tmp_path, "Llama", rope_parameters={"rope_theta": 500.0, "rope_type": "default"})
    edit(tmp_path, rope_parameters=None, rope_theta=500.0, rope_scaling=None)
    idx = tokens(1, 20, vocab_size=300)
    with torch.no_grad():
        ours = GPT.from_pretrained(str(tmp_path)).eval()(idx, idx)[0]
        torch.testing.assert_close(ours, theirs(idx).logits, rtol=1e-5, atol=1e-5)


def edit(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    "family, change, message",
    [
        ("Llama", {"attention_bias": True}, "attention_bias=True: model.py has no such model"),
        ("Llama", {"hidden_act": "gelu"}, "hidden_act=gelu"),
        ("Llama", {"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8}}, "rope_type=llama3"),
        ("Llama", {"rope_parameters": None, "rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_type=linear"),
        ("Mistral", {"sliding_window": 16}, "sliding_window=16"),
        ("Qwen3", {"use_sliding_window": True, "sliding_window": 16}, "sliding_window=16"),
        ("Llama", {"model_type": "gemma3"}, "model_type='gemma3'"),
        ("Llama", {"num_hidden_layers": 3}, "its weights are not those of its config.json: no 'model.layers.2."),
        ("Llama", {"num_hidden_layers": 1}, "model.layers.1.input_layernorm.weight, .* are left over"),
        ("Llama", {"hidden_size": 64}, "its weights are not those of its config.json"),
        ("Llama", {"num_attention_heads": 3}, "n_head=3 is not divisible by n_kv_head=2"),
    ],
    ids=str,
)
def test_what_model_py_cannot_compute_is_refused_by_name(tmp_path, family, change, message):
    save(tmp_path, family, **({"sliding_window": None} if family == "Mistral" else {}))
    edit(tmp_path, **change)
    with pytest.raises(UserError, match=message) as caught:
        GPT.from_pretrained(str(tmp_path))
    assert str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["../outside.safetensors", "/etc/passwd", "missing.safetensors", 7])
def test_an_index_cannot_lead_out_of_its_folder(tmp_path, name):
    save(tmp_path, "Llama")
    shutil.copy(tmp_path / "model.safetensors", tmp_path.parent / "outside.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"lm_head.weight": name}}))
    with pytest.raises(UserError, match="which is no file in its folder"):
        GPT.from_pretrained(str(tmp_path))


@pytest.mark.parametrize(
    "content", ["[]", "{", "\xff", '{"model_type": "llama"}', '{"model_type": "llama", "rope_parameters": 3}']
)
def test_a_damaged_config_is_one_line(tmp_path, content):
    (tmp_path / "config.json").write_bytes(content.encode("latin-1"))
    with pytest.raises(UserError, match=r"config\.json") as caught:
        GPT.from_pretrained(str(tmp_path))
    assert "\n" not in str(caught.value)


def test_names_on_the_hub_need_a_network_and_say_so(command, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for script in ("sample.py", "explain.py"):
        words = ["attention"] if script == "explain.py" else []
        result = command(script, *words, "--init_from=nobody/nothing-of-this-name")
        assert result.code == 2 and "could not download nobody/nothing-of-this-name" in result.err
        assert result.err.count("\n") == 1


def test_truncated_weights_are_named(tmp_path):
    save(tmp_path, "Llama")
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UserError, match=r"model\.safetensors is damaged"):
        GPT.from_pretrained(str(tmp_path))


def test_a_made_up_family_is_one_table(tmp_path, monkeypatch):
    made_up = replace(
        hub.LLAMA,
        settings=hub.LLAMA.settings | {"n_layer": "depth"},
        weights={
            ours: tuple(name.replace("model.", "net.", 1) for name in theirs)
            for ours, theirs in hub.LLAMA.weights.items()
        },
        prefix="net.",
    )
    monkeypatch.setitem(hub.FAMILIES, "made-up", made_up)
    theirs = save(tmp_path, "Llama")
    edit(tmp_path, model_type="made-up", depth=2)
    path = tmp_path / "model.safetensors"
    save_file({name.replace("model.", "net.", 1): tensor for name, tensor in load_file(path).items()}, path)
    idx = tokens(1, 20, vocab_size=300)
    with torch.no_grad():
        ours = GPT.from_pretrained(str(tmp_path)).eval()(idx, idx)[0]
        torch.testing.assert_close(ours, theirs(idx).logits, rtol=1e-5, atol=1e-5)


# -- the tokenizer of a folder -----------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def tokenizer_json(tmp_path_factory) -> Path:
    """A byte-level BPE of 300 tokens, as Llamas have it."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=special, initial_alphabet=alphabet)
    bpe.train_from_iterator(["the keys and the values of the queries, then the keys again"] * 9, trainer)
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    bpe.save(str(path))
    return path


@pytest.mark.parametrize("text", ["the keys", "naïve 你好 🙂\t\n  x", "<|im_start|>the", "", "\x00\x7f\xad"])
def test_ids_are_those_of_the_library_and_decode_to_the_text(tokenizer_json, text):
    ours = from_description(JsonTokenizer(tokenizer_json.read_text()).describe())
    ids = ours.encode(text)
    assert ours.decode(ids) == text
    theirs = Tokenizer.from_file(str(tokenizer_json))
    theirs.encode_special_tokens = True  # special tokens in a text are text, as in the other tokenizers
    assert ids == theirs.encode(text, add_special_tokens=False).ids
    assert (ours.vocab_size, ours.end_of_text) == (theirs.get_vocab_size(), 0) and ours.decode([0]) == "<|endoftext|>"


@pytest.mark.parametrize("text", ["", "{}", "[1]", '{"model": 1}'])
def test_damaged_tokenizers_are_refused(text):
    with pytest.raises(UserError, match=r"not a tokenizer\.json"):
        JsonTokenizer(text)


def test_other_kinds_of_bpe_are_refused(tokenizer_json):
    changed = json.loads(tokenizer_json.read_text()) | {"decoder": {"type": "Fuse"}}
    with pytest.raises(UserError, match="its decoder is Fuse"):
        JsonTokenizer(json.dumps(changed))


def test_a_llama_folder_is_sampled_and_looked_into_but_only_trained_on_its_own_tokens(
    tmp_path, command, tokenizer_json, train
):
    folder = tmp_path / "llama"
    save(folder, "Llama")
    shutil.copy(tokenizer_json, folder)
    written = command("sample.py", f"--init_from={folder}", "--start=the keys", "--num_samples=1", "--max_new_tokens=9")
    assert written.code in (0, None) and written.out.startswith("the keys"), written.err
    seen = command("explain.py", "attention", f"--init_from={folder}", "--text=the keys of", "--json=n.json")
    assert seen.code in (0, None), seen.err
    assert len(json.loads((tmp_path / "n.json").read_text())["weights"]) == 2
    refused = train(f"--init_from={folder}", "--max_iters=1")
    assert refused.code == 2 and "prepare/text.py --tokenizer=" in refused.err
    (folder / "tokenizer.json").write_text("{}")
    damaged = command("sample.py", f"--init_from={folder}")
    assert damaged.code == 2 and "llama: not a tokenizer.json" in damaged.err
