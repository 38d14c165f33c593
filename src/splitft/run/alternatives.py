"""The methods of the field on a run's own clients, by the simulated clock: what a plan is compared with.

    RunConfig, Fleet --alternatives--> chosen 12.1 s | fedlora 30 s | splitlora 14 s, cut 2 for all | ...

All have the configuration's codecs, side of the labels, ranks and batches; they differ in cuts and in how the
server's factors step. A method with one cut for all has its quickest one, with hindsight.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from splitft.config import RunConfig
from splitft.errors import ScheduleError
from splitft.run.run_mode import mode_of, problem_in
from splitft.schedule.border import ONE_CUT
from splitft.schedule.controllers import choose
from splitft.schedule.design_space import ModeChoice, RunMode
from splitft.schedule.problem import CutProblem, RoundSimulator, feasible
from splitft.schedule.simulated_search import quickest_of
from splitft.schedule.workload import Fleet
from splitft.specs.training import ServerAdapters

DIVISIONS = ((1, 1), (2, 2), (4, 2), (4, 4), (8, 4))
"""Micro-batches of a step, and those in flight, that a plan tries; they change no result."""
FIXED_CUT = 2
"""The cut of `splitft-fixed`."""


@dataclass(frozen=True)
class Alternative:
    """One method on the run's clients."""

    method: str
    adapters: ServerAdapters
    """How the server's factors step."""
    cuts: Mapping[str, int]
    """k of each client; empty if the method does not fit."""
    round_seconds: float | None
    """Seconds of a round on the simulated clock; None if the method does not fit."""
    lack: str = ""
    """Why it does not fit."""


def alternatives(config: RunConfig, fleet: Fleet) -> tuple[Alternative, ...]:
    """Return the choice of `quickest` for a run, as `chosen`, and then the methods of the field."""
    chosen = mode_of(_under(config, "quickest"), fleet)
    found = [
        Alternative("chosen", chosen.mode.adapters, chosen.cuts, chosen.round_s)
        if chosen
        else Alternative("chosen", "per-client", {}, None, "no client fits, or the server lacks memory")
    ]
    found += _in_parts(config, fleet, chosen)
    open_config = _under(config, "quickest", max_cut=None)
    division = config.training.micro_batches, config.training.in_flight
    for method, way in {"fedlora": "per-client", **ONE_CUT, "splitft-fixed": "per-client"}.items():
        mode = RunMode(way, *(division if way != "shared-in-turn" else (1, 1)))
        try:
            problem = problem_in(open_config, fleet, mode)
        except ScheduleError as error:
            found.append(Alternative(method, way, {}, None, str(error)))
            continue
        found.append(_with_one_cut(method, way, problem, _clock(problem)))
    return (*found, _makespan(config, fleet, RunMode("per-client", *division)))


def _in_parts(config: RunConfig, fleet: Fleet, chosen: ModeChoice | None) -> list[Alternative]:
    """Return the choice in other micro-batches, if they would be quicker than the configuration's."""
    sequences = max(int(client.workload.sequences) for client in fleet.clients)
    divisions = [one for one in DIVISIONS if one[0] <= sequences]
    better = mode_of(_under(config, "quickest"), fleet, divisions) if chosen else None
    if better is None or chosen is None or better.mode == chosen.mode:
        return []
    mode = better.mode
    label = f"training.micro_batches={mode.micro_batches} training.in_flight={mode.in_flight}"
    return [Alternative(label, mode.adapters, better.cuts, better.round_s)]


def _with_one_cut(
    method: str, way: ServerAdapters, problem: CutProblem, simulate: RoundSimulator
) -> Alternative:
    """Return a method with its quickest cut for all."""
    L = problem.clients[0].options[-1].cut
    mine = {"fedlora": {L}, "splitft-fixed": {FIXED_CUT}}.get(method, set(range(1, L)))
    allowed = {name: mine & set(one.cuts) for name, one in feasible(problem).items()}
    lacking = [name for name, cuts in allowed.items() if not cuts]
    if lacking:
        return Alternative(method, way, {}, None, f"{', '.join(lacking)}: no such cut fits")
    common = [dict.fromkeys(allowed, cut) for cut in sorted(set.intersection(*allowed.values()))]
    fitting = [cuts for cuts in common if problem.server_bytes(cuts) <= problem.server_memory_bytes]
    best = quickest_of(fitting, simulate)
    if best is None:
        return Alternative(method, way, {}, None, "no cut fits all clients, or the server lacks memory")
    return Alternative(method, way, *best)


def _makespan(config: RunConfig, fleet: Fleet, mode: RunMode) -> Alternative:
    """Return the choice of `makespan`, which splits every client."""
    try:
        problem = problem_in(_under(config, "makespan"), fleet, mode)
        cuts = choose("makespan", problem).cuts
        return Alternative("makespan", "per-client", cuts, _clock(problem)(cuts))
    except ScheduleError as error:
        return Alternative("makespan", "per-client", {}, None, str(error))


def _clock(problem: CutProblem) -> RoundSimulator:
    if problem.simulate is None:
        raise ScheduleError("methods are compared on the simulated clock, and the problem has none")
    return problem.simulate


def _under(config: RunConfig, controller: str, **changes: object) -> RunConfig:
    schedule = config.schedule.model_copy(update={"controller": controller, **changes})
    return config.model_copy(update={"schedule": schedule})
