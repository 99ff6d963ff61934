"""The work that bench.py runs in child processes: with our model.py, with nanoGPT's, with transformers.

Most functions return a dict that JSON can hold. Importing this module does not import torch.
"""

import importlib.util
import itertools
import json
import pickle
import runpy
import string
import sys
import sysconfig
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

from kqv import ROOT
from kqv.errors import UserError

CHARS = string.printable[:65]  # as many as tiny Shakespeare has
PROMPT, NEW = 64, 128  # tokens
DOCUMENT = 5000  # characters, about the mean of OpenWebText's documents


def load_model_file(folder: str) -> ModuleType:
    """The model.py of a checkout, ours or nanoGPT's: both have GPT and GPTConfig."""
    spec = importlib.util.spec_from_file_location("model", Path(folder) / "model.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["model"] = module  # dataclasses look up their module
    spec.loader.exec_module(module)
    return module


def count_model(settings: dict[str, Any], vocab_size: int, padded: bool) -> dict[str, int]:
    """FLOPs of a training iteration, and the number of weights in matrix products, for a TrainConfig's settings.

    If `padded`, the vocabulary is rounded up as in training.
    """
    from kqv.build import empty_model, model_config
    from kqv.data import padded_vocab_size

    ours, cfg = load_model_file(str(ROOT)), SimpleNamespace(**settings)
    config = model_config(ours.GPTConfig, cfg, padded_vocab_size(vocab_size) if padded else vocab_size)
    model = empty_model(ours.GPT, config)
    tokens = config.block_size * settings["batch_size"] * settings["gradient_accumulation_steps"]
    return {"flops": model.flops_per_token() * tokens, "weights": model.num_params()}


# -- a step of training, on random tokens ------------------------------------------------------------------------------


def time_steps(
    side: str, shape: dict[str, int], batch: int, device: str, ready: Callable[[], Any] = lambda: None
) -> dict[str, float]:
    """Milliseconds of a step in bfloat16, compiled on GPUs: forward, backward, clipping, AdamW. `side`: its folder.

    "memory_mb": what PyTorch holds of the GPU; "flops": of a step, on our side.
    """
    import torch

    torch.set_float32_matmul_precision("high")  # as both train.py
    torch.manual_seed(1337)
    theirs = load_model_file(side)
    model = theirs.GPT(theirs.GPTConfig(**shape, bias=False, dropout=0.0)).to(device)
    x, y = torch.randint(shape["vocab_size"], (2, batch, shape["block_size"]), device=device)
    autocast, on_gpu = torch.autocast(device, torch.bfloat16), device == "cuda"
    if side == str(ROOT):
        from kqv import optim
        from kqv.distributed import compile_and_wrap, connect
        from kqv.loss import NextTokenLoss
        from kqv.machine import room_for_logits
        from kqv.passes import Passes

        processes = connect(device, "auto")
        loss_model = NextTokenLoss(model, room_for_logits(processes.device))
        compiled = compile_and_wrap(loss_model, on_gpu, 0, (x, y), autocast, processes, say=lambda _: None)
        passes = Passes(compiled, autocast, torch.amp.GradScaler(device, enabled=False), micro_steps=1)
        if on_gpu:
            passes.record(x, y)
        optimizer = optim.adamw(model.parameters(), 6e-4, (0.9, 0.95), 0.1)
        compute, forget = partial(passes, 0, x, y), passes.forget_gradients
    else:
        optimizer = model.configure_optimizers(0.1, 6e-4, (0.9, 0.95), device)
        compiled = torch.compile(model) if on_gpu else model

        def compute() -> None:
            with autocast:
                loss = compiled(x, y)[1]
            loss.backward()

        forget = partial(optimizer.zero_grad, set_to_none=True)

    def milliseconds(steps: int) -> float:
        started = time.perf_counter()
        for _ in range(steps):
            compute()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            forget()
        if on_gpu:
            torch.cuda.synchronize()
        return 1000 * (time.perf_counter() - started) / steps

    milliseconds(3 if on_gpu else 1)
    if on_gpu:
        torch.cuda.empty_cache()  # memory for the other programs, until it is this one's turn
    ready()
    if on_gpu:
        milliseconds(10)
    found = {"value": milliseconds(30 if on_gpu else 1)}  # a step takes seconds on a CPU without bfloat16
    if on_gpu:
        found["memory_mb"] = torch.cuda.max_memory_reserved() / 1e6
    if side == str(ROOT):
        found["flops"] = model.flops_per_token() * x.numel()
    return found


# -- generate ----------------------------------------------------------------------------------------------------------


def write_tokens(
    side: str,
    shape: dict[str, int],
    dtype: str,
    device: str,
    batch: int,
    greedy: bool,
    mode: str | None = None,
    new: int = NEW,
    ready: Callable[[], Any] = lambda: None,
) -> dict[str, Any]:
    """Tokens per second that a model with random weights generates. `side`: hf, or the folder of a model.py.

    `mode`, of our side: on a GPU eager, graph or compiled; on a CPU int8. `new`: tokens that are timed. "bytes": of our
    weights in products.
    """
    import torch

    torch.backends.cuda.enable_cudnn_sdp(False)  # as sample.py, for all sides
    torch.manual_seed(1337)
    prompt = torch.randint(shape["vocab_size"], (1, PROMPT), device=device)  # shared by all samples of a batch
    ours, keys = side == str(ROOT), {"temperature": 0.0} if greedy else {"temperature": 0.8, "top_k": 200}
    if side == "hf":
        from transformers import GPT2Config, GPT2LMHeadModel

        shape = {"n_positions" if key == "block_size" else key: value for key, value in shape.items()}
        model = GPT2LMHeadModel(GPT2Config(**shape, bos_token_id=None, eos_token_id=None))  # so it cannot end early
        keys = {"do_sample": False, "attention_mask": torch.ones_like(prompt)}
    else:
        theirs = load_model_file(side)
        model = theirs.GPT(theirs.GPTConfig(**shape, bias=True))
        keys |= {"generators": [torch.Generator().manual_seed(1337 + i) for i in range(batch)]} if ours else {}
    model.to(device, getattr(torch, dtype)).eval()
    weights = model.num_params() if ours else None  # before they are packed
    generate = model.generate
    if ours and device != "cpu" and mode != "eager":
        from kqv.generate import FastGeneration

        generate = FastGeneration(model, theirs.KVCache, theirs.next_token, compile=mode == "compiled")
    elif ours and device == "cpu":
        from kqv.quantized import pack

        pack(model, batch, "int8" if mode == "int8" else None)
    for number in (8, new):  # the first to warm up
        if number == new:
            ready()
        started = time.perf_counter()
        tokens = generate(prompt, max_new_tokens=number, **keys)
        made = sum(1 for _ in tokens) if ours else tokens.size(1) - PROMPT
        if device != "cpu":
            torch.accelerator.synchronize()
    assert made == new
    found = {"value": batch * new / (time.perf_counter() - started)}
    return found | ({"bytes": weights * getattr(torch, dtype).itemsize} if ours else {})


def time_tokens(dtype: str, device: str) -> dict[str, float]:
    """Milliseconds per token with a context of T = 256: "early" from token 100 on, "value" from token 4 T on.

    Both are means over T / 2 tokens, which past T contain exactly one refill of the cache.
    """
    import torch

    ours = load_model_file(str(ROOT))
    torch.backends.cuda.enable_cudnn_sdp(False)  # as sample.py
    T = 256
    torch.manual_seed(1337)
    model = ours.GPT(ours.GPTConfig(n_layer=6, n_head=6, n_embd=384, block_size=T, vocab_size=len(CHARS)))
    model.to(device, getattr(torch, dtype)).eval()
    clock, start = [time.perf_counter()], torch.zeros(1, 1, dtype=torch.int64, device=device)
    for token in model.generate(start, 4 * T + T // 2, [torch.Generator().manual_seed(1337)]):
        token.item()  # waits for the device
        clock.append(time.perf_counter())
    early, late = (1000 * (clock[at + T // 2] - clock[at]) / (T // 2) for at in (100, 4 * T))
    return {"early": early, "value": late}


# -- prepare -----------------------------------------------------------------------------------------------------------


def write_documents(path: str | None, jsonl: Path, megabytes: int) -> int:
    """Write `megabytes` of documents, repeated as needed, from a file, a folder, or Python's library; returns how many.

    Raises UserError if there is no text.
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
    """Run nanoGPT's data/openwebtext/prepare.py on our documents instead of its download."""
    import datasets

    split, tokenize = datasets.Dataset.train_test_split, datasets.DatasetDict.map
    datasets.disable_caching()  # else the second run would reuse the tokens of the first
    datasets.load_dataset = lambda *_, **__: {"train": datasets.load_from_disk(folder)}
    # it writes each split in 1024 parts, and fails if a split has fewer documents
    datasets.Dataset.train_test_split = lambda self, **keys: split(self, **keys | {"test_size": 1024})
    datasets.DatasetDict.map = lambda self, *args, **keys: tokenize(self, *args, **keys | {"num_proc": workers})
    runpy.run_path(script, run_name="__main__")
    return {}


def write_meta_pkl(folder: Path, chars: str) -> None:
    meta = {"vocab_size": len(chars), "itos": dict(enumerate(chars)), "stoi": {c: i for i, c in enumerate(chars)}}
    (folder / "meta.pkl").write_bytes(pickle.dumps(meta))
