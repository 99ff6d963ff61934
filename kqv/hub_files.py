"""Where models from Hugging Face lie: a name -> the folder with its files, and reading and writing those.

No file is trusted: weights come from safetensors or a checked pickle, names in an index may not leave the folder, and
no code in a folder is run.
"""

import hashlib
import json
import pickle
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kqv.errors import UserError
from kqv.settings import HUB_NAME

if TYPE_CHECKING:
    from torch import Tensor

# n_layer, n_head, n_embd of the GPT-2s on the hub
GPT2_SIZES = {"gpt2": (12, 12, 768), "gpt2-medium": (24, 16, 1024), "gpt2-large": (36, 20, 1280)}
GPT2_SIZES["gpt2-xl"] = (48, 25, 1600)

TOKENIZER = ["config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"]
WHOLE = [*TOKENIZER, "*.safetensors", "*.safetensors.index.json"]  # what is downloaded of a model
DAMAGE = (pickle.UnpicklingError, RuntimeError, EOFError, LookupError, TypeError, AttributeError)


def find_pretrained(name: str, files: list[str] = WHOLE) -> Path:
    """The folder of a model: a folder, a .gguf file, a GPT-2's name, or OWNER/NAME on the hub.

    From the hub `files` are downloaded, unless they were before. Raises UserError.
    """
    path = Path(name)
    if path.is_dir():
        return path
    if path.suffix == ".gguf" and path.is_file():
        return Path(unpack_gguf(path.resolve()).name)
    return download(name, files)


def download(name: str, patterns: list[str]) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    repository = f"openai-community/{name}" if name in GPT2_SIZES else name
    if not HUB_NAME.fullmatch(repository):
        raise UserError(f"{name}: no such folder")
    try:
        return Path(snapshot_download(repository, allow_patterns=patterns))
    except LocalEntryNotFoundError:
        raise UserError(f"could not download {name}: no connection to Hugging Face, and no copy here") from None
    except (HFValidationError, HfHubHTTPError) as error:  # no such name, or one that needs a token
        line = " ".join(str(error).split())[:160]
        raise UserError(f"could not download {name} from Hugging Face ({type(error).__name__}: {line})") from None


@lru_cache
def unpack_gguf(path: Path) -> tempfile.TemporaryDirectory:
    """A folder with the model and tokenizer of a GGUF file, in float32; it is deleted when Python ends."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = tempfile.TemporaryDirectory(prefix="gguf-")
    try:
        model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    except (ValueError, KeyError, OSError, NotImplementedError) as error:
        line = " ".join(str(error).split())[:160]
        raise UserError(f"{path}: not a GGUF file that transformers reads ({line})") from None
    model.config.__dict__.pop("quantization_config", None)  # else save_pretrained would quantise again
    model.is_quantized, model.hf_quantizer = False, None
    model.save_pretrained(folder.name)
    tokenizer.save_pretrained(folder.name)
    return folder


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises UserError if there is none."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        base = path.parent / "adapter_config.json"
        hint = "it holds an adapter; --init_from takes the model under it" if base.exists() else "no model's folder"
        raise UserError(f"{path}: no such file: {hint}") from None
    except (UnicodeDecodeError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: not JSON ({' '.join(str(error).split())[:100]})") from None
    if not isinstance(found, dict):
        raise UserError(f"{path}: not a JSON object")
    return found


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a folder, those that its index names if it has one. Raises UserError."""
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        return sorted(folder.glob("*.safetensors"))
    names = read_json(index).get("weight_map")
    names = sorted(set(names.values())) if isinstance(names, dict) else [None]
    for name in names:
        if not isinstance(name, str) or Path(name).name != name or not (folder / name).is_file():
            raise UserError(f"{index}: names {name!r}, which is no file in its folder")
    return [folder / name for name in names]


def read_weights(folder: Path) -> "dict[str, Tensor]":
    """A folder's weights by their names there. Raises UserError if they are damaged or would run code."""
    import torch  # not above, because prepare/ reads tokenizers and needs no torch

    found = {}
    if paths := weight_files(folder):
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
        except DAMAGE as error:
            raise UserError(f"{path} is damaged or would run code ({type(error).__name__})") from None
    named = isinstance(found, dict) and all(isinstance(name, str) for name in found)
    if not named or not all(torch.is_tensor(tensor) and tensor.is_floating_point() for tensor in found.values()):
        raise UserError(f"{path} is damaged: not names with a tensor each")
    return found


def fingerprint(folder: Path) -> str:
    """SHA-256 of a folder's weights, as they lie in its files."""
    digest = hashlib.sha256()
    for path in weight_files(folder) or [folder / "pytorch_model.bin"]:
        with path.open("rb") as file:
            while block := file.read(2**24):
                digest.update(block)
    return digest.hexdigest()


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """A temporary folder, which becomes `folder` at the end, if nothing was raised.

    Raises UserError if the folder is there already.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} exists and is not empty: give another folder, or delete this one")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f"{folder.name}-unfinished-", dir=folder.parent) as unfinished:
        whole = Path(unfinished) / "whole"
        whole.mkdir()
        yield whole
        whole.replace(folder)


def write_files(folder: Path, texts: dict[str, str], name: str, weights: "dict[str, Tensor]") -> None:
    """Write text files by their names, and weights as the safetensors file `name`."""
    from safetensors.torch import save_file

    for file, text in texts.items():
        (folder / file).write_text(text, encoding="utf-8")
    save_file(weights, folder / name, metadata={"format": "pt"})
