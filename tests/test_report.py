"""report.py and what it reads: the figures of real runs, the picture, the page, the record of the environment."""

import base64
import json
import re
import shutil
import statistics
import subprocess
import sys
from html.parser import HTMLParser
from io import BytesIO
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
import torch
from matplotlib.figure import Figure

from kqv import checkpoint, machine, plots, rundir
from kqv import log as log_room
from tests.conftest import ROOT


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("trained")


@pytest.fixture
def runs(train, trained, tmp_path) -> tuple[Path, Path]:
    """Two runs in the working directory, "one" and "two", that differ in n_layer, learning_rate and max_iters."""
    if not (trained / "two").exists():  # trained once for all tests
        for name, *arguments in (("one", "--learning_rate=3e-2", "--max_iters=12"), ("two", "--n_layer=1")):
            result = train(f"--out_dir={trained / name}", "--eval_interval=5", "--max_iters=9", *arguments)
            assert result.code == 0, result.err
    for name in ("one", "two"):
        shutil.copytree(trained / name, tmp_path / name)
    return tmp_path / "one", tmp_path / "two"


def metrics(out_dir: Path) -> list[dict]:
    return [json.loads(line) for line in (out_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def cells(text: str) -> list[list[str]]:
    """The tables in a pipe's output: columns are at least two spaces apart."""
    return [re.split(r"  +", line.strip()) for line in text.splitlines() if "  " in line]


def pixels(png: bytes | Path) -> np.ndarray:
    """A PNG as (height, width, 4), values from 0 to 1."""
    return matplotlib.image.imread(BytesIO(png) if isinstance(png, bytes) else png, format="png")


def has_color(image: np.ndarray, color: str) -> bool:
    wanted = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    return (np.abs(image[..., :3] - wanted).max(axis=-1) < 0.02).sum() > 100


def expected(out_dir: Path) -> dict[str, str]:
    """The table's figures, computed here from metrics.jsonl."""
    lines, weights = metrics(out_dir), checkpoint.load(out_dir / "ckpt.pt")["model"]
    counted = weights.keys() - {"transformer.wpe.weight", "lm_head.weight"}  # positions; tied to wte
    evaluated = sorted((line for line in lines if "val_loss" in line), key=lambda line: line["val_loss"])
    return {
        "iterations": str(lines[-1]["iter"]),
        "tokens": f"{lines[-1]['tokens']:,}",
        "minutes": f"{lines[-1]['elapsed_seconds'] / 60:.2f}",
        "best val loss": f"{evaluated[0]['val_loss']:.4f}",
        "best at iteration": str(evaluated[0]["iter"]),
        "best bits per byte": f"{evaluated[0]['val_bpb']:.4f}",
        "last val loss": f"{lines[-1]['val_loss']:.4f}",
        "tokens/s (median)": f"{statistics.median(line['tokens_per_second'] for line in lines[:-1]):,.0f}",
        "parameters": f"{sum(weights[name].numel() for name in counted):,}",
    }


class Page(HTMLParser):
    """The cells of a page's tables, its picture, and every element that would fetch or run something."""

    def __init__(self, text: str):
        super().__init__()
        self.rows, self.pictures, self.foreign, self.tag = [], [], [], ""
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tag = tag
        if tag == "tr":
            self.rows.append([])
        for name, value in attributes:
            if name == "src" and value.startswith("data:image/png;base64,"):
                self.pictures.append(base64.b64decode(value.partition(",")[2], validate=True))
            elif name in ("src", "href", "srcset") or name.startswith("on"):
                self.foreign.append(value)
        if tag in ("script", "link", "iframe", "object", "base"):
            self.foreign.append(tag)

    def handle_data(self, data):
        if self.tag in ("th", "td") and data.strip():
            self.rows[-1].append(data)


# -- two real runs -----------------------------------------------------------------------------------------------------


def test_table_differences_picture_and_page_of_two_runs(command, runs):
    result = command("report.py", "one", "two", "--html=page.html")
    assert result.code == 0, result.err
    table = cells(result.out)
    assert table[0] == ["run", "one", "two"]
    figures = {row[0]: row[1:] for row in table[1:]}
    for number, out_dir in enumerate(runs):
        for title, figure in expected(out_dir).items():
            assert figures[title][number] == figure, title
    start = table.index(["setting", "one", "two"])
    assert sorted(table[start + 1 :]) == [
        ["learning_rate", "0.03", "0.01"],
        ["max_iters", "12", "9"],
        ["n_layer", "2", "1"],
    ]

    assert "picture: compare.png" in result.out and "page: page.html" in result.out
    image = pixels(Path("compare.png"))
    assert image.shape[1] > 1500 and has_color(image, plots.COLORS[0]) and has_color(image, plots.COLORS[1])
    half = image.shape[1] // 2
    for panel in (image[:, :half], image[:, half:]):  # over tokens and over time; both show both runs
        assert has_color(panel, plots.COLORS[0]) and has_color(panel, plots.COLORS[1])

    text = Path("page.html").read_text(encoding="utf-8")
    assert not re.search(r"https?://|url\(|@import", text)
    page = Page(text)
    assert page.foreign == [] and page.rows == table
    (picture,) = page.pictures
    assert np.array_equal(pixels(picture), image)
    assert not list(Path().glob("*.new"))


def test_the_picture_of_one_run_is_loss_png(command, runs):
    result = command("report.py", "one")
    assert result.code == 0 and "setting" not in result.out
    image = pixels(Path("one/loss.png"))
    assert has_color(image, plots.COLORS[0]) and has_color(image, plots.COLORS[1])  # validation and training
    assert command("report.py", "one", "--png=other.png").code == 0
    assert np.array_equal(pixels(Path("other.png")), image)


def test_a_terminal_gets_a_table_with_lines(runs, tmp_path):
    code = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r})\n"
        "import report; from pathlib import Path; from kqv import rundir\n"
        "sys.stdout.isatty = lambda: True\n"
        "report.print_table(report.summary([rundir.read_run(Path(name)) for name in ('one', 'two')]))"
    )
    shown = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True
    ).stdout
    assert all(figure in shown for out_dir in runs for figure in expected(out_dir).values())
    shown = re.sub(r"\x1b\[[0-9;]*m", "", shown)
    assert "│ best val loss" in shown
    assert max(map(len, shown.splitlines())) <= 80


# -- artificial runs ---------------------------------------------------------------------------------------------------


def write_run(out_dir: Path, losses: list[float | None], settings: dict | None = None, **rest) -> None:
    """Write a run with these validation losses, one every 10 iterations of 100 tokens and one second each."""
    out_dir.mkdir(parents=True)
    lines = []
    for i in range(10 * len(losses) - 9):
        line = {"iter": i, "tokens": 100 * i, "elapsed_seconds": 1.0 * i, "train_loss": 2 + 2 * 0.9**i}
        lines.append(json.dumps(line | ({"val_loss": losses[i // 10]} if i % 10 == 0 else {})) + "\n")
    (out_dir / "metrics.jsonl").write_text("".join(lines), encoding="utf-8")
    if settings is not None:
        (out_dir / "config.json").write_text(json.dumps({"config": settings} | rest), encoding="utf-8")


HOSTILE = "<script src=http:x>alert(1)<"  # a folder's name has no slash


def test_hostile_names_and_values_are_text(command, tmp_path):
    write_run(tmp_path / HOSTILE, [4.0, 3.0], {"mlp": "</td><script>alert(1)</script>", "seed": "\x1b[2J\udc80"})
    write_run(tmp_path / "_$x^{$[red]\x1b", [4.0, 3.0], {"mlp": "gelu", "seed": 1})
    result = command("report.py", HOSTILE, "_$x^{$[red]\x1b", "--html=page.html")
    assert result.code == 0, result.err
    assert "\x1b" not in result.out
    text = Path("page.html").read_text(encoding="utf-8")
    assert "<script" not in text
    page = Page(text)
    assert page.foreign == [] and len(page.pictures) == 1
    assert ["mlp", "</td><script>alert(1)</script>", "gelu"] in page.rows
    assert page.rows[0] == ["run", HOSTILE, "_$x^{$[red]\N{REPLACEMENT CHARACTER}"]


def test_many_runs_are_listed_one_a_line(command, tmp_path):
    for number in range(9):  # more than there are colours
        write_run(
            tmp_path / f"seed{number}", [4.0, 3.0 - number / 10], {"seed": number, "n_layer": 2, "out_dir": number}
        )
    result = command("report.py", *(f"seed{number}" for number in range(9)))
    assert result.code == 0, result.err
    table = cells(result.out)
    assert table[0][:2] == ["run", "iterations"] and [row[4] for row in table[1:10]] == [
        f"{3 - number / 10:.4f}" for number in range(9)
    ]
    assert table[10:] == [["setting", "seed"], *([f"seed{number}", str(number)] for number in range(9))]


def test_what_was_not_measured_is_a_dash_and_no_error(command, tmp_path):
    write_run(tmp_path / "bare", [None])  # no config.json, and its only validation loss was not a number
    write_run(tmp_path / "full", [3.0, 2.5, 2.5, 2.7], {"seed": 1}, parameters=12345)
    result = command("report.py", "bare", "full")
    assert result.code == 0, result.err
    table = {row[0]: row[1:] for row in cells(result.out)}
    assert table["best val loss"] == ["-", "2.5000"] and table["best at iteration"] == ["-", "10"]
    assert table["last val loss"] == ["-", "2.7000"] and table["parameters"] == ["-", "12,345"]
    assert "seed" not in table  # only one run has a config


def test_the_environment_is_compared_where_it_matters(command, tmp_path):
    for name, commit, memory in (("a", "1234", 1), ("b", "5678", 2)):
        around = {"commit": commit, "ram_bytes": memory, "device": "NVIDIA H100", "started": name}
        write_run(tmp_path / name, [3.0], {"device": "auto" if name == "a" else "cuda"}, environment=around)
    result = command("report.py", "a", "b")
    assert cells(result.out)[-2:] == [["setting", "a", "b"], ["commit", "1234", "5678"]]


def test_the_beginning_does_not_squeeze_the_rest(tmp_path):
    write_run(tmp_path / "long", [10.0, *np.linspace(2.5, 2.0, 99).tolist()])
    write_run(tmp_path / "short", [10.0, 9.0, 3.0])
    long, short = (rundir.read_run(tmp_path / name) for name in ("long", "short"))
    low, high = plots.limits([long])
    assert 1.9 < low < 2.0 and 2.4 < high < 2.6
    assert 3.0 < plots.limits([long, short])[1] < 3.3  # the short run's losses are inside
    write_run(tmp_path / "level", [2.5, 2.4, 2.3])
    assert plots.limits([rundir.read_run(tmp_path / "level")])[1] > 4  # cutting off would gain nothing


def test_smoothing_keeps_a_level_and_a_slope():
    ramp = np.arange(400.0)
    assert plots.smoothed([3.0] * 400) == pytest.approx(np.full(400, 3.0))
    assert plots.smoothed(ramp.tolist())[20:-20] == pytest.approx(ramp[20:-20], abs=0.51)


# -- errors ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "which runs?"),
        (["nothing"], "no folder nothing"),
        (["empty"], "empty has no metrics.jsonl"),
        (["fine", "started"], "started/metrics.jsonl: no iteration is recorded yet"),
        (["started", "fine", "empty"], "no iteration is recorded yet; empty has no metrics.jsonl"),
        (["config"], "config/config.json: damaged"),
        (["fine", "--png="], "png=''"),
        (["fine", "--html=/"], "html='/'"),
        (["fine", "--html=no/page.html"], "no/page.html"),
        (["fine", "--htm=x"], "did you mean 'html'"),
    ],
)
def test_bad_input_is_one_line(command, tmp_path, arguments, message):
    for name in ("fine", "empty", "started", "config"):
        write_run(tmp_path / name, [3.0, 2.0], {})
    (tmp_path / "empty" / "metrics.jsonl").unlink()
    (tmp_path / "started" / "metrics.jsonl").write_bytes(b"")
    (tmp_path / "config" / "config.json").write_bytes(b'{"config": []}')
    result = command("report.py", *arguments)
    assert result.code == 2
    (line,) = result.err.splitlines()
    assert line.startswith("error: ") and message in line


def test_a_folder_that_cannot_be_read_does_not_hide_the_others(command, tmp_path):
    for name in ("fine", "empty"):
        write_run(tmp_path / name, [3.0, 2.0], {})
    (tmp_path / "empty" / "metrics.jsonl").unlink()
    result = command("report.py", "empty", "fine")
    assert result.code == 2 and result.err == "error: empty has no metrics.jsonl, so it is not the out_dir of a run\n"
    assert ["best val loss", "2.0000"] in cells(result.out) and Path("compare.png").is_file()


@pytest.mark.parametrize("line", [b'{"iter": 1, "\xff\x00', b'{"iter": "0", "tokens": 0, "elapsed_seconds": 0}'])
def test_a_damaged_line_is_left_out_with_a_note(command, tmp_path, line):
    write_run(tmp_path / "damaged", [3.0, 2.0], {})
    path = tmp_path / "damaged" / "metrics.jsonl"
    lines = path.read_bytes().splitlines()
    path.write_bytes(b"\n".join([lines[0], line, *lines[2:], b""]))
    result = command("report.py", "damaged")
    assert result.code == 0
    assert result.err == "damaged/metrics.jsonl: ignored 1 damaged lines, the first is line 2\n"
    assert ["best val loss", "2.0000"] in cells(result.out)


NANOGPT = """number of parameters: 0.80M
step 0: train loss 4.1649, val loss 4.1634
iter 0: loss 4.1842, time 2000.00ms, mfu -100.00%
iter 10: loss 3.0000, time 100.00ms, mfu 0.31%
step 20: train loss 2.5000, val loss 2.4500
iter 20: loss 2.5000, time 400.00ms, mfu 0.31%
"""


def test_what_nanogpt_has_printed_is_a_run_too(command, tmp_path):
    write_run(tmp_path / "ours", [4.0, 3.0, 2.0], {"seed": 1})
    (tmp_path / "nanogpt.log").write_text(NANOGPT, encoding="utf-8")
    result = command("report.py", "ours", "nanogpt.log")
    assert result.code == 0, result.err
    table = {row[0]: row[1:] for row in cells(result.out)}
    assert table["run"] == ["ours", "nanogpt.log"] and table["iterations"] == ["20", "20"]
    assert table["best val loss"] == ["2.0000", "2.4500"] and table["tokens"] == ["2,000", "-"]
    assert table["minutes"] == ["0.33", "0.11"]  # 2 s, then ten times 0.1 s, then nine times 0.4 s
    image = pixels(Path("compare.png"))
    for panel in (image[:, : image.shape[1] // 2], image[:, image.shape[1] // 2 :]):  # over iterations and over time
        assert has_color(panel, plots.COLORS[0]) and has_color(panel, plots.COLORS[1])
    (tmp_path / "other.log").write_text("nothing of the kind", encoding="utf-8")
    assert "other.log: no lines as train.py prints them" in command("report.py", "other.log").err


def test_the_page_of_one_run_lists_its_settings(command, runs):
    result = command("report.py", "two", "--html=page.html")
    assert result.code == 0, result.err
    text = Path("page.html").read_text(encoding="utf-8")
    page = Page(text)
    assert ["n_layer", "1", "flag"] in page.rows and ["position", "learned"] in page.rows
    assert ["torch", torch.__version__, "environment"] in page.rows
    assert text.index("n_layer") < text.index("<details>") < text.index("position") and page.foreign == []


def test_few_evaluations_are_not_joined_by_a_line(tmp_path):
    for count, joined in ((2, False), (5, True)):
        write_run(tmp_path / str(count), [4.0, 3.0, 2.9, 2.8, 2.7][:count])
        run = rundir.read_run(tmp_path / str(count))
        _, val_line = plots.draw_run(Figure().subplots(), run, "iter", 1, 0, alone=True)
        assert (val_line.get_linestyle() != "None") is joined


@pytest.mark.parametrize(
    "line",
    ["", "3", "[]", "{}", "[" * 100_000, "9" * 5000]
    + [
        f'{{"iter": 1, "tokens": 1, "elapsed_seconds": 1, "val_loss": {x}}}' for x in ("NaN", "1e999", '"2"', "9" * 400)
    ],
)
def test_a_line_that_is_no_record_is_found(tmp_path, line):
    (tmp_path / "metrics.jsonl").write_text(
        f'{{"iter": 0, "tokens": 0, "elapsed_seconds": 0}}\n{line}\n', encoding="utf-8"
    )
    records, damaged = rundir.read_metrics(tmp_path / "metrics.jsonl")
    assert [r["iter"] for r in records] == [0] and damaged == [2]


def test_a_torn_last_line_is_dropped(command, runs):
    path = runs[0] / "metrics.jsonl"
    whole = command("report.py", "one").out
    path.write_bytes(path.read_bytes() + b'{"iter": 13, "tok')
    torn = command("report.py", "one")
    assert torn.code == 0 and torn.out == whole


def test_a_run_goes_on_without_its_picture(monkeypatch, tmp_path):
    write_run(tmp_path / "out", [3.0, 2.0])
    notes = []
    (tmp_path / "out" / "loss.png").mkdir()
    assert plots.refresh_picture(tmp_path / "out", notes.append) is True
    assert len(notes) == 1 and "loss.png" in notes[0]
    (tmp_path / "out" / "loss.png").rmdir()
    for name in ("matplotlib", "matplotlib.figure"):
        monkeypatch.setitem(sys.modules, name, None)  # as if it were not installed
    assert plots.refresh_picture(tmp_path / "out", notes.append) is False
    assert len(notes) == 2 and notes[1].endswith("pip install matplotlib")
    assert not (tmp_path / "out" / "loss.png").exists()


# -- what config.json records ------------------------------------------------------------------------------------------


def test_the_environment_is_plain_json_and_right(runs):
    found = machine.describe_environment("cpu")
    recorded = json.loads((runs[0] / "config.json").read_text(encoding="utf-8"))["environment"]
    assert recorded.keys() == found.keys() and recorded["torch"] == torch.__version__ and recorded["device"] == "cpu"
    assert json.loads(json.dumps(found)) == found
    assert found["torch"] == torch.__version__ and found["numpy"] == np.__version__
    assert found["python"] == ".".join(map(str, sys.version_info[:3]))
    assert found["command"] == sys.argv and found["device"] == "cpu" and found["started"].endswith("+00:00")
    assert found["cpu"] and found["cpu_cores"] >= 1 and found["ram_bytes"] > 2**28


def test_commit_and_dirty_flag(monkeypatch, tmp_path):
    def git(*arguments):
        identity = ("-c", "user.name=a", "-c", "user.email=a@b", "-c", "core.hooksPath=/dev/null")
        done = subprocess.run(
            ["git", "-C", tmp_path, *identity, *arguments], capture_output=True, text=True, check=True
        )
        return done.stdout.strip()

    for name in ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE"):  # a commit hook may have started the tests
        monkeypatch.delenv(name, raising=False)
    git("init", "-q")
    project = tmp_path / "project"
    project.mkdir()
    (project / "model.py").write_text("1", encoding="utf-8")
    monkeypatch.setattr(machine, "ROOT", project)

    def found():
        environment = machine.describe_environment("cpu")
        return environment["commit"], environment["dirty"]

    assert found() == (None, None)  # it lies inside another repository
    git("add", "project")
    git("commit", "-q", "-m", "first")
    commit = git("rev-parse", "HEAD")
    (project / "notes.txt").write_text("not of the project", encoding="utf-8")
    assert found() == (commit, False)
    (project / "model.py").write_text("2", encoding="utf-8")
    assert found() == (commit, True)
    monkeypatch.setenv("PATH", str(tmp_path))  # no git
    assert found() == (None, None)


def test_a_resumed_run_keeps_its_earlier_environments(tmp_path, capsys):
    def start(iter_num: int, commit: str) -> dict:
        log = log_room.Log(main=True)
        log.open(tmp_path, {"seed": 1}, {"seed": "flag"}, iter_num, {"environment": {"commit": commit}})
        log.record({"iter": iter_num, "tokens": 0, "elapsed_seconds": 0.0})
        log.close()
        return json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))

    first = start(0, "a")
    assert first == {"config": {"seed": 1}, "origin": {"seed": "flag"}, "environment": {"commit": "a"}}
    start(1, "b")
    third = start(2, "c")
    assert third["environment"] == {"commit": "c"} and third["earlier"] == [{"commit": "a"}, {"commit": "b"}]
    assert [line["iter"] for line in metrics(tmp_path)] == [0, 1, 2]
    assert start(0, "d") == first | {"environment": {"commit": "d"}}  # a new run

    (tmp_path / "config.json").write_text("{", encoding="utf-8")  # a damaged file does not stop the run
    with (tmp_path / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write("{\n")
    assert "earlier" not in start(1, "e")
    assert "ignored 1 damaged lines, the first is line 2" in capsys.readouterr().out
    assert [line["iter"] for line in metrics(tmp_path)] == [0, 1]


def test_runs_of_different_tokens_are_compared_by_bits_per_byte(tmp_path):
    from report import comparable

    runs = []
    for name, loss, bpb in (("char", 1.4, 2.0), ("bpe", 4.2, 1.9)):
        records = [
            {"iter": 0, "train_loss": loss, "val_loss": loss, "val_bpb": bpb, "elapsed_seconds": 1.0, "tokens": 9}
        ]
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.jsonl").write_text("\n".join(map(json.dumps, records)) + "\n")
        (tmp_path / name / "config.json").write_text("{}")
        runs.append(rundir.read_run(tmp_path / name))
    scaled, unit = comparable(runs)
    assert unit == "bits per byte"
    assert [run.records[0]["val_loss"] for run in scaled] == pytest.approx([2.0, 1.9])
    assert [run.records[0]["train_loss"] for run in scaled] == pytest.approx([2.0, 1.9])
    assert comparable(runs[:1]) == (runs[:1], "nats per token")
