"""Measure the gain of a cut for each client in long rounds.

    one training run a text and seed --losses--+
    cuts of every way --clock--> seconds ------+--> time to the target, by the speed of the server

`adaptive_cuts` has rounds of 2 steps, in which the exchange of adapters takes a large part, and misses its
goals. Its map predicts that longer rounds meet them with a server of a few laptops; here such rounds are
trained. Ranks are equal, so one training run gives the losses for all ways to choose cuts (see there). Their
times are simulated over all rounds.

Losses fall fast, so the target may be reached in the first round. The second table is the time to the end of
the last round, which includes changes of cuts.

Goals: those of `adaptive_cuts`, at each speed of the server.
"""

from __future__ import annotations

from pathlib import Path

from measuring import REPOSITORY, Parts, Spread, begin, options, section, table
from replaying import (
    ALPHAS,
    DROP,
    FLEETS,
    GOALS,
    LINKS,
    SEEDS,
    WAYS,
    against_makespan,
    cells,
    configuration,
    contenders,
    counted,
    losses_by_client,
    said,
    target_of,
    to_target,
    trained,
)

ROUNDS, STEPS = 2, 20
CAPACITIES = (2, 4, 6, 8, 16)
"""The server's speed as a multiple of a laptop's."""


def verdicts(judged: dict[tuple[str, int, str], list[Spread]], capacities: tuple[int, ...]) -> dict[str, str]:
    """Return the goals by the server's speed; `judged` has one ratio for each alpha by fleet, speed and
    way."""
    lines = {}
    for capacity in capacities:
        found = []
        for name in ("best common cut", "cut 2"):
            medians = [one.median for one in judged["strongly unequal", capacity, name]]
            found.append(f"{GOALS[name]} times faster than {name}: "
                         f"{said(min(medians), max(medians), GOALS[name])}")  # fmt: skip
        slowest = 1 / min(one.low for one in judged["equal", capacity, "best common cut"])
        verdict = "met" if slowest <= GOALS["equal"] else "missed"
        found.append(f"equal fleet, never slower than {GOALS['equal']} times: {slowest:.3f}, {verdict}")
        lines[f"goals, server of {capacity} laptops"] = "; ".join(found)
    return lines


def main() -> None:
    parser = options(__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=REPOSITORY.parent / "shared/data/e2e/devset.csv")
    parser.add_argument("--work", type=Path, default=Path("runs/long-rounds"), help="folder of finished runs")
    parser.add_argument("--alphas", type=float, nargs="+", default=ALPHAS)
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    chosen = parser.parse_args()
    begin(chosen.seed, chosen.threads)
    rounds, steps, capacities = ROUNDS, STEPS, CAPACITIES
    if chosen.quick:
        rounds, steps, capacities = 1, 1, (4,)
        chosen.alphas, chosen.seeds = (0.5,), (0,)
    runs = Parts(chosen.work)
    summaries = {
        (alpha, seed): trained(configuration(chosen.data, seed, alpha, rounds=rounds, steps=steps), runs)
        for alpha in chosen.alphas
        for seed in chosen.seeds
    }
    rows, until_end, judged = [], [], {}
    for fleet_name in FLEETS:
        for capacity in capacities:
            for alpha in chosen.alphas:
                times, ends = [], []
                for seed in chosen.seeds:
                    losses = losses_by_client(summaries[alpha, seed])
                    clocks = contenders(chosen.data, seed, alpha, fleet_name, losses, capacity, rounds, steps)
                    times.append(to_target(summaries[alpha, seed], clocks))
                    ends.append({name.partition(" (")[0]: clock[-1] for name, clock in clocks.items()})
                for name, ratio in against_makespan(times).items():
                    judged.setdefault((fleet_name, capacity, name), []).append(ratio)
                rows.append((fleet_name, capacity, alpha, *cells(times)))
                until_end.append((fleet_name, capacity, alpha, *cells(ends)))
    losses = [
        (alpha, seed, *(f"{loss:.4f}" for loss in summary["eval_loss"]))
        for (alpha, seed), summary in summaries.items()
    ]
    met = {_round_of(summary["eval_loss"]) for summary in summaries.values()}
    print(
        section(
            "Long rounds",
            {
                "config": "smollm2-135m, bfloat16, 10 clients, length-Dirichlet, rank 16, "
                f"{rounds} rounds of {steps} steps of 4 sequences, lr 1e-3; links {LINKS}",
                "fleets": "; ".join(f"{name}: {counted(devices)}" for name, devices in FLEETS.items()),
                "text": f"E2E ({chosen.data.name})" if chosen.data.is_file() else "python-docs (embedded)",
                "seeds": ", ".join(map(str, chosen.seeds)),
                "spread": "median over seeds of ratios to makespan on the same text (middle half)",
                "target": f"{DROP:.0%} of the way from the first held-out loss to the last",
                "target reached in round": ", ".join(map(str, sorted(met))),
                **verdicts(judged, capacities),
            },
            "Simulated seconds to the target (mean), and ratio to `makespan`, by the server's speed "
            "in laptops:",
            table(("fleet", "server", "alpha", *WAYS), rows),
            f"The same to the end of round {rounds}:",
            table(("fleet", "server", "alpha", *WAYS), until_end),
            "Held-out loss before training and after each round, the same for all cuts:",
            table(("alpha", "seed", *(f"round {number}" for number in range(rounds + 1))), losses),
        )
    )


def _round_of(losses: list[float]) -> int:
    """Return the round in which the target is reached."""
    return next(number for number, loss in enumerate(losses) if loss <= target_of(losses))


if __name__ == "__main__":
    main()
