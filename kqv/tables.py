"""Tables and coloured text in the terminal."""

import math
import sys

Table = list[list[str]]  # rows of cells; the first row is the heading, the first column says what a row is about
# of losses from 0, 1, ... nats: light to dark, legible without colour too; the last: no loss
LOSS_STYLES = (
    "black on #e0f3f8",
    "black on #fee090",
    "black on #fdae61",
    "black on #f46d43",
    "white on #a50026",
    "dim",
)


def transposed(table: Table) -> Table:
    return [list(cells) for cells in zip(*table, strict=True)]


def print_table(table: Table, left: tuple[str, ...] = ()) -> None:
    """Print a table: with lines on a terminal, in a pipe as plain columns separated by two spaces.

    Cells are aligned to the right, except in the first column and in those whose headings are in `left`.
    """
    aligned = [number == 0 or title in left for number, title in enumerate(table[0])]
    if sys.stdout.isatty():
        import rich
        from rich.table import Table as RichTable
        from rich.text import Text

        drawn = RichTable()
        for number, title in enumerate(table[0]):
            drawn.add_column(Text(title), justify="left" if aligned[number] else "right", overflow="fold")
        for row in table[1:]:
            drawn.add_row(*map(Text, row))  # Text: not rich's markup
        rich.print(drawn)
        return
    widths = [max(map(len, cells)) for cells in zip(*table, strict=True)]
    for row in table:
        cells = zip(row, widths, aligned, strict=True)
        print("  ".join(cell.ljust(width) if left else cell.rjust(width) for cell, width, left in cells).rstrip())
    print()


def print_losses(labels: list[str], losses: list[float | None]) -> None:
    """Print tokens coloured by their loss in nats: on a terminal as a text, in a pipe as a table."""
    if not sys.stdout.isatty():
        rows = [
            [label, "-", "-"] if loss is None else [label, f"{loss:.4f}", f"{math.exp(-loss):.4f}"]
            for label, loss in zip(labels, losses, strict=True)
        ]
        print_table([["token", "loss", "probability"], *rows])
        return
    import rich
    from rich.text import Text

    text = Text()
    for label, loss in zip(labels, losses, strict=True):
        text.append(label, style=LOSS_STYLES[-1] if loss is None else LOSS_STYLES[min(int(loss), 4)])
        text.append("\n" if label.endswith("⏎") else "")
    legend = Text("loss in nats: ")
    for nats, style in enumerate(LOSS_STYLES[:5]):
        legend.append(f" {nats}-{nats + 1} " if nats < 4 else " 4 and more ", style=style)
    rich.print(text, legend, sep="\n")
