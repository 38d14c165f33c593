"""Facts about each way in which the server's factors step (`split.server_adapters`). No torch here.

    way                 copies of the factors    step
    per-client          one a client             with its client's
    shared-by-arrival   one                      whenever a client's step is complete
    shared              one                      once, on the batches of all
    shared-in-turn      one                      once for each client's batch, the clients in turn

`progress` is what one local step of every client is worth, relative to `per-client`: the number of rounds to
a given loss is in inverse proportion to it. The controller `quickest` divides a round's seconds by it, so a
measurement changes the choice by changing one number here. Ties go to the way named first.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from splitft.specs.training import ServerAdapters


@dataclass(frozen=True)
class ServerStepping:
    """One way to step the server's factors."""

    progress: float
    """Progress of a local step relative to `per-client`, each at its own best learning rate."""
    source: str
    """Origin of the number, in words."""


_TIE = (
    "a tie: SmolLM2-135M on E2E, alpha 0.5, 4 clients, 4 rounds of 15 steps, float32, one seed: held-out "
    "loss 1.340 with averaged copies at lr 3e-3, 1.335 in turn at lr 1e-3"
)
_ASSUMED = "assumed equal: not measured at tuned learning rates"

SERVER_STEPPING: Mapping[ServerAdapters, ServerStepping] = {
    "per-client": ServerStepping(1.0, "by definition"),
    "shared-by-arrival": ServerStepping(1.0, _ASSUMED),
    "shared": ServerStepping(1.0, _ASSUMED),
    "shared-in-turn": ServerStepping(1.0, _TIE),
}
"""Every way, in the order of preference where they tie: per-client is exact at any cut, can be deployed, and
steps no client on another's gradients."""
