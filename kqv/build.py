"""Settings, a checkpoint or weights -> the model. Callers pass the classes GPT and GPTConfig of model.py."""

from dataclasses import fields
from pathlib import Path
from typing import Any, get_type_hints

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from kqv.checkpoint import DAMAGE, load
from kqv.data import find_dataset, padded_vocab_size
from kqv.errors import UserError
from kqv.hub_files import find_pretrained, fingerprint
from kqv.hub_tokenizer import pretrained_description
from kqv.lora import TARGETS, add_lora, freeze, is_adapted, merged_weights, weights_to_save
from kqv.meta import read_meta
from kqv.rundir import BEST, LAST
from kqv.settings import TrainConfig
from kqv.tokenizer import GPT2_VOCAB_SIZE, Tokenizer, from_description


def model_config(config_class: type, cfg: Any, vocab_size: int) -> Any:
    """The GPTConfig of these settings. Raises UserError if they contradict each other."""
    switches = {field.name: getattr(cfg, field.name) for field in fields(config_class) if hasattr(cfg, field.name)}
    try:
        return config_class(**switches | {"vocab_size": vocab_size, "attention": own_attention(cfg.attention)})
    except ValueError as error:
        raise UserError(str(error)) from None


def own_attention(wanted: str) -> str:
    """The attention of model.py for a setting that may name another: kqv/attention.py puts that in afterwards."""
    return "explicit" if wanted == "explicit" else "sdpa"


def make_model(
    model_class: type, config_class: type, cfg: TrainConfig, vocab_size: int, saved: dict[str, Any] | None
) -> Any:
    """The model to train, on the CPU: the checkpoint's, a new one, or one from Hugging Face; frozen, adapted as asked.

    Its context is cut to block_size. Raises UserError.
    """
    if saved:
        source, path = f"the checkpoint in {cfg.out_dir}", Path(cfg.out_dir) / LAST
        free = {"dropout": cfg.dropout, "attention": own_attention(cfg.attention)}
        model = restore_model(saved, path, model_class, config_class, **free)
    elif cfg.init_from in ("scratch", "auto"):
        source = "the data"
        # the ids that padding adds are never targets and never sampled
        model = model_class(model_config(config_class, cfg, padded_vocab_size(vocab_size)))
    else:
        source = cfg.init_from
        model = model_class.from_pretrained(cfg.init_from, dropout=cfg.dropout)
        if cfg.lora_rank:
            add_lora(model, base_of(cfg.init_from), cfg.lora_rank, cfg.lora_alpha, cfg.lora_targets or TARGETS)
    if cfg.block_size > model.config.block_size:
        raise UserError(f"block_size={cfg.block_size}: {source} has at most {model.config.block_size}")
    if vocab_size > model.config.vocab_size:
        most = model.config.vocab_size
        raise UserError(f"{cfg.dataset}: its vocabulary has {vocab_size} ids, the model of {source} at most {most}")
    crop_block_size(model, cfg.block_size)
    freeze(model, cfg.freeze)
    return model


def describe_size(model: Any) -> str:
    """How many weights a model has, and how many of them are trained if not all are."""
    size = f"{model.num_params() / 1e6:.2f}M parameters (without position embeddings)"
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    frozen = any(not p.requires_grad for name, p in model.named_parameters() if "wpe" not in name)
    return f"{size}, {trained / 1e6:.2f}M of them trained," if frozen else size


def base_of(init_from: str) -> dict[str, str]:
    """Where the model under an adapter is, and what its weights are."""
    folder = find_pretrained(init_from)
    name = str(folder.resolve()) if Path(init_from).is_dir() else init_from
    return {"name": name, "sha256": fingerprint(folder)}


def adapted_model(saved: dict[str, Any], path: Path, model_class: type, dropout: float) -> Any:
    """The model of a checkpoint that holds adapters: the one under them, read where it was, and the adapters."""
    match saved["lora"]:
        case {"base": {"name": str(name), "sha256": str(sha256)}, "rank": int(rank), "alpha": float(alpha)}:
            pass
        case other:
            raise ValueError(f"lora={other!r}")
    try:
        folder = find_pretrained(name)
        model = model_class.from_pretrained(name, dropout=dropout)
    except UserError as error:
        raise UserError(f"{path} holds adapters, and the model under them cannot be had: {error}") from None
    if fingerprint(folder) != sha256:
        raise UserError(f"{path} holds adapters to other weights than those that are now in {name}")
    crop_block_size(model, saved["model_args"]["block_size"])
    add_lora(model, saved["lora"]["base"], rank, alpha, saved["lora"]["targets"])
    wanted = weights_to_save(model)["model"]
    if {key: t.shape for key, t in wanted.items()} != {key: t.shape for key, t in saved["model"].items()}:
        raise ValueError("its adapters are not those of its settings")
    model.load_state_dict(saved["model"], strict=False)
    return model


def load_trained(
    init_from: str, out_dir: str, data_dir: str, model_class: type, config_class: type
) -> tuple[Any, Tokenizer, str]:
    """A trained model on the CPU, in evaluation mode, its tokenizer, and a line that describes it.

    init_from "resume" loads best.pt, or else ckpt.pt, of out_dir, or the file that out_dir names; for any other value
    see find_pretrained. nanoGPT's checkpoints find their tokenizer in DATA_DIR/DATASET/meta.pkl.

    Raises UserError.
    """
    if init_from != "resume":
        model = model_class.from_pretrained(init_from).eval()
        if not all(parameter.isfinite().all() for parameter in model.parameters()):  # checkpoint.load checks this too
            raise UserError(f"the weights of {init_from} are not all finite")
        try:
            tokenizer = from_description(pretrained_description(init_from))
        except UserError as error:
            raise UserError(f"{init_from}: {error}") from None
        return model, tokenizer, f"{init_from}: weights from Hugging Face"
    saved, path = load_run(out_dir)
    model, tokenizer = from_run(saved, path, data_dir, model_class, config_class)
    return model, tokenizer, describe_run(saved, path)


def load_run(out_dir: str) -> tuple[dict[str, Any], Path]:
    """The checkpoint best.pt, or else ckpt.pt, of a folder, or the file that out_dir names; and its path."""
    path = Path(out_dir)
    if not path.is_file():
        path = path / (BEST if (path / BEST).is_file() else LAST)
    return load(path, mmap=True), path  # the optimizer's part stays on the disk


def last_val_loss(saved: dict[str, Any]) -> float:
    return saved.get("val_loss", saved["best_val_loss"])


def describe_run(saved: dict[str, Any], path: Path) -> str:
    return f"{path}: iteration {saved['iter_num']}, val loss {last_val_loss(saved):.4f}"


def from_run(
    saved: dict[str, Any], path: Path, data_dir: str, model_class: type, config_class: type
) -> tuple[Any, Tokenizer]:
    """The model of a checkpoint, plain if it has adapters, in evaluation mode, and its tokenizer. Raises UserError."""
    model = restore_model(saved, path, model_class, config_class, dropout=0.0).eval()
    if is_adapted(model):
        model = build_model(model_class, model.config, merged_weights(model)).eval()
    try:
        tokenizer = from_description(saved.get("tokenizer") or describe_tokenizer(saved, data_dir))
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    if tokenizer.vocab_size > model.config.vocab_size:
        sizes = f"its tokenizer has {tokenizer.vocab_size} ids, its model only {model.config.vocab_size}"
        raise UserError(f"{path}: {sizes}")
    return model, tokenizer


def describe_tokenizer(saved: dict[str, Any], data_dir: str) -> dict[str, Any]:
    """The tokenizer's description for a checkpoint of nanoGPT's, which names a data set instead."""
    if saved["model_args"].get("vocab_size", 0) >= GPT2_VOCAB_SIZE:
        return {"kind": "gpt2"}
    dataset = saved["config"].get("dataset")
    if not isinstance(dataset, str) or not dataset:
        raise UserError("it has neither a tokenizer nor the name of its data set")
    return read_meta(find_dataset(data_dir, dataset))["tokenizer"]


def crop_block_size(model: Any, block_size: int) -> None:
    """Shorten a model's context, in place: forget the positions from block_size on."""
    assert block_size <= model.config.block_size
    model.config.block_size = block_size
    if "wpe" in model.transformer:
        wpe = model.transformer.wpe
        wpe.weight.data, wpe.num_embeddings = wpe.weight.data[:block_size].clone(), block_size


def restore_model(saved: dict[str, Any], path: Path, model_class: type, config_class: type, **overrides: Any) -> Any:
    """The checkpoint's model, on the CPU, with `overrides` of its config that leave the weights alone (dropout)."""
    try:
        args, kinds = saved["model_args"], get_type_hints(config_class)
        if "lora" in saved:
            return adapted_model(saved, path, model_class, overrides["dropout"])
        for key, value in args.items():
            if not isinstance(value, kinds[key] | int) or value != value:  # an int is a float too, but nan is none
                raise TypeError(f"{key}={value!r}")
        weights = {name: tensor.float() for name, tensor in saved["model"].items()}  # if saved as 16 bits
        if args.get("n_layer", 0) > len(weights):  # else 10**9 layers would be made before the error
            raise ValueError(f"n_layer={args['n_layer']} and {len(weights)} weights")
        return build_model(model_class, config_class(**args | overrides), weights)
    except DAMAGE as error:
        detail = " ".join(str(error).split())[:200]
        raise UserError(f"{path} is damaged: its weights are not those of its model_args ({detail})") from None


def build_model(model_class: type, config: Any, weights: dict[str, Tensor]) -> Any:
    """A model with these weights (name -> tensor), which are neither initialised nor copied."""
    model = empty_model(model_class, config)
    if config.tie_embeddings:
        weights = weights | {"lm_head.weight": weights["transformer.wte.weight"]}
    model.load_state_dict(weights, assign=True)
    if config.tie_embeddings:
        model.lm_head.weight = model.transformer.wte.weight
    return model


def empty_model(model_class: type, config: Any) -> Any:
    """A model whose weights have shapes but no memory, on the meta device."""
    with torch.device("meta"), SkipInit():
        return model_class(config)


class SkipInit(TorchFunctionMode):
    """Skip torch.nn.init: "meta" weights hold no numbers, and initialising them would import torch._dynamo."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if getattr(function, "__module__", None) == "torch.nn.init":
            return kwargs["tensor"] if kwargs and "tensor" in kwargs else args[0]
        return function(*args, **kwargs or {})
