"""Map where splitting pays: model sizes x clients' machines x links x steps a round, on the simulated clock.

    examples/shapes/*/config.json --border_map--> benchmarks/border.json --page--> docs/which-method-when.md

Pure arithmetic, without weights. `--page` writes the page from the stored figures alone; a test checks that
the page is what the figures give, and that the arithmetic still gives the figures.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from typing import Any

from measuring import REPOSITORY, begin, options, table
from splitft.config import RunConfig, from_mapping
from splitft.run.border_map import LEGEND, border_map, map_table, memory_gb, verdict
from splitft.run.plan import fleet_for
from splitft.schedule.border import FLEETS, TIE, Terrain, crossing_steps

SMALL = {"training.checkpoint_blocks": True, "model.quantize": "nf4"}
"""Weights of blocks in 4.5 bits, and activations of blocks computed again."""
SIZES: dict[str, tuple[str, dict[str, Any]]] = {
    "135M": ("smollm2-135m", {}), "1B": ("llama-3.2-1b", {}), "3B": ("llama-3.2-3b", {}),
    "8B": ("llama-3.1-8b", {}), "8B nf4": ("llama-3.1-8b", SMALL), "32B": ("qwen3-32b", {}),
    "32B nf4": ("qwen3-32b", SMALL),
}  # fmt: skip
"""The maps: folder of examples/shapes, and keys that differ."""
FIGURES = REPOSITORY / "benchmarks/border.json"
PAGE = REPOSITORY / "docs/which-method-when.md"
TOKENS, BATCH, RANK = 512, 4, 16
LAUNCHES = 1.0
REFERENCES = (
    ("135M", "4 x laptop", "fibre"), ("135M", "4 x workstation", "lan"), ("1B", "4 x edge-gpu", "lan"),
    ("8B", "4 x laptop", "fibre"), ("8B", "one of each", "lan"),
)  # fmt: skip
"""Places of the table of sensitivity: model, fleet and link, with 30 steps a round."""
CHANGES: dict[str, dict[str, Any]] = {
    "as in the map": {},
    "launch overhead 0": {"schedule.launch_overhead": 0.0},
    "launch overhead 4x": {"schedule.launch_overhead": 4.0},
    "int8 on the wire": {"wire.hidden": "int8", "wire.gradient": "int8"},
    "labels on the server": {"split.labels": "server"},
    "4 micro-batches in flight": {"training.micro_batches": 4, "training.in_flight": 4},
    "server: workstation": {"schedule.server": "workstation"},
}


def configuration(size: str, changes: Mapping[str, Any] | None = None) -> RunConfig:
    """Return the configuration whose model, batches, codecs and server the map has."""
    sections: dict[str, dict[str, Any]] = {
        "model": {"name": str(REPOSITORY / "examples/shapes" / SIZES[size][0]), "dtype": "bfloat16"},
        "data": {"max_tokens": TOKENS},
        "clients": {"count": 4, "cuts": 1},
        "lora": {"rank": RANK, "rank_at_cut": None},
        "training": {"batch_size": BATCH, "steps": 30},
        "schedule": {"launch_overhead": LAUNCHES},
    }
    for key, value in {**SIZES[size][1], **(changes or {})}.items():
        section, _, name = key.partition(".")
        sections.setdefault(section, {})[name] = value
    return from_mapping(sections)


def sensitivity(size: str, fleet: str, link: str) -> dict[str, Any]:
    """Return one place under every change, as JSON."""
    found = {}
    for name, changes in CHANGES.items():
        config = configuration(size, changes)
        terrain = Terrain({fleet: FLEETS[fleet]}, (link,), (30,), TOKENS, config.schedule.launch_overhead)
        data = border_map(config, terrain).to_json()
        found[name] = {"place": data["places"][0], "blocks": data["blocks"]}
    many = {f"{fleet}, 8 times": FLEETS[fleet] * 8}
    data = border_map(configuration(size), Terrain(many, (link,), (30,), TOKENS, LAUNCHES)).to_json()
    found["8 times as many clients"] = {"place": data["places"][0], "blocks": data["blocks"]}
    return found


def memories(size: str) -> dict[str, dict[str, float]]:
    """Return the memory of a client by the way in which weights and activations are held, in GB."""
    ways: dict[str, dict[str, Any]] = {
        "bf16": {},
        "bf16, blocks computed again": {"training.checkpoint_blocks": True},
        "nf4, blocks computed again": SMALL,
    }
    return {way: memory_gb(fleet_for(configuration(size, changes))) for way, changes in ways.items()}


def figures(sizes: tuple[str, ...]) -> dict[str, Any]:
    """Return all figures of the page."""
    maps = {}
    for size in sizes:
        maps[size] = border_map(configuration(size)).to_json() | {"model": SIZES[size][0]}
        print(f"{size}: {len(maps[size]['places'])} places", flush=True)
    return rounded({
        "maps": maps,
        "memory": {size: memories(size) for size in sizes if not SIZES[size][1]},
        "sensitivity": [[*where, sensitivity(*where)] for where in REFERENCES if where[0] in sizes],
    })  # fmt: skip


def rounded(value: Any) -> Any:
    """Return plain data with numbers of five digits."""
    if isinstance(value, Mapping):
        return {key: rounded(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(one) for one in value]
    return float(f"{value:.5g}") if isinstance(value, float) else value


# --------------------------------------------------------------------------------------------------


def crossings(data: Mapping[str, Any]) -> str:
    """Return from how many steps a round on fedlora is quicker than the best one cut, where both fit."""
    rows = []
    for size, one in data["maps"].items():
        for fleet in dict.fromkeys(place["fleet"] for place in one["places"]):
            cells = []
            for link in dict.fromkeys(place["link"] for place in one["places"]):
                line = [place for place in one["places"] if (place["fleet"], place["link"]) == (fleet, link)]
                whole, split = (
                    [(place["steps"], place["methods"][name]["seconds"]) for place in line]
                    for name in ("fedlora", "splitfed-v1")
                )
                cells.append(_crossing(whole, split))
            if set(cells) != {"split only"} and set(cells) != {"none fits"}:
                rows.append((size, fleet, *cells))
    return table(("model", "clients", "lte", "dsl", "fibre", "lan"), rows)


def _crossing(whole: list[tuple[int, float | None]], split: list[tuple[int, float | None]]) -> str:
    if whole[0][1] is None:
        return "none fits" if split[0][1] is None else "split only"
    if split[0][1] is None:
        return "fedlora only"
    steps = crossing_steps(whole, split)  # type: ignore[arg-type]
    if steps is None:
        return "split always"
    return "fedlora always" if steps <= 1 else f"fedlora from {math.ceil(steps)}"


def memory_table(data: Mapping[str, Any]) -> str:
    """Return the memory of the whole model and of cut 1, and the smallest preset that has it."""
    gb = next(iter(data["maps"].values()))["devices_gb"]
    rows = []
    for size, ways in data["memory"].items():
        for way, needed in ways.items():
            cells = []
            for part in ("whole", "cut 1"):
                fitting = sorted((have, name) for name, have in gb.items() if have >= needed[part])
                cells.append(f"{needed[part]:.1f} GB: {fitting[0][1] if fitting else 'no preset'}")
            rows.append((size, way, *cells))
    return table(("model", "weights and activations", "whole model (fedlora)", "cut 1"), rows)


def short(data: Mapping[str, Any]) -> str:
    """Return the figures in sentences."""
    lines = []
    for size, one in data["maps"].items():
        whole, split = one["memory_gb"]["whole"], one["memory_gb"]["cut 1"]
        kinds = [verdict(place, one["blocks"]).split(" ", 1)[0].rstrip(",") for place in one["places"]]
        count = {
            kind: kinds.count(kind) for kind in ("fedlora", "split", "splitlora", "splitfed-v2", "splitft")
        }
        said = ", ".join(f"{kind} in {times}" for kind, times in count.items() if times)
        none = f"; none fits in {kinds.count('none')}" if "none" in kinds else ""
        lines.append(
            f"- **{size}** ({one['model']}): the whole model takes {whole:.1f} GB on a client, cut 1 "
            f"{split:.1f} GB. Quickest of {len(kinds)} places: {said or 'nothing'}{none}."
        )
    leads = [lead for one in data["maps"].values() for place in one["places"] if (lead := _own_lead(place))]
    ahead = [lead for lead in leads if 1 + TIE < lead < math.inf]
    most, alone = max(ahead, default=1.0), leads.count(math.inf)
    lines.append(
        "- **Unequal cuts** (splitft) are quicker than one cut for all and than whole models in "
        f"{len(ahead)} of the {len(leads)} places where any method fits, by {most:.2f} times at most; in "
        f"{alone} others nothing else fits client and server. Elsewhere splitft is as quick as the quickest "
        "of them, whose choice it makes."
    )
    return "\n".join(lines)


def _own_lead(place: Mapping[str, Any]) -> float | None:
    """Return how many times quicker splitft is than the best other method; None if nothing fits."""
    seconds = {name: one["seconds"] for name, one in place["methods"].items() if one["seconds"] is not None}
    own_s = seconds.pop("splitft", None)
    return min(seconds.values(), default=math.inf) / own_s if own_s else None


def sensitivity_table(data: Mapping[str, Any]) -> str:
    """Return what moves the border: a row for each change, a column for each place."""
    places = data["sensitivity"]
    head = ("change", *(f"{size}, {fleet}, {link}" for size, fleet, link, _ in places))
    rows = [
        (change, *(verdict(found[change]["place"], found[change]["blocks"]) for *_, found in places))
        for change in places[0][3]
    ]
    return table(head, rows)


def blocks_of(data: Mapping[str, Any]) -> dict[str, str]:
    """Return the generated parts of the page, by the name of their marker."""
    maps = "\n\n".join(
        f"### {size} ({one['model']})\n\n{map_table(one).to_markdown()}" for size, one in data["maps"].items()
    )
    setting = (
        f"Clients send bf16, keep the labels, and train LoRA of rank {RANK} on attention with batches of "
        f"{BATCH} x {TOKENS} tokens; the server is one A100 (`server-gpu`) for all, and launches count "
        f"{LAUNCHES:g} times their estimate. {LEGEND}"
    )
    return {
        "short": short(data), "memory": memory_table(data), "crossings": crossings(data), "setting": setting,
        "maps": maps, "sensitivity": sensitivity_table(data),
    }  # fmt: skip


def page(text: str, data: Mapping[str, Any]) -> str:
    """Return the page with the parts between its markers replaced."""
    for name, block in blocks_of(data).items():
        pattern = re.compile(rf"(<!-- {name} -->\n).*?(<!-- end -->)", re.DOTALL)
        text, times = pattern.subn(lambda found, block=block: f"{found[1]}{block}\n{found[2]}", text)
        assert times == 1, f"the page needs one marker {name}"
    return text


def main() -> None:
    parser = options(__doc__.splitlines()[0])
    parser.add_argument("--page", action="store_true", help="write the page from the stored figures")
    chosen = parser.parse_args()
    begin(chosen.seed, chosen.threads)
    if chosen.quick:
        data = figures(("135M",))
        print(map_table(data["maps"]["135M"]).to_markdown())
        return
    if not chosen.page:
        FIGURES.write_text(json.dumps(figures(tuple(SIZES))) + "\n", encoding="utf-8")
    data = json.loads(FIGURES.read_text(encoding="utf-8"))
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8"), data), encoding="utf-8")
    print(f"{FIGURES} and {PAGE}" if not chosen.page else PAGE)


if __name__ == "__main__":
    main()
