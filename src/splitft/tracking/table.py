"""One table of text, for the terminal, for HTML and for Markdown.

    Table(headings, rows) --to_rich--> terminal    --to_markdown--> RESULTS.md
                          --macros.html.j2--> a page

Cells are plain text: each renderer escapes what its own format would read as markup, and the terminal's what
could steer it (`foreign_text`).
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from splitft.foreign_text import printable

if TYPE_CHECKING:
    from rich.table import Table as RichTable


@dataclass(frozen=True)
class Table:
    """Rows of text under their headings."""

    headings: Sequence[str]
    """One a column; a line break in a heading narrows its column on the terminal."""
    rows: Sequence[Sequence[str]]
    align: str = ""
    """`l` or `r` for each column; by default the first is left and the others are right."""
    bold: Collection[int] = field(default_factory=tuple)
    """Indices of the rows that stand out."""
    gap: int = 2
    """Spaces between columns on the terminal."""
    wrap: Collection[int] | None = None
    """Columns whose cells may be broken into lines; None for all of them."""

    def left(self, column: int) -> bool:
        """Return whether a column is aligned to the left."""
        return self.align[column] == "l" if self.align else column == 0

    def to_rich(self) -> RichTable:
        """Return the table as rich prints it on a terminal."""
        from rich.markup import escape
        from rich.table import Table as RichTable

        table = RichTable(box=None, header_style="bold", pad_edge=False, padding=(0, self.gap, 0, 0))
        for column, heading in enumerate(self.headings):
            justify = "left" if self.left(column) else "right"
            fixed = self.wrap is not None and column not in self.wrap
            table.add_column(escape(heading), justify=justify, no_wrap=fixed)  # type: ignore[arg-type]
        for number, row in enumerate(self.rows):
            table.add_row(
                *(escape(printable(cell)) for cell in row), style="bold" if number in self.bold else ""
            )
        return table

    def to_markdown(self) -> str:
        """Return the table in the syntax of GitHub's Markdown."""
        marks = ["---" if self.left(column) else "---:" for column in range(len(self.headings))]
        return "\n".join(f"| {' | '.join(map(_cell, line))} |" for line in (self.headings, marks, *self.rows))


def _cell(text: str) -> str:
    """Return text as one cell of Markdown."""
    return " ".join(text.split()).replace("|", "\\|")
