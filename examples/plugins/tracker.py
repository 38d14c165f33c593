"""A tracker: the state of the run in one line of a file, for a status bar or a cron job.

trackers: [{name: one-line, file: status.txt}]
"""

from splitft.specs.extensions import TRACKERS
from splitft.tracking.events import Evaluated


class OneLine:
    """Keep one line up to date."""

    def __init__(self, folder, config, file="status.txt"):
        """`folder` is the run's, `config` the configuration as plain data, the rest are options."""
        self._path, self._rounds = folder / file, config["training"]["rounds"]

    def __call__(self, event):
        """Write the line anew after every evaluation."""
        if isinstance(event, Evaluated):
            line = f"round {event.round} of {self._rounds}: held-out loss {event.loss:.3f}\n"
            self._path.write_text(line, encoding="utf-8")

    def close(self):
        """Nothing is left to write."""


TRACKERS.add("one-line", OneLine)
