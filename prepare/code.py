"""Make a data set from code: repositories without what is generated, vendored, binary or there twice."""

import hashlib
import random
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # kqv, also from a clone that is not installed

import numpy as np

from kqv import cli
from kqv.errors import UserError
from kqv.hub_tokenizer import find_tokenizer
from kqv.repositories import Source, choose_splits, find_repositories, read_sources, without_duplicates
from kqv.suggest import print_next
from kqv.tokenizer import JsonTokenizer, Tokenizer
from kqv.writer import Encoded, dataset_folder, write_encoded

FIM = ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>")


@dataclass(kw_only=True)
class Code:
    POSITIONAL: ClassVar[str] = "folders"
    folders: Annotated[tuple[str, ...], "repositories, or folders of repositories"] = ()
    name: Annotated[str, "name of the data set"] = "code"
    tokenizer: Annotated[
        str, "byte | gpt2 (a download) | a tokenizer.json or the folder of one | OWNER/NAME on the Hugging Face hub"
    ] = "gpt2"
    extensions: Annotated[tuple[str, ...], "only files that end so, py for instance; can be given more than once"] = ()
    val_fraction: Annotated[float, "share of the text for validation"] = 0.1
    fim_rate: Annotated[float, "share of the files in which the end comes before the middle: fill in the middle"] = 0.0
    data_dir: Annotated[str, "folder of data sets"] = "data"

    def __post_init__(self):
        if not self.folders:
            raise UserError("which code? python prepare/code.py FOLDER [FOLDER ...]")
        if not 0 < self.val_fraction < 1:
            raise UserError(f"val_fraction={self.val_fraction}: must be above 0 and below 1")
        if not 0 <= self.fim_rate <= 1:
            raise UserError(f"fim_rate={self.fim_rate}: must be from 0 to 1")


def fim_ids(tokenizer: Tokenizer) -> list[int]:
    """The ids of the tokens that stand before prefix, suffix and middle. Raises UserError if there are none."""
    ids = [tokenizer.bpe.token_to_id(token) for token in FIM] if isinstance(tokenizer, JsonTokenizer) else [None]
    if None in ids:
        special = " ".join(f"'--special={token}'" for token in FIM)
        raise UserError(f"fim_rate: the tokenizer has no {FIM[0]}; python prepare/tokenizer.py {special} makes one")
    return ids


def encode(text: str, tokenizer: Tokenizer, fim_rate: float, marks: list[int]) -> list[int]:
    """A file's ids. Some files are prefix, suffix, then middle (arXiv:2207.14255), chosen and cut by their own hash."""
    draw = random.Random(hashlib.sha256(text.encode()).digest())
    if draw.random() >= fim_rate:
        return tokenizer.encode(text)
    a, b = sorted(draw.randint(0, len(text)) for _ in range(2))
    prefix, middle, suffix = map(tokenizer.encode, (text[:a], text[a:b], text[b:]))
    return [marks[0], *prefix, marks[1], *suffix, marks[2], *middle]


def encode_all(
    sources: list[Source], splits: list[str], tokenizer: Tokenizer, dtype: np.dtype, fim_rate: float
) -> Iterator[Encoded]:
    marks = fim_ids(tokenizer) if fim_rate else []
    end = [] if tokenizer.end_of_text is None else [tokenizer.end_of_text]
    for source, split in zip(sources, splits, strict=True):
        ids = encode(source.text, tokenizer, fim_rate, marks) + end
        yield {split: (np.array(ids, dtype=dtype), len(source.text.encode()))}


def main(cfg: Code, origin: dict[str, str]) -> None:
    """Make a data set from code: python prepare/code.py FOLDER... --tokenizer=data/code-bpe

    Files that .gitignore excludes, and what is binary, generated, vendored, minified or nearly the same as another
    file, are left out. Whole repositories are the validation split, or files if there is one repository.
    """
    tokenizer, skipped = find_tokenizer(cfg.tokenizer), Counter()
    repositories = find_repositories(cfg.folders)
    sources = list(without_duplicates(read_sources(repositories, cfg.extensions, skipped), skipped))
    if len(sources) < 2:
        raise UserError(f"{', '.join(cfg.folders)}: {len(sources)} source files, two at least are needed")
    print(f"{len(sources):,} files of {len(repositories)} repositories", end="")
    print("".join(f", {count:,} {reason}" for reason, count in skipped.most_common()).replace(",", "; left out:", 1))
    splits, how = choose_splits(sources, cfg.val_fraction)
    dtype = np.dtype("<u2" if tokenizer.vocab_size <= 2**16 else "<u4")
    encoded = encode_all(sources, splits, tokenizer, dtype, cfg.fim_rate)
    source = f"{', '.join(cfg.folders)}, by prepare/code.py; {cfg.val_fraction:g} is val, whole {how}"
    folder = dataset_folder(cfg.name, cfg.data_dir, origin)
    meta = write_encoded(folder, encoded, tokenizer, dtype, source, sum(len(s.text.encode()) for s in sources))
    print_next(folder, meta, origin, "train_code_cpu", "train_code", finetune=(cfg.tokenizer, "finetune_smollm2"))


if __name__ == "__main__":
    cli.run(main, Code)
