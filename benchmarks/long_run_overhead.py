"""Does a round's bookkeeping grow with the run?

    round r: 50 steps, adapters, evaluation --> events.jsonl, summary.json      CPU time at round 10 and 600

After each round the summary is written. `reread` reads and sums all events of the run again, as was done
once; `folded` adds the round's events to totals in memory. The report, which a run writes once at its end, is
measured too. CPU seconds of this process, so that other work on the machine counts little.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from measuring import Spread, begin, options, section, table
from splitft.tracking.events import (
    CheckpointSaved,
    ClientInfo,
    CutsChanged,
    Evaluated,
    Event,
    RoundDone,
    RunStarted,
    StepDone,
    Traffic,
)
from splitft.tracking.log import EventLog
from splitft.tracking.summary import write_summary
from splitft.tracking.summary_writer import SummaryWriter

CLIENTS, STEPS = 5, 10
EARLY, WINDOW = 10, 5
"""The early round, and the rounds around a round whose CPU seconds are taken."""
LEGS = ("client_forward", "up_hidden", "server_forward", "head", "server_backward", "client_backward")


def beginning(rounds: int) -> list[Event]:
    """Return the events before the first round."""
    clients = tuple(
        ClientInfo(name=f"client-{n}", cut=2, train_examples=90, train_tokens=9000, eval_examples=10)
        for n in range(CLIENTS)
    )
    facts = {"version": "0", "method": "splitft", "seed": 0, "model": "synthetic", "blocks": 30}
    started = RunStarted(**facts, rounds=rounds, steps=STEPS, labels="client", clients=clients)
    return [started, Evaluated(round=0, loss=4.0, by_client={one.name: 4.0 for one in clients})]


def round_events(number: int) -> Iterator[Event]:
    """Yield the events of one round, as a run has them."""
    names = [f"client-{n}" for n in range(CLIENTS)]
    yield CutsChanged(round=number, cuts=dict.fromkeys(names, 2))
    for step in range(STEPS):
        for name in names:
            yield StepDone(
                round=number,
                step=(number - 1) * STEPS + step,
                client=name,
                loss=3.0 + 1 / number,
                tokens=480,
                examples=4,
                seconds=dict.fromkeys(LEGS, 0.0125),
                traffic=Traffic(up={"hidden": 553_000, "gradient": 553_000}, down={"hidden": 553_000}),
            )
    sent = {name: Traffic(up={"adapter": 920_000}, down={"adapter": 920_000}) for name in names}
    yield RoundDone(round=number, participants=tuple(names), aggregation_error=0.01, traffic=sent)
    yield Evaluated(round=number, loss=3.0 + 1 / number, by_client=dict.fromkeys(names, 3.0))
    yield CheckpointSaved(round=number, path=f"checkpoints/round-{number:04d}")


def spent(
    folder: Path, rounds: int, make: Callable[[Path], tuple[Callable[[Event], None], Callable[[], object]]]
) -> dict[int, list[float]]:
    """Return the CPU seconds of bookkeeping in the measured rounds; `make` gives a listener and a writer.

    Other rounds are only told to the listener: their summaries would take hours where each is quadratic.
    """
    log = EventLog(folder / "events.jsonl")
    listener, write = make(folder)
    measured = {late: range(late - WINDOW + 1, late + 1) for late in (EARLY, rounds)}
    seconds: dict[int, list[float]] = {late: [] for late in measured}

    def tell(events: Iterator[Event] | list[Event]) -> None:
        for event in events:
            log(event)
            listener(event)

    tell(beginning(rounds))
    for number in range(1, rounds + 1):
        events = list(round_events(number))
        began = time.process_time()
        tell(events)
        late = next((late for late, numbers in measured.items() if number in numbers), None)
        if late is not None:
            write()
            seconds[late].append(time.process_time() - began)
    log.close()
    return seconds


def reread(folder: Path) -> tuple[Callable[[Event], None], Callable[[], object]]:
    """Keep nothing in memory."""
    return lambda event: None, lambda: write_summary(folder)


def folded(folder: Path) -> tuple[Callable[[Event], None], Callable[[], object]]:
    """Keep the totals in memory, as runs do."""
    writer = SummaryWriter(folder)
    return writer, writer.write


def main() -> None:
    """Measure both, and print the section."""
    parser = options(__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=600)
    chosen = parser.parse_args()
    rounds = 60 if chosen.quick else chosen.rounds
    begin(chosen.seed, chosen.threads)
    rows = []
    for name, make in (("reread", reread), ("folded", folded)):
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch)
            seconds = spent(folder, rounds, make)
            early, late = (Spread.of([1e3 * one for one in seconds[number]]) for number in (EARLY, rounds))
            size = (folder / "events.jsonl").stat().st_size / 1e6
            rows.append((name, early, late, f"{late.median / early.median:.1f}"))
            if make is folded:
                from splitft.report.page import write_report

                began = time.process_time()
                write_report([folder], folder / "report.html")
                report_s = time.process_time() - began
    print(
        section(
            "Bookkeeping of long runs",
            {
                "config": f"{rounds} rounds of synthetic events, {CLIENTS} clients, {STEPS} steps a round; "
                f"{size:.1f} MB of events at the end",
                "seed": f"{chosen.seed} (nothing is drawn)",
                "spread": f"median (middle half) of {WINDOW} rounds, CPU milliseconds of one process; the "
                "machine had other work meanwhile",
                f"report after {rounds} rounds, once a run": f"{report_s:.2f} CPU seconds",
            },
            table(("summary", f"ms at round {EARLY}", f"ms at round {rounds}", "ratio"), rows),
        )
    )


if __name__ == "__main__":
    main()
