"""Hugging Face weights -> ours: GPT-2, by its name on the hub, or from a folder in Hugging Face's format."""

import json
import pickle
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kqv.build import build_model
from kqv.errors import UserError
from kqv.tokenizer import GPT2_VOCAB_SIZE

# n_layer, n_head, n_embd of the models on the hub
GPT2_SIZES = {"gpt2": (12, 12, 768), "gpt2-medium": (24, 16, 1024), "gpt2-large": (36, 20, 1280)}
GPT2_SIZES["gpt2-xl"] = (48, 25, 1600)
ACTIVATIONS = {"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu"}  # theirs: ours
# GPT-2's "Conv1D" keeps matrices as (in, out), nn.Linear as (out, in)
TRANSPOSED = ("c_attn.weight", "c_proj.weight", "c_fc.weight")


def load_gpt2(model_class: type, config_class: type, name: str, dropout: float = 0.0) -> Any:
    """A GPT with GPT-2's weights. `name` is one of GPT2_SIZES, downloaded if needed, or a folder.

    Raises UserError if the folder has no GPT-2, or a damaged one.
    """
    folder = Path(name)
    if name in GPT2_SIZES and not folder.is_dir():
        folder = download(f"openai-community/{name}")
    try:
        config = config_class(**read_gpt2_config(folder), dropout=dropout)
    except (TypeError, ValueError) as error:
        raise UserError(f"{folder} has no config.json of a GPT-2 ({error})") from None
    try:
        return build_model(model_class, config, read_gpt2_weights(folder))
    except (RuntimeError, KeyError) as error:
        raise UserError(f"{folder}: its weights are not those of its config.json ({error})") from None


def download(repository: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        return Path(snapshot_download(repository, allow_patterns=["config.json", "model.safetensors"]))
    except LocalEntryNotFoundError:
        name = repository.partition("/")[2]
        raise UserError(f"could not download {name}: no connection to Hugging Face, and no copy here") from None


def gpt2_settings(name: str) -> dict[str, Any]:
    """The GPTConfig settings of a GPT-2, by its name or from a folder. Downloads nothing."""
    if name in GPT2_SIZES and not Path(name).is_dir():
        n_layer, n_head, n_embd = GPT2_SIZES[name]
        sizes = {"n_layer": n_layer, "n_head": n_head, "n_embd": n_embd}
        return sizes | {"block_size": 1024, "vocab_size": GPT2_VOCAB_SIZE, "mlp": "gelu_tanh"}
    return read_gpt2_config(Path(name))


def read_gpt2_config(folder: Path) -> dict[str, Any]:
    """The GPTConfig settings in a folder's config.json. Raises UserError if it does not describe a GPT-2."""
    try:
        theirs = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        if theirs["model_type"] != "gpt2" or theirs.get("scale_attn_by_inverse_layer_idx"):
            raise KeyError(f"model_type {theirs['model_type']}")
        return {
            "block_size": theirs["n_positions"],
            "vocab_size": theirs["vocab_size"],
            "n_layer": theirs["n_layer"],
            "n_head": theirs["n_head"],
            "n_embd": theirs["n_embd"],
            "n_inner": theirs.get("n_inner"),
            "mlp": ACTIVATIONS[theirs["activation_function"]],
            "norm_eps": theirs["layer_norm_epsilon"],
            "tie_embeddings": theirs.get("tie_word_embeddings", True),
        }
    except (FileNotFoundError, KeyError, TypeError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UserError(f"{folder} has no config.json of a GPT-2 ({type(error).__name__}: {error})") from None


def read_gpt2_weights(folder: Path) -> dict[str, Tensor]:
    """A folder's weights under our names, in float32. Raises UserError if they are damaged or would run code."""
    found = {}
    if paths := sorted(folder.glob("*.safetensors")):
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            for path in paths:
                found |= load_file(path)
        except SafetensorError as error:
            raise UserError(f"{path} is damaged: {error}") from None
    else:
        path = folder / "pytorch_model.bin"
        try:
            with warnings.catch_warnings():  # about pickle protocols that torch does not write
                warnings.simplefilter("ignore")
                found = torch.load(path, map_location="cpu", weights_only=True)
        except (pickle.UnpicklingError, RuntimeError, EOFError, LookupError, TypeError, AttributeError) as error:
            raise UserError(f"{path} is damaged or would run code ({type(error).__name__})") from None
    named = isinstance(found, dict) and all(isinstance(name, str) for name in found)
    if not named or not all(torch.is_tensor(tensor) and tensor.is_floating_point() for tensor in found.values()):
        raise UserError(f"{path} is damaged: not names with a tensor each")
    weights = {}
    for name, tensor in found.items():
        if not name.endswith((".attn.bias", ".attn.masked_bias")):  # masks, not weights
            ours = name if name.startswith(("transformer.", "lm_head.")) else f"transformer.{name}"
            weights[ours] = (tensor.t().contiguous() if name.endswith(TRANSPOSED) else tensor).float()
    return weights
