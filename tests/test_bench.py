"""bench.py and measure.py: what runs and in which order; and their arithmetic, on times that stand-ins print."""

import importlib.metadata
import json
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import bench
from kqv import benchmarks, cli, errors, gpu_benchmark, measure, peers
from model import GPT, GPTConfig
from tests.conftest import ROOT

MACHINE = {"device": "cpu", "name": "a machine", "threads": 1, "float32": 2e11, "bfloat16": 4e11, "read": 1e10}
KEYS = {"task", "size", "device", "ours", "peer", "unit", "ratio", "limit", "share_of_limit", "peak_rss_mb"}
KEYS |= {"peer_peak_rss_mb", "versions"}

# A train.py that trains nothing: it records how it was called, and prints nanoGPT's lines with made-up times: MS for
# iterations 5, 6 and 7, which --steps=3 must count, and far longer times for the others.
TRAIN = """
import json, sys
from pathlib import Path
settings = dict(word[2:].split("=", 1) for word in sys.argv[1:] if word.startswith("--"))
data = Path(settings.get("data_dir", "data")) / settings["dataset"]
called = {"side": "SIDE", "cwd": str(Path.cwd()), "settings": settings}
called["data"] = {path.name: path.stat().st_size for path in data.iterdir()}
with Path("NOTES").open("a") as notes:
    notes.write(json.dumps(called) + "\\n")
print("0.80M parameters (position embeddings not counted) on cpu in torch.DTYPE; 768 tokens per iteration")
print("step 0: train loss 4.2000, val loss 4.2000")
for number in range(int(settings["max_iters"]) + 1):
    ms = MS[number - 5] if 5 <= number < 8 else 99999
    print(f"iter {number}: loss 4.1234, time {ms:.2f}ms, mfu -100.00%")
"""


@pytest.fixture
def stand_ins(tmp_path, monkeypatch):
    """Folders with a stand-in for each train.py, ours and the peer's; a machine with round numbers. Returns a runner:

    run("train", "--size=baby") -> the rows as JSON has them. `run.peer`: the peer's folder; `run.calls()`: the notes.
    """
    notes, sides = tmp_path / "notes", {}
    for side, ms, dtype in (("ours", [20, 30, 25], "bfloat16"), ("peer", [40, 60, 50], "float32")):
        sides[side] = tmp_path / side
        sides[side].mkdir()
        script = TRAIN.replace("SIDE", side).replace("NOTES", str(notes)).replace("MS", str(ms)).replace("DTYPE", dtype)
        (sides[side] / "train.py").write_text(script, encoding="utf-8")
    (sides["peer"] / "model.py").write_text("", encoding="utf-8")
    measured = measure.Measured("", [], 1.0, 100.0, found=dict(MACHINE))
    monkeypatch.setattr(benchmarks, "ROOT", sides["ours"])
    monkeypatch.setattr(bench, "call", lambda *_, **__: measured)

    def run(*arguments: str):
        path = tmp_path / "result.json"
        bench.main(cli.parse(bench.Bench, [*arguments, f"--json={path}"])[0], {})
        return json.loads(path.read_text(encoding="utf-8"))

    run.peer = sides["peer"]
    run.calls = lambda: [json.loads(line) for line in notes.read_text(encoding="utf-8").splitlines()]
    return run


def test_train_row(stand_ins, capsys):
    row = stand_ins("train", f"--peer={stand_ins.peer}", "--steps=3", "--repeats=2")
    assert row.keys() >= KEYS
    assert (row["task"], row["size"], row["device"], row["unit"]) == ("train", "baby", "cpu", "ms/iteration")
    assert (row["ours"], row["peer"], row["ratio"]) == (25, 50, 2)  # medians; iterations that evaluate do not count
    model = GPT(GPTConfig(block_size=64, vocab_size=65, n_layer=4, n_head=4, n_embd=128, bias=False))
    flops = model.flops_per_token() * 12 * 64
    assert row["limit"] == 4e11  # of bfloat16, which our side printed
    assert row["share_of_limit"] == pytest.approx(flops / 0.025 / 4e11)
    assert row["peer_share_of_limit"] == pytest.approx(flops / 0.050 / 2e11)  # nanoGPT has no autocast on CPUs
    assert row["peak_rss_mb"] > 1 and row["peer_peak_rss_mb"] > 1
    assert row["versions"]["torch"] == importlib.metadata.version("torch") and row["versions"]["threads"] == 1
    table = [re.split(r"  +", line.strip()) for line in capsys.readouterr().out.splitlines() if "  " in line]
    assert table[0][-1] == "ratio" and table[1][0] == "train" and table[1][-1] == "2.00"
    assert table[1][2:4] == ["25 (25 to 25)", "50 (50 to 50)"]


@pytest.mark.slow
def test_the_share_of_the_limit_is_that_of_the_model_that_ran(stand_ins):
    full, less = (
        stand_ins("train", "--steps=3", "--repeats=1", f"--flags={flags}") for flags in ("", "--batch_size=3")
    )
    assert less["share_of_limit"] == pytest.approx(full["share_of_limit"] / 4)


def test_train_gives_both_sides_the_same_work_in_turn(stand_ins):
    arguments = ["--size=small", "--steps=3", "--repeats=2", "--flags=--compile=True --seed=7", "--peer_flags=--bias=1"]
    stand_ins("train", f"--peer={stand_ins.peer}", *arguments)
    calls = stand_ins.calls()
    assert [call["side"] for call in calls] == ["ours", "peer", "ours", "peer"]
    ours, peer = calls[:2]
    same = {"n_layer": "6", "n_head": "6", "n_embd": "384", "block_size": "256", "batch_size": "8", "device": "cpu"}
    same |= {"gradient_accumulation_steps": "1", "dropout": "0.0", "max_iters": "8", "eval_iters": "1"}
    assert ours["settings"].items() >= same.items() and peer["settings"].items() >= same.items()
    assert ours["data"] == peer["data"] and ours["data"].keys() == {"train.bin", "val.bin", "meta.pkl"}
    assert Path(ours["settings"]["data_dir"], ours["settings"]["dataset"]) == Path(peer["settings"]["dataset"])
    assert (ours["settings"]["compile"], peer["settings"]["compile"]) == ("True", "False")
    assert ours["settings"]["seed"] == "7" and "seed" not in peer["settings"] and peer["settings"]["bias"] == "1"
    # nanoGPT runs in its own directory; its output goes elsewhere, and nothing is left there
    assert Path(peer["cwd"]) == stand_ins.peer
    assert not Path(peer["settings"]["out_dir"]).is_relative_to(stand_ins.peer)
    assert {path.name for path in stand_ins.peer.iterdir()} == {"train.py", "model.py"}
    assert not Path(ours["settings"]["data_dir"]).exists()


@pytest.mark.slow
def test_train_without_a_peer_and_for_gpt2(stand_ins):
    row = stand_ins("train", "--size=gpt2", "--steps=3", "--repeats=1")
    assert row["ours"] == 25 and row["peer"] is row["ratio"] is row["peer_peak_rss_mb"] is None
    assert stand_ins.calls()[0]["data"].keys() == {"train.bin", "val.bin"}  # without meta.pkl: GPT-2's tokens
    several = stand_ins("train", "train", "--size=small", "--size=baby", "--steps=3", "--repeats=1")
    assert [(row["task"], row["size"]) for row in several] == 2 * [("train", "small"), ("train", "baby")]


@pytest.mark.parametrize(
    "source, message",
    [
        ("raise RuntimeError('boom')", "the peer's train.py failed: RuntimeError: boom"),
        ("raise SystemExit(3)", "the peer's train.py failed: exit code 3"),
        ("print('iter 5: loss 1, time 9ms')", "the peer's train.py printed the times of 1 iterations of the 3"),
    ],
)
def test_a_failing_child_is_one_line(stand_ins, capsys, source, message):
    (stand_ins.peer / "train.py").write_text(source, encoding="utf-8")
    with pytest.raises(SystemExit) as stop, errors.one_line_errors():
        stand_ins("train", f"--peer={stand_ins.peer}", "--steps=3", "--repeats=1")
    assert stop.value.code == 2
    assert capsys.readouterr().err.startswith(f"error: {message}")


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "which task?: expected train | generate | prepare | loss"),
        (["trian"], "task 'trian': expected train | generate | prepare | loss"),
        (["train", "--peer=."], "not a checkout of nanoGPT, it has no train.py and model.py"),
        (["train", "generate", "--peer=hf"], "peer='hf' is for generate alone"),
        (["train", "--size=baby", "--size=huge"], "size='huge': expected baby | small | gpt2"),
        (["train", "--peer="], "peer='': not a checkout of nanoGPT"),
        (["loss", "--device=mps"], "device='mps': loss runs on cpu | cuda"),
        (["train", "--flags='"], 'flags="\'": No closing quotation'),
        (["train", "--repeats=0"], "repeats=0: must be at least 1"),
        (["train", "--size=large"], "size='large': expected baby | small | gpt2"),
        (["train", "--json=nowhere/result.json"], "json='nowhere/result.json': expected a file in an existing folder"),
        (["prepare", "--input=nowhere"], "input='nowhere': there is no text in it"),
    ],
)
def test_errors_are_one_line(command, arguments, message):
    result = command("bench.py", *arguments)
    assert result.code == 2 and result.err.count("\n") == 1 and message in result.err


def test_missing_transformers_is_named(command, monkeypatch):
    def version(name: str, known=importlib.metadata.version) -> str:
        if name == "transformers":
            raise importlib.metadata.PackageNotFoundError(name)
        return known(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    result = command("bench.py", "generate", "--peer=hf")
    message = "error: this needs the Python package 'transformers': pip install transformers\n"
    assert (result.code, result.err) == (2, message)


def test_neither_help_nor_measuring_imports_torch():
    script = f"import sys, runpy; sys.argv = ['bench.py', '--help']\ntry: runpy.run_path({str(ROOT / 'bench.py')!r}, "
    script += "run_name='__main__')\nexcept SystemExit: print('torch' in sys.modules, 'numpy' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert "--peer_flags" in done.stdout and done.stdout.endswith("False False\n"), done.stderr


def test_rows_prefer_speed_and_low_cost():
    def measured(*values: float) -> list[measure.Measured]:
        return [measure.Measured("", [], 1, rss_mb=10 * value, value=value) for value in values]

    speed = measure.row(("", "", "cpu", "tokens/s"), measured(7, 100, 8), measured(1, 2, 60))
    assert (speed["ours"], speed["peer"], speed["ratio"]) == (8, 2, 4)
    assert (speed["peak_rss_mb"], speed["peer_peak_rss_mb"]) == (1000, 600)
    cost = measure.row(("", "", "cpu", "s"), measured(8), measured(2), limit=16, share=lambda value: value / 16)
    assert (cost["ratio"], cost["share_of_limit"], cost["peer_share_of_limit"]) == (0.25, 0.5, 0.125)


def test_peak_memory(tmp_path):
    hold = "import time; held = b'x' * 200_000_000"
    own = measure.run("a child", [sys.executable, "-c", hold], tmp_path)
    assert 200 < own.rss_mb < 2000  # at least this process's own, because it was forked
    if Path("/proc/self/smaps_rollup").exists():
        family = f"import subprocess, sys; {hold}; subprocess.run([sys.executable, '-c', {hold + '; time.sleep(1)'!r}])"
        tree = measure.run("a family", [sys.executable, "-c", family], tmp_path, whole_tree=True)
        assert 400 < tree.rss_mb < 500


def test_each_line_has_the_moment_at_which_it_came(tmp_path):
    speak = "import time; print('one'); began = time.time()\nwhile time.time() < began + 0.5: pass\nprint('two\\r2')"
    measured = measure.run("a child", [sys.executable, "-c", speak], tmp_path)
    assert measured.output == "one\ntwo\r2\n" and len(measured.arrived) == 2
    assert 0 < measured.arrived[0] <= measured.arrived[1] - 0.4 and measured.arrived[1] <= measured.seconds


def test_documents_are_the_input_again_and_again(tmp_path):
    texts = {"a.txt": "Zürich\n" * 3000, "b.txt": "to be or not to be "}
    (tmp_path / "texts").mkdir()
    for name, text in texts.items():
        (tmp_path / "texts" / name).write_text(text, encoding="utf-8")
    count = peers.write_documents(str(tmp_path / "texts"), tmp_path / "text.jsonl", megabytes=1)
    lines = (tmp_path / "text.jsonl").read_text(encoding="utf-8").splitlines()
    documents = [json.loads(line)["text"] for line in lines]
    assert len(documents) == count and max(map(len, documents)) <= peers.DOCUMENT
    whole, written = "".join(texts.values()), "".join(documents)
    assert (whole * 60).startswith(written)
    assert 1e6 <= len(written.encode()) < 1e6 + 2 * peers.DOCUMENT


def test_prepare_alone(command, gpt2_bpe):
    result = command("bench.py", "prepare", "--megabytes=1", "--repeats=1", "--json=result.json")
    assert result.code == 0, result.err
    row = json.loads(Path("result.json").read_text(encoding="utf-8"))
    assert row.keys() >= KEYS and row["unit"] == "tokens/s"
    assert row["ours"] > 0 and row["peer"] is row["ratio"] is row["limit"] is None


# -- gpu: programs that get ready side by side -------------------------------------------------------------------------


def twice(value: int, ready, fails: bool = False) -> dict[str, int]:
    assert not fails, "as asked"
    ready()
    time.sleep(60 * (value == 60))
    return {"value": 2 * value}


def late_or_never(ready) -> None:
    time.sleep(60)


def test_a_program_measures_when_it_is_told():
    good, bad = measure.Program(twice, value=4), measure.Program(twice, value=4, fails=True)
    slow, late = measure.Program(twice, value=60), measure.Program(late_or_never)
    for program in (good, bad, slow):
        program.wait(time.monotonic() + 60)
    assert good.child.poll() is None and good.is_ready.exists()
    assert good.measure(20) == {"value": 8}
    assert bad.measure(20) == "AssertionError: as asked"
    assert slow.measure(0.2) == "took longer than 0 s"
    assert late.measure(20) == "was not ready in time"
    assert all(program.child.poll() is not None for program in (good, bad, slow, late))


def test_time_to_a_loss(tmp_path):
    script = tmp_path / "train.py"
    lines = [f"step {n}: train loss 1.1, val loss {loss}" for n, loss in ((0, 4.2), (50, 1.5), (100, 1.46))]
    script.write_text(
        f"import sys, time\nprint({lines[0]!r}); print({lines[1]!r})\n"
        f"time.sleep(60 * (sys.argv[1] == 'sleep')); print({lines[2]!r}); time.sleep(60)",
        encoding="utf-8",
    )
    command, in_a_minute = [sys.executable, script], time.monotonic() + 60
    assert 0 < gpu_benchmark.time_to(1.4697, [*command, "go"], tmp_path, in_a_minute) < 50
    assert 0 < gpu_benchmark.time_to(1.5, [*command, "sleep"], tmp_path, in_a_minute) < 50
    assert gpu_benchmark.time_to(1.4, [*command, "sleep"], tmp_path, time.monotonic() + 2) is None


# -- the real thing, small ---------------------------------------------------------------------------------------------

# calls `datasets` as nanoGPT's data/openwebtext/prepare.py does, and prints the number of tokens
OPENWEBTEXT = """
from pathlib import Path
import numpy as np, tiktoken
from datasets import load_dataset
encoding = tiktoken.get_encoding("gpt2")
if __name__ == "__main__":
    splits = load_dataset("openwebtext", num_proc=8)["train"].train_test_split(test_size=0.0005, seed=1, shuffle=True)
    encode = lambda row: {"ids": [*encoding.encode_ordinary(row["text"]), encoding.eot_token]}
    splits = splits.map(encode, remove_columns=["text"], num_proc=8)
    for split, name in (("train", "train.bin"), ("test", "val.bin")):
        ids = np.concatenate(splits[split].with_format("numpy")["ids"][:]).astype(np.uint16)
        ids.tofile(Path(__file__).parent / name)
        with Path("NOTES").open("a") as notes:
            notes.write(f"{len(splits[split])} {len(ids)}\\n")
"""

# like nanoGPT's: generate returns the prompt and its continuation
MODEL = """
from dataclasses import dataclass
import torch
@dataclass
class GPTConfig:
    block_size: int; vocab_size: int; n_layer: int; n_head: int; n_embd: int; bias: bool
class GPT(torch.nn.Linear):
    def __init__(self, config):
        super().__init__(config.n_embd, config.n_embd)
    def generate(self, idx, max_new_tokens, temperature=1.0, top_k=None):
        assert idx.shape == (1, 64) and (temperature, top_k) == (0.8, 200)
        return torch.cat((idx, torch.zeros(1, max_new_tokens, dtype=torch.int64)), dim=1)
"""


def rows(result) -> list[dict]:
    assert result.code == 0, result.err
    found = json.loads(Path("result.json").read_text(encoding="utf-8"))
    return found if isinstance(found, list) else [found]


@pytest.fixture
def ourselves(tmp_path) -> None:
    """The folder "nanogpt" with our own train.py, called as nanoGPT's is."""
    (tmp_path / "nanogpt").mkdir()
    forward = f"import runpy, sys\nsys.path.insert(0, {str(ROOT)!r})\n"
    forward += f"runpy.run_path({str(ROOT / 'train.py')!r}, run_name='__main__')"
    for name, source in (("train.py", forward), ("model.py", "")):
        (tmp_path / "nanogpt" / name).write_text(source, encoding="utf-8")


@pytest.mark.slow
@pytest.mark.parametrize("peer", ["hf", "nanogpt"])
def test_generate(command, tmp_path, peer):
    (tmp_path / "nanogpt").mkdir()
    (tmp_path / "nanogpt" / "train.py").write_text("", encoding="utf-8")
    (tmp_path / "nanogpt" / "model.py").write_text(MODEL, encoding="utf-8")
    arguments = ["--repeats=1", "--device=cpu", f"--peer={peer}", "--json=result.json"]
    alone, ten, far = rows(command("bench.py", "generate", *arguments))
    assert alone.keys() == ten.keys() == far.keys() and alone.keys() >= KEYS
    assert alone["ratio"] == pytest.approx(alone["ours"] / alone["peer"])
    weights = GPT(GPTConfig(vocab_size=65, n_layer=4, n_head=4, n_embd=128)).num_params()
    assert alone["share_of_limit"] == pytest.approx(alone["ours"] / alone["limit"])
    assert 1e8 < alone["limit"] * weights * 4 < 1e13  # bytes/s that this machine reads
    assert ten["ratio"] == pytest.approx(ten["ours"] / alone["ours"]) and ten["peer"] is None
    assert far["unit"] == "ms/token" and far["ratio"] > 0


@pytest.mark.slow
def test_the_gpu_benchmark_goes_on_if_a_program_fails(command, tmp_path):
    (tmp_path / "nanogpt").mkdir()
    (tmp_path / "nanogpt" / "train.py").write_text("", encoding="utf-8")
    (tmp_path / "nanogpt" / "model.py").write_text(MODEL, encoding="utf-8")  # it can generate, but not learn
    result = command("bench.py", "gpu", "--device=cpu", "--peer=nanogpt", "--json=result.json")
    assert "step 12 nanoGPT: TypeError" in result.err
    found = rows(result)
    units = {row["task"]: (row["unit"], row["peer"] is None) for row in found}
    assert units == {
        "step, batch 12": ("ms/iteration", True),
        "step, batch 32": ("ms/iteration", True),
        "generate 1, graph (nanoGPT)": ("tokens/s", False),
        "generate 10, graph": ("tokens/s", True),
    }
    assert all(row["ours"] > 0 for row in found)
    if torch.ops.mkldnn._is_mkldnn_bf16_supported():
        assert 0 < found[0]["share_of_limit"] < 2
    else:  # steps are in bfloat16, whose products would take minutes to time here
        assert found[0]["share_of_limit"] is None
    one, ten = found[2:]
    assert ten["limit"] == pytest.approx(10 * one["limit"])  # ten samples read the same weights


@pytest.mark.slow
def test_train_for_real(command, ourselves):
    arguments = ["--steps=2", "--repeats=1", "--device=cpu", "--peer=nanogpt", "--json=result.json"]
    (row,) = rows(command("bench.py", "train", *arguments))
    assert row["ours"] > 0 and row["peer"] > 0 and 0 < row["share_of_limit"] < 2
    assert row["peak_rss_mb"] > 100  # torch alone is more


@pytest.mark.slow
def test_loss(command, ourselves, tmp_path):
    """If the peer does exactly the same, the losses are equal to the last digit."""
    text = "the quick brown fox jumps over the lazy dog\n" * 400
    (tmp_path / "text.txt").write_text(text, encoding="utf-8")
    (tmp_path / "nanogpt" / "config").mkdir()
    shape = "n_layer, n_head, n_embd, block_size, batch_size, eval_iters = 4, 4, 128, 64, 12, 20\n"
    recipe = 'gradient_accumulation_steps, device, compile, dataset = 1, "cpu", False, "shakespeare_char"\n' + shape
    (tmp_path / "ours.py").write_text(recipe, encoding="utf-8")
    (tmp_path / "nanogpt" / "config" / "train_shakespeare_char.py").write_text(recipe, encoding="utf-8")
    flags = "--max_iters=4 --lr_decay_iters=4 --warmup_iters=1"
    arguments = ["--repeats=1", "--config=ours.py", "--input=text.txt", f"--flags={flags}", f"--peer_flags={flags}"]
    time, whole, loss = rows(command("bench.py", "loss", "--peer=nanogpt", "--json=result.json", *arguments))
    assert (time["unit"], whole["unit"], loss["unit"]) == ("s", "s", "nats/token")
    assert time["ratio"] == pytest.approx(time["peer"] / time["ours"])
    assert time["ours"] < whole["ours"] and time["peer"] < whole["peer"]
    assert loss["ours"] == loss["peer"] < 3.5 and loss["ratio"] == 1  # it starts at log 28 = 3.3


@pytest.mark.slow
def test_prepare_beside_a_peer(command, tmp_path, gpt2_bpe):
    folder = tmp_path / "nanogpt" / "data" / "openwebtext"
    folder.mkdir(parents=True)
    (folder / "prepare.py").write_text(OPENWEBTEXT.replace("NOTES", str(tmp_path / "notes")), encoding="utf-8")
    for name in ("train.py", "model.py"):
        (tmp_path / "nanogpt" / name).write_text("", encoding="utf-8")
    too_little = command("bench.py", "prepare", "--peer=nanogpt", "--megabytes=2")
    assert too_little.code == 2 and "megabytes=2: too little" in too_little.err
    arguments = ["--megabytes=11", "--repeats=2", "--peer=nanogpt", "--json=result.json"]
    (row,) = rows(command("bench.py", "prepare", *arguments))
    assert row["ratio"] == pytest.approx(row["ours"] / row["peer"])
    notes = [list(map(int, line.split())) for line in (tmp_path / "notes").read_text(encoding="utf-8").splitlines()]
    assert len(notes) == 4 and notes[:2] == notes[2:]  # two runs, the second did the work again
    assert [path.name for path in folder.iterdir()] == ["prepare.py"]
