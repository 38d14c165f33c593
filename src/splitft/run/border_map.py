"""The map of a configuration's model: which method is quickest where, and the memory that each part needs.

    RunConfig --fleet_for--> costs of the model, work of a step --schedule.border--> every place of the map
    BorderMap --map_table, memory_lines--> for the terminal (`splitft plan --map`) and for docs

The file's own fleet is not used: its model, batches, codecs, side of the labels and server are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from splitft.config import RunConfig
from splitft.run.plan import fleet_for
from splitft.schedule.border import FLEETS, TIE, MapPlace, Terrain, border
from splitft.schedule.memory import client_memory
from splitft.schedule.presets import DEVICES
from splitft.schedule.workload import Fleet
from splitft.tracking.table import Table

LEGEND = (
    "The quickest method in each place, and how many times quicker than the best of another kind. "
    "`fedlora`: the whole model on every client; `split k`: one cut k for all, as in splitfed-v1, and "
    "splitft chooses the same; `splitft` with its cuts in brackets where they are unequal and quicker. "
    "Splits are compared with fedlora, and where the whole model does not fit every client, with another "
    "split. Times are of a round on the simulated clock, at equal steps: what a step is worth in quality is "
    "not in them."
)


@dataclass(frozen=True)
class BorderMap:
    """The map of one model."""

    model: str
    blocks: int
    memory_gb: Mapping[str, float]
    """Memory of a client with the whole model, and with cut 1."""
    devices_gb: Mapping[str, float]
    """Memory of each machine."""
    places: tuple[MapPlace, ...]

    def to_json(self) -> dict[str, Any]:
        """Return it as plain data."""
        return asdict(self)


def border_map(config: RunConfig, terrain: Terrain | None = None) -> BorderMap:
    """Return the map of a configuration's model. Raises what `splitft plan` raises."""
    fleet = fleet_for(config)
    terrain = terrain or Terrain(
        FLEETS, context_tokens=config.data.max_tokens, launch_overhead=config.schedule.launch_overhead
    )
    return BorderMap(
        model=config.model.name,
        blocks=fleet.costs.sizes.blocks,
        memory_gb=memory_gb(fleet),
        devices_gb={name: preset.memory_bytes / 1e9 for name, preset in DEVICES.items()},
        places=border(fleet.costs, fleet.clients[0].workload, terrain),
    )


def memory_gb(fleet: Fleet) -> dict[str, float]:
    """Return the memory of a client with the whole model, and with one block of it, in GB."""
    costs, client = fleet.costs, fleet.clients[0]
    parts = {"whole": costs.sizes.blocks, "cut 1": 1}
    return {name: client_memory(costs, client, cut).total / 1e9 for name, cut in parts.items()}


def map_table(data: Mapping[str, Any]) -> Table:
    """Return a row for each fleet and number of steps, a column for each link; `data` is a map as JSON."""
    places = data["places"]
    links = list(dict.fromkeys(place["link"] for place in places))
    rows: dict[tuple[str, int], list[str]] = {}
    for place in places:
        cells = rows.setdefault((place["fleet"], place["steps"]), [])
        cells.append(verdict(place, data["blocks"]))
    head = ("clients", "steps\na round", *links)
    return Table(
        head, [(fleet, str(steps), *cells) for (fleet, steps), cells in rows.items()], "lr" + "l" * len(links)
    )


def memory_lines(data: Mapping[str, Any]) -> list[str]:
    """Return what a client needs for the whole model and for one block, and which machines have it."""
    lines = []
    for part, needed in data["memory_gb"].items():
        have = [f"{name} ({gb:g} GB)" for name, gb in data["devices_gb"].items() if gb >= needed]
        lines.append(f"{part}: {needed:.2f} GB of memory; fits on {', '.join(have) or 'none of the presets'}")
    return lines


def verdict(place: Mapping[str, Any], blocks: int) -> str:
    """Return the quickest method of a place, and its lead over the best method of another kind."""
    methods = place["methods"]
    seconds = {name: one["seconds"] for name, one in methods.items() if one["seconds"] is not None}
    if not seconds:
        return "none fits"
    labels = {name: _label(name, methods[name]["cuts"], blocks) for name in seconds}
    others = sorted((value, name) for name, value in seconds.items() if name != "splitft")
    best_s = others[0][0] if others else float("inf")
    if seconds.get("splitft", float("inf")) < (1 - TIE) * best_s:
        first, rivals = "splitft", others
    else:  # a peer is as quick: name it, and of equal ones the first in the table of methods
        first = next(name for name in seconds if name != "splitft" and seconds[name] <= (1 + TIE) * best_s)
        rivals = [(value, name) for value, name in others if name != first]
        if first != "fedlora" and "fedlora" in seconds:
            rivals = [(seconds["fedlora"], "fedlora")]
    if not rivals:
        return f"{labels[first]}, alone"
    return f"{labels[first]}, {rivals[0][0] / seconds[first]:.1f}x {labels[rivals[0][1]]}"


def _label(name: str, cuts: Sequence[int], blocks: int) -> str:
    """Return a method with its cuts, in few characters."""
    if name == "fedlora":
        return name
    if name == "splitft":
        return f"splitft ({', '.join('whole' if cut == blocks else str(cut) for cut in cuts)})"
    return f"{'split' if name == 'splitfed-v1' else name} {cuts[0]}"
