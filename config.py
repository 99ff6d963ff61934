"""Settings: defaults < config files < --key=value, for every command of kqv.

A command's settings are one flat dataclass. Its fields are the command line: each `Annotated[type, "help"]` becomes an
option through Typer, and a config file is plain Python that assigns some of the same names:

    python train.py configs/train_shakespeare_char.py --batch_size=32 --compile=False
"""

import ast
import difflib
import inspect
import io
import os
import re
import runpy
import sys
import traceback
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import (
    Annotated,
    Any,
    Literal,
    NoReturn,
    TypeVar,
    Union,
    get_args,
    get_origin,
    get_type_hints,
)

import typer

ROOT = Path(__file__).resolve().parent
Settings = TypeVar("Settings")
EVAL_BATCH = 12  # windows for each of eval_iters: nanoGPT's batch_size, so that ours does not change what is measured
EVAL_TOKENS = 4096  # tokens of one evaluation forward: fixed, so that rounding cannot depend on batch_size

# -- the settings of train.py and sample.py; the name of a class is the heading of its options in --help -------------


@dataclass(kw_only=True)
class Machine:
    device: Annotated[str, "auto | cpu | cuda | cuda:1 | mps; auto takes the best one there is"] = "auto"
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16", "float16"],
        "compute type; float16 trains with a gradient scaler. auto: a 16-bit type where it is faster, not on most CPUs",
    ] = "auto"
    compile: Annotated[
        bool | Literal["auto"], "torch.compile; auto: train.py tries it on GPUs, and says so where it falls back"
    ] = "auto"
    seed: Annotated[int, "one number from which all randomness follows"] = 1337


@dataclass(kw_only=True)
class Training:
    init_from: Annotated[str, "scratch | resume | auto: resume if there is a run | gpt2 ... gpt2-xl | a folder"] = (
        "scratch"
    )
    max_iters: Annotated[int, "optimizer steps in all"] = 600000
    max_minutes: Annotated[float | None, "save and stop after N minutes"] = None
    patience: Annotated[int | None, "stop after N evaluations without a better val_loss"] = None
    max_bad_steps: Annotated[int, "stop after N steps in a row without a finite loss and gradient"] = 10
    eval_only: Annotated[bool, "evaluate once, write nothing and stop"] = False
    plan: Annotated[bool, "print what the run will take (memory, time, ...) and stop; nothing is run or written"] = (
        False
    )
    plan_device: Annotated[str | None, "the device to plan for: h100, a100, rtx 4090, ...; None: this machine's"] = None
    strategy: Annotated[
        Literal["ddp", "fsdp"], "several processes: each has the whole model, or a share of it (FSDP)"
    ] = "ddp"
    activation_checkpointing: Annotated[bool, "keep fewer activations and compute them again: slower, smaller"] = False
    backend: Annotated[
        Literal["auto", "nccl", "gloo", "mpi", "ucc"], "of torch.distributed; auto: nccl on GPUs, gloo on CPUs"
    ] = "auto"


@dataclass(kw_only=True)
class Output:
    out_dir: Annotated[str, "folder for the checkpoints and metrics"] = "out"
    eval_interval: Annotated[int, "iterations between evaluations, each of which can save"] = 2000
    log_interval: Annotated[int, "iterations between logged training losses"] = 1
    eval_iters: Annotated[int, "batches of 12 fixed windows to evaluate on; 0: the whole split"] = 200
    always_save_checkpoint: Annotated[bool, "save ckpt.pt at each evaluation, not only when val_loss improves"] = True
    save_interval: Annotated[int | None, "also save ckpt.pt every N iterations, between evaluations"] = None
    keep_last: Annotated[int, "also keep the last N saves, as ckpt-ITERATION.pt"] = 0
    sample_interval: Annotated[int | None, "write two samples every N iterations, always from the same seeds"] = None
    save_errors: Annotated[Literal["continue", "stop"], "what to do when a save fails, the last one apart"] = "continue"
    wandb_log: Annotated[bool, "also log to Weights & Biases"] = False
    wandb_project: Annotated[str, "its project"] = "owt"
    wandb_run_name: Annotated[str, "its run name"] = "gpt2"


@dataclass(kw_only=True)
class Data:
    dataset: Annotated[str, "the data set: the folder DATA_DIR/DATASET, made by prepare/"] = "openwebtext"
    data_dir: Annotated[str, "folder of data sets: here, or else beside the code"] = "data"
    batch_size: Annotated[int, "sequences in one micro-batch"] = 12
    gradient_accumulation_steps: Annotated[int, "micro-batches in one step, over all processes"] = 5 * 8
    block_size: Annotated[int, "context length, in tokens"] = 1024
    allow_other_data: Annotated[bool, "resume also on data other than the checkpoint's"] = False


@dataclass(kw_only=True)
class Model:
    n_layer: Annotated[int, "transformer blocks"] = 12
    n_head: Annotated[int, "attention (query) heads"] = 12
    n_embd: Annotated[int, "width of the residual stream"] = 768
    dropout: Annotated[float, "0 for pretraining, try 0.1 or more for finetuning and small data"] = 0.0
    bias: Annotated[bool, "biases in the linear and LayerNorm layers, as in GPT-2"] = False
    position: Annotated[Literal["learned", "sinusoidal", "rope", "none"], "how positions enter"] = "learned"
    norm: Annotated[Literal["layernorm", "rmsnorm"], "normalisation"] = "layernorm"
    mlp: Annotated[Literal["gelu", "gelu_tanh", "relu2", "swiglu"], "activation of the MLP"] = "gelu"
    n_kv_head: Annotated[int | None, "key/value heads, each shared by n_head/n_kv_head queries; None: n_head"] = None
    head_dim: Annotated[int | None, "width of a head; None: n_embd / n_head"] = None
    n_inner: Annotated[int | None, "width inside the MLP; None: 4 n_embd (swiglu: 8/3 n_embd)"] = None
    qk_norm: Annotated[bool, "normalise queries and keys, in the way of `norm`"] = False
    short_conv: Annotated[int, "mix each token with the N before it, twice in each block (Canon layers); 0: off"] = 0
    tie_embeddings: Annotated[bool, "one matrix for the token embedding and the output head"] = True
    rope_theta: Annotated[float, "base of the rotary frequencies"] = 10000.0
    norm_eps: Annotated[float, "epsilon of the normalisations"] = 1e-5
    attention: Annotated[Literal["sdpa", "explicit"], "PyTorch's fused kernel, or the formula written out"] = "sdpa"


@dataclass(kw_only=True)
class Optimizer:
    optimizer: Annotated[Literal["adamw", "muon"], "muon: Muon for the blocks' matrices, AdamW for the rest"] = "adamw"
    learning_rate: Annotated[float, "peak learning rate (AdamW's)"] = 6e-4
    muon_lr: Annotated[float, "Muon's peak learning rate, which follows the same schedule"] = 0.02
    muon_momentum: Annotated[float, "Muon's momentum"] = 0.95
    weight_decay: Annotated[float, "weight decay, not on gains and biases"] = 1e-1
    beta1: Annotated[float, "AdamW's first beta"] = 0.9
    beta2: Annotated[float, "AdamW's second beta"] = 0.95
    grad_clip: Annotated[float, "largest gradient norm; larger gradients are scaled down to it; 0: no clipping"] = 1.0
    decay_lr: Annotated[bool, "warm up, then decay; False: constant learning_rate"] = True
    schedule: Annotated[
        Literal["cosine", "wsd"], "decay along a cosine, or stay at the peak and then decay along a line"
    ] = "cosine"
    decay_fraction: Annotated[float, "wsd: the last part of lr_decay_iters, over which the rate decays"] = 0.5
    warmup_iters: Annotated[int, "iterations of linear warm-up"] = 2000
    lr_decay_iters: Annotated[int | None, "where the decay ends; None: max_iters"] = None
    min_lr: Annotated[float, "learning rate at its end, about learning_rate / 10"] = 6e-5


@dataclass(kw_only=True)
class TrainConfig(Machine, Training, Optimizer, Model, Data, Output):
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
                raise ValueError(f"{key}='': must not be empty")
        for key in ("beta1", "beta2", "muon_momentum"):
            if not 0 <= getattr(self, key) < 1:
                raise ValueError(f"{key}={getattr(self, key)}: must be at least 0 and below 1")
        if not 0 <= self.decay_fraction <= 1:
            raise ValueError(f"decay_fraction={self.decay_fraction}: must be from 0 to 1")
        if (self.strategy, self.optimizer) == ("fsdp", "muon"):
            raise ValueError("strategy=fsdp: trains with AdamW; optimizer=muon needs whole matrices")


@dataclass(kw_only=True)
class Sampling:
    init_from: Annotated[str, "resume (the model in out_dir) | gpt2 | gpt2-medium | ... | a GPT-2 folder"] = "resume"
    out_dir: Annotated[str, "folder with the ckpt.pt of train.py or of nanoGPT"] = "out"
    data_dir: Annotated[str, "where nanoGPT's checkpoints find DATASET/meta.pkl; ours carry their tokenizer"] = "data"
    start: Annotated[str, 'the prompt: text, "FILE:prompt.txt", or "-" for standard input'] = "\n"
    num_samples: Annotated[int, "how many samples; sample i is the same however many there are"] = 10
    max_new_tokens: Annotated[int, "tokens to generate for each"] = 500
    temperature: Annotated[float, "1: the model's own probabilities, lower: less random, 0: always the likeliest"] = 0.8
    top_k: Annotated[int | None, "keep the k likeliest tokens; None: all"] = 200
    top_p: Annotated[float | None, "keep the likeliest tokens that hold this much probability together"] = None
    min_p: Annotated[float | None, "drop tokens less likely than this share of the likeliest"] = None
    repetition_penalty: Annotated[float, "above 1: make tokens that have occurred less likely"] = 1.0
    stop: Annotated[tuple[str, ...], "end a sample where this text appears; can be given more than once"] = ()
    stream: Annotated[bool, "print each token as it comes"] = False
    interactive: Annotated[bool, "ask for prompts, one a line, until end of file"] = False
    kv_cache: Annotated[bool, "False: recompute the whole window for each token, as nanoGPT does"] = True
    quantize: Annotated[Literal["int8"] | None, "int8: 8-bit matrix products, on x86 CPUs: faster, slightly worse"] = (
        None
    )


@dataclass(kw_only=True)
class SampleConfig(Machine, Sampling):
    def __post_init__(self):
        check_init_from(self.init_from, "resume")
        at_least(self, 1, "num_samples", "max_new_tokens", "top_k")
        at_least(self, 0, "temperature", "seed")
        for key in ("top_p", "min_p"):
            if getattr(self, key) is not None and not 0 < getattr(self, key) <= 1:
                raise ValueError(f"{key}={getattr(self, key)}: must be above 0 and at most 1")
        if self.quantize and self.compile is True:
            raise ValueError(f"quantize={self.quantize!r}: does not work with compile=True")
        if self.compile is True and not self.kv_cache:
            raise ValueError("compile=True: does not work with kv_cache=False, whose shapes change with each token")
        if "" in self.stop:
            raise ValueError("stop='': no text at all would stop before it began")
        if not 0.01 <= self.repetition_penalty <= 100:
            raise ValueError(f"repetition_penalty={self.repetition_penalty}: must be from 0.01 to 100")


def check_init_from(init_from: str, *ours: str) -> None:
    known = (*ours, "gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")
    if init_from not in known and not Path(init_from).is_dir():
        raise ValueError(f"init_from={init_from!r}: expected {' | '.join(known)} | a Hugging Face GPT-2 folder")


def at_least(config: Any, low: int, *keys: str) -> None:
    """ValueError where one of `config`'s numbers is below `low`, nan, or 2**63 and more. None, "not set", passes."""
    for key in keys:
        value = getattr(config, key)
        if value is not None and not value >= low:  # `not >=` also catches nan
            raise ValueError(f"{key}={value}: must be at least {low}")
        if value is not None and not value < 2**63:
            raise ValueError(f"{key}={value}: too large")


# -- from files and flags to a config --------------------------------------------------------------------------------

SPOKEN = {bool: "True | False", int: "int", float: "float", str: "text", type(None): "None"}


def convert(key: str, value: Any, kind: Any) -> Any:
    """`value` (text of a flag, or any object of a config file) as type `kind`; ValueError names what is accepted."""
    text = isinstance(value, str)
    for member in get_args(kind) if get_origin(kind) in (Union, types.UnionType) else (kind,):
        if get_origin(member) is Literal and value in get_args(member):
            return value
        if member is type(None) and (value is None or (text and value.lower() == "none")):
            return None
        if member is bool and str(value).lower() in ("true", "false", "1", "0") and isinstance(value, (str, bool)):
            return str(value).lower() in ("true", "1")
        if member in (int, float) and not isinstance(value, bool) and isinstance(value, (str, int, member)):
            try:
                return member(value)
            except (ValueError, OverflowError):
                continue
        if member is str and text:
            return value
        if get_origin(member) is tuple and isinstance(value, (list, tuple, str)):
            return (value,) if text else tuple(convert(key, item, str) for item in value)
    raise ValueError(f"{key}={value!r}: expected {spoken(kind)}")


def spoken(kind: Any) -> str:
    if get_origin(kind) is Literal:
        return " | ".join(get_args(kind))
    if get_origin(kind) is tuple:
        return "text, or a list of texts"
    if get_origin(kind) in (Union, types.UnionType):
        return " | ".join(spoken(member) for member in get_args(kind))
    return SPOKEN[kind]


def unknown(key: str, known: list[str]) -> str:
    close = difflib.get_close_matches(key, known, n=1)
    return f"unknown setting {key!r}" + (f": did you mean {close[0]!r}?" if close else "; --help lists them all")


def read_file(path: str, kinds: dict[str, Any]) -> dict[str, Any]:
    """The settings that a config file assigns; its imports, its functions and names with a leading _ are its own."""
    found = next((p for p in (Path(path), ROOT / "configs" / Path(path).name) if p.is_file()), None)
    if found is None or found.suffix != ".py":
        raise ValueError(f"no config file {path!r}; settings are given as --key=value")
    values = {}
    try:
        tree = ast.parse(found.read_bytes())
        assigned = runpy.run_path(str(found))
    except (Exception, SystemExit) as error:  # it is the user's own program, so it can raise anything
        raise ValueError(f"{path}: {type(error).__name__}: {error}") from None
    imports = [node for node in ast.walk(tree) if isinstance(node, (ast.Import, ast.ImportFrom))]
    imported = {name.asname or name.name.split(".")[0] for node in imports for name in node.names}
    for key, value in assigned.items():
        if key.startswith("_") or key in imported or (callable(value) and key not in kinds):
            continue
        if key not in kinds:
            raise ValueError(f"{path}: {unknown(key, list(kinds))}")
        try:
            values[key] = convert(key, value, kinds[key])
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
    return values


def normalize(arguments: list[str], kinds: dict[str, Any]) -> list[str]:
    """All accepted spellings in one: --batch-size 8, --compile, --no-compile, --compile False -> --key=value."""
    booleans = {key for key, kind in kinds.items() if kind is bool or bool in get_args(kind)}
    queue, result = list(arguments), []
    while queue:
        argument = queue.pop(0)
        if not argument.startswith("-") or argument == "--help":  # config files
            result.append(argument)
            continue
        if not argument.startswith("--"):
            raise ValueError(f"unknown option {argument!r}; settings are given as --key=value")
        key, equals, value = argument[2:].partition("=")
        key = key.replace("-", "_")
        if not equals and key in booleans:  # --compile, or --compile False
            said = bool(queue) and queue[0].lower() in ("true", "false", "auto")
            equals, value = "=", queue.pop(0) if said else "True"
        elif not equals and key.removeprefix("no_") in booleans:  # --no-compile
            key, equals, value = key.removeprefix("no_"), "=", "False"
        if key not in kinds:
            raise ValueError(unknown(key, list(kinds)))
        if not equals:
            if not queue:
                raise ValueError(f"--{key} needs a value: {spoken(kinds[key])}")
            value = queue.pop(0)
        result.append(f"--{key}={value}")
    return result


def parse(cls: type[Settings], arguments: list[str], doc: str = "") -> tuple[Settings, dict[str, str]]:
    """Make a `cls` from defaults < config files < flags; also return where each value came from.

    Origins are "default", the path of a config file, or "flag". Raises ValueError; `--help` prints and exits.
    Arguments without -- are config files, or the values of the field that `cls.POSITIONAL` names.
    """
    positional = getattr(cls, "POSITIONAL", None)
    hints = get_type_hints(cls, include_extras=True)
    kinds = {field.name: get_args(hints[field.name])[0] for field in fields(cls) if field.name != positional}

    def command(ctx: typer.Context, words: list[str] | None = None, **flags: str) -> tuple[Settings, dict[str, str]]:
        values, origin = {}, dict.fromkeys(kinds, "default")
        if positional and words:
            values[positional], origin[positional] = tuple(words), "flag"
        for path in (words or []) if not positional else []:
            found = read_file(path, kinds)
            values |= found
            origin |= dict.fromkeys(found, path)
        for key, value in flags.items():
            if ctx.get_parameter_source(key).name == "COMMANDLINE":
                values[key], origin[key] = convert(key, value, kinds[key]), "flag"
        return cls(**values), origin

    # Typer reads the options from the function's signature, so the dataclass is written into it. Every option is text
    # to Typer: convert() is the one place that knows the types, for flags and files alike.
    words = typer.Argument(metavar="[CONFIG.py]...", help="config files; later wins")
    if positional:
        words = typer.Argument(metavar=f"{positional.upper()}...", help=get_args(hints[positional])[1])
    annotations = {"ctx": typer.Context, "words": Annotated[list[str] | None, words]}
    defaults = {"ctx": inspect.Parameter.empty, "words": None}
    for field in fields(cls):
        if field.name == positional:
            continue
        kind, help_text = get_args(hints[field.name])
        heading = next(base.__name__ for base in cls.__mro__ if field.name in vars(base).get("__annotations__", {}))
        option = typer.Option(f"--{field.name}", help=help_text, metavar=spoken(kind), rich_help_panel=heading)
        repeated = get_origin(kind) is tuple
        annotations[field.name] = Annotated[list[str] | None if repeated else str, option]
        defaults[field.name] = None if repeated else str(field.default).replace("\n", "\\n")
    command.__signature__ = inspect.Signature(
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, annotation=annotation, default=defaults[name])
        for name, annotation in annotations.items()
    )
    command.__annotations__ = annotations
    command.__doc__ = doc
    app = typer.Typer(add_completion=False)
    app.command()(command)
    result = typer.main.get_command(app).main(normalize(arguments, kinds), standalone_mode=False)
    if isinstance(result, int):  # --help has answered
        sys.exit(result)
    return result


def restore(
    config: Settings, origin: dict[str, str], saved: dict[str, Any], but: set[str]
) -> tuple[Settings, dict[str, str]]:
    """A resumed run's settings: what was not given this time (and is not among `but`) is as it was saved."""
    hints = get_type_hints(type(config))
    keys = [key for key in saved if origin.get(key) == "default" and key not in but]
    values = {key: convert(key, saved[key], hints[key]) for key in keys}
    return replace(config, **values), origin | dict.fromkeys(keys, "checkpoint")


@contextmanager
def one_line_errors() -> Iterator[None]:
    """What a user can cause ends in one line on stderr and exit code 2.

    A ValueError raised by our own code is such a line; one from inside a library is a bug and keeps its traceback.
    """
    try:
        yield
        sys.stdout.flush()
    except KeyboardInterrupt:
        fail("interrupted", code=130)
    except BrokenPipeError:  # the reader of our output, `head` say, has gone
        discard_output()
        sys.exit(1)
    except ModuleNotFoundError as error:
        fail(f"this needs the Python package {error.name!r}: pip install {error.name}")
    except OSError as error:
        fail(f"{error.filename}: {error.strerror}" if error.filename and error.strerror else str(error))
    except (MemoryError, RuntimeError) as error:
        if not re.search("OutOfMemory|MemoryError|allocate memory", f"{type(error).__name__} {error}"):
            raise
        lower = "train.py takes less with a lower --batch_size or --block_size, sample.py with fewer --num_samples"
        fail(f"out of memory: {lower}")
    except ValueError as error:
        raised_in = Path(traceback.extract_tb(error.__traceback__)[-1].filename)
        if raised_in.is_relative_to(ROOT) and "site-packages" not in raised_in.parts:
            fail(str(error))
        raise


def discard_output() -> None:
    """What is printed from here on goes nowhere: the reader of our output, `head` say, has gone."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def fail(message: str, code: int = 2) -> NoReturn:
    process = f" in process {os.environ['RANK']}" if "RANK" in os.environ else ""
    with suppress(OSError):  # nobody reads that either
        print(f"error{process}: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(code)


def parse_command_line(cls: type[Settings], doc: str) -> tuple[Settings, dict[str, str]]:
    """The settings that sys.argv asks for. From here on Ctrl-C is one line too, while torch is imported say."""
    sys.excepthook = lambda kind, *rest: (
        print("error: interrupted", file=sys.stderr) if kind is KeyboardInterrupt else sys.__excepthook__(kind, *rest)
    )
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:  # closed by whoever started us: `>&-`, cron
            setattr(sys, name, Path(os.devnull).open(mode, encoding="utf-8"))  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a character that its encoding lacks is no reason to stop
            stream.reconfigure(errors="replace")
    with one_line_errors():
        return parse(cls, sys.argv[1:], doc)


def run(main: Callable[[Settings, dict[str, str]], None], cls: type[Settings]) -> None:
    """Call main(config, origin) with what the command line says; main's docstring is its --help."""
    settings = parse_command_line(cls, inspect.getdoc(main))
    with one_line_errors():
        main(*settings)
