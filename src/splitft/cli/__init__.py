"""The command line, one module for each group of verbs.

    splitft demo | init | train                 train.py
            plan | report | generate | export   runs.py
            shares | eval | compare             measure.py
            audit                               audit.py
            deploy poc | provision | start | pause | resume                        deploy.py
                   site                                                            site.py
                   submit                                                          submit.py
                   status | logs | stop                                            operate.py
                   authority | request | approve | package | renew | revoke        membership.py

Importing a module registers its verbs, and `--help` lists them in this order. Heavy imports are inside the
verbs, so that `--help` is instant.
"""

from splitft.cli import train, runs, measure, audit, deploy, site, submit, operate, membership  # isort: skip
from splitft.cli.app import app
from splitft.cli.terminal import make_streams_last

__all__ = [
    "app", "audit", "deploy", "main", "measure", "membership", "operate", "runs", "site", "submit", "train",
]  # fmt: skip


def main() -> None:
    """Run the command `splitft`."""
    make_streams_last()
    app()
