"""Make a data set from the Python sources that came with this Python: needs no network."""

import sys
import sysconfig
import tokenize
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # kqv, also from a clone that is not installed

from kqv import cli
from kqv.errors import UserError
from kqv.tokenizer import ByteTokenizer, CharTokenizer
from kqv.writer import dataset_folder, print_next, write_dataset

# what is installed beside the library, and tests, which are half of it and mostly tables
SKIPPED = {"site-packages", "dist-packages", "test", "tests", "idlelib"}


@dataclass(kw_only=True)
class PythonStdlib:
    tokenizer: Annotated[Literal["char", "byte"], "characters (of the files that are all ASCII), or bytes"] = "char"
    data_dir: Annotated[str, "folder of data sets"] = "data"


def main(cfg: PythonStdlib, origin: dict[str, str]) -> None:
    """Make the data set python_stdlib: about 10 MB of Python, the sources of the standard library on this machine.

    The same machine gives the same data; another version of Python gives other data.
    """
    library = Path(sysconfig.get_path("stdlib"))
    texts = []
    for path in sorted(library.rglob("*.py")):
        if SKIPPED.isdisjoint(path.relative_to(library).parts):
            with tokenize.open(path) as file:  # in the encoding that the source itself declares
                texts.append(file.read())
    if cfg.tokenizer == "char":  # a few accents and symbols would double the vocabulary
        texts = [text for text in texts if text.isascii()]
    if not texts:
        raise UserError(f"this Python has no sources in {library}: try prepare/text.py with a text of your own")
    tokenizer = (
        CharTokenizer("".join(sorted(set().union(*texts))), end_of_text=True)
        if cfg.tokenizer == "char"
        else ByteTokenizer()
    )
    folder = dataset_folder("python_stdlib", cfg.data_dir, origin)
    source = f"the standard library of Python {sys.version.split()[0]}, by prepare/python_stdlib.py"
    write_dataset(folder, ([text] for text in texts), tokenizer, source)
    print_next(folder, "train_python_stdlib", origin)


if __name__ == "__main__":
    cli.run(main, PythonStdlib)
