"""Which faults and hostile acts does a run survive, and how long does it take to recover?

    python benchmarks/faults.py [--quick] [--markdown FILE] [--record FILE]        (also: make faults)

Runs every test that is marked as a fault or a hostile act, with real processes, certificates, kill -9 and
full disks where the test has them, and prints a row for each: what was done, what came of it, how long it
took to recover: the longest time in which no site took a step. `--quick` leaves out those that take minutes.
With `--record`, outcomes are kept in a file, and what ended as it should in it is not done again. Ends with
status 1 if any outcome differs.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TITLES = {"fault": "Faults", "hostile": "Hostile acts"}


def main() -> None:
    """Run the tests and print the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="leave out what takes minutes")
    parser.add_argument("--markdown", type=Path, help="write the tables to this file too")
    parser.add_argument("--record", type=Path, help="keep outcomes in this file, and go on from them")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        rows = run(arguments.record or Path(folder) / "faults.jsonl", quick=arguments.quick)
    text = report(rows)
    print(text)
    if arguments.markdown:
        arguments.markdown.write_text(text + "\n", encoding="utf-8")
    sys.exit(any(row["outcome"] == "failed" for row in rows) or not rows)


def run(record: Path, quick: bool) -> list[dict[str, object]]:
    """Run the marked tests that have not passed yet, in a process of their own; return a row for each act."""
    passed = {str(row["test"]) for row in read(record) if row["outcome"] == "passed"}
    environment = {**os.environ, "SPLITFT_FAULTS": str(record.resolve()), "OMP_NUM_THREADS": "1"}
    if not quick:
        environment["SPLITFT_SLOW"] = "1"
    command = [sys.executable, "-m", "pytest", "-p", "no:xdist", "-m", "fault or hostile", "tests"]
    command += [word for test in sorted(passed) for word in ("--deselect", test)]
    subprocess.run(command, cwd=ROOT, env=environment, check=False, stdout=sys.stderr)
    last = {(row["kind"], row["test"]): row for row in read(record)}
    return list(last.values())


def read(record: Path) -> list[dict[str, object]]:
    """Return the rows of a record; none without one."""
    return (
        [json.loads(line) for line in record.read_text(encoding="utf-8").splitlines()]
        if record.exists()
        else []
    )


def report(rows: Sequence[dict[str, object]]) -> str:
    """Return one Markdown table of each kind."""
    parts = []
    for kind, title in TITLES.items():
        own = [row for row in rows if row["kind"] == kind and row["outcome"] != "skipped"]
        as_expected = sum(row["outcome"] == "passed" for row in own)
        parts.append(f"{title}: {as_expected} of {len(own)} ended as they should.\n")
        parts.append("| what is done | what comes of it | recovery |\n|---|---|---|")
        parts += [_line(alike) for alike in _grouped(own)]
        parts.append("")
    skipped = sum(row["outcome"] == "skipped" for row in rows)
    seconds = sum(float(str(row["seconds"])) for row in rows)
    parts.append(f"{len(rows) - skipped} acts in {seconds / 60:.1f} minutes; {skipped} were skipped.")
    return "\n".join(parts)


def _grouped(rows: Sequence[dict[str, object]]) -> list[list[dict[str, object]]]:
    """Return rows of one test with one outcome together, unless they measured a recovery."""
    groups: dict[tuple[object, ...], list[dict[str, object]]] = {}
    for number, row in enumerate(rows):
        measured = None if row["recovery_s"] is None else number
        function = str(row["test"]).partition("[")[0]
        groups.setdefault((function, row["result"], row["outcome"], measured), []).append(row)
    return list(groups.values())


def _line(rows: Sequence[dict[str, object]]) -> str:
    """Return one line of the table: what is done is listed after the words that all have in common."""
    listed = list(dict.fromkeys(str(row["what"]).replace("|", "\\|") for row in rows))
    words = [one.split(" ") for one in listed]
    alike = itertools.takewhile(lambda column: len(set(column)) == 1, zip(*words, strict=False))
    shared = len(list(alike)) if len(listed) > 1 else 0
    what = " ".join([*words[0][:shared], "; ".join(" ".join(one[shared:]) for one in words)])
    if len(listed) < len(rows):
        what += f" ({len(rows)} kinds)"
    return f"| {what} | {_result(rows[0])} | {_recovery(rows[0])} |"


def _result(row: dict[str, object]) -> str:
    return str(row["result"]) if row["outcome"] == "passed" else f"**not so**: see {row['test']}"


def _recovery(row: dict[str, object]) -> str:
    return "–" if row["recovery_s"] is None else f"{float(str(row['recovery_s'])):.1f} s"


if __name__ == "__main__":
    main()
