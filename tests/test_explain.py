"""explain.py: its tables, pictures, pages and numbers, and its errors."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from kqv.build import load_trained
from kqv.maps import drawable
from model import GPT, GPTConfig
from tests.conftest import TINY, command  # noqa: F401
from tests.test_report import pixels


@pytest.fixture(scope="module")
def trained(tmp_path_factory, data_dir):
    """An out_dir: a model trained for a few steps on "tiny", with block_size 16."""
    from kqv.cli import parse
    from kqv.settings import TrainConfig
    from train import main

    out = tmp_path_factory.mktemp("explain") / "out"
    flags = [f"--data_dir={data_dir}", *TINY, "--max_iters=5", f"--out_dir={out}", "--position=rope", "--n_kv_head=1"]
    assert main(*parse(TrainConfig, flags)) == 0
    return out


@pytest.fixture
def explain(command, trained, tmp_path):  # noqa: F811
    """Run explain.py on a copy of the trained model."""
    out = tmp_path / "out"
    shutil.copytree(trained, out)
    return lambda *arguments: command("explain.py", *arguments)


def numbers(path: str) -> object:
    return json.loads(Path(path).read_text(encoding="utf-8"))


def test_shapes_of_settings(explain):
    done = explain(
        "shapes", "--n_layer=2", "--n_head=2", "--n_embd=8", "--block_size=4", "--vocab_size=11", "--json=n.json"
    )
    assert done.code == 0 and "each of 2 blocks:" in done.out
    row = next(line for line in done.out.splitlines() if line.strip().startswith("attention weights"))
    assert "(B, H, T, T)" in row and "(1, 2, 4, 4)" in row and "softmax" in row
    steps = numbers("n.json")
    assert {"name", "symbolic", "shape", "parameters", "flops", "bytes"} <= steps[0].keys()
    size = sum(
        parameter.numel()
        for parameter in GPT(
            GPTConfig(n_layer=2, n_head=2, n_embd=8, block_size=4, vocab_size=11, bias=False)
        ).parameters()
    )
    assert sum(step["parameters"] for step in steps) == size and f"{size:,} parameters" in done.out


def test_shapes_of_a_model_are_its_own(explain):
    done = explain("shapes", "--out_dir=out", "--backward")
    assert done.code == 0 and "turned by position (rope)" in done.out and "(B, G, T, D)" in done.out
    assert "gradient" in done.out.splitlines()[0]
    assert "fused attention" in explain("shapes", "--out_dir=out", "--attention=sdpa").out
    assert "attention weights" in explain("shapes", "--out_dir=out", "--attention=explicit").out


def test_attention_writes_a_picture_a_page_and_numbers(explain):
    done = explain("attention", "--out_dir=out", "--text=the keys and", "--token=k", "--json=n.json")
    assert done.code == 2 and "characters are not in the vocabulary: 'd'" in done.err
    done = explain("attention", "--out_dir=out", "--text=the keys", "--token=k", "--json=n.json")
    assert done.code == 0, done.err
    assert "the strongest keys of 'k', token 4:" in done.out
    found = numbers("n.json")
    assert found["tokens"] == ["t", "h", "e", "␣", "k", "e", "y", "s"]
    weights = torch.tensor(found["weights"])
    assert weights.shape == (2, 2, 8, 8) and torch.tensor(found["rollout"]).shape == (8, 8)
    assert pixels(Path("out/explain-attention.png")).shape[1] >= 640
    assert "layer" in Path("out/explain-attention.html").read_text(encoding="utf-8")
    first = done.out.splitlines()[2].split()
    layer, head, key = int(first[2]), int(first[3]), int(first[1])
    assert float(first[4]) == pytest.approx(float(weights[:, :, 4].max()), abs=5e-4)
    assert weights[layer, head, 4, key] == weights[:, :, 4].max()


def test_long_texts_and_one_token(explain):
    done = explain("attention", "--out_dir=out", f"--text={'keys ' * 9}")
    assert done.code == 0 and "only the first 16 of 45 tokens" in done.err
    done = explain("loss", "--out_dir=out", f"--text={'keys ' * 9}")
    assert done.code == 0 and "read in 5 windows of 16" in done.err
    assert explain("attention", "--out_dir=out", "--text=k").code == 0
    done = explain("loss", "--out_dir=out", "--text=k")
    assert done.code == 0 and "one token: nothing comes before it" in done.out


def test_loss_of_a_file(explain):
    Path("text.txt").write_text("the keys look", encoding="utf-8")
    done = explain("loss", "text.txt", "--out_dir=out", "--json=n.json", "--html=page.html")
    assert done.code == 0, done.err
    found = numbers("n.json")
    model, tokenizer, _ = load_trained("resume", "out", "data", GPT, GPTConfig)
    ids = torch.tensor([tokenizer.encode("the keys look")])
    with torch.no_grad():
        loss = model(ids[:, :-1], ids[:, 1:])[1].item()
    assert found["loss"] == pytest.approx(loss, abs=1e-5) and f"loss {loss:.4f} nats per token" in done.out
    assert len(found["tokens"]) == len(found["losses"]) == len(found["top"]) == 13 and len(found["lens"]) == 2
    assert Path("page.html").is_file()


@pytest.mark.parametrize("switch", ["learned", "sinusoidal", "rope"])
def test_positions_of_settings(explain, switch):
    done = explain(
        "positions", f"--position={switch}", "--n_embd=24", "--block_size=10", "--png=p.png", "--json=n.json"
    )
    assert done.code == 0 and pixels(Path("p.png")).shape[1] == 1280
    found = numbers("n.json")
    assert len(found["similarity"]) == len(found["table"]) == 10 and found["similarity"][0] == pytest.approx(1)


def test_positions_of_a_model(explain):
    assert explain("positions", "--out_dir=out", "--png=p.png").code == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "which command?: expected shapes | attention"),
        (["shape"], "command 'shape': expected shapes | attention"),
        (["attention", "more"], "unexpected 'more'; settings are given as --key=value"),
        (["attention"], "no checkpoint"),
        (["attention", "--out_dir=out", "--text="], "text is empty"),
        (["attention", "--out_dir=out", "--text=key", "--layer=2"], "layer=2: the model has 2 layers, from 0 to 1"),
        (["attention", "--out_dir=out", "--text=key", "--head=7"], "head=7: the model has 2 heads, from 0 to 1"),
        (["attention", "--out_dir=out", "--text=key", "--token=z"], "token='z': not a token of the text; it has k e y"),
        (["attention", "--out_dir=out", "--text=42"], "characters are not in the vocabulary: '2', '4'"),
        (["loss", "--out_dir=out"], "which text?"),
        (["loss", "nowhere.txt", "--out_dir=out"], "nowhere.txt: No such file or directory"),
        (["positions", "--position=none"], "position='none': this model has no positions"),
        (["shapes", "--n_head=5"], "n_embd=768 is not divisible by n_head=5"),
        (["shapes", "--out_dir=nowhere"], "no checkpoint nowhere/ckpt.pt"),
    ],
)
def test_errors_are_one_line(explain, arguments, message, tmp_path):
    if arguments == ["attention"]:
        shutil.rmtree(tmp_path / "out")
    done = explain(*arguments)
    assert done.code == 2 and message in done.err and done.err.splitlines()[-1].startswith("error: ")
    assert "Traceback" not in done.err


def test_characters_without_a_glyph_are_escaped_in_pictures():
    assert drawable("aé␣") == "aé␣" and drawable("漢🙂") == "\\u6f22\\U0001f642"
    assert drawable("$x$") == "$x$"
