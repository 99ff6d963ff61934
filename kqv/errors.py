"""Errors that a user can cause and fix: one line on stderr and exit code 2 instead of a traceback."""

import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import NoReturn

# packages that are imported when they are used; pip installs each under the name that is imported
OPTIONAL_PACKAGES = {"accelerate", "datasets", "datasketch", "gguf", "huggingface_hub", "jinja2", "matplotlib", "numpy"}
OPTIONAL_PACKAGES |= {"pyarrow", "requests", "rich", "safetensors", "tiktoken", "tokenizers", "torch", "transformers"}
OPTIONAL_PACKAGES |= {"typer", "wandb"}


class UserError(Exception):
    """An error that the user can cause and fix. A command prints the message, one line, and exits with 2."""


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Turn UserError, a missing package, OSError and out-of-memory into one line on stderr and exit code 2.

    Any other exception is a bug and keeps its traceback.
    """
    try:
        yield
        sys.stdout.flush()
    except UserError as error:
        fail(str(error))
    except KeyboardInterrupt:
        fail("interrupted", code=130)
    except BrokenPipeError:  # the reader of the output (`| head`) has ended
        discard_output()
        sys.exit(1)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in OPTIONAL_PACKAGES:
            raise
        fail(f"this needs the Python package {error.name!r}: pip install {error.name}")
    except OSError as error:
        fail(f"{error.filename}: {error.strerror}" if error.filename and error.strerror else str(error))
    except (MemoryError, RuntimeError) as error:
        if not re.search("OutOfMemory|MemoryError|allocate memory", f"{type(error).__name__} {error}"):
            raise
        lower = "train.py needs less with a lower --batch_size or --block_size, sample.py with fewer --num_samples"
        fail(f"out of memory: {lower}")


def discard_output() -> None:
    """Redirect stdout to the null device, because the reader of the output (`| head`) has ended."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def fail(message: str, code: int = 2) -> NoReturn:
    process = f" in process {os.environ['RANK']}" if "RANK" in os.environ else ""
    with suppress(OSError):  # stderr may be closed as well
        print(f"error{process}: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(code)
