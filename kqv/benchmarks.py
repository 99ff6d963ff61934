"""The benchmarks of bench.py: a training iteration, generation, data preparation, and the time to a loss."""

import importlib.metadata
import json
import os
import random
import re
import shlex
import shutil
import statistics
import sys
from array import array
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from kqv import ROOT
from kqv.cli import parse
from kqv.errors import UserError
from kqv.machine import peak_flops
from kqv.measure import Measured, call, in_turn, row, run
from kqv.peers import (
    CHARS,
    count_model,
    run_openwebtext,
    save_arrow,
    time_tokens,
    write_documents,
    write_meta_pkl,
    write_tokens,
)
from kqv.rundir import BEST, LAST
from kqv.settings import TrainConfig

WARM_UP = 5  # iterations of training that are not counted
SHAPES = {
    "baby": {"n_layer": 4, "n_head": 4, "n_embd": 128, "block_size": 64, "batch_size": 12},
    "small": {"n_layer": 6, "n_head": 6, "n_embd": 384, "block_size": 256, "batch_size": 8},
    "gpt2": {"n_layer": 12, "n_head": 12, "n_embd": 768, "block_size": 256, "batch_size": 2},
}
STEPS = {"baby": 200, "small": 30, "gpt2": 10}
# nanoGPT's recipe for a GPU, and from it the one for a laptop in its README
PEER_LOSS = {"cuda": "config/train_shakespeare_char.py"}
PEER_LOSS["cpu"] = PEER_LOSS["cuda"] + " --device=cpu --compile=False --eval_iters=20 --log_interval=1"
PEER_LOSS["cpu"] += " --block_size=64 --batch_size=12 --n_layer=4 --n_head=4 --n_embd=128 --max_iters=2000"
PEER_LOSS["cpu"] += " --lr_decay_iters=2000 --dropout=0.0"
OUR_LOSS = {"cuda": "configs/train_shakespeare_char.py", "cpu": "configs/train_shakespeare_char_cpu.py"}


def vocabulary(size: str) -> int:
    from kqv.tokenizer import GPT2_VOCAB_SIZE  # imports numpy, which --help need not wait for

    return GPT2_VOCAB_SIZE if size == "gpt2" else len(CHARS)


# -- train: milliseconds of an iteration -------------------------------------------------------------------------------


def time_training(name: str, command: list[Any], cwd: Any, steps: int) -> Measured:
    """Run a train.py; the value is the median of the iteration times that it prints after the warm-up."""
    measured = run(name, command, cwd)
    times = re.findall(r"^iter (\d+): loss \S+, time ([\d.]+)ms", measured.output, re.MULTILINE)
    counted = [float(ms) for iteration, ms in times if WARM_UP <= int(iteration) < WARM_UP + steps]
    if len(counted) < steps:
        raise UserError(f"{name} printed the times of {len(counted)} iterations of the {steps} that count")
    return replace(measured, value=statistics.median(counted))


def train(cfg: Any, size: str, work: Path, machine: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Both train.py on the same random tokens. Both evaluate and save once before and once after the counted steps."""
    device, shape, steps = machine["device"], SHAPES[size], cfg.steps or STEPS[size]
    if device == "cuda" and size == "gpt2":
        shape = shape | {"block_size": 1024, "batch_size": 12}
    vocab_size, data = vocabulary(size), work / "tokens"
    data.mkdir()
    if size != "gpt2":
        write_meta_pkl(data, CHARS)
    for split, tokens in (("train", 1_000_000), ("val", 100_000)):
        (data / f"{split}.bin").write_bytes(array("H", random.Random(1337).choices(range(vocab_size), k=tokens)))
    settings = shape | {"gradient_accumulation_steps": 1, "dropout": 0.0, "decay_lr": False, "device": device}
    settings |= {"eval_iters": 1, "max_iters": WARM_UP + steps, "eval_interval": WARM_UP + steps}
    both = [f"--{key}={value}" for key, value in settings.items()]
    own = [f"--data_dir={work}", "--dataset=tokens", f"--out_dir={work / 'ours'}", *shlex.split(cfg.flags)]
    theirs = [f"--dataset={data}", f"--out_dir={work / 'theirs'}", f"--compile={device == 'cuda'}"]
    theirs += [*(["--dtype=bfloat16"] if device == "cuda" else []), *shlex.split(cfg.peer_flags)]
    ours, peer = [sys.executable, ROOT / "train.py", *both, *own], [sys.executable, "train.py", *both, *theirs]

    # wrong flags end the bench here
    ran = [asdict(parse(TrainConfig, [*both, *shlex.split(flags)])[0]) for flags in (cfg.flags, cfg.peer_flags)]
    counted = [call("counting", count_model, work, settings=side, vocab_size=vocab_size, padded=True) for side in ran]
    own_flops, peer_flops = (count.found["flops"] for count in counted)  # of an iteration
    a, b = in_turn(
        cfg.repeats,
        f"train {size} (ms: ours, peer)",
        lambda _: time_training("our train.py", ours, work, steps),
        (lambda _: time_training("the peer's train.py", peer, cfg.nanogpt, steps)) if cfg.nanogpt else None,
    )
    dtype = re.search(r" in torch\.(\w+)", a[0].output)[1]
    limit = peak_flops(machine["name"], dtype) or machine.get(dtype)
    peer_limit = limit if device == "cuda" else machine["float32"]  # nanoGPT uses autocast on GPUs only
    shares = {"share": lambda ms: own_flops / ms * 1000 / limit}
    shares["peer_share"] = lambda ms: peer_flops / ms * 1000 / peer_limit
    yield row(("train", size, device, "ms/iteration"), a, b, limit=limit, **shares if limit else {})


# -- generate: tokens a second -----------------------------------------------------------------------------------------


def generate(cfg: Any, size: str, work: Path, machine: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """One continuation, beside each peer's; and without a peer: ten at once, and the cost far past block_size."""
    device, what = machine["device"], f"{size} {cfg.quantize or cfg.dtype}"
    shape = {key: value for key, value in SHAPES[size].items() if key != "batch_size"} | {"block_size": 1024}
    shape["vocab_size"] = vocabulary(size)
    settings = asdict(TrainConfig(**SHAPES[size] | {"block_size": 1024, "bias": True}))
    counted = call("counting", count_model, work, settings=settings, vocab_size=shape["vocab_size"], padded=False)
    weights = counted.found["weights"]  # without positions: a token reads only one row of them
    peer_limit = machine["read"] / (weights * (2 if cfg.dtype == "bfloat16" else 4))  # each token reads all weights
    limit = machine["read"] / weights if cfg.quantize else peer_limit
    shares = {"share": lambda speed: speed / limit, "peer_share": lambda speed: speed / peer_limit}
    same = {"dtype": cfg.dtype, "device": device}

    for turn, peer in enumerate(cfg.peer or (None,)):
        full = same | {"shape": shape, "greedy": peer == "hf"}

        def ours(batch: int, full: dict[str, Any] = full) -> Measured:
            return call("our model.py", write_tokens, work, side=str(ROOT), batch=batch, mode=cfg.quantize, **full)

        def theirs(_: int, side: str | None = peer, full: dict[str, Any] = full) -> Measured:
            return call("the peer's model", write_tokens, work, side=side, batch=1, **full)

        sides = [lambda _: ours(1), theirs if peer else None, None if turn else lambda _: ours(10)]
        a, b, ten = in_turn(cfg.repeats, f"generate {size} (tokens/s: ours, peer, 10 at once)", *sides)
        name = f" ({Path(peer).name})" if len(cfg.peer) > 1 else ""
        yield row(("generate" + name, what, device, "tokens/s"), a, b, limit=limit, **shares)
        if ten:
            gain = statistics.median(m.value for m in ten) / statistics.median(m.value for m in a)
            yield row(("generate: 10 at once (ratio: to 1)", what, device, "tokens/s"), ten, [], ratio=gain)
    if size != cfg.size[0]:  # the rest has a model of its own, and runs once
        return
    (late,) = in_turn(cfg.repeats, "generate (ms/token)", lambda _: call("our model.py", time_tokens, work, **same))
    flat = statistics.median(m.found["early"] for m in late) / statistics.median(m.value for m in late)
    what = ("generate: from token 4 T (ratio: from 100)", f"small {cfg.dtype}", device, "ms/token")
    yield row(what, late, [], ratio=flat)


# -- prepare: tokens a second ------------------------------------------------------------------------------------------


def prepare(cfg: Any, size: str, work: Path, machine: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """prepare/text.py and nanoGPT's data/openwebtext/prepare.py: whole commands with the same number of workers."""
    jsonl, script = work / "text.jsonl", work / "peer" / "prepare.py"  # a copy, because it writes into its own folder
    documents = write_documents(cfg.input, jsonl, cfg.megabytes)
    theirs = {"script": str(script), "folder": str(work / "arrow"), "workers": os.cpu_count() or 1}
    if cfg.nanogpt:
        importlib.metadata.version("datasets")  # a missing package is reported before the work begins
        if documents < 2048:
            raise UserError(f"megabytes={cfg.megabytes}: too little for the peer, which needs 2048 documents (11 MB)")
        script.parent.mkdir()
        shutil.copy(Path(cfg.nanogpt) / "data" / "openwebtext" / "prepare.py", script)
        call("datasets", save_arrow, work, jsonl=str(jsonl), folder=theirs["folder"])
    ours = [sys.executable, ROOT / "prepare" / "text.py", f"--input={jsonl}", "--name=ours", f"--data_dir={work}"]
    ours += ["--tokenizer=gpt2", "--val_fraction=0.01"]

    def speed(measured: Measured, folder: Path) -> Measured:
        tokens = sum((folder / name).stat().st_size / 2 for name in ("train.bin", "val.bin"))  # uint16
        return replace(measured, value=tokens / measured.seconds)

    def peer(_: int) -> Measured:
        return speed(call("the peer's prepare.py", run_openwebtext, work, whole_tree=True, **theirs), script.parent)

    a, b = in_turn(
        cfg.repeats,
        "prepare (tokens/s: ours, peer)",
        lambda _: speed(run("prepare/text.py", ours, work, whole_tree=True), work / "ours"),
        peer if cfg.nanogpt else None,
    )
    yield row(("prepare", f"{cfg.megabytes} MB", "cpu", "tokens/s"), a, b)


# -- loss: seconds to the last evaluation ------------------------------------------------------------------------------


def time_to_loss(name: str, command: list[Any], cwd: Any, work: Path, repeat: int) -> Measured:
    """Train to the end; the value is the seconds to the last evaluation, "loss" the loss on the whole val split."""
    out = work / f"{name}-{repeat}"
    # an empty compile cache, as in a user's first run
    measured = run(f"{name}: train.py", [*command, f"--out_dir={out}"], cwd, TORCHINDUCTOR_CACHE_DIR=f"{out}-cache")
    if (out / BEST).exists():  # the best checkpoint is what nanoGPT keeps, so ours is compared with it
        (out / BEST).replace(out / LAST)
    evaluation = [sys.executable, ROOT / "train.py", f"--data_dir={work}", "--dataset=shakespeare_char"]
    evaluation += ["--init_from=resume", "--eval_only=True", "--eval_iters=0", "--device=cpu", "--dtype=float32"]
    output = run(f"{name}: the loss", [*evaluation, f"--out_dir={out}"], work).output
    lines = zip(measured.output.split("\n"), measured.arrived, strict=False)
    evaluated = max(at for line, at in lines if re.match(r"step \d+: train loss", line))
    return replace(measured, value=evaluated, found={"loss": float(re.search(r"val loss (\S+)", output)[1])})


def loss_commands(cfg: Any, work: Path, device: str, recipe: str) -> list[list[Any]]:
    """Prepare tiny Shakespeare; returns our command that trains on it by `recipe`, and the peer's if there is one."""
    data, own = work / "shakespeare_char", [f"--data_dir={work}", "--dataset=shakespeare_char", f"--device={device}"]
    command = [sys.executable, ROOT / "prepare" / "shakespeare_char.py", f"--data_dir={work}"]
    run("prepare/shakespeare_char.py", command + ([f"--input={Path(cfg.input).resolve()}"] if cfg.input else []), work)
    write_meta_pkl(data, json.loads((data / "meta.json").read_text(encoding="utf-8"))["tokenizer"]["chars"])
    path = Path(recipe).resolve() if Path(recipe).is_file() else recipe
    ours = [sys.executable, ROOT / "train.py", path, *own, *shlex.split(cfg.flags)]
    theirs = shlex.split(f"{PEER_LOSS[device.partition(':')[0]]} --device={device} {cfg.peer_flags}")
    return [ours, *([[sys.executable, "train.py", *theirs, f"--dataset={data}"]] if cfg.nanogpt else [])]


def loss(cfg: Any, size: str, work: Path, machine: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Seconds that a recipe for tiny Shakespeare takes, from the start to its last evaluation; and its loss.

    Our train.py measures both losses on the whole validation split. Our runs differ in their seeds.
    """
    device = cfg.device if cfg.device.startswith("cuda") else "cpu"
    kind = device.partition(":")[0]
    recipe = cfg.config or OUR_LOSS[kind]
    ours, *theirs = loss_commands(cfg, work, device, recipe)
    a, b = in_turn(
        cfg.repeats,
        "loss (s: ours, peer)",
        lambda repeat: time_to_loss("ours", [*ours, f"--seed={1337 + repeat}"], work, work, repeat),
        (lambda repeat: time_to_loss("peer", theirs[0], cfg.nanogpt, work, repeat)) if theirs else None,
    )
    yield row(("loss: to the last evaluation", Path(recipe).stem, kind, "s"), a, b)
    whole = ([replace(m, value=m.seconds) for m in side] for side in (a, b))
    yield row(("loss: the whole command", Path(recipe).stem, kind, "s"), *whole)
    losses = ([replace(m, value=m.found["loss"]) for m in side] for side in (a, b))
    yield row(("loss: whole val split", Path(recipe).stem, kind, "nats/token"), *losses)


TASKS = {"train": train, "generate": generate, "prepare": prepare, "loss": loss}
