"""How much of the text can the server read, by cut, codec and noise, and what does hiding it cost?

    real steps on E2E text, recorded byte by byte -> attacks that learnt on WikiText-2 -> tokens read
    held-out loss with the noise on               -> rise of perplexity

The attacker is a server that follows the protocol, holds the public model and the global adapters, and knows
every setting. `--known FILE` writes the strongest attack's figures as the table that `splitft train` reads
its sentence from. Goals: matching reads at least 95 % without noise at cuts up to 4 (else it is too weak to
judge a defence by); and a defence that brings all attacks under 30 % at the default cut for at most 5 %
perplexity.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from measuring import REPOSITORY, begin, environment, options, section, table
from splitft.assemble.auditing import FULL, Depth, audit
from splitft.config import from_mapping
from splitft.privacy.attacks import ATTACKS, Effort
from splitft.privacy.findings import Outcome, Setting
from splitft.privacy.known import to_known
from splitft.tracking.leaks import HEADINGS, leak_rows
from splitft.wire import CODECS

CUTS = (1, 2, 4, 8, 15)
DEFAULT_CUT = 2
NOISES = (0.05, 0.2, 1.0, 4.0)
OTHER_CODECS = ("int8", "int4")
GOAL_RECOVERED, GOAL_HIDDEN, GOAL_COST = 0.95, 0.30, 0.05

EFFORT = Effort(screened=(64, 256, 2048))
"""Bounded, so that deep cuts end in minutes; `splitft audit --full` goes on to the whole vocabulary."""
BY_CUT: Depth = replace(
    FULL, texts=3, tokens=64, public=16_384, inverter_steps=80, attacks=tuple(ATTACKS), effort=EFFORT
)
"""Every attack, without noise."""
BY_NOISE: Depth = replace(BY_CUT, attacks=("nearest", "linear", "matching", "head gradient"))
"""The attacks that matter, under noise and codecs."""


def plain(cut: int) -> Setting:
    return Setting(cut, "bf16", 0.0, 0.0)


def noisy(noise: float) -> Setting:
    return Setting(DEFAULT_CUT, "bf16", noise, noise)


def configuration(data: Path, seed: int) -> dict[str, Any]:
    """E2E's pairs, or the embedded text where they are not at hand."""
    text = {"source": str(data), "prompt": "mr", "completion": "ref"} if data.is_file() else {}
    return {"data": {**text, "max_tokens": 64}, "clients": {"count": 1, "cuts": DEFAULT_CUT}, "seed": seed}


def recovered(outcomes: tuple[Outcome, ...], setting: Setting, attack: str | None = None) -> float:
    """The share of tokens read in a setting, by one attack or the strongest."""
    found = [
        one.recovery.tokens
        for outcome in outcomes
        if outcome.setting == setting
        for one in outcome.findings
        if attack in (None, one.attack)
    ]
    return max(found)


def goals(outcomes: tuple[Outcome, ...]) -> dict[str, str]:
    """Both goals, in words."""
    matched = {
        one.setting.cut: recovered(outcomes, one.setting, "matching")
        for one in outcomes
        if one.setting == plain(one.setting.cut) and one.setting.cut <= 4
    }
    strong = all(share >= GOAL_RECOVERED for share in matched.values())
    hiding = [
        one
        for one in outcomes
        if one.setting.cut == DEFAULT_CUT
        and one.perplexity_cost <= GOAL_COST
        and recovered(outcomes, one.setting) < GOAL_HIDDEN
    ]
    least = min(
        (one for one in outcomes if one.setting.cut == DEFAULT_CUT and one.perplexity_cost <= GOAL_COST),
        key=lambda one: recovered(outcomes, one.setting),
    )
    found = (
        "met: " + ", ".join(f"{one.setting.codec} noise {one.setting.noise:g}" for one in hiding)
        if hiding
        else f"missed: no defence tried does; within that cost the strongest attack still reads "
        f"{recovered(outcomes, least.setting):.0%} ({least.setting.codec}, noise {least.setting.noise:g})"
    )
    shares = ", ".join(f"{share:.1%} at cut {cut}" for cut, share in matched.items())
    return {
        f"goal, matching reads at least {GOAL_RECOVERED:.0%} at cuts up to 4": (
            f"{shares}: {'met' if strong else 'missed'}"
        ),
        f"goal, all attacks under {GOAL_HIDDEN:.0%} at cut {DEFAULT_CUT} for at most {GOAL_COST:.0%}": found,
    }


def main() -> None:
    parser = options(__doc__.splitlines()[0])
    shared = REPOSITORY.parent / "shared/data"
    parser.add_argument("--data", type=Path, default=shared / "e2e/devset.csv", help="text that is attacked")
    parser.add_argument("--public", type=Path, default=shared / "wikitext2/valid.txt", help="attacker's text")
    parser.add_argument("--known", type=Path, help="write the table of known figures to this file")
    chosen = parser.parse_args()
    begin(chosen.seed, chosen.threads)
    config = from_mapping(configuration(chosen.data, chosen.seed))
    public = str(chosen.public) if chosen.public.is_file() else None
    by_cut, by_noise, cuts, noises, codecs = BY_CUT, BY_NOISE, CUTS, NOISES, OTHER_CODECS
    if chosen.quick:
        small = {"texts": 2, "tokens": 48, "public": 16_384, "inverter_steps": 20, "effort": Effort()}
        by_cut, by_noise = replace(BY_NOISE, **small), replace(BY_NOISE, **small)
        cuts, noises, codecs = (1, 2, 4), (0.1, 1.0), ()
    first = audit(config, by_cut, public, [plain(cut) for cut in cuts])
    settings = [noisy(noise) for noise in noises]
    settings += [Setting(DEFAULT_CUT, codec, 0.0, 0.0) for codec in codecs if codec in CODECS]
    second = audit(config, by_noise, public, settings)
    both = replace(first, outcomes=first.outcomes + second.outcomes, seconds=first.seconds + second.seconds)
    told = both.to_json()
    tokens = both.outcomes[0].findings[0].recovery.count
    text = chosen.data.name if chosen.data.is_file() else "python-docs (embedded)"
    if chosen.known is not None:
        command = f"python benchmarks/privacy_by_cut.py --known FILE{' --quick' if chosen.quick else ''}"
        story = {"model": both.model, "command": command, "text": text, "public": both.public}
        known = to_known(both.outcomes, {**story, **environment()})
        chosen.known.write_text(json.dumps(known, indent=1) + "\n", encoding="utf-8")
    print(
        section(
            "What a split gives away, by cut, codec and noise",
            {
                "config": f"{both.model}, first round, two local steps of batch {by_cut.texts} recorded; "
                "noise on hidden states and on returning gradients alike",
                "text": f"{text}: {tokens} tokens attacked in each setting; the attacker learnt on "
                f"{both.public}",
                "seed": chosen.seed,
                "spread": "standard error of a share over the attacked tokens",
                "wall time": f"{both.seconds:.0f} s",
                **goals(both.outcomes),
            },
            table(HEADINGS, leak_rows(told)) + "\n" + "\n".join(f"- {one}" for one in told["verdicts"]),
        )
    )


if __name__ == "__main__":
    main()
