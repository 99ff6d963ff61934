"""settings.py and cli.py: flags, config files, --help, errors, device and dtype."""

import shutil
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kqv import machine
from kqv.build import model_config
from kqv.cli import parse
from kqv.errors import UserError
from kqv.machine import cpu_likes_bfloat16, cpuinfo
from kqv.plan import find_dtype
from kqv.resume import restore
from kqv.settings import SampleConfig, TrainConfig
from model import GPTConfig
from tests.conftest import ROOT


def value(key: str, *arguments: str, cls=TrainConfig):
    return getattr(parse(cls, list(arguments))[0], key)


@pytest.mark.parametrize(
    "arguments, key, expected",
    [
        (["--batch_size=8"], "batch_size", 8),
        (["--batch-size=8"], "batch_size", 8),
        (["--batch-size", "8"], "batch_size", 8),
        (["--batch_size", "8"], "batch_size", 8),
        (["--batch_size=3", "--batch_size=8"], "batch_size", 8),
        (["--learning_rate=1"], "learning_rate", 1.0),
        (["--learning_rate=1e-3"], "learning_rate", 1e-3),
        (["--dropout=0"], "dropout", 0.0),
        (["--compile=False"], "compile", False),
        (["--compile"], "compile", True),
        (["--compile", "False"], "compile", False),
        (["--compile=auto"], "compile", "auto"),
        (["--no-compile"], "compile", False),
        (["--no_compile"], "compile", False),
        (["--eval_only"], "eval_only", True),
        (["--eval_only", "--compile"], "eval_only", True),
        (["--eval-only=true"], "eval_only", True),
        (["--always_save_checkpoint=False"], "always_save_checkpoint", False),
        (["--n_kv_head=None"], "n_kv_head", None),
        (["--n_kv_head=2"], "n_kv_head", 2),
        (["--position=none"], "position", "none"),
        (["--wandb_run_name=a=b=c"], "wandb_run_name", "a=b=c"),
        (["--out_dir=2024"], "out_dir", "2024"),
        (["--wandb_run_name="], "wandb_run_name", ""),
    ],
)
def test_accepted_spellings(arguments, key, expected):
    found = value(key, *arguments)
    assert found == expected and type(found) is type(expected)


def test_sampling_values():
    assert value("top_k", "--top_k=None", cls=SampleConfig) is None
    assert value("temperature", "--temperature=1", cls=SampleConfig) == 1.0
    assert value("start", "--start=42", cls=SampleConfig) == "42"
    assert value("start", "--start=None", cls=SampleConfig) == "None"
    assert value("start", "--start", "-", cls=SampleConfig) == "-"
    assert value("start", "--start", "--batch", cls=SampleConfig) == "--batch"
    assert value("stop", "--stop=a", "--stop", "b\n", cls=SampleConfig) == ("a", "b\n")
    assert value("stop", cls=SampleConfig) == ()


@given(st.text())
def test_any_text_comes_through(text):
    assert value("wandb_run_name", f"--wandb_run_name={text}") == text
    assert value("wandb_run_name", "--wandb_run_name", text) == text


@given(st.integers(min_value=1, max_value=2**63 - 1))
def test_any_integer_comes_through(number):
    assert value("batch_size", f"--batch_size={number}") == number


@given(st.floats(min_value=0, max_value=2**62))
def test_any_float_comes_through(number):
    assert value("weight_decay", f"--weight_decay={number!r}") == number


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--lerning_rate=1"], "unknown setting 'lerning_rate': did you mean 'learning_rate'?"),
        (["--xyzzy"], "unknown setting 'xyzzy'; --help lists them all"),
        (["--no-batch_size"], "unknown setting 'no_batch_size'"),
        (["--batch_size=eight"], "batch_size='eight': expected int"),
        (["--batch_size=1.5"], "batch_size='1.5': expected int"),
        (["--batch_size=None"], "batch_size='None': expected int"),
        (["--batch_size=0"], "batch_size=0: must be at least 1"),
        (["--init_from=scrach"], "init_from='scrach': expected scratch | resume | auto | gpt2"),
        (["--backend=foo"], "backend='foo': expected auto | nccl | gloo"),
        (["--batch_size"], "--batch_size needs a value: int"),
        (["--learning_rate=nan"], "learning_rate=nan: must be at least 0"),
        (["--learning_rate=-1"], "learning_rate=-1.0: must be at least 0"),
        (["--beta2=1"], "beta2=1.0: must be at least 0 and below 1"),
        (["--compile=maybe"], "compile='maybe': expected True | False | auto"),
        (["--position=up"], "position='up': expected learned | sinusoidal | rope | none"),
        (["--n_kv_head=x"], "n_kv_head='x': expected int | None"),
        (["nothing.py"], "no config file 'nothing.py'"),
        (["batch_size=8"], "no config file 'batch_size=8'; settings are given as --key=value"),
        (["-b", "8"], "-b"),
    ],
)
def test_wrong_command_lines_are_one_line_and_exit_2(command, arguments, message):
    result = command("train.py", *arguments)
    assert result.code == 2
    assert result.out == ""
    (line,) = result.err.splitlines()
    assert line.startswith("error: ") and message in line


def test_config_files_may_loop_and_compute_with_numpy(tmp_path):
    text = "import numpy as np\nn_layer = np.int64(3)\nlearning_rate = np.float32(0.5)\ntotal = 0\n"
    text = text.replace("total = 0\n", "") + "for size in (1, 2):\n    batch_size = size\n"
    text += "with open(__file__, encoding='utf-8') as source:\n    out_dir = source.readline().strip()[:6]\n"
    (tmp_path / "mine.py").write_text(text, encoding="utf-8")
    cfg, _ = parse(TrainConfig, [str(tmp_path / "mine.py")])
    assert (cfg.n_layer, cfg.learning_rate, cfg.batch_size, cfg.out_dir) == (3, 0.5, 2, "import")
    assert type(cfg.n_layer) is int and type(cfg.learning_rate) is float


BUGS = {
    "an unpacking": "a, b = [1, 2, 3]",
    "a zip": "list(zip([1], [1, 2], strict=True))",
    "a wrong import": "import kqv.no_such_room",
    "a missing name": "from kqv.cli import no_such_function",
    "a key": "{}['key']",
    "a number": "int('x')",
}


@pytest.mark.parametrize("bug", BUGS)
@pytest.mark.parametrize("room", ["kqv/data.py", "train.py"])
def test_a_bug_of_our_own_keeps_its_traceback(tmp_path, room, bug):
    """Exceptions like those that users cause, planted in our own code."""
    for name in ("train.py", "model.py"):
        shutil.copy(ROOT / name, tmp_path / name)
    shutil.copytree(ROOT / "kqv", tmp_path / "kqv", ignore=shutil.ignore_patterns("__pycache__"))
    place = {"kqv/data.py": "    folder = find_dataset(data_dir, dataset)\n", "train.py": "    # -- data\n"}[room]
    source = (tmp_path / room).read_text(encoding="utf-8")
    assert source.count(place) == 1
    (tmp_path / room).write_text(source.replace(place, f"    {BUGS[bug]}\n{place}"), encoding="utf-8")
    command = [sys.executable, tmp_path / "train.py", "--device=cpu"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert result.returncode == 1 and "Traceback (most recent call last)" in result.stderr
    assert "error: " not in result.stderr.splitlines()[0]


def test_files_then_flags(tmp_path):
    own = "import time\nfrom math import pi as n_head\n_n = 7\ndef helper(): pass\nclass C: pass\n"
    (tmp_path / "a.py").write_text(own + "batch_size = 2 * 3\nn_layer = 2\nseed = _n")
    (tmp_path / "b.py").write_text("n_layer = 5\nlearning_rate = 1\nlr_decay_iters = None")
    a, b = str(tmp_path / "a.py"), str(tmp_path / "b.py")
    cfg, origin = parse(TrainConfig, ["--seed=9", a, b])
    assert (cfg.batch_size, cfg.n_layer, cfg.seed, cfg.learning_rate) == (6, 5, 9, 1.0)
    assert type(cfg.learning_rate) is float
    assert (origin["batch_size"], origin["n_layer"], origin["seed"]) == (a, b, "flag")
    assert origin["n_head"] == "default"
    assert parse(TrainConfig, [b, a])[0].n_layer == 2


@pytest.mark.parametrize(
    "text, message",
    [
        ("lerning_rate = 1", "unknown setting 'lerning_rate': did you mean 'learning_rate'?"),
        ("dropout = 'x'", "dropout='x': expected float"),
        ("batch_size = 1.0", "batch_size=1.0: expected int"),
        ("batch_size = True", "batch_size=True: expected int"),
        ("compile = 1", "compile=1: expected True | False | auto"),
        ("out_dir = 5", "out_dir=5: expected text"),
        ("batch_size = ", "SyntaxError: invalid syntax (mine.py, line 1)"),
        ("batch_size = 1 / 0", "ZeroDivisionError"),
        ("learning_rate = lambda iter_num: 3e-4", "expected float"),
        ("import sys\nsys.exit(0)", "SystemExit: 0"),
    ],
)
def test_wrong_config_files_are_named(command, tmp_path, text, message):
    (tmp_path / "mine.py").write_text(text)
    result = command("train.py", "mine.py")
    assert result.code == 2 and result.out == ""
    (line,) = result.err.splitlines()
    assert line.startswith("error: mine.py") and message in line


def test_nanogpts_config_paths_find_ours(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert value("dataset", "config/train_shakespeare_char.py") == "shakespeare_char"
    assert value("init_from", "config/eval_gpt2_xl.py") == "gpt2-xl"


@pytest.mark.parametrize("path", sorted(ROOT.glob("configs/*.py")), ids=lambda path: path.stem)
def test_our_configs_parse_and_say_how_to_run_them(path):
    cfg, _ = parse(TrainConfig, [str(path)])
    model_config(GPTConfig, cfg, vocab_size=64)
    header = path.read_text(encoding="utf-8").split("\n\n")[0]
    assert f"train.py configs/{path.name}" in header
    assert "loss" in header


def test_models_defaults_are_the_commands_but_for_two():
    # nanoGPT's train.py has bias=False, its GPTConfig bias=True; attention=auto is chosen outside of the model
    ours, models = TrainConfig(), GPTConfig()
    raw = {field.name: field.default for field in fields(GPTConfig)}
    shared = [name for name in raw if hasattr(ours, name)]
    assert {name for name in shared if getattr(ours, name) != raw[name]} == {"bias", "attention"}
    assert set(raw) - set(shared) == {"vocab_size"} and models.vocab_size == 50304


@pytest.mark.parametrize("script, cls", [("train.py", TrainConfig), ("sample.py", SampleConfig)])
def test_help_lists_every_option_without_importing_torch(script, cls):
    program = (
        f"import sys, runpy; sys.argv = ['{script}', '--help']\n"
        f"try: runpy.run_path({str(ROOT / script)!r}, run_name='__main__')\n"
        "except SystemExit as stop: assert stop.code == 0\n"
        "heavy = {'torch', 'numpy', 'tiktoken', 'transformers', 'wandb', 'matplotlib'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    environment = {"COLUMNS": "200", "PATH": "", "PYTHONPATH": str(ROOT)}
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr
    for field in fields(cls):
        (line,) = [line for line in result.stdout.splitlines() if line.strip("│ ").startswith(f"--{field.name} ")]
        assert len(line.split()) > 4, f"{field.name} is not described"


def test_settings_of_a_resumed_run():
    cfg, origin = parse(TrainConfig, ["--n_layer=3"])
    saved = {"n_layer": 7, "batch_size": 5, "learning_rate": 1, "device": "cuda", "of_another_version": 1}
    cfg, origin = restore(cfg, origin, saved, but={"device"})
    assert (cfg.n_layer, cfg.batch_size, cfg.learning_rate, cfg.device) == (3, 5, 1.0, "auto")
    assert (origin["n_layer"], origin["batch_size"], origin["device"]) == ("flag", "checkpoint", "default")
    with pytest.raises(UserError, match="batch_size='x'"):
        restore(*parse(TrainConfig, []), {"batch_size": "x"}, but=set())


def test_devices_that_are_not_here():
    import torch

    cpu = machine.resolve_device("cpu")
    assert cpu == torch.device("cpu")
    assert machine.resolve_dtype("bfloat16", cpu, work=1) == torch.bfloat16
    with pytest.raises(UserError, match="device='tpu': expected auto"):
        machine.resolve_device("tpu")
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match="device='cuda:3': not available on this machine"):
            machine.resolve_device("cuda:3")


@pytest.mark.parametrize(
    "vendor, flags, likes",
    [
        ("GenuineIntel", "avx512f avx512_bf16 amx_bf16 amx_tile", True),
        ("GenuineIntel", "avx512f avx512_bf16", False),  # a Sapphire Rapids whose hypervisor hides AMX
        ("AuthenticAMD", "avx512f avx512_bf16", True),
        ("AuthenticAMD", "avx2 fma", False),
    ],
)
def test_bfloat16_is_for_cpus_that_are_faster_with_it(tmp_path, monkeypatch, vendor, flags, likes):
    (tmp_path / "cpuinfo").write_text(f"processor\t: 0\nvendor_id\t: {vendor}\nflags\t\t: fpu {flags} fsrm\n")
    words = set(cpuinfo(tmp_path / "cpuinfo").split())
    assert {vendor, *flags.split()} <= words and cpuinfo(tmp_path / "no such file") == ""
    monkeypatch.setattr("kqv.machine.cpu_words", lambda: words)
    cpu, large = machine.resolve_device("cpu"), 12 * 64 * 128**2  # the baby model's 768 rows, 128 wide
    assert cpu_likes_bfloat16(large) is likes and not cpu_likes_bfloat16(large // 100)
    chosen = "bfloat16" if likes else "float32"
    assert str(machine.resolve_dtype("auto", cpu, large)) == f"torch.{chosen}"
    assert find_dtype("auto", "cpu", large) == chosen


def test_files_are_opened_with_an_encoding_everywhere():
    """On Windows open() reads cp1252 by default."""
    for path in [*ROOT.glob("*.py"), *ROOT.glob("kqv/*.py"), *ROOT.glob("prepare/*.py")]:
        for number, line in enumerate(Path(path).read_text(encoding="utf-8").splitlines(), 1):
            if any(call in line for call in (".read_text(", ".write_text(", '.open("w"', '.open("r"', '.open("a"')):
                assert "encoding=" in line, f"{path.name}:{number}"
