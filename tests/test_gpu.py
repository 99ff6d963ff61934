"""Tests that need a GPU (`make gpu`): training and sampling there equal the CPU's up to rounding."""

import math
from pathlib import Path

import pytest
import torch

from kqv import checkpoint
from kqv.generate import FastGeneration, Reading
from kqv.loss import LARGE_VOCAB, NextTokenLoss
from kqv.optim import orthogonalize
from kqv.passes import Passes
from model import GPT, GPTConfig, KVCache, next_token
from tests.conftest import TINY
from tests.test_distributed import torchrun
from tests.test_train import column

pytestmark = pytest.mark.gpu
DEVICE = "cuda"


@pytest.fixture(autouse=True)
def exact_products():
    yield
    torch.set_float32_matmul_precision("highest")  # train.py takes TF32


def losses(out_dir: Path) -> list[float]:
    return list(column(out_dir, "train_loss").values())


@pytest.mark.parametrize(
    "options, tolerance",
    [
        (("--dtype=float32", "--compile=False"), 2e-3),  # products are in TF32
        (("--dtype=float16", "--compile=False"), 1e-2),
        (("--dtype=bfloat16", "--compile=False", "--activation_checkpointing", "--n_kv_head=1", "--qk_norm"), 2e-2),
        (("--dtype=bfloat16", "--compile=True", "--optimizer=muon", "--position=rope", "--short_conv=2"), 2e-2),
    ],
    ids=str,
)
def test_a_run_has_the_losses_of_a_run_on_the_cpu(train, tmp_path, options, tolerance):
    common = [option for option in options if not option.startswith(("--dtype", "--compile"))]
    run = ("--gradient_accumulation_steps=2", "--max_iters=12", "--eval_interval=6", *common)
    assert train(*run, "--out_dir=on_cpu", "--dtype=float32").code == 0
    result = train(*run, *options, f"--device={DEVICE}", "--out_dir=here")
    assert result.code == 0, result.err
    assert losses(tmp_path / "here") == pytest.approx(losses(tmp_path / "on_cpu"), rel=tolerance)


def test_a_run_can_be_stopped_and_resumed(train, tmp_path):
    run = (f"--device={DEVICE}", "--dtype=float32", "--compile=False", "--lr_decay_iters=12", "--dropout=0.1")
    assert train(*run, "--max_iters=12").code == 0
    assert train(*run, "--max_iters=6", "--out_dir=parts").code == 0
    assert train(*run, "--max_iters=12", "--out_dir=parts", "--init_from=resume").code == 0
    assert losses(tmp_path / "parts") == pytest.approx(losses(tmp_path / "out"), rel=1e-4)


@pytest.mark.parametrize(
    "options",
    [
        ("--dtype=float32",),
        ("--dtype=float16",),
        ("--dtype=bfloat16", "--qk_norm", "--position=rope", "--short_conv=2", "--optimizer=muon"),
    ],
    ids=str,
)
def test_recorded_passes_train_as_those_that_are_not(train, tmp_path, options):
    run = ("--gradient_accumulation_steps=3", "--max_iters=12", "--dropout=0.2", "--compile=False", *options)
    for out_dir, recorded in (("recorded", True), ("plain", False)):
        result = train(*run, f"--device={DEVICE}", f"--cuda_graph={recorded}", f"--out_dir={out_dir}")
        assert result.code == 0, result.err
    assert losses(tmp_path / "recorded") == pytest.approx(losses(tmp_path / "plain"), rel=1e-3)


@pytest.mark.parametrize("recorded", [True, False])
def test_a_bad_step_is_skipped(train, tmp_path, monkeypatch, recorded):
    compute, calls = Passes.__call__, iter(range(10**9))

    def broken(self, *batch):
        loss = compute(self, *batch)
        if next(calls) != 5:
            return loss
        for parameter in self.model.parameters():
            parameter.grad *= math.nan
        return loss * math.nan

    monkeypatch.setattr(Passes, "__call__", broken)
    result = train("--max_iters=12", f"--device={DEVICE}", "--compile=False", f"--cuda_graph={recorded}")
    assert result.code == 0 and "iter 5: SKIPPED" in result.out, result.err
    saved = checkpoint.load(tmp_path / "out" / "ckpt.pt")
    assert all(tensor.isfinite().all() for tensor in saved["model"].values())
    assert all(state["step"] == 11 for state in saved["optimizer"]["state"].values())


def test_one_process_of_torchrun_trains_as_one_without(train, data_dir, tmp_path):
    run = ("--max_iters=6", f"--device={DEVICE}", "--dtype=float32", "--compile=False")
    assert train(*run, "--out_dir=alone").code == 0
    result = torchrun(tmp_path, 1, f"--data_dir={data_dir}", *TINY, *run, "--out_dir=launched")  # with NCCL
    assert result.returncode == 0, result.stderr
    assert losses(tmp_path / "launched") == pytest.approx(losses(tmp_path / "alone"), rel=1e-3)


@pytest.mark.parametrize(
    "dtype, compiled, tolerance",
    [(torch.float32, False, 1e-4), (torch.bfloat16, False, 0.03), (torch.bfloat16, True, 0.03)],
)
def test_the_loss_in_chunks_is_the_cpus(monkeypatch, dtype, compiled, tolerance):
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=LARGE_VOCAB, block_size=300, n_layer=2, n_head=2, n_embd=32))
    x, y = torch.randint(50, (4, 300)), torch.randint(LARGE_VOCAB, (4, 300))
    with monkeypatch.context() as plain:
        plain.setattr("kqv.loss.LARGE_VOCAB", math.inf)
        expected = NextTokenLoss(model)(x, y)
        expected.backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    here = GPT(model.config)
    here.load_state_dict(model.state_dict())
    here.to(DEVICE)
    forward = NextTokenLoss(here)
    forward = torch.compile(forward, dynamic=False, fullgraph=True) if compiled else forward
    with torch.autocast(DEVICE, dtype, enabled=dtype != torch.float32):
        loss = forward(x.to(DEVICE), y.to(DEVICE))
    loss.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=tolerance)
    for name, parameter in here.named_parameters():
        assert (parameter.grad.cpu() - gradients[name]).norm() <= tolerance * gradients[name].norm(), name


def test_orthogonal_updates_in_bfloat16():
    torch.manual_seed(0)
    (updates,) = orthogonalize([torch.randn(3, 96, 384, device=DEVICE, dtype=torch.bfloat16)])
    singular = torch.linalg.svdvals(updates.float())
    assert ((singular > 0.3) & (singular < 1.7)).all()


@pytest.mark.parametrize("compiled", [False, True])
def test_greedy_text_is_the_cpus(train, command, compiled):
    assert train("--max_iters=150", "--block_size=32", "--dtype=float32", "--short_conv=2").code == 0
    greedy = ("sample.py", "--temperature=0", "--num_samples=2", "--max_new_tokens=80", "--start=the ")
    written = command(*greedy, "--device=cpu", "--dtype=float32")
    assert written.code == 0 and len(written.out) > 160
    here = command(*greedy, f"--device={DEVICE}", "--dtype=float32", f"--compile={compiled}")
    assert here.out == written.out, here.err


def on_gpu(**switches) -> GPT:
    torch.manual_seed(0)
    sizes = {"vocab_size": 50, "block_size": 32, "n_layer": 2, "n_head": 4, "n_embd": 64}
    return GPT(GPTConfig(**sizes | switches)).to(DEVICE).eval()


@pytest.mark.parametrize(
    "switches",
    [{}, {"position": "rope", "n_kv_head": 2, "qk_norm": True}, {"short_conv": 2}, {"block_size": 2}],
    ids=str,
)
@pytest.mark.parametrize(
    "options",
    [{"temperature": 0}, {"top_k": 5, "temperature": 0.7}, {"repetition_penalty": 1.5, "top_p": 0.9}],
    ids=str,
)
def test_the_recorded_step_writes_what_the_plain_loop_writes(switches, options):
    model = on_gpu(**switches)
    generate = FastGeneration(model, KVCache, next_token, compile=False)
    for T in (1, 7):  # the second prompt replays the graph of the first
        idx = torch.arange(T, device=DEVICE)[None]
        seeds = [[torch.Generator().manual_seed(seed) for seed in range(3)] for _ in range(2)]
        expected = torch.cat(list(model.generate(idx, 70, seeds[0], **options)), dim=1)  # past two refills
        assert torch.cat(list(generate(idx, 70, seeds[1], **options)), dim=1).tolist() == expected.tolist()
    assert generate.step.graph is not None


def test_a_token_waits_for_nothing():
    model = on_gpu(block_size=64)
    generate = FastGeneration(model, KVCache, next_token, compile=False)
    tokens = generate(torch.zeros(1, 4, dtype=torch.int64, device=DEVICE), 40, [torch.Generator()])
    next(tokens)
    torch.cuda.set_sync_debug_mode("error")
    try:
        readings = [generate.step.advance() or Reading(generate.step.drawn[:, :1]) for _ in range(10)]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(readings) == 10


def test_a_damaged_model_is_an_error_also_in_a_graph():
    model = on_gpu()
    model.lm_head.weight.data[3] = math.nan
    generate = FastGeneration(model, KVCache, next_token, compile=False)
    with pytest.raises(FloatingPointError, match="not all finite"):
        list(generate(torch.zeros(1, 4, dtype=torch.int64, device=DEVICE), 40, [torch.Generator()]))
    torch.cuda.synchronize()  # no assertion has failed on the device


def test_int8_is_refused(train, command):
    assert train("--max_iters=1").code == 0
    result = command("sample.py", f"--device={DEVICE}", "--quantize=int8")
    assert result.code == 2 and "works on x86 CPUs" in result.err
