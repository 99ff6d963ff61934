"""prepare/tokenizer.py: a BPE of one's own, against transformers; and the data and models made with it."""

import json
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kqv import writer
from kqv.repositories import FIM
from kqv.tokenizer import JsonTokenizer, from_description
from kqv.writer import write_dataset
from tests.conftest import ROOT

FROM_OUR_SOURCES = [f"--input={ROOT / name}" for name in ("kqv", "tests", "prepare", "model.py", "train.py")]
FROM_OUR_SOURCES += [f"--special={token}" for token in FIM]
texts = st.text(st.characters(exclude_categories=["Cs"]))
# wrong cuts would show here: runs of spaces and breaks, contractions, digits, marks, controls, specials
awkward = st.text(st.sampled_from("ab'st 01 .,!\n\n\r\t\v\x1c\x1f\x85\xa0\u2028\u3000éñ漢字🙂\u0301\u200d<|>"))
pieces = st.lists(st.one_of(texts, awkward, st.sampled_from(["<|endoftext|>", *FIM, "def f(self):\n    return"])))


@pytest.fixture(scope="session")
def own_bpe(tmp_path_factory) -> Path:
    """A tokenizer.json with 4,096 tokens, learned from the project's own sources."""
    folder = tmp_path_factory.mktemp("own")
    words = [sys.executable, ROOT / "prepare/tokenizer.py", *FROM_OUR_SOURCES, "--name=bpe", f"--data_dir={folder}"]
    subprocess.run(words, check=True, capture_output=True)
    return folder / "bpe" / "tokenizer.json"


@pytest.fixture(scope="session")
def ours(own_bpe) -> JsonTokenizer:
    return JsonTokenizer(own_bpe.read_text(encoding="utf-8"))


def test_ids_special_tokens_bytes_merges(ours):
    assert (ours.vocab_size, ours.end_of_text) == (4096, 0)
    assert [ours.bpe.token_to_id(token) for token in FIM] == [1, 2, 3]
    assert sorted(ours.token_bytes[4:260]) == [bytes([byte]) for byte in range(256)]
    assert len(set(ours.token_bytes)) == 4096 and all(len(token) > 1 for token in ours.token_bytes[260:])
    assert len(ours.encode("    def __init__(self):\n        return")) < 10


def test_every_text_is_the_same_here_and_in_transformers(own_bpe, ours):
    from transformers import PreTrainedTokenizerFast

    theirs = PreTrainedTokenizerFast(tokenizer_file=str(own_bpe))

    @given(pieces)
    def check(parts):
        text = "".join(parts)
        ids = ours.encode_special(text)
        assert ids == ours.encode_prompt(text) == theirs(text).input_ids
        assert ours.decode(ids) == text == theirs.decode(ids)
        assert ids.count(0) == text.count("<|endoftext|>")
        plain = ours.encode(text)  # special tokens in a file are text
        assert min(plain, default=4) > 3 and ours.decode(plain) == text == theirs.decode(plain)
        assert plain == theirs(text, split_special_tokens=True).input_ids

    check()


@given(pieces, st.integers(0, 9))
def test_where_text_is_cut_makes_no_difference(ours, parts, size):
    text = "".join(parts)
    assert ours.has_gpt2_words
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(writer, "CHUNK", size)
        chunks = list(writer.chunks(parts, writer.WORD_END))
    assert "".join(chunks) == text
    assert [index for chunk in chunks for index in ours.encode(chunk)] == ours.encode(text)


@pytest.mark.parametrize("separator", ["\x1c", "\x1f", "\x85", "\u2028", "\xa0", "\v", "\n\t"])
def test_separators_end_words_as_in_the_tokenizers_pattern(separator):
    """Learned from a text in which they follow a sign, so that a cut inside a word would change the ids."""
    text = f"a!{separator}b " * 300 + "bb bb bb"
    learned = runpy.run_path(str(ROOT / "prepare/tokenizer.py"))["train_bpe"]([text], 259, ())
    tokenizer = JsonTokenizer(learned)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(writer, "CHUNK", 2)
        chunks = list(writer.chunks([text], writer.WORD_END))
    assert [index for chunk in chunks for index in tokenizer.encode(chunk)] == tokenizer.encode(text)
    assert len(chunks) > 100


@pytest.mark.parametrize(
    "part, changed",
    [
        ("pre_tokenizer", {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}),
        ("pre_tokenizer", {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}),
        ("pre_tokenizer", None),
        ("normalizer", {"type": "NFC"}),
    ],
)
def test_texts_of_other_words_are_not_cut(own_bpe, tmp_path, monkeypatch, part, changed):
    tokenizer = JsonTokenizer(json.dumps(json.loads(own_bpe.read_text(encoding="utf-8")) | {part: changed}))
    assert not tokenizer.has_gpt2_words
    encoded = []
    monkeypatch.setattr(writer, "CHUNK", 10)
    monkeypatch.setattr(tokenizer, "encode_array", lambda text: encoded.append(text) or np.array(tokenizer.encode("a")))
    monkeypatch.setattr(tokenizer, "encode", lambda text: [200])
    write_dataset(tmp_path / "set", [["some words and " * 10]], tokenizer, "a test", workers=1)
    assert sum(map(len, encoded)) == 150 and len(encoded) == 2  # train and val


def test_a_token_that_holds_a_space_is_not_cut(own_bpe):
    from tokenizers import AddedToken, Tokenizer

    bpe = Tokenizer.from_file(str(own_bpe))
    bpe.add_tokens([AddedToken("in order", normalized=False)])
    assert not JsonTokenizer(bpe.to_str()).has_gpt2_words


@pytest.mark.parametrize("threads", ["1", "2", "7"])
def test_the_same_text_gives_the_same_file(kqv, tmp_path, own_bpe, threads):
    env = {"RAYON_NUM_THREADS": threads, "TOKENIZERS_PARALLELISM": "true", "PYTHONHASHSEED": threads}
    done = kqv("prepare/tokenizer.py", *FROM_OUR_SOURCES, "--data_dir=.", env=env)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "kqv-bpe" / "tokenizer.json").read_bytes() == own_bpe.read_bytes()


@pytest.mark.parametrize(
    "arguments, complaint",
    [
        ([], "--input=FILE"),
        (["--input="], "--input=FILE"),
        (["--input=absent"], "'absent': no such file"),
        (["--input=latin1.txt"], "latin1.txt: not UTF-8"),
        (["--input=text.txt"], "vocab_size=4096: the text has pairs for no more than 26"),
        (["--input=empty.txt"], "no more than 257; pass --vocab_size=257"),
        (["--input=text.txt", "--vocab_size=256"], "the bytes and special tokens alone are 257"),
        (["--input=text.txt", "--special=<a>", "--special=<a>"], "special='<a>'"),
        (["--input=text.txt", "--special=<|endoftext|>"], "special='<|endoftext|>'"),
        (["--input=text.txt", "--special=the"], "special='the': must be like <|name|>"),
        (["--input=text.txt", "--name=../up"], "name='../up'"),
        (["--input=text.txt", "--code"], "text.txt: no such folder"),
        (["--input=text.txt", "--vocabsize=9"], "did you mean 'vocab_size'?"),
    ],
)
def test_what_cannot_work_is_one_line(command, tmp_path, arguments, complaint):
    (tmp_path / "text.txt").write_text("the theme of these", encoding="utf-8")
    (tmp_path / "empty.txt").write_text("", encoding="utf-8")
    (tmp_path / "latin1.txt").write_bytes("é".encode("latin1"))
    done = command("prepare/tokenizer.py", *arguments, "--data_dir=data")
    assert done.code == 2 and not done.out and not (tmp_path / "data").exists()
    assert done.err.startswith("error: ") and done.err.count("\n") == 1 and complaint in done.err


def test_the_size_that_the_message_names_is_enough(command, tmp_path):
    (tmp_path / "my text.txt").write_text("the theme of these\n" * 20, encoding="utf-8")
    failed = command("prepare/tokenizer.py", "--input=my text.txt", "--data_dir=data")
    size = failed.err.split("--vocab_size=")[1].strip()
    done = command("prepare/tokenizer.py", "--input=my text.txt", "--data_dir=data", f"--vocab_size={size}")
    assert done.code == 0 and f"{size} tokens" in done.out


def test_a_model_carries_the_tokenizer_from_text_to_export(command, train, tmp_path):
    """The commands that are suggested run, and the model needs neither the data nor the tokenizer's file."""
    from transformers import AutoTokenizer

    (tmp_path / "my text.txt").write_text("the queries and the keys of these tokens\n" * 200, encoding="utf-8")
    out = command("prepare/tokenizer.py", "--input=my text.txt", "--vocab_size=280", "--data_dir=data").out
    script, *words = shlex.split(out.split("next: python ")[1])
    assert script == str(ROOT / "prepare/text.py")
    done = command(script, *words)
    assert done.code == 0, done.err
    meta = json.loads((tmp_path / "data" / "my text" / "meta.json").read_text(encoding="utf-8"))
    tokenizer = from_description(meta["tokenizer"])
    ids = np.fromfile(tmp_path / "data" / "my text" / "train.bin", "<u2")
    assert meta["vocab_size"] == 280 and tokenizer.decode(ids.tolist()).startswith("the queries and")

    done = train("--dataset=my text", "--data_dir=data", "--max_iters=2")
    assert done.code == 0, done.err
    (tmp_path / "data").rename(tmp_path / "elsewhere")
    sampled = command("sample.py", "--start=the<|endoftext|>keys", "--num_samples=1", "--max_new_tokens=9")
    assert sampled.code == 0 and sampled.out.startswith("the<|endoftext|>keys"), sampled.err
    done = command("export.py", "out", "exported")
    assert done.code == 0, done.err
    theirs = AutoTokenizer.from_pretrained(tmp_path / "exported")
    text = "the keys\n\tof  these<|endoftext|>"
    assert theirs(text).input_ids == tokenizer.encode_prompt(text) and theirs.eos_token == "<|endoftext|>"


def test_other_data_than_the_tokenizers_name_the_next_command(command, train, data_dir, tmp_path):
    (tmp_path / "t.txt").write_text("the queries and the keys of these tokens\n" * 200, encoding="utf-8")
    for script, words in (("tokenizer", ["--vocab_size=270"]), ("text", ["--tokenizer=t-bpe", "--name=own"])):
        assert command(f"prepare/{script}.py", "--input=t.txt", "--data_dir=.", *words).code == 0
    assert train("--max_iters=1").code == 0
    done = train("--dataset=own", "--data_dir=.", "--init_from=resume", "--max_iters=2")
    assert done.code == 2 and done.err.count("\n") == 1 and "its tokenizer is not what the checkpoint" in done.err
    done = command("prepare/text.py", "--input=t.txt", "--tokenizer=absent", "--data_dir=.")
    assert done.code == 2 and done.err == "error: absent: no such folder\n"


def test_a_missing_package_is_named(kqv, tmp_path):
    (tmp_path / "t.txt").write_text("text", encoding="utf-8")
    (tmp_path / "absent").mkdir()
    block = "import sys\nsys.modules['tokenizers'] = None\n"
    (tmp_path / "absent" / "sitecustomize.py").write_text(block, encoding="utf-8")
    done = kqv("prepare/tokenizer.py", "--input=t.txt", env={"PYTHONPATH": str(tmp_path / "absent")})
    assert done.returncode == 2 and done.stderr.endswith("'tokenizers': pip install tokenizers\n"), done.stderr


@pytest.mark.parametrize("script", sorted(path.stem for path in (ROOT / "prepare").glob("*.py")))
def test_scripts_beside_prepare_code_still_find_pythons_code(script, kqv, tmp_path):
    """As libraries do that import pdb."""
    (tmp_path / "check").mkdir()
    hook = (
        "import atexit, sys\natexit.register(lambda: print(__import__('code').InteractiveConsole, list(sys.modules)))\n"
    )
    (tmp_path / "check" / "sitecustomize.py").write_text(hook, encoding="utf-8")
    done = kqv(f"prepare/{script}.py", "--absent", env={"PYTHONPATH": str(tmp_path / "check")})
    assert done.returncode == 2 and "InteractiveConsole" in done.stdout, done.stderr
    assert "'torch'" not in done.stdout  # a misspelt flag is answered at once
