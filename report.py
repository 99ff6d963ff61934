"""What runs did: a table, the settings that differ between them, and a picture of their losses.

python report.py out-a out-b --html=compare.html
"""

import base64
import statistics
import sys
from dataclasses import dataclass, replace
from html import escape
from pathlib import Path
from typing import Annotated, Any, ClassVar

from kqv import cli
from kqv.errors import UserError
from kqv.pages import frame
from kqv.plots import draw
from kqv.rundir import METRICS, PICTURE, RunRecord, printable, read_run, write_whole
from kqv.tables import Table, print_table, transposed

NAMES = {"out_dir", "wandb_project", "wandb_run_name"}  # settings that change nothing about a run
ENVIRONMENT = ("commit", "dirty", "torch", "device")  # besides the settings, these change a run's numbers or speed


@dataclass(kw_only=True)
class Report:
    POSITIONAL: ClassVar[str] = "runs"
    runs: Annotated[tuple[str, ...], "the out_dir of each run, or a file with the lines that nanoGPT printed"] = ()
    png: Annotated[str | None, "the picture; None: loss.png in the one run's folder, for several compare.png"] = None
    html: Annotated[str | None, "also write one page with all of it, which needs no network"] = None

    def __post_init__(self):
        if not self.runs:
            raise UserError("which runs? python report.py OUT_DIR [OUT_DIR ...]")
        for key in ("png", "html"):
            value = getattr(self, key)
            if value is not None and not Path(value).name:
                raise UserError(f"{key}={value!r}: expected the name of a file")


def comparable(runs: list[RunRecord]) -> tuple[list[RunRecord], str]:
    """The runs with losses in one unit, and the unit: bits per byte if their tokens are not the same pieces of text."""
    bests = [run.best() or {} for run in runs]
    if not all(best.get("val_bpb") for best in bests):
        return runs, "nats per token"
    bits = [best["val_bpb"] / best["val_loss"] for best in bests]  # per byte, of a nat per token
    if max(bits) < 1.001 * min(bits):
        return runs, "nats per token"
    losses = ("train_loss", "val_loss")
    scaled = [
        [record | {key: record[key] * factor for key in losses if key in record} for record in run.records]
        for run, factor in zip(runs, bits, strict=True)
    ]
    return [replace(run, records=records) for run, records in zip(runs, scaled, strict=True)], "bits per byte"


# -- tables ------------------------------------------------------------------------------------------------------------


def summary(runs: list[RunRecord]) -> Table:
    """Each run's cost and losses, a column for each run; "-" if not measured."""
    titles = ["run", "iterations", "tokens", "minutes", "best val loss", "best at iteration", "best bits per byte"]
    columns = [[*titles, "last val loss", "tokens/s (median)", "parameters"]]
    for run in runs:
        end, best, speeds = run.records[-1], run.best() or {}, run.having("tokens_per_second")
        last = run.having("val_loss")[-1] if best else {}
        speed = statistics.median(record["tokens_per_second"] for record in speeds) if speeds else None
        cells = [(end["iter"], ","), (end.get("tokens"), ","), (end["elapsed_seconds"] / 60, ",.2f")]
        cells += [(best.get("val_loss"), ".4f"), (best.get("iter"), ","), (best.get("val_bpb"), ".4f")]
        cells += [(last.get("val_loss"), ".4f"), (speed, ",.0f"), (run.recorded.get("parameters"), ",")]
        columns.append([run.name, *("-" if value is None else format(value, form) for value, form in cells)])
    return transposed(columns)


def settings_of(run: RunRecord) -> dict[str, Any]:
    """A run's settings, and the entries of its environment that change its numbers or speed."""
    settings, environment = run.recorded.get("config", {}), run.recorded.get("environment", {})
    # the setting `device` is mostly "auto"; the environment's `device`, which replaces it, is the one that was chosen
    return settings | {key: environment[key] for key in ENVIRONMENT if key in environment}


def differences(runs: list[RunRecord]) -> Table:
    """The settings, and entries of the environment, that are not the same in all runs; a column for each run."""
    columns = [{key: value for key, value in settings_of(run).items() if key not in NAMES} for run in runs]
    rows = [["setting", *(run.name for run in runs)]]
    for key in dict.fromkeys(key for column in columns for key in column):  # in the order of kqv/settings.py
        cells = [printable(str(column[key])) if key in column else "-" for column in columns]
        if len({cell for cell, column in zip(cells, columns, strict=True) if column}) > 1:  # of runs with a config
            rows.append([printable(key), *cells])
    return rows


def tables(runs: list[RunRecord]) -> list[Table]:
    """The summary, and the differences of several runs. Up to four runs are columns; more, as of a sweep, are rows."""
    differing = differences(runs)
    found = [summary(runs), differing] if len(differing) > 1 else [summary(runs)]
    return found if len(runs) <= 4 else [transposed(table) for table in found]


def settings_tables(run: RunRecord) -> tuple[Table, Table]:
    """Two tables of one run: the settings that are not defaults, with their origin, and the environment; the others."""
    origin, config = run.recorded.get("origin", {}), run.recorded.get("config", {})
    given = {key: value for key, value in config.items() if str(origin.get(key, "default")) != "default"}
    rows = [[key, str(value), str(origin[key])] for key, value in given.items()]
    environment = run.recorded.get("environment", {})
    rows += [[key, str(environment[key]), "environment"] for key in (*ENVIRONMENT, "cpu") if key in environment]
    rest = [[key, str(value)] for key, value in config.items() if key not in given]
    heads = (["setting", "value", "from"], ["setting", "default"])
    return tuple(
        [head, *([printable(cell) for cell in row] for row in body)]
        for head, body in zip(heads, (rows, rest), strict=True)
    )


# -- the page ----------------------------------------------------------------------------------------------------------

STYLE = """<style>
body { max-width: 80rem; margin: 2rem auto; }
div { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; margin: 1rem 0; }
th, td { padding: .3rem .8rem; border-bottom: 1px solid #8886; text-align: right; }
th:first-child, td:first-child { text-align: left; }
img { max-width: 100%; background: white; border-radius: .5rem; }
</style>
"""


def page(runs: list[RunRecord], picture: bytes) -> str:
    """The report as one HTML page that refers to nothing outside itself."""
    title = "kqv: " + ", ".join(run.name for run in runs)
    body = [f'<img alt="losses" src="data:image/png;base64,{base64.b64encode(picture).decode()}">']
    body += map(table_html, tables(runs))
    if len(runs) == 1 and runs[0].recorded:
        given, rest = settings_tables(runs[0])
        body += [table_html(given), f"<details><summary>all other settings</summary>{table_html(rest)}</details>"]
    return frame(title, STYLE, "\n".join(body) + "\n")


def table_html(table: Table) -> str:
    rows = []
    for number, cells in enumerate(table):
        tag = "td" if number else "th"
        rows.append("<tr>" + "".join(f"<{tag}>{escape(cell)}</{tag}>" for cell in cells) + "</tr>")
    return "<div><table>\n" + "\n".join(rows) + "\n</table></div>"


# -- the command -------------------------------------------------------------------------------------------------------


def read_runs(paths: tuple[str, ...]) -> tuple[list[RunRecord], list[UserError]]:
    """The runs that can be read, and an error for each of the others. Damaged lines are noted on stderr."""
    runs, errors = [], []
    for path in paths:
        try:
            runs.append(run := read_run(Path(path)))
        except UserError as error:
            errors.append(error)
        else:
            if run.damaged:
                lines = f"ignored {len(run.damaged)} damaged lines, the first is line {run.damaged[0]}"
                print(f"{Path(path) / METRICS}: {lines}", file=sys.stderr)
    return runs, errors


def main(cfg: Report, origin: dict[str, str]) -> None:
    """Compare runs: a table, the settings that differ, and a picture of the losses.

    python report.py OUT_DIR [OUT_DIR ...] [--html=FILE] [--png=FILE]
    """
    runs, errors = read_runs(cfg.runs)
    if not runs:
        raise errors[0]
    for table in tables(runs):
        print_table(table)
    own = Path(cfg.runs[0]) / PICTURE if len(cfg.runs) == 1 and Path(cfg.runs[0]).is_dir() else "compare.png"
    path, picture = Path(cfg.png or own), draw(*comparable(runs))
    write_whole(path, picture)
    print(f"picture: {path}")
    if cfg.html:
        write_whole(Path(cfg.html), page(runs, picture))
        print(f"page: {cfg.html}")
    if errors:  # after the other runs have been reported
        raise UserError("; ".join(map(str, errors)))


if __name__ == "__main__":
    cli.run(main, Report)
