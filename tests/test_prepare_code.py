"""prepare/code.py: which files are read, near-duplicates, splits by repository, fill in the middle."""

import json
import random
import shlex
import subprocess
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pytest

from kqv import repositories
from kqv.errors import UserError
from kqv.repositories import FIM, Source, choose_splits, find_repositories, read_sources, without_duplicates
from kqv.tokenizer import JsonTokenizer, from_description
from tests.conftest import ROOT
from tests.test_prepare_tokenizer import own_bpe  # noqa: F401  a fixture

WORDS = [f"word{number}" for number in range(500)]


def code(seed: int, n_words: int = 200) -> str:
    """Lines of words; two seeds share next to no five words in a row."""
    draw = random.Random(seed)
    return "".join(" ".join(draw.choices(WORDS, k=5)) + "\n" for _ in range(n_words // 5))


def make(folder: Path, files: dict[str, str | bytes]) -> Path:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder


def read(folder: Path, *extensions: str) -> tuple[set[str], dict[str, set[str]]]:
    """The files that are read, and those that are left out, by reason."""
    left_out = defaultdict(list)
    sources = list(read_sources([folder], extensions, left_out))
    return {str(source.path) for source in sources}, {
        reason: {str(path.relative_to(folder.name)) for path in paths} for reason, paths in left_out.items()
    }


def documents(folder: Path) -> tuple[dict, dict[str, list[str]]]:
    """meta.json and the documents of each split, as text."""
    meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
    tokenizer, found = from_description(meta["tokenizer"]), {}
    for split in ("train", "val"):
        ids = np.fromfile(folder / f"{split}.bin", "<u2").tolist()
        assert ids[-1] == tokenizer.end_of_text
        found[split] = tokenizer.decode(ids).split("<|endoftext|>")[:-1]
    return meta, found


# -- which files -------------------------------------------------------------------------------------------------------


def test_folders_with_git_are_repositories(tmp_path):
    make(tmp_path, {"src/a/.git/config": "", "src/b/.git": "gitdir: elsewhere", "src/c/x.py": "", "plain/d/x.py": ""})

    def found(*folders: str) -> list[str]:
        paths = find_repositories([str(tmp_path / name) for name in folders], left_out)
        return [str(path.relative_to(tmp_path)) for path in paths]

    left_out = defaultdict(list)
    assert found("src/a", "plain") == ["src/a", "plain"] and not left_out
    assert found("src") == ["src/a", "src/b"]
    assert left_out == {"folders without .git beside repositories": [tmp_path / "src" / "c"]}
    for bad in ("absent", "src/c/x.py"):
        with pytest.raises(UserError, match="no such folder"):
            found(bad)


@pytest.mark.parametrize("checkout", [False, True])
def test_gitignore_is_read_as_git_reads_it(tmp_path, monkeypatch, checkout):
    ignored = ["secret.py", "logs/a.py", "deep/only.py", "deep/er/x.tmp", "deep/er/b_gen.py", "no/kept.py"]
    kept = ["a.py", "deep/secret2.py", "deep/er/keep_gen.py", "only.py", "other/logs.py", "ünï cödé.py"]
    files = {name: code(number) for number, name in enumerate(ignored + kept)}
    files |= {".gitignore": "secret.py\n/logs/\n*.tmp\nno/\n", "deep/.gitignore": "/only.py\n"}
    files |= {"deep/er/.gitignore": "*_gen.py\n!keep_gen.py\n", "no/.gitignore": "!kept.py\n"}
    make(tmp_path / "it", files)
    if checkout:
        subprocess.run(["git", "init", "--quiet", tmp_path / "it"], check=True)
        subprocess.run(["git", "-C", tmp_path / "it", "add", "--all"], check=True)
        monkeypatch.setenv("GIT_DIR", str(tmp_path / "it" / ".git"))  # as in a hook
        monkeypatch.setenv("GIT_INDEX_FILE", str(tmp_path / "it" / ".git" / "index"))
    assert read(tmp_path / "it")[0] == {*kept, ".gitignore", "deep/.gitignore", "deep/er/.gitignore"}


def test_nothing_in_a_repository_is_run(tmp_path):
    make(tmp_path, {"it/a.py": code(0), "it/.gitattributes": "*.py filter=trap\n"})
    trap = tmp_path / "trap.sh"
    trap.write_text(f"#!/bin/sh\necho ran >> {tmp_path}/trace\n")
    trap.chmod(0o755)
    subprocess.run(["git", "init", "--quiet", tmp_path / "it"], check=True)
    for key in ("core.fsmonitor", "core.hooksPath", "filter.trap.clean", "filter.trap.process", "core.pager"):
        value = tmp_path if key == "core.hooksPath" else trap
        subprocess.run(["git", "-C", tmp_path / "it", "config", key, value], check=True)
    for hook in ("post-index-change", "reference-transaction"):
        (tmp_path / "it" / ".git" / "hooks").mkdir(exist_ok=True)
        (tmp_path / "it" / ".git" / "hooks" / hook).write_bytes(trap.read_bytes())
        (tmp_path / "it" / ".git" / "hooks" / hook).chmod(0o755)
    assert "a.py" in read(tmp_path / "it")[0]
    assert not (tmp_path / "trace").exists()
    subprocess.run(["git", "-C", tmp_path / "it", "status"], check=True, capture_output=True)
    assert (tmp_path / "trace").exists()  # so plain git does run it


def test_what_is_not_source_code_is_left_out(tmp_path):
    reasons = {
        "not text": {"a.png": b"\x89PNG\r\n\x1a\n\0", "zero.py": b"a = 0\0\n", "latin1.py": "é".encode("latin1")},
        "empty": {"empty.py": b"", "blank.py": b"\n \n"},
        "over 1 MB": {"large.py": b"a = 1\n" * 170_000},
        "minified, or data": {"long.js": "x;" * 501 + "\n", "wide.csv": ("1" * 101 + "\n") * 50},
        "generated": {
            "a_pb2.py": "# -*- coding: utf-8 -*-\n# Generated by the compiler.  DO NOT EDIT!\nx = 1\n",
            "b.go": "// Code generated by mockgen. DO NOT EDIT.\npackage b\n",
            "c.js": "/**\n * @generated\n */\nf();\n",
            "package-lock.json": "{}\n",
        },
        "vendored or built": {
            "node_modules/left/index.js": "f();\n",
            "go/vendor/x.go": "package x\n",
            ".venv/lib/a.py": "a = 1\n",
            "lib/site-packages/b.py": "b = 1\n",
            "dist/c.js": "c();\n",
        },
    }
    kept = {
        "a.py": "a = 1\n",
        "vendor.py": "a = 2\n",
        "Makefile": "all:\n\techo\n",
        "edge.js": "x" * 1000 + "\n" + "y;\n" * 10,
        "late.py": "x = 1\n" * 200 + "# @generated\n",
        "names.py": 'MARKS = ["@generated", "DO NOT EDIT"]\n',
        "marked.py": b"\xef\xbb\xbfa = 3\r\n",
    }
    make(tmp_path, kept)
    for files in reasons.values():
        make(tmp_path, files)
    (tmp_path / "link.py").symlink_to(tmp_path / "a.py")
    found, left_out = read(tmp_path)
    assert found == set(kept)
    assert left_out == {reason: set(files) for reason, files in reasons.items()}
    texts = {str(source.path): source.text for source in read_sources([tmp_path], (), defaultdict(list))}
    assert texts["marked.py"] == "a = 3\n"


@pytest.mark.parametrize("extensions", [["py", "Makefile"], [".py", "Makefile"], ["*.py", "*.Makefile"]])
def test_extensions(tmp_path, extensions):
    make(tmp_path, {"a.py": code(0), "b.js": code(1), "Makefile": code(2), "py": code(3), "c.pyi": code(4)})
    found, left_out = read(tmp_path, *extensions)
    assert found == {"a.py", "Makefile", "py"} and left_out == {"of another extension": {"b.js", "c.pyi"}}


# -- near-duplicates ---------------------------------------------------------------------------------------------------


def similarity(a: str, b: str) -> float:
    """The Jaccard index of their sets of five words in a row, exactly."""
    sets = [{tuple(words[at : at + 5]) for at in range(len(words) - 4)} for words in (a.split(), b.split())]
    return len(sets[0] & sets[1]) / len(sets[0] | sets[1])


def changed(text: str, seed: int, every: int) -> str:
    """The same words, one in `every` replaced."""
    draw, words = random.Random(seed), text.split()
    for at in range(draw.randrange(every), len(words), every):
        words[at] = f"new{draw.randrange(10**9)}"
    return "".join(" ".join(words[at : at + 5]) + "\n" for at in range(0, len(words), 5))


def kept(texts: list[str]) -> list[int]:
    sources = [Source("it", Path(str(number)), text) for number, text in enumerate(texts)]
    return [int(source.path.name) for source in without_duplicates(sources, defaultdict(list))]


def test_near_duplicates_are_found_and_others_are_kept():
    found = Counter()
    for seed in range(60):
        text = code(seed, 1500)
        for every, kind in ((120, "near"), (30, "other")):
            other = changed(text, seed, every)
            assert (similarity(text, other) > 0.9) if kind == "near" else (0.6 < similarity(text, other) < 0.8)
            found[kind] += kept([text, other]) == [0]
    assert found["near"] >= 59 and found["other"] <= 3  # the estimate's error is 0.03


def test_only_the_first_of_many_copies_is_kept():
    texts = [code(0), code(1), code(0), code(1) + "\n\n", code(2), code(0).replace("\n", "  \n"), "x", "y", "x", ""]
    assert kept(texts) == [0, 1, 4, 6, 7, 9]


def test_a_near_duplicate_is_never_in_the_other_split(command, tmp_path):
    for number in range(40):
        files = {"own.py": code(number, 600), "shared.py": changed(code(1000, 600), number, 300), "copy.py": code(999)}
        make(tmp_path / "src" / f"repo{number}", files | {".git/config": ""})
    done = command("prepare/code.py", "src", "--tokenizer=byte", "--data_dir=data")
    assert done.code == 0, done.err
    assert "left out: 78 nearly the same as another: repo1/copy.py, " in done.out
    _, found = documents(tmp_path / "data" / "code")
    assert len(found["train"]) + len(found["val"]) == 42 and len(found["val"]) > 2
    assert max(similarity(a, b) for a in found["train"] for b in found["val"]) < 0.8


# -- splits ------------------------------------------------------------------------------------------------------------


def sources_of(sizes: dict[str, list[int]]) -> list[Source]:
    return [Source(name, Path(f"{n}.py"), "x" * size) for name, files in sizes.items() for n, size in enumerate(files)]


def val_of(sizes: dict[str, list[int]], val_fraction: float = 0.1) -> tuple[set[tuple[str, int]], float, str]:
    """The files of val, its share of the text, and the line that says how."""
    sources = sources_of(sizes)
    splits, how = choose_splits(sources, val_fraction)
    val = [source for source, split in zip(sources, splits, strict=True) if split == "val"]
    share = sum(source.size for source in val) / sum(source.size for source in sources)
    assert set(splits) == {"train", "val"} and f", {share:.1%} of the text" in how
    return {(source.repository, int(source.path.stem)) for source in val}, share, how


@pytest.mark.parametrize("val_fraction", [0.05, 0.1, 0.5])
def test_whole_repositories_are_val(val_fraction):
    draw = random.Random(0)
    sizes = {f"repo{n}": [draw.randrange(1, 500) for _ in range(draw.randrange(1, 20))] for n in range(60)}
    sizes["large"] = [30_000]
    val, share, how = val_of(sizes, val_fraction)
    assert val_fraction * 0.9 < share < val_fraction * 1.1 and "of 61 repositories" in how
    for name, files in sizes.items():
        assert sum(repository == name for repository, _ in val) in (0, len(files))
    more = {name: files for name, files in sizes.items() if name != "repo7"}  # others mostly stay where they are
    assert len({name for name, _ in val} ^ {name for name, _ in val_of(more, val_fraction)[0]}) <= 6


@pytest.mark.parametrize("sizes", [{"one": [10] * 200}, {"one": [10] * 100, "two": [10] * 100}])
def test_too_few_repositories_are_divided_by_files(sizes):
    val, share, how = val_of(sizes)
    assert 0.09 < share < 0.11 and how == f"val is {len(val)} of 200 files, {share:.1%} of the text"


@pytest.mark.parametrize("sizes", [{"it": [1000, 1]}, {"it": [5, 5]}, {"a": [9], "b": [1000]}, {"it": [1, 1, 1000]}])
def test_a_few_files_still_give_both_splits(sizes):
    val_of(sizes)


def test_the_split_does_not_depend_on_the_place(tmp_path, command, monkeypatch):
    for place in ("one", "deep/er"):
        make(tmp_path / place / "it", {f"{n}.py": code(n) for n in range(60)})
    made = []
    for place, folder in ((tmp_path, "one/it"), (tmp_path / "deep" / "er" / "it", ".")):
        monkeypatch.chdir(place)
        done = command("prepare/code.py", folder, "--tokenizer=char", f"--data_dir={tmp_path / 'data'}")
        assert done.code == 0, done.err
        made.append([(tmp_path / "data" / "code" / f"{split}.bin").read_bytes() for split in ("train", "val")])
    assert made[0] == made[1]


# -- fill in the middle ------------------------------------------------------------------------------------------------


def reassembled(document: str) -> str:
    """The text of a document that may end with prefix, suffix, middle."""
    plain, *rest = document.split(FIM[0])
    if not rest:
        return plain
    prefix, rest = rest[0].split(FIM[1])
    suffix, middle = rest.split(FIM[2])
    return plain + prefix + middle + suffix


@pytest.mark.parametrize("rate, length", [(0.5, 2000), (1.0, 300), (1.0, 10**6), (0.3, 1)])
def test_fill_in_the_middle_is_the_same_text(command, tmp_path, own_bpe, rate, length):  # noqa: F811
    texts = [code(n, 1000).replace(" ", "\n    " if n % 2 else " ", 100) + "<|fim_prefix|>"[:n] for n in range(13)]
    make(tmp_path / "it", {f"{n:02}.py": text for n, text in enumerate(texts)})
    words = ["it", f"--tokenizer={own_bpe}", f"--fim_rate={rate}", f"--fim_length={length}", "--val_fraction=0.3"]
    made = []
    for data_dir in ("one", "two"):
        done = command("prepare/code.py", *words, f"--data_dir={data_dir}")
        assert done.code == 0, done.err
        made.append([(tmp_path / data_dir / "code" / f"{split}.bin").read_bytes() for split in ("train", "val")])
    assert made[0] == made[1]
    meta, found = documents(tmp_path / "one" / "code")
    assert f"fim_rate={rate:g}, fim_length={length}" in meta["source"]
    assert meta["splits"]["train"]["bytes"] + meta["splits"]["val"]["bytes"] == sum(map(len, texts))
    together = "".join(reassembled(document) for split in found.values() for document in split)
    assert sorted(together) == sorted("".join(texts)) and all(text in together for text in texts)
    tokenizer = JsonTokenizer(own_bpe.read_text(encoding="utf-8"))
    ids = np.concatenate([np.fromfile(tmp_path / "one" / "code" / f"{split}.bin", "<u2") for split in found])
    marks = [np.count_nonzero(ids == tokenizer.bpe.token_to_id(token)) for token in FIM]
    assert len(set(marks)) == 1
    if rate == 1.0:
        lengths = [len(document) for split in found.values() for document in split]
        assert (marks[0] == 13) if length > 10_000 else (min(lengths[:-1]) > 0 and max(lengths) < length + 100)
    else:
        total = sum(-(-len(text) // length) if length > 1 else text.count("\n") for text in texts)
        assert 0.6 * rate < marks[0] / total < 1.4 * rate


def test_without_fim_each_file_is_a_document(command, tmp_path, own_bpe):  # noqa: F811
    texts = [code(n) for n in range(20)] + ["a <|endoftext|> in a text\n"]
    make(tmp_path / "it", {f"{n:02}.py": text for n, text in enumerate(texts)})
    done = command("prepare/code.py", "it", f"--tokenizer={own_bpe.parent}", "--data_dir=data", "--name=mine")
    assert done.code == 0, done.err
    assert done.out.splitlines()[0] == "21 files of 1 repository" and "val is " in done.out
    next_command = f"python {ROOT / 'train.py'} configs/train_code"
    assert next_command in done.out and "--dataset=mine --out_dir=out-mine --data_dir=data" in done.out
    ids = [np.fromfile(tmp_path / "data" / "mine" / f"{split}.bin", "<u2") for split in ("train", "val")]
    assert np.count_nonzero(np.concatenate(ids) == 0) == 21
    tokenizer = JsonTokenizer(own_bpe.read_text(encoding="utf-8"))
    assert sorted("".join(tokenizer.decode(part.tolist()) for part in ids)) == sorted(
        "<|endoftext|>".join([*texts, ""])
    )


def test_ids_are_those_of_the_tokenizer_and_stretches_are_whole_lines(tmp_path, own_bpe):  # noqa: F811
    import runpy

    module = runpy.run_path(str(ROOT / "prepare" / "code.py"))
    tokenizer, text = JsonTokenizer(own_bpe.read_text(encoding="utf-8")), code(0, 1000)
    assert module["encode"](text, tokenizer, 0.0, 1, []) == [*tokenizer.encode(text), 0]
    parts = list(module["stretches"](text, 300))
    assert "".join(parts) == text and all(300 <= len(part) < 400 and part[-1] == "\n" for part in parts[:-1])
    assert list(module["stretches"]("", 5)) == [""]


# -- errors ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments, complaint",
    [
        ([], "python prepare/code.py FOLDER"),
        (["absent"], "absent: no such folder"),
        (["it/a.py"], "it/a.py: no such folder"),
        (["it", "--val_fraction=1"], "val_fraction=1.0: must be above 0 and below 1"),
        (["it", "--fim_rate=1.5"], "fim_rate=1.5: must be from 0 to 1"),
        (["it", "--fim_rate=nan"], "fim_rate=nan"),
        (["it", "--fim_length=0"], "fim_length=0: must be at least 1"),
        (["it", "--name=a/b"], "name='a/b'"),
        (["it", "--tokenizer=absent"], "absent: no such folder"),
        (["it", "--tokenizer=it"], "it/tokenizer.json: no such file"),
        (["it", "--extensions=rs"], "it: 0 source files, two at least are needed"),
        (["empty"], "empty: 0 source files"),
    ],
)
def test_what_cannot_work_is_one_line(command, tmp_path, arguments, complaint):
    make(tmp_path, {"it/a.py": code(0), "it/b.py": code(1)})
    (tmp_path / "empty").mkdir()
    done = command("prepare/code.py", "--tokenizer=byte", *arguments, "--data_dir=data")
    assert done.code == 2 and done.err.startswith("error: ") and done.err.count("\n") == 1
    assert complaint in done.err and not (tmp_path / "data").exists()


def test_the_command_for_a_tokenizer_with_fim_runs(command, tmp_path):
    make(tmp_path, {f"my code/{n}.py": code(n, 4000) for n in range(4)})
    failed = command("prepare/code.py", "my code", "--tokenizer=byte", "--fim_rate=0.5")
    assert failed.code == 2 and failed.err.count("\n") == 1
    script, *words = shlex.split(failed.err.split("this makes one that has: python ")[1])
    assert script == str(ROOT / "prepare/tokenizer.py")
    done = command(script, *words, "--data_dir=data", "--vocab_size=400")
    assert done.code == 0, done.err
    script, *words = shlex.split(done.out.split("next: python ")[1])
    done = command(script, *words, "--fim_rate=0.5")
    assert done.code == 0, done.err
    assert any(FIM[1] in document for split in documents(tmp_path / "data" / "code")[1].values() for document in split)


@pytest.mark.parametrize("package", ["datasketch", "tokenizers"])
def test_a_missing_package_is_named(kqv, tmp_path, package):
    make(tmp_path, {"it/a.py": code(0), "it/b.py": code(1), "absent/tokenizer.json": "{}"})
    make(tmp_path, {"hook/sitecustomize.py": f"import sys\nsys.modules[{package!r}] = None\n"})
    done = kqv("prepare/code.py", "it", "--tokenizer=absent", env={"PYTHONPATH": str(tmp_path / "hook")})
    assert done.returncode == 2 and done.stderr == (
        f"error: this needs the Python package {package!r}: pip install {package}\n"
    )


def test_without_git_it_says_so(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="needs the program git"):
        repositories.visible_files(tmp_path)
