"""Pictures of what is inside a model: attention maps, position tables."""

from functools import lru_cache
from typing import TYPE_CHECKING

from kqv.plots import COLORS, as_png, open_axes

if TYPE_CHECKING:
    from torch import Tensor


def drawable(label: str) -> str:
    """`label` with each character that matplotlib's font lacks as its code, \\u4e2d say."""
    return "".join(c if ord(c) in glyphs() else c.encode("unicode_escape").decode() for c in label)


@lru_cache
def glyphs() -> dict[int, int]:
    """The code points that matplotlib's font has."""
    from matplotlib import font_manager, ft2font

    return ft2font.FT2Font(font_manager.findfont("DejaVu Sans")).get_charmap()


def draw_attention(maps: "Tensor", labels: list[str], layers: list[int], heads: list[int], title: str) -> bytes:
    """A PNG of attention maps (L, H, T, T), a panel for each head, a row of panels for each layer.

    Rows of a panel are queries, columns keys; dark is 1. Weights are drawn as their square roots, so that small ones
    are visible.
    """
    from matplotlib.figure import Figure

    T, panel = len(labels), min(5.0, max(1.1, 12.8 / len(heads)))  # inches
    figure = Figure((max(6.4, panel * len(heads) + 1), panel * len(layers) + 1.2), dpi=100, layout="constrained")
    axes = figure.subplots(len(layers), len(heads), squeeze=False)
    every = max(1, -(-T * 8 // int(72 * panel)))  # labels of 7 points, with a point between them
    ticks, names = list(range(0, T, every)), [drawable(label) for label in labels[::every]]
    for row, layer in enumerate(layers):
        for column, head in enumerate(heads):
            ax = axes[row][column]
            ax.imshow(maps[layer, head].sqrt().numpy(), cmap="Blues", vmin=0, vmax=1, interpolation="nearest")
            ax.set_title(f"layer {layer}, head {head}", fontsize=8)
            ax.set_xticks(ticks, names if row == len(layers) - 1 else [], rotation=90, fontsize=7, parse_math=False)
            ax.set_yticks(ticks, names if column == 0 else [], fontsize=7, parse_math=False)
            ax.tick_params(length=2)
    figure.suptitle(f"{title}: rows are queries, columns are keys", fontsize=11, parse_math=False)
    return as_png(figure)


def draw_positions(table: "Tensor", similarity: "Tensor", title: str) -> bytes:
    """A PNG of a position table, (positions, channels), and of the mean similarity of two positions by distance."""
    from matplotlib.figure import Figure

    figure = Figure((12.8, 5), dpi=100, layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1.3, 1))
    most = float(table.abs().max()) or 1.0
    image = left.imshow(table.numpy(), cmap="RdBu", vmin=-most, vmax=most, aspect="auto", interpolation="nearest")
    left.set(xlabel="channel", ylabel="position", title="the table")
    figure.colorbar(image, ax=left)
    right.plot(similarity.numpy(), color=COLORS[0])
    right.axhline(0, color="#888888", linewidth=0.8)
    right.set(xlabel="distance of two positions", ylabel="mean similarity", title="dot product of unit vectors")
    open_axes(right)
    figure.suptitle(title)
    return as_png(figure)
