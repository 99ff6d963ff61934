"""Plots: losses of runs over iterations, tokens and time; results of experiments."""

import io
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kqv.errors import UserError
from kqv.rundir import PICTURE, RunRecord, read_run, write_whole

if TYPE_CHECKING:
    import numpy as np
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

# Okabe and Ito's colours, which the colour-blind can tell apart too; runs differ in their markers as well
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = "os^DvX"
SMOOTH_FROM = 100  # training losses; fewer are drawn as they are
CURVE_FROM = 5  # evaluations; fewer are drawn as points, because a line would suggest values between them


def refresh_picture(out_dir: Path, say: Callable[[str], None]) -> bool:
    """Draw loss.png of a run in progress. A failure is printed through `say` and does not stop the run.

    Returns False if trying again is pointless, because matplotlib is missing.
    """
    try:
        write_whole(out_dir / PICTURE, draw([read_run(out_dir)]))
    except ImportError as error:
        say(f"no loss.png: {error}; pip install matplotlib")
        return False
    except (OSError, UserError) as error:
        say(f"no loss.png: {error}")
    return True


def draw(runs: list[RunRecord], unit_of_loss: str = "nats per token") -> bytes:
    """A PNG of the losses: of one run over iterations; of several runs over tokens, and beside that over time."""
    from matplotlib.figure import Figure

    alone = len(runs) == 1
    size = (8, 5) if alone else (13, 5.5 + 0.12 * len(runs))  # inches; the legend takes its share
    panels = [("iter", 1, "iteration")]
    if not alone:
        counted = all(run.records[-1].get("tokens") for run in runs)  # printed lines do not contain tokens
        panels = [("tokens", 1e-6, "tokens (millions)")] if counted else panels
        panels.append(("elapsed_seconds", 1 / 60, "training time (minutes)"))
    figure = Figure(size, dpi=150, layout="constrained")  # not pyplot's: nothing global is touched
    axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for ax, (key, unit, label) in zip(axes, panels, strict=True):
        lines = [line for number, run in enumerate(runs) for line in draw_run(ax, run, key, unit, number, alone)]
        ax.set_xlabel(label)
        ax.xaxis.set_major_formatter("{x:,.10g}")
        ax.set_xlim(left=0)
        open_axes(ax)
    axes[0].set_ylabel(f"loss ({unit_of_loss})")
    axes[0].set_ylim(limits(runs))
    labels = [f"{run.name}: {describe_best(run)}" for run in runs]
    if alone:
        labels = ["training loss", f"validation loss, {describe_best(runs[0])}"]
    title = None if alone else "validation loss (thin lines: training loss)"
    columns = 2 if alone or len(runs) > 4 else 1
    legend = figure.legend(lines, labels, title=title, loc="outside lower center", ncols=columns, frameon=False)
    for text in legend.get_texts():
        text.set_parse_math(False)  # so that a $ in a run's name does not start a formula
    return as_png(figure)


def draw_run(ax: "Axes", run: RunRecord, key: str, unit: float, number: int, alone: bool) -> list["Line2D"]:
    """Draw one run over `key` times `unit`: a thin training curve, validation with markers, a star at its best.

    Returns the lines for the legend: both curves of a single run, only validation if there are several runs.
    """
    color, marker = COLORS[number % len(COLORS)], MARKERS[number % len(MARKERS)]
    train_color = COLORS[1] if alone else color
    train, val, best = run.having("train_loss"), run.having("val_loss"), run.best()

    x, losses = [record[key] * unit for record in train], [record["train_loss"] for record in train]
    if len(losses) >= SMOOTH_FROM:
        thinned = slice(None, None, 1 + len(losses) // 2000)  # more would be one solid band, and slow to draw
        ax.plot(x[thinned], losses[thinned], color=train_color, alpha=0.3 if alone else 0.15, linewidth=0.6)
        losses = smoothed(losses)
    (train_line,) = ax.plot(x, losses, color=train_color, linewidth=1)

    x, losses = [record[key] * unit for record in val], [record["val_loss"] for record in val]
    style = {"color": color, "marker": marker, "linestyle": "-" if len(val) >= CURVE_FROM else "none", "zorder": 3}
    style |= {"markersize": 4.5, "markevery": 1 + len(val) // 25}  # markers that touch would hide the line
    (val_line,) = ax.plot(x, losses, **style)
    if best:
        point = (best[key] * unit, best["val_loss"])
        ax.plot(*point, "*", color=color, markersize=16, markeredgecolor="white", zorder=4)
    return [train_line, val_line] if alone else [val_line]


def describe_best(run: RunRecord) -> str:
    best = run.best()
    return f"best {best['val_loss']:.4f} at iteration {best['iter']:,}" if best else "not measured yet"


def smoothed(losses: list[float]) -> "np.ndarray":
    """Moving average over a fortieth of the run; over fewer losses at the ends."""
    import numpy as np

    window = np.ones(len(losses) // 40)
    return np.convolve(losses, window, "same") / np.convolve(np.ones(len(losses)), window, "same")


def limits(runs: list[RunRecord]) -> tuple[float, float]:
    """Limits of the y axis, which leave out the steep fall at the start of training."""
    import numpy as np

    key = "tokens" if all(run.records[-1].get("tokens") for run in runs) else "iter"
    start = 0.05 * max(run.records[-1][key] for run in runs)
    low, high, top = [], [], []
    for run in runs:
        for name in ("train_loss", "val_loss"):
            if losses := [record[name] for record in run.having(name)]:
                # a run that ends before `start` shows at least its lowest loss
                late = [record[name] for record in run.having(name) if record[key] >= start] or [min(losses)]
                low.append(np.percentile(losses, 0.5))  # a few outliers may lie outside
                high.append(np.percentile(late, 99))
                top.append(max(losses))
    if not low:
        return 0.0, 1.0
    bottom, ceiling = min(low), max(high)
    if max(top) - bottom < 1.5 * (ceiling - bottom):  # cutting off would gain little
        ceiling = max(top)
    margin = 0.05 * (ceiling - bottom) or 0.1
    return bottom - margin, ceiling + margin


# -- experiments -------------------------------------------------------------------------------------------------------

WIDTH = 1280 / 150  # inches at 150 dpi: as wide as a page


def draw_whatif(results: list[dict[str, Any]]) -> bytes:
    """A PNG of what experiments.whatif returned: each seed's loss and the mean, a row a variant, the lowest on top."""
    from matplotlib.figure import Figure

    results = sorted(results, key=lambda result: result["mean"], reverse=True)  # the y axis points upwards
    ranges = loss_ranges([loss for result in results for loss in result["losses"]])
    figure = Figure((WIDTH, 1.6 + 0.4 * len(results)), dpi=150, layout="constrained")
    widths = {"width_ratios": [1, 3][-len(ranges) :]}
    axes = figure.subplots(1, len(ranges), sharey=True, squeeze=False, gridspec_kw=widths)[0]
    for ax, ends in zip(axes, ranges, strict=True):
        draw_variants(ax, results)
        ax.set_xlim(ends)
        ax.locator_params("x", nbins=2 if len(ranges) > 1 and ax is axes[0] else 7)
        ax.tick_params(labelsize=9)
        open_axes(ax)
    axes[0].set_yticks(range(len(results)), [f"{result['variant']}: {result['title']}" for result in results])
    axes[0].set_ylim(-0.6, len(results) - 0.4)
    spreads = ["" if result["spread"] is None else f" ± {result['spread']:.3f}" for result in results]
    means = [f"{result['mean']:.3f}{spread}" for result, spread in zip(results, spreads, strict=True)]
    right = axes[-1].secondary_yaxis("right")
    right.set_yticks(range(len(results)), means)
    right.spines["right"].set_visible(False)
    right.tick_params(length=0, labelsize=9)
    axes[-1].set_xlabel("validation loss (nats per token)")
    heading = "mean ± deviation" if any(spreads) else "mean"
    axes[-1].text(1.02, 1.01, heading, transform=axes[-1].transAxes, fontsize=9)
    figure.suptitle("What if? The same data, steps and seeds, one change each")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    return as_png(figure)


def draw_variants(ax: "Axes", results: list[dict[str, Any]]) -> None:
    """Draw a row for each variant; the vertical line is the mean of the variant "dot"."""
    colors = [COLORS[0] if result["variant"] == "dot" else COLORS[1] for result in results]
    for row, (result, color) in enumerate(zip(results, colors, strict=True)):
        label = {"label": "one seed"} if row == 0 else {}
        ax.plot(result["losses"], [row] * len(result["losses"]), "o", color="grey", fillstyle="none", **label)
        label = {"label": "mean"} if row == 0 else {}
        ax.plot(result["mean"], row, "|", color=color, markersize=16, markeredgewidth=2.5, **label)
        if result["variant"] == "dot":
            ax.axvline(result["mean"], color=color, linewidth=1, linestyle="--", label="the baseline, dot")


def loss_ranges(losses: list[float]) -> list[tuple[float, float]]:
    """Limits of the x axis; of two axes if most of it would be one gap, as below models that see the answer."""
    losses = sorted(losses)
    gap, end = max(((b - a, i) for i, (a, b) in enumerate(pairwise(losses), start=1)), default=(0, 0))
    groups = [losses[:end], losses[end:]] if gap > 0.5 * (losses[-1] - losses[0]) and len(losses) > 4 else [losses]
    margins = [max(0.05, 0.06 * (group[-1] - group[0])) for group in groups]
    return [(group[0] - margin, group[-1] + margin) for group, margin in zip(groups, margins, strict=True)]


def draw_context(result: dict[str, Any]) -> bytes:
    """A PNG of what experiments.context returned: loss over the position in the window, a line an encoding."""
    from matplotlib.figure import Figure

    figure = Figure((WIDTH, 5), dpi=150, layout="constrained")
    ax = figure.subplots()
    positions, block_size = result["positions"], result["block_size"]
    for number, (name, losses) in enumerate(result["losses"].items()):
        style = {"color": COLORS[number % len(COLORS)], "marker": MARKERS[number % len(MARKERS)], "markersize": 5}
        ax.plot(positions, losses, markevery=(number * 3, max(1, len(positions) // 16)), label=name, **style)
    ax.axvline(block_size, color="black", linewidth=1, linestyle="--", label=f"block_size = {block_size} in training")
    ax.set_xlim(0, positions[-1])
    ax.set_xticks(range(0, positions[-1] + 1, max(1, block_size // 2)))
    ax.set_xlabel("position: tokens that the prediction is made from")
    ax.set_ylabel("validation loss (nats per token)")
    ax.set_title("Longer contexts than in training")
    open_axes(ax)
    figure.legend(loc="outside lower center", ncols=5, frameon=False)
    return as_png(figure)


def open_axes(ax: "Axes") -> None:
    """Draw a faint grid, and no frame above and to the right."""
    ax.grid(alpha=0.3)
    ax.spines[["top", "right"]].set_visible(False)


def as_png(figure: "Figure") -> bytes:
    picture = io.BytesIO()
    figure.savefig(picture, format="png")
    return picture.getvalue()
