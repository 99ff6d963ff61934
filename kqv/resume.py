"""Resuming a run: the newest checkpoint, its settings, and whether the data are still the same."""

from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, get_type_hints

from kqv import checkpoint
from kqv.cli import convert
from kqv.data import Dataset
from kqv.distributed import Processes
from kqv.errors import UserError
from kqv.hub_tokenizer import pretrained_description
from kqv.rundir import checkpoints
from kqv.settings import TrainConfig
from kqv.tokenizer import GPT2_VOCAB_SIZE, from_description

# settings that a resumed run does not take from the checkpoint: they belong to the launch, the machine and the place
NOT_RESTORED = {"init_from", "out_dir", "data_dir", "eval_only", "plan", "plan_device", "device", "compile", "backend"}
NOT_RESTORED |= {"strategy", "allow_other_data", "max_minutes"}
FREE = ("dropout", "attention", "block_size")  # the model's settings that can change on resume


def load_saved(init_from: str, out_dir: Path, processes: Processes, say: Callable[[str], None]) -> dict | None:
    """The checkpoint to continue from, if any. The main process reads it; the others need no access to the file."""
    saved = None
    if init_from in ("resume", "auto"):
        if processes.main and (init_from == "resume" or checkpoints(out_dir)):
            saved = checkpoint.load_newest(out_dir, say)
        saved = processes.broadcast(saved)
    return saved


def restore(
    cfg: TrainConfig, origin: dict[str, str], saved: dict[str, Any], but: set[str]
) -> tuple[TrainConfig, dict[str, str]]:
    """The settings, with defaults replaced by those of `saved` except for `but`; and the origin of each."""
    hints = get_type_hints(type(cfg))
    keys = [key for key in saved if origin.get(key) == "default" and key not in but]
    values = {key: convert(key, saved[key], hints[key]) for key in keys}
    return replace(cfg, **values), origin | dict.fromkeys(keys, "checkpoint")


def restore_settings(
    cfg: TrainConfig, origin: dict[str, str], saved: dict[str, Any], config_class: type, say: Callable[[str], None]
) -> tuple[TrainConfig, dict[str, str]]:
    """The settings of the checkpoint's run, except those given now. The model's are always the checkpoint's.

    `config_class` is GPTConfig. Raises UserError if the optimizer is another one.
    """
    # nanoGPT records a dtype on CPUs too, but does not use it there
    not_restored = NOT_RESTORED if "tokenizer" in saved else NOT_RESTORED | {"dtype"}
    cfg, origin = restore(cfg, origin, saved["config"], but=not_restored)
    if not cfg.eval_only and cfg.optimizer != (before := saved["config"].get("optimizer", "adamw")):
        raise UserError(f"optimizer={cfg.optimizer!r}: cannot continue from the state of {before} in the checkpoint")
    model_args = {field.name: field.default for field in fields(config_class)} | saved["model_args"]
    for key, value in model_args.items():
        given = origin.get(key, "default") not in ("default", "checkpoint")
        if given and key not in FREE and getattr(cfg, key) != value:
            say(f"{key}={value} as in the checkpoint, not {getattr(cfg, key)}")
    longest = model_args["block_size"]
    if isinstance(longest, int) and cfg.block_size != longest:
        if cfg.block_size > longest:
            say(f"block_size={longest} as in the checkpoint, not {cfg.block_size}")
            cfg.block_size = longest
        else:
            say(f"block_size={cfg.block_size}: the context is cut from the checkpoint's {longest} tokens")
    return cfg, origin


def check_data(dataset: Dataset, cfg: TrainConfig, saved: dict[str, Any] | None) -> None:
    """Raise UserError if the data do not fit the model: another tokenizer, or other data without allow_other_data."""
    tokenizer = dataset.meta["tokenizer"]
    if saved is None and cfg.init_from not in ("scratch", "auto"):
        if not same_tokens(tokenizer, pretrained_description(cfg.init_from)):
            theirs = f"{dataset.folder} has the tokens of a {tokenizer['kind']} tokenizer, not of its own"
            make = f"python prepare/text.py --tokenizer={cfg.init_from} --input=..."
            raise UserError(f"init_from={cfg.init_from!r}: {theirs}; this makes them: {make}")
    elif saved and (changed := changed_data(dataset, saved)) and not cfg.allow_other_data:
        trained = f"its {changed} is not what the checkpoint in {cfg.out_dir} was trained with"
        raise UserError(f"{dataset.folder}: {trained}; --allow_other_data resumes anyway")


def same_tokens(tokenizer: dict[str, Any], its_own: dict[str, Any]) -> bool:
    """Whether data of one tokenizer are those of a model's: the same but for special names, or GPT-2's both."""
    if tokenizer["kind"] == "gpt2" and its_own["kind"] == "json":  # then the tokenizer.json is GPT-2's too
        return from_description(its_own).vocab_size == GPT2_VOCAB_SIZE
    return {**tokenizer, "config": None} == {**its_own, "config": None}


def changed_data(dataset: Dataset, saved: dict[str, Any]) -> str | None:
    """What differs from the checkpoint: "tokenizer", "data", or None."""
    now = {"tokenizer": dataset.meta["tokenizer"], "data": dataset.fingerprint}
    return next((key for key, value in now.items() if saved.get(key, value) != value), None)


def is_comparable(dataset: Dataset, block_size: int, saved: dict[str, Any]) -> bool:
    """Whether losses can be compared with the checkpoint's: same data, tokenizer and context."""
    return not changed_data(dataset, saved) and saved["model_args"].get("block_size", block_size) == block_size
