"""plan.py against the model, against what autograd keeps, and against processes that train."""

import itertools
import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from kqv import census
from kqv import plan as room
from kqv.attention import use_attention
from kqv.build import empty_model, model_config
from kqv.cli import parse
from kqv.data import padded_vocab_size
from kqv.errors import UserError
from kqv.loss import LARGE_VOCAB, NextTokenLoss
from kqv.machine import GPUS
from kqv.plan import data_sizes, parameters, planned_config
from kqv.settings import TrainConfig
from model import GPT, GPTConfig
from tests.conftest import ROOT, TINY

GPT2 = {"vocab_size": 50257, "block_size": 1024, "bias": True}


def settings(*arguments: str) -> TrainConfig:
    return parse(TrainConfig, list(arguments))[0]


def plan(cfg: TrainConfig, world_size: int = 1, plan_device: str | None = None) -> str:
    data = data_sizes(cfg)
    config = planned_config(GPTConfig, cfg, data[0] if data else 50257)
    return room.plan(replace(cfg, plan_device=plan_device), config, GPT, data, world_size)


# -- the model ---------------------------------------------------------------------------------------------------------


def test_parameters_of_gpt2_are_those_in_the_literature():
    small = parameters(empty_model(GPT, GPTConfig(n_layer=12, n_head=12, n_embd=768, **GPT2)))
    xl = parameters(empty_model(GPT, GPTConfig(n_layer=48, n_head=25, n_embd=1600, **GPT2)))
    assert sum(small.values()) == 124_439_808
    assert sum(xl.values()) == 1_557_611_200
    # each block: 12 C^2 + 13 C weights, of which 4 C^2 + 4 C in attention, 8 C^2 + 5 C in the MLP, 4 C in the norms
    assert xl == {
        "embeddings": (50257 + 1024) * 1600,
        "attention": 48 * (4 * 1600**2 + 4 * 1600),
        "MLP": 48 * (8 * 1600**2 + 5 * 1600),
        "norms": 48 * 4 * 1600 + 2 * 1600,
    }


SWITCHES = [
    {},
    {"bias": False, "tie_embeddings": False},
    {"attention": "explicit"},
    {"dropout": 0.1},
    {"attention": "explicit", "dropout": 0.1},
    {"position": "rope", "norm": "rmsnorm", "mlp": "swiglu", "bias": False},
    {"position": "none", "mlp": "relu2", "n_kv_head": 1},
    {"position": "sinusoidal", "mlp": "gelu_tanh", "head_dim": 10, "n_inner": 50},
    {"position": "rope", "qk_norm": True, "n_kv_head": 2},
    {"position": "rope", "qk_norm": True, "n_kv_head": 2, "attention": "explicit", "dropout": 0.1},
    {"norm": "rmsnorm", "qk_norm": True, "dropout": 0.1},
    {"qk_norm": True, "attention": "explicit"},
    {"short_conv": 2},
    {"vocab_size": LARGE_VOCAB},
    {"vocab_size": LARGE_VOCAB, "tie_embeddings": False, "block_size": 100},
]


def small_config(**switches) -> GPTConfig:
    sizes = {"vocab_size": 70, "block_size": 24, "n_layer": 2, "n_head": 4, "n_embd": 32}
    return GPTConfig(**sizes | switches)


@pytest.mark.parametrize("switches", SWITCHES, ids=str)
def test_flops_are_those_of_each_matrix_and_of_attention(switches):
    config = small_config(**switches)
    model = GPT(config)
    names = ("wpe",) if config.tie_embeddings else ("wpe", "wte")
    multiplied = [p.numel() for n, p in model.named_parameters() if p.dim() == 2 and not any(x in n for x in names)]
    attention = 12 * config.n_layer * config.n_head * config.head_dim * config.block_size
    assert census.flops_per_token(GPT, config) == 6 * sum(multiplied) + attention
    assert census.flops_per_token(GPT, config) == pytest.approx(
        model.flops_per_token(), rel=0.06
    )  # flops_per_token counts gains too


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["--mlp=swiglu", "--n_embd=96", "--position=rope"],
        ["--n_kv_head=3", "--n_inner=100", "--head_dim=20"],
        ["--n_embd=36", "--position=sinusoidal"],  # heads of 3 channels
    ],
)
def test_the_planned_model_is_the_one_that_train_makes(arguments):
    cfg = settings(*arguments)
    assert planned_config(GPTConfig, cfg, 65) == model_config(GPTConfig, cfg, 65)
    assert planned_config(GPTConfig, cfg, 50257).vocab_size == 50304 == padded_vocab_size(50257)


def test_pretrained_models_are_planned_from_their_names_or_folders(tmp_path):
    for name, n_params in (("gpt2", 124_439_808), ("gpt2-medium", 354_823_168), ("gpt2-large", 774_030_080)):
        planned = planned_config(GPTConfig, settings(f"--init_from={name}", "--norm=rmsnorm", "--n_layer=1"), 65)
        assert sum(parameters(empty_model(GPT, planned)).values()) == n_params
    hf = {"n_layer": 2, "n_head": 2, "n_embd": 8, "vocab_size": 65, "n_inner": 20, "n_positions": 32}
    hf |= {"model_type": "gpt2", "activation_function": "gelu_new", "layer_norm_epsilon": 1e-5}
    (tmp_path / "config.json").write_text(json.dumps(hf))
    planned = planned_config(GPTConfig, settings(f"--init_from={tmp_path}", "--block_size=16"), 65)
    assert (planned.n_layer, planned.n_embd, planned.n_inner, planned.mlp) == (2, 8, 20, "gelu_tanh")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match=r"config\.json: model_type=None: expected gpt2"):
        planned_config(GPTConfig, settings(f"--init_from={tmp_path}"), 65)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--n_embd=17"], "n_embd=17 is not divisible by n_head=12"),
        (["--n_kv_head=5"], "n_head=12 is not divisible by n_kv_head=5"),
        (["--n_layer=0"], "n_layer=0"),
        (["--n_head=0"], "n_head=0"),
        (["--dropout=1"], r"dropout=1\.0"),
        (["--gradient_accumulation_steps=3"], "gradient_accumulation_steps=3: 2 processes share them"),
    ],
)
def test_what_train_refuses_is_refused(arguments, message):
    with pytest.raises(UserError, match=message):
        plan(settings(*arguments, "--dataset=nothing"), world_size=2)


# -- memory ------------------------------------------------------------------------------------------------------------


def kept_by_autograd(config: GPTConfig, B: int, dtype: torch.dtype, device: str) -> int:
    """Bytes of the tensors that a forward pass keeps for backward, without weights. Views count once."""
    model = NextTokenLoss(GPT(config)).to(device).train()
    use_attention(model.model, wanted_attention(config), torch.device(device), dtype)
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    found = {}  # keeps the storages alive, so that no address is used twice

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in own:
            found[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    x, y = torch.randint(config.vocab_size, (2, B, config.block_size), device=device)
    x, y = x.clone(), y.clone()
    autocast = torch.autocast(device, dtype, enabled=dtype != torch.float32)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), autocast:
        model(x, y)
    return sum(storage.nbytes() for storage in found.values())


def wanted_attention(config: GPTConfig) -> str:
    """The setting with which train.py makes this config's model."""
    return "explicit" if config.attention == "explicit" else "auto"


def kept_by_plan(config: GPTConfig, B: int, dtype: torch.dtype, gpu: bool) -> int:
    cfg = TrainConfig(batch_size=B, attention=wanted_attention(config))
    _, kept = census.memory(GPT, config, cfg, dtype, float(gpu), earlier=False, rows=1)
    return sum(kept.values())


@pytest.mark.filterwarnings("ignore:Mismatch dtype")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("switches", SWITCHES, ids=str)
def test_activations_are_what_autograd_keeps(switches, dtype):
    config = small_config(**switches)
    kept = kept_by_autograd(config, 3, dtype, "cpu")
    if dtype != torch.float32 and config.norm == "layernorm":
        # fake layer norms keep the mean and deviation of each row in 16 bits, if x has 16, real ones in 32
        heads = (config.n_head + config.n_kv_head) * config.qk_norm
        kept -= 2 * 2 * (3 * config.block_size) * (config.n_layer * (2 + heads) + 1)
    assert kept_by_plan(config, 3, dtype, gpu=False) == kept


def test_deep_models_are_counted_from_two_shallow_ones():
    config = small_config(n_layer=15)
    assert kept_by_plan(config, 2, torch.float32, gpu=False) == kept_by_autograd(config, 2, torch.float32, "cpu")


@pytest.mark.parametrize("dtype, bytes_of_weight", [(torch.float32, 4), (torch.bfloat16, 4 + 2)])
def test_explicit_attention_keeps_its_weights_in_float32_on_a_gpu(dtype, bytes_of_weight):
    """CUDA's autocast computes the softmax in float32; the product with the values keeps a copy in 16 bits."""
    short, middle, long = (
        kept_by_plan(small_config(attention="explicit", block_size=T), 3, dtype, gpu=True) for T in (24, 36, 48)
    )
    quadratic = (short - 2 * middle + long) // 2 // 12**2  # the factor of T^2
    assert quadratic == 2 * (3 * 4 * bytes_of_weight + 1)  # layers, B, H; one byte for the mask


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("switches", SWITCHES, ids=str)
def test_activations_are_what_autograd_keeps_on_a_gpu(switches, dtype):
    if "n_kv_head" in switches and dtype == torch.float32:
        pytest.skip("CUDA has no fused kernel for grouped queries in float32, which the plan does not know")
    config = small_config(**switches | ({"head_dim": 16} if "head_dim" in switches else {}))  # kernels pad other sizes
    assert kept_by_plan(config, 3, dtype, gpu=True) == pytest.approx(
        kept_by_autograd(config, 3, dtype, "cuda"), rel=0.15
    )


SMALL = "--vocab=65 --n_layer=6 --n_head=6 --n_embd=384 --block_size=256 --batch_size=8"
WIDE = "--vocab=65 --n_layer=4 --n_head=8 --n_embd=512 --block_size=32"
EXPLICIT = "--vocab=65 --n_head=4 --n_embd=128 --block_size=1024 --attention=explicit"

MEASURE = """
import os, sys
from kqv.cli import parse
from kqv.settings import TrainConfig
import train

def resident(key):
    with open("/proc/self/status") as file:
        return next(1024 * int(line.split()[1]) for line in file if line.startswith(key))

def run(*arguments):
    train.main(*parse(TrainConfig, [*sys.argv[1:], *arguments]))

# first with a tiny model, so that libraries load and oneDNN compiles its kernels
run("--n_layer=1", "--n_head=2", "--n_embd=8", "--batch_size=2", "--block_size=8", "--out_dir=warm")
before = resident("VmRSS")
with open("/proc/self/clear_refs", "w") as file:
    file.write("5")  # resets the peak
os.environ["TORCHELASTIC_RESTART_COUNT"] = "1"  # the two processes connect again
run("--out_dir=measured")
print("grown", resident("VmHWM") - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(
    "moment, processes, arguments",
    [
        ("backward", 1, "--vocab=65 --n_layer=4 --n_head=4 --n_embd=128 --block_size=64 --batch_size=12"),
        ("backward", 1, SMALL),
        ("backward", 1, f"{SMALL} --dtype=bfloat16"),
        ("backward", 1, f"{SMALL} --position=rope --norm=rmsnorm --mlp=swiglu --qk_norm --n_kv_head=2"),
        ("backward", 1, f"{SMALL} --mlp=swiglu --n_kv_head=1"),
        ("backward", 1, f"{SMALL} --short_conv=3 --mlp=relu2"),
        ("backward", 1, f"{SMALL} --dropout=0.1 --n_layer=3"),
        ("backward", 1, f"{EXPLICIT} --batch_size=2 --n_layer=3"),
        ("backward", 1, f"{SMALL} --n_layer=9 --activation_checkpointing"),
        ("backward", 1, f"{WIDE} --batch_size=2"),
        ("optimizer", 1, f"{WIDE} --batch_size=2 --optimizer=muon"),
        ("forward", 1, "--vocab=50257 --n_layer=2 --n_head=4 --n_embd=64 --block_size=64 --batch_size=16"),
        ("evaluation", 1, f"{EXPLICIT} --n_layer=1 --n_head=8 --n_embd=64 --block_size=512 --batch_size=1"),
        ("backward", 2, f"{SMALL} --strategy=fsdp"),
        ("backward", 2, SMALL),
    ],
)
def test_the_peak_is_within_15_percent_of_a_training_process(tmp_path, moment, processes, arguments):
    vocab, *arguments = arguments.split()
    vocab = int(vocab.removeprefix("--vocab="))
    folder = tmp_path / "data" / "ids"
    folder.mkdir(parents=True)
    for name, n in (("train", 100_000), ("val", 20_000)):
        np.random.default_rng(n).integers(vocab, size=n).astype("<u2").tofile(folder / f"{name}.bin")
    if vocab == 65:
        chars = {"kind": "char", "chars": "".join(chr(48 + i) for i in range(65)), "end_of_text": False}
        meta = {"tokenizer": chars, "vocab_size": 65, "dtype": "uint16", "splits": {}}
        (folder / "meta.json").write_text(json.dumps(meta), encoding="utf-8")
    common = ["--data_dir=data", "--dataset=ids", "--device=cpu", f"--gradient_accumulation_steps={processes}"]
    common += ["--max_iters=3"]
    common += ["--eval_interval=2", "--eval_iters=1", "--warmup_iters=1", "--learning_rate=1e-4", "--dtype=float32"]
    (tmp_path / "measure.py").write_text(MEASURE, encoding="utf-8")
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"] if processes > 1 else []
    # freed memory returns to the system at once, so resident memory is memory in use
    malloc = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}
    result = subprocess.run(
        [sys.executable, *launcher, tmp_path / "measure.py", *common, *arguments],
        **{"cwd": tmp_path, "text": True, "capture_output": True, "timeout": 280},
        env=os.environ | malloc | {"PYTHONPATH": str(ROOT)},
    )
    assert result.returncode == 0, result.stderr
    grown = max(map(int, re.findall(r"grown (\d+)$", result.stdout, re.MULTILINE)))

    text = plan(replace(settings(*common, *arguments), data_dir=str(tmp_path / "data")), processes)
    rows = {line[2:18].strip(): line.split()[-1] for line in text.splitlines() if re.match(r"  \w+ +[\d.,]+ ", line)}
    totals = {name: 1e6 * float(total.replace(",", "")) for name, total in rows.items()}
    print(f"{arguments}: planned {max(totals.values()) / 1e6:.1f} MB, measured {grown / 1e6:.1f}")
    assert max(totals, key=totals.get) == moment
    assert max(totals.values()) == pytest.approx(grown, rel=0.15)


def test_sharding_divides_the_state_and_ddp_does_not():
    cfg = settings("--dataset=nothing", "--gradient_accumulation_steps=8")
    alone, ddp, fsdp = (
        lines(plan(replace(cfg, strategy=strategy), processes, "h100"))["backward"].split()
        for strategy, processes in (("ddp", 1), ("ddp", 8), ("fsdp", 8))
    )
    for column in (0, 1):  # weights, AdamW
        megabytes = [float(row[column].replace(",", "")) for row in (alone, ddp, fsdp)]
        assert megabytes[0] == megabytes[1] == pytest.approx(8 * megabytes[2], abs=0.8)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_the_checkpoint_is_as_large_as_planned(train, tmp_path, data_dir, optimizer):
    arguments = ("--n_embd=128", "--n_layer=4", "--n_head=4", "--position=sinusoidal", f"--optimizer={optimizer}")
    assert train("--max_iters=1", *arguments).code == 0
    text = plan(settings(*TINY, *arguments, f"--data_dir={data_dir}"))
    planned = int(lines(text)["checkpoint"].split()[0].replace(",", ""))
    assert planned == pytest.approx((tmp_path / "out" / "ckpt.pt").stat().st_size, rel=0.02)


# -- the command -------------------------------------------------------------------------------------------------------


def lines(text: str) -> dict[str, str]:
    return {line[:18].strip(): line[18:] for line in text.splitlines()}


def test_a_context_that_gpt2_does_not_have_is_refused_as_in_training():
    with pytest.raises(UserError, match="block_size=2048: gpt2-xl has at most 1024"):
        plan(settings("--init_from=gpt2-xl", "--block_size=2048", "--dataset=nothing"), 1, "h100")


@pytest.mark.parametrize("arguments, device", [(["--dtype=float16"], "h100"), ([], "t4")])
def test_fsdp_in_float16_is_refused_as_in_training(arguments, device):
    with pytest.raises(UserError, match="strategy=fsdp: trains in bfloat16 or float32"):
        plan(settings("--strategy=fsdp", "--dataset=nothing", *arguments), 2, device)


def test_without_data_gpt2s_vocabulary_is_assumed_and_it_says_so():
    notes = lines(plan(settings("--dataset=nothing", "--bias=True"), 1, "h100"))
    assert notes["parameters"].startswith("124,475,904: embeddings 39,419,904, ")  # 47 rows of padding
    assert "does not exist, GPT-2's vocabulary is assumed; vocab_size 50,304" in notes["data"]
    assert "epochs" not in notes["run"]


def test_with_data_the_epochs_are_counted(data_dir):
    cfg = settings(f"--data_dir={data_dir}", *TINY, "--max_iters=1000")
    meta = json.loads((data_dir / "tiny" / "meta.json").read_text())
    tokens = meta["splits"]["train"]["tokens"]
    notes = lines(plan(cfg))
    assert notes["step"].startswith("64 tokens: 4 sequences of 16 x 1 micro-batches")
    assert notes["run"] == f"1,000 steps, 64,000 tokens, {64_000 / tokens:.1f} epochs"
    assert f"{tokens:,} tokens to train on; vocab_size {meta['vocab_size']}" in notes["data"]


def test_time_is_flops_over_the_share_of_the_peak_that_is_assumed():
    cfg = settings("--max_iters=1000", "--n_layer=2", "--dataset=nothing")
    flops = census.flops_per_token(GPT, model_config(GPTConfig, cfg, 50304)) * 1000 * 491_520
    notes = lines(plan(cfg, 8, "H100"))["time"]
    hours, minutes, seconds = map(int, notes.split(",")[0].split(":"))
    assert 3600 * hours + 60 * minutes + seconds == pytest.approx(flops / (8 * 0.4 * 989e12), abs=0.6)
    assert "assuming that 40% of H100's peak" in notes
    assert (
        "unknown" in lines(plan(settings("--dtype=float32", "--dataset=nothing"), 1, "h100"))["time"]
    )  # the peaks are of 16-bit types


def test_devices_are_named_in_any_case_and_each_has_its_memory():
    for name, (_, gigabytes) in GPUS.items():
        assert room.find_device(name, "cpu") == (name, gigabytes * 1e9)
    for spoken, name in {"h100": "H100", "4090": "RTX 4090", "rtx-3080": "RTX 3080", "H100-pcie": "H100 PCIe"}.items():
        assert room.find_device(spoken, "auto")[0] == name
    with pytest.raises(UserError, match=r"plan_device='h10': expected b200 \| h200 \| .* \| 3080"):
        plan(settings("--dataset=nothing"), 1, "h10")
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match="device='cuda:1': this machine has none"):
            plan(settings("--dataset=nothing", "--device=cuda:1"), 1, None)
    for device, dtype in (("t4", "float16"), ("a100", "bfloat16")):
        assert f" in {dtype};" in plan(settings("--dataset=nothing"), 1, device)


WARNINGS = {
    "a step": ["--gradient_accumulation_steps=8"],
    "lr_decay_iters": ["--lr_decay_iters=4000"],
    "warmup_iters": ["--warmup_iters=5000"],
    "block_size": ["--n_layer=2", "--n_embd=48", "--block_size=30000"],
    "epochs": ["--max_iters=5000", "--n_embd=12"],
    "memory": ["--batch_size=480", "--gradient_accumulation_steps=1"],
    "not for the checkpoint's": ["--init_from=resume"],
}


@pytest.mark.parametrize("about", [None, *WARNINGS])
def test_warnings_appear_where_they_should_and_nowhere_else(data_dir, about):
    arguments = ["--max_iters=5000", "--dataset=nothing"]
    if about in ("block_size", "epochs"):
        arguments = ["--max_iters=1", "--warmup_iters=0", f"--data_dir={data_dir}", "--dataset=tiny", "--batch_size=1"]
        arguments += ["--gradient_accumulation_steps=1"]
    text = plan(settings(*arguments, *WARNINGS.get(about, [])), 1, "a100")
    found = [line for line in text.splitlines() if line.startswith("warning: ")]
    assert len(found) == (about is not None)
    assert all(about in line for line in found)


def test_warnings_know_finetuning_and_a_constant_learning_rate():
    cfg = settings("configs/finetune_shakespeare.py", "--dataset=nothing")
    assert room.concerns(cfg, 1_557_611_200, None) == []
    cfg = settings("--decay_lr=False", "--warmup_iters=10", "--max_iters=5", "--lr_decay_iters=3")
    assert room.concerns(cfg, 10**9, (50257, 10**12, 10**12)) == []


@pytest.fixture
def smollm2(tmp_path_factory) -> Path:
    """A folder with the config.json of SmolLM2-135M, in place of a download."""
    folder = tmp_path_factory.mktemp("smollm2")
    theirs = {"model_type": "llama", "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536}
    theirs |= {"num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3}
    theirs |= {"max_position_embeddings": 8192, "rope_theta": 100000, "tie_word_embeddings": True}
    (folder / "config.json").write_text(json.dumps(theirs))
    return folder


QUICK = {"finetune_chat", "train_gpt2", "train_shakespeare_char_cpu"}
CONFIGS = [
    pytest.param(path, marks=[] if path.stem in QUICK else pytest.mark.slow, id=path.stem)
    for path in sorted((ROOT / "configs").glob("*.py"))
]


@pytest.mark.parametrize("path", CONFIGS)
def test_the_shipped_configs_are_planned_and_nothing_is_written(tmp_path, monkeypatch, path, smollm2):
    monkeypatch.chdir(tmp_path)
    flags = ["--data_dir=nothing"]
    if "/" in settings(str(path)).init_from:
        flags.append(f"--init_from={smollm2}")
    for world_size, device in itertools.product((1, 8 if path.stem == "train_gpt2" else 1), (None, "h100")):
        text = plan(settings(str(path), *flags), world_size, device)
        assert re.search(r"^memory +[\d.]+ GB at the peak", text, re.MULTILINE), text
        assert max(map(len, text.splitlines())) <= 150
    assert ("step" in lines(text)) == (not path.stem.startswith("eval_"))
    assert list(tmp_path.iterdir()) == []


def test_the_command_plans_gpt2_xl_without_data_and_writes_nothing(command, tmp_path):
    arguments = ("--n_layer=48", "--n_head=25", "--n_embd=1600", "--bias=True", "--plan_device=h100")
    result = command("train.py", "--plan", *arguments)
    assert result.code in (0, None), result.err
    assert lines(result.out)["parameters"].startswith("1,557,686,400: ")
    assert list(tmp_path.iterdir()) == []
