"""OpenWebText (8 million documents, 9 billion tokens), in GPT-2's byte-pair encoding."""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])  # kqv, also if not installed; prepare/code.py is not Python's

from kqv import cli
from kqv.documents import WebText, web_documents
from kqv.suggest import print_next
from kqv.tokenizer import GPT2Tokenizer
from kqv.writer import dataset_folder, write_dataset


def main(cfg: WebText, origin: dict[str, str]) -> None:
    """Make the data set openwebtext: 8 million documents, 9 billion tokens, 18 GB, encoded while it is downloaded."""
    tokenizer = GPT2Tokenizer()  # before the download, because it can fail
    # The original, Skylion007/openwebtext, is a script, which `datasets` no longer runs since version 4, and the hub's
    # conversion of it to parquet stops after a few gigabytes. This is a complete copy in parquet.
    documents, source = web_documents(cfg.input, cfg.limit, "dylanebert/openwebtext")
    folder = dataset_folder("openwebtext", cfg.data_dir, origin)
    meta = write_dataset(folder, documents, tokenizer, f"{source}, by prepare/openwebtext.py", cfg.val_fraction)
    print_next(folder, meta, origin)


if __name__ == "__main__":
    cli.run(main, WebText)
