"""The command that trains on a new data set: the "next:" line that prepare/ prints."""

import shlex
from pathlib import Path
from typing import Any

from kqv import ROOT
from kqv.cli import parse
from kqv.machine import has_nvidia_driver
from kqv.settings import TrainConfig

LARGE = 10**8  # training tokens from which on GPT-2's config is suggested


def print_next(
    folder: Path,
    meta: dict[str, Any],
    origin: dict[str, str],
    cpu_config: str = "train_shakespeare_char_cpu",
    gpu_config: str = "train_shakespeare_char",
    finetune: tuple[str, str] | None = None,
) -> None:
    """Print the command that trains on the data set in `folder`, with a config that suits it and this machine.

    `meta` is its meta.json, `origin` where the settings of the prepare script came from. A large data set of GPT-2's
    tokens is for GPUs: if there is none here, that command is printed too. `finetune`: the place of the tokenizer, and
    the config if a model lies there too.
    """
    data_dir = None if origin["data_dir"] == "default" else folder.parent
    tokens = min(split["tokens"] for split in meta["splits"].values())
    if finetune and is_model(finetune[0]):
        print("next:", train_command(finetune[1], folder.name, data_dir, tokens), f"--init_from={finetune[0]}")
        return
    if meta["tokenizer"]["kind"] == "gpt2" and meta["splits"]["train"]["tokens"] >= LARGE:
        gpu_config = "train_gpt2"
    if has_nvidia_driver():
        print("next:", train_command(gpu_config, folder.name, data_dir, tokens))
    else:
        print("next:", train_command(cpu_config, folder.name, data_dir, tokens))
        if gpu_config == "train_gpt2":
            print("with GPUs:", train_command(gpu_config, folder.name, data_dir, tokens))


def is_model(tokenizer: str) -> bool:
    """Whether the place of a tokenizer is that of a model: a folder with a config.json, or a name on the hub."""
    if tokenizer in ("char", "byte", "gpt2") or tokenizer.endswith(".json"):
        return False
    return not Path(tokenizer).is_dir() or (Path(tokenizer) / "config.json").is_file()


def script_path(script: str) -> str:
    """A script of the checkout as it is typed in the working directory."""
    return script if Path.cwd() == ROOT else str(ROOT / script)


def train_command(config: str, dataset: str, data_dir: Path | None, tokens: int) -> str:
    """The command that runs configs/CONFIG.py on a data set whose shorter split has this many tokens.

    If the config is for another data set, the run gets its own out_dir, so that it does not move another run aside.
    """
    words = ["python", script_path("train.py"), f"configs/{config}.py"]
    cfg, _ = parse(TrainConfig, [str(ROOT / words[-1])])
    if cfg.dataset != dataset:
        words += [f"--dataset={dataset}", f"--out_dir=out-{dataset}"]
        if cfg.wandb_log:
            words.append("--wandb_log=False")
    if data_dir is not None:
        words.append(f"--data_dir={data_dir}")
    if tokens <= cfg.block_size:  # a window reads one more
        words.append(f"--block_size={max(1, tokens - 1)}")
    return shlex.join(words)
