"""Make stdout and stderr last: what cannot be shown never ends a run.

    text --encoding that lacks a character--> the nearest plain one, or its number
         --closed pipe, full disk, lost terminal--> nowhere, from then on

Progress goes to whatever the user has given: an ASCII pipe of a batch system, a Windows code page, `| head`,
a log file on a disk that fills up. The rounds and the run folder do not depend on it.
"""

from __future__ import annotations

import codecs
import contextlib
import os
import sys
from typing import Any, TextIO

PLAIN = {
    "·": "-", "–": "-", "—": "-", "→": "->", "…": "...", "‖": "||", "×": "x", "≤": "<=", "≥": ">=",
    "−": "-", "“": '"', "”": '"', "‘": "'", "’": "'", "±": "+-", "━": "-", "╸": "-", "╺": "-",
}  # fmt: skip
"""Plain spellings of what splitft prints."""
HANDLER = "splitft.plain"
"""Name of the error handler for encodings."""


def plain_characters(error: UnicodeError) -> tuple[str, int]:
    """Return plain characters for those that an encoding lacks; an error handler of `codecs`."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    lacking = error.object[error.start : error.end]
    spelled = (PLAIN.get(one) or one.encode("ascii", "backslashreplace").decode() for one in lacking)
    return "".join(spelled), error.end


class LastingStream:
    """A text stream whose writes never fail: after the first error, it is silent."""

    def __init__(self, stream: TextIO) -> None:
        self._stream, self._gone = stream, False

    def write(self, text: str) -> int:
        """Write the text if there is still somebody to read it."""
        if not self._gone:
            try:
                return self._stream.write(text)
            except (OSError, ValueError):
                self._give_up()
        return len(text)

    def flush(self) -> None:
        """Flush, likewise."""
        if not self._gone:
            try:
                self._stream.flush()
            except (OSError, ValueError):
                self._give_up()

    def writelines(self, lines: Any) -> None:
        """Write all these lines."""
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def _give_up(self) -> None:
        """Let what is buffered, and what libraries write to the same place, go nowhere."""
        self._gone = True
        with contextlib.suppress(OSError, ValueError):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())
            os.close(nowhere)


def make_streams_last() -> None:
    """Make stdout and stderr of this process survive any encoding and whoever reads them."""
    _fill_standard_handles()
    codecs.register_error(HANDLER, plain_characters)
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None or isinstance(stream, LastingStream):
            continue
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors=HANDLER)
        setattr(sys, name, LastingStream(stream))


def _fill_standard_handles() -> None:
    """Open closed standard handles, or the next file that is opened would get what libraries print."""
    for handle in range(3):
        try:
            os.fstat(handle)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number
