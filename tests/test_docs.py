"""README.md, docs/ and the heads of configs: their commands can be parsed, a page's commands run, their links exist."""

import re
import runpy
import shlex
import shutil
from pathlib import Path

import pytest

from bench import Bench
from explain import Explain
from kqv.cli import parse
from kqv.settings import SampleConfig, TrainConfig
from report import Report
from tests.conftest import ROOT

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
SETTINGS = {"train.py": TrainConfig, "sample.py": SampleConfig, "report.py": Report, "bench.py": Bench}
SETTINGS |= {"explain.py": Explain}
# on one line of a page, from the interpreter to the end of the command
COMMAND = re.compile(r"""(?:python|train\.py|torchrun .*?) ((?:prepare/)?\w+\.py(?: (?:"[^"\n]*"|[^\n`#|<])*)?)""")


def commands(path: Path) -> list[str]:
    """The commands on a page, "train.py configs/train_gpt2.py" say, joined where a backslash continues a line."""
    text = path.read_text(encoding="utf-8").replace("\\\n", " ")
    found = [match[1].strip().rstrip(",;") for match in COMMAND.finditer(text)]
    return [command for command in found if (ROOT / command.split()[0]).is_file()]


def settings_of(script: str) -> type:
    if script in SETTINGS:
        return SETTINGS[script]
    module = runpy.run_path(str(ROOT / script))
    return module["main"].__annotations__["cfg"]


def test_pages_have_commands():
    assert len(commands(PAGES[0])) > 10 and len(commands(ROOT / "docs" / "nodes.md")) >= 4


@pytest.mark.parametrize("path", [*PAGES, *sorted((ROOT / "configs").glob("*.py"))], ids=lambda path: path.name)
def test_commands_can_be_parsed(path, monkeypatch, tmp_path):
    for name in ("train.py", "model.py"):  # ../nanoGPT, as bench.py sees it
        (tmp_path / "nanoGPT").mkdir(exist_ok=True)
        (tmp_path / "nanoGPT" / name).touch()
    for name in ("SmolLM2-135M-Instruct", "here"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / "here")
    for command in commands(path):
        script, *words = shlex.split(command)
        if not {"--help", "..."} & set(words):  # "..." stands for words that the page lists below
            parse(settings_of(script), words)


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_links_lead_to_files(path):
    for link in re.findall(r"\]\((?!https?:)([^)#]+)", path.read_text(encoding="utf-8")):
        assert (path.parent / link).exists(), link


def test_readme_commands_for_a_text_of_ones_own_run(command, tmp_path):
    (tmp_path / "book.txt").write_text("Call me Ishmael. Some years ago - never mind how long precisely.\n" * 50)
    section = (ROOT / "README.md").read_text(encoding="utf-8").partition("## Your own text")[2].partition("## ")[0]
    shrunk = {"train.py": ["--max_iters=2", "--eval_iters=1"], "sample.py": ["--max_new_tokens=5"]}
    lines = [match[1] for match in COMMAND.finditer(section)]
    assert [line.split()[0] for line in lines] == ["prepare/text.py", "train.py", "sample.py"]
    for line in lines:
        script, *words = shlex.split(line)
        done = command(script, *words, *shrunk.get(script, []), "--data_dir=data")
        assert done.code in (0, None), done.err
    assert done.out.count("---------------") == 9


def test_commands_for_code_of_ones_own_run_on_this_repository(command, tmp_path, monkeypatch):
    for name in ("kqv", "prepare", "tests", "configs"):
        shutil.copytree(ROOT / name, tmp_path / "src" / "ours" / name)
    for path in (tmp_path / "src" / "ours" / ".git", tmp_path / "here"):
        path.mkdir()
    monkeypatch.chdir(tmp_path / "here")
    tiny = ["--n_layer=1", "--n_head=2", "--n_embd=16", "--batch_size=2", "--block_size=32", "--device=cpu"]
    shrunk = {"train.py": [*tiny, "--max_iters=2", "--eval_iters=1", "--data_dir=data"]}
    shrunk |= {"sample.py": ["--max_new_tokens=5"], "prepare/tokenizer.py": ["--vocab_size=600", "--data_dir=data"]}
    shrunk |= {"prepare/code.py": ["--data_dir=data"]}
    lines = commands(ROOT / "docs" / "code.md")
    assert {line.split()[0] for line in lines} >= shrunk.keys() and any("fim_rate" in line for line in lines)
    for line in lines:
        script, *words = shlex.split(line)
        done = command(script, *words, *shrunk.get(script, []))
        assert done.code in (0, None), (line, done.err)
        if script == "sample.py":
            start = next(word for word in words if word.startswith("--start="))
            assert done.out.startswith(start.removeprefix("--start="))
