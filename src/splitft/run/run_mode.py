"""Choose once, before the first round, what a configuration leaves to `auto`: how the server's factors step.

    split.server_adapters: auto --quickest, on the simulated clock--> per-client | shared | ...
    a new run      chosen here, and written to config.yaml in the place of auto
    a run resumed  as its config.yaml says: a way that changed would change the result

Only ways that fit the rest of the configuration are compared. Under other controllers, which compare no ways,
and in a deployed run, whose sites know no fleet, auto is per-client: exact at any cut.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from splitft.config import RunConfig, load
from splitft.config.compatibility import conflicts
from splitft.errors import ScheduleError
from splitft.run.cut_schedule import CutSchedule
from splitft.schedule.design_space import ModeChoice, RunMode, best_mode
from splitft.schedule.problem import CutProblem, feasible
from splitft.schedule.workload import Fleet
from splitft.specs.schedule import CONTROLLERS
from splitft.specs.server_stepping import SERVER_STEPPING
from splitft.specs.training import AUTO, ServerAdapters

FORMERLY = "makespan"
"""The controller that `method: splitft` gave to a described fleet before `quickest`."""


def settle(config: RunConfig, fleet: Fleet) -> tuple[RunConfig, Fleet, str]:
    """Return the configuration and the fleet with the chosen way, and the reason; "" if it was given."""
    if config.split.server_adapters != AUTO:
        return config, fleet, ""
    chosen = mode_of(config, fleet)
    way: ServerAdapters = "per-client" if chosen is None else chosen.mode.adapters
    costs = replace(fleet.costs, server=replace(fleet.costs.server, adapters=way))
    reason = f"the server's factors step {way}" if chosen is not None else ""
    return with_way(config, way), replace(fleet, costs=costs), reason


def mode_of(config: RunConfig, fleet: Fleet, divisions: Sequence[tuple[int, int]] = ()) -> ModeChoice | None:
    """Return the quickest mode of a run; None if there is nothing to compare.

    `divisions` are other numbers of micro-batches, and of those in flight, than the configuration's.
    """
    if not CONTROLLERS[config.schedule.controller].chooses_mode:
        return None
    ways = ways_of(config)
    division = config.training.micro_batches, config.training.in_flight
    try:
        return best_mode(ways, [division, *divisions], lambda mode: problem_in(config, fleet, mode))
    except ScheduleError:  # the first decision says what is lacking
        return None


def ways_of(config: RunConfig) -> list[ServerAdapters]:
    """Return the ways to step that fit the configuration, in the order of preference; one if it is given."""
    if config.split.server_adapters != AUTO:
        return [config.split.way]
    return [way for way in SERVER_STEPPING if not conflicts(with_way(config, way))]


def problem_in(config: RunConfig, fleet: Fleet, mode: RunMode) -> CutProblem:
    """Return the problem of the first round in a mode, for the clients that fit at some cut."""
    fleet = replace(fleet, costs=mode.applied(fleet.costs))
    names = tuple(client.name for client in fleet.clients)
    cuts = dict(zip(names, config.cuts or (1,) * len(names), strict=True))
    schedule = CutSchedule(with_way(config, mode.adapters), fleet, names)
    possible = feasible(schedule.problem(1, cuts))
    schedule.names = tuple(name for name in names if possible[name].cuts)
    if not schedule.names:
        raise ScheduleError("; ".join(found.lack for found in possible.values()))
    return schedule.problem(1, {name: cuts[name] for name in schedule.names})


def with_way(config: RunConfig, way: ServerAdapters) -> RunConfig:
    """Return the configuration with this way to step the server's factors."""
    return config.model_copy(update={"split": config.split.model_copy(update={"server_adapters": way})})


def as_begun(config: RunConfig, folder: Path, resume: bool) -> RunConfig:
    """Return the configuration with what it leaves to `auto` as the run in this folder has it.

    A run of a described fleet that was begun with the controller of its time goes on with it.
    """
    written = folder / "config.yaml"
    if not resume or config.split.server_adapters != AUTO or not written.is_file():
        return config
    begun = load(written)
    changes: Mapping[str, object] = {"split": with_way(config, begun.split.way).split}
    if begun.schedule.controller == FORMERLY and CONTROLLERS[config.schedule.controller].chooses_mode:
        schedule = config.schedule.model_copy(update={"controller": FORMERLY})
        changes = {**changes, "schedule": schedule}
    return config.model_copy(update=dict(changes))


def settled_alone(config: RunConfig) -> RunConfig:
    """Return the configuration of a party that knows no fleet: one copy for each client."""
    return with_way(config, config.split.way)
