"""The Python sources that came with this Python, as characters or bytes. Needs no network."""

import sys
import sysconfig
import tokenize
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

sys.path[0] = str(Path(__file__).resolve().parents[1])  # kqv, also if not installed; prepare/code.py is not Python's

from kqv import cli
from kqv.errors import UserError
from kqv.suggest import print_next
from kqv.tokenizer import ByteTokenizer, CharTokenizer
from kqv.writer import dataset_folder, write_dataset

# installed packages, and tests, which are half of the library and mostly tables
SKIPPED = {"site-packages", "dist-packages", "test", "tests", "idlelib"}


@dataclass(kw_only=True)
class PythonStdlib:
    tokenizer: Annotated[Literal["char", "byte"], "characters (of the ASCII files only), or bytes"] = "char"
    data_dir: Annotated[str, "folder of data sets"] = "data"


def main(cfg: PythonStdlib, origin: dict[str, str]) -> None:
    """Make the data set python_stdlib: about 10 MB of Python, the sources of the standard library on this machine.

    Another version of Python gives other data.
    """
    library = Path(sysconfig.get_path("stdlib"))
    texts = []
    for path in sorted(library.rglob("*.py")):
        if SKIPPED.isdisjoint(path.relative_to(library).parts):
            with tokenize.open(path) as file:  # in the encoding that the source declares
                texts.append(file.read())
    if cfg.tokenizer == "char":  # the rest has a few accents and symbols, which would double the vocabulary
        texts = [text for text in texts if text.isascii()]
    if not texts:
        raise UserError(f"this Python has no sources in {library}: try prepare/text.py with a text of your own")
    tokenizer = ByteTokenizer()
    if cfg.tokenizer == "char":
        tokenizer = CharTokenizer("".join(sorted(set().union(*texts))), end_of_text=True)
    folder = dataset_folder("python_stdlib", cfg.data_dir, origin)
    source = f"the standard library of Python {sys.version.split()[0]}, by prepare/python_stdlib.py"
    meta = write_dataset(folder, ([text] for text in texts), tokenizer, source)
    print_next(folder, meta, origin, cpu_config="train_python_stdlib", gpu_config="train_python_stdlib")


if __name__ == "__main__":
    cli.run(main, PythonStdlib)
