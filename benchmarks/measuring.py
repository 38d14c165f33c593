"""Common parts of the benchmarks: interleaved timing, paired ratios, and sections of RESULTS.md.

    round 1: A B C    round 2: A B C    ...    ratio of B to A = median over rounds of B / A in that round

Variants take turns, so that a temporary slowdown of the machine affects all of them. A ratio is formed within
a round, and its median is taken over rounds. Spread is the interquartile range.
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from splitft.tracking.table import Table

REPOSITORY = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Spread:
    """A sample in three numbers."""

    low: float
    """First quartile."""
    median: float
    high: float
    """Third quartile."""

    @classmethod
    def of(cls, sample: Sequence[float]) -> Spread:
        """Summarise at least one number."""
        if len(sample) == 1:
            return cls(sample[0], sample[0], sample[0])
        low, median, high = statistics.quantiles(sample, n=4, method="inclusive")
        return cls(low, median, high)

    def __str__(self) -> str:
        return f"{self.median:.3f} ({self.low:.3f} to {self.high:.3f})"


def interleaved(
    variants: Mapping[str, Callable[[], object]], rounds: int, warmup: int = 1
) -> dict[str, list[float]]:
    """Return the seconds of each variant in each of `rounds` rounds, after `warmup` rounds that do not
    count."""
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for number in range(-warmup, rounds):
        for name, run in variants.items():
            began = time.perf_counter()
            run()
            spent = time.perf_counter() - began
            if number >= 0:
                seconds[name].append(spent)
    return seconds


def ratio(above: Sequence[float], below: Sequence[float]) -> Spread:
    """Return the spread of the ratios of each round."""
    return Spread.of([a / b for a, b in zip(above, below, strict=True)])


def table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Return a table in Markdown."""
    return Table(head, [list(map(str, row)) for row in rows]).to_markdown()


def section(title: str, facts: Mapping[str, object], *parts: str) -> str:
    """Return a section of RESULTS.md: command, facts, machine and versions, then the tables."""
    command = " ".join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]])
    lines = [
        f"## {title}",
        "",
        f"- command: `{command}`",
        *(f"- {name}: {fact}" for name, fact in facts.items()),
        *(f"- {name}: {fact}" for name, fact in environment().items()),
    ]
    return "\n".join(lines) + "\n\n" + "\n\n".join(parts) + "\n"


class Parts:
    """Parts of a benchmark as JSON files in a folder, so that a stopped benchmark can be resumed.

    The name of a file contains a hash of the package's source, so parts of other versions are not reused.
    """

    def __init__(self, work: Path, most: int | None = None) -> None:
        self._work, self._most, self._made = work, most, 0
        sources = sorted((REPOSITORY / "src/splitft").rglob("*.py"))
        self._code = hashlib.sha256(b"".join(file.read_bytes() for file in sources)).hexdigest()[:8]

    def of(self, name: str, make: Callable[[], Any]) -> Any:
        """Return the part of this name, or exit if `most` parts have been made already."""
        file = self._work / f"{re.sub(r'[^a-zA-Z0-9.]+', '-', name).strip('-')}-{self._code}.json"
        if not file.is_file():
            if self._made == self._most:
                print(f"stopped before {name}; run the same command to continue")
                sys.exit(0)
            self._made += 1
            text = json.dumps(make(), indent=1)
            self._work.mkdir(parents=True, exist_ok=True)
            draft = file.with_suffix(".draft")
            draft.write_text(text + "\n", encoding="utf-8")
            draft.replace(file)
        return json.loads(file.read_text(encoding="utf-8"))


def environment() -> dict[str, str]:
    """Return machine, versions, commit and date."""
    import peft
    import torch
    import transformers

    load = os.getloadavg()[0]  # of all programs
    return {
        "machine": f"{os.cpu_count()} cores {platform.machine()}, {_gpu()} ({_cpu()}); "
        f"{torch.get_num_threads()} threads, load {load:.1f} at the end",
        "versions": f"Python {platform.python_version()}, torch {torch.__version__}, "
        f"transformers {transformers.__version__}, peft {peft.__version__}",
        "commit": _commit(),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
    }


def options(question: str) -> argparse.ArgumentParser:
    """Return a parser of the options that every benchmark has."""
    parser = argparse.ArgumentParser(description=question)
    parser.add_argument("--quick", action="store_true", help="run the smallest setting, as a check")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, help="threads of torch; 1 if other programs use the cores")
    return parser


def begin(seed: int, threads: int | None) -> None:
    """Set seed and threads of torch; turn off the hub, progress bars and warnings of libraries."""
    import torch

    torch.manual_seed(seed)
    if threads:
        torch.set_num_threads(threads)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    warnings.simplefilter("ignore", FutureWarning)
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def _gpu() -> str:
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or "unknown"
    facts = dict(map(str.strip, line.partition(":")[::2]) for line in lines if ":" in line)
    wide = [flag for flag in ("avx512_bf16", "amx_bf16") if flag in facts.get("flags", "").split()]
    family = f"family {facts.get('cpu family', '?')} model {facts.get('model', '?')}"
    limit = os.environ.get("ONEDNN_MAX_CPU_ISA")  # plays a processor without some instructions
    wide = [f"but limited to {limit}"] if limit else wide
    return f"{facts.get('model name', 'unknown')}, {family}{''.join(f', {flag}' for flag in wide)}"


def _commit() -> str:
    def git(*words: str) -> str:
        done = subprocess.run(["git", *words], cwd=REPOSITORY, capture_output=True, text=True, check=False)
        return done.stdout.strip()

    changed = git("status", "--porcelain", "--untracked-files=no", "--", "src", "benchmarks/*.py")
    return git("rev-parse", "--short", "HEAD") + (" with changes" if changed else "")
