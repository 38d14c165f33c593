"""From a configuration to a run: with the command line, the one place that sees the whole of it.

RunConfig --parties--> clients, server --training--> run folder --results--> text, PEFT, merged model

A name is imported where it lives when it is first asked for (PEP 562): a plan needs no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from splitft.assemble.evaluating import Trial, evaluate
    from splitft.assemble.folder import Run
    from splitft.assemble.parties import Prepared, prepare
    from splitft.assemble.planning import plan
    from splitft.assemble.results import export, generate
    from splitft.assemble.sharing import shares
    from splitft.assemble.training import train

__all__ = ["Prepared", "Run", "Trial", "evaluate", "export", "generate", "plan", "prepare", "shares", "train"]

_HOMES = {
    "Prepared": "parties",
    "Run": "folder",
    "Trial": "evaluating",
    "evaluate": "evaluating",
    "export": "results",
    "generate": "results",
    "plan": "planning",
    "prepare": "parties",
    "shares": "sharing",
    "train": "training",
}
"""Module of each public name."""


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'splitft.assemble' has no attribute {name!r}")
    return getattr(import_module(f"splitft.assemble.{_HOMES[name]}"), name)
