"""Section `deploy`: the sites and the server of a run on real machines, and its waiting times.

The timeouts of NVIDIA FLARE underneath are constants of `splitft.deploy.flare`.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, model_validator

from splitft.names import DEVICES, NAME_PATTERN
from splitft.specs.base import Spec

SiteName = Annotated[str, Field(pattern=NAME_PATTERN, examples=["north-clinic"])]
HostName = Annotated[
    str, Field(pattern=r"^[A-Za-z0-9]([A-Za-z0-9.-]{0,250}[A-Za-z0-9])?$", examples=["splitft.example.org"])
]


TAKEN = DEVICES | {"server", "all", "client"}
"""Names that a site cannot have, whatever their case: devices of Windows, and parties of FLARE's own."""


class DeploySpec(Spec):
    """Sites and server of a deployed run, and how long each waits for the others."""

    sites: tuple[SiteName, ...] | None = None
    """Names of the sites, in the order of `clients.cuts`; null for client-1, client-2 and so on."""
    server: HostName = "localhost"
    """Host name of the server, by which sites reach it and which is in its certificate."""
    port: int = Field(8002, ge=1, le=65535)
    """The one port that the server listens on; sites only open connections, to this port."""
    min_clients: int = Field(1, ge=1)
    """With fewer sites the run pauses; it goes on after its last finished round when enough are connected."""
    window_ms: float = Field(5.0, ge=0)
    """How long the server collects the batches of other sites before it processes them together."""
    silence_s: float = Field(60.0, gt=0)
    """A site that sends nothing for this long is lost; the round goes on without it."""
    join_s: float = Field(120.0, gt=0)
    """How long the start of a session waits for the sites to load their model and text."""
    slack: float = Field(4.0, ge=1)
    """A slow site is stopped after this many times the median site's time, but not before `patience_s`; the
    steps that it has finished count."""
    patience_s: float = Field(60.0, ge=0)
    """Shortest time that a round waits for slow sites."""
    turn_s: float = Field(30.0, gt=0)
    """With split.server_adapters shared-in-turn, a site whose gradient takes longer than this loses its turn
    if another site waits; it sends the step again, and then has twice as long."""
    round_s: float | None = Field(None, gt=0)
    """If given, longest time for the local steps of a round."""

    @model_validator(mode="after")
    def _sites_have_names_of_their_own(self) -> DeploySpec:
        known: dict[str, str] = {self.server.casefold(): f"deploy.server ({self.server})"}
        for site in self.sites or ():
            if site.casefold() in TAKEN:
                raise ValueError(f"no site can be called {site!r}: the name has a meaning of its own")
            if other := known.get(site.casefold()):
                raise ValueError(f"{site!r} and {other} have the same name, upper and lower case apart")
            known[site.casefold()] = repr(site)
        return self
