import contextlib
import errno
import gzip
import hashlib
import http.server
import io
import json
import os
import re
import resource
import runpy
import shlex
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kqv import documents, splits, writer
from kqv.data import open_dataset
from kqv.errors import UserError
from kqv.suggest import print_next
from kqv.tokenizer import ByteTokenizer, CharTokenizer, GPT2Tokenizer, from_description
from kqv.writer import write_dataset

ROOT = Path(writer.__file__).resolve().parent.parent
SCRIPTS = ["text", "python_stdlib", "shakespeare_char", "shakespeare", "openwebtext", "fineweb"]
WORDS = [
    "the",
    "quick",
    "fox's",
    "1234",
    "jumps,",
    "over",
    "",
    "the",
    "dog\n\n\tand",
    "élan",
    "漢字",
    "🙂",
    "it'll\r\n",
]
WORDS += ["<|endoftext|>", "3.14"]


@pytest.fixture(scope="module")
def gpt2(gpt2_bpe):
    return GPT2Tokenizer()


def some_text(seed: int, n_words: int) -> str:
    return " ".join(np.random.default_rng(seed).choice(WORDS, n_words))


def read(folder: Path) -> tuple[dict, dict[str, np.ndarray]]:
    """meta.json and the ids of each split, after checking them against each other."""
    meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
    assert sorted(path.name for path in folder.iterdir()) == ["meta.json", "train.bin", "val.bin"]
    ids, tokenizer = {}, from_description(meta["tokenizer"])
    assert (meta["vocab_size"], meta["end_of_text"]) == (tokenizer.vocab_size, tokenizer.end_of_text)
    for split, counts in meta["splits"].items():
        data = (folder / f"{split}.bin").read_bytes()
        ids[split] = np.frombuffer(data, {"uint16": "<u2", "uint32": "<u4"}[meta["dtype"]])
        assert counts["sha256"] == hashlib.sha256(data).hexdigest() and counts["tokens"] == len(ids[split])
        text = tokenizer.decode_bytes(i for i in ids[split].tolist() if i != tokenizer.end_of_text)
        assert counts["bytes"] == len(text)
    return meta, ids


# -- the writer --


@pytest.mark.parametrize("kind", ["char", "byte", "gpt2"])
def test_one_text_gives_the_ids_that_nanogpt_gives(tmp_path, gpt2, kind, monkeypatch):
    monkeypatch.setattr(writer, "CHUNK", 1000)
    text = some_text(0, 5000)
    tokenizer = {"char": CharTokenizer("".join(sorted(set(text)))), "byte": ByteTokenizer(), "gpt2": gpt2}[kind]
    pieces = [text[i : i + 777] for i in range(0, len(text), 777)]
    write_dataset(tmp_path / "whole", [[text]], tokenizer, "a test", workers=1)
    write_dataset(tmp_path / "pieces", [pieces], tokenizer, "a test", workers=3)
    cut = int(len(text) * 0.9)
    for folder in ("whole", "pieces"):
        _, ids = read(tmp_path / folder)
        assert ids["train"].tolist() == tokenizer.encode(text[:cut])
        assert ids["val"].tolist() == tokenizer.encode(text[cut:])


def test_few_documents_give_their_ends_and_each_part_is_ended(tmp_path, gpt2):
    texts = [some_text(seed, 200) for seed in range(5)]
    write_dataset(tmp_path / "set", [[text] for text in [*texts, ""]], gpt2, "a test", val_fraction=0.25)
    train, val = [], []
    for text in texts:
        cut = int(len(text) * 0.75)
        train += [*gpt2.encode(text[:cut]), 50256]
        val += [*gpt2.encode(text[cut:]), 50256]
    _, ids = read(tmp_path / "set")
    assert (ids["train"].tolist(), ids["val"].tolist()) == (train, val)


@pytest.mark.parametrize("workers", [1, 4])
def test_many_documents_are_split_whole_and_copies_stay_together(tmp_path, gpt2, workers, monkeypatch):
    monkeypatch.setattr(writer, "CHUNK", 300)
    texts = [some_text(seed % 300, 40) for seed in range(600)]  # each text twice
    write_dataset(tmp_path / "set", [[text] for text in texts], gpt2, "a test", 0.2, workers=workers)
    _, ids = read(tmp_path / "set")

    def documents(split):
        return [part.tolist()[:-1] for part in np.split(ids[split], np.flatnonzero(ids[split] == 50256) + 1)[:-1]]

    val = documents("val")
    assert 2 * 35 < len(val) < 2 * 85  # expected 60, standard deviation 7
    assert all(val.count(document) == 2 for document in val)
    encoded = [gpt2.encode(text) for text in texts]
    assert val == [document for document in encoded if document in val]
    assert documents("train") == [document for document in encoded if document not in val]


def test_a_small_fraction_of_many_documents_still_gives_a_val_split(tmp_path):
    write_dataset(tmp_path / "set", [[f"document {i}"] for i in range(150)], ByteTokenizer(), "a test", 1e-9)
    _, ids = read(tmp_path / "set")
    assert bytes(ids["val"][:-1].astype(np.uint8)) == b"document 0"


def test_where_text_is_cut_makes_no_difference_to_bpe(gpt2):
    awkward = st.text(st.sampled_from("ab'st 01 .,\n\n\r\t\v\x1c\x85\xa0\u2028\u3000éñ漢字🙂\u0301\u200d<|>"))

    @given(st.lists(st.one_of(awkward, st.text(st.characters(exclude_categories=["Cs"])))), st.integers(0, 9))
    def check(pieces, size):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(writer, "CHUNK", size)
            chunks = list(writer.chunks(pieces, writer.WORD_END))
        assert "".join(chunks) == "".join(pieces)
        assert [i for chunk in chunks for i in gpt2.encode(chunk)] == gpt2.encode("".join(pieces))

    check()
    assert len(list(writer.chunks([some_text(0, 100_000)], writer.WORD_END))) > 4  # it does cut


def test_characters_need_no_whitespace_to_be_cut(tmp_path, monkeypatch):
    monkeypatch.setattr(writer, "CHUNK", 100)
    text = "ACGT" * 1000
    assert max(map(len, writer.chunks([text], writer.ANYWHERE))) < 110
    write_dataset(tmp_path / "set", [[text]], CharTokenizer("ACGT"), "a test")
    assert CharTokenizer("ACGT").decode(np.concatenate(list(read(tmp_path / "set")[1].values()))) == text


def test_a_large_vocabulary_is_written_in_four_bytes(tmp_path):
    chars = "".join(map(chr, range(0x4E00, 0x4E00 + 20_000))) + "".join(map(chr, range(0x20000, 0x20000 + 40_000)))
    text = chars + "".join(map(chr, range(0xAC00, 0xAC00 + 10_000)))
    write_dataset(tmp_path / "set", [[text]], CharTokenizer(text), "a test")
    meta, ids = read(tmp_path / "set")
    assert meta["dtype"] == "uint32"
    assert np.concatenate([ids["train"], ids["val"]]).tolist() == list(range(70_000))


# -- what is in both splits --


def book(seed: int, n_words: int) -> str:
    """Random words: no two books share a stretch of 256 characters or 64 tokens."""
    return " ".join(np.random.default_rng(seed).choice([*"abcdefghij", "the", "dog", "fox's", "élan"], n_words))


def warned(capfd) -> tuple[int, int, str] | None:
    """The numbers of the warning: shared stretches, all stretches, share. None if stderr is empty."""
    err = capfd.readouterr().err
    found = re.fullmatch(
        r"warning: (\d+) of (\d+) stretches of the validation split \((.*)\), (?:64|256) tokens each, "
        r"are also in the training split\n",
        err,
    )
    assert found or not err
    return found and (int(found[1]), int(found[2]), found[3])


@pytest.mark.parametrize("kind", ["char", "byte", "gpt2"])
def test_a_text_that_comes_again_at_its_end_is_warned_of(tmp_path, gpt2, capfd, kind):
    copied, fresh = book(1, 900), book(2, 2100)
    text = f"{book(0, 5000)} {copied} {book(3, 22_000)} {copied} {fresh}"
    tokenizer = {"char": CharTokenizer("".join(sorted(set(text)))), "byte": ByteTokenizer(), "gpt2": gpt2}[kind]
    write_dataset(tmp_path / "set", [[text]], tokenizer, "a test", len(f"{copied} {fresh}") / len(text))
    shared, total, share = warned(capfd)
    assert 200 < total <= 1000 and share == f"{shared / total:.1%}"
    assert 0.2 < shared / total < 0.35  # 900 of 3,000 words, without stretches across the end of the copy


@pytest.mark.parametrize("dtype", ["<u2", "<u4"])
@pytest.mark.parametrize("block", [1, 50, 1003])
@pytest.mark.parametrize("place", range(3000, 3009))
def test_a_copy_is_found_at_every_place(tmp_path, monkeypatch, dtype, block, place):
    monkeypatch.setattr(splits, "BLOCK", block)
    train, val = np.random.default_rng(0).integers(0, 2**16, (2, 5000)).astype(dtype)
    val[1000:1071] = train[place : place + 71]  # 64, and up to 7 by which its start may be off
    val[2000:2063] = train[:63]
    train.tofile(tmp_path / "train.bin")
    val.tofile(tmp_path / "val.bin")
    shared, total = splits.shared_stretches(tmp_path, np.dtype(dtype), 64, None)
    assert (shared, total) == (1, (5000 - 71) // 8 + 1)


@pytest.mark.parametrize("kind", ["char", "byte", "gpt2"])
def test_text_that_is_new_is_not_warned_of(tmp_path, gpt2, capfd, kind):
    text = book(0, 30_000)
    tokenizer = {"char": CharTokenizer("".join(sorted(set(text)))), "byte": ByteTokenizer(), "gpt2": gpt2}[kind]
    write_dataset(tmp_path / "set", [[text]], tokenizer, "a test")
    assert warned(capfd) is None
    write_dataset(tmp_path / "short", [["the dog"]], tokenizer, "a test")
    assert warned(capfd) is None


def test_copies_among_few_documents_are_warned_of_where_they_lie_across_the_cut(tmp_path, capfd):
    books = [book(seed, 4000) for seed in range(8)]
    write_dataset(tmp_path / "same", [[text] for text in books + books], ByteTokenizer(), "a test")
    assert warned(capfd) is None  # complete copies: the ends of both are in val, not in train
    longer = [books[0] + book(9, 1000)]
    write_dataset(tmp_path / "longer", [[text] for text in books + longer], ByteTokenizer(), "a test")
    shared, total, _ = warned(capfd)
    assert 0.05 < shared / total < 0.15  # one of nine ends


def test_copies_among_many_documents_are_never_in_both(tmp_path, capfd):
    texts = [book(seed % 100, 200) for seed in range(300)]
    write_dataset(tmp_path / "set", [[text] for text in texts], ByteTokenizer(), "a test")
    assert warned(capfd) is None
    ids = read(tmp_path / "set")[1]
    train, val = ({*bytes(np.where(part < 256, part, 0).astype(np.uint8)).split(b"\0")} for part in ids.values())
    assert train & val == {b""} and len(train) + len(val) == 102


# -- atomic writes --


def fails(monkeypatch, when: str) -> None:
    """Make the disk full at some point of the next write_dataset."""

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    if when == "late write":
        real, calls = writer.write, iter(range(10**9))
        monkeypatch.setattr(writer, "write", lambda *given: real(*given) if next(calls) < 3 else full())
    else:
        monkeypatch.setattr(*{"fsync": (os, "fsync"), "meta.json": (json, "dump")}[when], full)


@pytest.mark.parametrize("when", ["late write", "fsync", "meta.json"])
def test_a_full_disk_leaves_what_was_there(tmp_path, monkeypatch, when):
    monkeypatch.setattr(writer, "CHUNK", 1000)
    new, old = tmp_path / "new", tmp_path / "old"
    write_dataset(old, [["good old text"]], ByteTokenizer(), "a test")
    before = {path.name: path.read_bytes() for path in old.iterdir()}
    for folder in (new, old):
        with monkeypatch.context() as patch:
            fails(patch, when)
            with pytest.raises(OSError, match="No space left"):
                write_dataset(folder, [[some_text(0, 5000)]], ByteTokenizer(), "a test")
    assert not new.exists()
    assert {path.name: path.read_bytes() for path in old.iterdir()} == before
    write_dataset(old, [["better"]], ByteTokenizer(), "a test")
    assert read(old)[1]["train"].tolist() == list(b"bette")


@pytest.mark.parametrize("operations", range(5))
def test_killed_while_files_are_moved_it_is_refused_or_whole(tmp_path, monkeypatch, operations):
    """The process is killed after `done` of the last four operations, an unlink and three renames."""
    before, after = "good old text", "new text, and more of it"
    write_dataset(tmp_path / "set", [[before]], ByteTokenizer(), "a test")
    left = iter(range(operations))

    def until_killed(operation):
        def call(*arguments, **options):
            if next(left, None) is None:
                raise KeyboardInterrupt
            return operation(*arguments, **options)

        return call

    with monkeypatch.context() as patch, contextlib.suppress(KeyboardInterrupt):
        patch.setattr(Path, "unlink", until_killed(Path.unlink))
        patch.setattr(Path, "replace", until_killed(Path.replace))
        write_dataset(tmp_path / "set", [[after]], ByteTokenizer(), "a test")
    if operations in (0, 4):
        dataset = open_dataset(str(tmp_path), "set", block_size=1, eval_iters=1)
        ids = np.concatenate([dataset.splits[name].shards[0] for name in ("train", "val")])
        assert bytes(ids.astype(np.uint8)).decode() == (after if operations else before)
    else:
        with pytest.raises(UserError, match=r"has no val\.bin|train\.bin is damaged"):
            open_dataset(str(tmp_path), "set", block_size=1, eval_iters=1)


def test_a_file_size_limit_is_one_line_and_leaves_nothing(kqv, tmp_path):
    (tmp_path / "text.txt").write_text(some_text(0, 50_000), encoding="utf-8")

    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))

    result = kqv("prepare/text.py", "--input=text.txt", "--tokenizer=byte", "--data_dir=.", preexec_fn=limit)
    assert result.returncode == 2 and result.stderr.count("\n") == 1
    assert "File too large" in result.stderr and "train.bin" in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["text.txt"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_killed_while_it_writes_it_leaves_nothing_that_looks_whole(tmp_path, number):
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"text": "a"}\n' * 400_000, encoding="utf-8")
    command = [sys.executable, ROOT / "prepare/text.py", f"--input={rows}", "--tokenizer=byte", "--data_dir=data"]
    process = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    while process.poll() is None and not list(tmp_path.glob("data/rows/unfinished-*/train.bin")):
        time.sleep(0.01)
    process.send_signal(number)
    stdout, stderr = process.communicate(timeout=60)
    if number == signal.SIGINT:
        assert (process.returncode, stdout, stderr) == (130, "", "error: interrupted\n")
        assert not (tmp_path / "data/rows").exists()
    else:
        assert all(path.name.startswith("unfinished-") for path in (tmp_path / "data/rows").iterdir())
        with pytest.raises(UserError, match=r"has no train\.bin"):
            open_dataset(str(tmp_path / "data"), "rows", block_size=1, eval_iters=1)


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_cannot_be_written(kqv, tmp_path):
    (tmp_path / "text.txt").write_text("text", encoding="utf-8")
    (tmp_path / "data").mkdir(mode=0o500)
    result = kqv("prepare/text.py", "--input=text.txt", "--tokenizer=byte", "--data_dir=data")
    assert result.returncode == 2 and "Permission denied" in result.stderr and result.stderr.count("\n") == 1


# -- the commands --


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_lists_the_options(kqv, script):
    result = kqv(f"prepare/{script}.py", "--help")
    assert result.returncode == 0 and not result.stderr
    assert "Make the data set" in result.stdout or "Make a data set" in result.stdout
    assert "--data_dir" in result.stdout


@pytest.mark.parametrize(
    "script, arguments, complaint",
    [
        ("python_stdlib", ["--tokeniser=byte"], "did you mean 'tokenizer'?"),
        ("python_stdlib", ["--tokenizer=gpt2"], "char | byte"),
        ("text", [], "--input=FILE"),
        ("text", ["--input="], "--input=FILE"),
        ("text", ["--input=absent.txt"], "absent.txt"),
        ("text", ["--input=binary"], "binary: not text"),
        ("text", ["--input=latin1.txt"], "latin1.txt: not UTF-8"),
        ("text", ["--input=broken.txt.gz"], "broken.txt.gz: not a gzip file, or damaged"),
        ("text", ["--input=truncated.txt.gz"], "truncated.txt.gz: the gzip file is cut short"),
        ("text", ["--input=empty.txt"], "too little text in empty.txt"),
        ("text", ["--input=empty.txt", "--tokenizer=char"], "no text"),
        ("text", ["--input=folder"], "no text in folder"),
        ("text", ["--input=short.txt"], "nothing for the train split"),
        ("text", ["--input=good.txt", "--val_fraction=0"], "val_fraction=0.0: must be above 0"),
        ("text", ["--input=good.txt", "--val_fraction=nan"], "val_fraction=nan"),
        ("text", ["--input=good.txt", "--name=../up"], "name='../up'"),
        ("text", ["--input=.hidden"], "name=''"),
        ("text", ["--input=good.txt", "--input=short.txt"], "--name=NAME"),
        ("text", ["--input=-"], "--name=NAME"),
        ("text", ["--input=good.txt", "--data_dir=good.txt"], "good.txt"),
        ("text", ["--input=bad.jsonl"], "bad.jsonl, line 3: "),
        ("text", ["--input=surrogate.jsonl"], "surrogate.jsonl, line 1: character 2 of the text is U+D800"),
        ("text", ["--input=good.jsonl", "--field=body"], "line 1: no text in the field 'body'"),
        ("text", ["--input=latin1.jsonl"], "latin1.jsonl: not UTF-8"),
        ("text", ["--input=bad.parquet"], "bad.parquet: "),
        ("shakespeare_char", ["--input=latin1.txt"], "latin1.txt: not UTF-8"),
        ("shakespeare_char", ["--input=empty.txt"], "empty.txt is empty"),
        ("shakespeare_char", ["--input=absent.txt"], "error: absent.txt: No such file or directory"),
        ("openwebtext", ["--limit=0"], "limit=0: must be at least 1"),
    ],
)
def test_what_cannot_work_is_one_line(tmp_path, monkeypatch, capfd, gpt2_bpe, script, arguments, complaint):
    files = {
        "good.txt": b"a good text, long enough",
        ".hidden": b"a good text, long enough",
        "short.txt": b"a",
        "empty.txt": b"",
        "binary": b"\x7fELF\0\0\0",
        "latin1.txt": "é".encode("latin1"),
        "broken.txt.gz": b"not gzip at all",
        "truncated.txt.gz": gzip.compress(b"some text" * 1000)[:-20],
        "good.jsonl": b'{"text": "a"}\n',
        "bad.jsonl": b'{"text": "a"}\n\n{"text": 3}\n',
        "surrogate.jsonl": b'{"text": "ab\\ud800"}\n',
        "latin1.jsonl": '{"text": "é"}'.encode("latin1"),
        "bad.parquet": b"PAR1 or not",
    }
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    (tmp_path / "folder").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [script, "--data_dir=data", *arguments])
    with pytest.raises(SystemExit) as stop:  # in this process, which is faster
        runpy.run_path(str(ROOT / "prepare" / f"{script}.py"), run_name="__main__")
    out, err = capfd.readouterr()
    assert stop.value.code == 2 and not out
    assert err.startswith("error: ") and err.count("\n") == 1 and complaint in err
    assert not (tmp_path / "data").exists() or not list((tmp_path / "data").iterdir())


def test_text_from_a_folder(kqv, tmp_path):
    folder = tmp_path / "my texts"
    (folder / "deep").mkdir(parents=True)
    (folder / ".hidden").write_text("hidden", encoding="utf-8")
    (folder / "picture.png").write_bytes(b"\x89PNG\r\n\x1a\n\0\0")
    (folder / "truncated.txt.gz").write_bytes(gzip.compress(b"some text" * 1000)[:-20])
    (folder / "b.md").write_text("Bé" * 50, encoding="utf-8")
    (folder / "deep" / "a.txt").write_text("a" * 100, encoding="utf-8")
    (folder / "rows.jsonl.gz").write_bytes(gzip.compress(b'{"text": "%s"}\n\n{"text": "%s"}' % (b"x" * 10, b"y" * 10)))
    result = kqv("prepare/text.py", f"--input={folder}", "--tokenizer=char", "--data_dir=made")
    assert result.returncode == 0, result.stderr
    assert "skipped" in result.stderr and "hidden" not in result.stderr
    assert "picture.png: not UTF-8 text" in result.stderr
    assert "truncated.txt.gz: the gzip file is cut short" in result.stderr
    meta, ids = read(tmp_path / "made" / "my texts")
    assert meta["tokenizer"] == {"kind": "char", "chars": "Baxyé", "end_of_text": True}
    tokenizer, end = from_description(meta["tokenizer"]), "<|endoftext|>"
    assert tokenizer.decode(ids["train"]) == end.join(["Bé" * 45, "a" * 90, "x" * 9, "y" * 9, ""])
    assert tokenizer.decode(ids["val"]) == end.join(["Bé" * 5, "a" * 10, "x", "y", ""])


def next_commands(out: str) -> dict[str, list[str]]:
    """The commands that a prepare command suggests: {"next": its words}, and "with GPUs" on a machine without."""
    return {key: shlex.split(text) for key, text in re.findall(r"^(next|with GPUs): (.*)$", out, re.MULTILINE)}


@pytest.mark.parametrize(
    "script, arguments, driver, config, out_dir",
    [
        ("text", ["--tokenizer=char"], False, "train_shakespeare_char_cpu", "out-my text"),
        ("text", ["--tokenizer=byte"], True, "train_shakespeare_char", "out-my text"),
        ("text", ["--tokenizer=gpt2"], False, "train_shakespeare_char_cpu", "out-my text"),
        ("text", ["--tokenizer=gpt2"], True, "train_shakespeare_char", "out-my text"),
        ("shakespeare_char", [], False, "train_shakespeare_char_cpu", "out-shakespeare-char-cpu"),
        ("shakespeare_char", [], True, "train_shakespeare_char", "out-shakespeare-char"),
        ("shakespeare", [], False, "train_shakespeare_char_cpu", "out-shakespeare"),
    ],
)
def test_the_next_command_suits_this_machine_and_runs(
    command, tmp_path, monkeypatch, gpt2_bpe, script, arguments, driver, config, out_dir
):
    monkeypatch.setattr("kqv.suggest.has_nvidia_driver", lambda: driver)
    (tmp_path / "my text.txt").write_text(some_text(0, 400), encoding="utf-8")  # val is shorter than block_size
    result = command(f"prepare/{script}.py", "--input=my text.txt", "--data_dir=sets", *arguments)
    assert result.code == 0, result.err
    commands = next_commands(result.out)
    assert list(commands) == ["next"]
    python, train, *settings = commands["next"]
    assert (python, train, settings[0]) == ("python", str(ROOT / "train.py"), f"configs/{config}.py")
    tiny = ("--n_layer=1", "--n_head=1", "--n_embd=8", "--batch_size=2", "--max_iters=1", "--eval_iters=1")
    result = command("train.py", *settings, *tiny, "--device=cpu")
    assert result.code == 0, result.err
    assert (tmp_path / out_dir / "ckpt.pt").is_file()
    recorded = json.loads((tmp_path / out_dir / "config.json").read_text(encoding="utf-8"))["data"]
    assert Path(recorded["folder"]) == Path("sets") / ("my text" if script == "text" else script)


def test_the_next_command_of_larger_data(tmp_path, monkeypatch, capsys):
    def suggested(name: str, tokens: int, driver: bool, **configs: str) -> dict[str, list[str]]:
        monkeypatch.setattr("kqv.suggest.has_nvidia_driver", lambda: driver)
        meta = {"tokenizer": {"kind": "gpt2"}, "splits": {"train": {"tokens": tokens}, "val": {"tokens": 10**6}}}
        print_next(ROOT / "data" / name, meta, {"data_dir": "default"}, **configs)
        return {key: words[1:] for key, words in next_commands(capsys.readouterr().out).items()}

    monkeypatch.chdir(ROOT)
    cpu = ["train.py", "configs/train_shakespeare_char_cpu.py", "--dataset=openwebtext", "--out_dir=out-openwebtext"]
    gpu = ["train.py", "configs/train_gpt2.py"]
    own = [*gpu, "--dataset=own", "--out_dir=out-own", "--wandb_log=False"]
    assert suggested("openwebtext", 10**9, True) == {"next": gpu}
    assert suggested("openwebtext", 10**9, False) == {"next": cpu, "with GPUs": gpu}
    assert suggested("openwebtext", 10**6, False) == {"next": cpu}
    assert suggested("own", 10**9, True) == {"next": own}
    finetune = {"next": ["train.py", "configs/finetune_shakespeare.py"]}
    assert suggested("shakespeare", 300_000, True, gpu_config="finetune_shakespeare") == finetune


@pytest.mark.parametrize(
    "script, advice", [("text", "--tokenizer=byte and --tokenizer=char need"), ("shakespeare", "shakespeare_char.py")]
)
def test_without_a_network_the_way_out_is_named(command, tmp_path, monkeypatch, script, advice):
    import requests
    import tiktoken

    def offline(name):
        raise requests.ConnectionError("no network")

    monkeypatch.setattr(tiktoken, "get_encoding", offline)
    (tmp_path / "text.txt").write_text("to be or not to be", encoding="utf-8")
    result = command(f"prepare/{script}.py", "--input=text.txt")
    assert result.code == 2 and result.err.count("\n") == 1
    assert "could not download GPT-2's BPE files" in result.err and advice in result.err


def test_text_from_standard_input(kqv, tmp_path):
    text = some_text(0, 300)
    result = kqv("prepare/text.py", "--input=-", "--name=piped", "--tokenizer=byte", "--data_dir=.", input=text)
    assert result.returncode == 0, result.stderr
    _, ids = read(tmp_path / "piped")
    assert bytes(np.concatenate([ids["train"], ids["val"]]).astype(np.uint8)).decode() == text.replace("\r\n", "\n")


def test_python_stdlib_needs_nothing_and_is_the_same_each_time(kqv, tmp_path):
    for place, tokenizer in (("one", "char"), ("two", "char"), ("bytes", "byte")):
        result = kqv("prepare/python_stdlib.py", f"--tokenizer={tokenizer}", f"--data_dir={place}")
        assert result.returncode == 0 and not result.stderr
        next_command = f"next: python {ROOT / 'train.py'} configs/train_python_stdlib.py --data_dir={place}\n"
        assert result.stdout.endswith(next_command)
    for name in ("train.bin", "val.bin", "meta.json"):
        one, two = ((tmp_path / place / "python_stdlib" / name).read_bytes() for place in ("one", "two"))
        assert one == two
    meta, ids = read(tmp_path / "one" / "python_stdlib")
    assert meta["vocab_size"] < 110
    assert len(ids["train"]) > 4_000_000 and 0.05 < len(ids["val"]) / len(ids["train"]) < 0.2
    ids = np.fromfile(tmp_path / "bytes" / "python_stdlib" / "train.bin", "<u2")
    text = ids[ids < 256].astype(np.uint8).tobytes().decode()
    assert len(text) > 4_000_000 and "\nclass " in text and not text.isascii()


def test_shakespeare_scripts_on_a_text_of_ones_own(kqv, tmp_path, gpt2):
    text = some_text(1, 3000).replace("\r\n", "\n")
    (tmp_path / "input.txt").write_text(text, encoding="utf-8")
    for script, tokenizer in (("shakespeare_char", CharTokenizer("".join(sorted(set(text))))), ("shakespeare", gpt2)):
        result = kqv(f"prepare/{script}.py", "--input=input.txt", "--data_dir=data")
        assert result.returncode == 0, result.stderr
        meta, ids = read(tmp_path / "data" / script)
        assert meta["tokenizer"] == tokenizer.describe()
        assert ids["train"].tolist() == tokenizer.encode(text[: int(len(text) * 0.9)])
        assert ids["val"].tolist() == tokenizer.encode(text[int(len(text) * 0.9) :])


@pytest.mark.parametrize(
    "status, body", [(200, b"<html>an error page</html>"), (404, b"To be"), (200, b"To be or not")]
)
def test_what_is_downloaded_is_checked_before_it_is_used(monkeypatch, status, body):
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(status)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    right = b"To be or not"
    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setattr(documents, "SHAKESPEARE_URL", f"http://127.0.0.1:{server.server_port}/input.txt")
        monkeypatch.setattr(documents, "SHAKESPEARE_SHA256", hashlib.sha256(right).hexdigest())
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        try:
            if body == right:
                assert documents.tiny_shakespeare(None)[0] == right.decode()
            else:
                with pytest.raises((OSError, UserError), match="--input=FILE"):
                    documents.tiny_shakespeare(None)
        finally:
            server.shutdown()


@pytest.mark.parametrize("script", ["openwebtext", "fineweb"])
def test_web_text_from_local_files(kqv, tmp_path, gpt2, script):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    texts = [some_text(seed, 50) for seed in range(130)]
    (tmp_path / "shards").mkdir()
    table = pyarrow.table({"url": ["u"] * 100, "text": texts[:100]})
    parquet.write_table(table, tmp_path / "shards" / "0.parquet")
    rows = "".join(json.dumps({"text": text}) + "\n" for text in texts[100:])
    (tmp_path / "shards" / "1.jsonl").write_text(rows, encoding="utf-8")
    result = kqv(f"prepare/{script}.py", "--input=shards", "--limit=120", "--data_dir=data")
    assert result.returncode == 0, result.stderr
    meta, ids = read(tmp_path / "data" / script)
    assert "first 120 of shards" in meta["source"]
    assert np.count_nonzero(ids["train"] == 50256) + np.count_nonzero(ids["val"] == 50256) == 120
    every = [*ids["val"].tolist(), *ids["train"].tolist()]
    assert every == [i for text in texts[:120] for i in [*gpt2.encode(text), 50256]]  # here val is the first document


def test_progress_is_plain_lines_in_a_pipe(monkeypatch, capsys):
    ticks = iter(range(0, 10**6, 6))
    monkeypatch.setattr(writer.time, "monotonic", lambda: next(ticks))
    monkeypatch.setattr(sys, "stderr", stderr := io.StringIO())
    parts = {"train": (np.zeros(1000, np.uint16), 3000)}
    assert list(writer.with_progress(iter([parts] * 4), None)) == [parts] * 4
    assert stderr.getvalue() == "2,000 tokens so far\n4,000 tokens so far\n"


def test_a_package_with_the_name_of_one_of_our_rooms_does_no_harm(kqv, tmp_path):
    (tmp_path / "installed").mkdir()
    for name in ("config", "tokenizer", "data", "record"):
        (tmp_path / "installed" / f"{name}.py").write_text("raise SystemExit('not ours')\n")
    result = kqv("prepare/text.py", "--help", env={"PYTHONPATH": str(tmp_path / "installed")})
    assert result.returncode == 0 and "--tokenizer" in result.stdout, result.stderr


def test_a_byte_order_mark_is_no_text(command, tmp_path):
    (tmp_path / "marked.txt").write_bytes(b"\xef\xbb\xbf" + 50 * b"hello world\n")
    (tmp_path / "marked.jsonl").write_bytes(b"\xef\xbb\xbf" + b'{"text": "hello world"}\n' * 50)
    for name in ("marked.txt", "marked.jsonl"):
        result = command("prepare/text.py", f"--input={name}", "--tokenizer=char", "--name=x", "--data_dir=.")
        assert result.code in (0, None), result.err
        meta = json.loads((tmp_path / "x" / "meta.json").read_text(encoding="utf-8"))
        assert set(meta["tokenizer"]["chars"]) <= set("hello world\n")
