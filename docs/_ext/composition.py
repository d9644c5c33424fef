"""Directive `{composition}`: the table of which plugs go together, made from the one that the tests run."""

from __future__ import annotations

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

from tests.composition import CELLS, TEST_ONLY


def matrix(cells: dict[frozenset[str], str], left_out: set[str]) -> str:
    """The table in Markdown: a row and a column for each plug; refusals are numbered and explained below."""
    names = sorted(set().union(*cells) - left_out)
    reasons: dict[str, int] = {}

    def cell(row: str, column: str) -> str:
        if row == column:
            return "·"
        text = cells[frozenset({row, column})]
        if text.startswith("together"):
            return text
        return f"refused ({reasons.setdefault(text, len(reasons) + 1)})"

    rows = ["| |" + "".join(f" `{name}` |" for name in names), "|---" * (len(names) + 1) + "|"]
    rows += [f"| `{row}` |" + "".join(f" {cell(row, column)} |" for column in names) for row in names]
    return "\n".join([*rows, "", *(f"{number}. {text}" for text, number in reasons.items())])


class Composition(SphinxDirective):
    """Put the table where the directive stands."""

    def run(self) -> list[nodes.Node]:
        self.env.note_reread()  # its source is no page, so a change of it would not be seen
        return self.parse_text_to_nodes(matrix(CELLS, TEST_ONLY))


def setup(app: Sphinx) -> dict[str, bool]:
    """Register the directive."""
    app.add_directive("composition", Composition)
    return {"parallel_read_safe": True}
