"""Small whole runs: a tiny model, short sentences, three clients with three cuts; a second or two each."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from typer.testing import CliRunner

from laws.federations import write_text
from splitft.cli import app
from splitft.tracking.events import Event

COMMAND = (sys.executable, "-c", "from splitft.cli import main; main()")
"""The command `splitft` of this environment."""


def settings(model: Path, text: Path, /, **sections: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration; `sections` add to it or replace its keys."""
    base: dict[str, dict[str, Any]] = {
        "model": {"name": str(model), "dtype": "float32"},
        "data": {"source": str(text), "max_tokens": 24},
        "clients": {"count": 3, "cuts": [1, 2, 3], "shares": {"by": "length", "alpha": 1.0}},
        "lora": {"rank": 4, "rank_at_cut": 2, "alpha": 8},
        "training": {"rounds": 3, "steps": 3, "batch_size": 2, "lr": 1e-2},
    }
    for name, values in sections.items():
        base[name] = {**base.get(name, {}), **values} if isinstance(values, Mapping) else values
    return base


def settings_file(folder: Path, model: Path, /, **sections: Mapping[str, Any]) -> Path:
    """The same in a YAML file, with a text beside it."""
    text = write_text(folder / "notes.jsonl")
    file = folder / "run.yaml"
    file.write_text(yaml.safe_dump(settings(model, text, **sections)), encoding="utf-8")
    return file


def started(*arguments: object, before: Sequence[str] = (), **options: Any) -> subprocess.Popen[str]:
    """The command in a process of its own, on one thread; `before` are words to put before it."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return subprocess.Popen(
        [*before, *COMMAND, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        **{"preexec_fn": interruptible, **options},
    )


def interruptible() -> None:
    """Let Ctrl-C through: a shell's background jobs ignore it, and so would their children."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def invoke(*arguments: object) -> Any:
    """The command in this process: its exit status, stdout and stderr."""
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def adapter_bytes(run: Path) -> bytes:
    """What the run learnt."""
    return (run / "adapter" / "adapter_model.safetensors").read_bytes()


class StoppedError(Exception):
    """What `stop_at` raises: the run ends there, as if by a fault."""


def stop_at(kind: type, round: int, count: int = 1) -> Any:
    """A listener that ends the run at the count-th event of a kind in a round."""
    seen = 0

    def listener(event: Event) -> None:
        nonlocal seen
        if isinstance(event, kind) and event.round == round:
            seen += 1
            if seen == count:
                raise StoppedError

    return listener
