"""splitft: federated split fine-tuning of language models.

    run = splitft.train("run.yaml", out="runs/a")
    run.summary["eval_loss"], run.adapter_dir, run.report()

Importing this package is light: torch and transformers come with the first use of a name below.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from splitft.version import __version__

if TYPE_CHECKING:
    from splitft.config import RunConfig, load
    from splitft.evaluation.evaluate import evaluate
    from splitft.run.folder import Run, export, generate
    from splitft.run.train import train

__all__ = ["Run", "RunConfig", "__version__", "evaluate", "export", "generate", "load", "train"]

_HOMES = {
    "Run": "splitft.run.folder",
    "RunConfig": "splitft.config",
    "evaluate": "splitft.evaluation.evaluate",
    "export": "splitft.run.folder",
    "generate": "splitft.run.folder",
    "load": "splitft.config",
    "train": "splitft.run.train",
}


def __getattr__(name: str) -> Any:
    """Import a public name where it lives when it is first asked for (PEP 562)."""
    if name not in _HOMES:
        raise AttributeError(f"module 'splitft' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
