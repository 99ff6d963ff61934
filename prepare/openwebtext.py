"""OpenWebText (8 million documents, 9 billion tokens) in GPT-2's byte-pair encoding."""

import itertools
from dataclasses import dataclass
from typing import Annotated

from text import find_files, read_documents
from writer import dataset_folder, say_next, write_dataset

import config
from tokenizer import GPT2Tokenizer


@dataclass(kw_only=True)
class Web:
    limit: Annotated[int | None, "take only the first N documents; None: all"] = None
    input: Annotated[tuple[str, ...], "take .parquet or .jsonl files, or a folder of them, instead of the hub's"] = ()
    val_fraction: Annotated[float, "share of the documents that is kept for validation"] = 0.0005
    data_dir: Annotated[str, "folder of data sets"] = "data"

    def __post_init__(self):
        config.at_least(self, 1, "limit")


def prepare(name: str, cfg: Web, origin: dict[str, str], repository: str, subset: str | None = None) -> None:
    """Make the data set `name` from a repository on the Hugging Face hub, as it comes in: nothing else is stored."""
    tokenizer = GPT2Tokenizer()
    if cfg.input:
        source, documents = ", ".join(cfg.input), read_documents(find_files(cfg.input), "text")
    else:
        from datasets import load_dataset

        source = f"huggingface.co/datasets/{repository}" + (f", {subset}" if subset else "")
        documents = ([row["text"]] for row in load_dataset(repository, subset, split="train", streaming=True))
    if cfg.limit is not None:
        source, documents = f"the first {cfg.limit} of {source}", itertools.islice(documents, cfg.limit)
    folder = dataset_folder(name, cfg.data_dir, origin)
    write_dataset(folder, documents, tokenizer, f"{source}, by prepare/{name}.py", cfg.val_fraction)
    say_next("", folder, origin)


def main(cfg: Web, origin: dict[str, str]) -> None:
    """Make the data set openwebtext: 8 million documents, 9 billion tokens, 18 GB, downloaded as it goes."""
    # OpenWebText itself, Skylion007/openwebtext, is a script, which `datasets` has not run since version 4, and the
    # parquet files that the hub makes of such stop after some gigabytes. This is a copy of all of it, in parquet.
    prepare("openwebtext", cfg, origin, "dylanebert/openwebtext")


if __name__ == "__main__":
    config.run(main, Web)
