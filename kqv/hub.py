"""Hugging Face weights -> ours: GPT-2, Llama and Qwen3, by a name on the hub or from a folder in its format.

A family is one table: what its config.json says in GPTConfig's terms, and which of its weights make one of ours.
"""

import json
import pickle
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kqv.build import build_model
from kqv.errors import UserError
from kqv.tokenizer import GPT2_VOCAB_SIZE

# n_layer, n_head, n_embd of the GPT-2s on the hub
GPT2_SIZES = {"gpt2": (12, 12, 768), "gpt2-medium": (24, 16, 1024), "gpt2-large": (36, 20, 1280)}
GPT2_SIZES["gpt2-xl"] = (48, 25, 1600)
ACTIVATIONS = {"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu"}  # theirs: ours


# -- the families ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Family:
    settings: Callable[[dict[str, Any]], dict[str, Any]]  # config.json -> GPTConfig's settings
    # our weight: theirs, whose rows come one after the other; {} is the number of the layer
    weights: dict[str, tuple[str, ...]]
    prefix: str  # of all names but the head's; files without a head leave it out
    transposed: bool = False  # GPT-2's "Conv1D" keeps matrices as (in, out), nn.Linear as (out, in)
    ignored: tuple[str, ...] = ()  # ends of names that are no weights


def gpt2_config(theirs: dict[str, Any]) -> dict[str, Any]:
    refuse(theirs, scale_attn_by_inverse_layer_idx=False, add_cross_attention=False)
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


def llama_config(theirs: dict[str, Any], qk_norm: bool = False) -> dict[str, Any]:
    rope = theirs.get("rope_parameters") or theirs.get("rope_scaling") or {}  # of transformers 5, and before
    kind = rope.get("rope_type", rope.get("type", "default"))
    sliding = theirs.get("sliding_window") if theirs.get("use_sliding_window", True) else None
    # what model.py does not have
    refuse(theirs, attention_bias=False, mlp_bias=False, hidden_act="silu")
    refuse({"rope_type": kind, "sliding_window": sliding}, rope_type="default", sliding_window=None)
    return {
        "block_size": theirs["max_position_embeddings"],
        "vocab_size": theirs["vocab_size"],
        "n_layer": theirs["num_hidden_layers"],
        "n_head": theirs["num_attention_heads"],
        "n_kv_head": theirs.get("num_key_value_heads") or theirs["num_attention_heads"],
        "n_embd": theirs["hidden_size"],
        "head_dim": theirs.get("head_dim"),
        "n_inner": theirs["intermediate_size"],
        "position": "rope",
        "rope_theta": float(rope.get("rope_theta", theirs.get("rope_theta", 10000.0))),
        "norm": "rmsnorm",
        "norm_eps": theirs.get("rms_norm_eps", 1e-6),
        "mlp": "swiglu",
        "qk_norm": qk_norm,
        "bias": False,
        "tie_embeddings": theirs.get("tie_word_embeddings", False),
    }


def qwen3_config(theirs: dict[str, Any]) -> dict[str, Any]:
    return llama_config({"use_sliding_window": False, "head_dim": 128} | theirs, qk_norm=True)


def refuse(theirs: dict[str, Any], **ours: Any) -> None:
    """Raise KeyError if one of these settings is there and is another than ours."""
    for key, value in ours.items():
        if theirs.get(key, value) != value:
            raise KeyError(f"{key}={theirs[key]}: model.py has no such model")


GPT2_NAMES = ("transformer.wte.weight", "transformer.wpe.weight", "transformer.ln_f.weight", "transformer.ln_f.bias")
GPT2_NAMES += ("lm_head.weight",)
GPT2_NAMES += tuple(
    f"transformer.h.{{}}.{part}.{kind}"
    for part in ("ln_1", "attn.c_attn", "attn.c_proj", "ln_2", "mlp.c_fc", "mlp.c_proj")
    for kind in ("weight", "bias")
)
LLAMA_NAMES = {
    "transformer.wte.weight": ("model.embed_tokens.weight",),
    "transformer.h.{}.ln_1.weight": ("model.layers.{}.input_layernorm.weight",),
    "transformer.h.{}.attn.c_attn.weight": tuple(f"model.layers.{{}}.self_attn.{x}_proj.weight" for x in "qkv"),
    "transformer.h.{}.attn.c_proj.weight": ("model.layers.{}.self_attn.o_proj.weight",),
    "transformer.h.{}.ln_2.weight": ("model.layers.{}.post_attention_layernorm.weight",),
    "transformer.h.{}.mlp.c_fc.weight": tuple(f"model.layers.{{}}.mlp.{x}_proj.weight" for x in ("gate", "up")),
    "transformer.h.{}.mlp.c_proj.weight": ("model.layers.{}.mlp.down_proj.weight",),
    "transformer.ln_f.weight": ("model.norm.weight",),
    "lm_head.weight": ("lm_head.weight",),
}
QK_NORMS = {f"transformer.h.{{}}.attn.{x}_norm.weight": (f"model.layers.{{}}.self_attn.{x}_norm.weight",) for x in "qk"}
FAMILIES = {
    "gpt2": Family(
        gpt2_config,
        {name: (name,) for name in GPT2_NAMES},
        prefix="transformer.",
        transposed=True,
        ignored=(".attn.bias", ".attn.masked_bias"),  # masks
    ),
    "llama": Family(llama_config, LLAMA_NAMES, prefix="model.", ignored=(".rotary_emb.inv_freq",)),
    "mistral": Family(llama_config, LLAMA_NAMES, prefix="model."),
    "qwen3": Family(qwen3_config, LLAMA_NAMES | QK_NORMS, prefix="model."),
}


# -- reading -----------------------------------------------------------------------------------------------------------


def load_pretrained(model_class: type, config_class: type, name: str, dropout: float = 0.0) -> Any:
    """A GPT with weights from Hugging Face. `name`: one of GPT2_SIZES, downloaded if needed, or a folder.

    Raises UserError if the folder has no model of FAMILIES, one that model.py cannot compute, or a damaged one.
    """
    folder = Path(name)
    if name in GPT2_SIZES and not folder.is_dir():
        folder = download(f"openai-community/{name}")
    theirs = read_config(folder)
    settings = settings_of(theirs, folder)
    try:
        config = config_class(**settings, dropout=dropout)
    except (TypeError, ValueError) as error:
        raise UserError(f"{folder}: its config.json is not one that model.py can compute ({error})") from None
    weights = rename(read_weights(folder), FAMILIES[theirs["model_type"]], config, folder)
    try:
        return build_model(model_class, config, weights)
    except (RuntimeError, KeyError) as error:
        detail = " ".join(str(error).split())[:200]
        raise UserError(f"{folder}: its weights are not those of its config.json ({detail})") from None


def download(repository: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        return Path(snapshot_download(repository, allow_patterns=["config.json", "model.safetensors"]))
    except LocalEntryNotFoundError:
        name = repository.partition("/")[2]
        raise UserError(f"could not download {name}: no connection to Hugging Face, and no copy here") from None


def pretrained_settings(name: str) -> dict[str, Any]:
    """The GPTConfig settings of a GPT-2 by its name, or of a folder's model. Downloads nothing."""
    if name in GPT2_SIZES and not Path(name).is_dir():
        n_layer, n_head, n_embd = GPT2_SIZES[name]
        sizes = {"n_layer": n_layer, "n_head": n_head, "n_embd": n_embd}
        return sizes | {"block_size": 1024, "vocab_size": GPT2_VOCAB_SIZE, "mlp": "gelu_tanh"}
    return settings_of(read_config(Path(name)), Path(name))


def read_config(folder: Path) -> dict[str, Any]:
    """A folder's config.json. Raises UserError if there is none, or none of a known family."""
    try:
        theirs = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        if theirs["model_type"] not in FAMILIES:
            raise KeyError(f"model_type {theirs['model_type']}")
    except (FileNotFoundError, KeyError, TypeError, UnicodeDecodeError, json.JSONDecodeError) as error:
        known = ", ".join(FAMILIES)
        raise UserError(f"{folder} has no config.json of {known} ({type(error).__name__}: {error})") from None
    return theirs


def settings_of(theirs: dict[str, Any], folder: Path) -> dict[str, Any]:
    try:
        return FAMILIES[theirs["model_type"]].settings(theirs)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{folder}: its config.json is not one that model.py can compute ({error})") from None


def read_weights(folder: Path) -> dict[str, Tensor]:
    """A folder's weights by their names there. Raises UserError if they are damaged or would run code."""
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
    return found


def rename(found: dict[str, Tensor], family: Family, config: Any, folder: Path) -> dict[str, Tensor]:
    """Their weights under our names, in float32. Raises UserError if one is missing, or one is left over."""
    known = (family.prefix, "lm_head.")
    found = {name if name.startswith(known) else family.prefix + name: tensor for name, tensor in found.items()}
    found = {name: tensor for name, tensor in found.items() if not name.endswith(family.ignored)}
    if config.tie_embeddings:
        found.pop("lm_head.weight", None)
    weights = {}
    for ours, theirs in family.weights.items():
        if ours == "lm_head.weight" and config.tie_embeddings:
            continue
        for layer in range(config.n_layer) if "{}" in ours else [0]:
            try:
                parts = [found.pop(name.format(layer)).float() for name in theirs]
            except KeyError as error:
                raise UserError(f"{folder}: its weights are not those of its config.json: no {error}") from None
            if family.transposed and parts[0].dim() == 2 and ".h." in ours:
                parts = [part.t().contiguous() for part in parts]
            weights[ours.format(layer)] = torch.cat(parts) if len(parts) > 1 else parts[0]
    if found:
        extra = ", ".join(sorted(found)[:3])
        raise UserError(f"{folder}: its weights are not those of its config.json: {extra} are left over")
    return weights
