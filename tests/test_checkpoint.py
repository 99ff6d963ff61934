"""checkpoint.py: writing is atomic, reading runs no code, and nanoGPT's files load."""

import errno
import io
import os
import pickle
import subprocess
import sys

import pytest
import torch

from kqv import checkpoint
from kqv.build import crop_block_size, restore_model
from kqv.errors import UserError
from kqv.optim import adamw, load_state
from model import GPT, GPTConfig
from tests.conftest import ROOT

SIZES = {"block_size": 16, "vocab_size": 61, "n_layer": 2, "n_head": 2, "n_embd": 16, "bias": False, "dropout": 0.0}


def nanogpt_checkpoint(steps: int = 3, compiled: bool = True) -> tuple[dict, GPT, torch.optim.Optimizer]:
    """A file as nanoGPT's train.py writes it, with its names, groups and types, and random numbers."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(**SIZES))
    decay = [p for p in model.parameters() if p.dim() >= 2]
    no_decay = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": decay, "weight_decay": 0.1}, {"params": no_decay, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.99))
    for _ in range(steps):
        idx = torch.randint(61, (2, 16))
        model(idx, idx.roll(-1, 1))[1].backward()
        optimizer.step()
        optimizer.zero_grad()
    prefix = "_orig_mod." if compiled else ""
    saved = {
        "model": {prefix + name: tensor for name, tensor in model.state_dict().items()},
        "optimizer": optimizer.state_dict(),
        "model_args": {key: SIZES[key] for key in ("n_layer", "n_head", "n_embd", "block_size", "bias", "vocab_size")},
        "iter_num": steps,
        "best_val_loss": torch.tensor(4.5),
        "config": {"dataset": "tiny", "block_size": 16, "batch_size": 4, "max_iters": 20, "device": "cuda"},
    }
    return saved, model, optimizer


@pytest.mark.parametrize("compiled", [True, False])
def test_nanogpts_checkpoints_load(tmp_path, compiled):
    saved, model, _ = nanogpt_checkpoint(compiled=compiled)
    saved["model"]["transformer.h.0.attn.bias"] = torch.ones(1, 1, 16, 16).tril()  # the mask of its slow attention
    torch.save(saved, tmp_path / "ckpt.pt")
    loaded = checkpoint.load(tmp_path / "ckpt.pt")
    assert (loaded["iter_num"], loaded["best_val_loss"]) == (3, 4.5) and type(loaded["best_val_loss"]) is float
    rebuilt = restore_model(loaded, tmp_path / "ckpt.pt", GPT, GPTConfig).eval()
    idx = torch.randint(61, (2, 16))
    assert torch.equal(rebuilt(idx, idx)[0], model.eval()(idx, idx)[0])
    assert rebuilt.lm_head.weight is rebuilt.transformer.wte.weight


def test_nanogpts_optimizer_goes_on_as_if_it_were_still_nanogpts(tmp_path):
    saved, theirs, their_optimizer = nanogpt_checkpoint()
    torch.save(saved, tmp_path / "ckpt.pt")
    loaded = checkpoint.load(tmp_path / "ckpt.pt")
    ours = restore_model(loaded, tmp_path / "ckpt.pt", GPT, GPTConfig)
    optimizer = adamw(ours.parameters(), learning_rate=1e-3, betas=(0.9, 0.99), weight_decay=0.1)
    load_state(optimizer, loaded["optimizer"])
    idx = torch.randint(61, (2, 16))
    for model, stepped in ((theirs, their_optimizer), (ours, optimizer)):
        model(idx, idx.roll(-1, 1))[1].backward()
        stepped.step()
    for (name, a), (_, b) in zip(theirs.named_parameters(), ours.named_parameters(), strict=True):
        torch.testing.assert_close(a, b, msg=name)


def test_the_settings_asked_for_win_over_the_saved_ones(tmp_path):
    saved, *_ = nanogpt_checkpoint()
    model = GPT(GPTConfig(**SIZES))
    optimizer = adamw(model.parameters(), learning_rate=5e-4, betas=(0.8, 0.9), weight_decay=0.3)
    load_state(optimizer, saved["optimizer"])
    assert [group["betas"] for group in optimizer.param_groups] == [(0.8, 0.9)] * 2
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.3, 0.0]
    assert all(optimizer.state[parameter]["step"] == 3 for parameter in model.parameters())
    with pytest.raises(UserError, match="damaged, or not this run's"):
        load_state(
            adamw(GPT(GPTConfig(**SIZES | {"n_layer": 3})).parameters(), 1e-3, (0.9, 0.9), 0.1), saved["optimizer"]
        )


@pytest.mark.parametrize(
    "damage",
    [
        lambda saved: saved["state"][0].update(exp_avg=torch.zeros(2)),  # PyTorch would write past the tensor's end
        lambda saved: saved["state"][0].update(exp_avg=torch.zeros(61, 7)),
        lambda saved: saved["state"][0].update(exp_avg=None),
        lambda saved: saved.pop("param_groups"),
        lambda saved: saved.pop("state"),
        lambda saved: saved["param_groups"].pop(),
        lambda saved: saved["param_groups"][0].update(params=[]),
    ],
)
def test_damaged_optimizer_states_are_refused(damage):
    saved = nanogpt_checkpoint()[0]["optimizer"]
    damage(saved)
    with pytest.raises(UserError, match="damaged, or not this run's"):
        load_state(adamw(GPT(GPTConfig(**SIZES)).parameters(), 1e-3, (0.9, 0.9), 0.1), saved)


def test_a_shorter_context_cuts_the_moments_too():
    saved, *_ = nanogpt_checkpoint()
    model = GPT(GPTConfig(**SIZES))
    crop_block_size(model, 8)
    optimizer = adamw(model.parameters(), 1e-3, (0.9, 0.99), 0.1)
    load_state(optimizer, saved["optimizer"])
    assert optimizer.state[model.transformer.wpe.weight]["exp_avg"].shape == (8, 16)
    idx = torch.randint(61, (2, 8))
    model(idx, idx)[1].backward()
    optimizer.step()


class Hostile:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("legacy", [True, False])
def test_loading_runs_no_code(tmp_path, legacy):
    saved, *_ = nanogpt_checkpoint()
    saved["config"] = Hostile(tmp_path / "harm")
    if legacy:
        (tmp_path / "ckpt.pt").write_bytes(pickle.dumps(saved["config"], protocol=2))
    else:
        torch.save(saved, tmp_path / "ckpt.pt")
    with pytest.raises(UserError, match=r"not a checkpoint" if legacy else r"was not loaded: it would run code"):
        checkpoint.load(tmp_path / "ckpt.pt")
    assert not (tmp_path / "harm").exists()
    with (tmp_path / "ckpt.pt").open("rb") as file:  # this file does run code
        pickle.load(file) if legacy else torch.load(file, weights_only=False)
    assert (tmp_path / "harm").exists()


def good_bytes() -> bytes:
    buffer = io.BytesIO()
    torch.save(nanogpt_checkpoint()[0], buffer)
    return buffer.getvalue()


def with_changes(**changes) -> bytes:
    buffer = io.BytesIO()
    torch.save(nanogpt_checkpoint()[0] | changes, buffer)
    return buffer.getvalue()


@pytest.mark.parametrize("mmap", [True, False])
@pytest.mark.parametrize(
    "content",
    [
        lambda: b"",
        lambda: b"not a checkpoint at all",
        lambda: good_bytes()[:1000],
        lambda: good_bytes()[:-1000],
        lambda: good_bytes()[1000:],
        lambda: with_changes(model=None),
        lambda: with_changes(model={}),
        lambda: with_changes(model={"transformer.wte.weight": 5}),
        lambda: with_changes(model_args=[1, 2]),
        lambda: with_changes(model_args={"n_layer": 3}),
        lambda: with_changes(model_args=SIZES | {"n_layer": 3}),
        lambda: with_changes(model_args=SIZES | {"n_embd": "16"}),
        lambda: with_changes(model_args=SIZES | {"of_another": 16}),
        lambda: with_changes(
            model=nanogpt_checkpoint()[0]["model"] | {"lm_head.weight": torch.zeros(61, 16).to_sparse()}
        ),
        lambda: with_changes(elapsed_seconds="long"),
        lambda: with_changes(iter_num=-5),
        lambda: with_changes(iter_num="many"),
        lambda: with_changes(best_val_loss=None),
    ],
)
def test_damaged_files_are_one_line(tmp_path, content, mmap):
    path = tmp_path / "ckpt.pt"
    path.write_bytes(content())
    with pytest.raises(UserError) as caught:
        restore_model(checkpoint.load(path, mmap=mmap), path, GPT, GPTConfig)
    assert "ckpt.pt" in str(caught.value) and "\n" not in str(caught.value)


def test_saved_and_loaded_is_the_same_and_best_is_its_twin(tmp_path):
    saved, *_ = nanogpt_checkpoint(compiled=False)
    checkpoint.save(saved, tmp_path, best=True)
    checkpoint.save(saved | {"iter_num": 9}, tmp_path, best=False)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["best.pt", "ckpt.pt"]
    assert checkpoint.load(tmp_path / "best.pt")["iter_num"] == 3
    loaded = checkpoint.load(tmp_path / "ckpt.pt")
    assert loaded["iter_num"] == 9
    assert all(torch.equal(tensor, loaded["model"][name]) for name, tensor in saved["model"].items())
    mapped = checkpoint.load(tmp_path / "ckpt.pt", mmap=True)
    assert all(torch.equal(tensor, mapped["model"][name]) for name, tensor in saved["model"].items())


def test_without_hard_links_best_is_a_copy(tmp_path, monkeypatch):
    def no_links(*_):
        raise OSError(errno.EPERM, "no hard links here")

    monkeypatch.setattr(os, "link", no_links)
    checkpoint.save(nanogpt_checkpoint()[0], tmp_path, best=True)
    assert (tmp_path / "best.pt").read_bytes() == (tmp_path / "ckpt.pt").read_bytes()


def test_a_file_that_cannot_grow_keeps_the_checkpoint_there_was(tmp_path):
    """The system refuses to write more than 100 kB, in the middle of torch.save."""
    program = (
        "import resource, signal, sys, torch; from kqv import checkpoint; from pathlib import Path\n"
        "out, big = Path(sys.argv[1]), {'model': torch.zeros(10**6), 'iter_num': 2}\n"
        "checkpoint.save({'iter_num': 1}, out, best=True)\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n"
        "try: checkpoint.save(big, out, best=True)\n"
        "except OSError as error: print(error)\n"
        "assert sorted(path.name for path in out.iterdir()) == ['best.pt', 'ckpt.pt']\n"
        "assert torch.load(out / 'ckpt.pt')['iter_num'] == torch.load(out / 'best.pt')['iter_num'] == 1\n"
    )
    result = subprocess.run([sys.executable, "-c", program, tmp_path], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout == f"could not write {tmp_path / 'ckpt.pt.new'}: File too large\n"  # the system's reason


def test_a_full_disk_keeps_the_checkpoint_there_was(tmp_path, monkeypatch):
    saved, *_ = nanogpt_checkpoint()
    checkpoint.save(saved, tmp_path, best=True)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        checkpoint.save(saved | {"iter_num": 9}, tmp_path, best=True)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
