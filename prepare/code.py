"""Make a data set from code: repositories without what is generated, vendored, binary or there twice."""

import hashlib
import random
import shlex
import sys
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar

sys.path[0] = str(Path(__file__).resolve().parents[1])  # kqv, also if not installed; prepare/code.py is not Python's

import numpy as np

from kqv import cli
from kqv.errors import UserError
from kqv.hub_tokenizer import find_tokenizer
from kqv.repositories import FIM, LeftOut, Source, choose_splits, find_repositories, read_sources, without_duplicates
from kqv.settings import at_least
from kqv.suggest import print_next, script_path
from kqv.tokenizer import CharTokenizer, JsonTokenizer, Tokenizer
from kqv.writer import dataset_folder, write_encoded

NAMED = 3  # files of each kind that are left out


@dataclass(kw_only=True)
class Code:
    POSITIONAL: ClassVar[str] = "folders"
    folders: Annotated[tuple[str, ...], "repositories, or folders of repositories"] = ()
    name: Annotated[str, "name of the data set"] = "code"
    tokenizer: Annotated[
        str,
        "char | byte | gpt2 (a download) | a tokenizer.json or the folder of one | OWNER/NAME on the Hugging Face hub",
    ] = "gpt2"
    extensions: Annotated[tuple[str, ...], "only files that end so, py for instance; can be given more than once"] = ()
    val_fraction: Annotated[float, "share of the text for validation"] = 0.1
    fim_rate: Annotated[float, "share of the text whose middle comes after its end: fill in the middle"] = 0.0
    fim_length: Annotated[int, "characters of such a text; block_size should be as many tokens as it has"] = 2000
    data_dir: Annotated[str, "folder of data sets"] = "data"

    def __post_init__(self):
        if not self.folders:
            raise UserError("which code? python prepare/code.py FOLDER [FOLDER ...]")
        if not 0 < self.val_fraction < 1:
            raise UserError(f"val_fraction={self.val_fraction}: must be above 0 and below 1")
        if not 0 <= self.fim_rate <= 1:
            raise UserError(f"fim_rate={self.fim_rate}: must be from 0 to 1")
        at_least(self, 1, "fim_length")


def make_tokenizer(kind: str, sources: list[Source]) -> Tokenizer:
    if kind != "char":
        return find_tokenizer(kind)
    return CharTokenizer("".join(sorted(set().union(*(source.text for source in sources)))), end_of_text=True)


def fim_ids(tokenizer: Tokenizer, folders: tuple[str, ...]) -> list[int]:
    """The ids of the tokens that stand before prefix, suffix and middle. Raises UserError if there are none."""
    ids = [tokenizer.bpe.token_to_id(token) for token in FIM] if isinstance(tokenizer, JsonTokenizer) else [None]
    if None in ids:
        words = ["python", script_path("prepare/tokenizer.py"), "--code", *(f"--input={folder}" for folder in folders)]
        make = shlex.join(words)
        raise UserError(f"fim_rate: the tokenizer has no {', '.join(FIM)}; this makes one that has: {make}")
    return ids


def encode(text: str, tokenizer: Tokenizer, fim_rate: float, fim_length: int, marks: list[int]) -> list[int]:
    """A file's ids, ended. Some stretches of it are prefix, suffix, then middle (arXiv:2207.14255), and end each.

    Which ones, and where they are cut, follows from the file's hash.
    """
    draw, end = random.Random(hashlib.sha256(text.encode()).digest()), [tokenizer.end_of_text]
    ids, plain = [], ""
    for stretch in stretches(text, fim_length) if fim_rate else [text]:
        if draw.random() >= fim_rate:
            plain += stretch
            continue
        a, b = sorted(draw.randint(0, len(stretch)) for _ in range(2))
        prefix, middle, suffix = map(tokenizer.encode, (stretch[:a], stretch[a:b], stretch[b:]))
        ids += [*tokenizer.encode(plain), marks[0], *prefix, marks[1], *suffix, marks[2], *middle, *end]
        plain = ""
    ids += [*tokenizer.encode(plain), *end] if plain else []
    return [index for index in ids if index is not None]  # a tokenizer without an end of text


def stretches(text: str, length: int) -> Iterator[str]:
    """The same text in stretches of whole lines, each up to the line in which it reaches `length` characters."""
    stretch = ""
    for line in text.splitlines(keepends=True):
        stretch += line
        if len(stretch) >= length:
            yield stretch
            stretch = ""
    yield stretch


def describe(sources: list[Source], repositories: list[Path], left_out: LeftOut) -> str:
    """What is read, and what is left out and why, with the names of a few files."""
    number = len(repositories)
    lines = [f"{len(sources):,} files of {number:,} {'repository' if number == 1 else 'repositories'}"]
    for reason, paths in sorted(left_out.items(), key=lambda item: -len(item[1])):
        more = [f"and {len(paths) - NAMED:,} more"] if len(paths) > NAMED else []
        lines.append(f"  left out: {len(paths):,} {reason}: {', '.join([*map(str, paths[:NAMED]), *more])}")
    return "\n".join(lines)


def main(cfg: Code, origin: dict[str, str]) -> None:
    """Make a data set from code: python prepare/code.py FOLDER... --tokenizer=data/code-bpe

    Files that .gitignore excludes, and what is binary, generated, vendored, minified or nearly the same as another
    file, are left out. The validation split is whole repositories, or single files if those are too few.
    """
    folder, left_out = dataset_folder(cfg.name, cfg.data_dir, origin), defaultdict(list)
    repositories = find_repositories(cfg.folders, left_out)
    sources = list(without_duplicates(read_sources(repositories, cfg.extensions, left_out), left_out))
    print(describe(sources, repositories, left_out))
    if len(sources) < 2:
        raise UserError(f"{', '.join(cfg.folders)}: {len(sources)} source files, two at least are needed")
    tokenizer = make_tokenizer(cfg.tokenizer, sources)
    marks = fim_ids(tokenizer, cfg.folders) if cfg.fim_rate else []
    splits, how = choose_splits(sources, cfg.val_fraction)
    print(how)
    dtype = np.dtype("<u2" if tokenizer.vocab_size <= 2**16 else "<u4")
    encoded = (
        {split: (np.array(encode(source.text, tokenizer, cfg.fim_rate, cfg.fim_length, marks), dtype), source.size)}
        for source, split in zip(sources, splits, strict=True)
    )
    source = f"{', '.join(cfg.folders)}, by prepare/code.py; {how}"
    if cfg.fim_rate:
        source += f"; fim_rate={cfg.fim_rate:g}, fim_length={cfg.fim_length}"
    meta = write_encoded(folder, encoded, tokenizer, dtype, source, sum(source.size for source in sources))
    print_next(folder, meta, origin, "train_code_cpu", "train_code", finetune=(cfg.tokenizer, "finetune_smollm2"))


if __name__ == "__main__":
    cli.run(main, Code)
