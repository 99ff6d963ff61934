"""The same work here and in a peer, nanoGPT or Hugging Face's transformers, side by side:

python bench.py train generate --peer=../nanoGPT --size=small --json=bench.json

Each side runs in processes of its own, in turn (A B A B ...), on the same shapes, data and threads; beside it stands
what this machine can do at best. The peer is a checkout of yours, run as it is, and nothing is written into it. This
process never imports torch: on Linux, the peak memory of a process it starts would not read lower than its own.
"""

import importlib.metadata
import itertools
import json
import os
import pickle
import platform
import random
import re
import runpy
import shlex
import shutil
import signal
import statistics
import string
import sys
import sysconfig
import tempfile
import time
from array import array
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from kqv import ROOT, cli, settings
from kqv.errors import UserError
from kqv.machine import cpu_name, git, peak_flops
from kqv.measure import Measured, call, in_turn, limits, row, run
from kqv.plan import flops_per_token, model_config, padded_vocab_size, parameters
from kqv.rundir import write_whole
from kqv.settings import TrainConfig
from kqv.tables import print_table

CHARS = string.printable[:65]  # as many as tiny Shakespeare has
WARM_UP = 5  # iterations of training that are not counted
PROMPT, NEW = 64, 128  # tokens
DOCUMENT = 5000  # characters, about the mean of OpenWebText's documents
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


@dataclass(kw_only=True)
class Bench:
    POSITIONAL: ClassVar[str] = "tasks"
    tasks: Annotated[tuple[str, ...], "train | generate | prepare | loss, one or more"] = ()
    peer: Annotated[
        tuple[str, ...], "folder of a nanoGPT checkout, or hf: transformers, to generate; give it twice for both"
    ] = ()
    size: Annotated[
        tuple[str, ...], "baby | small | gpt2, the models of train and generate; can be given more than once"
    ] = ("baby",)
    repeats: Annotated[int, "how many times each side runs"] = 3
    steps: Annotated[int | None, "iterations that train times in each run; None: some seconds' worth"] = None
    device: Annotated[str, "auto | cpu | cuda | mps; loss: cpu, unless cuda is named"] = "auto"
    threads: Annotated[int | None, "of both sides (OMP_NUM_THREADS); None: PyTorch's choice"] = None
    dtype: Annotated[Literal["float32", "bfloat16"], "of the weights of both sides in generate"] = "float32"
    quantize: Annotated[Literal["int8"] | None, "of our side in generate"] = None
    flags: Annotated[str, "more settings for our train.py in train and loss: '--compile --dtype=bfloat16'"] = ""
    peer_flags: Annotated[str, "more settings for the peer's train.py"] = ""
    config: Annotated[str | None, "what loss runs on our side; None: the same recipe as nanoGPT's for the device"] = (
        None
    )
    input: Annotated[str | None, "loss: the text, None downloads tiny Shakespeare; prepare: file or folder"] = None
    megabytes: Annotated[int, "text for prepare: Python's own sources, or the input, over and over"] = 200
    json: Annotated[str | None, "also write the results to this file"] = None

    def __post_init__(self):
        if not self.tasks or not set(self.tasks) <= set(TASKS):
            unknown = f"task {next(t for t in self.tasks if t not in TASKS)!r}" if self.tasks else "which task?"
            raise UserError(f"{unknown}: expected {' | '.join(TASKS)}")
        settings.at_least(self, 1, "repeats", "steps", "threads", "megabytes")
        if unknown := set(self.size) - set(SHAPES):
            raise UserError(f"size={min(unknown)!r}: expected {' | '.join(SHAPES)}")
        for peer in self.peer:
            if peer != "hf" and not (peer and all((Path(peer) / name).is_file() for name in ("train.py", "model.py"))):
                raise UserError(f"peer={peer!r}: not a checkout of nanoGPT, it has no train.py and model.py")
        self.peer = tuple(dict.fromkeys(peer if peer == "hf" else str(Path(peer).resolve()) for peer in self.peer))
        if len(self.peer) > 1 + ("hf" in self.peer):
            raise UserError(f"peer={self.peer[-1]!r}: one checkout is enough, and hf beside it")
        if self.peer == ("hf",) and set(self.tasks) != {"generate"}:
            raise UserError("peer='hf' is for generate alone; the others need a nanoGPT checkout")
        if "loss" in self.tasks and self.device.partition(":")[0] not in ("auto", "cpu", "cuda"):
            raise UserError(f"device={self.device!r}: loss runs on cpu | cuda")
        for key in ("flags", "peer_flags"):
            try:
                shlex.split(getattr(self, key))
            except ValueError as error:
                raise UserError(f"{key}={getattr(self, key)!r}: {error}") from None
        if self.json and (Path(self.json).is_dir() or not Path(self.json).resolve().parent.is_dir()):
            raise UserError(f"json={self.json!r}: not a file in a folder that there is")

    @property
    def nanogpt(self) -> str | None:
        return next((peer for peer in self.peer if peer != "hf"), None)


# -- train: milliseconds of an iteration -------------------------------------------------------------------------------


def write_meta_pkl(folder: Path, chars: str) -> None:
    meta = {"vocab_size": len(chars), "itos": dict(enumerate(chars)), "stoi": {c: i for i, c in enumerate(chars)}}
    (folder / "meta.pkl").write_bytes(pickle.dumps(meta))


def time_training(name: str, command: list[Any], cwd: Any, steps: int) -> Measured:
    """The value is the median of the times that train.py prints, without the warm-up and the evaluations."""
    measured = run(name, command, cwd)
    times = re.findall(r"^iter (\d+): loss \S+, time ([\d.]+)ms", measured.output, re.MULTILINE)
    counted = [float(ms) for iteration, ms in times if WARM_UP <= int(iteration) < WARM_UP + steps]
    if len(counted) < steps:
        raise UserError(f"{name} printed the times of {len(counted)} iterations of the {steps} that count")
    return replace(measured, value=statistics.median(counted))


def train(cfg: Bench, size: str, work: Path, machine: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Both train.py on the same random tokens; both evaluate and save once before and once after what is counted."""
    device, shape, steps = machine["device"], SHAPES[size], cfg.steps or STEPS[size]
    if device == "cuda" and size == "gpt2":
        shape = shape | {"block_size": 1024, "batch_size": 12}
    vocab_size, data = 50257 if size == "gpt2" else len(CHARS), work / "tokens"
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

    def flops(flags: str) -> int:
        """Of an iteration."""
        ran, _ = cli.parse(TrainConfig, [*both, *shlex.split(flags)])
        tokens = ran.block_size * ran.batch_size * ran.gradient_accumulation_steps
        return flops_per_token(model_config(ran, padded_vocab_size(vocab_size))) * tokens

    own_flops, peer_flops = flops(cfg.flags), flops(cfg.peer_flags)  # flags that cannot be stop it here
    a, b = in_turn(
        cfg.repeats,
        f"train {size} (ms: ours, peer)",
        lambda _: time_training("our train.py", ours, work, steps),
        (lambda _: time_training("the peer's train.py", peer, cfg.nanogpt, steps)) if cfg.nanogpt else None,
    )
    dtype = re.search(r" in torch\.(\w+);", a[0].output)[1]
    limit = peak_flops(machine["name"], dtype) or machine.get(dtype)
    peer_limit = limit if device == "cuda" else machine["float32"]  # nanoGPT has no autocast but on GPUs
    shares = {"share": lambda ms: own_flops / ms * 1000 / limit}
    shares["peer_share"] = lambda ms: peer_flops / ms * 1000 / peer_limit
    yield row(("train", size, device, "ms/iteration"), a, b, limit=limit, **shares if limit else {})


# -- generate: tokens a second -----------------------------------------------------------------------------------------


def write_tokens(
    side: str, shape: dict[str, int], dtype: str, device: str, batch: int, greedy: bool, quantize: str | None = None
) -> dict[str, Any]:
    """Time how a model with random weights generates. `side`: hf, or a folder with a model.py, ours or nanoGPT's."""
    import torch

    torch.backends.cuda.enable_cudnn_sdp(False)  # as sample.py, for all sides
    torch.manual_seed(1337)
    prompt = torch.randint(shape["vocab_size"], (1, PROMPT), device=device)  # which all samples of a batch share
    ours, keys = side == str(ROOT), {"temperature": 0.0} if greedy else {"temperature": 0.8, "top_k": 200}
    if side == "hf":
        from transformers import GPT2Config, GPT2LMHeadModel

        shape = {"n_positions" if key == "block_size" else key: value for key, value in shape.items()}
        model = GPT2LMHeadModel(GPT2Config(**shape, bos_token_id=None, eos_token_id=None))  # so it cannot end early
        keys = {"do_sample": False, "attention_mask": torch.ones_like(prompt)}
    else:
        sys.path.insert(0, side)
        from model import GPT, GPTConfig

        model = GPT(GPTConfig(**shape, bias=True))
        keys |= {"generators": [torch.Generator().manual_seed(1337 + i) for i in range(batch)]} if ours else {}
    model.to(device, getattr(torch, dtype)).eval()
    if ours:
        from kqv.quantized import pack

        pack(model, batch, quantize)
    for new in (8, NEW):  # the first to warm up
        started = time.perf_counter()
        tokens = model.generate(prompt, max_new_tokens=new, **keys)
        made = sum(1 for _ in tokens) if ours else tokens.size(1) - PROMPT
        if device != "cpu":
            torch.accelerator.synchronize()
    assert made == NEW
    return {"value": batch * NEW / (time.perf_counter() - started)}


def time_tokens(dtype: str, device: str) -> dict[str, float]:
    """Milliseconds a token with a context of T = 256: "early" from token 100 on, "value" from token 4 T on.

    Both are means over T / 2 tokens: past T that holds exactly one refill of the cache.
    """
    import torch

    from model import GPT, GPTConfig

    torch.backends.cuda.enable_cudnn_sdp(False)  # as sample.py
    T = 256
    torch.manual_seed(1337)
    model = GPT(GPTConfig(n_layer=6, n_head=6, n_embd=384, block_size=T, vocab_size=len(CHARS)))
    model.to(device, getattr(torch, dtype)).eval()
    clock, start = [time.perf_counter()], torch.zeros(1, 1, dtype=torch.int64, device=device)
    for token in model.generate(start, 4 * T + T // 2, [torch.Generator().manual_seed(1337)]):
        token.item()  # waits for the device
        clock.append(time.perf_counter())
    early, late = (1000 * (clock[at + T // 2] - clock[at]) / (T // 2) for at in (100, 4 * T))
    return {"early": early, "value": late}


def generate(cfg: Bench, size: str, work: Path, machine: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """One continuation beside each peer's; ours alone: ten at once, and what a token far past block_size costs."""
    device, what = machine["device"], f"{size} {cfg.quantize or cfg.dtype}"
    shape = {key: value for key, value in SHAPES[size].items() if key != "batch_size"} | {"block_size": 1024}
    shape["vocab_size"] = vocab_size = 50257 if size == "gpt2" else len(CHARS)
    c = model_config(TrainConfig(**SHAPES[size] | {"block_size": 1024, "bias": True}), vocab_size)
    weights = sum(parameters(c).values()) - c.block_size * c.n_embd  # of the positions only one row is read
    peer_limit = machine["read"] / (weights * (2 if cfg.dtype == "bfloat16" else 4))  # each token reads all weights
    limit = machine["read"] / weights if cfg.quantize else peer_limit
    shares = {"share": lambda speed: speed / limit, "peer_share": lambda speed: speed / peer_limit}
    same = {"dtype": cfg.dtype, "device": device}

    for turn, peer in enumerate(cfg.peer or (None,)):
        full = same | {"shape": shape, "greedy": peer == "hf"}

        def ours(batch: int, full: dict[str, Any] = full) -> Measured:
            return call("our model.py", write_tokens, work, side=str(ROOT), batch=batch, quantize=cfg.quantize, **full)

        def theirs(_: int, side: str | None = peer, full: dict[str, Any] = full) -> Measured:
            return call("the peer's model", write_tokens, work, side=side, batch=1, **full)

        sides = [lambda _: ours(1), theirs if peer else None, None if turn else lambda _: ours(10)]
        a, b, ten = in_turn(cfg.repeats, f"generate {size} (tokens/s: ours, peer, 10 at once)", *sides)
        name = f" ({Path(peer).name})" if len(cfg.peer) > 1 else ""
        yield row(("generate" + name, what, device, "tokens/s"), a, b, limit=limit, **shares)
        if ten:
            gain = statistics.median(m.value for m in ten) / statistics.median(m.value for m in a)
            yield row(("generate: 10 at once (ratio: to 1)", what, device, "tokens/s"), ten, [], ratio=gain)
    if size != cfg.size[0]:  # of a model of its own, once
        return
    (far,) = in_turn(cfg.repeats, "generate (ms/token)", lambda _: call("our model.py", time_tokens, work, **same))
    flat = statistics.median(m.found["early"] for m in far) / statistics.median(m.value for m in far)
    what = ("generate: from token 4 T (ratio: from 100)", f"small {cfg.dtype}", device, "ms/token")
    yield row(what, far, [], ratio=flat)


# -- prepare: tokens a second ------------------------------------------------------------------------------------------


def write_documents(path: str | None, jsonl: Path, megabytes: int) -> int:
    """A file, the files of a folder, or of Python's library, cut into documents, again and again; how many there are.

    UserError where there is no text.
    """
    folder, written, count = Path(path or sysconfig.get_path("stdlib")), 0, 0
    files = [folder] if folder.is_file() else sorted(folder.rglob("*" if path else "*.py"))
    files = [file for file in files if file.is_file() and "site-packages" not in file.parts]
    texts = [file.read_text(encoding="utf-8", errors="replace") for file in files]
    texts = [text[at : at + DOCUMENT] for text in texts for at in range(0, len(text), DOCUMENT)]
    if not texts:
        raise UserError(f"input={path!r}: there is no text in it")
    with jsonl.open("w", encoding="utf-8") as file:
        for count, text in enumerate(itertools.cycle(texts)):
            if written >= 1e6 * megabytes:
                return count
            file.write(json.dumps({"text": text}) + "\n")
            written += len(text.encode())


def save_arrow(jsonl: str, folder: str) -> dict:
    import datasets

    datasets.Dataset.from_json(jsonl).save_to_disk(folder)
    return {}


def run_openwebtext(script: str, folder: str, workers: int) -> dict:
    """nanoGPT's data/openwebtext/prepare.py, on our documents in place of those it would download."""
    import datasets

    split, tokenize = datasets.Dataset.train_test_split, datasets.DatasetDict.map
    datasets.disable_caching()  # else the second run would find the tokens of the first
    datasets.load_dataset = lambda *_, **__: {"train": datasets.load_from_disk(folder)}
    # it writes a split in 1024 parts, so it fails where a split has fewer documents
    datasets.Dataset.train_test_split = lambda self, **keys: split(self, **keys | {"test_size": 1024})
    datasets.DatasetDict.map = lambda self, *args, **keys: tokenize(self, *args, **keys | {"num_proc": workers})
    runpy.run_path(script, run_name="__main__")
    return {}


def prepare(cfg: Bench, size: str, work: Path, machine: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """prepare/text.py and nanoGPT's data/openwebtext/prepare.py, whole commands, with as many workers."""
    jsonl, script = work / "text.jsonl", work / "peer" / "prepare.py"  # the peer's writes where it lies
    documents = write_documents(cfg.input, jsonl, cfg.megabytes)
    theirs = {"script": str(script), "folder": str(work / "arrow"), "workers": os.cpu_count() or 1}
    if cfg.nanogpt:
        importlib.metadata.version("datasets")  # a missing package is named before the work begins
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


def loss(cfg: Bench, size: str, work: Path, machine: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """How long a recipe for tiny Shakespeare takes, from nothing to its last evaluation, and the loss it ends with.

    Both losses are measured on the whole validation split, by our train.py. Our runs differ in their seeds.
    """
    device = cfg.device if cfg.device.startswith("cuda") else "cpu"
    kind = device.partition(":")[0]
    recipe = cfg.config or OUR_LOSS[kind]
    data, own = work / "shakespeare_char", [f"--data_dir={work}", "--dataset=shakespeare_char"]
    command = [sys.executable, ROOT / "prepare" / "shakespeare_char.py", own[0]]
    run("prepare/shakespeare_char.py", command + ([f"--input={Path(cfg.input).resolve()}"] if cfg.input else []), work)
    write_meta_pkl(data, json.loads((data / "meta.json").read_text(encoding="utf-8"))["tokenizer"]["chars"])
    evaluation = [sys.executable, ROOT / "train.py", *own, "--init_from=resume", "--eval_only=True", "--eval_iters=0"]
    evaluation += ["--device=cpu", "--dtype=float32"]

    def one(name: str, command: list[Any], cwd: Any, repeat: int) -> Measured:
        out = work / f"{name}-{repeat}"
        # a user's first run finds nothing that torch.compile has made before
        measured = run(f"{name}: train.py", [*command, f"--out_dir={out}"], cwd, TORCHINDUCTOR_CACHE_DIR=f"{out}-cache")
        if (out / "best.pt").exists():  # nanoGPT keeps its best: where a recipe overfits, its last would lose
            (out / "best.pt").replace(out / "ckpt.pt")
        said = run(f"{name}: the loss", [*evaluation, f"--out_dir={out}"], work).output
        lines = zip(measured.output.split("\n"), measured.arrived, strict=False)
        evaluated = max(at for line, at in lines if re.match(r"step \d+: train loss", line))
        return replace(measured, value=evaluated, found={"loss": float(re.search(r"val loss (\S+)", said)[1])})

    def ours(repeat: int) -> Measured:
        seed = f"--seed={1337 + repeat}"
        path = Path(recipe).resolve() if Path(recipe).is_file() else recipe
        command = [sys.executable, ROOT / "train.py", path, *own, seed, f"--device={device}", *shlex.split(cfg.flags)]
        return one("ours", command, work, repeat)

    def peer(repeat: int) -> Measured:
        words = shlex.split(f"{PEER_LOSS[kind]} --device={device} {cfg.peer_flags}")
        return one("peer", [sys.executable, "train.py", *words, f"--dataset={data}"], cfg.nanogpt, repeat)

    a, b = in_turn(cfg.repeats, "loss (s: ours, peer)", ours, peer if cfg.nanogpt else None)
    yield row(("loss: to the last evaluation", Path(recipe).stem, kind, "s"), a, b)
    whole = ([replace(m, value=m.seconds) for m in side] for side in (a, b))
    yield row(("loss: the whole command", Path(recipe).stem, kind, "s"), *whole)
    losses = ([replace(m, value=m.found["loss"]) for m in side] for side in (a, b))
    yield row(("loss: whole val split", Path(recipe).stem, kind, "nats/token"), *losses)


TASKS = {"train": train, "generate": generate, "prepare": prepare, "loss": loss}

# -- the report --------------------------------------------------------------------------------------------------------


def versions(peers: tuple[str, ...]) -> dict[str, Any]:
    found = {"python": platform.python_version(), "kqv": git("rev-parse", "HEAD"), "cpu": cpu_name()}
    packages = ("torch", "numpy", *(["transformers"] if "hf" in peers else []))
    found |= {name: importlib.metadata.version(name) for name in packages}
    folder = next((peer for peer in peers if peer != "hf"), None)
    return found | ({"peer": git("-C", folder, "rev-parse", "HEAD")} if folder else {})


def cells(result: dict[str, Any]) -> list[str]:
    """A row of the table: medians, with the least and the most of all runs."""

    def shown(key: str, form: str) -> str:
        runs = result.get(f"{key}_runs", [])
        spread = f" ({min(runs):{form}} to {max(runs):{form}})" if runs else ""
        return "-" if result[key] is None else f"{result[key]:{form}}{spread}"

    both = [f"{shown('share_of_limit', '.1%')} / {shown('peer_share_of_limit', '.1%')}"]
    both += [result["unit"], f"{shown('peak_rss_mb', ',.0f')} / {shown('peer_peak_rss_mb', ',.0f')}"]
    what = [result["task"], f"{result['size']}, {result['device']}"]
    return [*what, shown("ours", ",.4g"), shown("peer", ",.4g"), *both, shown("ratio", ".2f")]


def main(cfg: Bench, origin: dict[str, str]) -> None:
    """Measure kqv, alone or beside a peer: a table with medians, the spread, and at its end the ratio.

    python bench.py train | generate | prepare | loss [--peer=FOLDER_OF_NANOGPT] [--size=small] [--json=FILE]
    """
    known, rows, machine = versions(cfg.peer), [], {}
    if cfg.threads:
        os.environ["OMP_NUM_THREADS"] = str(cfg.threads)
    if {"train", "generate"} & set(cfg.tasks):
        machine = call("the machine's limits", limits, ROOT, device=cfg.device).found
        speeds = f"matrix products {machine['float32'] / 1e9:,.0f} GFLOP/s in float32"
        speeds += f", {machine['bfloat16'] / 1e9:,.0f} in bfloat16" if "bfloat16" in machine else ""
        speeds += f"; reads {machine['read'] / 1e9:,.1f} GB/s"
        print(f"{machine['name']}, {machine['threads']} threads: {speeds}", flush=True)
        known["threads"] = machine["threads"]
    try:
        for task in cfg.tasks:
            for size in cfg.size if task in ("train", "generate") else cfg.size[:1]:
                with tempfile.TemporaryDirectory(prefix="kqv-bench-") as work:
                    for result in TASKS[task](cfg, size, Path(work).resolve(), machine):
                        rows.append(result | {"versions": known})
            if cfg.json:
                write_whole(Path(cfg.json), json.dumps(rows[0] if len(rows) == 1 else rows, indent=1) + "\n")
    finally:  # what there is, also where a task fails
        heading = ["task", "size", "ours (spread)", "peer (spread)", "of limit", "unit", "peak MB", "ratio"]
        if rows:
            print_table([heading, *map(cells, rows)])


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the child is stopped and the folder removed
    cli.run(main, Bench)
