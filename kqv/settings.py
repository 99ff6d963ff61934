"""What can be set: the settings of train.py and sample.py, one flat dataclass each.

Each field is an option of the command line, with its type, its default and, in `Annotated`, its help text. The name of
the class in which a field stands is its heading in `--help`. Settings that are impossible raise UserError.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from kqv.errors import UserError


@dataclass(kw_only=True)
class Machine:
    device: Annotated[str, "auto | cpu | cuda | cuda:1 | mps; auto: cuda, else mps, else cpu"] = "auto"
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16", "float16"],
        "compute type; float16 trains with a gradient scaler. auto: 16 bits on GPUs, and on CPUs if faster",
    ] = "auto"
    compile: Annotated[
        bool | Literal["auto"], "use torch.compile; auto: train.py tries it on GPUs, and goes on without if it fails"
    ] = "auto"
    seed: Annotated[int, "seed of all randomness"] = 1337


@dataclass(kw_only=True)
class Training:
    init_from: Annotated[
        str,
        "scratch | resume | auto: resume if there is a run | gpt2 ... | a Hugging Face folder | OWNER/NAME on the hub",
    ] = "scratch"
    max_iters: Annotated[int, "optimizer steps in all"] = 600000
    max_minutes: Annotated[float | None, "save and stop after N minutes; not kept on resume"] = None
    patience: Annotated[int | None, "stop after N evaluations without a better val_loss"] = None
    max_bad_steps: Annotated[int, "stop after N steps in a row without a finite loss and gradient"] = 10
    eval_only: Annotated[bool, "evaluate once, write nothing and stop"] = False
    plan: Annotated[bool, "print parameters, FLOPs, memory and time of the run, and stop; writes nothing"] = False
    plan_device: Annotated[str | None, "the device to plan for: h100, a100, rtx 4090, ...; None: this machine's"] = None
    strategy: Annotated[
        Literal["ddp", "fsdp"], "with several processes, each holds the whole model (ddp) or a share of it (fsdp)"
    ] = "ddp"
    cuda_graph: Annotated[
        bool, "one GPU records the forward and backward pass once and replays it; not with activation_checkpointing"
    ] = True
    activation_checkpointing: Annotated[bool, "recompute activations in the backward pass: less memory, slower"] = False
    backend: Annotated[
        Literal["auto", "nccl", "gloo", "mpi", "ucc"], "backend of torch.distributed; auto: nccl on GPUs, gloo on CPUs"
    ] = "auto"


@dataclass(kw_only=True)
class Output:
    out_dir: Annotated[str, "folder for the checkpoints and metrics"] = "out"
    eval_interval: Annotated[int, "iterations between evaluations; each can save a checkpoint"] = 2000
    log_interval: Annotated[int, "iterations between logged training losses"] = 1
    eval_iters: Annotated[int, "batches of 12 fixed windows to evaluate on; 0: the whole split"] = 200
    always_save_checkpoint: Annotated[bool, "save ckpt.pt at each evaluation, not only when val_loss improves"] = True
    save_interval: Annotated[int | None, "also save ckpt.pt every N iterations, between evaluations"] = None
    keep_last: Annotated[int, "also keep the last N saves, as ckpt-ITERATION.pt"] = 0
    sample_interval: Annotated[int | None, "write two samples every N iterations, always from the same seeds"] = None
    save_errors: Annotated[Literal["continue", "stop"], "what to do if a save fails before the end of the run"] = (
        "continue"
    )
    wandb_log: Annotated[bool, "also log to Weights & Biases"] = False
    wandb_project: Annotated[str, "project at Weights & Biases"] = "owt"
    wandb_run_name: Annotated[str, "run name at Weights & Biases"] = "gpt2"


@dataclass(kw_only=True)
class Data:
    dataset: Annotated[str, "the data set: the folder DATA_DIR/DATASET, made by prepare/"] = "openwebtext"
    data_dir: Annotated[str, "folder of data sets, in the working directory or else in the checkout"] = "data"
    batch_size: Annotated[int, "sequences in one micro-batch"] = 12
    gradient_accumulation_steps: Annotated[int, "micro-batches in one step, over all processes"] = 5 * 8
    block_size: Annotated[int, "context length, in tokens"] = 1024
    document_mask: Annotated[bool, "documents in one sequence do not see each other; an end of text divides them"] = (
        False
    )
    allow_other_data: Annotated[bool, "allow resuming on other data than the checkpoint's"] = False


@dataclass(kw_only=True)
class Model:
    n_layer: Annotated[int, "transformer blocks"] = 12
    n_head: Annotated[int, "attention (query) heads"] = 12
    n_embd: Annotated[int, "width of the residual stream"] = 768
    dropout: Annotated[float, "0 for pretraining, try 0.1 or more for finetuning and small data"] = 0.0
    bias: Annotated[bool, "biases in the linear and LayerNorm layers, as in GPT-2"] = False
    position: Annotated[Literal["learned", "sinusoidal", "rope", "none"], "position encoding"] = "learned"
    norm: Annotated[Literal["layernorm", "rmsnorm"], "normalisation"] = "layernorm"
    mlp: Annotated[Literal["gelu", "gelu_tanh", "relu2", "swiglu"], "activation of the MLP"] = "gelu"
    n_kv_head: Annotated[int | None, "key/value heads, each shared by n_head/n_kv_head queries; None: n_head"] = None
    head_dim: Annotated[int | None, "width of a head; None: n_embd / n_head"] = None
    n_inner: Annotated[int | None, "width inside the MLP; None: 4 n_embd (swiglu: 8/3 n_embd)"] = None
    qk_norm: Annotated[bool, "normalise queries and keys with `norm`"] = False
    short_conv: Annotated[int, "mix each token with the N before it, twice in each block (Canon layers); 0: off"] = 0
    tie_embeddings: Annotated[bool, "one matrix for the token embedding and the output head"] = True
    rope_theta: Annotated[float, "base of the rotary frequencies"] = 10000.0
    norm_eps: Annotated[float, "epsilon of the normalisations"] = 1e-5
    attention: Annotated[
        Literal["auto", "sdpa", "chunked", "explicit"],
        "PyTorch's fused kernel, products in chunks, or the formula written out; auto: the fastest to train with",
    ] = "auto"


@dataclass(kw_only=True)
class Finetuning:
    freeze: Annotated[
        tuple[str, ...], "do not train weights of this name (* and ? match); can be given more than once"
    ] = ()
    lora_rank: Annotated[int, "train adapters of this rank instead of the weights: LoRA; 0: off"] = 0
    lora_alpha: Annotated[float, "adapters are scaled by lora_alpha / lora_rank"] = 16.0
    lora_targets: Annotated[tuple[str, ...], "layers with adapters, such as attn.c_attn; none given: all four"] = ()


@dataclass(kw_only=True)
class Optimizer:
    optimizer: Annotated[Literal["adamw", "muon"], "muon: Muon for the blocks' matrices, AdamW for the rest"] = "adamw"
    learning_rate: Annotated[float, "peak learning rate (AdamW's)"] = 6e-4
    muon_lr: Annotated[float, "Muon's peak learning rate, which follows the same schedule"] = 0.02
    muon_momentum: Annotated[float, "Muon's momentum"] = 0.95
    weight_decay: Annotated[float, "weight decay of matrices and embeddings"] = 1e-1
    beta1: Annotated[float, "AdamW's first beta"] = 0.9
    beta2: Annotated[float, "AdamW's second beta"] = 0.95
    grad_clip: Annotated[float, "greatest gradient norm; larger gradients are scaled down; 0: no clipping"] = 1.0
    decay_lr: Annotated[bool, "warm up, then decay; False: constant learning_rate"] = True
    schedule: Annotated[
        Literal["cosine", "wsd"], "decay along a cosine; wsd: stay at the peak, then decay linearly"
    ] = "cosine"
    decay_fraction: Annotated[float, "wsd: the share of lr_decay_iters, at its end, in which the rate decays"] = 0.5
    warmup_iters: Annotated[int, "iterations of linear warm-up"] = 2000
    lr_decay_iters: Annotated[int | None, "iteration at which the decay ends; None: max_iters"] = None
    min_lr: Annotated[float, "learning rate after the decay; about learning_rate / 10"] = 6e-5


@dataclass(kw_only=True)
class TrainConfig(Machine, Training, Finetuning, Optimizer, Model, Data, Output):
    def __post_init__(self):
        check_init_from(self.init_from, "scratch", "resume", "auto")
        at_least(self, 1, "batch_size", "gradient_accumulation_steps", "block_size", "eval_interval", "log_interval")
        at_least(self, 1, "save_interval", "sample_interval", "patience", "max_bad_steps")
        at_least(
            self, 0, "eval_iters", "max_iters", "warmup_iters", "lr_decay_iters", "seed", "keep_last", "max_minutes"
        )
        at_least(self, 0, "learning_rate", "min_lr", "weight_decay", "grad_clip", "norm_eps", "rope_theta", "muon_lr")
        at_least(self, 0, "short_conv")
        for key in ("out_dir", "dataset"):
            if not getattr(self, key):
                raise UserError(f"{key}='': must not be empty")
        for key in ("beta1", "beta2", "muon_momentum"):
            if not 0 <= getattr(self, key) < 1:
                raise UserError(f"{key}={getattr(self, key)}: must be at least 0 and below 1")
        if not 0 <= self.decay_fraction <= 1:
            raise UserError(f"decay_fraction={self.decay_fraction}: must be from 0 to 1")
        at_least(self, 0, "lora_rank", "lora_alpha")
        if self.document_mask and self.short_conv:
            raise UserError("document_mask: does not work with short_conv, which mixes each token with those before it")
        if self.lora_rank and self.init_from in ("scratch", "auto"):
            raise UserError("lora_rank: adapts a model from Hugging Face; which? --init_from=FOLDER")
        if self.lora_rank and (self.optimizer == "muon" or self.strategy == "fsdp"):
            raise UserError("lora_rank: works with optimizer=adamw and strategy=ddp")
        if (self.strategy, self.optimizer) == ("fsdp", "muon"):
            raise UserError("strategy=fsdp: trains with AdamW; optimizer=muon needs whole matrices")


@dataclass(kw_only=True)
class Sampling:
    init_from: Annotated[
        str, "resume: the model in out_dir | gpt2 ... | a Hugging Face folder | OWNER/NAME on the hub"
    ] = "resume"
    out_dir: Annotated[str, "folder with the ckpt.pt of train.py or of nanoGPT"] = "out"
    data_dir: Annotated[str, "folder of data sets; nanoGPT's checkpoints need DATASET/meta.pkl in it"] = "data"
    start: Annotated[str, 'the prompt: text, "FILE:prompt.txt", or "-" for standard input'] = "\n"
    num_samples: Annotated[int, "number of samples; with the same dtype, sample i does not depend on it"] = 10
    max_new_tokens: Annotated[int, "tokens to generate for each sample"] = 500
    temperature: Annotated[float, "1: the model's probabilities; lower: less random; 0: always the likeliest"] = 0.8
    top_k: Annotated[int | None, "keep the k likeliest tokens; None: all"] = 200
    top_p: Annotated[float | None, "keep the likeliest tokens whose probabilities add up to this"] = None
    min_p: Annotated[float | None, "drop tokens whose probability is below this share of the likeliest one"] = None
    repetition_penalty: Annotated[float, "above 1: tokens that have occurred become less likely"] = 1.0
    stop: Annotated[tuple[str, ...], "end a sample at this text; can be given more than once"] = ()
    stream: Annotated[bool, "print each token as it is generated"] = False
    interactive: Annotated[bool, "read prompts from standard input, one in each line"] = False
    kv_cache: Annotated[bool, "False: recompute the whole window for each token, as nanoGPT does"] = True
    quantize: Annotated[Literal["int8"] | None, "int8: 8-bit products on x86 CPUs; faster, slightly less exact"] = None


@dataclass(kw_only=True)
class SampleConfig(Machine, Sampling):
    def __post_init__(self):
        check_init_from(self.init_from, "resume")
        at_least(self, 1, "num_samples", "max_new_tokens", "top_k")
        at_least(self, 0, "temperature", "seed")
        for key in ("top_p", "min_p"):
            if getattr(self, key) is not None and not 0 < getattr(self, key) <= 1:
                raise UserError(f"{key}={getattr(self, key)}: must be above 0 and at most 1")
        if self.quantize and self.compile is True:
            raise UserError(f"quantize={self.quantize!r}: does not work with compile=True")
        if self.compile is True and not self.kv_cache:
            raise UserError("compile=True: does not work with kv_cache=False, whose shapes change with each token")
        if "" in self.stop:
            raise UserError("stop='': must not be empty")
        if not 0.01 <= self.repetition_penalty <= 100:
            raise UserError(f"repetition_penalty={self.repetition_penalty}: must be from 0.01 to 100")


HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")  # OWNER/NAME


def check_init_from(init_from: str, *ours: str) -> None:
    known = (*ours, "gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")
    path, is_name = Path(init_from), HUB_NAME.fullmatch(init_from)
    if init_from not in known and not (path.is_dir() or is_name or (path.suffix == ".gguf" and path.is_file())):
        more = "a Hugging Face folder | OWNER/NAME on the hub | a .gguf file"
        raise UserError(f"init_from={init_from!r}: expected {' | '.join(known)} | {more}")


def at_least(config: Any, low: int, *keys: str) -> None:
    """Raise UserError if one of `config`'s numbers is below `low`, nan, or 2**63 or more. None ("not set") passes."""
    for key in keys:
        value = getattr(config, key)
        if value is not None and not value >= low:  # `not >=` also catches nan
            raise UserError(f"{key}={value}: must be at least {low}")
        if value is not None and not value < 2**63:
            raise UserError(f"{key}={value}: too large")


# -- checks of settings together, once the device and the number of processes are known --------------------------------


def check_strategy(strategy: str, dtype: str) -> None:
    """Raise UserError if FSDP cannot train in this dtype (after "auto" is resolved)."""
    if strategy == "fsdp" and dtype == "float16":
        raise UserError("strategy=fsdp: trains in bfloat16 or float32; float16 would need its gradients scaled")


def micro_steps_of_each(world_size: int, gradient_accumulation_steps: int) -> int:
    """Micro-batches of each process in one step. Raises UserError if they cannot be divided evenly."""
    if gradient_accumulation_steps % world_size:
        shares = f"{world_size} processes share them, so give a multiple of {world_size}"
        raise UserError(f"gradient_accumulation_steps={gradient_accumulation_steps}: {shares}")
    return gradient_accumulation_steps // world_size


def learning_rate_concerns(cfg: TrainConfig) -> list[str]:
    """Likely mistakes in the learning-rate schedule, one line each."""
    lr_decay_iters = cfg.max_iters if cfg.lr_decay_iters is None else cfg.lr_decay_iters
    found = []
    if cfg.decay_lr and lr_decay_iters != cfg.max_iters:
        found.append(f"lr_decay_iters={lr_decay_iters} is not max_iters={cfg.max_iters}")
    if cfg.decay_lr and 0 < min(cfg.max_iters, lr_decay_iters) <= cfg.warmup_iters:
        found.append(f"warmup_iters={cfg.warmup_iters}: the learning rate is still rising when the run ends")
    return found
