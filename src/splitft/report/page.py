"""One HTML page about a run, or about several side by side.

    run folders --read_run--> [RunRecord] --page--> report.html

A page is a template that extends `templates/page.html.j2`. Style, scripts and plotly.js are written into it,
so that it is one file and works offline. Every value is escaped. The other packages keep their templates
beside their code and fill them with `render`.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from splitft.errors import RunError
from splitft.files import write_whole
from splitft.report.run_record import RunRecord, read_run


def write_report(folders: Sequence[Path], to: Path) -> Path:
    """Write the page about these run folders to a file, and return its path.

    Raises RunError if a folder holds no run, or one that stopped before its training began.
    """
    if not folders:
        raise RunError("a report needs at least one run folder")
    runs = [read_run(folder) for folder in folders]
    if len({run.name for run in runs}) < len(runs):
        runs = [read_run(folder, str(folder)) for folder in folders]
    return write_page(to, page(runs))


def write_page(to: Path, page: str) -> Path:
    """Write a page to a file, in a folder that is made if need be, and return its path."""
    write_whole(to, page)
    return to


def page(runs: Sequence[RunRecord]) -> str:
    """Return the page about one run, or about several."""
    from splitft.report.sections import one_run
    from splitft.report.side_by_side import several_runs

    return one_run(runs[0]) if len(runs) == 1 else several_runs(runs)


def render(template: str, *, title: str, **values: Any) -> str:
    """Return a self-contained page.

    Args:
        template: path under the package, such as `compare/comparison.html.j2`; it extends
            `report/templates/page.html.j2` and may import tables and charts from `macros.html.j2`
        title: the page's title, which the window shows
        values: the template's variables; HTML in them is shown as plain text
    """
    plotly = files("plotly").joinpath("package_data", "plotly.min.js").read_text(encoding="utf-8")
    return _environment().get_template(template).render(title=title, plotly=Markup(plotly), **values)


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("splitft", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.policies["json.dumps_kwargs"] = {"allow_nan": False}
    environment.filters["count"] = count
    return environment


def count(number: int, noun: str) -> str:
    """Return a number of things in words: 1 round, 2 rounds."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
