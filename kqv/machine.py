"""The machine: device and dtype to compute with, peak speed and memory of GPUs by name, the CPU, its environment."""

import ctypes
import os
import platform
import re
import shutil
import subprocess
import sys
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kqv import ROOT
from kqv.errors import UserError

if TYPE_CHECKING:
    import torch

# How often an idle thread of PyTorch looks for work before it sleeps. Without a limit, two programs on the same cores
# run at a 25th of their speed; with this limit at a third, and one program alone is as fast as before (dev/LOG.md)
SPIN_COUNT = "100000"
LOGITS_SHARE = 0.1  # of a GPU's memory
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # from glibc's malloc.h
# The least rows * n_embd^2 for which autocast to bfloat16 pays on CPUs that have fast products for it: measured between
# 3.1 million (slower) and 7.1 million (faster) (dev/LOG.md)
BFLOAT16_WORK = 5_000_000
# Dense peak of the tensor cores in TFLOP/s at bfloat16 (float16 if the device lacks bfloat16), and memory in GB (the
# smaller, if a device is sold with two sizes), from the vendors' data sheets. The first line that matches a device's
# name counts. Unknown devices get no MFU rather than a wrong one.
GPUS = {
    "B200": (2250, 180),
    "H200": (989, 141),
    "H100 PCIe": (756, 80),
    "H100": (989, 80),
    "A100": (312, 40),
    "A10G": (70, 24),
    "A10": (125, 24),
    "A40": (150, 48),
    "A6000": (155, 48),
    "L40S": (362, 48),
    "L40": (181, 48),
    "L4": (121, 24),
    "V100": (125, 16),
    "T4": (65, 16),
    "RTX 5090": (210, 32),
    "RTX 4090": (165, 24),
    "RTX 4080": (97, 16),
    "RTX 3090": (71, 24),
    "RTX 3080": (60, 10),
}


def peak_flops(device_name: str, dtype: str) -> float | None:
    """Peak FLOP/s of a device of this name in a 16-bit dtype; None if unknown, or in float32."""
    for name, (tflops, _) in GPUS.items():
        # whole words only, and no longer names, which are other chips
        if dtype != "float32" and re.search(rf"\b{name}\b(?! (Ti|SUPER|Laptop|NVL))", device_name):
            return tflops * 1e12
    return None


def limit_spinning() -> None:
    """Let idle threads of GNU OpenMP, which PyTorch uses on Linux, sleep soon. Works before torch is imported."""
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", SPIN_COUNT)


def keep_freed_memory(device: "torch.device") -> None:
    """On CPUs: let glibc keep freed memory for the next step, unless the user has set how it allocates (MALLOC_...).

    Else the large tensors of each step are new memory, and the system clears it page by page: up to a fourth of a step
    on CPUs (dev/LOG.md).
    """
    own_settings = any(key.startswith("MALLOC_") for key in os.environ)
    if device.type == "cpu" and platform.libc_ver()[0] == "glibc" and not own_settings:
        libc = ctypes.CDLL(None)
        libc.mallopt(M_MMAP_MAX, 0)  # large blocks too come from the heap
        libc.mallopt(M_TRIM_THRESHOLD, -1)  # whose end is never given back


def resolve_device(device: str, local_rank: int = 0) -> "torch.device":
    """The device by its name; "auto" is CUDA, else MPS, else the CPU. Raises UserError if this machine lacks it."""
    import torch

    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    kind, _, index = device.partition(":")
    available = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if kind not in available or (index and not index.isdecimal()):
        raise UserError(f"device={device!r}: expected auto | cpu | cuda | cuda:N | mps")
    if not available[kind]:
        raise UserError(f"device={device!r}: not available on this machine (PyTorch {torch.__version__})")
    if kind == "cuda":
        index = int(index or local_rank)
        if index >= torch.cuda.device_count():
            raise UserError(f"device=cuda:{index}: this machine has {torch.cuda.device_count()} CUDA device(s)")
        device = f"cuda:{index}"
    return torch.device(device)


def resolve_dtype(dtype: str, device: "torch.device", work: int) -> "torch.dtype":
    """The compute type by its name; "auto" is the fastest that trains as well as float32.

    `work`: rows times n_embd^2, the size of the model's products; see cpu_likes_bfloat16.
    """
    import torch

    if dtype == "auto":
        dtype = "bfloat16" if device.type == "cpu" and cpu_likes_bfloat16(work) else "float32"
        if device.type == "cuda":
            dtype = "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float16"
    return getattr(torch, dtype)


def room_for_logits(device: "torch.device") -> float:
    """Bytes that the logits of a training step may take as a whole: LOGITS_SHARE of a GPU's memory; 0 on CPUs."""
    import torch

    return LOGITS_SHARE * torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else 0


def device_name(device: "torch.device") -> str:
    """The GPU's name, or "cpu" or "mps"."""
    import torch

    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def has_nvidia_driver() -> bool:
    """Whether an NVIDIA driver is installed, found without importing torch."""
    return shutil.which("nvidia-smi") is not None


def cpuinfo(path: Path = Path("/proc/cpuinfo")) -> str:
    """Linux's description of the CPUs; empty on other systems."""
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""


def cpu_name() -> str:
    found = re.search(r"^model name\s*:\s*(.+)$", cpuinfo(), re.MULTILINE)  # platform.processor() is empty on Linux
    return found[1] if found else platform.processor() or platform.machine()


def cpu_words() -> set[str]:
    """The words of cpuinfo(), among them the CPU's vendor ("AuthenticAMD") and instructions ("avx2")."""
    return set(cpuinfo().split())


def cpu_likes_bfloat16(work: int) -> bool:
    """Whether this CPU computes products (rows, n_embd) @ (n_embd, n_embd), work = rows * n_embd^2, faster in bfloat16.

    Intel CPUs with AMX and AMD CPUs with AVX512-BF16 do, if the products are large enough to win back what converting
    costs. Intel CPUs with only AVX512-BF16 take twice as long. Returns False for CPUs that are not known (dev/LOG.md).
    """
    words = cpu_words()
    return work >= BFLOAT16_WORK and ("amx_bf16" in words or {"AuthenticAMD", "avx512_bf16"} <= words)


def ram_bytes() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError):  # Windows has no sysconf, others have fewer names
        return None


def describe_environment(device_name: str) -> dict[str, Any]:
    """What a run's speed and numbers depend on besides its settings, in plain JSON values; None if unknown.

    "dirty" is whether tracked files differ from "commit"; "ram_bytes" is the memory of the whole machine.
    """
    import numpy as np
    import torch

    tracked = git("ls-files", "--", "model.py")  # empty if the code lies inside another project's repository
    changes = git("--no-optional-locks", "status", "--porcelain", "--untracked-files=no") if tracked else None
    return {
        "started": utc_now(),
        "command": list(sys.argv),
        "commit": git("rev-parse", "HEAD") if tracked else None,
        "dirty": None if changes is None else changes != "",
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "numpy": np.__version__,
        "cuda": torch.version.cuda if torch.cuda.is_available() else None,
        "platform": platform.platform(),
        "device": device_name,
        "cpu": cpu_name(),
        "cpu_cores": os.cpu_count(),
        "ram_bytes": ram_bytes(),
    }


def git(*arguments: str) -> str | None:
    """The output of a git command in the checkout; None if there is no git or no repository."""
    try:
        command = ["git", "-C", str(ROOT), *arguments]
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def utc_now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="milliseconds")
