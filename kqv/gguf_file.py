"""A model as a GGUF file, which llama.cpp and the programs built on it run."""

import json
from pathlib import Path
from typing import Any

from torch import Tensor

from kqv.errors import UserError
from kqv.hub_tokenizer import as_characters

NO_MERGE = "<|none|> <|none|>"  # llama.cpp wants at least one; words begin as single characters, so this never applies
# config.json's settings -> the writer's methods
NUMBERS = {
    "n_positions": "add_context_length",
    "n_embd": "add_embedding_length",
    "n_layer": "add_block_count",
    "n_head": "add_head_count",
    "layer_norm_epsilon": "add_layer_norm_eps",
    "max_position_embeddings": "add_context_length",
    "hidden_size": "add_embedding_length",
    "num_hidden_layers": "add_block_count",
    "intermediate_size": "add_feed_forward_length",
    "num_attention_heads": "add_head_count",
    "num_key_value_heads": "add_head_count_kv",
    "rms_norm_eps": "add_layer_norm_rms_eps",
    "rope_theta": "add_rope_freq_base",
}


def write_gguf(
    path: Path, config: dict[str, Any], weights: dict[str, Tensor], tokenizer: str, special: dict[str, int | None]
) -> None:
    """Write a file in float32 from what a Hugging Face folder holds: config.json, weights, tokenizer.json, and the ids
    of special tokens. Raises UserError if llama.cpp cannot have this tokenizer.
    """
    import gguf

    kind = config["model_type"]
    writer = gguf.GGUFWriter(path, kind)
    for key, method in NUMBERS.items():
        if key in config:
            getattr(writer, method)(config[key])
    if kind == "gpt2":
        writer.add_feed_forward_length(config["n_inner"] or 4 * config["n_embd"])
    else:
        writer.add_key_length(config["head_dim"])
        writer.add_value_length(config["head_dim"])
        writer.add_rope_dimension_count(config["head_dim"])
        writer.add_vocab_size(config["vocab_size"])
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    add_tokenizer(writer, tokenizer, special)

    n_layer = config["n_layer"] if kind == "gpt2" else config["num_hidden_layers"]
    names = gguf.get_tensor_name_map(getattr(gguf.MODEL_ARCH, kind.upper()), n_layer)
    if "lm_head.weight" not in weights and kind == "gpt2":  # tied
        weights = weights | {"lm_head.weight": weights["transformer.wte.weight"]}
    for name, weight in weights.items():
        if kind == "gpt2" and weight.dim() == 2 and ".h." in name:
            weight = weight.t()  # "Conv1D" keeps matrices as (in, out)
        if kind == "llama" and name.endswith(("q_proj.weight", "k_proj.weight")):
            weight = as_pairs(weight, config["head_dim"])
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight", ".bias")), weight.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def as_pairs(weight: Tensor, head_dim: int) -> Tensor:
    """Rows of queries or keys, (H*D, C), so that rope turns neighbours: llama.cpp pairs 2i with 2i+1, not i + D/2."""
    return weight.unflatten(0, (-1, 2, head_dim // 2)).transpose(1, 2).reshape(weight.shape)


def add_tokenizer(writer: Any, text: str, special: dict[str, int | None]) -> None:
    """The byte-level BPE of a tokenizer.json, with GPT-2's words; characters are one without merges."""
    import gguf

    described = json.loads(text)
    model, decoder = described["model"], described["decoder"]["type"]
    tokens = sorted(model["vocab"], key=model["vocab"].get)
    if decoder == "Fuse":  # characters
        tokens = [as_characters(token.encode()) for token in tokens]
        if any(len(token) > 1 for token in tokens):
            raise UserError("gguf: characters of several bytes cannot be written, --tokenizer=byte has none")
    elif decoder != "ByteLevel":
        raise UserError(f"gguf: a tokenizer with the decoder {decoder} is not written, only byte-level BPE is")
    whole = {token["id"]: token["content"] for token in described["added_tokens"]}
    tokens += [""] * (max([len(tokens) - 1, *whole]) + 1 - len(tokens))
    tokens = [whole.get(index, token) for index, token in enumerate(tokens)]
    kinds = [gguf.TokenType.CONTROL if index in whole else gguf.TokenType.NORMAL for index in range(len(tokens))]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    writer.add_token_merges(merges or [NO_MERGE])
    for name in ("bos", "eos", "pad"):
        if special[f"{name}_token_id"] is not None:
            getattr(writer, f"add_{name}_token_id")(special[f"{name}_token_id"])
    writer.add_add_bos_token(False)
