"""Tables on the console, on the first process alone."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from lightning.pytorch.utilities import rank_zero_only


@rank_zero_only
def print_table(title: str, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Print rows under a title."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    for column in columns:
        table.add_column(column, overflow="fold")  # a layer's name that is cut names nothing
    for row in rows:
        table.add_row(*map(str, row))
    Console().print(table)
