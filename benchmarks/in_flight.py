"""Measure the gain of micro-batches in flight over a slow link, in real deployed runs.

    one in flight   client | link | server | link | client | link | server | link | client    then the next
    two in flight   the same for both halves of a step: one is computed while the other is on the link

Real processes with FLARE's certificates train the real model, and its first blocks alone as a model whose
computation takes less time than the link, at one site behind a delaying proxy. Steps are divided into two
micro-batches (`training.micro_batches: 2`), of which `training.in_flight` are in flight at once. The link
changes with each round of a job. A step is timed from the end of the step before it at the server, so the
first of each round does not count. Jobs with one and two in flight take turns.

There are two bounds: the busiest of client, server and each direction of the link; and the two round trips of
one micro-batch, because a step's optimizer waits for all its parts. Computation is measured on loopback with
one in flight. Goal: at 100 ms at least 1.6 times the steps a second of one in flight.
"""

from __future__ import annotations

import itertools
import shutil
import statistics
import tempfile
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from far_sites import Ground, ended, federation
from measuring import REPOSITORY, Spread, begin, options, section, table

FAR = "far"
LINES = ((0.0, None), (0.02, 100), (0.1, 100), (0.02, 20), (0.1, 20))
"""Round trip in seconds, and Mbit/s each way; the first is loopback, which runs once more as a warm-up."""
IN_FLIGHT = (1, 2)
GOAL, LONG_S = 1.6, 0.1
JOB_S = 300.0


@dataclass(frozen=True)
class Case:
    """One model and its steps."""

    name: str
    blocks: int | None
    """First blocks of the real model; None for all."""
    batch: int
    """Sequences of a step."""
    steps: int
    """In a round."""


CASES = (Case("first 6 blocks", 6, 4, 9), Case("smollm2-135m", None, 4, 7))


def model_of(case: Case, folder: Path) -> str:
    """Return the real model's name, or a folder with its first blocks."""
    from splitft.model import open_model
    from splitft.specs import ModelSpec

    if case.blocks is None:
        return ModelSpec().name
    from transformers import AutoModelForCausalLM

    model, short = open_model(ModelSpec()), folder / f"first-{case.blocks}"
    if not short.is_dir():
        whole = AutoModelForCausalLM.from_pretrained(
            model.path, dtype=model.dtype, num_hidden_layers=case.blocks
        )
        whole.save_pretrained(short)
        for file in Path(model.path).glob("*token*"):
            shutil.copy(file, short)
    return str(short)


def configured(case: Case, model: str, in_flight: int, lines: int, seed: int, steps: int, path: Path) -> Any:
    """Return the configuration of a run with one site and a round for each link."""
    from splitft.config import from_mapping

    text: dict[str, Any] = {"source": "python-docs", "max_tokens": 64}
    if path.is_file():
        text = {"source": str(path), "prompt": "mr", "completion": "ref", "max_tokens": 96}
    return from_mapping({
        "model": {"name": model, "dtype": "bfloat16"},
        "data": {**text, "max_examples": 400, "eval_examples": 2},
        "clients": {"count": 1, "cuts": [2]},
        "training": {
            "rounds": lines + 1, "steps": steps, "batch_size": case.batch, "micro_batches": 2,
            "in_flight": in_flight,
        },
        "deploy": {"sites": [FAR]},
        "seed": seed,
    })  # fmt: skip


class Rounds:
    """Follows a run folder, and sets the link of every round."""

    def __init__(self, ground: Ground, run: str, lines: Sequence[tuple[float, int | None]]) -> None:
        from splitft.deploy.flare.engine import Follower

        self._line, self._lines, self.steps = ground.lines[FAR], lines, list[Any]()
        self._follower = Follower(ground.runs / run / "events.jsonl", [self._take])
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._set(0)
        self._thread.start()

    def end(self) -> list[list[Any]]:
        """Return the steps of each round."""
        self._done.set()
        self._thread.join()
        self._follower.poll()
        return [[one for one in self.steps if one.round == number + 1] for number in range(len(self._lines))]

    def _look(self) -> None:
        while not self._done.wait(0.02):
            self._follower.poll()

    def _take(self, event: Any) -> None:
        if event.event == "StepDone":
            self.steps.append(event)
        elif event.event == "RoundDone" and event.round < len(self._lines):
            self._set(event.round)

    def _set(self, index: int) -> None:
        round_trip_s, mbit = self._lines[index]
        self._line.round_trip_s = round_trip_s
        self._line.bytes_per_s = float("inf") if mbit is None else mbit * 1e6 / 8


def played(ground: Ground, run: str, config: Any, lines: Sequence[tuple[float, int | None]]) -> list[Any]:
    """Run one job and return its steps, by link."""
    from splitft.deploy.flare.job import write_job

    rounds = Rounds(ground, run, (lines[0], *lines))
    job = ground.console.submit(write_job(ground.folder / "job", run, config))
    state = ended(ground.console, job, JOB_S)
    found = rounds.end()
    if not all(len(steps) == config.training.steps for steps in found):
        raise SystemExit(f"{run} did not train all its rounds: {state}")
    return found[1:]


def seconds_of(steps: Sequence[Any]) -> list[float]:
    """Return the seconds between the ends of steps."""
    return [after.t - before.t for before, after in itertools.pairwise(steps)]


@dataclass(frozen=True)
class Work:
    """Computation and bytes of a step, the same on every link."""

    client_s: float
    """Computation at the client, and FLARE's overhead."""
    server_s: float
    up_bytes: float
    down_bytes: float

    @classmethod
    def of(cls, steps: Sequence[Any]) -> Work:
        """Return the work of steps on loopback with one micro-batch in flight."""
        server = statistics.median(sum(one.seconds.values()) for one in steps[1:])
        return cls(
            statistics.median(seconds_of(steps)) - server,
            server,
            statistics.mean(sum(one.traffic.up.values()) for one in steps[1:]),
            statistics.mean(sum(one.traffic.down.values()) for one in steps[1:]),
        )

    def busiest_s(self, mbit: int | None) -> float:
        """Return max(compute, transfer)."""
        rate = float("inf") if mbit is None else mbit * 1e6 / 8
        return max(self.client_s, self.server_s, self.up_bytes / rate, self.down_bytes / rate)

    def way_s(self, round_trip_s: float, mbit: int | None) -> float:
        """Return the seconds of one of two micro-batches through client, link and server, two round trips."""
        rate = float("inf") if mbit is None else mbit * 1e6 / 8
        halves = (self.client_s + self.server_s + (self.up_bytes + self.down_bytes) / rate) / 2
        return halves + 2 * round_trip_s


Found = Mapping[int, list[list[list[Any]]]]
"""By micro-batches in flight: jobs, links, steps."""


def rows_of(found: Found, lines: Sequence[tuple[float, int | None]]) -> tuple[Work, list[tuple[Any, ...]]]:
    """Return the work of a step, and a row for each link."""
    works = [Work.of(job[0]) for job in found[1]]
    work = Work(*(statistics.median(getattr(one, name) for one in works) for name in Work.__annotations__))
    rows = []
    for index, (round_trip_s, mbit) in enumerate(lines):
        one, two = ([seconds_of(job[index]) for job in found[count]] for count in IN_FLIGHT)
        gains = [statistics.median(a) / statistics.median(b) for a, b in zip(one, two, strict=True)]
        gain, best = Spread.of(gains), statistics.median(itertools.chain(*two))
        bound = max(work.busiest_s(mbit), work.way_s(round_trip_s, mbit))
        rows.append((
            f"{1e3 * round_trip_s:.0f}",
            mbit or "loopback",
            Spread.of(list(itertools.chain(*one))),
            Spread.of(list(itertools.chain(*two))),
            gain,
            f"{work.busiest_s(mbit):.3f}",
            f"{work.way_s(round_trip_s, mbit):.3f}",
            f"{best / work.busiest_s(mbit):.2f}",
            f"{best / bound:.2f}",
        ))  # fmt: skip
    return work, rows


def main() -> None:
    parser = options(__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=REPOSITORY.parent / "shared/data/e2e/devset.csv")
    parser.add_argument("--jobs", type=int, default=2, help="jobs of each kind, which take turns")
    chosen = parser.parse_args()
    begin(chosen.seed, chosen.threads)
    lines = LINES[::2] if chosen.quick else LINES
    jobs = 1 if chosen.quick else chosen.jobs
    found: dict[str, dict[int, list[Any]]] = {}
    with tempfile.TemporaryDirectory(prefix="splitft-bench-") as scratch:
        folder = Path(scratch)
        with federation(folder, (), (FAR,)) as ground:
            for case in CASES:
                model = model_of(case, folder)
                mine = found.setdefault(case.name, {count: [] for count in IN_FLIGHT})
                for job in range(jobs):
                    for count in IN_FLIGHT:
                        steps = 4 if chosen.quick else case.steps
                        config = configured(case, model, count, len(lines), chosen.seed, steps, chosen.data)
                        name = f"{case.blocks or 'all'}-{count}-{job}"
                        mine[count].append(played(ground, name, config, lines))
    head = (
        "round trip, ms", "Mbit/s", "s a step, 1 in flight", "2 in flight", "gain",
        "busiest of client, server, link, s", "a micro-batch's round trips, s", "2 in flight to busiest",
        "to the larger bound",
    )  # fmt: skip
    parts, verdicts = [], []
    for case in CASES:
        work, rows = rows_of(found[case.name], lines)
        parts.append(
            f"{case.name}, cut 2, {case.batch} sequences a step in 2 micro-batches: client and engine "
            f"{work.client_s:.3f} s, server {work.server_s:.3f} s a step, {work.up_bytes / 1e6:.2f} MB up, "
            f"{work.down_bytes / 1e6:.2f} MB down\n\n" + table(head, rows)
        )
        long = [row[4].median for row, line in zip(rows, lines, strict=True) if line[0] == LONG_S]
        word = "met" if min(long) >= GOAL else "missed" if max(long) < GOAL else "met on one link"
        verdicts.append(f"{case.name} {', '.join(f'{one:.2f}' for one in long)}: {word}")
    print(
        section(
            "Micro-batches in flight over a slow link",
            {
                "config": "server and one site behind a delaying proxy, a process each, FLARE with "
                "certificates; training.micro_batches 2; bf16 model and wire, LoRA rank 16 on attention",
                "text": f"E2E ({chosen.data.name})" if chosen.data.is_file() else "python-docs (embedded)",
                "seed": chosen.seed,
                "spread": "median (middle half) over steps; gains over pairs of jobs that took turns",
                f"goal, at {1e3 * LONG_S:.0f} ms at least {GOAL} times 1 in flight": "; ".join(verdicts),
            },
            *parts,
        )
    )


if __name__ == "__main__":
    main()
