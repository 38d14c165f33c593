"""Measure how much of the text the server can read, by cut, codec and noise, and what hiding it costs.

    real steps on E2E text, recorded byte by byte -> attacks trained on WikiText-2 -> tokens read
    held-out loss with the noise on               -> rise of perplexity

The attacker is a server that follows the protocol, has the public model and the global adapters, and knows
every setting. `--known FILE` writes the strongest attacks' figures as the table `known.json`. Goals: matching
reads at least 95 % without noise at cuts up to 4 (else it is too weak to judge a defence by); and a defence
that brings all attacks under 30 % at the default cut for at most 5 % perplexity (here before training;
`defences.py` measures it after training).

Each setting is a part, kept as JSON in the work folder: a stopped benchmark continues with the missing parts,
and `--parts N` makes at most N more.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from drawing import lines
from measuring import REPOSITORY, Parts, begin, environment, options, section
from splitft.audit.attacks import ATTACKS, Effort
from splitft.audit.audit_page import leak_table
from splitft.audit.auditor import FULL, Depth, audit
from splitft.audit.findings import AuditResult, table_rows
from splitft.codecs import CODECS
from splitft.config import RunConfig, from_mapping
from splitft.privacy.known_leakage import Setting

CUTS = (1, 2, 4, 8, 15, 29)
DEFAULT_CUT = 2
NOISES = (0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 4.0)
DEEP_CUT, DEEP_NOISES = 15, (0.1, 0.5, 1.0)
OTHER_CODECS = ("int8", "int4")
GOAL_RECOVERED, GOAL_HIDDEN, GOAL_COST = 0.95, 0.30, 0.05

EFFORT = Effort(screened=(64, 256, 2048))
"""Bounded, so that deep cuts take minutes; `splitft audit --full` tries the whole vocabulary."""
BY_CUT: Depth = replace(
    FULL, texts=3, tokens=64, public=16_384, inverter_steps=80, attacks=tuple(ATTACKS), effort=EFFORT
)
"""Every attack, without noise."""
BY_NOISE: Depth = replace(BY_CUT, attacks=("nearest", "linear", "matching", "prediction", "head gradient"))
"""The strongest attacks of each kind, under noise and codecs."""

Part = Mapping[str, Any]
"""One setting: rows of the table, entries of the known table, seconds."""


def plain(cut: int) -> Setting:
    return Setting(cut, "bf16", 0.0, 0.0)


def noisy(noise: float, cut: int = DEFAULT_CUT) -> Setting:
    return Setting(cut, "bf16", noise, noise)


def configuration(data: Path, seed: int) -> dict[str, Any]:
    """Return the configuration on E2E's pairs, or on the embedded text without them."""
    text = {"source": str(data), "prompt": "mr", "completion": "ref"} if data.is_file() else {}
    return {
        "model": {"dtype": "bfloat16"},
        "data": {**text, "max_tokens": 64},
        "clients": {"count": 1, "cuts": DEFAULT_CUT},
        "seed": seed,
    }


def part(config: RunConfig, depth: Depth, public: str | None, setting: Setting) -> Part:
    """Record and attack one setting."""
    done = audit(config, depth, public, [setting])
    return {
        "rows": table_rows(done.results),
        "known": known_entries(done.results),
        "public": done.public,
        "seconds": done.seconds,
    }


def known_entries(results: Sequence[AuditResult]) -> list[dict[str, Any]]:
    """Return the figures of the strongest attack of each way as entries of `known.json`."""
    entries = []
    for result in results:
        setting = result.setting
        for worst in (result.worst("hidden"), result.worst("labels")):
            if worst is not None:
                entries.append({
                    "cut": setting.cut,
                    "codec": setting.codec,
                    "noise": setting.noise if worst.way == "hidden" else setting.gradient_noise,
                    "way": worst.way,
                    "attack": worst.attack,
                    "recovered": round(worst.recovery.tokens, 4),
                    "tokens": worst.recovery.count,
                    "perplexity_cost": round(result.perplexity_cost, 4),
                })  # fmt: skip
    return entries


def strongest(one: Part, attack: str | None = None) -> float:
    """Return the share of tokens read in a setting, by one attack or the strongest."""
    found: float = max(row["tokens"] for row in one["rows"] if attack in (None, row["attack"]))
    return found


def goals(found: Mapping[Setting, Part]) -> dict[str, str]:
    """Say whether both goals are met."""
    matched = {
        setting.cut: strongest(one, "matching")
        for setting, one in found.items()
        if setting == plain(setting.cut) and setting.cut <= 4
    }
    strong = all(share >= GOAL_RECOVERED for share in matched.values())
    cheap = {
        setting: strongest(one)
        for setting, one in found.items()
        if setting.cut == DEFAULT_CUT and one["rows"][0]["perplexity_cost"] <= GOAL_COST
    }
    hiding = [setting for setting, share in cheap.items() if share < GOAL_HIDDEN]
    least = min(cheap, key=lambda setting: cheap[setting])
    result = (
        "met: " + ", ".join(f"{one.codec} noise {one.noise:g}" for one in hiding)
        if hiding
        else f"missed: no noise or codec; within that cost the strongest attack still reads "
        f"{cheap[least]:.0%} ({least.codec}, noise {least.noise:g})"
    )
    shares = ", ".join(f"{share:.1%} at cut {cut}" for cut, share in matched.items())
    return {
        f"goal, matching reads at least {GOAL_RECOVERED:.0%} at cuts up to 4": (
            f"{shares}: {'met' if strong else 'missed'}"
        ),
        f"goal, all attacks under {GOAL_HIDDEN:.0%} at cut {DEFAULT_CUT} for at most {GOAL_COST:.0%}": result,
    }


def draw(path: Path, found: Mapping[Setting, Part]) -> None:
    """Draw tokens read by cut without noise, one line for each attack."""
    series: dict[str, list[tuple[float, float]]] = {}
    for setting, one in found.items():
        if setting != plain(setting.cut):
            continue
        for row in one["rows"]:
            if row["way"] == "hidden" or row["attack"] in ("head gradient", "prediction"):
                series.setdefault(row["attack"], []).append((setting.cut, 100 * row["tokens"]))
    lines(path, "What the server reads, without noise", "cut", "tokens read, %", series)


def wanted(quick: bool) -> tuple[Sequence[Setting], Sequence[Setting], Depth, Depth]:
    """Return the settings for all attacks and for the strongest, and the depth of each."""
    if quick:
        small = {"texts": 2, "tokens": 48, "public": 16_384, "inverter_steps": 20, "effort": Effort()}
        depth = replace(BY_NOISE, **small)
        return [plain(cut) for cut in (1, 2, 4)], [noisy(noise) for noise in (0.1, 1.0)], depth, depth
    settings = [noisy(noise) for noise in NOISES]
    settings += [Setting(DEFAULT_CUT, codec, 0.0, 0.0) for codec in OTHER_CODECS if codec in CODECS]
    settings += [noisy(noise, DEEP_CUT) for noise in DEEP_NOISES]
    return [plain(cut) for cut in CUTS], settings, BY_CUT, BY_NOISE


def main() -> None:
    parser = options(__doc__.splitlines()[0])
    shared = REPOSITORY.parent / "shared/data"
    parser.add_argument("--data", type=Path, default=shared / "e2e/devset.csv", help="text that is attacked")
    parser.add_argument("--public", type=Path, default=shared / "wikitext2/valid.txt", help="attacker's text")
    parser.add_argument("--known", type=Path, help="write the table of known figures to this file")
    parser.add_argument("--plot", type=Path, help="draw recovery by cut to this SVG file")
    parser.add_argument(
        "--work", type=Path, default=Path("runs/privacy-by-cut"), help="folder of finished parts"
    )
    parser.add_argument("--parts", type=int, help="make at most this many missing parts, then stop")
    chosen = parser.parse_args()
    begin(chosen.seed, chosen.threads)
    config = from_mapping(configuration(chosen.data, chosen.seed))
    public = str(chosen.public) if chosen.public.is_file() else None
    first, second, by_cut, by_noise = wanted(chosen.quick)
    found: dict[Setting, Part] = {}
    parts = Parts(chosen.work, chosen.parts)
    for setting in (*first, *second):
        depth = by_cut if setting in first else by_noise
        name = (
            f"{'quick' if chosen.quick else 'full'} seed {chosen.seed} cut {setting.cut} {setting.codec} "
            f"noise {setting.noise:g}"
        )
        found[setting] = parts.of(name, partial(part, config, depth, public, setting))
    data = {"rows": [row for one in found.values() for row in one["rows"]]}
    text = f"E2E ({chosen.data.name})" if chosen.data.is_file() else "python-docs (embedded)"
    source = next(iter(found.values()))["public"]
    source = f"WikiText-2 ({source})" if public else source
    if chosen.known is not None:
        command = f"python benchmarks/privacy_by_cut.py --known FILE{' --quick' if chosen.quick else ''}"
        story = {"model": config.model.name, "command": command, "text": text, "public": source}
        entries = [entry for one in found.values() for entry in one["known"]]
        known = {"models": {config.model.name: entries}, "story": {**story, **environment()}}
        chosen.known.write_text(json.dumps(known, indent=1) + "\n", encoding="utf-8")
    if chosen.plot is not None:
        draw(chosen.plot, found)
    counts = {row["way"]: row["count"] for row in data["rows"]}
    print(
        section(
            "Text recovery by cut, codec and noise",
            {
                "config": f"{config.model.name}, bfloat16, first round, two local steps of batch "
                f"{by_cut.texts} recorded; the same noise on hidden states and on returning gradients",
                "text": f"{text}: {counts['hidden']} tokens attacked in each setting, {counts['labels']} of "
                f"them labelled; the attacker trained on {source}",
                "seed": chosen.seed,
                "spread": "standard error of a share over the attacked tokens",
                "wall time": f"{sum(one['seconds'] for one in found.values()):.0f} s for all parts",
                **goals(found),
            },
            leak_table(data).to_markdown(),
        )
    )


if __name__ == "__main__":
    main()
