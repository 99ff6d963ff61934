"""How bench.py measures: time and peak memory of child processes, sides in turn, medians, and the machine's limits."""

import json
import math
import os
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from kqv import ROOT
from kqv.errors import UserError
from kqv.machine import cpu_name, resolve_device

# for child processes: the first keeps __pycache__ out of the peer's checkout, the second makes lines arrive at once
CHILD = {"PYTHONDONTWRITEBYTECODE": "1", "PYTHONUNBUFFERED": "1"}


@dataclass
class Measured:
    """The result of one process; `value` is the number to compare, `found` the dict that its function returned."""

    output: str
    arrived: list[float]  # seconds from the start to each line of the output
    seconds: float  # of the whole process
    rss_mb: float  # at its peak
    value: float = math.nan
    found: dict[str, Any] | None = None


def run(name: str, command: list[Any], cwd: Any, whole_tree: bool = False, **environment: str) -> Measured:
    """Run a command to its end. If it fails, raises UserError with the last line of its stderr.

    Peak memory is the process's own; with `whole_tree`, on systems with /proc, that of its children too.
    """
    environment = os.environ | CHILD | environment
    lines, arrived = [], []
    with tempfile.TemporaryFile() as err:
        started = time.perf_counter()
        child = subprocess.Popen(list(map(str, command)), cwd=cwd, stdout=subprocess.PIPE, stderr=err, env=environment)
        ended, samples = threading.Event(), [0]
        try:
            if whole_tree:
                threading.Thread(target=sample_memory, args=(child.pid, ended, samples), daemon=True).start()
            for line in child.stdout:
                arrived.append(time.perf_counter() - started)
                lines.append(line.decode("utf-8", errors="replace"))
            _, status, usage = os.wait4(child.pid, 0)
            seconds, child.returncode = time.perf_counter() - started, os.waitstatus_to_exitcode(status)
        finally:
            ended.set()
            if child.returncode is None:  # Ctrl-C
                child.kill()
                child.wait()
            child.stdout.close()
        err.seek(0)
        error = err.read().decode("utf-8", errors="replace")
    if child.returncode:
        reason = (error.strip() or f"exit code {child.returncode}").splitlines()[-1]
        raise UserError(f"{name} failed: {reason.removeprefix('error: ')}")
    own = usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return Measured("".join(lines), arrived, seconds, (max(samples) or own) / 1e6)


def sample_memory(pid: int, ended: threading.Event, samples: list[int]) -> None:
    """Append, every quarter of a second, the memory of a process and its descendants; shared pages count once (PSS)."""
    while not ended.wait(0.25):
        total, family = 0, [pid]
        for member in family:  # grows on the way
            with suppress(OSError):  # the process has ended, or the system has no /proc
                for task in Path(f"/proc/{member}/task").iterdir():
                    family += map(int, (task / "children").read_text(encoding="utf-8").split())
                rollup = Path(f"/proc/{member}/smaps_rollup").read_text(encoding="utf-8")
                pss = re.search(r"^Pss:\s+(\d+)", rollup, re.MULTILINE)
                total += 1024 * int(pss[1])
        samples.append(total)


def command_of(function: Callable[..., dict], arguments: dict[str, Any], more: str = "") -> list[str]:
    """The command that calls one of our functions and prints its dict; `more`: arguments that JSON cannot hold."""
    code = "import sys, json; sys.path.insert(0, sys.argv[1]); "
    code += f"from {function.__module__} import {function.__name__} as function; "
    code += f"print(json.dumps(function(**json.loads(sys.argv[2]), {more})))"
    return [sys.executable, "-c", code, str(ROOT), json.dumps(arguments)]


def call(name: str, function: Callable[..., dict], cwd: Path, whole_tree: bool = False, **arguments: Any) -> Measured:
    """Run one of our functions in a child process: `found` is the dict it returns, `value` its "value"."""
    measured = run(name, command_of(function, arguments), cwd, whole_tree)
    found = json.loads(measured.output.splitlines()[-1])
    return replace(measured, found=found, value=found.get("value", math.nan))


class Program:
    """One of our functions in a child process that prepares itself beside others, then waits to be told to measure.

    The function takes `ready`, which it calls once it is prepared, and returns a dict.
    """

    def __init__(self, function: Callable[..., dict], **arguments: Any):
        self.folder = tempfile.TemporaryDirectory(prefix="kqv-bench-")
        self.is_ready, self.log = Path(self.folder.name, "ready"), Path(self.folder.name, "log")
        command = command_of(function, arguments, f"ready=lambda: (open({str(self.is_ready)!r}, 'x'), input())")
        with self.log.open("w", encoding="utf-8") as err:
            pipe = subprocess.PIPE
            self.child = subprocess.Popen(
                command, stdin=pipe, stdout=pipe, stderr=err, text=True, env=os.environ | CHILD
            )

    def wait(self, deadline: float) -> None:
        """Wait until it is ready or has ended, at most to `deadline` on the monotonic clock."""
        while not self.is_ready.exists() and self.child.poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)

    def measure(self, seconds: float) -> dict[str, Any] | str:
        """Let it measure, at most so long; returns what the function returns, or why there is nothing."""
        try:
            if not self.is_ready.exists() and self.child.poll() is None:
                return "was not ready in time"
            output = self.child.communicate("\n", timeout=seconds)[0]
            if self.child.returncode == 0:
                return json.loads(output.splitlines()[-1])
            reason = self.log.read_text(encoding="utf-8", errors="replace").strip()
            return (reason or f"exit code {self.child.returncode}").splitlines()[-1]
        except subprocess.TimeoutExpired:
            return f"took longer than {seconds:.0f} s"
        finally:
            self.child.kill()
            self.child.communicate()
            self.folder.cleanup()


def in_turn(repeats: int, name: str, *sides: Callable[[int], Measured] | None) -> list[list[Measured]]:
    """Run the sides in turn, A B A B ..., and print each result; a side that is None has no results."""
    results = [[] for _ in sides]
    for repeat in range(repeats):
        for side, measured in zip(sides, results, strict=True):
            measured += [side(repeat)] if side else []
        values = ", ".join(f"{measured[-1].value:,.4g}" if measured else "-" for measured in results)
        print(f"{name}, {repeat + 1} of {repeats}: {values}", file=sys.stderr, flush=True)
    return results


def row(
    what: tuple[str, str, str, str],
    ours: list[Measured],
    peer: list[Measured],
    limit: float | None = None,
    share: Callable[[float], float] | None = None,
    peer_share: Callable[[float], float] | None = None,
    ratio: float | None = None,
) -> dict[str, Any]:
    """A result: medians, and their ratio, above 1 if ours is better. Without a peer, `ratio` is taken as given.

    `what`: task, size, device, unit. `share` maps a value to its share of `limit`; `peer_share` does so for the peer.
    """
    task, size, device, unit = what
    a, b = (statistics.median(m.value for m in side) if side else None for side in (ours, peer))
    if peer:
        ratio = a / b if unit == "tokens/s" else b / a  # all other units are costs
    return {
        "task": task,
        "size": size,
        "device": device,
        "unit": unit,
        "ours": a,
        "peer": b,
        "ratio": ratio,
        "limit": limit,
        "share_of_limit": share(a) if share else None,
        "peer_share_of_limit": (peer_share or share)(b) if share and peer else None,
        "peak_rss_mb": max(m.rss_mb for m in ours),
        "peer_peak_rss_mb": max((m.rss_mb for m in peer), default=None),
        "ours_runs": [m.value for m in ours],
        "peer_runs": [m.value for m in peer],
    }


# -- the machine's limits ----------------------------------------------------------------------------------------------


def limits(device: str, ready: Callable[[], Any] = lambda: None) -> dict[str, Any]:
    """This machine's fastest matrix product, in FLOP/s by dtype, and its fastest read of memory, in bytes/s."""
    import torch

    ready()

    def fastest(work: Callable[[], Any]) -> float:
        best = math.inf
        calls = 1 if device.type == "cpu" else 20  # one call on a GPU is short compared with launching it
        for _ in range(10):
            started = time.perf_counter()
            for _ in range(calls):
                work()
            if device.type != "cpu":
                torch.accelerator.synchronize()
            best = min(best, (time.perf_counter() - started) / calls)
        return best

    device = resolve_device(device)
    torch.set_float32_matmul_precision("high" if device.type == "cuda" else "highest")  # as in train.py
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name()
    found = {"device": device.type, "name": name, "threads": torch.get_num_threads()}
    n = 2048 if device.type == "cpu" else 8192
    # a CPU without bfloat16 instructions takes a minute for one of these products
    onednn = torch.backends.mkldnn.is_available()
    bfloat16 = device.type != "cpu" or (onednn and torch.ops.mkldnn._is_mkldnn_bf16_supported())
    for dtype in ("float32", "bfloat16") if bfloat16 else ("float32",):
        a, b = torch.randn(2, n, n, device=device, dtype=getattr(torch, dtype))
        found[dtype] = 2 * n**3 / fastest(lambda a=a, b=b: a @ b)
    x, v = torch.ones(2**13, 2**14, device=device), torch.ones(2**14, device=device)  # 0.5 GB, larger than caches
    return found | {"read": 4 * x.numel() / min(fastest(x.sum), fastest(lambda: x @ v))}
