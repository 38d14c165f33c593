"""Measure what hostile clients do to the model, by aggregation rule, and what robust rules cost without any.

    10 clients, the last 0, 1 or 3 hostile  --rounds-->  held-out loss of the honest clients

Hostile clients go through whole rounds: `sign flip` returns the negated gradient, so that its own blocks and
the server's climb; `scaling` uploads its factors times 10, so its update times 100; `noise` uploads random
factors of ten times the size of its own; `label noise` trains on random labels. All rules have equal ranks,
the same text, seeds and learning rate.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from aggregation import read_from
from measuring import REPOSITORY, Parts, begin, options, section, table
from splitft.adapters import AdapterState
from splitft.config import from_mapping
from splitft.data.text import Batch
from splitft.errors import SplitftError
from splitft.model.source import silence_transformers
from splitft.protocol import AdapterUpload
from splitft.run.setup import prepare
from splitft.tracking.events import Evaluated
from splitft.training.client import Client

CLIENTS = 10
HOSTILE = (1, 3)
RULES: Mapping[str, Mapping[str, Any]] = {
    "factors, no norm bound": {"rule": "factors", "norm_bound": None},
    "factors": {"rule": "factors"},
    "svd": {"rule": "svd"},
    "median": {"rule": "median"},
    "trimmed-mean": {"rule": "trimmed-mean", "byzantine": 3},
    "krum": {"rule": "krum", "byzantine": 3},
}
"""What stands in the section `aggregate`."""


@dataclass(frozen=True)
class RandomLabels(Batch):
    """A batch whose labels are drawn at random; its tokens are as they were."""

    vocabulary: int = 0

    def targets(self) -> torch.Tensor:
        """Return random token ids for the labelled positions."""
        return torch.randint(self.vocabulary, super().targets().shape)


class Hostile:
    """A simulation in which some clients' uploads are changed."""

    def __init__(self, simulation: Any, change: Callable[[str, AdapterUpload], AdapterUpload]) -> None:
        self._simulation, self._change = simulation, change

    def __getattr__(self, name: str) -> Any:
        return getattr(self._simulation, name)

    def train(self, number: int, participants: Sequence[str], steps: int, listener: Any) -> Any:
        """Train as the simulation does, and change what is uploaded."""
        uploads = self._simulation.train(number, participants, steps, listener)
        return {name: self._change(name, upload) for name, upload in uploads.items()}


def flip_gradients(client: Client) -> None:
    """Let a client return its gradient with the other sign."""
    head = client.head

    def flipped(message: Any) -> Any:
        answer = head(message)
        return answer.model_copy(update={"gradient": -answer.gradient})

    client.head = flipped  # type: ignore[method-assign]


def randomize_labels(client: Client, vocabulary: int) -> None:
    """Let a client train on random labels."""
    stream = client.setup.stream
    batch = stream.batch

    def noisy(step: int) -> Batch:
        one = batch(step)
        return RandomLabels(one.tokens, one.lengths, one.labelled_from, one.numbers, vocabulary)

    stream.batch = noisy  # type: ignore[method-assign]


def changed(upload: AdapterUpload, make: Callable[[torch.Tensor], torch.Tensor]) -> AdapterUpload:
    """Return the upload with every factor changed."""
    adapters = {key: replace(one, A=make(one.A), B=make(one.B)) for key, one in upload.adapters.items()}
    return upload.model_copy(update={"adapters": AdapterState(adapters)})


def scale(factor: torch.Tensor) -> torch.Tensor:
    return 10.0 * factor  # of A and of B, so 100 times the update


def noise(factor: torch.Tensor) -> torch.Tensor:
    return torch.randn_like(factor) * 10 * factor.square().mean().sqrt().clamp_min(1e-3)


ACTS = ("sign flip", "scaling", "noise", "label noise")


def final_loss(config: Mapping[str, Any], act: str | None, count: int) -> float | str:
    """Train with `count` hostile clients; return the held-out loss of the honest, or the name of an error."""
    with silence_transformers():
        setup = prepare(from_mapping(config))
        hostile = setup.clients[len(setup.clients) - count :] if act else []
        names = {client.name for client in hostile}
        for client in hostile:
            if act == "sign flip":
                flip_gradients(client)
            elif act == "label noise":
                randomize_labels(client, setup.model.shape.vocab)
        make = {"scaling": scale, "noise": noise}.get(act or "")

        def change(name: str, upload: AdapterUpload) -> AdapterUpload:
            return changed(upload, make) if make and name in names else upload

        evaluations: list[Evaluated] = []

        def listen(event: Any) -> None:
            if isinstance(event, Evaluated):
                evaluations.append(event)

        try:
            setup.trainer(Hostile(setup.simulation(), change), listen).train(setup.initial())
        except SplitftError as error:
            return type(error).__name__
    honest = [loss for name, loss in evaluations[-1].by_client.items() if name not in names]
    return sum(honest) / len(honest)


def configuration(
    aggregate: Mapping[str, Any], data: Mapping[str, Any], seed: int, rounds: int, steps: int, lr: float
) -> dict[str, Any]:
    """Return the configuration of one run."""
    return {
        "model": {"dtype": "float32"},
        "data": {**data, "max_tokens": 48, "max_examples": 300, "eval_examples": 3},
        "clients": {"count": CLIENTS, "cuts": 4, "shares": {"by": "iid"}},
        "lora": {"rank": 8, "rank_at_cut": None, "alpha": 16},
        "training": {"rounds": rounds, "steps": steps, "batch_size": 2, "lr": lr},
        "aggregate": dict(aggregate),
        "wire": {"in_process": "direct"},
        "seed": seed,
    }


def main() -> None:
    parser = options(__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=REPOSITORY.parent / "shared/data/e2e/devset.csv")
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "splitft-robustness")
    parser.add_argument("--seeds", type=int, default=1, help="number of seeds, from --seed on")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--steps", type=int, default=2, help="local steps a round")
    parser.add_argument("--lr", type=float, default=2e-3)
    chosen = parser.parse_args()
    rounds, steps = (1, 1) if chosen.quick else (chosen.rounds, chosen.steps)
    rules = dict(list(RULES.items())[-1:]) if chosen.quick else RULES
    begin(chosen.seed, chosen.threads)
    data, what = read_from(chosen.data)
    parts, began, rows = Parts(chosen.work), time.perf_counter(), []
    columns = [(None, 0), *((act, count) for act in ACTS for count in HOSTILE)]
    columns = columns[:2] if chosen.quick else columns
    for name, aggregate in rules.items():
        row = [name]
        for act, count in columns:
            found = [
                parts.of(
                    f"{name}, {act} {count}, seed {seed}, {rounds} of {steps}, {chosen.lr:g}",
                    lambda aggregate=aggregate, act=act, count=count, seed=seed: final_loss(
                        configuration(aggregate, data, seed, rounds, steps, chosen.lr), act, count
                    ),
                )
                for seed in range(chosen.seed, chosen.seed + chosen.seeds)
            ]
            row.append(shown(found))
        rows.append(row)
        print(" | ".join(row), flush=True)
    heads = ["rule", *("nobody" if act is None else f"{act}, {count}" for act, count in columns)]
    print(
        section(
            "Robustness",
            {
                "config": f"smollm2-135m, float32, {CLIENTS} clients, cut 4 of 30, {rounds} rounds of "
                f"{steps} steps of 2 sequences, rank 8, lr {chosen.lr:g} (for all rules, not tuned); "
                "norm bound 5 except where it says none",
                "text": f"{what}, iid",
                "seeds": ", ".join(str(chosen.seed + number) for number in range(chosen.seeds)),
                "figures": "mean held-out loss of the honest clients after the last round, in nats a token",
                "took": f"{(time.perf_counter() - began) / 60:.1f} minutes",
            },
            table(heads, rows),
        )
    )


def shown(found: Sequence[float | str]) -> str:
    """Return the mean over seeds with its range, or the error of a run that stopped."""
    stopped = [one for one in found if isinstance(one, str)]
    if stopped:
        return f"stopped ({stopped[0]})"
    losses = [float(one) for one in found]
    spread = f" ({min(losses):.3f} to {max(losses):.3f})" if len(losses) > 1 else ""
    return f"{sum(losses) / len(losses):.3f}{spread}"


if __name__ == "__main__":
    main()
