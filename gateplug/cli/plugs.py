"""``gateplug plugs``: a table of all plugs."""

import argparse

from gateplug.cli.names import public_names
from gateplug.core import Plug


def plugs() -> dict[str, type[Plug]]:
    """Public plugs by name, sorted by room, then by name."""
    found = {n: c for n, c in public_names().items() if isinstance(c, type) and issubclass(c, Plug) and c is not Plug}
    return dict(sorted(found.items(), key=lambda item: (item[1].room, item[0])))


def show_plugs(args: list[str]) -> None:
    """Print the table."""
    from rich.console import Console
    from rich.table import Table

    argparse.ArgumentParser("gateplug plugs", description="List all plugs.").parse_args(args)
    table = Table("plug", "room", "what it does", "paper", title="Plugs", title_justify="left")
    for name, plug in plugs().items():
        table.add_row(name, plug.room, plug.summary, plug.paper)
    Console().print(table)
