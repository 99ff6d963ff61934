"""Hugging Face weights <-> ours: GPT-2, Llama, Mistral and Qwen3, from a folder or a hub, and into a folder.

A family is one table, read in both directions: how its config.json names our settings, what is the same in all its
models, and which of its weights make one of ours.
"""

from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kqv.build import build_model
from kqv.errors import UserError
from kqv.hub_files import GPT2_SIZES, find_pretrained, read_json, read_weights
from kqv.tokenizer import GPT2_VOCAB_SIZE

FREE = ("dropout", "attention", "rope_theta")  # need not be equal: a family without rope says nothing about its base
ACTIVATIONS = {"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu"}  # theirs: ours


# -- the families ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Family:
    architecture: str  # the class in transformers
    settings: dict[str, str]  # ours: theirs, in config.json
    ours: dict[str, Any]  # our settings that all models of the family have
    theirs: dict[str, Any]  # settings in config.json that model.py computes; it has no other
    absent: dict[str, Any]  # the value of a setting that config.json leaves out
    # our weight: theirs, whose rows come one after the other; {} is the number of the layer
    weights: dict[str, tuple[str, ...]]
    prefix: str  # of all names but the head's; files without a head leave it out
    transposed: bool = False  # GPT-2's "Conv1D" keeps matrices as (in, out), nn.Linear as (out, in)
    ignored: tuple[str, ...] = ()  # ends of names that are no weights


GPT2_PARTS = [f"h.{{}}.{part}" for part in ("ln_1", "attn.c_attn", "attn.c_proj", "ln_2", "mlp.c_fc", "mlp.c_proj")]
GPT2_NAMES = [f"transformer.{part}.{kind}" for part in ("ln_f", *GPT2_PARTS) for kind in ("weight", "bias")]
GPT2_NAMES += ["transformer.wte.weight", "transformer.wpe.weight", "lm_head.weight"]
GPT2 = Family(
    architecture="GPT2LMHeadModel",
    settings={key: key for key in ("vocab_size", "n_layer", "n_head", "n_embd", "n_inner")}
    | {"block_size": "n_positions", "mlp": "activation_function", "norm_eps": "layer_norm_epsilon"}
    | {"tie_embeddings": "tie_word_embeddings"},
    ours={"bias": True, "position": "learned"},
    theirs={"scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False, "add_cross_attention": False},
    absent={"tie_word_embeddings": True, "n_inner": None},
    weights={name: (name,) for name in GPT2_NAMES},
    prefix="transformer.",
    transposed=True,
    ignored=(".attn.bias", ".attn.masked_bias"),  # masks
)
LLAMA = Family(
    architecture="LlamaForCausalLM",
    settings={"block_size": "max_position_embeddings", "vocab_size": "vocab_size", "n_layer": "num_hidden_layers"}
    | {"n_head": "num_attention_heads", "n_kv_head": "num_key_value_heads", "head_dim": "head_dim"}
    | {"n_embd": "hidden_size", "n_inner": "intermediate_size", "rope_theta": "rope_theta"}
    | {"norm_eps": "rms_norm_eps", "tie_embeddings": "tie_word_embeddings"},
    ours={"bias": False, "position": "rope", "norm": "rmsnorm", "mlp": "swiglu"},
    theirs={"attention_bias": False, "mlp_bias": False, "hidden_act": "silu"}
    | {"rope_type": "default", "sliding_window": None},
    absent={"num_key_value_heads": None, "head_dim": None, "rope_theta": 10000.0, "rms_norm_eps": 1e-6}
    | {"tie_word_embeddings": False},
    weights={
        "transformer.wte.weight": ("model.embed_tokens.weight",),
        "transformer.h.{}.ln_1.weight": ("model.layers.{}.input_layernorm.weight",),
        "transformer.h.{}.attn.c_attn.weight": tuple(f"model.layers.{{}}.self_attn.{x}_proj.weight" for x in "qkv"),
        "transformer.h.{}.attn.c_proj.weight": ("model.layers.{}.self_attn.o_proj.weight",),
        "transformer.h.{}.ln_2.weight": ("model.layers.{}.post_attention_layernorm.weight",),
        "transformer.h.{}.mlp.c_fc.weight": tuple(f"model.layers.{{}}.mlp.{x}_proj.weight" for x in ("gate", "up")),
        "transformer.h.{}.mlp.c_proj.weight": ("model.layers.{}.mlp.down_proj.weight",),
        "transformer.ln_f.weight": ("model.norm.weight",),
        "lm_head.weight": ("lm_head.weight",),
    },
    prefix="model.",
    ignored=(".rotary_emb.inv_freq",),
)
QK_NORMS = {f"transformer.h.{{}}.attn.{x}_norm.weight": (f"model.layers.{{}}.self_attn.{x}_norm.weight",) for x in "qk"}
FAMILIES = {
    "gpt2": GPT2,
    "llama": LLAMA,
    "mistral": replace(LLAMA, architecture="MistralForCausalLM"),
    "qwen3": replace(
        LLAMA,
        architecture="Qwen3ForCausalLM",
        ours=LLAMA.ours | {"qk_norm": True},
        absent=LLAMA.absent | {"head_dim": 128},
        weights=LLAMA.weights | QK_NORMS,
    ),
}


# -- theirs to ours ----------------------------------------------------------------------------------------------------


def load_pretrained(model_class: type, config_class: type, name: str, dropout: float = 0.0) -> Any:
    """A GPT with weights from Hugging Face; for `name` see find_pretrained. Raises UserError."""
    folder = find_pretrained(name)
    theirs = read_config(folder)
    try:
        config = config_class(**our_settings(theirs, folder), dropout=dropout)
    except (TypeError, ValueError) as error:
        raise UserError(f"{folder}: its config.json is not one that model.py can compute ({error})") from None
    weights = our_weights(read_weights(folder), FAMILIES[theirs["model_type"]], config, folder)
    try:
        return build_model(model_class, config, weights)
    except (RuntimeError, KeyError) as error:
        detail = " ".join(str(error).split())[:200]
        raise UserError(f"{folder}: its weights are not those of its config.json ({detail})") from None


def pretrained_settings(name: str) -> dict[str, Any]:
    """The GPTConfig settings of a model by its name; downloads config.json at most."""
    if name in GPT2_SIZES and not Path(name).is_dir():
        n_layer, n_head, n_embd = GPT2_SIZES[name]
        sizes = {"n_layer": n_layer, "n_head": n_head, "n_embd": n_embd}
        return sizes | {"block_size": 1024, "vocab_size": GPT2_VOCAB_SIZE, "mlp": "gelu_tanh"}
    folder = find_pretrained(name, ["config.json"])
    return our_settings(read_config(folder), folder)


def read_config(folder: Path) -> dict[str, Any]:
    """A folder's config.json. Raises UserError if there is none, or none of a known family."""
    theirs = read_json(folder / "config.json")
    if theirs.get("model_type") not in FAMILIES:
        known, found = " | ".join(FAMILIES), theirs.get("model_type")
        raise UserError(f"{folder / 'config.json'}: model_type={found!r}: expected {known}")
    return theirs


def our_settings(theirs: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The settings of a config.json in GPTConfig's terms. Raises UserError, by name, for what model.py cannot do."""
    family, where = FAMILIES[theirs["model_type"]], folder / "config.json"
    rope = theirs.get("rope_parameters") or theirs.get("rope_scaling") or {}  # of transformers 5, and before
    rope = rope if isinstance(rope, dict) else {"rope_type": rope}
    theirs = theirs | {"rope_type": rope.get("type", "default")} | rope
    if not theirs.get("use_sliding_window", True):
        theirs["sliding_window"] = None
    for key, value in family.theirs.items():
        if theirs.get(key, value) != value:
            raise UserError(f"{where}: {key}={theirs[key]}: model.py has no such model, only {key}={value}")
    theirs = family.absent | theirs
    if missing := [name for name in family.settings.values() if name not in theirs]:
        raise UserError(f"{where}: it has no {missing[0]}")
    ours = family.ours | {key: theirs[name] for key, name in family.settings.items()}
    if "mlp" in family.settings:
        if ours["mlp"] not in tuple(ACTIVATIONS):
            known = " | ".join(ACTIVATIONS)
            raise UserError(f"{where}: {family.settings['mlp']}={ours['mlp']!r}: model.py has only {known}")
        ours["mlp"] = ACTIVATIONS[ours["mlp"]]
    return ours


def our_weights(found: dict[str, Tensor], family: Family, config: Any, folder: Path) -> dict[str, Tensor]:
    """Their weights under our names, in float32. Raises UserError if one is missing, or one is left over."""
    known = (family.prefix, "lm_head.")
    found = {name if name.startswith(known) else family.prefix + name: tensor for name, tensor in found.items()}
    found = {name: tensor for name, tensor in found.items() if not name.endswith(family.ignored)}
    if config.tie_embeddings:
        found.pop("lm_head.weight", None)
    weights = {}
    for ours, theirs in layer_names(family, config):
        try:
            parts = [found.pop(name).float() for name in theirs]
        except KeyError as error:
            raise UserError(f"{folder}: its weights are not those of its config.json: no {error}") from None
        if family.transposed and parts[0].dim() == 2 and ".h." in ours:
            parts = [part.t().contiguous() for part in parts]
        weights[ours] = torch.cat(parts) if len(parts) > 1 else parts[0]
    if found:
        extra = ", ".join(sorted(found)[:3])
        raise UserError(f"{folder}: its weights are not those of its config.json: {extra} are left over")
    return weights


def layer_names(family: Family, config: Any) -> list[tuple[str, tuple[str, ...]]]:
    """Our name and theirs of each weight of a model."""
    return [
        (ours.format(layer), tuple(name.format(layer) for name in theirs))
        for ours, theirs in family.weights.items()
        if not (ours == "lm_head.weight" and config.tie_embeddings)
        for layer in (range(config.n_layer) if "{}" in ours else [0])
    ]


# -- ours to theirs ----------------------------------------------------------------------------------------------------


def to_pretrained(config: Any, weights: dict[str, Tensor]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """A GPTConfig and our weights -> config.json and their weights. Raises UserError if no family has its switches."""
    if config.norm == "layernorm":  # then GPT-2, whose biases and positions are always there, may be the family
        config, weights = write_out_zeros(config, weights)
    kind = min(FAMILIES, key=lambda kind: len(cannot_say(config, FAMILIES[kind])))
    family = FAMILIES[kind]
    if wrong := cannot_say(config, family):
        switches = ", ".join(f"{key}={getattr(config, key)}" for key in wrong)
        raise UserError(f"{switches}: no family of {' | '.join(FAMILIES)} has such a model; {kind} is the closest")
    theirs = {"model_type": kind, "architectures": [family.architecture], "dtype": "float32"}
    names = {ours: theirs for theirs, ours in reversed(ACTIVATIONS.items())}
    for key, name in family.settings.items():
        theirs[name] = names[config.mlp] if key == "mlp" else getattr(config, key)
    theirs |= family.theirs
    if theirs.pop("rope_type", None):  # transformers 5 reads this, and version 4 rope_theta
        theirs["rope_parameters"] = {"rope_theta": config.rope_theta, "rope_type": "default"}
    if "n_positions" in theirs:
        theirs["n_ctx"] = config.block_size  # llama.cpp's converter reads it
    return theirs, their_weights(config, weights, family)


def write_out_zeros(config: Any, weights: dict[str, Tensor]) -> tuple[Any, dict[str, Tensor]]:
    """The same model with biases of zero, and with its positions, or none, as a table like a learned one."""
    with_bias = [name for name in weights if not config.bias and (".ln_" in name or ".c_" in name)]
    zeros = {name.removesuffix("weight") + "bias": torch.zeros(len(weights[name])) for name in with_bias}
    weights = weights | zeros
    if config.position == "none":
        weights["transformer.wpe.weight"] = torch.zeros(config.block_size, config.n_embd)
    position = "rope" if config.position == "rope" else "learned"
    return replace(config, bias=True, position=position), weights


def cannot_say(config: Any, family: Family) -> list[str]:
    """Our settings that are otherwise in this model than in any of the family's."""
    same = type(config)(**{key: getattr(config, key) for key in family.settings} | family.ours)
    wrong = [field.name for field in fields(config) if getattr(config, field.name) != getattr(same, field.name)]
    if "mlp" in family.settings and config.mlp not in ACTIVATIONS.values():
        wrong.append("mlp")
    return [key for key in wrong if key not in FREE]


def their_weights(config: Any, weights: dict[str, Tensor], family: Family) -> dict[str, Tensor]:
    """Our weights under their names, each with its own memory."""
    queries, keys = config.n_head * config.head_dim, config.n_kv_head * config.head_dim
    rows = {1: None, 2: [config.n_inner] * 2, 3: [queries, keys, keys]}  # of gate and up; of queries, keys and values
    found = {}
    for ours, theirs in layer_names(family, config):
        weight = weights[ours].float()
        if family.transposed and weight.dim() == 2 and ".h." in ours:
            weight = weight.t()
        parts = weight.split(rows[len(theirs)]) if len(theirs) > 1 else [weight]
        found |= {name: part.contiguous().clone() for name, part in zip(theirs, parts, strict=True)}
    return found
