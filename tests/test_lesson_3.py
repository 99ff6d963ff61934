"""lessons/3_makemore.py against torch's own layers, and counting against gradient descent."""

import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tests.lessons import load

pytestmark = pytest.mark.usefixtures("seed_and_one_thread")
FILE = Path(__file__).resolve().parent.parent / "lessons" / "3_makemore.py"
NAMES = "emma olivia ava isabella sophia mia amelia evelyn ella scarlett grace lily aria zoe nora mila luna"
WORDS = NAMES.split()


@pytest.fixture(scope="module")
def lesson():
    return load("3_makemore")


@pytest.fixture
def data(lesson):
    letters = "." + "".join(sorted(set("".join(WORDS))))
    return letters, *lesson.encode(WORDS, letters)


def test_encode(lesson):
    idx, targets = lesson.encode(["ab", "b"], ".ab")
    assert idx.tolist() == [[0, 1, 2], [0, 2, 0]]
    assert targets.tolist() == [[1, 2, 0], [2, 0, -1]]


def test_the_bigram_by_descent_ends_where_counting_ends(lesson, data):
    letters, idx, targets = data
    V, T = len(letters), idx.size(1)
    counted, found = lesson.init("counted", V, T), lesson.init("bigram", V, T)
    lesson.count(counted, idx, targets, smoothing=0)
    least = lesson.losses("counted", counted, idx, targets).nanmean()
    # by hand: the mean over all pairs of log(how often the first letter) - log(how often the pair)
    pairs = [pair for word in WORDS for pair in zip("." + word, word + ".", strict=True)]
    firsts = [first for first, _ in pairs]
    by_hand = sum(math.log(firsts.count(pair[0]) / pairs.count(pair)) for pair in pairs) / len(pairs)
    assert least == pytest.approx(by_hand, abs=1e-5)
    lesson.train("bigram", found, idx, targets, steps=1500)
    reached = lesson.losses("bigram", found, idx, targets).nanmean()
    assert least <= reached < least + 1e-3


def test_smoothing_gives_every_pair_a_chance(lesson, data):
    letters, idx, targets = data
    p = lesson.init("counted", len(letters), idx.size(1))
    lesson.count(p, idx, targets)
    probs = p["W"].exp()
    assert probs.min() > 0
    torch.testing.assert_close(probs.sum(dim=1), torch.ones(len(letters)))


def test_windows_are_the_last_letters(lesson):
    p = {"wte": torch.arange(5.0)[:, None]}
    assert lesson.windows(p, torch.tensor([[0, 3, 4, 2]])).tolist() == [[[0, 0, 0], [0, 0, 3], [0, 3, 4], [3, 4, 2]]]


def test_mlp_heads_and_biases_are_torchs(lesson):
    idx = torch.randint(27, (3, 10))
    for name in ("mlp", "batchnorm", "gru"):
        p = lesson.init(name, 27, 10)
        for key in ("b1", "b2", "bx"):
            if key in p:
                p[key].data.normal_()  # training cannot tell + b from - b
        if name == "gru":
            h = lesson.states(p, F.embedding(idx, p["wte"]))
        elif name == "mlp":
            h = torch.tanh(F.linear(lesson.windows(p, idx), p["W1"].T, p["b1"]))
        else:
            z = F.linear(lesson.windows(p, idx), p["W1"].T).flatten(0, 1)
            h = torch.tanh(F.batch_norm(z, p["mean"], p["var"], p["gain"], p["b1"])).view(3, 10, -1)
        torch.testing.assert_close(lesson.MODELS[name][0](p, idx), F.linear(h, p["W2"].T, p["b2"]))


def test_batch_norm_is_torchs(lesson):
    p = lesson.init("batchnorm", 27, 10)
    H = lesson.HIDDEN
    peer = nn.BatchNorm1d(H)
    with torch.no_grad():
        for ours, theirs in ((p["gain"], peer.weight), (p["b1"], peer.bias)):
            theirs.copy_(ours.normal_())
    for scale in (3, 0.01, 3):  # at 0.01 the 1e-5 that is added to the variance shows
        h = (torch.randn(50, H) * scale + scale / 3).requires_grad_()
        ours, theirs = lesson.normalise(p, h, training=True), peer(h)
        torch.testing.assert_close(ours, theirs)
        downstream = torch.randn_like(h)
        torch.testing.assert_close(
            torch.autograd.grad(ours, (h, p["gain"], p["b1"]), downstream),
            torch.autograd.grad(theirs, (h, peer.weight, peer.bias), downstream),
            atol=1e-4,
            rtol=1e-4,
        )
    torch.testing.assert_close(p["mean"], peer.running_mean)
    torch.testing.assert_close(p["var"], peer.running_var)
    peer.eval()
    torch.testing.assert_close(lesson.normalise(p, h, training=False), peer(h))


def test_gru_is_torchs(lesson):
    p = lesson.init("gru", 27, 10)
    peer = nn.GRU(lesson.C, lesson.HIDDEN, batch_first=True)
    with torch.no_grad():
        for ours, theirs in (("bx", peer.bias_ih_l0), ("bh", peer.bias_hh_l0)):
            theirs.copy_(p[ours].normal_())
        peer.weight_ih_l0.copy_(p["Wx"].T)
        peer.weight_hh_l0.copy_(p["Wh"].T)
    x = torch.randn(4, 9, lesson.C)
    torch.testing.assert_close(lesson.states(p, x), peer(x)[0])


def test_attention_is_torchs(lesson):
    C = lesson.C
    peer = nn.MultiheadAttention(C, lesson.H, bias=False, batch_first=True)
    x = torch.randn(4, 9, C)
    mask = nn.Transformer.generate_square_subsequent_mask(9)
    ours = lesson.attend(x, peer.in_proj_weight.T, peer.out_proj.weight.T)
    torch.testing.assert_close(ours, peer(x, x, x, attn_mask=mask)[0])
    q, k, v = (x @ peer.in_proj_weight.T).view(4, 9, 3, lesson.H, -1).permute(2, 0, 3, 1, 4)
    y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    torch.testing.assert_close(ours, y.transpose(1, 2).flatten(2) @ peer.out_proj.weight.T)

    p, idx = lesson.init("attention", 27, 9), torch.randint(27, (4, 9))
    p |= {"qkv": peer.in_proj_weight.T, "proj": peer.out_proj.weight.T}
    x = F.embedding(idx, p["wte"]) + p["wpe"]
    y = x + peer(x, x, x, attn_mask=mask)[0]
    torch.testing.assert_close(lesson.attention(p, idx), F.linear(y, p["head"].T), atol=1e-4, rtol=1e-4)


def test_transformer_is_torchs(lesson):
    V, T, C = 27, 9, lesson.C
    p = lesson.init("transformer", V, T)
    layer = nn.TransformerEncoderLayer(C, lesson.H, 4 * C, 0.0, F.gelu, batch_first=True, norm_first=True, bias=False)
    peer = nn.TransformerEncoder(layer, lesson.LAYERS, enable_nested_tensor=False)
    with torch.no_grad():
        for i, block in enumerate(peer.layers):
            block.self_attn.in_proj_weight.copy_(p[f"qkv{i}"].T)
            block.self_attn.out_proj.weight.copy_(p[f"proj{i}"].T)
            block.linear1.weight.copy_(p[f"up{i}"].T)
            block.linear2.weight.copy_(p[f"down{i}"].T)
    idx = torch.randint(V, (4, T))
    x = peer(p["wte"][idx] + p["wpe"], mask=nn.Transformer.generate_square_subsequent_mask(T))
    expected = F.layer_norm(x, (C,)) @ p["head"]
    torch.testing.assert_close(lesson.transformer(p, idx), expected, atol=1e-4, rtol=1e-4)


def test_no_model_sees_what_it_is_to_predict(lesson):
    for name, (model, _, _) in lesson.MODELS.items():
        p = lesson.init(name, 27, 10)
        idx = torch.randint(1, 27, (3, 10))
        other = idx.clone()
        other[:, -1] = idx[:, -1] % 26 + 1
        before, after = model(p, idx), model(p, other)
        torch.testing.assert_close(before[:, :-1], after[:, :-1])
        if name not in ("counted", "bigram"):  # their tables start as zeros, or noise
            assert not torch.allclose(before[:, -1], after[:, -1])


def test_what_each_model_can_see(lesson):
    """The first letter changes what is expected after the sixth only where there is no window."""
    for name, (model, _, _) in lesson.MODELS.items():
        p = lesson.init(name, 27, 10)
        idx = torch.randint(1, 27, (3, 6))
        other = idx.clone()
        other[:, 0] = idx[:, 0] % 26 + 1
        same = torch.allclose(model(p, idx)[:, -1], model(p, other)[:, -1], atol=1e-6)
        assert same == (name in ("counted", "bigram", "mlp", "batchnorm")), name


def test_padding_costs_nothing(lesson, data):
    """A word's losses are the same alone and beside a longer word."""
    letters, idx, _ = data
    for name in lesson.MODELS:
        p = lesson.init(name, len(letters), idx.size(1))
        alone = lesson.losses(name, p, *lesson.encode(["emma"], letters))
        beside = lesson.losses(name, p, *lesson.encode(["emma", "isabella"], letters))
        torch.testing.assert_close(alone[0], beside[0, :5])
        assert beside[0, 5:].isnan().all()


def test_training_learns_the_list_by_heart(lesson, data, monkeypatch):
    monkeypatch.setattr(lesson, "C", 32)
    monkeypatch.setattr(lesson, "HIDDEN", 48)
    letters, idx, targets = data
    counted = lesson.init("counted", len(letters), idx.size(1))
    lesson.count(counted, idx, targets, smoothing=0)
    least = lesson.losses("counted", counted, idx, targets).nanmean()
    for name, steps in {"mlp": 100, "batchnorm": 100, "gru": 250, "attention": 100, "transformer": 50}.items():
        p = lesson.init(name, len(letters), idx.size(1))
        lesson.train(name, p, idx, targets, steps)
        reached = lesson.losses(name, p, idx, targets).nanmean()
        assert reached < least - 0.3, name  # which no table of pairs can


def test_words_of_the_standard_library(lesson):
    words = lesson.stdlib_words()
    assert len(words) > 8000
    assert words == sorted(set(words))
    assert {"the", "python", "returns"} <= set(words)
    assert all(word.isascii() and word.islower() and word.isalpha() and 3 <= len(word) <= 15 for word in words)


@pytest.fixture
def words_file(tmp_path) -> str:
    file = tmp_path / "words.txt"
    file.write_text("\n".join(WORDS + WORDS[:3]) + "\n")
    return f"--words={file}"


def test_table_and_picture(lesson, words_file, capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("MPLBACKEND", "agg")
    picture = tmp_path / "loss.png"
    loss = lesson.main([words_file, "--steps=3", "--picture", str(picture)])
    out = capsys.readouterr().out.splitlines()
    assert out[0].startswith(f"{len(WORDS)} words, 1 of them held out")  # a word that stands twice counts once
    assert out[-1] == f"held-out loss of the transformer: {loss:.4f} nats"
    rows = {line.split()[0]: line.split() for line in out[-1 - len(lesson.MODELS) : -1]}
    assert list(rows) == list(lesson.MODELS)
    assert float(rows["transformer"][3]) == pytest.approx(loss, abs=1e-4)
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_the_same_seed_is_the_same_run(lesson, words_file):
    runs = [lesson.main([words_file, "--models=mlp", "--steps=5", f"--seed={seed}"]) for seed in (1, 1, 2)]
    assert runs[0] == runs[1] != runs[2]


def test_command_line(lesson, capsys, tmp_path):
    run = subprocess.run([sys.executable, FILE, "--help"], capture_output=True, text=True, check=True)
    assert all(option in run.stdout for option in ("--words", "--steps", "--seed", "--picture", "--models"))
    few, stops, binary = tmp_path / "few", tmp_path / "stops", tmp_path / "binary"
    few.write_text("one\ntwo\n")
    stops.write_text("\n".join(f"word.{i}" for i in range(20)))
    binary.write_bytes(b"\xff\xfe\x00" * 50)
    wrong = [f"--words={file}" for file in (tmp_path / "missing", tmp_path, few, stops, binary)]
    wrong += [f"--picture={tmp_path}/none/loss.png", "--picture=loss.doc"]
    for argument in [*wrong, "--models=mlp,lstm", "--steps=0", "--seed=x"]:
        with pytest.raises(SystemExit) as stop:
            lesson.main([argument])
        assert stop.value.code == 2
        assert argument.split("=")[0] in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.slow
def test_figure(lesson):
    """On half of the default's steps the Transformer is already below the counted pairs by more than 0.3 nats."""
    counted = lesson.main(["--models=counted"])
    assert lesson.main(["--models=transformer", "--steps=1000"]) < counted - 0.3
