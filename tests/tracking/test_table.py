"""A table says the same on the terminal, in Markdown and on a page, and shows every cell as plain text."""

from __future__ import annotations

import io

from rich.console import Console

from splitft.report.page import render
from splitft.tracking.table import Table

HOSTILE = "[bold]a|b[/] <i>&"
TABLE = Table(("name", "MB\nsent"), [(HOSTILE, "1.0"), ("bob", "12.5")])


def printed(table: Table, width: int = 80) -> str:
    console = Console(file=io.StringIO(), width=width, color_system=None)
    console.print(table.to_rich())
    return console.file.getvalue()


def test_the_terminal_aligns_numbers_to_the_right_and_breaks_headings():
    assert [line.rstrip() for line in printed(TABLE).splitlines()] == [
        "                     MB",
        "name               sent",
        f"{HOSTILE}   1.0",
        "bob                12.5",
    ]


def test_only_the_columns_that_may_wrap_are_broken_into_lines():
    table = Table(("name", "text"), [("one two", "three four five")], "ll", wrap=(1,))
    assert [line.split() for line in printed(table, 15).splitlines()] == [
        ["name", "text"], ["one", "two", "three"], ["four"], ["five"],
    ]  # fmt: skip


def test_markdown_keeps_one_line_a_row_and_escapes_what_would_end_a_cell():
    assert TABLE.to_markdown().splitlines() == [
        "| name | MB sent |",
        "| --- | ---: |",
        "| [bold]a\\|b[/] <i>& | 1.0 |",
        "| bob | 12.5 |",
    ]


def test_a_page_escapes_every_cell():
    page = render("report/templates/table.html.j2", title="a table", table=TABLE)
    assert "<td class=left>[bold]a|b[/] &lt;i&gt;&amp;</td><td>1.0</td>" in page
