import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kqv.errors import UserError
from kqv.meta import read_meta_pkl
from kqv.tokenizer import ByteTokenizer, CharTokenizer, GPT2Tokenizer, from_description

texts = st.text(st.characters(exclude_categories=["Cs"]))
# wrong cuts of BPE text would show here: runs of spaces and breaks, contractions, digits, marks, controls, specials
awkward = st.text(st.sampled_from("ab'st 01 .,\n\n\r\t\v\x1c\x85\xa0\u2028\u3000éñ漢字🙂\u0301\u200d<|>"))


@pytest.fixture(scope="module")
def gpt2(gpt2_bpe):
    return GPT2Tokenizer()


@given(texts.filter(bool), st.booleans())
def test_characters_survive_the_round_trip(text, end_of_text):
    tokenizer = CharTokenizer("".join(sorted(set(text))), end_of_text)
    ids = tokenizer.encode(text)
    assert len(ids) == len(text) and max(ids) < tokenizer.vocab_size == len(set(text)) + end_of_text
    assert tokenizer.decode(ids) == text and tokenizer.decode_bytes(ids) == text.encode()
    assert from_description(tokenizer.describe()).encode(text) == ids


@given(texts)
def test_bytes_survive_the_round_trip(text):
    tokenizer = ByteTokenizer()
    assert bytes(tokenizer.encode(text)) == text.encode() == tokenizer.decode_bytes(tokenizer.encode(text))
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert from_description(tokenizer.describe()).encode(text) == tokenizer.encode(text)


def test_gpt2_is_tiktokens(gpt2):
    import tiktoken

    reference = tiktoken.get_encoding("gpt2")

    @given(st.one_of(texts, awkward, st.just("a <|endoftext|> b")))
    def check(text):
        ids = gpt2.encode(text)
        assert ids == reference.encode_ordinary(text) == gpt2.encode_array(text).tolist()
        assert gpt2.decode(ids) == text and gpt2.decode_bytes(ids) == text.encode()
        assert gpt2.encode_prompt(text) == reference.encode(text, allowed_special="all")

    check()
    assert (gpt2.vocab_size, gpt2.end_of_text) == (50257, 50256)
    assert gpt2.encode("Hello world") == [15496, 995]  # as in OpenAI's own examples
    assert from_description(gpt2.describe()).encode("Hello") == [15496]


def test_end_of_text_is_an_id_in_prompts_only(gpt2):
    for tokenizer in (CharTokenizer("<|endoftxabc>", end_of_text=True), ByteTokenizer(), gpt2):
        end, a, b = tokenizer.end_of_text, tokenizer.encode("a"), tokenizer.encode("b")
        assert tokenizer.encode_prompt("a<|endoftext|>b<|endoftext|>") == [*a, end, *b, end]
        assert tokenizer.encode_prompt("<|endoftext|>") == [end] and tokenizer.encode_prompt("") == []
        assert end not in tokenizer.encode("<|endoftext|>")
        assert tokenizer.decode_bytes([*a, end, *b]) == b"a<|endoftext|>b"
    without = CharTokenizer("<|endoftx>")
    assert without.end_of_text is None
    assert without.encode_prompt("<|endoftext|>") == without.encode("<|endoftext|>")


def test_half_a_character_is_shown_as_a_replacement(gpt2):
    assert gpt2.decode(gpt2.encode("🙂")[:1]) == ByteTokenizer().decode([0xF0, 0x9F]) == "\ufffd"


def test_what_cannot_be_encoded_is_named(gpt2):
    with pytest.raises(UserError, match=r"2 of the text's characters .*: '\?', 'é'$"):
        CharTokenizer("abc").encode("a?bécé?")
    with pytest.raises(UserError) as error:
        CharTokenizer("abc").encode("".join(map(chr, range(0x400, 0x500))))
    assert len(str(error.value)) < 200 and "256 of the text" in str(error.value)
    with pytest.raises(UserError, match="ud83d"):
        CharTokenizer("abc").encode("a\ud83d")
    for tokenizer in (ByteTokenizer(), gpt2):
        with pytest.raises(UserError, match=r"character 1 of the text is U\+D83D"):
            tokenizer.encode("a\ud83d")


def test_ids_that_do_not_exist_are_named(gpt2):
    for tokenizer in (CharTokenizer("ab"), ByteTokenizer(), gpt2):
        for index in (-1, tokenizer.vocab_size, 10**12):
            with pytest.raises(UserError, match=f"token id {index} "):
                tokenizer.decode([0, index])


@pytest.mark.parametrize(
    "description",
    [
        *(None, 3, "gpt2", [], {}, {"kind": "bpe"}, {"kind": ["char"]}, {"kind": "char"}),
        {"kind": "char", "chars": ["a"], "end_of_text": False},
        {"kind": "char", "chars": "ab", "end_of_text": 1},
        {"kind": "char", "chars": "aba", "end_of_text": False},
        {"kind": "char", "chars": "", "end_of_text": True},
        {"kind": "char", "chars": "a\ud800", "end_of_text": False},
    ],
)
def test_only_descriptions_are_descriptions(description):
    with pytest.raises(UserError):
        from_description(description)


def test_gpt2_without_a_network_is_one_clear_line(kqv, tmp_path):
    (tmp_path / "text.txt").write_text("some text\n", encoding="utf-8")
    closed = "http://127.0.0.1:9"  # a proxy that does not exist, in case the machine has a network
    env = {"TIKTOKEN_CACHE_DIR": str(tmp_path / "empty"), "HTTPS_PROXY": closed, "https_proxy": closed}
    result = kqv("prepare/text.py", "--input=text.txt", "--tokenizer=gpt2", f"--data_dir={tmp_path}", env=env)
    assert result.returncode == 2 and not result.stdout
    assert result.stderr.startswith("error: could not download GPT-2's BPE files")
    assert "TIKTOKEN_CACHE_DIR" in result.stderr and result.stderr.count("\n") == 1


# -- nanoGPT's meta.pkl --


def meta(chars: str) -> dict:
    return {"vocab_size": len(chars), "itos": dict(enumerate(chars)), "stoi": {c: i for i, c in enumerate(chars)}}


@given(texts.filter(bool).map(lambda text: "".join(sorted(set(text)))), st.sampled_from(range(6)))
def test_meta_pkl_becomes_a_description(tmp_path_factory, chars, protocol):
    path = tmp_path_factory.getbasetemp() / "meta.pkl"
    path.write_bytes(pickle.dumps(meta(chars), protocol))
    assert read_meta_pkl(path) == {"kind": "char", "chars": chars, "end_of_text": False}


class Hostile:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.mark.parametrize("protocol", range(6))
def test_meta_pkl_never_runs_code(tmp_path, protocol):
    path, trace = tmp_path / "meta.pkl", tmp_path / "trace"
    path.write_bytes(pickle.dumps(meta("ab") | {"more": Hostile(trace)}, protocol))
    with pytest.raises(UserError, match=r"meta.pkl: not a meta.pkl of nanoGPT's: \w+ is more than"):
        read_meta_pkl(path)
    assert not trace.exists()
    pickle.loads(path.read_bytes())["more"].close()
    assert trace.exists()  # so the pickle does run code if it is loaded


@pytest.mark.parametrize(
    "content",
    [
        *(b"", b"junk", b"\x80", pickle.dumps([1]), pickle.dumps({}), pickle.dumps(meta("abc"))[:-9]),
        pickle.dumps(meta("abc") | {"vocab_size": 4}),
        pickle.dumps(meta("abc") | {"itos": {0: "a", 1: "b", 3: "c"}}),
        pickle.dumps(meta("abc") | {"stoi": {"a": 0, "b": 1}}),
        pickle.dumps({"vocab_size": 2, "itos": {0: "a", 1: "a"}, "stoi": {"a": 1}}),
        pickle.dumps({"vocab_size": 1, "itos": {0: "word"}, "stoi": {"word": 0}}),
        pickle.dumps(meta("")),
        b"}r\xff\xff\xff\x7f.",  # makes the unpickler ask for 32 GB
        b"\x80\x04\x95" + b"\xff" * 8 + b"}.",  # a frame longer than any memory
        b"X\xff\xff\xff\x7fabc.",
        b"}" + b"(" * 10_000 + b"t" * 10_000 + b"K\x00s.",
    ],
)
def test_bad_meta_pkl_is_one_line(tmp_path, content):
    path = tmp_path / "meta.pkl"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"meta\.pkl: ") as error:
        read_meta_pkl(path)
    assert len(str(error.value)) < 300


@given(st.data())
def test_damaged_meta_pkl_is_refused_or_a_vocabulary(tmp_path_factory, data):
    content = bytearray(pickle.dumps(meta("abcdef"), data.draw(st.sampled_from(range(6)))))
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path_factory.getbasetemp() / "damaged.pkl"
    path.write_bytes(content)
    try:
        description = read_meta_pkl(path)
    except UserError:
        return
    assert len(description["chars"]) == 6
