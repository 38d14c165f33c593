"""The command line: every verb of splitft, one module a group of verbs.

    splitft demo | init | train        training.py
            plan | report | generate | export   looking.py
            shares | eval | compare    comparing.py
            audit                      auditing.py
            deploy ...                 deploying.py, operating.py

Heavy imports are inside the verbs, so that `--help` is instant.
"""

from splitft.cli import auditing, comparing, deploying, looking, operating, training
from splitft.cli.ending import app

__all__ = ["app", "auditing", "comparing", "deploying", "looking", "main", "operating", "training"]


def main() -> None:
    """Entry point of the command `splitft`."""
    app()
