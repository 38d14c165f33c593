"""Find where splitting pays: every method on the simulated clock, over fleets, links and steps a round.

    model's costs, work of a step  x  fleets of presets  x  links  x  steps a round
        --border--> a MapPlace each: every method's seconds a round, or what it lacks

    fedlora                            cut L for all: needs memory for the whole model
    splitfed-v1, splitfed-v2, splitlora   the quickest cut for all, with hindsight
    splitft                            the quickest point of the whole space (`design_space`): a cut for each
                                       client, L included, and the quickest of the methods above

Methods are compared at equal steps, so at equal examples; what a step is worth in quality is not compared.
All have the same codecs, side of the labels, batches and server. Pure arithmetic: nothing is trained.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import product

from splitft.errors import ScheduleError
from splitft.schedule.cost import round_seconds
from splitft.schedule.design_space import best_in_space
from splitft.schedule.memory import client_memory
from splitft.schedule.presets import DEVICES, device_preset, link_preset
from splitft.schedule.problem import CutProblem, feasible, problem_of
from splitft.schedule.simulated_search import SimulatedRounds, quickest_of
from splitft.schedule.workload import ClientProfile, SharedCosts, Workload
from splitft.specs.training import ServerAdapters

ONE_CUT: Mapping[str, ServerAdapters] = {
    "splitfed-v1": "per-client", "splitlora": "shared", "splitfed-v2": "shared-in-turn",
}  # fmt: skip
"""Methods with one cut for all, with their way to step the server's factors."""
TIE = 0.01
"""Times closer than this are called equal."""


@dataclass(frozen=True)
class Terrain:
    """The axes of the map."""

    fleets: Mapping[str, Sequence[str]]
    """Names of device presets, one for each client, by the name of the fleet."""
    links: Sequence[str] = ("lte", "dsl", "fibre", "lan")
    """Names of link presets, each for all clients."""
    steps: Sequence[int] = (3, 30, 300)
    """Local steps of a round."""
    context_tokens: int = 256
    """Tokens of a sequence, which attention sees."""
    launch_overhead: float = 0.0
    """Multiple of the estimated time for launching kernels."""


MACHINES = tuple(DEVICES)
FLEETS = {**{f"4 x {name}": (name,) * 4 for name in MACHINES}, "one of each": MACHINES}
"""The fleets of the map by default."""


@dataclass(frozen=True)
class MethodTime:
    """One method in one place of the map."""

    seconds: float | None
    """Seconds of a round; None if it fits at no cut."""
    cuts: tuple[int, ...] = ()
    """The clients' cuts."""


@dataclass(frozen=True)
class MapPlace:
    """One place of the map."""

    fleet: str
    link: str
    steps: int
    methods: Mapping[str, MethodTime] = field(default_factory=dict)
    """Every method, by name."""

    def seconds(self, *names: str) -> float | None:
        """Return the least seconds of these methods, or of all; None if none of them fits."""
        chosen = [self.methods[name].seconds for name in names or self.methods]
        return min((one for one in chosen if one is not None), default=None)


def border(costs: SharedCosts, work: Workload, terrain: Terrain) -> tuple[MapPlace, ...]:
    """Return every place of the map: `costs` has the model and the server, `work` a client's batches."""
    places = []
    for fleet, steps, link in product(terrain.fleets, terrain.steps, terrain.links):
        clients = _clients(costs, replace(work, steps=steps), fleet, link, terrain)
        places.append(MapPlace(fleet, link, steps, _methods(costs, clients)))
    return tuple(places)


def _clients(
    costs: SharedCosts, work: Workload, fleet: str, link: str, terrain: Terrain
) -> list[ClientProfile]:
    context, launches = terrain.context_tokens, terrain.launch_overhead
    return [
        ClientProfile(
            f"client-{number}", device_preset(name, costs.sizes, context, launches), link_preset(link), work
        )
        for number, name in enumerate(terrain.fleets[fleet], 1)
    ]


def _methods(costs: SharedCosts, clients: Sequence[ClientProfile]) -> dict[str, MethodTime]:
    """Return every method's quickest round with these clients."""
    L = costs.sizes.blocks
    found = {"fedlora": _whole(costs, clients)}
    problem = problem_of(costs, clients, [1] * len(clients))
    allowed = [set(one.cuts) for one in feasible(problem).values()]
    common = [{one.name: cut for one in clients} for cut in sorted(set.intersection(*allowed))]
    common = [cuts for cuts in common if problem.server_bytes(cuts) <= problem.server_memory_bytes]
    for name, way in ONE_CUT.items():
        server = replace(costs.server, adapters=way)
        best = quickest_of(common, _Clock(replace(costs, server=server), clients))
        found[name] = MethodTime(best[1], tuple(best[0].values())) if best else MethodTime(None)
    with_whole = replace(problem, clients=tuple(replace(one, max_cut=L) for one in problem.clients))
    chosen = [*found.values(), _in_space(costs, clients, with_whole)]
    fitting = [one for one in chosen if one.seconds is not None]
    found["splitft"] = min(fitting, key=lambda one: one.seconds or 0.0, default=MethodTime(None))
    return found


def _whole(costs: SharedCosts, clients: Sequence[ClientProfile]) -> MethodTime:
    """Return federated LoRA: nobody waits for the server, so a round is that of the slowest client."""
    L = costs.sizes.blocks
    if any(client_memory(costs, one, L).total > one.device.memory_bytes for one in clients):
        return MethodTime(None)
    return MethodTime(max(sum(round_seconds(costs, one, L).values()) for one in clients), (L,) * len(clients))


def _in_space(costs: SharedCosts, clients: Sequence[ClientProfile], problem: CutProblem) -> MethodTime:
    """Return the quickest cuts from 1 to L, one for each client, with a copy of the factors for each."""
    if any(not found.cuts for found in feasible(problem).values()):
        return MethodTime(None)
    with contextlib.suppress(ScheduleError):  # the server lacks memory
        cuts, seconds = best_in_space(problem, _Clock(costs, clients))
        return MethodTime(seconds, tuple(cuts.values()))
    return MethodTime(None)


class _Clock(SimulatedRounds):
    """The simulated clock, brief in every case: a few steps, of which the others are equal."""

    def __call__(self, cuts: Mapping[str, int], brief: bool = True) -> float:
        """Return the seconds of a round with these cuts."""
        return super().__call__(cuts, brief=True)


def crossing_steps(whole: Sequence[tuple[int, float]], split: Sequence[tuple[int, float]]) -> float | None:
    """Return the steps a round from which the whole model is quicker: both are lines through two points.

    0.0 if it always is, None if it never is.
    """
    (a, first), (b, last) = whole[0], whole[-1]
    (_, first_split), (_, last_split) = split[0], split[-1]
    whole_step, split_step = (last - first) / (b - a), (last_split - first_split) / (b - a)
    behind = (first - a * whole_step) - (first_split - a * split_step)  # of a round without steps
    if whole_step >= split_step:
        return 0.0 if behind <= 0 and last <= last_split else None
    return max(0.0, behind / (split_step - whole_step))
