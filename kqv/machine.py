"""The machine at hand: which device and dtype to compute in, what a GPU of some name can do, what CPU this is."""

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

# Dense peak of the tensor cores in TFLOP/s at bfloat16 (float16 where there is no bfloat16), and memory in GB (the
# smaller, where a device is sold with two), from the vendors' data sheets. A device's name is matched from the first
# line down. Unknown devices get no MFU rather than a wrong one.
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
    """FLOP/s that a device of this name could reach in a 16-bit dtype; None where that is not known."""
    for name, (tflops, _) in GPUS.items():
        # whole words, and not the other chips that are sold under a longer name
        if dtype != "float32" and re.search(rf"\b{name}\b(?! (Ti|SUPER|Laptop|NVL))", device_name):
            return tflops * 1e12
    return None


def resolve_device(device: str, local_rank: int = 0) -> "torch.device":
    """The device that was asked for, or for "auto" the best there is. UserError where this machine lacks it."""
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


def resolve_dtype(dtype: str, device: "torch.device") -> "torch.dtype":
    """The compute type that was asked for, or for "auto" the fastest that trains as well as float32."""
    import torch

    if dtype == "auto":
        dtype = "bfloat16" if device.type == "cpu" and cpu_likes_bfloat16() else "float32"
        if device.type == "cuda":
            dtype = "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float16"
    return getattr(torch, dtype)


def device_name(device: "torch.device") -> str:
    """The GPU's name, or "cpu" or "mps"."""
    import torch

    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def has_nvidia_driver() -> bool:
    """Whether an NVIDIA GPU is likely here: answered without importing torch."""
    return shutil.which("nvidia-smi") is not None


def cpuinfo(path: Path = Path("/proc/cpuinfo")) -> str:
    """What Linux says of the CPUs; elsewhere nothing."""
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""


def cpu_name() -> str:
    found = re.search(r"^model name\s*:\s*(.+)$", cpuinfo(), re.MULTILINE)  # platform.processor() knows nothing there
    return found[1] if found else platform.processor() or platform.machine()


def cpu_words() -> set[str]:
    """The CPU's vendor ("AuthenticAMD") and instructions ("avx2"), among other words; none where Linux does not say."""
    return set(cpuinfo().split())


def cpu_likes_bfloat16() -> bool:
    """Whether this CPU multiplies 16-bit matrices faster than float32 ones, and so trains faster with them.

    With AMX, or on AMD's with AVX512-BF16 (Zen 4: by report 1.4 to 1.8 times the speed). Not on Intel's that have only
    the latter, where such products took twice as long (dev/LOG.md); where there is no telling, no.
    """
    words = cpu_words()
    return "amx_bf16" in words or {"AuthenticAMD", "avx512_bf16"} <= words


def ram_bytes() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError):  # Windows has no sysconf, others have fewer names
        return None


def describe_environment(device_name: str) -> dict[str, Any]:
    """What a run's speed and numbers depend on besides its settings, in plain JSON values; None: not known here.

    "commit" and "dirty" (tracked files differ from the commit) are of the code; "ram_bytes" is all of the machine's.
    """
    import numpy as np
    import torch

    tracked = git("ls-files", "--", "model.py")  # else the folder only lies inside somebody's other repository
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
    """What git says about the project; None where there is no git, or no repository."""
    try:
        command = ["git", "-C", str(ROOT), *arguments]
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def utc_now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="milliseconds")
