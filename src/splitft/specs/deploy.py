"""A run on real machines: its sites, where the server listens, and how long anyone waits for anyone.

These are all the times of a deployed run; those of the engine below follow from them (`deploy.flare.times`).
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, model_validator

from splitft.specs.base import Spec

SiteName = Annotated[
    str, Field(pattern=r"^[A-Za-z0-9]([A-Za-z0-9_-]{0,62}[A-Za-z0-9])?$", examples=["north-clinic"])
]
HostName = Annotated[
    str, Field(pattern=r"^[A-Za-z0-9]([A-Za-z0-9.-]{0,250}[A-Za-z0-9])?$", examples=["splitft.example.org"])
]


class DeploySpec(Spec):
    """Sites and server of a deployed run, and what happens when one of them does not answer."""

    sites: tuple[SiteName, ...] | None = None
    """Names of the sites, in the order of `clients.cuts`; null for client-1, client-2 and so on."""
    server: HostName = "localhost"
    """Host name of the server, as the sites reach it and as its certificate says."""
    port: int = Field(8002, ge=1, le=65535)
    """The one port that the server listens on; sites only open connections, to this one."""
    min_clients: int = Field(1, ge=1)
    """With fewer sites the run pauses, and goes on from its last finished round when enough are back."""
    window_ms: float = Field(5.0, ge=0)
    """How long the server gathers what arrives from other sites before it works on it together."""
    silence_s: float = Field(60.0, gt=0)
    """A site from which nothing was heard for so long is lost; the round goes on without it."""
    join_s: float = Field(120.0, gt=0)
    """How long the start of a link of the job chain waits for the sites to load their model and text."""
    slack: float = Field(4.0, ge=1)
    """A round waits for a slow site until this many times what the median site needed, but no less than
    `patience_s`; the steps that it has finished by then count."""
    patience_s: float = Field(60.0, ge=0)
    """Least time that a round waits for slow sites."""
    round_s: float | None = Field(None, gt=0)
    """If given, most seconds that the local steps of a round may take, whoever is slow."""

    @model_validator(mode="after")
    def _sites_have_names_of_their_own(self) -> DeploySpec:
        if self.sites is not None and len(set(self.sites)) < len(self.sites):
            raise ValueError("two sites have the same name")
        return self
