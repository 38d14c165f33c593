"""The command line, one module for each group of verbs.

    splitft demo | init | train                 train.py
            plan | report | generate | export   runs.py
            shares | eval | compare             measure.py
            audit                               audit.py
            deploy poc | provision | site | start | submit   deploy.py
                   status | logs | stop                      operate.py

Importing a module registers its verbs, and `--help` lists them in this order. Heavy imports are inside the
verbs, so that `--help` is instant.
"""

from splitft.cli import train, runs, measure, audit, deploy, operate  # isort: skip
from splitft.cli.app import app

__all__ = ["app", "audit", "deploy", "main", "measure", "operate", "runs", "train"]


def main() -> None:
    """Run the command `splitft`."""
    app()
