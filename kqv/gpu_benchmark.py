"""The benchmark of one GPU, in under four minutes: a training step, generation, and the time to a loss.

Compiling takes most of that time. So all programs start at once and compile side by side, and then each is timed alone.
A program that fails is named, and the others go on.
"""

import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from kqv import ROOT
from kqv.benchmarks import SHAPES, loss_commands, vocabulary
from kqv.errors import UserError
from kqv.machine import peak_flops
from kqv.measure import CHILD, Measured, Program, limits, row
from kqv.peers import time_steps, write_tokens

# seconds: until all programs are ready, for the timing of one, for all
READY, TIMING, ALL = 110, 25, 225
BATCHES, SAMPLES, MODES = (12, 32), (1, 10), ("graph", "eager", "compiled")
TOKENS = 256  # that one timing generates
TARGET = 1.4697  # val loss on tiny Shakespeare: what nanoGPT publishes for its 5,000 iterations


def gpu(cfg: Any, size: str, work: Path, machine: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Training steps, generation, and seconds to TARGET, each once. On a CPU nothing is compiled or trained to it.

    Raises UserError if no program could measure.
    """
    began, device, nanogpt = time.monotonic(), "cpu" if cfg.device == "cpu" else "cuda", cfg.nanogpt
    layers = {key: SHAPES[size][key] for key in ("n_layer", "n_head", "n_embd")}
    shape = layers | {"vocab_size": vocabulary(size), "block_size": 1024 if device == "cuda" else 256}
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(work / "compiled")  # empty, and shared by all

    programs = start_all(shape, device, nanogpt, hf="hf" in cfg.peer)
    ours, theirs = None, []
    if device == "cuda":
        try:
            ours, *theirs = loss_commands(cfg, work, device, cfg.config or "configs/fast_shakespeare_char.py")
        except UserError as error:  # the text could not be downloaded
            print(f"tiny Shakespeare: {error}", file=sys.stderr, flush=True)
    if theirs:  # its timed run finds its compiled code in the cache
        warm = [*theirs[0], "--max_iters=1", "--eval_iters=1", f"--out_dir={work / 'warm'}"]
        warming = subprocess.Popen(warm, cwd=nanogpt, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    for program in programs.values():
        program.wait(began + READY)
    if theirs:
        stop(warming, began + READY)

    found = {}
    for key, program in programs.items():
        result = program.measure(TIMING)
        print(f"{' '.join(map(str, key))}: {result}", file=sys.stderr, flush=True)
        if isinstance(result, dict):
            found[key] = [Measured("", [], 0, result.get("memory_mb", 0.0), result.get("value", 0.0), result)]
    if not found:
        raise UserError(f"device={device}: nothing could be measured; the reasons are above")
    yield from step_rows(found, size, device)
    yield from generation_rows(found, size, device)

    if ours:
        commands = {"ours": (ours, work)} | ({"nanoGPT": (theirs[0], nanogpt)} if theirs else {})
        seconds = {}
        for side, (command, cwd) in commands.items():
            seconds[side] = time_to(TARGET, [*command, f"--out_dir={work / side}"], cwd, began + ALL)
            print(f"to a val loss of {TARGET}, {side}: {seconds[side]}", file=sys.stderr, flush=True)
        reached = {side: [Measured("", [], 0, 0.0, at)] for side, at in seconds.items() if at}
        if "ours" in reached:
            what = (f"seconds from the command to a val loss of {TARGET}", "tiny Shakespeare", device, "s")
            yield row(what, reached["ours"], reached.get("nanoGPT", []))


def start_all(shape: dict[str, int], device: str, nanogpt: str | None, hf: bool) -> dict[tuple, Program]:
    """All programs that measure a step or generation, by what they measure: (task, batch, side or mode)."""
    programs = {("limits",): Program(limits, device=device)}
    sides = {"ours": str(ROOT)} | ({"nanoGPT": nanogpt} if nanogpt else {})
    for batch in BATCHES:
        for side, folder in sides.items():
            programs["step", batch, side] = Program(time_steps, side=folder, shape=shape, batch=batch, device=device)
    same = {"shape": shape, "dtype": "bfloat16" if device == "cuda" else "float32", "device": device, "new": TOKENS}
    for batch in SAMPLES:
        for mode in MODES if device == "cuda" else MODES[:1]:
            program = Program(write_tokens, side=str(ROOT), batch=batch, greedy=False, mode=mode, **same)
            programs["generate", batch, mode] = program
    for side in ([nanogpt] if nanogpt else []) + (["hf"] if hf else []):
        name = "hf" if side == "hf" else "nanoGPT"
        programs["generate", 1, name] = Program(write_tokens, side=side, batch=1, greedy=side == "hf", **same)
    return programs


def step_rows(found: dict[tuple, list[Measured]], size: str, device: str) -> Iterator[dict[str, Any]]:
    limit = found.get(("limits",), [None])[0]
    peak = limit and (peak_flops(limit.found["name"], "bfloat16") or limit.found.get("bfloat16"))
    for batch in BATCHES:
        ours, theirs = (found.get(("step", batch, side), []) for side in ("ours", "nanoGPT"))
        if ours:
            flops = ours[0].found["flops"]
            share = {"limit": peak, "share": lambda ms, flops=flops: flops / ms * 1000 / peak} if peak else {}
            yield row((f"step, batch {batch}", size, device, "ms/iteration"), ours, theirs, **share)


def generation_rows(found: dict[tuple, list[Measured]], size: str, device: str) -> Iterator[dict[str, Any]]:
    read = found[("limits",)][0].found["read"] if ("limits",) in found else None
    for batch in SAMPLES:
        for mode in MODES:
            if ours := found.get(("generate", batch, mode), []):
                limit = read and batch * read / ours[0].found["bytes"]  # a token of each sample reads all weights
                share = {"limit": limit, "share": lambda speed, limit=limit: speed / limit} if limit else {}
                sides = [side for side in ("nanoGPT", "hf") if ("generate", batch, side) in found] or [None]
                for side in sides if mode == "graph" else sides[:1]:
                    name = f"generate {batch}, {mode}" + (f" ({side})" if side else "")
                    theirs = found.get(("generate", batch, side), [])
                    yield row((name, size, device, "tokens/s"), ours, theirs, **share)


def time_to(target: float, command: list[Any], cwd: Any, deadline: float) -> float | None:
    """Seconds until a train.py prints an evaluation with a val loss of at most `target`; None: it did not in time."""
    began = time.monotonic()
    with subprocess.Popen(
        list(map(str, command)),
        cwd=cwd,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env=os.environ | CHILD,
    ) as child:
        timer = threading.Timer(max(0, deadline - began), child.kill)
        timer.start()
        try:
            for line in child.stdout:
                loss = re.match(r"step \d+: train loss \S+, val loss ([\d.]+)", line)
                if loss and float(loss[1]) <= target:
                    return time.monotonic() - began
        finally:
            timer.cancel()
            child.kill()
    return None


def stop(child: subprocess.Popen, deadline: float) -> None:
    try:
        child.wait(max(0.0, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:
        child.kill()
        child.wait()
