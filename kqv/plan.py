"""Memory and time of a run before it runs: `python train.py CONFIG.py --plan --plan_device=h100`.

census.py counts parameters, FLOPs and memory on the model and the step themselves. Nothing runs on the device, and
nothing is written.
"""

import re
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch

from kqv import ROOT
from kqv.build import empty_model, model_config
from kqv.census import Moments, flops_per_token, memory, part_of_model
from kqv.data import EVAL_BATCH, EVAL_TOKENS, Split, find_dataset, padded_vocab_size
from kqv.errors import UserError
from kqv.hub import pretrained_settings
from kqv.machine import GPUS, cpu_likes_bfloat16, has_nvidia_driver, peak_flops, ram_bytes
from kqv.meta import read_meta
from kqv.settings import TrainConfig, check_strategy, learning_rate_concerns, micro_steps_of_each

GPT2_TOKENS_PER_STEP = 12 * 1024 * 40  # configs/train_gpt2.py; GPT-3's, for models of 125M to 760M (arXiv:2005.14165)
ASSUMED_MFU = 0.4  # compiled training of a GPT mostly reaches 0.3 to 0.5 of a device's peak


# -- data, model and device of the plan --------------------------------------------------------------------------------


def data_sizes(cfg: TrainConfig) -> tuple[int, int, int] | None:
    """Vocabulary size, training tokens, and tokens of the shortest file of the data set; None if it does not exist."""
    if not any((root / cfg.data_dir / cfg.dataset).is_dir() for root in (Path(), ROOT)):
        return None
    folder = find_dataset(cfg.data_dir, cfg.dataset)
    meta = read_meta(folder)
    train, val = (Split(folder, name, 1, meta) for name in ("train", "val"))
    return meta["vocab_size"], train.tokens, min(len(shard) for shard in train.shards + val.shards)


def planned_config(config_class: type, cfg: TrainConfig, vocab_size: int) -> Any:
    """The GPTConfig of the model that a new run would train. Downloads nothing."""
    if cfg.init_from in ("scratch", "resume", "auto"):
        return model_config(config_class, cfg, padded_vocab_size(vocab_size))
    settings = pretrained_settings(cfg.init_from)
    if cfg.block_size > settings["block_size"]:
        raise UserError(f"block_size={cfg.block_size}: {cfg.init_from} has at most {settings['block_size']}")
    return config_class(**settings | {"block_size": cfg.block_size, "dropout": cfg.dropout})


def find_device(plan_device: str | None, device: str) -> tuple[str, float | None]:
    """Name of the device to plan for (plan_device, or else `device` on this machine), and its memory if known."""
    if plan_device:
        names = {name.lower().removeprefix("rtx "): name for name in GPUS}
        name = names.get(plan_device.lower().replace("-", " ").replace("_", " ").removeprefix("rtx "))
        if name is None:
            raise UserError(f"plan_device={plan_device!r}: expected {' | '.join(names)}")
        return name, GPUS[name][1] * 1e9
    if device != "cpu" and has_nvidia_driver() and torch.cuda.is_available():
        return torch.cuda.get_device_name(), torch.cuda.get_device_properties(0).total_memory
    if device.startswith("cuda"):
        raise UserError(f"device={device!r}: this machine has none; name the one to plan for: --plan_device=h100")
    return "cpu", ram_bytes()


def find_dtype(dtype: str, device: str, work: int) -> str:
    """The compute type of training on a device of this name. `work`: see machine.resolve_dtype."""
    if dtype != "auto":
        return dtype
    if re.search("V100|T4", device):
        return "float16"
    return "bfloat16" if device != "cpu" or cpu_likes_bfloat16(work) else "float32"


def concerns(cfg: TrainConfig, n_params: int, data: tuple[int, int, int] | None) -> list[str]:
    """Likely mistakes in the settings of a training run, one line each. `data`: see data_sizes."""
    tokens_per_step = cfg.gradient_accumulation_steps * cfg.batch_size * cfg.block_size
    found = []
    finetuning = cfg.init_from not in ("scratch", "resume", "auto")  # takes smaller steps
    if not finetuning and 1e8 <= n_params <= 2e9 and not 1 / 4 <= tokens_per_step / GPT2_TOKENS_PER_STEP <= 4:
        found.append(f"{tokens_per_step:,} tokens a step: models of this size take about {GPT2_TOKENS_PER_STEP:,}")
    found += learning_rate_concerns(cfg)
    if data and data[2] <= cfg.block_size:
        found.append(f"block_size={cfg.block_size}: too long, the shortest file of the data has {data[2]:,} tokens")
    if data and cfg.max_iters * tokens_per_step > 4 * data[1]:
        found.append("more than 4 epochs: tokens teach less each time they are repeated (arXiv:2305.16264)")
    return found


# -- counting ----------------------------------------------------------------------------------------------------------


def parameters(model: Any) -> dict[str, int]:
    """Number of weights in each part of the model. Tied weights count once."""
    sizes = {}
    for name, parameter in model.named_parameters():
        sizes[part_of_model(name)] = sizes.get(part_of_model(name), 0) + parameter.numel()
    return sizes


def share_out(moments: Moments, sizes: dict[str, int], n_layer: int, world_size: int, sharded: bool) -> Moments:
    """Memory of one of several processes. (Derived, not counted: a plan runs in one process.)

    FSDP: a share of weights, gradients and moments, and whole the embeddings, the head, the current block and the next.
    DDP: everything, and buckets as large as the gradients.
    """
    if world_size == 1:
        return moments
    whole = 4 * (sizes["embeddings"] + 2 * (sum(sizes.values()) - sizes["embeddings"]) // n_layer)
    found = {}
    for name, parts in moments.items():
        if sharded:
            shares = {part: parts[part] // world_size for part in ("weights", "optimizer", "gradients")}
            found[name] = parts | shares | {"temporary": parts["temporary"] + whole}
        else:
            found[name] = parts | {"gradients": parts["gradients"] + 4 * sum(sizes.values())}
    return found


def plan(cfg: TrainConfig, config: Any, model_class: type, data: tuple[int, int, int] | None, world_size: int) -> str:
    """The plan, as text, of a run of `world_size` processes that train `config`, a GPTConfig. `data`: see data_sizes.

    The device is cfg.plan_device, a name of machine.GPUS in any case, or else this machine's. Raises UserError if the
    settings are impossible.
    """
    micro_steps = micro_steps_of_each(world_size, cfg.gradient_accumulation_steps)
    device, available = find_device(cfg.plan_device, cfg.device)
    gpu, work = device != "cpu", cfg.batch_size * config.block_size * config.n_embd**2
    dtype = find_dtype(cfg.dtype, device, work)
    check_strategy(cfg.strategy, dtype)
    sizes = parameters(empty_model(model_class, config))
    rows = max(1, min(EVAL_TOKENS // config.block_size, EVAL_BATCH * cfg.eval_iters or EVAL_TOKENS))
    gpu_bytes = (available or 1.0) if gpu else 0.0
    moments, kept = memory(model_class, config, cfg, getattr(torch, dtype), gpu_bytes, micro_steps > 1, rows)
    moments = share_out(moments, sizes, config.n_layer, world_size, cfg.strategy == "fsdp")
    if cfg.eval_only:
        moments = {"evaluation": moments["evaluation"] | {"optimizer": 0, "gradients": 0}}
    totals = {moment: sum(parts.values()) for moment, parts in moments.items()}
    peak = max(totals.values())

    lines = {"plan": f"{world_size} x {device} in {dtype}; nothing runs, nothing is written"}
    by_part = ", ".join(f"{part} {size:,}" for part, size in sizes.items())
    lines["parameters"] = f"{sum(sizes.values()):,}: {by_part}"
    known = f"{data[1]:,} tokens to train on" if data else "does not exist, GPT-2's vocabulary is assumed"
    lines["data"] = f"{Path(cfg.data_dir) / cfg.dataset}: {known}; vocab_size {config.vocab_size:,}"
    if not cfg.eval_only:
        n_params, state = sum(sizes.values()), moments["evaluation"]
        lines |= describe_training(cfg, n_params, micro_steps, world_size, data)
        lines |= describe_time(cfg, flops_per_token(model_class, config), device, dtype, world_size)
        shares = world_size if cfg.strategy == "fsdp" else 1
        lines["checkpoint"] = f"{4 * n_params + shares * state['optimizer']:,} bytes"
    has = f", of {available / 1e9:,.0f} GB" if available else ""
    lines["memory"] = f"{peak / 1e9:,.2f} GB at the peak of each process{has}, besides PyTorch's own 0.3 to 1 GB"
    lines["  in MB"] = "".join(f"{part:>13}" for part in (*moments["evaluation"], "total"))
    for moment, parts in moments.items():
        lines[f"  {moment}"] = "".join(f"{size / 1e6:13,.1f}" for size in (*parts.values(), totals[moment]))
    if not cfg.eval_only:
        lines["  activations"] = ", ".join(f"{part} {size / 1e6:,.1f}" for part, size in kept.items())

    warnings = [] if cfg.eval_only else concerns(cfg, sum(sizes.values()), data)
    if cfg.init_from in ("resume", "auto"):
        warnings.append(f"init_from={cfg.init_from}: this plan is for the settings given, not for the checkpoint's")
    if cfg.lora_rank or cfg.freeze:
        warnings.append("this plan is for training all weights; with lora_rank or freeze less memory is needed")
    if available and peak * (1 if gpu else world_size) > available:
        warnings.append("not enough memory: lower batch_size, and raise gradient_accumulation_steps")
    return "\n".join([f"{name:<18}{line}" for name, line in lines.items()] + [f"warning: {text}" for text in warnings])


def describe_training(
    cfg: TrainConfig, n_params: int, micro_steps: int, world_size: int, data: tuple[int, int, int] | None
) -> dict[str, str]:
    """The lines about a step, the run, and tokens per weight."""
    tokens_per_step = cfg.gradient_accumulation_steps * cfg.batch_size * cfg.block_size
    tokens = cfg.max_iters * tokens_per_step
    sequences = f"{cfg.batch_size} sequences of {cfg.block_size:,} x {micro_steps} micro-batches"
    epochs = f", {tokens / data[1]:,.1f} epochs" if data else ""
    return {
        "step": f"{tokens_per_step:,} tokens: {sequences} x {world_size} devices",
        "run": f"{cfg.max_iters:,} steps, {tokens:,} tokens{epochs}",
        "tokens/weight": f"{tokens / n_params:,.2f}; 20 is compute-optimal (arXiv:2203.15556)",
    }


def describe_time(cfg: TrainConfig, flops: float, device: str, dtype: str, world_size: int) -> dict[str, str]:
    """The lines about FLOPs and time. `flops`: for one token."""
    total = flops * cfg.max_iters * cfg.gradient_accumulation_steps * cfg.batch_size * cfg.block_size
    time = f"unknown, because the peak of {device} in {dtype} is not known; --plan_device=h100 names a device"
    if peak := peak_flops(device, dtype):
        speed = ASSUMED_MFU * world_size * peak  # FLOP/s
        time = f"{timedelta(seconds=round(total / speed))}, {speed / flops:,.0f} tokens/s"
        time += f", assuming that {ASSUMED_MFU:.0%} of {device}'s peak is reached (MFU)"
    return {"FLOPs": f"{flops:.3g} a token, {total:.3g} in all", "time": time}
