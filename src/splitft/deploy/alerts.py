"""Say what an operator should look at, from the status of a run.

    status of a running session --alerts--> sentences, the most urgent first; none if all is well

`splitft deploy status` prints them, and the metrics count them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any

SILENT_PART = 0.5
"""A site is silent when it was not heard for this part of `deploy.silence_s`, after which it is lost."""
RISING_ROUNDS = 3
"""The loss is rising when it rose in this many rounds, one after the other."""
DISK_PART, DISK_BYTES = 0.05, 2**30
"""A disk is nearly full with less than this part, or less than these bytes, free."""
NEEDS = {
    "refused": "it sent invalid messages; see the server's log",
    "declined": "its data owner forbids what the run asks",
    "lost": "see whether it runs and reaches the server",
    "away": "it was not connected when the session began; it can join after a round",
    "late": "its machine or line is slower than deploy.slack allows",
}
"""What to do about a site, by its state."""
TROUBLES = {
    "refused": "messages of {site} were refused {times} times; see the server's log",
    "bounded": "updates of {site} were scaled down {times} times, being far larger than the others' "
    "(aggregate.norm_bound); ask its owner",
    "doubted": "held-out losses of {site} were left out {times} times: they fit neither the others' nor its "
    "last; ask its owner",
}
"""Sentences about a site's troubles while it takes part, by their kind."""

Status = Mapping[str, Any]


def alerts(status: Status) -> list[str]:
    """Return a sentence for each thing that an operator should look at; unknown parts are left out."""
    return [*_disk(status), *_sites(status), *_losses(status), *_troubles(status)]


def _disk(status: Status) -> Iterator[str]:
    free, whole = status.get("disk_free_bytes"), status.get("disk_bytes")
    if free is not None and whole and (free < DISK_BYTES or free < DISK_PART * whole):
        yield (
            f"the server's disk is nearly full: {free / 1e9:.1f} of {whole / 1e9:.0f} GB are free; "
            "a checkpoint that cannot be written stops the run"
        )


def _sites(status: Status) -> Iterator[str]:
    limit = status.get("silence_s")
    for site in status.get("sites", ()):
        heard, state, name = site.get("heard_s_ago"), site["state"], site["name"]
        if state in NEEDS and status.get("started", True):
            yield f"{name} is {state}: {site.get('reason') or NEEDS[state]}"
        elif state == "training" and limit and heard is not None and heard > SILENT_PART * limit:
            yield f"{name} is silent: heard {heard:.0f} s ago, lost after {limit:.0f} s (deploy.silence_s)"


def _losses(status: Status) -> Iterator[str]:
    losses: Sequence[float | None] = status.get("losses", ())
    if losses and (losses[-1] is None or not math.isfinite(losses[-1])):
        yield "the held-out loss is not finite: stop the run and lower training.lr"
        return
    last = [loss for loss in losses[-RISING_ROUNDS - 1 :] if loss is not None]
    if len(last) > RISING_ROUNDS and all(later > earlier for earlier, later in pairwise(last)):
        yield (
            f"the held-out loss rose in the last {RISING_ROUNDS} rounds, from {last[0]:.3f} to "
            f"{last[-1]:.3f}; the adapters of earlier rounds may be better (training.lr)"
        )


def _troubles(status: Status) -> Iterator[str]:
    for trouble in status.get("troubles", ()):
        if (words := TROUBLES.get(trouble["state"])) is not None:
            yield words.format(**trouble)
    if undone := status.get("undone"):
        yield f"{len(undone)} rounds were undone, the last because {undone[-1]}"
