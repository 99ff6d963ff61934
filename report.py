"""What runs did: a table, the settings that differ between them, and a picture of their losses.

python report.py out-a out-b --html=compare.html
"""

import base64
import io
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from kqv import cli
from kqv.errors import UserError
from kqv.rundir import read_config, read_metrics, write_whole

if TYPE_CHECKING:
    import numpy as np
    from matplotlib.axes import Axes
    from matplotlib.lines import Line2D

Table = list[list[str]]  # rows of cells; the first row is the heading, the first column says what a row is about

# Okabe and Ito's colours, which the colour-blind can tell apart too; runs differ in their markers as well
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = "os^DvX"
NAMES = {"out_dir", "wandb_project", "wandb_run_name"}  # settings that change nothing about a run
ENVIRONMENT = ("commit", "dirty", "torch", "device")  # what changes a run's numbers or speed besides its settings
SMOOTH_FROM = 100  # training losses; fewer are drawn as they are


@dataclass(kw_only=True)
class Report:
    POSITIONAL: ClassVar[str] = "runs"
    runs: Annotated[tuple[str, ...], "the out_dir of each run"] = ()
    png: Annotated[str | None, "the picture; None: loss.png in the one run's folder, for several compare.png"] = None
    html: Annotated[str | None, "also write one page with all of it, which needs no network"] = None

    def __post_init__(self):
        if not self.runs:
            raise UserError("which runs? python report.py OUT_DIR [OUT_DIR ...]")
        for key in ("png", "html"):
            value = getattr(self, key)
            if value is not None and not Path(value).name:
                raise UserError(f"{key}={value!r}: expected the name of a file")


# -- reading -----------------------------------------------------------------------------------------------------------


@dataclass
class Run:
    name: str
    records: list[dict[str, Any]]  # the lines of metrics.jsonl, at least one
    recorded: dict[str, Any]  # config.json

    def having(self, key: str) -> list[dict[str, Any]]:
        """The records in which `key` was measured."""
        return [record for record in self.records if record.get(key) is not None]

    def best(self) -> dict[str, Any] | None:
        """The record with the lowest validation loss, the first of equals; None before the first evaluation."""
        return min(self.having("val_loss"), key=lambda record: record["val_loss"], default=None)


def read_run(out_dir: Path) -> Run:
    """What train.py recorded in this folder. UserError where that is missing, empty or damaged."""
    path = out_dir / "metrics.jsonl"
    if not out_dir.is_dir():
        raise UserError(f"no folder {out_dir}")
    if not path.is_file():
        raise UserError(f"{out_dir} has no metrics.jsonl, so it is not the out_dir of a run")
    records, damaged = read_metrics(path)
    if damaged:
        raise UserError(f"{path}: line {damaged[0]} is damaged")
    if not records:
        raise UserError(f"{path}: no iteration is recorded yet")
    return Run(printable(str(out_dir)), records, read_config(out_dir / "config.json"))


def printable(text: str) -> str:
    """`text` without characters that would steer a terminal or cannot be encoded."""
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)


# -- tables ------------------------------------------------------------------------------------------------------------


def summary(runs: list[Run]) -> Table:
    """What each run cost and reached, a column a run. "-": not measured."""
    titles = ["run", "iterations", "tokens", "minutes", "best val loss", "best at iteration", "best bits per byte"]
    columns = [[*titles, "last val loss", "tokens/s (median)", "parameters"]]
    for run in runs:
        end, best, speeds = run.records[-1], run.best() or {}, run.having("tokens_per_second")
        last = run.having("val_loss")[-1] if best else {}
        speed = statistics.median(record["tokens_per_second"] for record in speeds) if speeds else None
        cells = [(end["iter"], ","), (end["tokens"], ","), (end["elapsed_seconds"] / 60, ",.2f")]
        cells += [(best.get("val_loss"), ".4f"), (best.get("iter"), ","), (best.get("val_bpb"), ".4f")]
        cells += [(last.get("val_loss"), ".4f"), (speed, ",.0f"), (run.recorded.get("parameters"), ",")]
        columns.append([run.name, *("-" if value is None else format(value, form) for value, form in cells)])
    return turned(columns)


def differences(runs: list[Run]) -> Table:
    """The settings that are not the same in all runs, and what else differs that matters; a column a run."""
    columns = []
    for run in runs:
        settings, environment = run.recorded.get("config", {}), run.recorded.get("environment", {})
        # the setting `device` is "auto" as a rule; the environment's, which takes its place, is what that came to
        settings = settings | {key: environment[key] for key in ENVIRONMENT if key in environment}
        columns.append({key: value for key, value in settings.items() if key not in NAMES})
    rows = [["setting", *(run.name for run in runs)]]
    for key in dict.fromkeys(key for column in columns for key in column):  # in config.py's order
        cells = [printable(str(column[key])) if key in column else "-" for column in columns]
        if len({cell for cell, column in zip(cells, columns, strict=True) if column}) > 1:  # where there is a config
            rows.append([printable(key), *cells])
    return rows


def turned(table: Table) -> Table:
    return [list(cells) for cells in zip(*table, strict=True)]


def tables(runs: list[Run]) -> list[Table]:
    """What there is to say. A few runs stand side by side; many, as of a sweep, below each other."""
    both = [summary(runs)]
    if len(runs) > 1:
        both.append(differences(runs))
    return both if len(runs) <= 4 else [turned(table) for table in both]


def print_table(table: Table) -> None:
    """With lines on a terminal; in a pipe as plain text, in columns that two spaces part."""
    if sys.stdout.isatty():
        import rich
        from rich.table import Table as RichTable
        from rich.text import Text

        drawn = RichTable()
        for number, title in enumerate(table[0]):
            drawn.add_column(Text(title), justify="right" if number else "left", overflow="fold")
        for row in table[1:]:
            drawn.add_row(*map(Text, row))  # Text: not rich's markup
        rich.print(drawn)
        return
    widths = [max(map(len, cells)) for cells in zip(*table, strict=True)]
    for first, *rest in table:
        cells = (cell.rjust(width) for cell, width in zip(rest, widths[1:], strict=True))
        print("  ".join([first.ljust(widths[0]), *cells]))
    print()


# -- the picture -------------------------------------------------------------------------------------------------------


def refresh_picture(out_dir: Path, say: Callable[[str], None]) -> bool:
    """Draw loss.png of a run that is going on. What hinders that is said: it is no reason to stop the run.

    Returns whether there is a point in trying again.
    """
    try:
        write_whole(out_dir / "loss.png", draw([read_run(out_dir)]))
    except ImportError as error:
        say(f"no loss.png: {error}; pip install matplotlib")
        return False
    except (OSError, UserError) as error:
        say(f"no loss.png: {error}")
    return True


def draw(runs: list[Run]) -> bytes:
    """A PNG: one run's losses over iterations; those of several over tokens and, beside that, over time."""
    from matplotlib.figure import Figure

    alone = len(runs) == 1
    panels = [("tokens", 1e-6, "tokens (millions)"), ("elapsed_seconds", 1 / 60, "training time (minutes)")]
    if alone:
        panels = [("iter", 1, "iteration")]
    size = (8, 5) if alone else (13, 5.5 + 0.12 * len(runs))  # inches; the legend takes its share
    figure = Figure(size, dpi=150, layout="constrained")  # not pyplot's: nothing global is touched
    axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for ax, (key, unit, label) in zip(axes, panels, strict=True):
        lines = [line for number, run in enumerate(runs) for line in draw_run(ax, run, key, unit, number, alone)]
        ax.set_xlabel(label)
        ax.xaxis.set_major_formatter("{x:,.10g}")
        ax.set_xlim(left=0)
        ax.grid(alpha=0.3)
        ax.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("loss (nats per token)")
    axes[0].set_ylim(limits(runs))
    labels = ["training loss", "validation loss"] if alone else [f"{run.name}: {described(run)}" for run in runs]
    title = None if alone else "validation loss (thin lines: training loss)"
    columns = 2 if alone or len(runs) > 4 else 1
    legend = figure.legend(lines, labels, title=title, loc="outside lower center", ncols=columns, frameon=False)
    for text in legend.get_texts():
        text.set_parse_math(False)  # a $ in the name of a run is no formula
    picture = io.BytesIO()
    figure.savefig(picture, format="png")
    return picture.getvalue()


def draw_run(ax: "Axes", run: Run, key: str, unit: float, number: int, alone: bool) -> list["Line2D"]:
    """One run's curves over `key` times `unit`: training faint, validation with markers, its best point a star.

    Returns the lines that the legend explains: both where the run is alone, of several the one of validation.
    """
    color, marker = COLORS[number % len(COLORS)], MARKERS[number % len(MARKERS)]
    train_color = COLORS[1] if alone else color
    train, val, best = run.having("train_loss"), run.having("val_loss"), run.best()

    x, losses = [record[key] * unit for record in train], [record["train_loss"] for record in train]
    if len(losses) >= SMOOTH_FROM:
        some = slice(None, None, 1 + len(losses) // 2000)  # more would be one solid band, and slow to draw
        ax.plot(x[some], losses[some], color=train_color, alpha=0.3 if alone else 0.15, linewidth=0.6)
        losses = smoothed(losses)
    (train_line,) = ax.plot(x, losses, color=train_color, linewidth=1)

    x, losses = [record[key] * unit for record in val], [record["val_loss"] for record in val]
    apart = 1 + len(val) // 25  # markers that touch would hide the line
    (val_line,) = ax.plot(x, losses, color=color, marker=marker, markersize=4.5, markevery=apart)
    if best:
        point = (best[key] * unit, best["val_loss"])
        ax.plot(*point, "*", color=color, markersize=16, markeredgecolor="white", zorder=3)
    if best and alone:
        side, middle = ("right", 1.0) if best["iter"] > 0.8 * run.records[-1]["iter"] else ("center", 0.5)
        box = {"facecolor": "white", "edgecolor": "none", "alpha": 0.8}
        line = {"arrowstyle": "-", "color": color, "relpos": (middle, 0)}
        style = {"xytext": (0, 45), "textcoords": "offset points", "ha": side}
        ax.annotate(described(run).replace(" at ", "\nat "), point, **style, bbox=box, arrowprops=line)
    return [train_line, val_line] if alone else [val_line]


def described(run: Run) -> str:
    best = run.best()
    return f"best {best['val_loss']:.4f} at iteration {best['iter']:,}" if best else "no validation loss yet"


def smoothed(losses: list[float]) -> "np.ndarray":
    """The mean over a fortieth of the run around each point, over less at its ends."""
    import numpy as np

    window = np.ones(len(losses) // 40)
    return np.convolve(losses, window, "same") / np.convolve(np.ones(len(losses)), window, "same")


def limits(runs: list[Run]) -> tuple[float, float]:
    """The y axis: down to the lowest losses, but not up to the steep fall with which training begins."""
    import numpy as np

    start = 0.05 * max(run.records[-1]["tokens"] for run in runs)
    low, high, top = [], [], []
    for run in runs:
        for key in ("train_loss", "val_loss"):
            if losses := [record[key] for record in run.having(key)]:
                # of a run that ends within the fall of the others, its lowest loss at least is to be seen
                late = [record[key] for record in run.having(key) if record["tokens"] >= start] or [min(losses)]
                low.append(np.percentile(losses, 0.5))  # a few outliers may leave the picture
                high.append(np.percentile(late, 99))
                top.append(max(losses))
    if not low:
        return 0.0, 1.0
    bottom, ceiling = min(low), max(high)
    if max(top) - bottom < 1.5 * (ceiling - bottom):  # little would be won by cutting it off
        ceiling = max(top)
    margin = 0.05 * (ceiling - bottom) or 0.1
    return bottom - margin, ceiling + margin


# -- the command -------------------------------------------------------------------------------------------------------

PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
:root {{ color-scheme: light dark; }}
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 80rem; margin: 2rem auto; padding: 0 1rem; }}
div {{ overflow-x: auto; }}
table {{ border-collapse: collapse; font-variant-numeric: tabular-nums; }}
th, td {{ padding: .3rem .8rem; border-bottom: 1px solid #8886; text-align: right; }}
th:first-child, td:first-child {{ text-align: left; }}
img {{ max-width: 100%; background: white; border-radius: .5rem; }}
</style>
</head>
<body>
<h1>{title}</h1>
{body}
</body>
</html>
"""


def page(runs: list[Run], picture: bytes) -> str:
    """All of the report as one HTML page that refers to nothing outside itself."""
    title = "kqv: " + ", ".join(run.name for run in runs)
    image = f'<img alt="losses" src="data:image/png;base64,{base64.b64encode(picture).decode()}">'
    return PAGE.format(title=escape(title), body="\n".join([image, *map(table_html, tables(runs))]))


def table_html(table: Table) -> str:
    rows = []
    for number, cells in enumerate(table):
        tag = "td" if number else "th"
        rows.append("<tr>" + "".join(f"<{tag}>{escape(cell)}</{tag}>" for cell in cells) + "</tr>")
    return "<div><table>\n" + "\n".join(rows) + "\n</table></div>"


def main(cfg: Report, origin: dict[str, str]) -> None:
    """Compare runs: a table, the settings that differ, and a picture of the losses.

    python report.py OUT_DIR [OUT_DIR ...] [--html=FILE] [--png=FILE]
    """
    runs = [read_run(Path(folder)) for folder in cfg.runs]
    for table in tables(runs):
        print_table(table)
    path = Path(cfg.png or ("compare.png" if len(runs) > 1 else Path(cfg.runs[0]) / "loss.png"))
    picture = draw(runs)
    write_whole(path, picture)
    print(f"picture: {path}")
    if cfg.html:
        write_whole(Path(cfg.html), page(runs, picture))
        print(f"page: {cfg.html}")


if __name__ == "__main__":
    cli.run(main, Report)
