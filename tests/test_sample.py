"""sample.py: its texts, and its errors for bad input."""

import io
import shutil
import sys
from types import SimpleNamespace

import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st

from kqv import checkpoint, cli, settings
from kqv.quantized import Int8Linear, PackedLinear, WeightOnlyLinear
from kqv.tokenizer import ByteTokenizer
from model import GPT, GPTConfig
from sample import SEPARATOR, Text, make_fast
from tests.conftest import TINY, command  # noqa: F401
from tests.test_checkpoint import nanogpt_checkpoint
from tests.test_quantized import needs_onednn


@pytest.fixture(scope="module")
def out_dir(tmp_path_factory, data_dir):
    """A model trained for a few steps on "tiny"."""
    import train

    folder = tmp_path_factory.mktemp("trained") / "out"
    arguments = [*TINY, f"--data_dir={data_dir}", f"--out_dir={folder}", "--max_iters=60", "--block_size=32"]
    train.main(*cli.parse(settings.TrainConfig, arguments))
    return folder


@pytest.fixture
def sample(command, out_dir):  # noqa: F811
    def run(*arguments: object) -> SimpleNamespace:
        return command("sample.py", f"--out_dir={out_dir}", "--device=cpu", "--max_new_tokens=40", *arguments)

    return run


def texts(result: SimpleNamespace) -> list[str]:
    assert result.code == 0, result.err
    return result.out.removesuffix("\n").split(f"\n{SEPARATOR}\n")


# -- samples -----------------------------------------------------------------------------------------------------------


def test_text_goes_to_stdout_and_the_rest_to_stderr(sample):
    result = sample("--start=the ", "--num_samples=1")
    (text,) = texts(result)
    assert text.startswith("the ") and len(text) == 44
    assert "40 tokens in" in result.err and "tokens/s" in result.err


def test_samples_do_not_depend_on_how_many_there_are_or_how_they_are_shown(sample):
    four = texts(sample("--num_samples=4", "--start=a"))
    assert len(set(four)) == 4
    assert texts(sample("--num_samples=2", "--start=a")) == four[:2]
    assert texts(sample("--num_samples=1", "--start=a", "--seed=1340")) == four[3:]  # sample 3 of seed 1337
    assert texts(sample("--num_samples=4", "--start=a", "--stream")) == four
    assert texts(sample("--num_samples=4", "--start=a", "--seed=5")) != four


def test_prompts_from_a_file_and_from_standard_input(sample, tmp_path, monkeypatch):
    expected = sample("--start=the keys ").out
    (tmp_path / "prompt.txt").write_text("the keys ", encoding="utf-8")
    assert sample("--start=FILE:prompt.txt").out == expected
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"the keys ")))
    assert sample("--start=-").out == expected


def test_greedy_is_the_same_for_every_seed_and_with_or_without_the_cache(sample):
    greedy = ("--temperature=0", "--num_samples=2", "--start=the ", "--max_new_tokens=25")
    a, b = texts(sample(*greedy))
    assert a == b == texts(sample(*greedy, "--seed=7"))[0] == texts(sample(*greedy, "--kv_cache=False"))[0]
    assert a == texts(sample("--top_k=1", "--num_samples=1", "--start=the ", "--max_new_tokens=25"))[0]


def test_stop_strings_end_a_sample_before_them(sample):
    full = texts(sample("--num_samples=3", "--start=a", "--max_new_tokens=200", "--seed=3"))
    for stop in (["."], ["s ", ".\n"], ["of"]):
        for extra in ([], ["--stream"]):
            options = [f"--stop={text}" for text in stop] + ["--num_samples=3", "--start=a", "--seed=3", *extra]
            for cut, whole in zip(texts(sample("--max_new_tokens=200", *options)), full, strict=True):
                ends = [at for at in (whole.find(text, 1) for text in stop) if at >= 0]
                assert cut == whole[: min(ends, default=None)]


def test_interactive_answers_each_line_and_survives_a_bad_one(sample, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("the \n\nü\na \n"))
    result = sample("--interactive", "--max_new_tokens=5", "--temperature=0")
    assert result.code == 0
    assert result.out.startswith("the ") and "\na " in result.out
    assert "'ü'" in result.err


@needs_onednn
@pytest.mark.parametrize(
    "words, options, samples, layer, dtype",
    [
        ("avx2", {}, 1, WeightOnlyLinear, torch.bfloat16),
        ("avx2", {}, 2, WeightOnlyLinear, torch.bfloat16),
        ("avx2", {}, 3, None, torch.float32),
        ("avx2", {"dtype": "float32"}, 1, None, torch.float32),
        ("avx2", {"kv_cache": False}, 1, None, torch.float32),
        ("avx2", {"compile": True}, 1, torch.nn.Linear, torch.float32),
        ("avx2", {"quantize": "int8"}, 1, Int8Linear, torch.float32),
        ("avx512f amx_bf16", {}, 1, None, torch.float32),  # 256 wide is too small for one sample
        ("avx512f amx_bf16", {}, 10, PackedLinear, torch.bfloat16),
        ("avx512f amx_bf16", {"kv_cache": False}, 1, None, torch.float32),
    ],
)
def test_auto_is_what_is_fastest_to_generate_with(monkeypatch, capsys, words, options, samples, layer, dtype):
    if options.get("quantize") and "fbgemm" not in torch.backends.quantized.supported_engines:
        pytest.skip("not an x86 CPU")
    for room in ("machine", "quantized"):
        monkeypatch.setattr(f"kqv.{room}.cpu_words", lambda: {"AuthenticAMD", *words.split()})
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: "amx_bf16" in words)
    monkeypatch.setattr(torch.ops.mkldnn, "_reorder_linear_weight", lambda weight, _: weight)  # here may be no AMX
    model = GPT(GPTConfig(n_layer=1, n_head=4, n_embd=256, block_size=32, vocab_size=65))
    make_fast(model, settings.SampleConfig(device="cpu", **options), samples)
    assert f"on cpu in {dtype}\n" in capsys.readouterr().err
    assert layer is None or type(dict(model.named_modules())["transformer.h.0.mlp.c_fc"]) is layer


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_writes_too(sample, dtype):
    assert len(texts(sample("--num_samples=2", f"--dtype={dtype}"))[0]) == 41


def test_best_is_preferred_and_a_file_can_be_named(sample, command, out_dir):  # noqa: F811
    assert "best.pt" in sample("--num_samples=1").err
    result = command("sample.py", f"--out_dir={out_dir / 'ckpt.pt'}", "--num_samples=1", "--max_new_tokens=3")
    assert result.code == 0 and "ckpt.pt: iteration 60" in result.err


def test_nanogpts_checkpoint_takes_its_tokenizer_from_the_data_set(command, tmp_path):  # noqa: F811
    import pickle

    saved, model, _ = nanogpt_checkpoint()
    torch.save(saved, tmp_path / "ckpt.pt")
    folder = tmp_path / "data" / "tiny"
    folder.mkdir(parents=True)
    chars = [chr(48 + i) for i in range(61)]
    meta = {"vocab_size": 61, "itos": dict(enumerate(chars)), "stoi": {c: i for i, c in enumerate(chars)}}
    (folder / "meta.pkl").write_bytes(pickle.dumps(meta))
    options = ["--num_samples=1", "--temperature=0", "--max_new_tokens=10", "--start=012"]
    result = command("sample.py", "--out_dir=.", *options)
    idx = torch.tensor([[0, 1, 2]])
    model.eval()
    for _ in range(10):
        idx = torch.cat((idx, model(idx)[0][:, -1].argmax(dim=-1, keepdim=True)), dim=1)
    assert result.out == "".join(chars[i] for i in idx[0].tolist()) + "\n"
    (folder / "meta.pkl").unlink()
    folder.rmdir()
    result = command("sample.py", "--out_dir=.", *options)
    assert result.code == 2 and "dataset='tiny': no folder" in result.err


def test_gpt2_from_a_folder_continues_as_hugging_face_does(command, tmp_path, gpt2_bpe):  # noqa: F811
    import tiktoken

    torch.manual_seed(0)
    sizes = {"n_positions": 64, "n_embd": 16, "n_layer": 2, "n_head": 2, "initializer_range": 0.5}
    hf = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes)).eval()
    hf.save_pretrained(tmp_path / "gpt2")
    result = command(
        *("sample.py", "--init_from=gpt2", "--start=Hello<|endoftext|> wörld", "--temperature=0"),
        *("--num_samples=1", "--max_new_tokens=20"),
    )
    assert result.code == 0, result.err
    bpe = tiktoken.get_encoding("gpt2")
    idx = torch.tensor([bpe.encode("Hello<|endoftext|> wörld", allowed_special="all")])
    expected = hf.generate(idx, max_new_tokens=20, do_sample=False, eos_token_id=None, pad_token_id=0)[0]
    shown = bpe.decode_bytes(expected.tolist()).decode("utf-8", errors="replace")
    assert result.out == shown + "\n"


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler on CPUs")
def test_compiled_sampling_writes_the_same(sample):
    options = ("--temperature=0", "--num_samples=2", "--start=the ")
    assert texts(sample(*options, "--compile")) == texts(sample(*options))


# -- text from tokens --------------------------------------------------------------------------------------------------


@given(
    text=st.text(alphabet="ab<>é\n😀", max_size=30), stop=st.lists(st.text("ab<>é", min_size=1, max_size=3), max_size=3)
)
def test_streamed_pieces_are_whole_characters_and_add_up_to_the_text_before_the_stop(text, stop):
    sampled, pieces = Text(ByteTokenizer(), stop), []
    for byte in text.encode():
        sampled.add(byte)
        pieces.append(sampled.ready())
    pieces.append(sampled.finish())
    first = min((at for at in (text.find(s) for s in stop) if at >= 0), default=len(text))
    # the first stop string to be complete counts; of several that end together, the one that starts first
    done = min((text.find(s) + len(s) for s in stop if s in text), default=None)
    if done is not None:
        first = min(at for s in stop if (at := text[:done].find(s)) >= 0)
    assert "".join(pieces) == text[:first]
    assert not any("\ufffd" in piece for piece in pieces)


def test_bytes_that_are_no_text_are_shown_as_such():
    sampled = Text(ByteTokenizer(), ())
    for byte in "é".encode()[:1]:
        sampled.add(byte)
    assert sampled.ready() == ""
    assert sampled.finish() == "\ufffd"


# -- errors ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--start="], "start is empty"),
        (["--start=the Ökonom €"], "characters are not in the vocabulary"),
        (["--start=FILE:missing.txt"], "missing.txt"),
        (["--start=FILE:latin.txt"], "FILE:latin.txt: not UTF-8 text"),
        (["--max_new_tokens=0"], "max_new_tokens=0: must be at least 1"),
        (["--num_samples=0"], "num_samples=0: must be at least 1"),
        (["--temperature=-1"], "temperature=-1.0: must be at least 0"),
        (["--top_k=0"], "top_k=0: must be at least 1"),
        (["--top_p=1.5"], "top_p=1.5: must be above 0 and at most 1"),
        (["--min_p=0"], "min_p=0.0: must be above 0 and at most 1"),
        (["--repetition_penalty=0"], "repetition_penalty=0.0: must be from 0.01"),
        (["--temperature=inf"], "temperature=inf: too large"),
        ([f"--seed={2**63}"], f"seed={2**63}: too large"),
        (["--stop=a", "--stop="], "stop=''"),
        (["--quantize=int8", "--compile"], "quantize='int8': does not work with compile=True"),
        (["--compile", "--kv_cache=False"], "compile=True: does not work with kv_cache=False"),
        (["--interactive", "--start=a"], "start: does not work with --interactive"),
        (["--quantize=int4"], "quantize='int4': expected int8 | None"),
        (["--out_dir=nowhere"], "no checkpoint nowhere/ckpt.pt"),
        (["--out_dir=latin.txt"], "latin.txt"),
        (["--init_from=gpt5"], "init_from='gpt5': expected resume"),
        (["--temprature=1"], "unknown setting 'temprature': did you mean 'temperature'?"),
    ],
)
def test_bad_input_is_one_line_and_no_text(sample, tmp_path, arguments, message):
    (tmp_path / "latin.txt").write_bytes("café".encode("latin-1"))
    result = sample(*arguments)
    assert (result.code, result.out) == (2, "")
    line = result.err.splitlines()[-1]
    assert line.startswith("error: ") and message in line and "Traceback" not in result.err


def test_characters_that_are_missing_are_named(sample):
    error = sample("--start=a Ö b €").err
    assert "'Ö'" in error and "'€'" in error


def test_standard_input_that_is_not_utf8(sample, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"\xff")))
    result = sample("--start=-")
    assert result.code == 2 and "start=-: not UTF-8 text" in result.err


def test_weights_that_are_not_numbers_are_refused(sample, out_dir, tmp_path):
    saved = checkpoint.load(out_dir / "ckpt.pt")
    saved["model"]["transformer.ln_f.weight"][3] = float("nan")
    torch.save(saved, tmp_path / "ckpt.pt")
    result = sample(f"--out_dir={tmp_path}")
    assert result.code == 2 and "not all finite" in result.err


@pytest.mark.skipif("fbgemm" not in torch.backends.quantized.supported_engines, reason="not an x86 CPU")
def test_int8_samples_do_not_depend_on_how_many_there_are(sample):
    options = ("--quantize=int8", "--start=the ")
    assert texts(sample(*options, "--num_samples=3"))[:1] == texts(sample(*options, "--num_samples=1"))
