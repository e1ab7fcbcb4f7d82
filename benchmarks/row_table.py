"""A table on the terminal of rows that are also a benchmark's JSON."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

__all__ = ["print_rows"]


def print_rows(
    title: str, rows: Sequence[Mapping[str, Any]], headings: Sequence[str] = (), *, left: Sequence[str] = ()
) -> None:
    """Print one line for each row.

    :param title: above the table
    :param rows: heading → value
    :param headings: what is shown; default: all of the first row
    :param left: headings of columns that are text
    """
    table = Table(title=title, title_justify="left")
    shown = headings or list(rows[0])
    for heading in shown:
        table.add_column(heading.replace("_", " "), justify="left" if heading in left else "right")
    for row in rows:
        table.add_row(*(str(row[heading]) for heading in shown))
    Console(width=140).print(table)
