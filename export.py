"""Write a trained model as a Hugging Face folder: transformers, vLLM, lm_eval and other engines load it as it is.

python export.py out-shakespeare-char my-shakespeare
python export.py out-lora my-adapter --adapter
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar

from kqv.cli import parse_command_line
from kqv.errors import UserError, one_line_errors
from kqv.machine import limit_spinning


@dataclass(kw_only=True)
class Export:
    POSITIONAL: ClassVar[str] = "words"
    words: Annotated[tuple[str, ...], "the run's out_dir, or a checkpoint; and the folder to write"] = ()
    adapter: Annotated[bool, "of a run with --lora_rank: only the adapters, as the package peft keeps them"] = False
    gguf: Annotated[bool, "also write FOLDER/model.gguf, for llama.cpp and the programs built on it"] = False
    data_dir: Annotated[str, "folder of data sets; nanoGPT's checkpoints need DATASET/meta.pkl in it"] = "data"

    def __post_init__(self):
        if len(self.words) != 2:
            raise UserError("which model, and where to? python export.py OUT_DIR FOLDER")


# Parsed before torch is imported, so that --help and a misspelt setting are answered at once.
SETTINGS = parse_command_line(Export, __doc__) if __name__ == "__main__" else None
limit_spinning()

from kqv.build import describe_run, from_run, last_val_loss, load_run, restore_model
from kqv.data import padded_vocab_size
from kqv.gguf_file import write_gguf
from kqv.hub import FAMILIES, layer_names, read_config, to_pretrained
from kqv.hub_files import find_pretrained, new_folder, read_json, write_files
from kqv.hub_tokenizer import tokenizer_files
from kqv.lora import peft_adapter
from model import GPT, GPTConfig

EMBEDDINGS = ("transformer.wte.weight", "lm_head.weight")


def without_padding(model: GPT, vocab_size: int) -> tuple[GPTConfig, dict[str, Any]]:
    """A model's config and weights, without the rows with which train.py rounds up the vocabulary."""
    config, weights = model.config, model.state_dict()
    if config.vocab_size == padded_vocab_size(vocab_size):
        config.vocab_size = vocab_size
        weights |= {name: weights[name][:vocab_size] for name in EMBEDDINGS}
    return config, weights


def model_card(folder: str, architecture: str, saved: dict[str, Any], n_parameters: int, commit: str | None) -> str:
    """README.md of the folder: what the model is, how it was trained, and how it is loaded."""
    settings = saved["config"]
    table = "\n".join(f"| {key} | {value} |" for key, value in sorted({**settings, **saved["model_args"]}.items()))
    trained_at = f" Trained at commit {commit}." if commit else ""
    return f"""---
library_name: transformers
pipeline_tag: text-generation
---

# {folder}

A GPT of {n_parameters / 1e6:.2f}M parameters, trained with kqv for {saved["iter_num"]} iterations on the data set
"{settings.get("dataset", "unknown")}". Its validation loss is {last_val_loss(saved):.4f} nats per token.{trained_at}

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model, tokenizer = AutoModelForCausalLM.from_pretrained("{folder}"), AutoTokenizer.from_pretrained("{folder}")
ids = tokenizer("\\n", return_tensors="pt").input_ids
print(tokenizer.decode(model.generate(ids, max_new_tokens=100, do_sample=True)[0]))
```

It is a {architecture} in float32. A prompt and its continuation have at most {saved["model_args"]["block_size"]}
tokens together.

| setting | value |
|---|---|
{table}
"""


def commit_of(out_dir: str) -> str | None:
    """The commit that a run was trained at, if its folder says so."""
    path = Path(out_dir) / "config.json"
    return read_json(path).get("environment", {}).get("commit") if path.is_file() else None


def export_adapter(saved: dict[str, Any], path: Path, folder: Path) -> None:
    """Write a run's adapters as a folder for peft. Raises UserError if it has none."""
    if "lora" not in saved:
        raise UserError(f"{path} has no adapters: it is a whole model, which is exported without --adapter")
    model = restore_model(saved, path, GPT, GPTConfig, dropout=0.0)
    base = find_pretrained(model.lora["base"]["name"])
    family = FAMILIES[read_config(base)["model_type"]]
    adapter = peft_adapter(model, layer_names(family, model.config), family.transposed)
    with new_folder(folder) as new:
        config = json.dumps(adapter["config"], indent=2)
        write_files(new, {"adapter_config.json": config}, "adapter_model.safetensors", adapter["weights"])
    n_parameters = sum(tensor.numel() for tensor in adapter["weights"].values())
    print(f"{folder}: adapters of rank {model.lora['rank']}, {n_parameters:,} parameters, to {base}")


def export_model(saved: dict[str, Any], path: Path, folder: Path, cfg: Export) -> None:
    """Write a run's model, with its adapters added if it has some, its tokenizer and a model card."""
    model, tokenizer = from_run(saved, path, cfg.data_dir, GPT, GPTConfig)
    print(describe_run(saved, path), file=sys.stderr)
    config, weights = without_padding(model, tokenizer.vocab_size)
    theirs, their_weights = to_pretrained(config, weights)
    files, special = tokenizer_files(tokenizer, config.block_size)
    # generation stops at an end of text, if the tokenizer has one, and at the end of the context
    generation = {"max_length": config.block_size, "do_sample": True} | special
    architecture, n_parameters = theirs["architectures"][0], sum(tensor.numel() for tensor in their_weights.values())
    files |= {
        "config.json": json.dumps(theirs | special, indent=2),
        "generation_config.json": json.dumps(generation, indent=2),
        "README.md": model_card(folder.name, architecture, saved, n_parameters, commit_of(cfg.words[0])),
    }
    with new_folder(folder) as new:
        write_files(new, files, "model.safetensors", their_weights)
        if cfg.gguf:
            write_gguf(new / "model.gguf", theirs, their_weights, files["tokenizer.json"], special)
    if cfg.gguf and config.mlp == "gelu":
        print("note: llama.cpp computes GELU by its tanh approximation: logits differ slightly", file=sys.stderr)
    size = f"{n_parameters / 1e6:.2f}M parameters, vocabulary of {config.vocab_size:,}"
    print(f"{folder}: {architecture}, {size}")


def main(cfg: Export, origin: dict[str, str]) -> None:
    saved, path = load_run(cfg.words[0])
    folder = Path(cfg.words[1])
    if cfg.adapter:
        export_adapter(saved, path, folder)
    else:
        export_model(saved, path, folder, cfg)


if __name__ == "__main__":
    with one_line_errors():
        main(*SETTINGS)
