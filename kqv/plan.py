"""What a run will take, before it runs: `python train.py CONFIG.py --plan --plan_device=h100`.

Parameters, FLOPs, memory and time follow from the settings by the formulas below: nothing is allocated or written, and
torch, which takes longer to import than all of this, is not needed. tests/test_plan.py holds them against the model
itself, against what autograd keeps, and against the memory of processes that train. The letters are model.py's.
"""

import json
import math
import re
import shutil
from dataclasses import fields
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING

from kqv import ROOT
from kqv.data import (
    EVAL_BATCH,
    EVAL_TOKENS,
    padded_vocab_size,
)
from kqv.errors import UserError
from kqv.machine import GPUS, cpu_likes_bfloat16, peak_flops, ram_bytes
from kqv.settings import TrainConfig, check_strategy, learning_rate_concerns, micro_steps_of_each

if TYPE_CHECKING:
    from model import GPTConfig

GPT2 = {"gpt2": (12, 12, 768), "gpt2-medium": (24, 16, 1024), "gpt2-large": (36, 20, 1280), "gpt2-xl": (48, 25, 1600)}
GPT2_TOKENS_PER_STEP = 12 * 1024 * 40  # configs/train_gpt2.py; GPT-3's, for models of 125M to 760M (arXiv:2005.14165)
LARGE_VOCAB = 4096  # loss.py's
ASSUMED_MFU = 0.4  # what compiled training of a GPT reaches of a device's peak is mostly from 0.3 to 0.5


# -- the formulas: c is a GPTConfig, or anything with its fields ------------------------------------------------------


def block_matrices(c: "GPTConfig") -> list[tuple[int, int]]:
    """(out, in) of a block's four: queries, keys and values; attention's way out; the MLP's ways in and out."""
    C, D, F = c.n_embd, c.head_dim, c.n_inner
    up = 2 * F if c.mlp == "swiglu" else F  # swiglu: gate and value
    return [((c.n_head + 2 * c.n_kv_head) * D, C), (C, c.n_head * D), (up, C), (C, F)]


def parameters(c: "GPTConfig") -> dict[str, int]:
    """How many weights each part of the model has. What is tied is counted once."""
    C, D = c.n_embd, c.head_dim
    vectors = 2 if c.norm == "layernorm" and c.bias else 1  # of a norm: gain, bias
    positions = c.block_size * C if c.position in ("learned", "sinusoidal") else 0
    c_attn, attn_c_proj, c_fc, mlp_c_proj = (out * (inputs + c.bias) for out, inputs in block_matrices(c))
    sizes = {
        "embeddings": (1 if c.tie_embeddings else 2) * c.vocab_size * C + positions,
        "attention": c.n_layer * (c_attn + attn_c_proj),
        "MLP": c.n_layer * (c_fc + mlp_c_proj),
        "norms": vectors * (c.n_layer * (2 * C + 2 * D * c.qk_norm) + C),
    }
    return sizes | ({"convolutions": c.n_layer * 2 * c.short_conv * C} if c.short_conv else {})


def flops_per_token(c: "GPTConfig") -> int:
    """Forward and backward, as GPT.flops_per_token counts: 6 for each weight that multiplies, 12 T H D a layer."""
    multiplying = sum(parameters(c).values()) - (0 if c.tie_embeddings else c.vocab_size * c.n_embd)
    if c.position in ("learned", "sinusoidal"):
        multiplying -= c.block_size * c.n_embd
    return 6 * multiplying + 12 * c.n_layer * c.n_head * c.head_dim * c.block_size


def optimizer_numel(c: "GPTConfig", muon: bool) -> int:
    """How many numbers the optimizer keeps: AdamW two for each weight, Muon one for each weight of its matrices."""
    fixed = c.block_size * c.n_embd if c.position == "sinusoidal" else 0
    matrices = c.n_layer * sum(map(math.prod, block_matrices(c)))
    return 2 * (sum(parameters(c).values()) - fixed) - (matrices if muon else 0)


def checkpoint_bytes(c: "GPTConfig", muon: bool = False) -> int:
    """Size of ckpt.pt: all weights and the optimizer's state, in float32."""
    return 4 * (sum(parameters(c).values()) + optimizer_numel(c, muon))


def fused(c: "GPTConfig", gpu: bool) -> bool:
    """Whether attention is one kernel, or softmax(Q K^T) V in steps: CPUs have no kernel with dropout."""
    return c.attention == "sdpa" and (gpu or not c.dropout)


def rows_of_logits(c: "GPTConfig", n: int) -> int:
    """How many of the logits' n rows, one for each token, the loss has at once: see LinearCrossEntropy in model.py."""
    return n if c.vocab_size < LARGE_VOCAB else min(n, max(512, math.ceil(n / 8)))


def kept_for_backward(c: "GPTConfig", B: int, width: int, gpu: bool, recomputed: bool = False) -> dict[str, int]:
    """Bytes of what autograd keeps from the forward pass on B sequences, by part, until backward has used it.

    `width`: bytes of a number in a matrix product, 4, or 2 under autocast, where the residual stream, the norms and
    the loss stay in float32. A product keeps its inputs; a norm and an activation keep theirs. (torch.compile keeps
    less: what is quickly computed again.) `recomputed`: with activation checkpointing, of a block only its input.
    """
    C, H, G, D, F, T, V = c.n_embd, c.n_head, c.n_kv_head, c.head_dim, c.n_inner, c.block_size, c.vocab_size
    n, half = B * T, width == 2
    # what dropout did to a number: on GPUs a byte, dropped or not; on CPUs the factor, 0 or 1 / (1 - p)
    mask = 0 if not c.dropout else 1 if gpu else width
    # layernorm: x, mean, 1/std; rmsnorm: x and 1/rms, on CPUs, where it is made of simple steps, x/rms too
    norm = 4 * n * (C + 2) if c.norm == "layernorm" else 4 * n * (C + 1 + C * (not gpu))

    attention = width * n * C + mask * n * C  # c_attn's input, resid_dropout
    as_float = half and (gpu or c.norm == "rmsnorm")  # CPUs have a layernorm that takes 16-bit numbers as they are
    if c.qk_norm:  # as above; but of q and k themselves only copies in float32
        attention += 4 * n * (H + G) * ((2 if c.norm == "layernorm" else 1 + D * (not gpu)) + D * as_float)
    if fused(c, gpu) or (c.qk_norm and not as_float):
        attention += width * n * (H + 2 * G) * D  # q, k, v in one tensor
    if fused(c, gpu):
        attention += width * n * H * D + 4 * n * H  # y; for each row of attention weights, the logarithm of its sum
        if c.qk_norm or c.position == "rope":  # q and k are no longer those in the one tensor
            attention += width * n * (H + G) * D
        if c.qk_norm:  # it lays q out head by head, and SDPA y as q: c_proj needs a copy, token by token
            attention += width * n * H * D
    else:  # in steps, which SDPA takes in float32
        exact, pairs = 4 if c.attention == "sdpa" else width, B * H * T * T
        attention += exact * 3 * n * H * D + width * n * H * D  # q, k, v as the products want them; y
        attention += (4 if gpu else exact) * pairs  # softmax's result, on GPUs in float32
        if c.dropout:  # what it did, and its result
            attention += (1 + width if gpu else 2 * exact) * pairs
        elif gpu and half:  # softmax's result as the product with V wants it
            attention += width * pairs
        attention += T * T if c.attention == "explicit" else 0  # the causal mask

    # c_fc's input, dropout; then gate, value, silu(gate) and their product, or the activation's input and its result
    mlp = width * n * C + mask * n * C + width * n * (4 if c.mlp == "swiglu" else 2) * F

    large = V >= LARGE_VOCAB  # the loss keeps not the logits but the gradients of the head's input and weights
    loss = 4 * (n + V) * C if large else width * n * C + 4 * n * V + 8 * n  # else that input, log softmax, targets
    matrices = c.n_layer * sum(map(math.prod, block_matrices(c))) + (0 if large else V * C)
    norms = (2 * c.n_layer + 1) * norm
    if c.short_conv:  # a block's two convolutions keep a copy of what they look back on
        norms += 2 * c.n_layer * 4 * B * (T + c.short_conv) * C
    if recomputed:
        norms, attention, mlp = norm, 0, 4 * n * C
    positions = {"learned": 8 * T, "rope": 2 * 4 * T * D}.get(c.position, 0)  # which are looked up; cos and sin
    return {
        "embeddings": 8 * n + positions + (0 if not c.dropout else 1 if gpu else 4) * n * C,
        "norms": norms,
        "attention": c.n_layer * attention,
        "MLP": c.n_layer * mlp,
        "loss": loss,
        "16-bit weights": 2 * matrices if half else 0,
    }


def muon_bytes(c: "GPTConfig", width: int) -> int:
    """At most what Muon's step allocates besides its state: copies of all matrices of one shape, stacked."""
    most = 0
    for rows, columns in block_matrices(c):
        stack, square = c.n_layer * rows * columns, c.n_layer * min(rows, columns) ** 2
        # in float32: the updates, the same normalised, a step's result; x x^T and its polynomial
        most = max(most, 12 * stack + 8 * square if width == 4 else max(8 * stack + 4 * square, 10 * stack))
    return most


def memory(
    c: "GPTConfig",
    B: int,
    width: int,
    gpu: bool,
    eval_windows: int,
    micro_steps: int,
    processes: int,
    sharded: bool = False,
    recomputed: bool = False,
    muon: bool = False,
) -> dict[str, dict[str, int]]:
    """Bytes that one process holds at each moment that can be the run's peak: {moment: {part: bytes}}.

    In between it is less: on the way back through the blocks activations go and gradients come at an even rate, so
    one of the ends is the most; and clipping and the fused AdamW work in place. Muon does not.
    """
    C, H, G, D, F, T, V = c.n_embd, c.n_head, c.n_kv_head, c.head_dim, c.n_inner, c.block_size, c.vocab_size
    sizes = parameters(c)
    weights = 4 * sum(sizes.values())
    trained = weights - (4 * T * C if c.position == "sinusoidal" else 0)
    kept = kept_for_backward(c, B, width, gpu, recomputed)
    gathered = 0
    if sharded:  # a share of all, and whole: the embeddings and head, one block in use and the next one coming
        gathered = 4 * (sizes["embeddings"] + 2 * (weights // 4 - sizes["embeddings"]) // c.n_layer)
        weights, trained = weights // processes, trained // processes
    buckets = trained if processes > 1 and not sharded else 0  # DDP's copy of the gradients
    before = buckets + (trained if micro_steps > 1 else 0)  # and what earlier micro-batches have summed up
    # the head's gradient comes first; the embeddings', as large, comes last and is added to the head's where tied: in
    # place, where the vocabulary is large
    head, large = 4 * V * C, V >= LARGE_VOCAB
    second = head * ((c.tie_embeddings and not large) + (micro_steps > 1))

    def in_loss(n: int, training: bool) -> int:  # of logits for n tokens
        at_once = rows_of_logits(c, n) * V
        if not large:  # the gradients of log softmax, of the logits; or the logits, in float32 too, and log softmax
            return 2 * 4 * at_once if training else (8 if width == 4 else 10) * at_once
        # logits, which become the softmax; in 16 bits that in float32, the head, and what a chunk adds to its gradient
        return (4 if width == 4 else 6) * at_once + (0 if width == 4 else 2 * V * C * (1 + training))

    # in the last block: the gradients of the stream, of c_fc's input, of what is inside the MLP, of a matrix; or, when
    # that is done, of the stream, of the attention weights, and of the scores that they are made of
    n, exact = B * T, width if c.attention == "explicit" and not gpu else 4
    mlp = 4 * 2 * n * C + width * (3 if c.mlp == "relu2" else 2) * n * F + 4 * F * C
    pairs = 0 if fused(c, gpu) else exact * (1 if c.dropout else 2) * B * H * T * T
    again = kept_for_backward(c, B, width, gpu)
    block = max(mlp, 4 * 2 * n * C + pairs - again["MLP"] // c.n_layer)
    if recomputed:
        block += sum(again[part] for part in ("norms", "attention", "MLP")) // c.n_layer

    # evaluation keeps nothing for backward and has batches of its own, of m tokens. Its peak is the loss; or the inside
    # of an MLP; or q, k, v with their copies, scores and attention weights
    rows = max(1, min(EVAL_TOKENS // T, eval_windows))
    m, scores = rows * T, (width + (4 if gpu else width)) * rows * H * T * T if c.attention == "explicit" else 0
    evaluation = max(
        in_loss(m, training=False),
        4 * 2 * m * C + width * m * (C + {"relu2": 3, "swiglu": 4}.get(c.mlp, 2) * F),
        4 * 2 * m * C + width * m * (C + 2 * (H + 2 * G) * D) + scores,
    )
    moments = {  # gradients, activations, temporary
        "loss": (before, sum(kept.values()), in_loss(n, training=True)),
        "blocks, backward": (before + head, sum(kept.values()) - kept["loss"], block),
        "end of backward": (buckets + trained, 0, second),
        **({"Muon": (buckets + trained, 0, muon_bytes(c, width))} if muon else {}),
        "evaluation": (buckets, kept["16-bit weights"], evaluation),
    }
    always = {"weights": weights, "optimizer": 4 * optimizer_numel(c, muon) // (processes if sharded else 1)}
    return {
        moment: always | {"gradients": gradients, "activations": activations, "temporary": temporary + gathered}
        for moment, (gradients, activations, temporary) in moments.items()
    }


# -- what the settings ask for ----------------------------------------------------------------------------------------


def model_config(cfg: TrainConfig, vocab_size: int) -> "GPTConfig":
    """The GPTConfig that train.py will make; where there can be no doubt about it a stand-in, which needs no torch."""
    c = SimpleNamespace(**vars(cfg) | {"vocab_size": vocab_size})
    if cfg.init_from not in ("scratch", "resume", "auto"):  # GPT-2, from Hugging Face or in its format
        path = Path(cfg.init_from) / "config.json"
        try:
            sizes = dict(zip(("n_layer", "n_head", "n_embd"), GPT2.get(cfg.init_from, ()), strict=False))
            sizes = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else sizes | {"vocab_size": 50257}
            vars(c).update({key: sizes[key] for key in ("n_layer", "n_head", "n_embd", "vocab_size")})
            longest = int(sizes.get("n_positions", 1024))
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path} is not that of a GPT-2 ({type(error).__name__}: {error})") from None
        if c.block_size > longest:
            raise UserError(f"block_size={c.block_size}: {cfg.init_from} has at most {longest}")
        vars(c).update(position="learned", norm="layernorm", mlp="gelu_tanh", attention="sdpa", bias=True)
        vars(c).update(qk_norm=False, short_conv=0, n_kv_head=None, head_dim=None, n_inner=sizes.get("n_inner"))
        c.tie_embeddings = sizes.get("tie_word_embeddings", True)
    usual = min(c.n_layer, c.n_head, c.n_embd) >= 1 and c.n_embd % (2 * c.n_head) == 0 and 0 <= c.dropout < 1
    if not usual or c.n_kv_head or c.head_dim or c.n_inner:  # perhaps impossible: GPTConfig knows, and says why
        from model import GPTConfig

        return GPTConfig(**{field.name: getattr(c, field.name) for field in fields(GPTConfig)})
    c.head_dim, c.n_kv_head = c.n_embd // c.n_head, c.n_head
    c.n_inner = 8 * math.ceil(c.n_embd / 3) if c.mlp == "swiglu" else 4 * c.n_embd
    return c


def data_sizes(cfg: TrainConfig) -> tuple[int, int, int] | None:
    """Vocabulary, tokens to train on, and tokens of the shortest file of the data set; None where it is not there."""
    if not any((root / cfg.data_dir / cfg.dataset).is_dir() for root in (Path(), ROOT)):
        return None
    from kqv.data import Split, find_dataset, read_meta  # numpy, which --help need not wait for

    folder = find_dataset(cfg.data_dir, cfg.dataset)
    meta = read_meta(folder)
    train, val = (Split(folder, name, 1, meta) for name in ("train", "val"))
    return meta["vocab_size"], train.tokens, min(len(shard) for shard in train.shards + val.shards)


def find_device(plan_device: str | None, device: str) -> tuple[str, float | None]:
    """Name of the device to plan for, and its memory in bytes if known: plan_device, or what `device` is here."""
    if plan_device:
        names = {name.lower().removeprefix("rtx "): name for name in GPUS}
        name = names.get(plan_device.lower().replace("-", " ").replace("_", " ").removeprefix("rtx "))
        if name is None:
            raise UserError(f"plan_device={plan_device!r}: expected {' | '.join(names)}")
        return name, GPUS[name][1] * 1e9
    if device != "cpu" and shutil.which("nvidia-smi"):
        import torch

        if torch.cuda.is_available():
            return torch.cuda.get_device_name(), torch.cuda.get_device_properties(0).total_memory
    if device.startswith("cuda"):
        raise UserError(f"device={device!r}: there is none here; which one is the plan for? --plan_device=h100")
    return "cpu", ram_bytes()


def concerns(cfg: TrainConfig, n_params: int, data: tuple[int, int, int] | None) -> list[str]:
    """What looks like a mistake in the settings of a training run, a line each. `data`: see data_sizes."""
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


def plan(cfg: TrainConfig, world_size: int = 1, plan_device: str | None = None) -> str:
    """What `world_size` processes with these settings will take, as text. UserError where they are impossible.

    It is planned for `plan_device`, a name of hardware.GPUS in any case, or else for the device of this machine.
    """
    micro_steps = micro_steps_of_each(world_size, cfg.gradient_accumulation_steps)
    data = data_sizes(cfg)
    c = model_config(cfg, padded_vocab_size(data[0] if data else 50257))
    device, available = find_device(plan_device, cfg.device)
    gpu, dtype = device != "cpu", cfg.dtype
    if dtype == "auto":
        dtype = "bfloat16" if gpu or cpu_likes_bfloat16() else "float32"
        dtype = "float16" if re.search("V100|T4", device) else dtype
    check_strategy(cfg.strategy, dtype)
    sizes, flops = parameters(c), flops_per_token(c)
    n_params = sum(sizes.values())
    tokens_per_step = cfg.gradient_accumulation_steps * cfg.batch_size * cfg.block_size
    tokens = cfg.max_iters * tokens_per_step
    speed = ASSUMED_MFU * world_size * (peak_flops(device, dtype) or 0)  # FLOP/s

    lines = {"plan": f"{world_size} x {device} in {dtype}; nothing is run or written"}
    lines["parameters"] = f"{n_params:,}: " + ", ".join(f"{part} {size:,}" for part, size in sizes.items())
    known = f"{data[1]:,} tokens to train on" if data else "not there, GPT-2's vocabulary is assumed"
    lines["data"] = f"{Path(cfg.data_dir) / cfg.dataset}: {known}; vocab_size {c.vocab_size:,}"
    if not cfg.eval_only:
        sequences = f"{cfg.batch_size} sequences of {cfg.block_size:,} x {micro_steps} micro-batches"
        lines["step"] = f"{tokens_per_step:,} tokens: {sequences} x {world_size} devices"
        epochs = f", {tokens / data[1]:,.1f} epochs" if data else ""
        lines["run"] = f"{cfg.max_iters:,} steps, {tokens:,} tokens{epochs}"
        lines["tokens/weight"] = f"{tokens / n_params:,.2f}; 20 is the best use of compute (arXiv:2203.15556)"
        lines["FLOPs"] = f"{flops:.3g} a token, {flops * tokens:.3g} in all"
        lines["time"] = f"unknown: no peak to go by for {device} in {dtype}; --plan_device=h100 names a device"
        if speed:
            lines["time"] = f"{timedelta(seconds=round(flops * tokens / speed))}, {speed / flops:,.0f} tokens/s"
            lines["time"] += f", assuming that {ASSUMED_MFU:.0%} of {device}'s peak is reached (MFU)"
        lines["checkpoint"] = f"{checkpoint_bytes(c, cfg.optimizer == 'muon'):,} bytes"

    width, windows = 4 if dtype == "float32" else 2, EVAL_BATCH * cfg.eval_iters or EVAL_TOKENS
    sharded, recomputed = cfg.strategy == "fsdp" and world_size > 1, cfg.activation_checkpointing
    moments = memory(
        c, cfg.batch_size, width, gpu, windows, micro_steps, world_size, sharded, recomputed, cfg.optimizer == "muon"
    )
    if cfg.eval_only:
        moments = {"evaluation": moments["evaluation"] | {"optimizer": 0, "gradients": 0}}
    totals = {moment: sum(parts.values()) for moment, parts in moments.items()}
    peak = max(totals.values())
    has = f", of {available / 1e9:,.0f} GB" if available else ""
    lines["memory"] = f"{peak / 1e9:,.2f} GB at the peak of each process{has}, besides PyTorch's own 0.3 to 1 GB"
    lines["  in MB"] = "".join(f"{part:>13}" for part in (*moments["evaluation"], "total"))
    for moment, parts in moments.items():
        lines[f"  {moment}"] = "".join(f"{size / 1e6:13,.1f}" for size in (*parts.values(), totals[moment]))
    if not cfg.eval_only:
        kept = kept_for_backward(c, cfg.batch_size, width, gpu, recomputed)
        lines["  activations"] = ", ".join(f"{part} {size / 1e6:,.1f}" for part, size in kept.items())

    warnings = [] if cfg.eval_only else concerns(cfg, n_params, data)
    if cfg.init_from in ("resume", "auto"):
        warnings.append(f"init_from={cfg.init_from}: these are the settings given, not those of a checkpoint")
    if available and peak * (1 if gpu else world_size) > available:
        warnings.append("not enough memory: lower batch_size, and raise gradient_accumulation_steps")
    return "\n".join([f"{name:<18}{line}" for name, line in lines.items()] + [f"warning: {text}" for text in warnings])
