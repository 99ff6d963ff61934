"""Make a data set from prompts with responses, or conversations: only the responses are learned."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

sys.path[0] = str(Path(__file__).resolve().parents[1])  # kqv, also if not installed; prepare/code.py is not Python's

import numpy as np

from kqv import cli
from kqv.chat import encode_rows
from kqv.documents import find_files
from kqv.errors import UserError
from kqv.hub_tokenizer import find_tokenizer
from kqv.meta import MASKED
from kqv.suggest import print_next
from kqv.writer import dataset_folder, name_of, write_encoded


@dataclass(kw_only=True)
class Chat:
    input: Annotated[tuple[str, ...], ".jsonl file, or a folder of them; can be given more than once"] = ()
    name: Annotated[str | None, "name of the data set; None: that of the input"] = None
    tokenizer: Annotated[
        str, "byte | gpt2 (a download) | a tokenizer.json or the folder of one | OWNER/NAME on the Hugging Face hub"
    ] = "gpt2"
    val_fraction: Annotated[float, "share of the rows for validation"] = 0.1
    data_dir: Annotated[str, "folder of data sets"] = "data"


def main(cfg: Chat, origin: dict[str, str]) -> None:
    """Make a data set from JSON lines: {"prompt": ..., "response": ...}, or {"messages": [{"role", "content"}, ...]}.

    Only the responses are learned. A tokenizer with a chat template writes both forms with it.

    python prepare/chat.py --input=answers.jsonl --tokenizer=HuggingFaceTB/SmolLM2-135M-Instruct
    """
    if not cfg.input or "" in cfg.input:
        raise UserError("which rows? --input=FILE.jsonl")
    if not 0 < cfg.val_fraction < 1:
        raise UserError(f"val_fraction={cfg.val_fraction}: must be above 0 and below 1")
    name = cfg.name or name_of(cfg.input[0])
    files, tokenizer = find_files(cfg.input), find_tokenizer(cfg.tokenizer)
    dtype = np.dtype("<u2" if tokenizer.vocab_size <= 2**15 else "<u4")  # the highest bit is the mask's
    folder = dataset_folder(name, cfg.data_dir, origin)
    encoded = encode_rows(files, tokenizer, dtype, cfg.val_fraction)
    source = f"{', '.join(cfg.input)}, by prepare/chat.py; {cfg.val_fraction:g} of the rows are val, chosen by a hash"
    meta = write_encoded(folder, encoded, tokenizer, dtype, source, **{MASKED: True})
    print_next(folder, meta, origin, finetune=(cfg.tokenizer, "finetune_chat"))


if __name__ == "__main__":
    cli.run(main, Chat)
