"""lessons/4_attention.py against torch's own attention."""

import math
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tests.lessons import load

pytestmark = pytest.mark.usefixtures("seed_and_one_thread")
FILE = Path(__file__).resolve().parent.parent / "lessons" / "4_attention.py"


@pytest.fixture(scope="module")
def lesson():
    return load("4_attention")


@pytest.mark.parametrize("size", [(7, 16), (3, 5, 4), (2, 3, 9, 8)])
def test_attention_is_torchs(lesson, size):
    q, k, v = torch.randn(3, *size, dtype=torch.float64, requires_grad=True)
    y, weights = lesson.attention(q, k, v)
    expected = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(weights @ v, y)
    downstream = torch.randn_like(y)
    ours, theirs = (torch.autograd.grad(out, (q, k, v), downstream) for out in (y, expected))
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("heads", [1, 2, 4])
def test_several_heads_are_torchs_multihead_attention(lesson, heads):
    C, T = 16, 6
    peer = nn.MultiheadAttention(C, heads, bias=False, batch_first=True)
    x = torch.randn(3, T, C)
    w_q, w_k, w_v = (w.T for w in peer.in_proj_weight.chunk(3))
    y, weights = lesson.multi_head(x, w_q, w_k, w_v, peer.out_proj.weight.T, heads)
    mask = nn.Transformer.generate_square_subsequent_mask(T)
    expected, expected_weights = peer(x, x, x, attn_mask=mask, average_attn_weights=False)
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(weights, expected_weights)


def test_causal_softmax(lesson):
    weights = lesson.causal_softmax(torch.randn(5, 5, dtype=torch.float64) * 3)
    torch.testing.assert_close(weights.sum(dim=-1), torch.ones(5, dtype=torch.float64))
    assert torch.equal(weights.triu(1), torch.zeros(5, 5, dtype=torch.float64))
    torch.testing.assert_close(weights[1, 1] + weights[1, 0], torch.tensor(1.0, dtype=torch.float64))


def test_steps_hold_on_other_numbers_and_print_shapes(lesson, capsys):
    for seed in range(3):  # each step has its asserts
        torch.manual_seed(seed)
        x, w = torch.randn(lesson.B, lesson.T, lesson.C), torch.randn(4, lesson.C, lesson.C) / math.sqrt(lesson.C)
        lesson.averages(x)
        lesson.queries_keys_values(x @ w[0], x @ w[1], x @ w[2])
        lesson.heads_and_order(x, w)
    out = capsys.readouterr().out
    table = [
        list(map(float, row)) for row in re.findall(r"^ +(4|16|64|256|1024) +(\S+) +(\S+) +(\S+) +(\S+)$", out, re.M)
    ]
    for D, variance, entropy, scaled_variance, scaled_entropy in table:
        assert 0 < entropy < math.log(64) and (variance / D, scaled_variance) == pytest.approx((1, 1), rel=0.4)
        assert scaled_entropy == pytest.approx(math.log(64) - 1 / 2, abs=0.15)  # of 64 normal scores of variance 1
    assert len(table) % 5 == 0 and table[0][2] > 2 > 0.5 > table[4][2]
    for shape in ("(2, 8, 32)", "(8, 8)", "(2, 8, 8)", "(2, 4, 8, 8)"):
        assert shape in out


def test_repeats(lesson):
    idx = lesson.repeats(50)
    assert torch.equal(idx[:, : lesson.N], idx[:, lesson.N :])
    assert all(len(set(row)) == lesson.N for row in idx[:, : lesson.N].tolist())


def test_figure(capsys, tmp_path, monkeypatch, lesson):
    monkeypatch.setenv("MPLBACKEND", "agg")
    picture = tmp_path / "map.png"
    accuracy = lesson.main(["--steps=200", f"--picture={picture}"])
    assert accuracy > 0.99
    out = capsys.readouterr().out.splitlines()
    assert out[-1].startswith(f"right answers: {accuracy:.4f}")
    assert float(out[-1].split()[-1]) < 1 / lesson.N  # without the letter before it does not even guess
    assert picture.read_bytes().startswith(b"\x89PNG")
    # the map in the terminal: in the second half each row has its mark under the letter that followed the last time
    rows = out[-(2 * lesson.N + 2) : -2]
    for place, row in enumerate(rows[lesson.N :]):
        shades = row[4::2].ljust(2 * lesson.N)
        assert max(range(2 * lesson.N), key=lambda s, shades=shades: " .:-=+*#%@".index(shades[s])) == place + 1


def test_the_same_seed_is_the_same_run(lesson, capsys):
    texts = []
    for seed in (5, 5, 6):
        lesson.main([f"--seed={seed}", "--steps", "3"])
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] != texts[2]


def test_command_line(lesson, capsys):
    run = subprocess.run([sys.executable, FILE, "--help"], capture_output=True, text=True, check=True)
    assert "--steps" in run.stdout and "--picture" in run.stdout
    for wrong in (["--steps=0"], ["--stesp=3"], ["--picture=/no/such/folder/map.png", "--steps=1"], ["--steps=two"]):
        with pytest.raises(SystemExit) as stop:
            lesson.main(wrong)
        assert stop.value.code == 2
        assert "error:" in capsys.readouterr().err.splitlines()[-1]
