"""The command line: every verb of splitft, one module a group of verbs.

    splitft demo | init | train        training.py
            plan | report | generate | export   looking.py
            shares | eval | compare    comparing.py
            audit                      auditing.py
            deploy ...                 deploying.py, operating.py

Heavy imports are inside the verbs, so that `--help` is instant.
"""

from splitft.cli import audit as auditing
from splitft.cli import deploy as deploying
from splitft.cli import measure as comparing
from splitft.cli import operate as operating
from splitft.cli import runs as looking
from splitft.cli import train as training
from splitft.cli.app import app

__all__ = ["app", "auditing", "comparing", "deploying", "looking", "main", "operating", "training"]


def main() -> None:
    """Entry point of the command `splitft`."""
    app()
