"""One HTML page about a run, or about several side by side.

    run folders --read_run--> [Told] --page--> report.html     page.css and page.js are written into it,
                                                               and plotly.js, once: it works offline

    sections      the page about one run        markup             tables and figures, all names escaped
    side_by_side  the page about several        charts, timeline   what the figures show

This file reads the folders and puts the page together.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path

from splitft.errors import RunError
from splitft.report.markup import text
from splitft.report.sections import RunRecord, one_run
from splitft.report.side_by_side import several_runs
from splitft.tracking.evaluations import read_evaluations
from splitft.tracking.events import RunStarted
from splitft.tracking.log import read_events, settled
from splitft.tracking.summary import summarise


def write_report(folders: Sequence[Path], to: Path) -> Path:
    """Write the page about these run folders to a file, and return its path.

    Raises RunError if a folder holds no run, or one that stopped before it had its model and text.
    """
    if not folders:
        raise RunError("a report needs at least one run folder")
    told = [read_run(folder) for folder in folders]
    if len({one.name for one in told}) < len(told):
        told = [read_run(folder, str(folder)) for folder in folders]
    return _write(page(told), to)


def write_page(to: Path, title: str, body: str) -> Path:
    """Write a page around a body to a file, and return its path."""
    return _write(document(title, body), to)


def _write(whole: str, to: Path) -> Path:
    to.parent.mkdir(parents=True, exist_ok=True)
    to.write_text(whole, encoding="utf-8")
    return to


def read_run(folder: Path, name: str | None = None) -> RunRecord:
    """Read one run folder; what it did before it was resumed is left out where it was done again."""
    path = folder / "events.jsonl"
    if not folder.is_dir():
        what = "is a file" if folder.exists() else "does not exist"
        raise RunError(f"{folder} {what}; give a run folder, as `splitft train` leaves it")
    if not path.is_file():
        raise RunError(
            f"{folder} is no run folder: it has no events.jsonl; give one that `splitft train` left"
        )
    events = settled(read_events(path))
    started = next((event for event in events if isinstance(event, RunStarted)), None)
    if started is None:
        raise RunError(f"{folder}: the run stopped before its training began, so there is nothing to report")
    config = folder / "config.yaml"
    written = config.read_text(encoding="utf-8", errors="replace") if config.is_file() else ""
    found = read_evaluations(folder)
    return RunRecord(name or folder.resolve().name, started, events, summarise(events), written, found)


def page(told: Sequence[RunRecord]) -> str:
    """The whole page as text."""
    if len(told) == 1:
        title, body = f"{told[0].name} · {told[0].started.model}", one_run(told[0])
    else:
        title, body = f"{len(told)} runs side by side", several_runs(told)
    return document(title, body)


def document(title: str, body: str) -> str:
    """A page that stands alone, around a body with charts in it."""
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{text(title)}</title>\n"
        f"<style>\n{_asset('page.css')}</style>\n</head>\n<body>\n<main>\n"
        "<noscript><p class='note warn'>The charts need JavaScript.</p></noscript>\n"
        f"{body}</main>\n"
        f"<script>{_plotly()}</script>\n<script>\n{_asset('page.js')}</script>\n</body>\n</html>\n"
    )


def _asset(name: str) -> str:
    return files("splitft.report").joinpath(name).read_text(encoding="utf-8")


def _plotly() -> str:
    return files("plotly").joinpath("package_data", "plotly.min.js").read_text(encoding="utf-8")
