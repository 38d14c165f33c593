"""Hold a server to what the run and the data owner allow: steps, rounds, evaluations, hours, norms.

    order --check--> carried out --check_adapters, work--> ...          ForbiddenError: the site declines

An honest server asks for no more than the run's own configuration says. A hostile one may ask for anything,
and the configuration comes from it too; therefore the data owner's file has limits of its own (`limits`), and
a run that asks for more is declined at once (`policy.refusals`). Time and evaluations are counted over all
sessions, in files that only grow:

    RUNS/work-2026-11-28.txt            seconds of computing, a line each; all runs and jobs of this day
    RUNS/RUN/SITE/evaluations.txt       a line for each evaluation for a run
"""

from __future__ import annotations

import contextlib
import math
from collections import Counter
from datetime import UTC, datetime
from pathlib import Path

from splitft.errors import ForbiddenError
from splitft.protocol import ChooseCodecs, Evaluate, GlobalAdapters, Join, Message, RoundStart, Train
from splitft.specs import SiteLimitsSpec, TrainingSpec
from splitft.training.client import Client

WRITE_EVERY_S = 5.0
"""Seconds of computing after which they are written down."""
HOUR_S = 3600.0


class WorkLedger:
    """What this site has done for runs; without folders, it remembers only this session."""

    def __init__(self, runs: Path | None = None, run: Path | None = None) -> None:
        """Count computing in `runs`, for all runs, and evaluations in `run`."""
        self._runs, self._run = runs, run
        self._unwritten_s, self._seconds = 0.0, {self._today(): 0.0}
        self._evaluations = 0

    @property
    def seconds_today(self) -> float:
        """Seconds of computing today, for all runs."""
        today, path = self._today(), self._work_file()
        if path is None or not path.is_file():
            return self._seconds.get(today, 0.0) + self._unwritten_s
        return sum(map(_seconds, path.read_text(encoding="utf-8").split())) + self._unwritten_s

    @property
    def evaluations(self) -> int:
        """Evaluations for this run."""
        if self._run is not None and (path := self._run / "evaluations.txt").is_file():
            return len(path.read_text(encoding="utf-8").splitlines())
        return self._evaluations

    def work(self, seconds: float) -> bool:
        """Count seconds of computing; returns whether they were written down."""
        self._unwritten_s += seconds
        if self._unwritten_s < WRITE_EVERY_S:
            return False
        self.write()
        return True

    def write(self) -> None:
        """Write down the seconds that are not written yet, and forget those of earlier days."""
        today, path = self._today(), self._work_file()
        self._seconds = {today: self._seconds.get(today, 0.0) + self._unwritten_s}
        if path is not None and self._unwritten_s:
            _append(path, f"{self._unwritten_s:.3f}")
            for old in path.parent.glob("work-*.txt"):
                if old.name < path.name:
                    with contextlib.suppress(OSError):
                        old.unlink()
        self._unwritten_s = 0.0

    def evaluate(self) -> None:
        """Count an evaluation, before it is made."""
        self._evaluations += 1
        if self._run is not None:
            _append(self._run / "evaluations.txt", self._today())

    def _work_file(self) -> Path | None:
        return None if self._runs is None else self._runs / f"work-{self._today()}.txt"

    @staticmethod
    def _today() -> str:
        return f"{datetime.now(UTC):%Y-%m-%d}"


class OrderLimits:
    """The limits of one session. Every method raises ForbiddenError, with the key that says so."""

    def __init__(
        self,
        limits: SiteLimitsSpec,
        training: TrainingSpec | None = None,
        ledger: WorkLedger | None = None,
    ) -> None:
        """Hold a server to `limits` and to the run's own `training`."""
        self._limits, self._ledger = limits, ledger or WorkLedger()
        self._rounds, self._rounds_key = limits.rounds, "limits.rounds"
        self._steps, self._steps_key = limits.steps, "limits.steps"
        if training is not None and training.rounds <= limits.rounds:
            self._rounds, self._rounds_key = training.rounds, "training.rounds of the run"
        if training is not None and training.steps <= limits.steps:
            self._steps, self._steps_key = training.steps, "training.steps of the run"
        self._times: Counter[tuple[str, int]] = Counter()

    def check(self, order: Message) -> None:
        """Check an order before it is carried out."""
        if not isinstance(order, Join | RoundStart | Train | GlobalAdapters | Evaluate | ChooseCodecs):
            return
        self._check_round(order)
        if isinstance(order, Train) and order.steps > self._steps:
            raise ForbiddenError(
                f"the server asks for {order.steps} steps in round {order.round}; this site takes at most "
                f"{self._steps} ({self._steps_key})"
            )
        if isinstance(order, Join) and order.steps > order.round * self._steps:
            raise ForbiddenError(
                f"the server says that this site has taken {order.steps} steps in {order.round} rounds; at "
                f"most {order.round * self._steps} are possible ({self._steps_key})"
            )
        if isinstance(order, Evaluate):
            self._check_evaluation()
        self.check_day()

    def check_adapters(self, client: Client) -> None:
        """Check the adapters that a client was sent, before it uses them."""
        ratio, layer = client.blocks.largest_update()
        if layer is not None and not ratio <= self._limits.adapter_norm:
            raise ForbiddenError(
                f"the server sent an update of block {layer[0]} {layer[1]} that is {ratio:.3g} times as "
                f"large as its frozen weight; this site takes at most {self._limits.adapter_norm:g} "
                "(limits.adapter_norm)"
            )

    def check_day(self) -> None:
        """Check the hours of today."""
        hours = self._ledger.seconds_today / HOUR_S
        if hours >= self._limits.hours_a_day:
            raise ForbiddenError(
                f"this site has computed {hours:.3g} hours for runs today (UTC); its owner gives "
                f"{self._limits.hours_a_day:g} (limits.hours_a_day)"
            )

    def work(self, seconds: float) -> None:
        """Count seconds of computing."""
        if self._ledger.work(max(0.0, seconds)):
            self.check_day()

    def close(self) -> None:
        """Write down what was counted."""
        self._ledger.write()

    def _check_round(
        self, order: Join | RoundStart | Train | GlobalAdapters | Evaluate | ChooseCodecs
    ) -> None:
        """Check the number of a round, and how often the same is asked."""
        if order.round > self._rounds:
            raise ForbiddenError(
                f"the server goes on to round {order.round}; this site takes part in {self._rounds} "
                f"({self._rounds_key})"
            )
        asked = type(order).__name__, order.round
        self._times[asked] += 1
        if (times := self._times[asked]) > self._limits.attempts:
            raise ForbiddenError(
                f"the server sends {asked[0]} of round {order.round} {times} times in this session; "
                f"this site takes {self._limits.attempts} (limits.attempts)"
            )

    def _check_evaluation(self) -> None:
        most = min(self._limits.evaluations, (self._rounds + 1) * self._limits.attempts)
        if self._ledger.evaluations >= most:
            raise ForbiddenError(
                f"this site has evaluated {self._ledger.evaluations} times for this run, which tells the "
                f"server as many losses; its owner gives {most} (limits.evaluations, limits.attempts)"
            )
        self._ledger.evaluate()


def _append(path: Path, line: str) -> None:
    """Add a line to a file in one write, so that jobs of this site at the same time lose nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab", buffering=0) as file:
        file.write(f"{line}\n".encode())


def _seconds(text: str) -> float:
    """Return the seconds of a line; a line that is damaged counts as none."""
    try:
        seconds = float(text)
    except ValueError:
        return 0.0
    return seconds if math.isfinite(seconds) and seconds > 0 else 0.0
