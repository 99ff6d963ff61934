"""Damaged and hostile files: each is refused in one line, or the save before it is used. No run trains on one."""

import builtins
import contextlib
import copy
import io
import json
import os
import pickle
import random
import runpy
import shutil
import struct
import subprocess
import sys
import warnings
import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from kqv import checkpoint
from kqv.build import restore_model
from kqv.data import Split
from kqv.errors import UserError
from kqv.meta import read_meta
from model import GPT, GPTConfig
from tests.conftest import ROOT, TINY

# a warning would be a second line on the terminal
no_warnings = pytest.mark.filterwarnings("error::UserWarning")

RUN = ("--lr_decay_iters=12", "--eval_interval=100", "--save_interval=4", "--keep_last=2")


@pytest.fixture(scope="module")
def good(data_dir, tmp_path_factory) -> SimpleNamespace:
    """A run of 8 steps that also kept its state after 4 steps, and the same run to step 10 without interruption."""
    folder = tmp_path_factory.mktemp("good")

    def train(*arguments: str) -> str:
        command = [str(ROOT / "train.py"), f"--data_dir={data_dir}", *TINY, *RUN, *arguments]
        with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as notes:
            patch.setattr(sys, "argv", command)
            try:
                runpy.run_path(command[0], run_name="__main__")
            except SystemExit as stop:
                assert not stop.code
        return notes.getvalue()

    for steps in (8, 10):
        train(f"--out_dir={folder / str(steps)}", f"--max_iters={steps}")
    (folder / "4").mkdir()
    shutil.copy2(folder / "8" / "ckpt-00000004.pt", folder / "4")
    notes = train("--init_from=resume", "--eval_only", f"--out_dir={folder / '4'}")
    newest, before, end = (
        torch.load(folder / name, weights_only=True) for name in ("8/ckpt.pt", "8/ckpt-00000004.pt", "10/ckpt.pt")
    )
    (evaluated,) = (line for line in notes.splitlines() if line.startswith("step 4: train loss "))
    return SimpleNamespace(out=folder / "8", newest=newest, before=before, end=end, evaluated=evaluated)


@pytest.fixture
def out(good, tmp_path) -> Path:
    """out_dir of a stopped run: ckpt.pt of step 8, which the test damages, and ckpt-00000004.pt."""
    (tmp_path / "out").mkdir()
    for name in ("ckpt.pt", "ckpt-00000004.pt", "metrics.jsonl", "config.json"):
        shutil.copy2(good.out / name, tmp_path / "out" / name)
    return tmp_path / "out"


def same(a: Any, b: Any) -> bool:
    """Whether two values have one type and are bit for bit equal."""
    if torch.is_tensor(a) and torch.is_tensor(b):
        return a.dtype == b.dtype and a.shape == b.shape and a.numpy().tobytes() == b.numpy().tobytes()
    if type(a) is not type(b):
        return False
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def same_state(a: dict[str, Any], b: dict[str, Any]) -> bool:
    return all(same(dict(a[key]), dict(b[key])) for key in ("model", "optimizer"))


def is_refused(result: SimpleNamespace, *named: str) -> bool:
    """Whether a command ended with exit code 2 and one line on stderr that contains all of `named`."""
    lines = result.err.splitlines()
    one_line = result.code == 2 and len(lines) == 1 and lines[0].startswith("error: ")
    return one_line and "Traceback" not in result.out and all(name in lines[0] for name in named)


def assert_refused_or_recovered(result: SimpleNamespace, out: Path, good: SimpleNamespace) -> None:
    """Check a run that was asked to continue from out/ckpt.pt to step 10, or to evaluate it."""
    if result.code == 0:
        assert "ckpt.pt" in result.out and "trying the one before it" in result.out and result.err == ""
        lines = result.out.splitlines()
        assert good.evaluated in lines or same_state(torch.load(out / "ckpt.pt", weights_only=True), good.end)
    else:
        assert is_refused(result), (result.code, result.err)


@pytest.fixture
def resume(train):
    return lambda *arguments: train(*RUN, "--init_from=resume", "--max_iters=10", *arguments)


# -- bytes -------------------------------------------------------------------------------------------------------------


def parts(data: bytes, path: Path) -> dict[str, list[int]]:
    """Positions in a checkpoint, by the part of torch.save's zip archive that is there."""
    found = {"directory": [], "local": [], "pickle": [], "tensor": []}
    with zipfile.ZipFile(path) as archive:
        for part in archive.infolist():
            start = part.header_offset
            begin = start + 30 + sum(struct.unpack_from("<HH", data, start + 26))
            found["local"] += range(start, begin)
            if part.filename.endswith("data.pkl"):
                found["pickle"] += range(begin, begin + part.file_size)
            elif "/data/" in part.filename:
                found["tensor"] += range(begin, begin + part.file_size)
        found["directory"] += range(archive.start_dir, len(data))
    return found


def damaged_bytes(data: bytes, case: str, path: Path) -> bytes:
    """`data` with the damage `case`, "KIND NUMBER"; the same each time."""
    kind, number = case.rsplit(" ", 1)
    draw, damaged, n = random.Random(case), bytearray(data), len(data)
    if kind == "cut":  # from 0 bytes to all but one
        lengths = [0, 1, 3, 4, 30, 64, 100, 1000, n - 65536, n - 1000, n - 100, n - 22, n - 21, n - 2, n - 1]
        return data[: (lengths + draw.sample(range(n), 100))[int(number)]]
    if kind == "behead":
        return data[draw.randint(1, 2000) :]
    if kind == "grow":
        return data + draw.randbytes([1, 2, 100, 5000, 70_000, 200_000][int(number)])
    if kind == "prepend":
        return draw.randbytes(draw.randint(1, 5000)) + data
    if kind == "zero":
        length = draw.choice([16, 512, 4096, 20_000])
        start = draw.randrange(n - length)
        damaged[start : start + length] = bytes(length)
    elif kind == "swap":
        length = draw.choice([64, 512, 4096])
        a, b = sorted(draw.sample(range(0, n - length, length), 2))
        damaged[a : a + length], damaged[b : b + length] = data[b : b + length], data[a : a + length]
    elif kind == "noise":
        start = draw.randrange(n - 4096)
        damaged[start : start + 4096] = draw.randbytes(4096)
    elif kind in ("folder", "packed", "encrypted"):  # one bit of an entry of the zip archive's directory
        with zipfile.ZipFile(path) as archive:
            entry = archive.start_dir
            for _ in archive.infolist()[: 3 + int(number)]:
                entry += 46 + sum(struct.unpack_from("<HHH", data, entry + 28))
        assert data[entry : entry + 4] == b"PK\1\2"
        at, bit = {"folder": (38, 4), "packed": (10, 3), "encrypted": (8, 0)}[kind]
        damaged[entry + at] ^= 1 << bit
    else:
        damaged[draw.choice(parts(data, path)[kind])] ^= 1 << draw.randrange(8)
    return bytes(damaged)


COUNTS = {"cut": 30, "behead": 3, "grow": 6, "prepend": 3, "zero": 10, "swap": 10, "noise": 8, "folder": 3, "packed": 3}
COUNTS |= {"encrypted": 2, "directory": 40, "local": 20, "pickle": 40, "tensor": 20}
BYTES = [f"{kind} {number}" for kind, count in COUNTS.items() for number in range(count)]


@no_warnings
@pytest.mark.parametrize("case", BYTES)
def test_damaged_bytes_are_noticed_or_make_no_difference(good, out, case):
    path, notes = out / "ckpt.pt", []
    path.write_bytes(damaged_bytes(path.read_bytes(), case, path))
    found = checkpoint.load_newest(out, notes.append)
    if notes:
        (line,) = notes
        assert str(path) in line and "\n" not in line and "trying the one before it" in line
        assert same(found, good.before)
    else:  # for example a date, or bytes behind the end
        assert same(found, good.newest)
    try:
        mapped = checkpoint.load(path, mmap=True)
    except UserError as error:
        assert notes and str(path) in str(error) and "\n" not in str(error)
    else:
        assert not notes and same(mapped, found)


# those cases that are damage for any reader, tested with whole commands
SURE = [f"{kind} {number}" for kind in ("cut", "behead", "zero", "folder", "packed", "tensor") for number in (0, 1, 2)]
SURE += [f"cut {number}" for number in range(5, 15)]


@pytest.mark.parametrize("case", [*SURE[::3], *(pytest.param(case, marks=pytest.mark.slow) for case in SURE)])
def test_a_run_goes_on_from_what_was_saved_before_the_damage(good, out, resume, case):
    path = out / "ckpt.pt"
    path.write_bytes(damaged_bytes(path.read_bytes(), case, path))
    result = resume()
    assert result.code == 0 and result.err == "", result.err
    (line,) = (line for line in result.out.splitlines() if "trying the one before it" in line)
    assert line.startswith("out/ckpt.pt")
    assert same_state(torch.load(path, weights_only=True), good.end)


@no_warnings
@pytest.mark.parametrize("case", SURE[::2])
def test_with_nothing_saved_before_it_is_one_line(out, resume, command, case):
    path = out / "ckpt.pt"
    path.write_bytes(damaged_bytes(path.read_bytes(), case, path))
    (out / "ckpt-00000004.pt").unlink()
    before = path.read_bytes()
    assert is_refused(resume(), "out/ckpt.pt") and is_refused(resume("--eval_only"), "out/ckpt.pt")
    sampled = command("sample.py", "--device=cpu", "--num_samples=1", "--max_new_tokens=3")
    assert is_refused(sampled, "out/ckpt.pt") and sampled.out == ""
    assert path.read_bytes() == before


def test_undamaged_it_all_works(good, out, resume, command):
    """Control: without damage the command works, so the tests above fail for the right reason."""
    evaluated = resume("--eval_only")
    assert evaluated.code == 0 and "step 8: train loss " in evaluated.out
    assert command("sample.py", "--device=cpu", "--num_samples=1", "--max_new_tokens=3").code == 0
    result = resume()
    assert result.code == 0 and "trying" not in result.out
    assert same_state(torch.load(out / "ckpt.pt", weights_only=True), good.end)


# -- undamaged archives with values that no run can have saved ---------------------------------------------------------

WTE, LN = "transformer.wte.weight", "transformer.ln_f.weight"


def quantized(tensor: torch.Tensor) -> torch.Tensor:
    return torch.quantize_per_tensor(tensor, 0.1, 0, torch.qint8)


def with_number(tensor: torch.Tensor, number: float) -> torch.Tensor:
    tensor = tensor.clone()
    tensor.view(-1)[3] = number
    return tensor


def of_another_model(saved: dict[str, Any]) -> dict[str, Any]:
    parameters = [torch.nn.Parameter(torch.ones(3, 3)) for _ in range(14)]
    optimizer = torch.optim.AdamW([{"params": parameters[:9]}, {"params": parameters[9:]}])
    sum(parameter.sum() for parameter in parameters).backward()
    optimizer.step()
    return optimizer.state_dict()


# by key: values that replace the saved one, or functions that compute them from it
HUGE, LONG = 10**30, 10**400
WEIGHTS = {
    **{f"is {value!r}": value for value in (None, [], {}, 5, "weights", {5: torch.ones(2)}, {WTE: 5}, {WTE: None})},
    "lacks one": lambda model: {name: tensor for name, tensor in model.items() if name != LN},
    "has one more": lambda model: model | {"transformer.h.2.ln_1.weight": torch.ones(16)},
    "of another shape": lambda model: model | {LN: torch.ones(17)},
    "transposed": lambda model: model | {WTE: model[WTE].t()},
    "a number": lambda model: model | {LN: torch.tensor(1.0)},
    "int64": lambda model: {name: tensor.long() for name, tensor in model.items()},
    "one int32": lambda model: model | {LN: model[LN].int()},
    "bool": lambda model: model | {LN: model[LN].bool()},
    "complex": lambda model: model | {LN: model[LN].to(torch.complex64)},
    "float8": lambda model: model | {LN: model[LN].to(torch.float8_e4m3fn)},
    "sparse": lambda model: model | {WTE: model[WTE].to_sparse()},
    "csr": lambda model: model | {WTE: model[WTE].to_sparse_csr()},
    "quantized": lambda model: model | {WTE: quantized(model[WTE])},
    "meta": lambda model: model | {WTE: model[WTE].to("meta")},
    "nested": lambda model: model | {WTE: torch.nested.as_nested_tensor([model[WTE]])},
    "expanded": lambda model: model | {LN: torch.ones(1).expand(16)},
    "expanded to petabytes": lambda model: model | {LN: torch.ones(1).expand(2**50)},
    "nan": lambda model: model | {LN: with_number(model[LN], float("nan"))},
    "inf": lambda model: model | {WTE: with_number(model[WTE], float("-inf"))},
}
ARGUMENTS = [("n_layer", value) for value in (0, -1, 1, 3, 10**9, HUGE, "2", 2.0, None, True, [2])]
ARGUMENTS += [("n_head", value) for value in (0, 3, 32, 10**12, LONG, "2")]
ARGUMENTS += [("n_embd", value) for value in (8, 10**9, HUGE, LONG, 16.0)]
ARGUMENTS += [("vocab_size", value) for value in (0, 2**62, HUGE, "28")]
ARGUMENTS += [("block_size", value) for value in (8, 2**62, HUGE, None)]
ARGUMENTS += [("head_dim", 2**40), ("n_kv_head", 3), ("n_inner", HUGE), ("position", "rope"), ("position", ["learned"])]
ARGUMENTS += [("bias", True), ("bias", "False"), ("norm", 5), ("mlp", "swiglu"), ("mlp", None)]
ARGUMENTS += [("norm_eps", value) for value in ("1e-5", None, [1e-5], float("nan"))]
ARGUMENTS += [("rope_theta", "x"), ("dropout", "0"), ("tie_embeddings", "no"), ("of_another", 16), (5, 5), (None, None)]
MODEL_ARGS = {f"is {value!r}": value for value in (None, [], {}, [1, 2], 7, "n_layer")} | {
    f"{key}={str(value)[:40]}": lambda args, key=key, value=value: args | {key: value} for key, value in ARGUMENTS
}
PLAIN = {
    "iter_num": (None, -1, "8", 8.5, float("inf"), float("nan"), HUGE, LONG, True, [8], torch.tensor([1, 2])),
    "best_val_loss": (None, "4.5", float("nan"), -1.0, [1.0], LONG, torch.tensor([1.0, 2.0]), {}),
    "elapsed_seconds": (None, "long", float("nan"), float("inf"), -1.0, LONG, []),
    "val_loss": (None, "low", [1.0], LONG),
    "bad_steps": (None, "abc", [1], [0.5, 0, 0], [HUGE, 0, 0], {}, [[0], 0, 0]),
    "recent_losses": (None, 5, "abc", ["low"], [float("nan")], [[1.0]], {}),
    "evals_since_best": (None, "1", -1, 0.5, HUGE),
    "evaluated_iter": (None, "8", -2, HUGE),
    "tokenizer": (None, "char", 5, [], {}, {"kind": "char"}, {"kind": "byte"}, {"kind": ["char"]}, torch.ones(3)),
    "scaler": (5, "x", {"scale": "x"}, [1]),
    "wandb_id": (5, [], {}),
    "config": (None, 5, [1], "text", torch.ones(2)),
}
CONFIG = [("seed", -1), ("seed", "x"), ("seed", HUGE), ("beta1", 1.5), ("beta1", None), ("min_lr", float("nan"))]
CONFIG += [("grad_clip", []), ("weight_decay", {}), ("dtype", "int8"), ("patience", 0), ("patience", "x")]
CONFIG += [("decay_lr", 5), ("max_bad_steps", 0), ("dropout", 2.0), ("patience", torch.ones(2)), ("bias", "maybe")]
MOMENTS = {
    "exp_avg": (None, 5, [1.0], torch.zeros(2), torch.zeros(28, 7), torch.zeros(28, 16).int(), "x"),
    "exp_avg_sq": (
        None,
        torch.full((28, 16), -1.0),
        torch.full((28, 16), float("nan")),
        torch.zeros(28, 16).to("meta"),
    ),
    "step": (None, "x", 8, torch.tensor(-1.0), torch.tensor(float("nan")), torch.ones(3), torch.zeros(()).to_sparse()),
}
OPTIMIZER = {f"is {value!r}": value for value in (None, 5, [], {}, "text", {"state": {}}, {"param_groups": []})} | {
    "of another model": of_another_model,
    "no state": lambda saved: {"param_groups": saved["param_groups"]},
    "no groups": lambda saved: {"state": saved["state"]},
    "a group less": lambda saved: saved | {"param_groups": saved["param_groups"][:1]},
    "state is a list": lambda saved: saved | {"state": [1, 2]},
    "state of a number": lambda saved: saved | {"state": saved["state"] | {0: 5}},
    "no parameters": lambda saved: (
        saved | {"param_groups": [group | {"params": []} for group in saved["param_groups"]]}
    ),
    "lists as names": lambda saved: (
        saved | {"param_groups": [g | {"params": [[1]] * 9} for g in saved["param_groups"]]}
    ),
}


def with_moment(saved: dict[str, Any], key: str, value: Any) -> dict[str, Any]:
    return saved | {"state": saved["state"] | {0: saved["state"][0] | {key: value}}}


def test_settings_too_large_for_a_float(good, out, resume):
    torch.save(good.newest | {"config": good.newest["config"] | {"weight_decay": LONG}}, out / "ckpt.pt")
    assert_refused_or_recovered(resume("--eval_only"), out, good)


CONTENTS = {f"model {name}": ("model", value) for name, value in WEIGHTS.items()}
CONTENTS |= {f"model_args {name}": ("model_args", value) for name, value in MODEL_ARGS.items()}
CONTENTS |= {f"{key}={str(value)[:40]}": (key, value) for key, values in PLAIN.items() for value in values}
CONTENTS |= {
    f"config {key}={str(value)[:40]}": ("config", lambda config, key=key, value=value: config | {key: value})
    for key, value in CONFIG
}
CONTENTS |= {f"optimizer {name}": ("optimizer", value) for name, value in OPTIMIZER.items()}
CONTENTS |= {
    f"optimizer {key} {number}": ("optimizer", lambda saved, key=key, value=value: with_moment(saved, key, value))
    for key, values in MOMENTS.items()
    for number, value in enumerate(values)
}


def save_with_content(saved: dict[str, Any], case: str, path: Path) -> None:
    key, value = CONTENTS[case]
    with warnings.catch_warnings():  # about prototype tensor layouts
        warnings.simplefilter("ignore")
        torch.save(saved | {key: value(copy.copy(saved[key])) if callable(value) else value}, path)


@no_warnings
@pytest.mark.parametrize("case", CONTENTS)
def test_contents_that_no_run_has_saved_are_not_evaluated(good, out, resume, case):
    save_with_content(good.newest, case, out / "ckpt.pt")
    assert_refused_or_recovered(resume("--eval_only"), out, good)


@no_warnings
@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=[pytest.mark.slow] * (n % 16 > 0)) for n, case in enumerate(CONTENTS)]
)
def test_contents_that_no_run_has_saved_are_not_trained_on(good, out, resume, case):
    save_with_content(good.newest, case, out / "ckpt.pt")
    assert_refused_or_recovered(resume(), out, good)


@no_warnings
@pytest.mark.parametrize("case", [case for case in CONTENTS if case.startswith(("model", "tokenizer", "val_loss"))])
def test_contents_that_no_run_has_saved_are_not_sampled_from(good, out, command, case):
    save_with_content(good.newest, case, out / "ckpt.pt")
    result = command("sample.py", "--device=cpu", "--num_samples=1", "--max_new_tokens=3")
    assert is_refused(result), (result.code, result.err)


@pytest.mark.parametrize(
    "key", ["model", "model_args", "iter_num", "best_val_loss", "optimizer", "tokenizer", "config"]
)
def test_keys_that_are_missing(good, out, resume, key):
    torch.save({name: value for name, value in good.newest.items() if name != key}, out / "ckpt.pt")
    result = resume()
    if key in ("tokenizer", "config"):  # all settings are given, and the tokenizer is that of the data
        assert result.code == 0 and same_state(torch.load(out / "ckpt.pt", weights_only=True), good.end)
    else:
        assert_refused_or_recovered(result, out, good)


@no_warnings
@pytest.mark.parametrize("content", [None, 5, [], {}, "text", b"bytes", torch.ones(3), [("model", {})]])
def test_archives_that_hold_something_else(good, out, resume, command, content):
    torch.save(content, out / "ckpt.pt")
    assert is_refused(command("sample.py", "--device=cpu"), "out/ckpt.pt")
    assert_refused_or_recovered(resume("--eval_only"), out, good)


@pytest.mark.parametrize("dataset", [None, 5, "", "nowhere"])
def test_without_a_tokenizer_the_data_set_must_be_named(good, out, command, dataset):
    saved = {name: value for name, value in good.newest.items() if name != "tokenizer"}
    torch.save(saved | {"config": saved["config"] | {"dataset": dataset}}, out / "ckpt.pt")
    assert is_refused(command("sample.py", "--device=cpu"))


def test_weights_saved_in_16_bits_are_widened(good, tmp_path):
    halves = {name: tensor.bfloat16() for name, tensor in good.newest["model"].items()}
    torch.save(good.newest | {"model": halves}, tmp_path / "ckpt.pt")
    model = restore_model(checkpoint.load(tmp_path / "ckpt.pt"), tmp_path / "ckpt.pt", GPT, GPTConfig)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert torch.equal(model.transformer.wte.weight, halves[WTE].float())


# -- pickles that would run code ---------------------------------------------------------------------------------------


class Calls:
    """Unpickling this without a check calls function(*arguments)."""

    def __init__(self, function: Any, *arguments: Any):
        self.call = function, arguments

    def __reduce__(self) -> tuple:
        return self.call


def payloads(witness: Path) -> dict[str, Any]:
    code = f"open({str(witness)!r}, 'w').close()"
    return {
        "posix.system": Calls(os.system, f"touch {witness}"),
        "eval": Calls(eval, code),
        "exec": Calls(builtins.exec, code),
        "os.mkdir": Calls(os.mkdir, str(witness)),
        "subprocess": Calls(subprocess.call, ["touch", str(witness)]),
        "torch.save": Calls(torch.save, 5, str(witness)),
        "getattr": Calls(getattr(Path, "touch"), witness),  # noqa: B009  as an attacker would write it
    }


KINDS = list(payloads(Path("witness")))


def write_hostile(path: Path, payload: Any, container: str, around: dict[str, Any]) -> None:
    if container == "os.system":  # by hand, because Python writes posix.system
        path.write_bytes(b"cos\nsystem\n(V" + payload.call[1][0].encode() + b"\ntR.")
    elif container.startswith("pickle"):
        path.write_bytes(pickle.dumps(around | {"config": payload}, protocol=int(container[-1])))
    else:
        saved = around | {"config": payload}
        torch.save(saved, path, _use_new_zipfile_serialization=container == "zip")


HOSTILE = [(kind, container) for kind in KINDS for container in ("zip", "legacy", "pickle 0", "pickle 2", "pickle 4")]
HOSTILE.append(("posix.system", "os.system"))


@pytest.mark.parametrize("kind, container", HOSTILE)
def test_hostile_checkpoints_run_no_code(good, out, resume, command, tmp_path, kind, container):
    witness = tmp_path / "witness"
    write_hostile(out / "ckpt.pt", payloads(witness)[kind], container, good.newest)
    assert is_refused(command("sample.py", "--device=cpu"), "out/ckpt.pt")
    result = resume("--eval_only")
    assert result.code == 0 and "out/ckpt.pt" in result.out and "trying the one before it" in result.out
    assert good.evaluated in result.out.splitlines() and not witness.exists()


@pytest.mark.parametrize("kind, container", [pair for pair in HOSTILE if pair[1] not in ("zip", "legacy")])
def test_hostile_meta_pkl_runs_no_code(train, tmp_path, data_dir, kind, container):
    folder, witness = tmp_path / "mine", tmp_path / "witness"
    shutil.copytree(data_dir / "tiny", folder)
    (folder / "meta.json").unlink()
    write_hostile(folder / "meta.pkl", payloads(witness)[kind], container, {"vocab_size": 1, "itos": {0: "a"}})
    result = train(f"--data_dir={tmp_path}", "--dataset=mine", "--max_iters=2")
    assert is_refused(result, "meta.pkl") and not witness.exists() and not (tmp_path / "out").exists()


@pytest.fixture
def gpt2_folder(tmp_path) -> Path:
    config = {"vocab_size": 61, "n_positions": 16, "n_embd": 8, "n_layer": 1, "n_head": 1}
    transformers.GPT2Config(**config).to_json_file(tmp_path / "config.json", use_diff=False)
    return tmp_path


@pytest.mark.parametrize("kind, container", HOSTILE)
def test_hostile_hugging_face_weights_run_no_code(command, gpt2_folder, kind, container):
    witness = gpt2_folder / "witness"
    write_hostile(
        gpt2_folder / "pytorch_model.bin", payloads(witness)[kind], container, {"wte.weight": torch.ones(61, 8)}
    )
    result = command("sample.py", "--device=cpu", f"--init_from={gpt2_folder}")
    assert is_refused(result, "pytorch_model.bin") and not witness.exists()


@pytest.mark.parametrize("kind", KINDS)
def test_the_payloads_are_live(tmp_path, kind):
    """Control: loaded carelessly, the pickle does create the witness."""
    write_hostile(tmp_path / "live", payloads(tmp_path / "witness")[kind], "pickle 2", {})
    pickle.loads((tmp_path / "live").read_bytes())
    assert (tmp_path / "witness").exists()


NOT_WEIGHTS = [[1, 2], 5, None, {}, {5: torch.ones(2)}, {"wte.weight": 5}, {"wte.weight": "text"}]


@pytest.mark.parametrize(
    "content",
    [
        *(b"", b"PK\3\4", b"junk" * 99, {"wte.weight": torch.ones(2, 2)}),
        *NOT_WEIGHTS,
    ],
)
def test_damaged_hugging_face_weights(command, gpt2_folder, content):
    path = gpt2_folder / "pytorch_model.bin"
    path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
    assert is_refused(command("sample.py", "--device=cpu", f"--init_from={gpt2_folder}"), str(gpt2_folder))


# -- data sets ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(data_dir, tmp_path) -> Path:
    shutil.copytree(data_dir / "tiny", tmp_path / "mine")
    return tmp_path / "mine"


def open_both(folder: Path) -> list[np.ndarray]:
    meta = read_meta(folder)
    return [np.concatenate(Split(folder, name, 16, meta).shards) for name in ("train", "val")]


BINS = [("cut", length) for length in (0, 1, 2, 3, 100, -1, -2, -1000)] + [("grow", length) for length in (1, 2, 1000)]
BINS += [("flip", 0), ("flip", 1), ("zero", 0), ("swap", 0), ("noise", 0)]


def damage_bin(path: Path, kind: str, number: int) -> None:
    data, draw = bytearray(path.read_bytes()), random.Random(f"{kind} {number}")
    start = draw.randrange(2, len(data) - 512)
    if kind == "cut":
        data = data[:number]
    elif kind == "grow":
        data += draw.randbytes(number)
    elif kind == "flip":
        data[start] ^= 1 << draw.randrange(8)
    elif kind == "zero":
        data[start : start + 256] = bytes(256)
    elif kind == "noise":
        data[start : start + 256] = draw.randbytes(256)
    else:
        data = data[start:] + data[:start]
    path.write_bytes(data)


@pytest.mark.parametrize("name", ["train", "val"])
@pytest.mark.parametrize("kind, number", BINS)
def test_damaged_token_files_are_refused(folder, name, kind, number):
    damage_bin(folder / f"{name}.bin", kind, number)
    with pytest.raises(UserError, match=rf"{name}\.bin (is damaged|has)") as caught:
        open_both(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["train", "val"])
@pytest.mark.parametrize("kind, number", BINS[::4])
def test_no_run_starts_on_damaged_token_files(train, folder, tmp_path, name, kind, number):
    damage_bin(folder / f"{name}.bin", kind, number)
    result = train(f"--data_dir={tmp_path}", "--dataset=mine", "--max_iters=2")
    assert is_refused(result, f"{name}.bin") and not (tmp_path / "out").exists()


def test_token_files_without_a_meta_json(folder):
    """nanoGPT's files have no checksum; only their size and the range of their ids can be checked."""
    (folder / "meta.json").unlink()
    chars = "".join(map(chr, range(97, 97 + 40)))
    meta = {"vocab_size": 40, "itos": dict(enumerate(chars)), "stoi": {c: i for i, c in enumerate(chars)}}
    (folder / "meta.pkl").write_bytes(pickle.dumps(meta))
    expected, data = open_both(folder)[0], (folder / "train.bin").read_bytes()
    for wrong in (b"", data[:2], data[:-1], data + b"\0", data + b"\x28\0", data[1:], b"\xff" + data[1:]):
        (folder / "train.bin").write_bytes(wrong)
        with pytest.raises(UserError, match=r"train\.bin (is damaged|has)"):
            open_both(folder)
    (folder / "train.bin").write_bytes(data)
    assert (open_both(folder)[0] == expected).all()


META = {
    "tokenizer": (None, 5, "char", [], {}, {"kind": "char"}, {"kind": "none"}, {"kind": "byte"}, {"kind": "gpt2"}),
    "vocab_size": (None, "28", 27, 0, -1, 28.5),
    "dtype": (None, 16, "uint32", "float16", "O"),
    "splits": (None, 5, [], {"train": 5}, {"train": {}}, {"train": {"tokens": 1, "bytes": 1}}),
}
COUNTS = {"tokens": (None, "9", 9, -1, 1.5), "bytes": (None, "9", 1.5)}
CHARS = ("", "aa", 5, None, ["a"], "\ud800bcdefghijklmnopqrstuvwxyz .")
EDITS = {f"{key}={str(value)[:30]}": {key: value} for key, values in META.items() for value in values}


def edited(meta: dict[str, Any]) -> dict[str, Any]:
    """By name: impossible descriptions of a data set."""
    found = {name: meta | change for name, change in EDITS.items()}
    for key in META:
        found[f"no {key}"] = {name: value for name, value in meta.items() if name != key}
    for chars in CHARS:
        found[f"chars={chars!r}"] = meta | {"tokenizer": meta["tokenizer"] | {"chars": chars}}
    for split in ("train", "val"):
        found[f"no {split}"] = meta | {"splits": {k: v for k, v in meta["splits"].items() if k != split}}
        for key, values in COUNTS.items():
            for value in values:
                wrong = meta["splits"] | {split: meta["splits"][split] | {key: value}}
                found[f"{split} {key}={str(value)[:30]}"] = meta | {"splits": wrong}
        for value in (None, "0" * 64):
            wrong = meta["splits"] | {split: meta["splits"][split] | {"sha256": value}}
            found[f"{split} sha256={value}"] = meta | {"splits": wrong}
    return found


DESCRIBED = {"tokenizer": {"kind": "char"}, "splits": {"train": {}, "val": {}}}
NAMES = list(edited(DESCRIBED))


@pytest.mark.parametrize("case", NAMES)
def test_descriptions_of_a_data_set_that_cannot_be(folder, case):
    path = folder / "meta.json"
    meta = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(edited(meta)[case]), encoding="utf-8")
    with pytest.raises(UserError, match=r"meta\.json|(train|val)\.bin is damaged") as caught:
        open_both(folder)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500


@pytest.mark.parametrize("case", NAMES[::4])
def test_no_run_starts_on_descriptions_that_cannot_be(train, folder, tmp_path, case):
    test_descriptions_of_a_data_set_that_cannot_be(folder, case)  # writes it
    result = train(f"--data_dir={tmp_path}", "--dataset=mine", "--max_iters=2")
    assert is_refused(result) and not (tmp_path / "out").exists()


@pytest.mark.parametrize("number", range(20))
def test_a_damaged_meta_json_is_refused_or_says_the_same(folder, number):
    expected = open_both(folder)
    path, draw = folder / "meta.json", random.Random(number)
    data = bytearray(path.read_bytes())
    before = json.loads(data)
    if number < 5:
        data = data[: draw.randrange(len(data))]
    elif number < 7:
        data[draw.randrange(len(data))] = 0xFF
    else:
        data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    path.write_bytes(data)
    try:
        found = open_both(folder)
    except UserError as error:
        assert "\n" not in str(error) and str(folder) in str(error)
    else:  # the damage is in "source", for example
        assert all((a == b).all() for a, b in zip(found, expected, strict=True))
        after = read_meta(folder)
        assert all(after[key] == before[key] for key in ("vocab_size", "dtype"))


@pytest.mark.parametrize(
    "content",
    [
        *(None, 5, [], {}, "text", {"vocab_size": 2}),
        *(
            {"vocab_size": 2, "itos": {0: "a", 1: wrong}, "stoi": {"a": 0, "b": 1}}
            for wrong in ("c", 5, None, "bb", "")
        ),
        *({"vocab_size": n, "itos": {0: "a", 1: "b"}, "stoi": {"a": 0, "b": 1}} for n in (3, 0, "2", 2.0)),
        {"vocab_size": 2, "itos": {0: "a", 2: "b"}, "stoi": {"a": 0, "b": 2}},
        {"vocab_size": 2, "itos": ["a", "b"], "stoi": {"a": 0, "b": 1}},
    ],
)
def test_vocabularies_that_cannot_be(train, folder, tmp_path, content):
    (folder / "meta.json").unlink()
    (folder / "meta.pkl").write_bytes(pickle.dumps(content))
    result = train(f"--data_dir={tmp_path}", "--dataset=mine", "--max_iters=2")
    assert is_refused(result, "meta.pkl") and not (tmp_path / "out").exists()


@pytest.mark.parametrize("number", range(15))
def test_a_damaged_meta_pkl_is_refused_or_has_other_letters(folder, number):
    """meta.pkl has no checksum, so one letter in place of another goes unnoticed."""
    (folder / "meta.json").unlink()
    chars = sorted("abcdefghijklmnopqrstuvwxyz .")
    meta = {"vocab_size": 28, "itos": dict(enumerate(chars)), "stoi": {c: i for i, c in enumerate(chars)}}
    data, draw = bytearray(pickle.dumps(meta)), random.Random(number)
    if number < 5:
        data = data[: draw.randrange(len(data))]
    else:
        data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    (folder / "meta.pkl").write_bytes(data)
    try:
        found = read_meta(folder)
    except UserError as error:
        assert "meta.pkl" in str(error) and "\n" not in str(error)
    else:
        assert number >= 5 and found["vocab_size"] == 28 and len(set(found["tokenizer"]["chars"])) == 28
        assert len(set(found["tokenizer"]["chars"]) & set(chars)) >= 27


def shard(tokens: np.ndarray, header: list[int]) -> bytes:
    words = np.zeros(256, dtype="<i4")
    words[: len(header)] = header
    return words.tobytes() + tokens.astype("<u2").tobytes()


@pytest.mark.parametrize("name", ["train.bin", "web_train_000001.bin"])
@pytest.mark.parametrize(
    "header",
    [
        *([20240520, version, 3000] for version in (0, 2)),
        *([20240520, 1, n] for n in (0, 2999, 3001, -1)),
    ],
)
def test_shards_with_wrong_headers(tmp_path, name, header):
    tokens = np.random.default_rng(0).integers(20_000, size=3000)
    (tmp_path / name.replace("train", "val")).write_bytes(shard(tokens, [20240520, 1, 3000]))
    (tmp_path / name).write_bytes(shard(tokens, [20240520, 1, 3000]))
    assert all((found == tokens).all() for found in open_both(tmp_path))
    (tmp_path / name).write_bytes(shard(tokens, header))
    with pytest.raises(UserError, match=rf"{name} is damaged") as caught:
        open_both(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("length", [0, 1, 11, 12, 1000, 1024, 1025, -1, -2])
def test_shards_cut_short(train, tmp_path, length):
    (tmp_path / "mine").mkdir()
    whole = shard(np.arange(3000), [20240520, 1, 3000])
    (tmp_path / "mine" / "val_0.bin").write_bytes(whole)
    (tmp_path / "mine" / "train_0.bin").write_bytes(whole[:length])
    result = train(f"--data_dir={tmp_path}", "--dataset=mine", "--max_iters=2", "--n_embd=2")
    assert is_refused(result, "train_0.bin") and not (tmp_path / "out").exists()


# -- the record of a resumed run --------------------------------------------------------------------------------------

LINES = (b"\xff\xfe\n", b"{\n", b"[" * 100_000 + b"\n", b"5\n", b"null\n", b'{"iter": "3"}\n', b'{"iter": 1e999}\n')
LINES += (b'{"iter": 2, "tokens": NaN, "elapsed_seconds": 0}\n', b"\0" * 5000 + b"\n", b'{"iter": {}}\n')


@pytest.mark.parametrize("line, place", [(LINES[0], 0), *((line, 3) for line in LINES)])
def test_a_damaged_record_does_not_cost_the_run(good, out, resume, line, place):
    lines = (out / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    (out / "metrics.jsonl").write_bytes(b"".join([*lines[:place], line, *lines[place:]]))
    result = resume()
    assert result.code == 0 and result.err == ""
    assert f"metrics.jsonl: ignored 1 damaged lines, the first is line {place + 1}" in result.out
    assert same_state(torch.load(out / "ckpt.pt", weights_only=True), good.end)
    recorded = [json.loads(line) for line in (out / "metrics.jsonl").read_bytes().splitlines()]
    assert [record["iter"] for record in recorded] == list(range(11))


@pytest.mark.parametrize(
    "content", [b"", b"{", b"\xff\xfe", b"[1]", b"null", b"[" * 100_000, b'{"earlier": 5}', b"\0" * 99]
)
def test_a_damaged_config_json_does_not_cost_the_run(good, out, resume, content):
    (out / "config.json").write_bytes(content)
    result = resume()
    assert result.code == 0 and result.err == ""
    assert same_state(torch.load(out / "ckpt.pt", weights_only=True), good.end)
    assert "config" in json.loads((out / "config.json").read_bytes())


@pytest.mark.parametrize("name", ["metrics.jsonl", "config.json", "ckpt.pt"])
def test_folders_where_files_are_due(good, out, resume, name):
    (out / name).unlink()
    (out / name).mkdir()
    result = resume()
    assert is_refused(result, name), (result.code, result.err)
