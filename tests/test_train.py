"""train.py as a whole: the losses it reaches, what it writes, how it resumes."""

import contextlib
import errno
import fcntl
import hashlib
import io
import json
import math
import os
import pickle
import pty
import random
import shutil
import signal
import struct
import subprocess
import sys
import termios
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from torch.nn import functional as F

from kqv import checkpoint, distributed
from kqv.build import restore_model
from kqv.data import Split
from kqv.errors import UserError
from kqv.log import Log
from kqv.loss import NextTokenLoss
from kqv.machine import peak_flops
from kqv.meta import read_meta
from kqv.rundir import checkpoints, hold
from kqv.tokenizer import from_description
from model import GPT, GPTConfig
from tests.conftest import ROOT, TINY
from tests.test_checkpoint import nanogpt_checkpoint


def metrics(out_dir: Path) -> list[dict]:
    return [json.loads(line) for line in (out_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def column(out_dir: Path, key: str) -> dict[int, float]:
    return {record["iter"]: record[key] for record in metrics(out_dir) if key in record}


def weights(path: Path) -> dict[str, torch.Tensor]:
    return checkpoint.load(path)["model"]


def assert_same_weights(a: Path, b: Path) -> None:
    ours, theirs = weights(a), weights(b)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


# -- the right losses --------------------------------------------------------------------------------------------------


def test_losses_are_those_of_hugging_faces_model_in_a_loop_of_plain_pytorch(command, tmp_path):
    torch.manual_seed(0)
    hf = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            **{"n_positions": 16, "n_embd": 16, "n_layer": 2, "n_head": 2},
            **{"embd_pdrop": 0, "attn_pdrop": 0, "resid_pdrop": 0},
        )
    ).train()
    hf.save_pretrained(tmp_path / "gpt2")
    folder = tmp_path / "data" / "ids"
    folder.mkdir(parents=True)
    for name, n in (("train", 5000), ("val", 500)):  # without meta: GPT-2's ids, as in nanoGPT
        np.random.default_rng(n).integers(50257, size=n).astype("<u2").tofile(folder / f"{name}.bin")
    result = command(
        *("train.py", "--init_from=gpt2", "--data_dir=data", "--dataset=ids", "--device=cpu", "--block_size=16"),
        *("--batch_size=3", "--gradient_accumulation_steps=2", "--max_iters=6", "--eval_iters=1", "--seed=5"),
        *("--learning_rate=1e-2", "--warmup_iters=2", "--lr_decay_iters=5", "--min_lr=1e-3", "--grad_clip=0.5"),
    )
    assert result.code == 0, result.err

    split = Split(folder, "train", 16, read_meta(folder))
    matrices = [p for p in hf.parameters() if p.dim() >= 2]
    rest = [p for p in hf.parameters() if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95))
    rates = [1e-2 / 3, 2e-2 / 3, 1e-2]  # warm-up, then half a cosine from 2 to 5
    rates += [1e-3 + 0.5 * (1 + math.cos(math.pi * (i - 2) / 3)) * 9e-3 for i in (3, 4)] + [1e-3]
    for iter_num, rate in enumerate(rates):
        x, y = split.batch(5, iter_num * 6, 6)
        loss = F.cross_entropy(hf(x).logits.flatten(0, 1), y.flatten())
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(hf.parameters(), 0.5)
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        optimizer.zero_grad()
        out = tmp_path / "out"
        assert column(out, "train_loss")[iter_num] == pytest.approx(loss.item(), rel=1e-5)
        assert column(out, "grad_norm")[iter_num] == pytest.approx(norm.item(), rel=1e-3)
        assert column(out, "lr")[iter_num] == pytest.approx(rate, rel=1e-9)


def test_it_learns(train, tmp_path):
    train("--max_iters=150", "--eval_interval=150", "--batch_size=16", "--log_interval=50")
    losses = column(tmp_path / "out", "val_loss")
    assert losses[0] == pytest.approx(math.log(28), abs=0.2)
    assert losses[150] < 1.6


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_trains_as_float32_does_but_for_rounding(train, tmp_path, dtype):
    train("--max_iters=20", "--out_dir=single", "--dtype=float32")
    result = train("--max_iters=20", "--out_dir=half", f"--dtype={dtype}")
    assert result.code == 0, result.err
    single, half = (column(tmp_path / name, "train_loss") for name in ("single", "half"))
    assert half != single
    assert all(half[i] == pytest.approx(single[i], abs=0.05) for i in single)
    assert weights(tmp_path / "half" / "ckpt.pt")["lm_head.weight"].dtype == torch.float32
    assert ("scale" in checkpoint.load(tmp_path / "half" / "ckpt.pt")["scaler"]) == (dtype == "float16")


@pytest.mark.parametrize("switches", [["--position=rope", "--norm=rmsnorm", "--mlp=swiglu", "--n_kv_head=1"]])
def test_switches_reach_the_model_and_come_back(train, tmp_path, switches):
    assert train("--max_iters=4", *switches, "--tie_embeddings=False", "--qk_norm").code == 0
    args = checkpoint.load(tmp_path / "out" / "ckpt.pt")["model_args"]
    assert (args["position"], args["norm"], args["mlp"], args["n_kv_head"]) == ("rope", "rmsnorm", "swiglu", 1)
    assert args["qk_norm"] is True and args["tie_embeddings"] is False
    assert train("--init_from=resume", "--max_iters=6").code == 0


# -- the same run, cut differently -------------------------------------------------------------------------------------


def test_accumulating_gradients_is_a_larger_batch(train, tmp_path):
    train("--max_iters=10", "--batch_size=12", "--out_dir=large")
    train("--max_iters=10", "--batch_size=3", "--gradient_accumulation_steps=4", "--out_dir=small")
    large, small = (column(tmp_path / name, "train_loss") for name in ("large", "small"))
    assert all(small[i] == pytest.approx(large[i], abs=1e-5) for i in range(10))


def test_the_same_command_gives_the_same_run_and_another_seed_another(train, tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        train("--max_iters=5", "--dropout=0.2", f"--seed={seed}", f"--out_dir={name}")
    assert_same_weights(tmp_path / "a" / "ckpt.pt", tmp_path / "b" / "ckpt.pt")
    assert column(tmp_path / "a", "train_loss") == column(tmp_path / "b", "train_loss")
    assert column(tmp_path / "a", "train_loss") != column(tmp_path / "c", "train_loss")


def test_evaluating_more_often_changes_nothing_about_training(train, tmp_path):
    train("--max_iters=6", "--dropout=0.2", "--eval_interval=1", "--eval_iters=5", "--out_dir=often")
    train("--max_iters=6", "--dropout=0.2", "--eval_interval=100", "--out_dir=seldom")
    assert_same_weights(tmp_path / "often" / "ckpt.pt", tmp_path / "seldom" / "ckpt.pt")


def test_validation_loss_is_identical_whatever_the_batch_size(train, tmp_path):
    train("--max_iters=5")
    for eval_iters in (0, 3):
        lines = {
            train("--init_from=resume", "--eval_only", f"--eval_iters={eval_iters}", f"--batch_size={n}").out.split(
                "\n"
            )[-2]
            for n in (1, 5, 64)
        }
        assert len(lines) == 1, lines


def test_validation_loss_over_the_whole_split_is_the_mean_over_its_tokens(train, tmp_path, data_dir):
    train("--max_iters=5", "--eval_iters=0")
    path = tmp_path / "out" / "ckpt.pt"
    model = restore_model(checkpoint.load(path), path, GPT, GPTConfig).eval()
    tokens = torch.from_numpy(np.fromfile(data_dir / "tiny" / "val.bin", dtype="<u2").astype(np.int64))
    nats = 0.0
    for start in range(0, len(tokens) - 1, 16):  # each target once, with at most 16 tokens of context
        window = tokens[start : start + 17]
        nats += model(window[None, :-1], window[None, 1:])[1].item() * (len(window) - 1)
    expected = nats / (len(tokens) - 1)
    record = metrics(tmp_path / "out")[-1]
    assert record["val_loss"] == pytest.approx(expected, abs=1e-5)
    stated = json.loads((data_dir / "tiny" / "meta.json").read_text(encoding="utf-8"))["splits"]["val"]
    assert record["val_bpb"] == pytest.approx(expected / math.log(2) * stated["tokens"] / stated["bytes"], abs=1e-5)


# -- files of a run ----------------------------------------------------------------------------------------------------


def test_what_a_run_leaves_behind(train, tmp_path):
    result = train("--max_iters=7", "--eval_interval=3", "--wandb_project=p=q", "--seed=4")
    assert result.code == 0
    out = tmp_path / "out"
    assert sorted(path.name for path in out.iterdir()) == [
        ".lock",
        "best.pt",
        "ckpt.pt",
        "config.json",
        "loss.png",
        "metrics.jsonl",
    ]
    records = metrics(out)
    assert [record["iter"] for record in records] == list(range(8))
    assert list(column(out, "val_loss")) == [0, 3, 6, 7]
    assert all({"time", "elapsed_seconds", "tokens"} <= record.keys() for record in records)
    assert [record["tokens"] for record in records] == [64 * i for i in range(8)]
    assert all({"train_loss", "grad_norm", "lr", "tokens_per_second"} <= record.keys() for record in records[:7])
    times = [record["elapsed_seconds"] for record in records]
    assert times == sorted(times)
    saved = json.loads((out / "config.json").read_text(encoding="utf-8"))
    assert saved["config"]["seed"] == 4 and saved["origin"]["seed"] == "flag"
    assert saved["config"]["beta1"] == 0.9 and saved["origin"]["beta1"] == "default"
    assert saved["environment"]["torch"] == torch.__version__ and saved["data"]["splits"]["train"]["sha256"]
    assert (out / "loss.png").read_bytes().startswith(b"\x89PNG")
    last = checkpoint.load(out / "ckpt.pt")
    assert last["iter_num"] == 7 and last["tokenizer"]["kind"] == "char"
    assert last["config"]["wandb_project"] == "p=q"
    assert not any(name.startswith(("_orig_mod.", "module.")) for name in last["model"])
    best = checkpoint.load(out / "best.pt")
    assert best["val_loss"] == last["best_val_loss"] == min(column(out, "val_loss").values())


def test_lines_in_a_pipe_are_nanogpts(train):
    lines = train("--max_iters=4", "--eval_interval=2", "--log_interval=2").out.splitlines()
    shape = [" ".join(line.split()[:2]) for line in lines]
    assert shape[-6:-1] == ["step 0:", "iter 0:", "step 2:", "iter 2:", "step 4:"]
    assert lines[-6].startswith("step 0: train loss ") and ", val loss " in lines[-6]
    assert ": loss " in lines[-5] and "ms, " in lines[-5] and " tok/s" in lines[-5]


def test_best_is_not_overwritten_by_worse(train, tmp_path):
    # the learning rate is far too high, so the first evaluation stays the best
    train("--max_iters=6", "--eval_interval=2", "--learning_rate=3", "--warmup_iters=0", "--decay_lr=False")
    losses = column(tmp_path / "out", "val_loss")
    assert losses[0] == min(losses.values())
    assert checkpoint.load(tmp_path / "out" / "best.pt")["iter_num"] == 0
    last = checkpoint.load(tmp_path / "out" / "ckpt.pt")
    assert last["iter_num"] == 6 and last["best_val_loss"] == losses[0]


@pytest.mark.parametrize("always", [True, False])
def test_saving_always_or_only_when_better(train, monkeypatch, always):
    # the learning rate makes every evaluation worse; the end is saved anyway
    options = ["--eval_interval=2", "--learning_rate=3", "--warmup_iters=0", f"--always_save_checkpoint={always}"]
    saves = []
    monkeypatch.setattr(checkpoint, "save", lambda state, _, best, __: saves.append((state["iter_num"], best)))
    train("--max_iters=5", *options)
    assert saves == [(0, True), *([(2, False), (4, False)] if always else []), (5, False)]


def test_a_run_shorter_than_eval_interval_is_saved(train, tmp_path):
    train("--max_iters=3", "--eval_interval=2000")
    assert checkpoint.load(tmp_path / "out" / "ckpt.pt")["iter_num"] == 3


def test_an_earlier_run_is_put_aside_not_overwritten(train, tmp_path):
    train("--max_iters=3", "--eval_interval=1")
    result = train("--max_iters=2", "--eval_interval=2")
    assert result.code == 0 and "the earlier run in out was moved to out/previous" in result.out
    assert checkpoint.load(tmp_path / "out" / "previous" / "ckpt.pt")["iter_num"] == 3
    assert len(metrics(tmp_path / "out" / "previous")) == 4
    assert checkpoint.load(tmp_path / "out" / "ckpt.pt")["iter_num"] == 2
    assert len(metrics(tmp_path / "out")) == 3


def test_an_earlier_runs_last_few_are_put_aside_too(train, tmp_path):
    train("--max_iters=2", "--save_interval=1", "--keep_last=2")
    train("--max_iters=4", "--save_interval=1", "--keep_last=2")
    for folder, kept in (("out/previous", (1, 2)), ("out", (3, 4))):
        found = {path.name: checkpoint.load(path)["iter_num"] for path in (tmp_path / folder).glob("ckpt-*.pt")}
        assert found == {f"ckpt-{iter_num:08d}.pt": iter_num for iter_num in kept}
    train("--max_iters=1")  # nothing is left of the run before the previous one
    assert sorted(path.name for path in (tmp_path / "out" / "previous").glob("ckpt-*.pt")) == [
        *("ckpt-00000003.pt", "ckpt-00000004.pt")
    ]


def test_a_run_that_goes_on_from_its_first_save_is_no_earlier_run(train, tmp_path):
    train("--max_iters=3")
    train("--max_iters=3", "--max_minutes=0")  # stops at iteration 0
    result = train("--init_from=resume", "--max_iters=2", "--learning_rate=0", "--max_minutes=None")
    assert result.code == 0 and "earlier run" not in result.out
    assert checkpoint.load(tmp_path / "out" / "previous" / "ckpt.pt")["iter_num"] == 3
    assert checkpoint.load(tmp_path / "out" / "ckpt.pt")["iter_num"] == 2
    assert checkpoint.load(tmp_path / "out" / "best.pt")["iter_num"] == 0


def test_no_iterations_at_all_is_an_evaluation_that_saves(train, tmp_path):
    assert train("--max_iters=0").code == 0
    assert checkpoint.load(tmp_path / "out" / "ckpt.pt")["iter_num"] == 0


def test_a_run_that_diverges_keeps_its_last_good_checkpoint(train, tmp_path):
    result = train("--max_iters=40", "--eval_interval=4", "--learning_rate=1e18", "--warmup_iters=0", "--grad_clip=0")
    assert result.code == 2
    assert "out has the last checkpoint" in result.err
    for name in ("ckpt.pt", "best.pt"):
        assert all(tensor.isfinite().all() for tensor in weights(tmp_path / "out" / name).values())


# -- resuming ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        [],
        ["--dropout=0.3", "--gradient_accumulation_steps=3"],
        ["--dtype=float16"],
        ["--activation_checkpointing", "--dropout=0.3"],
        ["--optimizer=muon", "--schedule=wsd"],
    ],
)
def test_stopping_and_resuming_is_the_same_run(train, command, data_dir, tmp_path, options):
    train("--max_iters=10", "--lr_decay_iters=10", "--eval_interval=3", "--out_dir=straight", *options)
    train("--max_iters=5", "--lr_decay_iters=10", "--eval_interval=3", "--out_dir=halves", *options)
    # only the machine's settings and max_iters are given again; the rest is in the checkpoint
    machine = [f"--data_dir={data_dir}", "--device=cpu", *(o for o in options if o.startswith("--dtype"))]
    result = command("train.py", "--init_from=resume", "--out_dir=halves", "--max_iters=10", *machine)
    assert result.code == 0, result.err
    straight, halves = tmp_path / "straight", tmp_path / "halves"
    assert_same_weights(straight / "ckpt.pt", halves / "ckpt.pt")
    for name in ("optimizer", "muon") if "--optimizer=muon" in options else ("optimizer",):
        a, b = (checkpoint.load(folder / "ckpt.pt")[name]["state"] for folder in (straight, halves))
        assert a and all(torch.equal(a[i][key], b[i][key]) for i in a for key in a[i])
    assert [record["iter"] for record in metrics(halves)] == list(range(11))
    for key in ("train_loss", "grad_norm", "lr"):
        assert column(straight, key) == column(halves, key)
    ends = column(halves, "val_loss")
    assert all(ends[i] == loss for i, loss in column(straight, "val_loss").items() if i != 5)


def test_going_on_longer_keeps_what_was_measured_at_the_first_end(train, tmp_path):
    train("--max_iters=5", "--eval_interval=4")
    train("--init_from=resume", "--max_iters=7", "--eval_interval=4")
    assert list(column(tmp_path / "out", "val_loss")) == [0, 4, 5, 7]
    assert list(column(tmp_path / "out", "train_loss")) == list(range(7))


def test_activation_checkpointing_changes_nothing(train, tmp_path):
    for name, option in (("kept", False), ("again", True)):
        train("--max_iters=5", "--dropout=0.2", f"--activation_checkpointing={option}", f"--out_dir={name}")
    assert_same_weights(tmp_path / "kept" / "ckpt.pt", tmp_path / "again" / "ckpt.pt")


def test_samples_while_training_are_the_sampling_functions_and_change_nothing(train, tmp_path, data_dir):
    result = train("--max_iters=6", "--dropout=0.2", "--sample_interval=3", "--out_dir=samples")
    train("--max_iters=6", "--dropout=0.2", "--out_dir=none")
    assert_same_weights(tmp_path / "samples" / "ckpt.pt", tmp_path / "none" / "ckpt.pt")
    samples = column(tmp_path / "samples", "samples")
    assert list(samples) == [0, 3, 6]
    saved = checkpoint.load(tmp_path / "samples" / "ckpt.pt")
    model, tokenizer = (
        restore_model(saved, tmp_path, GPT, GPTConfig).eval(),
        from_description(saved["tokenizer"]),
    )
    for number, text in enumerate(samples[6]):
        prompt = Split(data_dir / "tiny", "val", 16, read_meta(data_dir / "tiny")).batch(1337, 0, 1)[0]
        generators = [torch.Generator().manual_seed(1337 + number)]
        new = torch.cat(
            list(model.generate(prompt, 100, generators, vocab_size=tokenizer.vocab_size, temperature=0.8)), dim=1
        )
        assert text == tokenizer.decode(prompt[0].tolist() + new[0].tolist())
        assert f"-- iter 6, sample {number} --\n{text}" in result.out


def test_a_jump_of_the_loss_is_noted(train, tmp_path, monkeypatch):
    forward, calls = NextTokenLoss.forward, iter(range(10**9))

    def jumping(self, *args):
        return forward(self, *args) * (3 if self.training and next(calls) == 60 else 1)

    monkeypatch.setattr(NextTokenLoss, "forward", jumping)
    result = train("--max_iters=70", "--log_interval=1", "--learning_rate=1e-4")
    spikes = column(tmp_path / "out", "loss_spike")
    assert list(spikes) == [60]
    losses = column(tmp_path / "out", "train_loss")
    before = [losses[i] for i in range(10, 60)]
    assert spikes[60] == pytest.approx((losses[60] - np.mean(before)) / np.std(before, ddof=1), rel=1e-6)
    assert "iter 60: loss spike" in result.out


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler on CPUs")
def test_a_compiled_run_resumes_to_the_bit(train, tmp_path):
    run = ["--compile=True", "--dropout=0.2", "--lr_decay_iters=6", "--eval_interval=2"]
    train("--max_iters=6", "--out_dir=straight", *run)
    for max_iters in (4, 6):  # evaluated at 4 in both
        assert train("--init_from=auto", f"--max_iters={max_iters}", "--out_dir=halves", *run).code == 0
    assert_same_weights(tmp_path / "straight" / "ckpt.pt", tmp_path / "halves" / "ckpt.pt")
    assert column(tmp_path / "straight", "train_loss") == column(tmp_path / "halves", "train_loss")


def test_a_run_in_float32_goes_on_in_float16_and_a_half_precision_run_stays_one(train, command, data_dir, tmp_path):
    train("--max_iters=2")
    resume = ("train.py", "--init_from=resume", f"--data_dir={data_dir}", "--device=cpu")
    result = command(*resume, "--max_iters=4", "--dtype=float16")
    assert result.code == 0, result.err
    assert "torch.float16" in command(*resume, "--max_iters=5").out


def test_resuming_needs_no_other_setting_than_the_folder(train, command, tmp_path, data_dir):
    train("--max_iters=3", "--lr_decay_iters=6")
    result = command("train.py", "--init_from=resume", f"--data_dir={data_dir}", "--max_iters=6", "--device=cpu")
    assert result.code == 0, result.err
    origin = json.loads((tmp_path / "out" / "config.json").read_text(encoding="utf-8"))["origin"]
    assert (origin["dataset"], origin["max_iters"], origin["beta1"]) == ("checkpoint", "flag", "checkpoint")


def test_eval_only_writes_nothing_and_trains_nothing(train, tmp_path):
    train("--max_iters=3")
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    result = train("--init_from=resume", "--eval_only=True", "--max_iters=10")
    assert result.code == 0
    assert result.out.splitlines()[-1].startswith("step 3: train loss ")
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before
    assert train("--eval_only", "--out_dir=none").code == 0
    assert not (tmp_path / "none").exists()


def test_a_finished_run_is_left_as_it_is(train, tmp_path):
    train("--max_iters=3")
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    result = train("--init_from=resume", "--max_iters=2", "--block_size=8")
    assert result.code == 0 and "nothing to do: out is at iteration 3 of max_iters=2" in result.out
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before


def test_a_shorter_context_on_resume(train, tmp_path):
    train("--max_iters=3")
    result = train("--init_from=resume", "--block_size=8", "--max_iters=6")
    assert result.code == 0, result.err
    assert checkpoint.load(tmp_path / "out" / "ckpt.pt")["model_args"]["block_size"] == 8
    assert checkpoint.load(tmp_path / "out" / "ckpt.pt")["iter_num"] == 6


def test_a_resumed_run_keeps_the_checkpoints_model_and_says_so(train, tmp_path):
    train("--max_iters=3")
    result = train("--init_from=resume", "--n_layer=5", "--block_size=1024", "--max_iters=4")
    assert result.code == 0, result.err
    assert "n_layer=2 as in the checkpoint, not 5" in result.out
    assert "block_size=16 as in the checkpoint, not 1024" in result.out


@pytest.mark.parametrize("dataset", ["meta.json", "meta.pkl"])
def test_nanogpts_checkpoint_is_resumed(train, tmp_path, data_dir, dataset):
    saved, model, _ = nanogpt_checkpoint()
    (tmp_path / "out").mkdir()
    torch.save(saved, tmp_path / "out" / "ckpt.pt")
    folder = tmp_path / "data" / "tiny"
    folder.mkdir(parents=True)
    ids = np.random.default_rng(0).integers(61, size=3000).astype("<u2")
    ids[:2500].tofile(folder / "train.bin")
    ids[2500:].tofile(folder / "val.bin")
    if dataset == "meta.pkl":
        chars = [chr(48 + i) for i in range(61)]
        meta = {"vocab_size": 61, "itos": dict(enumerate(chars)), "stoi": {c: i for i, c in enumerate(chars)}}
        (folder / "meta.pkl").write_bytes(pickle.dumps(meta))
    else:
        description = {"kind": "char", "chars": "".join(chr(48 + i) for i in range(61)), "end_of_text": False}
        meta = {"tokenizer": description, "vocab_size": 61, "dtype": "uint16", "splits": {}}
        (folder / "meta.json").write_text(json.dumps(meta), encoding="utf-8")
    evaluated = train("--init_from=resume", "--data_dir=data", "--eval_only=True", "--eval_iters=0")
    assert evaluated.code == 0, evaluated.err
    tokens, nats = torch.from_numpy(ids[2500:].astype(np.int64)), 0.0
    model.eval()
    for start in range(0, len(tokens) - 1, 16):
        window = tokens[start : start + 17]
        nats += model(window[None, :-1], window[None, 1:])[1].item() * (len(window) - 1)
    expected = nats / (len(tokens) - 1)
    assert float(evaluated.out.split("val loss ")[1]) == pytest.approx(expected, abs=1e-4)
    result = train("--init_from=resume", "--data_dir=data", "--max_iters=6", "--eval_iters=1")
    assert result.code == 0, result.err
    assert checkpoint.load(tmp_path / "out" / "ckpt.pt")["iter_num"] == 6


# -- signals, full disks, bad steps ------------------------------------------------------------------------------------


def start(tmp_path: Path, data_dir: Path, *arguments: object) -> subprocess.Popen:
    settings = [f"--data_dir={data_dir}", *TINY, "--dtype=float32", *map(str, arguments)]  # dtype: see conftest.py
    command = [sys.executable, ROOT / "train.py", *settings]
    return subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for_iteration(process: subprocess.Popen, iter_num: int) -> None:
    for line in process.stdout:
        if line.startswith(f"iter {iter_num}:"):
            return
    raise AssertionError(process.stderr.read())


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_run_that_is_told_to_stop_saves_and_the_same_command_goes_on(train, tmp_path, data_dir, number):
    run = ["--init_from=auto", "--dropout=0.2", "--max_iters=300", "--eval_interval=110", "--out_dir=cut"]
    process = start(tmp_path, data_dir, *run)
    wait_for_iteration(process, 20)
    process.send_signal(number)
    out, error = process.communicate(timeout=60)
    assert process.returncode == 75
    assert error.splitlines() == [f"{number.name}: saving after this micro-batch; Ctrl-C stops at once"]
    assert f"({number.name}), all is saved; --init_from=resume continues" in out
    stopped = checkpoint.load(tmp_path / "cut" / "ckpt.pt")["iter_num"]
    assert 20 < stopped < 300
    assert train(*run).code == 0
    assert train(*run[:-1], "--out_dir=straight").code == 0
    assert_same_weights(tmp_path / "cut" / "ckpt.pt", tmp_path / "straight" / "ckpt.pt")
    for key in ("train_loss", "val_loss"):
        assert column(tmp_path / "cut", key) == column(tmp_path / "straight", key)
    assert "nothing to do" in train(*run).out


def test_a_second_control_c_stops_at_once(tmp_path, data_dir):
    process = start(tmp_path, data_dir, "--max_iters=10000", "--eval_interval=30", "--eval_iters=0", "--block_size=2")
    wait_for_iteration(process, 29)  # now it evaluates, which takes a while
    process.send_signal(signal.SIGINT)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert process.returncode in (75, 130) and "Traceback" not in error  # the two signals can arrive as one


@pytest.mark.parametrize("errors_too", [False, True])
def test_a_run_whose_output_nobody_reads_any_more_goes_on(tmp_path, data_dir, errors_too):
    process = start(tmp_path, data_dir, "--max_iters=300", "--eval_interval=100000")
    wait_for_iteration(process, 20)
    process.stdout.close()
    if errors_too:  # 2>&1 | tee log
        process.stderr.close()
    assert process.wait(timeout=60) == 0
    if not errors_too:
        expected = "the output cannot be written ([Errno 32] Broken pipe); the run continues without it\n"
        assert process.stderr.read() == expected
        process.stderr.close()
    assert checkpoint.load(tmp_path / "out" / "ckpt.pt")["iter_num"] == 300
    assert list(column(tmp_path / "out", "train_loss")) == list(range(300))


def test_a_run_whose_output_nobody_reads_can_still_be_stopped(tmp_path, data_dir):
    process = start(tmp_path, data_dir, "--max_iters=100000", "--eval_interval=100000")
    wait_for_iteration(process, 20)
    process.stdout.close()
    process.stderr.close()
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=60) == 75
    assert 20 <= checkpoint.load(tmp_path / "out" / "ckpt.pt")["iter_num"] < 100000


def test_a_step_of_many_micro_batches_stops_between_them(train, tmp_path, data_dir):
    run = ["--max_iters=9", "--gradient_accumulation_steps=400000", "--eval_interval=1000", "--dropout=0.1"]
    process = start(tmp_path, data_dir, *run, "--out_dir=cut")
    for line in process.stdout:
        if line.startswith("step 0:"):  # the first step begins, which would take a quarter of an hour
            break
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 75 and "stopped at iteration 0 (SIGTERM), all is saved" in out
    saved = checkpoint.load(tmp_path / "cut" / "ckpt.pt")  # the half-done step is dropped
    assert (saved["iter_num"], saved["sequences"]) == (0, 0) and saved["optimizer"]["state"] == {}
    short = ["--gradient_accumulation_steps=2", "--max_iters=3", "--dropout=0.1"]
    assert train("--init_from=resume", "--out_dir=cut", *short).code == 0
    assert train("--out_dir=straight", *short).code == 0
    assert_same_weights(tmp_path / "cut" / "ckpt.pt", tmp_path / "straight" / "ckpt.pt")


def test_max_minutes_ends_a_step_between_micro_batches_and_is_not_restored(train, tmp_path):
    result = train("--max_minutes=0.02", "--max_iters=3", "--gradient_accumulation_steps=400000")
    assert result.code == 75 and "stopped at iteration 0 (max_minutes=0.02)" in result.out
    result = train("--init_from=auto", "--gradient_accumulation_steps=1")  # as a scheduler that repeats the command
    assert result.code == 0 and checkpoint.load(tmp_path / "out" / "ckpt.pt")["iter_num"] == 3


def fake_module(folder: Path, name: str, source: str) -> dict[str, str]:
    """An environment in which `import name` runs `source`, so that a test can act during the start."""
    folder.mkdir()
    (folder / f"{name}.py").write_text(source, encoding="utf-8")
    return os.environ | {"PYTHONPATH": str(folder)}


@pytest.mark.parametrize("script", ["train.py", "sample.py"])
@pytest.mark.parametrize("module", ["difflib", "torch"])  # imported while settings are read, and after that
def test_control_c_while_python_imports_shows_no_traceback(kqv, tmp_path, script, module):
    source = "import os, signal, time\nos.kill(os.getpid(), signal.SIGINT)\ntime.sleep(9)"
    result = kqv(script, env=fake_module(tmp_path / "fake", module, source))
    assert result.returncode in (130, -signal.SIGINT, 1) and "Traceback" not in result.stderr
    assert result.stderr in ("", "error: interrupted\n") and result.stdout == ""


def test_sigterm_while_torch_is_imported_is_an_early_stop(kqv, tmp_path):
    source = "import os, signal, time\nos.kill(os.getpid(), signal.SIGTERM)\ntime.sleep(9)"
    result = kqv("train.py", env=fake_module(tmp_path / "fake", "torch", source))
    assert (result.returncode, result.stderr) == (75, "SIGTERM: stopped before the first step\n")


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"RANK": "0"}, "WORLD_SIZE=''"),
        ({"RANK": "zero", "WORLD_SIZE": "2", "MASTER_ADDR": "a", "MASTER_PORT": "1"}, "RANK='zero'"),
        ({"RANK": "0", "WORLD_SIZE": "1"}, "MASTER_ADDR=''"),
        (
            {"RANK": "2", "WORLD_SIZE": "2", "MASTER_ADDR": "a", "MASTER_PORT": "1"},
            "RANK=2: must be below WORLD_SIZE=2",
        ),
    ],
)
def test_an_environment_that_torchrun_would_not_set_is_one_line(train, monkeypatch, wrong, message):
    for key, value in wrong.items():
        monkeypatch.setenv(key, value)
    result = train("--max_iters=1")
    assert result.code == 2 and result.err.count("\n") == 1 and message in result.err


def test_other_data_begin_best_and_patience_anew(train, tmp_path, data_dir):
    assert train("--max_iters=40", "--eval_interval=20", f"--data_dir={data_dir}").code == 0
    before = checkpoint.load(tmp_path / "out" / "ckpt.pt")
    shutil.copytree(data_dir / "tiny", tmp_path / "other" / "tiny")
    (tmp_path / "other" / "tiny" / "meta.json").unlink()
    chars = before["tokenizer"]["chars"]
    meta = {"vocab_size": len(chars), "stoi": {c: i for i, c in enumerate(chars)}, "itos": dict(enumerate(chars))}
    (tmp_path / "other" / "tiny" / "meta.pkl").write_bytes(pickle.dumps(meta))
    rng = np.random.default_rng(0)  # noise, on which no loss is as low
    for name in ("train", "val"):
        rng.integers(28, size=4000).astype("<u2").tofile(tmp_path / "other" / "tiny" / f"{name}.bin")
    arguments = ("--init_from=resume", "--max_iters=60", "--allow_other_data", "--data_dir=other", "--eval_interval=50")
    result = train(*arguments, "--patience=5")
    assert result.code == 0, result.err
    assert "best val loss and patience start again" in result.out
    after, best = (checkpoint.load(tmp_path / "out" / name) for name in ("ckpt.pt", "best.pt"))
    assert after["best_val_loss"] > before["best_val_loss"]
    assert best["iter_num"] >= 40 and best["data"] == after["data"] != before["data"]  # sample.py offers the new one
    assert "start again" not in train("--init_from=resume", "--max_iters=61", "--data_dir=other").out


def test_a_shorter_context_is_announced_and_begins_best_anew(train, tmp_path):
    assert train("--max_iters=20", "--eval_interval=10").code == 0
    result = train("--init_from=resume", "--max_iters=30", "--block_size=4", "--eval_interval=10")
    assert result.code == 0, result.err
    assert "block_size=4: the context is cut from the checkpoint's 16 tokens" in result.out
    assert "best val loss and patience start again" in result.out
    best = checkpoint.load(tmp_path / "out" / "best.pt")
    assert best["model_args"]["block_size"] == 4 and best["iter_num"] >= 20


def test_a_cluster_that_sets_world_size_alone_starts_one_process(train, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert train("--max_iters=1").code == 0
    wrong = train("--lerning_rate=1")
    assert wrong.code == 2 and wrong.err.startswith("error: unknown setting")


def test_the_state_of_one_optimizer_is_not_taken_for_that_of_another(train):
    train("--max_iters=1", "--optimizer=muon")
    result = train("--init_from=resume", "--max_iters=2", "--optimizer=adamw")
    assert result.code == 2
    assert result.err == "error: optimizer='adamw': cannot continue from the state of muon in the checkpoint\n"


def test_rmsnorm_in_bfloat16_says_nothing(train):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run = ["--norm=rmsnorm", "--qk_norm", "--position=rope", "--dtype=bfloat16"]
        assert train("--max_iters=1", *run).code == 0


def test_max_minutes(train, tmp_path):
    result = train("--max_minutes=0", "--max_iters=5")
    assert result.code == 75 and "stopped at iteration 0 (max_minutes=0.0)" in result.out
    assert checkpoint.load(tmp_path / "out" / "ckpt.pt")["iter_num"] == 0


def test_saving_more_often_and_keeping_the_last_few(train, tmp_path):
    train("--max_iters=10", "--eval_interval=100", "--save_interval=2", "--keep_last=3")
    assert sorted(path.name for path in (tmp_path / "out").glob("*.pt")) == [
        *("best.pt", "ckpt-00000006.pt", "ckpt-00000008.pt", "ckpt-00000010.pt", "ckpt.pt")
    ]
    for iter_num in (6, 8, 10):
        assert checkpoint.load(tmp_path / "out" / f"ckpt-{iter_num:08d}.pt")["iter_num"] == iter_num


def test_a_damaged_checkpoint_is_recognised_and_the_one_before_it_is_used(train, tmp_path):
    train("--max_iters=10", "--lr_decay_iters=12", "--eval_interval=100", "--save_interval=4", "--keep_last=2")
    path = tmp_path / "out" / "ckpt.pt"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4  # in a weight or moment: only a checksum can show it
    path.unlink()
    path.write_bytes(data)
    (tmp_path / "out" / "ckpt-00000010.pt").unlink()
    result = train("--init_from=resume", "--max_iters=12", "--lr_decay_iters=12")
    assert result.code == 0, result.err
    assert "ckpt.pt is damaged: the checksum of its part" in result.out and "trying the one before it" in result.out
    train("--max_iters=12", "--lr_decay_iters=12", "--out_dir=straight")
    assert_same_weights(path, tmp_path / "straight" / "ckpt.pt")
    assert [record["iter"] for record in metrics(tmp_path / "out")] == list(range(13))


def failing(saves: list[int], times: int):
    def save(state, *_):
        saves.append(state["iter_num"])
        if len(saves) <= times:
            raise OSError(28, "No space left on device", "out/ckpt.pt.new")

    return save


def test_a_save_that_fails_does_not_end_a_run_unless_asked_to(train, monkeypatch):
    saves = []
    monkeypatch.setattr(checkpoint, "save", failing(saves, 2))
    result = train("--max_iters=4", "--eval_interval=2")
    assert result.code == 0 and saves == [0, 2, 4]
    assert "NOT SAVED at iteration 2: [Errno 28] No space left on device" in result.out
    monkeypatch.setattr(checkpoint, "save", failing([], 1))
    assert train("--max_iters=4", "--save_errors=stop").code == 2
    monkeypatch.setattr(checkpoint, "save", failing([], 9))
    assert train("--max_iters=4").code == 2  # the last save must not fail


def with_nan_from(monkeypatch, first: int, last: float) -> None:
    """Make the losses of the training steps first ... last nan."""
    forward, calls = NextTokenLoss.forward, iter(range(10**9))

    def broken(self, *args):
        return forward(self, *args) * (math.nan if self.training and first <= next(calls) <= last else 1)

    monkeypatch.setattr(NextTokenLoss, "forward", broken)


@pytest.mark.parametrize("log_interval", [1, 4])
def test_a_loss_that_is_no_number_is_skipped_and_recorded(train, tmp_path, monkeypatch, log_interval):
    with_nan_from(monkeypatch, 5, 5)
    result = train("--max_iters=12", f"--log_interval={log_interval}")
    assert result.code == 0, result.err
    assert "iter 5: SKIPPED, its loss or gradient is not finite (1 in all)" in result.out
    saved = checkpoint.load(tmp_path / "out" / "ckpt.pt")
    assert all(tensor.isfinite().all() for tensor in saved["model"].values())
    assert saved["bad_steps"] == [0, 1, 5]
    assert all(state["step"] == 11 for state in saved["optimizer"]["state"].values())
    named = json.loads((tmp_path / "out" / "bad_batch.json").read_text(encoding="utf-8"))
    assert named == {"iter": 5, "batch_size": 4, "ranks": [{"rank": 0, "loss": "nan", "sequences": [20]}]}
    assert column(tmp_path / "out", "bad_steps") == {5 if log_interval == 1 else 8: 1}
    assert "NaN" not in (tmp_path / "out" / "metrics.jsonl").read_text(encoding="utf-8")


def test_a_loss_that_is_never_a_number_stops_the_run(train, tmp_path, monkeypatch):
    with_nan_from(monkeypatch, 5, math.inf)
    result = train("--max_iters=100", "--max_bad_steps=7", "--save_interval=4")
    assert result.code == 2
    assert "7 steps in a row without a finite loss and gradient, up to iteration 11" in result.err
    assert all(tensor.isfinite().all() for tensor in weights(tmp_path / "out" / "ckpt.pt").values())


def test_a_plan_runs_and_writes_nothing(command, tmp_path):
    result = command("train.py", "configs/train_gpt2.py", "--plan", "--plan_device=h100")
    assert result.code in (0, None), result.err
    assert "GB at the peak of each process" in result.out and "H100" in result.out
    assert not list(tmp_path.iterdir())
    result = command("train.py", "--plan", "--plan_device=abacus")
    assert result.code == 2 and "abacus" in result.err


def test_patience_ends_a_run_that_no_longer_improves(train, tmp_path):
    result = train("--max_iters=100", "--eval_interval=2", "--learning_rate=3", "--warmup_iters=0", "--patience=3")
    assert result.code == 0 and "val loss has not improved for 3 evaluations (patience=3)" in result.out
    assert checkpoint.load(tmp_path / "out" / "best.pt")["iter_num"] == 0
    assert checkpoint.load(tmp_path / "out" / "ckpt.pt")["iter_num"] == 6


def test_resuming_does_not_count_an_evaluation_twice(train, tmp_path):
    run = ["--eval_interval=2", "--learning_rate=3", "--warmup_iters=0", "--decay_lr=False", "--patience=3"]
    for max_iters in (2, 4, 50):  # each evaluation after iteration 0 is worse: 2, 4 and 6 are the three
        train(*run, "--init_from=auto", f"--max_iters={max_iters}")
    assert checkpoint.load(tmp_path / "out" / "ckpt.pt")["iter_num"] == 6


@pytest.mark.slow
@pytest.mark.timeout(600)  # fifty starts, four seconds each on a slow machine
def test_fifty_kills_change_nothing(train, tmp_path, data_dir):
    """SIGKILL at random moments, also during saves; the same command is then repeated."""
    run = ["--init_from=auto", "--dropout=0.1", "--max_iters=2000", "--eval_interval=500", "--save_interval=3"]
    run += ["--n_layer=1", "--keep_last=2"]
    draw, kills = random.Random(0), 0
    while kills < 50:
        process = start(tmp_path, data_dir, *run, "--out_dir=killed")
        with contextlib.suppress(AssertionError):
            for line in process.stdout:
                if line.startswith(("iter", "step")):
                    break
        time.sleep(draw.uniform(0, 0.2))
        if process.poll() is not None:
            raise AssertionError("the run ended before it was killed often enough: " + process.stderr.read())
        process.kill()
        process.communicate()
        kills += 1
    assert train(*run, "--out_dir=killed").code == 0
    assert train(*run, "--out_dir=straight").code == 0
    assert_same_weights(tmp_path / "killed" / "ckpt.pt", tmp_path / "straight" / "ckpt.pt")
    assert [record["iter"] for record in metrics(tmp_path / "killed")] == list(range(2001))
    for key in ("train_loss", "val_loss"):
        assert column(tmp_path / "killed", key) == column(tmp_path / "straight", key)


# -- torch.compile, the terminal, the device table ---------------------------------------------------------------------


def test_compile_auto_falls_back_with_a_line_and_true_is_an_error(monkeypatch, capsys):
    def broken(model, **_):
        raise RuntimeError("no working C++ compiler\nis installed")

    monkeypatch.setattr(torch, "compile", broken)
    model = NextTokenLoss(GPT(GPTConfig(vocab_size=5, block_size=4, n_layer=1, n_head=1, n_embd=4)))
    batch, autocast = (torch.zeros(1, 4, dtype=torch.long),) * 2, torch.autocast("cpu", enabled=False)
    gpu, cpu = (distributed.Processes(rank=0, world_size=1, device=torch.device(name)) for name in ("cuda", "cpu"))
    assert distributed.compile_and_wrap(model, "auto", 1e3, batch, autocast, gpu, print) is model
    assert "continuing without torch.compile, which does not work here: no working C++ compiler is installed" in (
        capsys.readouterr().out
    )
    with pytest.raises(UserError, match=r"compile=True: torch\.compile does not work here: no working C"):
        distributed.compile_and_wrap(model, True, 0, batch, autocast, cpu, print)
    # not worth it, and on CPUs never: not even tried
    assert distributed.compile_and_wrap(model, "auto", 3, batch, autocast, gpu, print) is model
    assert "not compiling: it takes about 20 s, and would save 3 " in capsys.readouterr().out
    assert distributed.compile_and_wrap(model, "auto", 1e3, batch, autocast, cpu, print) is model
    assert model(*batch).isfinite() and not capsys.readouterr().out


def test_compiling_is_for_runs_that_are_long_enough():
    gpt2 = 6 * 124e6 * 12 * 1024
    assert distributed.seconds_saved(gpt2, 989e12, 10_000) > 100 > 20 > distributed.seconds_saved(gpt2, 989e12, 500)
    assert distributed.seconds_saved(1e9, None, 10_000) < 1


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler on CPUs")
def test_compiled_training_is_eager_training_but_for_rounding(train, tmp_path):
    train("--max_iters=6", "--out_dir=eager", "--compile=False")
    result = train("--max_iters=6", "--out_dir=compiled", "--compile=True")
    assert result.code == 0, result.err
    eager, compiled = (column(tmp_path / name, "train_loss") for name in ("eager", "compiled"))
    assert all(compiled[i] == pytest.approx(eager[i], abs=1e-4) for i in range(6))
    assert weights(tmp_path / "eager" / "ckpt.pt").keys() == weights(tmp_path / "compiled" / "ckpt.pt").keys()


def wandb_history(path: Path) -> list[dict]:
    """Records of an offline run: a LevelDB log (blocks of 32 KiB; records of CRC, length, type) of protobuf records."""
    from wandb.proto import wandb_internal_pb2

    data, place, payload, history = path.read_bytes(), 7, b"", []
    while place + 7 <= len(data):
        if 2**15 - place % 2**15 < 7:  # no room for a header: the block ends in zeros
            place += 2**15 - place % 2**15
            continue
        length, kind = struct.unpack_from("<HB", data, place + 4)
        payload += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or the last part
            record = wandb_internal_pb2.Record()
            record.ParseFromString(payload)
            payload = b""
            if record.WhichOneof("record_type") == "history":
                items = {item.key or item.nested_key[0]: json.loads(item.value_json) for item in record.history.item}
                history.append({key: value for key, value in items.items() if not key.startswith("_")})
    return history


@pytest.mark.slow
def test_wandb_gets_the_same_numbers_and_resumes_the_same_run(train, tmp_path, monkeypatch):
    import wandb

    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    for arguments in (["--max_iters=4"], ["--init_from=resume", "--max_iters=6"]):
        assert train("--wandb_log", "--eval_interval=2", *arguments).code == 0
        wandb.teardown()  # as at the end of a process; when it returns, everything is written
    first, second = sorted((tmp_path / "out" / "wandb").glob("offline-run-*/*.wandb"))
    assert first.name == second.name  # the run's id
    records = metrics(tmp_path / "out")
    assert wandb_history(second) == [record for record in records if record["iter"] >= 4]
    same = [(a, b) for a, b in zip(wandb_history(first), records, strict=False) if a["iter"] < 4]
    assert len(same) == 4 and all(a == b for a, b in same)


def test_a_terminal_gets_a_progress_bar(tmp_path, data_dir):
    leader, follower = pty.openpty()
    arguments = [sys.executable, ROOT / "train.py", f"--data_dir={data_dir}", *TINY, "--max_iters=20"]
    environment = os.environ | {"TERM": "xterm-256color", "COLUMNS": "100"}
    process = subprocess.Popen(arguments, cwd=tmp_path, env=environment, stdout=follower, stderr=follower)
    os.close(follower)
    shown = b""
    while True:
        try:
            shown += os.read(leader, 4096)
        except OSError:  # the terminal is closed
            break
    assert process.wait() == 0
    text = shown.decode()
    assert "20/20" in text and "step 20: train loss" in text and "iter 3:" not in text
    assert text.rstrip().endswith("\x1b[?25h") or "\x1b[?25h" in text  # the cursor is shown again
    last = column(tmp_path / "out", "val_loss")[20]
    assert f"val {last:.4f}" in text[text.rindex("20/20") :]  # the bar that stays shows the last evaluation


@pytest.mark.parametrize("ignored", [False, True])  # as under nohup
def test_a_run_whose_terminal_is_closed_saves_or_goes_on_under_nohup(tmp_path, data_dir, ignored):
    leader, follower = pty.openpty()
    max_iters = 400 if ignored else 100000
    arguments = [sys.executable, ROOT / "train.py", f"--data_dir={data_dir}", *TINY, f"--max_iters={max_iters}"]
    arguments += ["--eval_interval=100", "--save_interval=100000"]
    shell = ["sh", "-c", ("trap '' HUP; " if ignored else "") + 'exec "$@"', "sh"]
    process = subprocess.Popen(
        [*shell, *map(str, arguments)],
        **{"cwd": tmp_path, "env": os.environ | {"TERM": "xterm"}, "start_new_session": True},
        **{"stdin": follower, "stdout": follower, "stderr": follower},
        preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),  # its controlling terminal
    )
    os.close(follower)
    shown = b""
    while b"step 100:" not in shown:
        shown += os.read(leader, 4096)
    os.close(leader)
    assert process.wait(timeout=60) == (0 if ignored else 75)
    reached = checkpoint.load(tmp_path / "out" / "ckpt.pt")["iter_num"]
    assert reached == 400 if ignored else 100 <= reached < 100000


def test_a_record_that_a_full_disk_does_not_take_is_written_later(tmp_path, capsys):
    class Disk(io.BytesIO):
        room = 0

        def write(self, contents: bytes) -> int:
            if not self.room:
                raise OSError(errno.ENOSPC, "No space left on device")
            return super().write(contents[: self.room])

    log = Log(main=True)
    log.file = disk = Disk()
    for iter_num, room in enumerate((0, 0, 10, 1000)):
        disk.room = room
        log.record({"iter": iter_num})
    assert disk.getvalue() == b"".join(b'{"iter": %d}\n' % iter_num for iter_num in range(4))
    notes = "NOT RECORDED at iteration 0: [Errno 28] No space left on device; the run continues\n"
    assert capsys.readouterr().out == notes
    log.close()


def test_a_longer_run_that_was_put_aside_stays(train, tmp_path):
    for max_iters in (4, 1, 1, 2):
        assert train(f"--max_iters={max_iters}").code == 0
    found = {folder.name: len(metrics(folder)) - 1 for folder in (tmp_path / "out").glob("previous*")}
    assert found == {"previous": 4, "previous-2": 1} and len(metrics(tmp_path / "out")) == 3


def test_a_folder_that_another_run_writes_to_is_refused(train, tmp_path):
    def files() -> dict[str, int]:
        return {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir() if path.name != ".lock"}

    assert train("--max_iters=1").code == 0
    before = files()
    with hold(tmp_path / "out"):
        for init_from in ("scratch", "resume"):
            result = train("--max_iters=2", f"--init_from={init_from}")
            assert result.code == 2 and result.err == "error: out is in use: another run is writing to it\n"
    assert files() == before
    assert train("--max_iters=2", "--init_from=resume").code == 0


def test_snapshots_are_told_by_name_and_ordered_by_iteration(train, tmp_path):
    out = tmp_path / "out"
    assert train("--max_iters=6", "--save_interval=2", "--keep_last=3").code == 0
    mine = [out / name for name in ("ckpt-good.pt", "ckpt-1-before.pt", "ckpt-7.pt", "ckpt-00000006-mine.pt")]
    for path in mine:
        shutil.copy(out / "ckpt.pt", path)
    for age, path in enumerate(["best.pt", "ckpt-00000002.pt", "ckpt-00000004.pt", "ckpt-00000006.pt", "ckpt.pt"]):
        os.utime(out / path, (10**9 - age, 10**9 - age))  # a copied folder can have any file times
    names = ["ckpt.pt", "ckpt-00000006.pt", "ckpt-00000004.pt", "ckpt-00000002.pt", "best.pt"]
    assert [path.name for path in checkpoints(out)] == names
    assert train("--max_iters=8", "--init_from=resume", "--keep_last=2").code == 0
    kept = {"ckpt-00000006.pt", "ckpt-00000008.pt", *(path.name for path in mine)}
    assert {path.name for path in out.glob("ckpt-*.pt")} == kept


def test_closed_streams_and_poor_encodings_do_no_harm(tmp_path, data_dir):
    train = [sys.executable, ROOT / "train.py", f"--data_dir={data_dir}", *TINY, "--max_iters=2", "--out_dir=oüt"]
    closed = ["sh", "-c", 'exec "$@" <&- >&-', "sh"]
    options = {"cwd": tmp_path, "capture_output": True, "env": os.environ | {"PYTHONIOENCODING": "ascii"}}
    result = subprocess.run([*closed, *map(str, train)], **options)
    assert (result.returncode, result.stderr) == (0, b"") and (tmp_path / "oüt" / "ckpt.pt").is_file()
    result = subprocess.run([*map(str, train), "--init_from=resume"], **options)
    assert result.returncode == 0 and b"nothing to do: o?t is at iteration 2" in result.stdout


@pytest.mark.parametrize("change", ["--batch_size=2", "--batch_size=12", "--gradient_accumulation_steps=3"])
def test_another_batch_size_on_resume_repeats_and_skips_nothing(train, tmp_path, monkeypatch, change):
    taken, batch = [], Split.batch

    def noted(self, seed: int, first: int, batch_size: int):
        taken.append(range(first, first + batch_size))
        return batch(self, seed, first, batch_size)

    monkeypatch.setattr(Split, "batch", noted)
    sequences, seen = [], []
    runs = ["--max_iters=5"], ["--max_iters=10", change], ["--max_iters=12", "--batch_size=1"]
    for arguments in runs:
        taken.clear()
        assert train(*arguments, "--init_from=auto").code == 0
        taken.pop()  # read ahead for a step that does not come
        sequences += [index for some in taken for index in some]
        seen.append(len(sequences))
    assert sequences == list(range(len(sequences)))
    tokens = column(tmp_path / "out", "tokens")
    assert [tokens[iter_num] for iter_num in (5, 10, 12)] == [16 * n for n in seen]


def test_mfu_is_of_the_right_device_or_not_given():
    assert peak_flops("NVIDIA A100-SXM4-40GB", "bfloat16") == 312e12
    assert peak_flops("NVIDIA H100 80GB HBM3", "bfloat16") == 989e12
    assert peak_flops("NVIDIA H100 PCIe", "bfloat16") == 756e12
    assert peak_flops("NVIDIA L40S", "bfloat16") == 362e12
    assert peak_flops("NVIDIA L4", "bfloat16") == 121e12
    for unknown in ("NVIDIA RTX A4000", "NVIDIA GeForce RTX 4090 Laptop GPU", "NVIDIA GeForce RTX 3080 Ti", "cpu"):
        assert peak_flops(unknown, "bfloat16") is None
    assert peak_flops("NVIDIA A100-SXM4-40GB", "float32") is None


# -- errors ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--n_embd=17"], "n_embd=17 is not divisible by n_head=2"),
        (["--dropout=2"], "dropout=2.0"),
        (["--dataset=nothing"], "dataset='nothing': no folder"),
        (["--init_from=resume"], "no checkpoint out/ckpt.pt"),
        (["--init_from=gpt3"], "init_from='gpt3': expected scratch"),
        (["--device=gpu"], "device='gpu': expected auto"),
        pytest.param(
            ["--device=cuda"],
            "device='cuda': not available on this machine",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device"),
        ),
        (["--learning_rate=inf"], "learning_rate=inf: too large"),
        (["--norm_eps=nan"], "norm_eps=nan"),
        (["--out_dir="], "out_dir=''"),
        (["--block_size=16", "--n_embd=2000000000000"], "out of memory"),
        (["--batch_size=1000000000"], "out of memory"),
        (["--out_dir=file/out"], "out_dir='file/out': file is a file, not a folder"),
        (["--out_dir=file"], "out_dir='file': file is a file, not a folder"),
        (["--wandb_log"], "wandb"),
    ],
)
def test_bad_input_is_one_line_and_nothing_is_written(train, tmp_path, monkeypatch, arguments, message):
    monkeypatch.setitem(sys.modules, "wandb", None)  # as if it were not installed
    (tmp_path / "file").write_text("")
    result = train("--max_iters=1", *arguments)
    assert result.code == 2
    (line,) = result.err.splitlines()
    assert line.startswith("error: ") and message in line
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_data_set_of_another_tokenizer_is_refused(train, tmp_path, data_dir):
    train("--max_iters=1")
    shutil.copytree(data_dir / "tiny", tmp_path / "data" / "tiny")
    path = tmp_path / "data" / "tiny" / "meta.json"
    meta = json.loads(path.read_text(encoding="utf-8"))
    meta["tokenizer"]["chars"] = meta["tokenizer"]["chars"][::-1]
    path.write_text(json.dumps(meta), encoding="utf-8")
    result = train("--init_from=resume", "--data_dir=data", "--max_iters=2")
    assert result.code == 2 and "its tokenizer is not what the checkpoint in out was trained with" in result.err


def test_other_data_than_the_checkpoints_is_refused_unless_told(train, tmp_path, data_dir):
    train("--max_iters=1")
    shutil.copytree(data_dir / "tiny", tmp_path / "data" / "tiny")
    path = tmp_path / "data" / "tiny" / "meta.json"
    meta = json.loads(path.read_text(encoding="utf-8"))
    ids = np.fromfile(path.parent / "train.bin", dtype="<u2")[::-1].copy()
    ids.tofile(path.parent / "train.bin")
    meta["splits"]["train"]["sha256"] = hashlib.sha256(ids).hexdigest()
    path.write_text(json.dumps(meta), encoding="utf-8")
    result = train("--init_from=resume", "--data_dir=data", "--max_iters=2")
    assert result.code == 2 and "its data is not what the checkpoint in out was trained with" in result.err
    result = train("--init_from=resume", "--data_dir=data", "--max_iters=2", "--allow_other_data")
    assert result.code == 0, result.err
