"""Record of scripted faults and hostile acts: what was done, what came of it, and how long it took.

    @pytest.mark.fault("a site's process is killed", "the next session trains the round again")
    @pytest.mark.hostile("a site sends {name}", "refused; out for the round")

With the environment variable SPLITFT_FAULTS=FILE, every marked test adds one JSON line to the file. `{name}`
is a parameter of the test, `{id}` all of them. A test that measures how long the run stood still says so with
`record_property("recovery_s", stood_still_s(events))`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path

import pytest

from splitft.tracking.events import Event, StepDone

KINDS = ("fault", "hostile")


class _Parameters(dict):
    """Parameters of a test by name; one that it does not have keeps its braces."""

    def __missing__(self, key: str) -> str:
        return f"{{{key}}}"


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item, call):
    """Write the line of a marked test when it has ended."""
    outcome = yield
    report = outcome.get_result()
    file = os.environ.get("SPLITFT_FAULTS")
    ended = report.when == "call" or report.outcome != "passed"
    if not file or not ended:
        return
    parameters = _parameters(item)
    for kind in KINDS:
        for mark in item.iter_markers(kind):
            what, result = (str(text).format_map(_Parameters(parameters)) for text in mark.args)
            row = {
                "kind": kind,
                "what": what,
                "result": result,
                "outcome": report.outcome,
                "seconds": round(report.duration, 2),
                "recovery_s": dict(report.user_properties).get("recovery_s"),
                "test": item.nodeid,
            }
            with Path(file).open("a", encoding="utf-8") as lines:
                lines.write(json.dumps(row, ensure_ascii=False) + "\n")


def stood_still_s(events: Iterable[Event]) -> float:
    """The longest time between two steps of a run, of any client: how long it stood still."""
    times = [event.t for event in events if isinstance(event, StepDone)]
    return max(later - earlier for earlier, later in pairwise(times))


def _parameters(item) -> dict[str, str]:
    """Return the test's parameters in words, and their name together as `id`."""
    if (spec := getattr(item, "callspec", None)) is None:
        return {}
    return {**{key: str(value) for key, value in spec.params.items()}, "id": spec.id}
