"""Hand a session's result to whoever submitted it: how it ended, and what the run has so far.

    run folder --write_result--> job's folder --FLARE--> submit --read_result--> Ending, run folder
                                 ending.json     rounds, reason, detail, notes
                                 run/            config.yaml, events.jsonl, adapter/, ...

A job whose process was killed leaves neither.
"""

from __future__ import annotations

import contextlib
import json
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from splitft.deploy.supervisor import Ending
from splitft.files import write_whole
from splitft.foreign_text import printable_data

ENDING = "ending.json"
COLLECTED = ("config.yaml", "events.jsonl", "summary.json", "report.html", "adapter")
"""Parts of a run folder that go into a job's result."""
_ENDING: TypeAdapter[Ending] = TypeAdapter(Ending)


def write_result(result: Path, folder: Path | None, ending: Ending) -> None:
    """Write how a session ended, and copy the run folder if it is this run's."""
    write_whole(result / ENDING, json.dumps(asdict(ending)))
    if folder is None:
        return
    for name in COLLECTED:
        source, target = folder / name, result / "run" / name
        target.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileNotFoundError):
            if source.is_dir():
                shutil.copytree(source, target, dirs_exist_ok=True)
            else:
                shutil.copy(source, target)


def read_result(result: Path | None, into: Path | None) -> Ending | None:
    """Return how a session ended, and copy its run folder over `into`; None if it left no result."""
    if result is None:
        return None
    if into is not None and (config := next(result.rglob("run/config.yaml"), None)) is not None:
        shutil.copytree(config.parent, into, dirs_exist_ok=True)
    path = next(result.rglob(ENDING), None)
    if path is None:
        return None
    try:
        found: Any = printable_data(json.loads(path.read_text(encoding="utf-8", errors="replace")))
        return _ENDING.validate_python(found)
    except (ValueError, ValidationError):
        return None
