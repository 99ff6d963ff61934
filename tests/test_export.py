"""export.py against transformers: models and tokenizers written here, loaded by AutoModelForCausalLM, AutoTokenizer."""

import json
import pickle
from pathlib import Path

import pytest
import torch
import transformers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from kqv import hub
from kqv.errors import UserError
from kqv.hub_files import read_weights
from kqv.hub_tokenizer import pretrained_description, tokenizer_files
from kqv.tokenizer import ByteTokenizer, CharTokenizer, GPT2Tokenizer, JsonTokenizer
from model import GPT, GPTConfig
from tests.test_hub import save
from tests.test_model import greedy, tokens

SMALL = {"block_size": 32, "vocab_size": 65, "n_layer": 2, "n_head": 4, "n_embd": 32}
LLAMA = {"position": "rope", "norm": "rmsnorm", "mlp": "swiglu", "bias": False, "n_kv_head": 2, "tie_embeddings": False}
CHARS = "".join(map(chr, range(10, 11))) + "".join(map(chr, range(33, 97)))


def random_model(**switches: object) -> GPT:
    torch.manual_seed(0)
    model = GPT(GPTConfig(**SMALL | switches)).eval()
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.2 * torch.randn_like(parameter)
    return model


def export(model: GPT, folder: Path) -> transformers.PreTrainedModel:
    theirs, weights = hub.to_pretrained(model.config, model.state_dict())
    folder.mkdir(exist_ok=True)
    from safetensors.torch import save_file

    (folder / "config.json").write_text(json.dumps(theirs))
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    loaded, report = transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(report.values()), report
    return loaded.eval()


@pytest.mark.parametrize(
    "switches, architecture",
    [
        ({}, "GPT2LMHeadModel"),
        ({"bias": False}, "GPT2LMHeadModel"),
        ({"mlp": "gelu_tanh", "tie_embeddings": False, "n_inner": 48, "norm_eps": 1e-3}, "GPT2LMHeadModel"),
        ({"position": "sinusoidal", "bias": False}, "GPT2LMHeadModel"),
        ({"position": "none"}, "GPT2LMHeadModel"),
        (LLAMA, "LlamaForCausalLM"),
        (LLAMA | {"head_dim": 10, "rope_theta": 500.0, "tie_embeddings": True, "n_inner": 44}, "LlamaForCausalLM"),
        (LLAMA | {"qk_norm": True, "norm_eps": 1e-3}, "Qwen3ForCausalLM"),
    ],
    ids=str,
)
def test_a_model_written_here_computes_the_same_in_transformers(tmp_path, switches, architecture):
    ours = random_model(**switches)
    theirs = export(ours, tmp_path)
    assert type(theirs).__name__ == architecture
    idx = tokens(2, 16)
    with torch.no_grad():
        torch.testing.assert_close(theirs(idx).logits, ours(idx, idx)[0], rtol=1e-5, atol=1e-5)
    written = theirs.generate(idx, attention_mask=torch.ones_like(idx), max_new_tokens=16, do_sample=False)
    assert written[:, 16:].tolist() == greedy(ours, idx, 16).tolist()
    back = GPT.from_pretrained(str(tmp_path))
    for name, weight in ours.state_dict().items():
        assert torch.equal(back.state_dict()[name], weight)


@pytest.mark.parametrize(
    "switches, named",
    [
        ({"mlp": "relu2"}, "mlp=relu2"),
        ({"short_conv": 2}, "short_conv=2"),
        (LLAMA | {"short_conv": 1}, "short_conv=1"),
        (LLAMA | {"position": "sinusoidal"}, "position=sinusoidal"),
        (LLAMA | {"mlp": "relu2"}, "mlp=relu2"),
        ({"norm": "rmsnorm", "bias": False}, "norm=rmsnorm"),
        ({"qk_norm": True}, "qk_norm=True"),
        ({"n_kv_head": 2}, "n_kv_head=2"),
        ({"head_dim": 16}, "head_dim=16"),
        (LLAMA | {"bias": True}, "bias=True"),
    ],
    ids=str,
)
def test_switches_that_no_family_has_are_refused_by_name(switches, named):
    model = random_model(**switches)
    with pytest.raises(UserError, match=named):
        hub.to_pretrained(model.config, model.state_dict())


@pytest.mark.parametrize("family", ["Llama", "Mistral", "Qwen3"])
@pytest.mark.parametrize("tied", [False, True])
def test_weights_come_back_to_the_bit(tmp_path, family, tied):
    options = {"sliding_window": None} if family == "Mistral" else {}
    save(tmp_path, family, tie_word_embeddings=tied, **options)
    model = GPT.from_pretrained(str(tmp_path))
    weights = hub.to_pretrained(model.config, model.state_dict())[1]
    original = load_file(tmp_path / "model.safetensors")
    assert weights.keys() == original.keys() and all(torch.equal(weights[name], original[name]) for name in weights)


def test_gpt2_weights_come_back_to_the_bit(tmp_path):
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=65, n_positions=32, n_layer=2, n_head=4, n_embd=32)
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path)
    model = GPT.from_pretrained(str(tmp_path))
    weights = hub.to_pretrained(model.config, model.state_dict())[1]
    original = read_weights(tmp_path)
    assert weights.keys() == original.keys() and all(torch.equal(weights[name], original[name]) for name in weights)


# -- tokenizers --------------------------------------------------------------------------------------------------------


def own_bpe() -> JsonTokenizer:
    """A byte-level BPE with two special tokens."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|endoftext|>", "<|fim_prefix|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator([Path(__file__).read_text()], trainer)
    return JsonTokenizer(bpe.to_str())


TOKENIZERS = {
    "char": lambda: CharTokenizer(CHARS),
    "char with an end": lambda: CharTokenizer("ab \tčß🙂\n", end_of_text=True),
    "char without a newline": lambda: CharTokenizer("ab "),
    "byte": ByteTokenizer,
    "own": own_bpe,
    "gpt2": GPT2Tokenizer,
}


@pytest.fixture(scope="module", params=TOKENIZERS)
def pair(request, tmp_path_factory, gpt2_bpe):
    """A tokenizer of ours, and the one that AutoTokenizer makes of its files."""
    ours, folder = TOKENIZERS[request.param](), tmp_path_factory.mktemp("tokenizer")
    files, ids = tokenizer_files(ours, 32)
    for name, text in files.items():
        (folder / name).write_text(text, encoding="utf-8")
    assert all(index is None or 0 <= index < ours.vocab_size for index in ids.values())
    (folder / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    assert len(theirs) == ours.vocab_size
    if ours.end_of_text is not None:
        assert (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id) == tuple(ids.values())
    return ours, theirs


def texts(tokenizer) -> st.SearchStrategy[str]:
    special = ["<|endoftext|>"] if tokenizer.end_of_text is not None else []
    characters = (
        st.sampled_from(tokenizer.chars) if isinstance(tokenizer, CharTokenizer) else st.characters(codec="utf-8")
    )
    return st.lists(st.one_of(st.text(characters), st.sampled_from(special or [""]))).map("".join)


def check_texts(pair, data):
    ours, theirs = pair
    text = data.draw(texts(ours))
    ids = ours.encode_prompt(text)
    assert theirs(text, add_special_tokens=False).input_ids == ids
    assert theirs.decode(ids) == theirs.decode(ids, skip_special_tokens=False) == ours.decode(ids) == text


ANY = {"deadline": None, "suppress_health_check": list(HealthCheck)}


@settings(max_examples=200, **ANY)
@given(data=st.data())
def test_ids_and_texts_are_those_of_auto_tokenizer(pair, data):
    check_texts(pair, data)


@pytest.mark.slow
@settings(max_examples=10_000, **ANY)
@given(data=st.data())
def test_ids_and_texts_of_ten_thousand_random_strings(pair, data):
    check_texts(pair, data)


def test_a_server_that_skips_special_tokens_keeps_the_text(pair):
    ours, theirs = pair
    text = ours.decode(range(min(ours.vocab_size, ours.end_of_text or ours.vocab_size, 120)))
    assert theirs.decode(ours.encode(text), skip_special_tokens=True) == text


@pytest.mark.parametrize("kind", ["char", "char with an end", "char without a newline"])
def test_characters_come_back_as_characters(tmp_path, kind):
    ours = TOKENIZERS[kind]()
    (tmp_path / "tokenizer.json").write_text(tokenizer_files(ours, 32)[0]["tokenizer.json"], encoding="utf-8")
    assert pretrained_description(str(tmp_path)) == ours.describe()


# -- the command -------------------------------------------------------------------------------------------------------


def test_a_run_is_exported_and_writes_the_same_text_in_transformers(tmp_path, train, command):
    run = train("--out_dir=out", "--max_iters=20", "--eval_interval=10", "--block_size=64")
    assert run.code == 0, run.err
    exported = command("export.py", "out", "folder/model")
    assert exported.code == 0 and "GPT2LMHeadModel, 0.01M parameters, vocabulary of 30" in exported.out, exported.err
    folder = tmp_path / "folder" / "model"
    assert (
        "Its validation loss is" in (folder / "README.md").read_text()
        and '"tiny"' in (folder / "README.md").read_text()
    )
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    ids = tokenizer("the keys", return_tensors="pt")
    # at most block_size tokens together, as generation_config.json says
    theirs = tokenizer.decode(model.generate(**ids, do_sample=False)[0], skip_special_tokens=True)
    ours = command(
        "sample.py", "--out_dir=out", "--start=the keys", "--temperature=0", "--num_samples=1", "--max_new_tokens=56"
    )
    assert ours.out.removesuffix("\n") == theirs and len(theirs) == 64
    again = command(
        "sample.py",
        "--init_from=folder/model",
        "--start=the keys",
        "--temperature=0",
        "--num_samples=1",
        "--max_new_tokens=56",
    )
    assert again.out == ours.out
    refused = command("export.py", "out", "folder/model")
    assert refused.code == 2 and "exists and is not empty" in refused.err
    assert sorted(path.name for path in (tmp_path / "folder").iterdir()) == ["model"]


def test_nanogpts_checkpoint_gives_the_same_logits_in_transformers(tmp_path, command):
    """A ckpt.pt as nanoGPT writes it: compiled names, a padded vocabulary, no biases, meta.pkl beside the data."""
    chars = [chr(97 + index) for index in range(26)]
    meta = {"vocab_size": 26, "itos": dict(enumerate(chars)), "stoi": {char: index for index, char in enumerate(chars)}}
    (tmp_path / "data" / "letters").mkdir(parents=True)
    (tmp_path / "data" / "letters" / "meta.pkl").write_bytes(pickle.dumps(meta))
    model = random_model(vocab_size=26, bias=False)
    names = ("block_size", "vocab_size", "n_layer", "n_head", "n_embd", "bias", "dropout")
    saved = {
        "model": {"_orig_mod." + name: weight for name, weight in model.state_dict().items()},
        "optimizer": {},
        "model_args": {key: getattr(model.config, key) for key in names},
        "iter_num": 7,
        "best_val_loss": torch.tensor(1.5),
        "config": {"dataset": "letters"},
    }
    torch.save(saved, tmp_path / "ckpt.pt")
    exported = command("export.py", "ckpt.pt", "model")
    assert exported.code == 0, exported.err
    theirs, idx = (
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval(),
        tokens(1, 20, vocab_size=26),
    )
    with torch.no_grad():
        torch.testing.assert_close(theirs(idx).logits, model(idx, idx)[0], rtol=1e-5, atol=1e-5)


def test_the_rows_that_pad_a_vocabulary_are_left_out(tmp_path, command, train, data_dir, gpt2_bpe):
    prepared = command("prepare/text.py", f"--input={Path(__file__)}", "--name=bpe", "--data_dir=data")
    assert prepared.code in (0, None), prepared.err
    run = train("--data_dir=data", "--dataset=bpe", "--out_dir=out", "--max_iters=2")
    assert run.code == 0, run.err
    assert command("export.py", "out", "model").code in (0, None)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert model.config.vocab_size == len(model.transformer.wte.weight) == 50257
    assert model.config.eos_token_id == model.generation_config.eos_token_id == 50256


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["out"], "which model, and where to?"),
        (["nowhere", "model"], "nowhere"),
        (["out", "model", "--gguff=1"], "unknown setting 'gguff'"),
    ],
    ids=str,
)
def test_wrong_commands_are_one_line(command, arguments, message):
    result = command("export.py", *arguments)
    assert result.code == 2 and message in result.err and result.err.count("\n") == 1


@pytest.mark.slow
@pytest.mark.parametrize(
    "switches",
    [
        ("--mlp=gelu_tanh",),
        ("--position=rope", "--norm=rmsnorm", "--mlp=swiglu", "--n_head=4", "--n_kv_head=2", "--head_dim=8"),
        ("--position=rope", "--norm=rmsnorm", "--mlp=swiglu", "--qk_norm=True", "--tie_embeddings=False"),
    ],
    ids=["gpt2", "llama", "qwen3"],
)
@pytest.mark.parametrize("tokenizer", ["byte", "bpe"])
def test_transformers_reads_the_gguf_file(tmp_path, command, train, switches, tokenizer):
    """llama.cpp itself ran such files too: dev/LOG.md."""
    (tmp_path / "own.json").write_text(own_bpe().text)
    (tmp_path / "text.txt").write_text("the keys look back at what the queries was.\n" * 50)
    name = "own.json" if tokenizer == "bpe" else "byte"
    made = command("prepare/text.py", "--input=text.txt", f"--tokenizer={name}", "--data_dir=data")
    assert made.code in (0, None), made.err
    run = train("--data_dir=data", "--dataset=text", "--out_dir=out", "--max_iters=10", "--block_size=32", *switches)
    assert run.code == 0, run.err
    assert command("export.py", "out", "model", "--gguf").code in (0, None)
    plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
    (tmp_path / "model" / "model.gguf").rename(tmp_path / "model.gguf")
    # transformers leaves out of its config what these families need: n_positions and head_dim
    read = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="model.gguf", config=plain.config)
    read.eval()
    idx = tokens(1, 20, vocab_size=257)
    with torch.no_grad():
        torch.testing.assert_close(read(idx).logits, plain(idx).logits, rtol=1e-4, atol=1e-4)
    if "--n_kv_head=2" in switches and tokenizer == "bpe":
        sample = ("--start=the keys", "--temperature=0", "--num_samples=1", "--max_new_tokens=9")
        ours = command("sample.py", "--init_from=model.gguf", *sample)
        assert ours.code in (0, None) and ours.out == command("sample.py", "--out_dir=out", *sample).out, ours.err
    if tokenizer == "bpe":  # transformers gives every GGUF file GPT-2's words
        theirs = transformers.AutoTokenizer.from_pretrained(tmp_path, gguf_file="model.gguf")
        text = "the keys 12\n  look<|endoftext|>"
        assert theirs(text).input_ids == own_bpe().encode_prompt(text)
