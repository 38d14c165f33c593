"""Choose each method's values of some keys by successive halving.

    training.lr=3e-4,1e-3,3e-3 --candidates--> 3 runs a method --R/2--> the better 2 --R--> the best

Candidates train for a part of the rounds, the worse half of them stops there, and the others go on from their
checkpoints, until the last two have trained all R rounds. What counts is the loss on the second half of each
client's held-out examples; the runs that are compared afterwards are evaluated on the first half, so no
figure is of text that a choice was made on. All methods choose from the same values, on the same text and
seed. A candidate whose training fails is out.

Successive halving: Jamieson and Talwalkar 2016, https://arxiv.org/abs/1502.07943.
"""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from splitft.compare.budget import Budget, diverged, train_within
from splitft.compare.rows import ComparisonRow, RowListener, plan_row
from splitft.errors import ConfigError, DataError, ModelError, RunError, SplitftError
from splitft.methods import METHODS

TUNING_PART, FINAL_PART = "data.eval_part=second-half", "data.eval_part=first-half"
"""Overrides of runs that a choice is made on, and of those that are measured after it."""


def parse_grid(options: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """Return the values to try by key, from `training.lr=1e-4,1e-3`. Raises ConfigError."""
    grid: dict[str, tuple[str, ...]] = {}
    for option in options:
        key, _, listed = option.partition("=")
        values = tuple(dict.fromkeys(part.strip() for part in listed.split(",") if part.strip()))
        if not key.strip() or len(values) < 2:
            raise ConfigError(
                f"--tune {option!r}: give a key and two values or more, such as training.lr=3e-4,1e-3,3e-3"
            )
        if key.strip() in grid:
            raise ConfigError(f"--tune names {key.strip()} twice; give all its values at once")
        grid[key.strip()] = values
    return grid


@dataclass
class Candidate:
    """One choice of values for a method, and how far it came."""

    row: ComparisonRow
    values: Mapping[str, str]
    rounds: int = 0
    """Rounds that it was trained for."""
    loss: float = math.inf
    """Loss on the second half of the held-out text after them; infinite if training failed."""
    failed: str = ""
    """Why training failed."""


@dataclass(frozen=True)
class TunedValues:
    """The values chosen for one method."""

    method: str
    values: Mapping[str, str]
    tried: Sequence[Candidate] = field(default_factory=tuple)

    @property
    def overrides(self) -> list[str]:
        """The values as overrides of a configuration."""
        return _as_overrides(self.values)

    @property
    def at_edge(self) -> list[str]:
        """The numeric keys whose chosen value is the least or greatest of those tried."""
        found = []
        for key, value in self.values.items():
            tried = {one.values[key] for one in self.tried}
            with contextlib.suppress(ValueError):
                numbers = sorted(map(float, tried))
                if len(numbers) > 1 and float(value) in (numbers[0], numbers[-1]):
                    found.append(key)
        return found

    def as_data(self) -> dict[str, object]:
        """Return plain data for `compare.json`."""
        return {
            "method": self.method,
            "chosen": dict(self.values),
            "at_edge": self.at_edge,
            "tried": [
                {
                    "values": dict(one.values),
                    "rounds": one.rounds,
                    "loss": one.loss if math.isfinite(one.loss) else None,
                    "failed": one.failed,
                    "folder": str(one.row.folder),
                }
                for one in self.tried
            ],
        }


def _as_overrides(values: Mapping[str, str]) -> list[str]:
    return [f"{key}={value}" for key, value in values.items()]


def rungs(candidates: int, rounds: int) -> list[tuple[int, int]]:
    """Return (rounds to have trained, candidates that go on after them), the last with all rounds and one."""
    found: list[tuple[int, int]] = []
    halvings = max(1, math.ceil(math.log2(candidates)))
    for number in range(1, halvings + 1):
        candidates = max(1, math.ceil(candidates / 2))
        found.append((math.ceil(rounds / 2 ** (halvings - number)), candidates))
    return found


def plan_candidates(
    file: Path, method: str, seed: int, out: Path, overrides: Sequence[str], grid: Mapping[str, Sequence[str]]
) -> list[Candidate]:
    """Return the candidates of one method: every combination of the values of the keys that it leaves free.

    Combinations that do not fit together are left out; raises ConfigError if none fits.
    """
    free = {key: values for key, values in grid.items() if key not in METHODS[method].fixes}
    found, fault = [], None
    for values in itertools.product(*free.values()):
        chosen = dict(zip(free, values, strict=True))
        given = [*overrides, *_as_overrides(chosen), TUNING_PART]
        try:
            row = plan_row(file, method, seed, out / "tuning", given)
        except ConfigError as error:
            fault = fault or error
            continue
        label = ", ".join(f"{key.rpartition('.')[2]} {value}" for key, value in chosen.items())
        found.append(Candidate(replace(row, note=f"tuning, {label}"), chosen))
    if not found and fault is not None:
        raise fault
    return found


def choose(candidates: Sequence[Candidate], budget: Budget, listener: RowListener) -> TunedValues:
    """Train the candidates of one method rung by rung, and return the best.

    Candidates that are trained already, here or by an earlier command, are not trained again. Raises
    RunError if every candidate fails.
    """
    method, rounds = candidates[0].row.method, candidates[0].row.config.training.rounds
    if len(candidates) == 1:  # the method leaves nothing to choose
        return TunedValues(method, candidates[0].values)
    alive = list(candidates)
    for upto, kept in rungs(len(candidates), rounds):
        for one in alive:
            _train(one, budget if upto == rounds else replace(budget, rounds=upto), listener)
        alive = sorted((one for one in alive if not one.failed), key=lambda one: one.loss)[:kept]
        if not alive:
            reasons = "; ".join(f"{one.row.note}: {one.failed}" for one in candidates)
            raise RunError(
                f"{method}: no candidate could be trained ({reasons}); give other values to --tune"
            )
    return TunedValues(method, alive[0].values, tuple(candidates))


def _train(one: Candidate, budget: Budget, listener: RowListener) -> None:
    """Train a candidate as far as the rung goes, and note its loss."""
    try:
        points = train_within(
            one.row.config, one.row.folder, budget, [lambda event: listener(one.row, event)]
        )
    except (ConfigError, DataError, ModelError):
        raise  # of no candidate in particular
    except SplitftError as error:
        one.loss, one.failed = math.inf, str(error).splitlines()[0]
        return
    if len(points) < 2 or diverged(one.row.folder):
        one.loss, one.failed = math.inf, "no finite held-out loss after training"
    else:
        one.rounds, one.loss = points[-1].round, points[-1].loss
