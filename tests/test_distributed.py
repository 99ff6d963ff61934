"""Runs in several processes, over gloo on this machine: equal to one process, and to an uninterrupted run."""

import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from kqv import checkpoint
from tests.conftest import ROOT, TINY
from tests.test_train import assert_same_weights, column, metrics

LAUNCH = [sys.executable, "-m", "torch.distributed.run"]
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}


def torchrun(cwd: Path, processes: int, *arguments: object) -> subprocess.CompletedProcess:
    command = [*LAUNCH, "--standalone", f"--nproc_per_node={processes}", ROOT / "train.py", *map(str, arguments)]
    command += ["--dtype=float32"]  # see conftest.py
    return subprocess.run(command, cwd=cwd, env=ENVIRONMENT, capture_output=True, text=True, timeout=200)


@pytest.mark.parametrize("strategy", ["ddp", pytest.param("fsdp", marks=pytest.mark.slow)])
def test_two_processes_are_one_on_the_same_global_batch(train, command, tmp_path, data_dir, strategy):
    run = [f"--data_dir={data_dir}", *TINY, "--gradient_accumulation_steps=4", "--max_iters=20", "--eval_interval=5"]
    run += ["--short_conv=1"]  # one row, fewer than processes
    result = torchrun(tmp_path, 2, *run, "--out_dir=two", f"--strategy={strategy}", "--sample_interval=20")
    assert result.returncode == 0, result.stderr
    assert train(*run, "--out_dir=one").code == 0
    one, two = tmp_path / "one", tmp_path / "two"
    losses = column(two, "train_loss")
    assert len(losses) == 20
    assert all(losses[i] == pytest.approx(loss, abs=1e-5) for i, loss in column(one, "train_loss").items())
    # the same weights have, to the bit, the same validation loss in two processes as in one
    (tmp_path / "out").mkdir()
    shutil.copy(two / "ckpt.pt", tmp_path / "out")
    evaluate = [f"--data_dir={data_dir}", "--init_from=resume", "--eval_only", "--device=cpu", "--eval_iters=0"]
    alone = train(*evaluate, "--gradient_accumulation_steps=4").out.splitlines()[-1]
    together = torchrun(tmp_path, 2, *evaluate, "--batch_size=3", f"--strategy={strategy}").stdout.splitlines()[-1]
    assert alone == together and alone.startswith("step 20: train loss ")
    assert "-- iter 20, sample 1 --" in result.stdout
    sample = command("sample.py", "--out_dir=two", "--device=cpu", "--start=the ", "--num_samples=1")
    assert sample.code == 0 and sample.out.startswith("the ")


@pytest.mark.slow
def test_only_the_first_process_needs_the_checkpoint_and_errors_end_all(tmp_path, data_dir, train):
    """Only the main process needs the file. (nanoGPT's others read it too, so its nodes need a shared disk.)"""
    train("--max_iters=2", "--gradient_accumulation_steps=2")
    (tmp_path / "elsewhere").mkdir()
    program = tmp_path / "launch.py"
    program.write_text(
        "import os, runpy, sys\n"
        "if os.environ['RANK'] == '1': os.chdir('elsewhere')\n"
        f"sys.path.insert(0, {str(ROOT)!r}); sys.argv[0] = {str(ROOT / 'train.py')!r}\n"
        "runpy.run_path(sys.argv[0], run_name='__main__')\n"
    )
    launch = [*LAUNCH, "--standalone", "--nproc_per_node=2", program]
    arguments = [f"--data_dir={data_dir}", "--init_from=resume", "--device=cpu", "--max_iters=4", "--eval_iters=1"]
    result = subprocess.run([*launch, *arguments], cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert checkpoint.load(tmp_path / "out" / "ckpt.pt")["iter_num"] == 4
    failed = torchrun(tmp_path, 2, *arguments, "--gradient_accumulation_steps=3", "--max_iters=6")
    assert failed.returncode != 0
    for rank in (0, 1):  # each process reports it
        assert (
            f"error in process {rank}: gradient_accumulation_steps=3: 2 processes share them, so give a multiple of 2"
            in failed.stderr
        )


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_stopping_and_resuming_is_the_same_run_and_can_change_the_number_of_processes(tmp_path, data_dir, strategy):
    run = [
        f"--data_dir={data_dir}",
        *TINY,
        "--gradient_accumulation_steps=4",
        "--lr_decay_iters=8",
        "--eval_interval=4",
    ]
    run += ["--init_from=auto", f"--strategy={strategy}"]
    cut, dropout = ["--out_dir=halves", "--dropout=0.2"], ["--out_dir=straight", "--dropout=0.2"]
    for arguments in ([*dropout, "--max_iters=8"], [*cut, "--max_iters=4"], [*cut, "--max_iters=8"]):
        result = torchrun(tmp_path, 2, *run, *arguments)
        assert result.returncode == 0, result.stderr
    straight, halves = tmp_path / "straight", tmp_path / "halves"
    assert_same_weights(straight / "ckpt.pt", halves / "ckpt.pt")
    a, b = (checkpoint.load(folder / "ckpt.pt")["optimizer"]["state"] for folder in (straight, halves))
    assert all(torch.equal(a[i][key], b[i][key]) for i in a for key in a[i])
    for key in ("train_loss", "val_loss", "grad_norm"):
        assert column(straight, key) == column(halves, key)
    # dropout masks differ by process; without dropout, runs with other numbers of processes differ by rounding only
    for processes, name, max_iters in ((1, "one", 8), (2, "changed", 4), (1, "changed", 6), (2, "changed", 8)):
        assert torchrun(tmp_path, processes, *run, f"--out_dir={name}", f"--max_iters={max_iters}").returncode == 0
    one, changed = (column(tmp_path / name, "train_loss") for name in ("one", "changed"))
    assert len(one) == 8 and all(changed[i] == pytest.approx(loss, abs=1e-5) for i, loss in one.items())


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_a_killed_worker_is_started_again_and_the_run_ends_as_if_nothing_had_happened(tmp_path, data_dir, strategy):
    program = tmp_path / "mortal.py"  # train.py, but process 1 is killed in iteration 7 of its first life
    program.write_text(
        "import os, runpy, signal, sys\n"
        f"sys.path.insert(0, {str(ROOT)!r}); sys.argv[0] = {str(ROOT / 'train.py')!r}\n"
        "from kqv import optim\n"
        "rate = optim.learning_rate_at\n"
        "def mortal(iter_num, *rest):\n"
        "    if (iter_num, os.environ['RANK'], os.environ['TORCHELASTIC_RESTART_COUNT']) == (7, '1', '0'):\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return rate(iter_num, *rest)\n"
        "optim.learning_rate_at = mortal\n"
        "runpy.run_path(sys.argv[0], run_name='__main__')\n"
    )
    run = [f"--data_dir={data_dir}", *TINY, "--gradient_accumulation_steps=2", "--max_iters=10", "--dropout=0.1"]
    run += ["--init_from=auto", "--save_interval=3", "--eval_interval=10", f"--strategy={strategy}"]
    launch = [*LAUNCH, "--standalone", "--nproc_per_node=2", "--max_restarts=2", program, "--dtype=float32"]
    result = subprocess.run(
        [*launch, *run, "--out_dir=killed"], cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True, timeout=200
    )
    assert result.returncode == 0, result.stderr
    assert "exitcode: -9" in result.stderr
    assert torchrun(tmp_path, 2, *run, "--out_dir=straight").returncode == 0
    assert_same_weights(tmp_path / "killed" / "ckpt.pt", tmp_path / "straight" / "ckpt.pt")
    assert [record["iter"] for record in metrics(tmp_path / "killed")] == list(range(11))
    assert column(tmp_path / "killed", "train_loss") == column(tmp_path / "straight", "train_loss")


@pytest.mark.slow
def test_a_run_that_has_stopped_is_not_started_again(tmp_path, data_dir):
    run = [f"--data_dir={data_dir}", *TINY, "--gradient_accumulation_steps=2", "--max_iters=10", "--max_minutes=0"]
    launch = [*LAUNCH, "--standalone", "--nproc_per_node=2", "--max_restarts=2", ROOT / "train.py"]
    options = {"cwd": tmp_path, "env": ENVIRONMENT, "capture_output": True, "text": True, "timeout": 200}
    result = subprocess.run([*launch, *run], **options)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("stopped at iteration 0 (max_minutes=0.0)") == 1


@pytest.mark.slow
def test_two_nodes_that_find_each_other_by_rendezvous_are_one_process(train, tmp_path, data_dir):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    run = [f"--data_dir={data_dir}", *TINY, "--gradient_accumulation_steps=2", "--max_iters=6", "--eval_interval=3"]
    rendezvous = ["--nnodes=2", "--nproc_per_node=1", "--rdzv_backend=c10d", f"--rdzv_endpoint=127.0.0.1:{port}"]
    nodes = []
    for name in ("node0", "node1"):  # no shared disk: only the node with process 0 writes a record
        (tmp_path / name).mkdir()
        command = [*LAUNCH, *rendezvous, "--rdzv_id=kqv", "--local_addr=127.0.0.1", ROOT / "train.py", *run]
        command += ["--dtype=float32"]
        options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        nodes.append(subprocess.Popen(command, cwd=tmp_path / name, env=ENVIRONMENT, **options))
    for node in nodes:
        _, error = node.communicate(timeout=200)
        assert node.returncode == 0, error
    (written,) = tmp_path.glob("node*/out")
    assert train(*run).code == 0
    for key in ("train_loss", "val_loss"):
        ours, theirs = column(tmp_path / "out", key), column(written, key)
        assert ours.keys() == theirs.keys() and all(theirs[i] == pytest.approx(ours[i], abs=1e-5) for i in ours)
