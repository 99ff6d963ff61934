"""Tables in the terminal."""

import sys

Table = list[list[str]]  # rows of cells; the first row is the heading, the first column says what a row is about


def transposed(table: Table) -> Table:
    return [list(cells) for cells in zip(*table, strict=True)]


def print_table(table: Table) -> None:
    """Print a table: with lines on a terminal, in a pipe as plain columns separated by two spaces."""
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
