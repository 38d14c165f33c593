"""The data owner's file `site.yaml`: a site's text, machine and base model, and what may leave it.

The file stays on the site, and the server cannot change it: a run that asks for what it forbids is declined.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, model_validator

from splitft.specs.base import NameIn, Spec
from splitft.specs.codecs import CODECS
from splitft.specs.compute_devices import ComputeDevice
from splitft.specs.privacy import SiteBoundsSpec
from splitft.specs.schedule import DeviceName, DeviceSpec

CodecName = Annotated[str, NameIn(CODECS)]
"""A codec by its name alone; its options are the run's."""
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$", examples=["9f86d081... (64 hexadecimal digits)"])]


class SiteTextSpec(Spec):
    """The site's own text, in its own format."""

    source: str | None = None
    """A .txt, .jsonl, .csv, .tsv or .parquet file of this machine, or `python-docs`. With null, the site
    declines a run on any other than embedded text: only the data owner chooses the text that is read here."""
    text: str = "text"
    """Column of the text; the loss covers all of it."""
    prompt: str | None = None
    """Column of the prompt; no loss on it. Needs `completion`, and replaces `text`."""
    completion: str | None = None
    """Column of the completion, which the loss covers."""
    separator: str = "\n"
    """Text between prompt and completion."""

    @model_validator(mode="after")
    def _prompt_and_completion_come_together(self) -> SiteTextSpec:
        if (self.prompt is None) != (self.completion is None):
            raise ValueError("prompt and completion come together: give both columns, or neither")
        return self


class SiteMachineSpec(Spec):
    """This machine, and how much of it training may use."""

    device: DeviceName | DeviceSpec | None = None
    """Machine that the schedule plans with; `measured` measures this one; null for the machine that the run
    assumes."""
    runs_on: ComputeDevice = "auto"
    """Device that computes: `auto` (the first accelerator, or the CPU), `cpu`, `cuda`, `cuda:1`, `mps`,
    `xpu`. No run can change it."""
    memory_gb: float | None = Field(None, gt=0)
    """Memory that training may use, in GB (10^9 bytes); cuts that would need more are declined."""


class SiteModelSpec(Spec):
    """The base model's folder, and the files that are trusted."""

    folder: str | None = None
    """Folder of this machine with the run's model; null for the model that the run names (hub cache,
    alias)."""
    trusted: dict[str, Sha256] | None = None
    """SHA-256 of each base-model file that this site trusts, by file name, or of each tensor, by its own
    name; null for those in the server's manifest. Either way each must equal the server's."""


class SiteAllowsSpec(Spec):
    """The data that may leave, and in which codecs."""

    labels: bool = False
    """True if token ids may leave; with `split.labels: server` the server's operator can read the text."""
    hidden: tuple[CodecName, ...] | None = None
    """Codecs in which hidden states may leave; null for any."""
    gradient: tuple[CodecName, ...] | None = None
    """Codecs in which gradients may leave; null for any."""
    adapter: tuple[CodecName, ...] | None = None
    """Codecs in which adapters may leave; null for any."""


class SiteLimitsSpec(Spec):
    """Bounds on the orders of a server, whatever the configuration of a run says."""

    rounds: int = Field(10_000, ge=1)
    """Most rounds of a run; a server is held to the run's own `training.rounds` too."""
    steps: int = Field(10_000, ge=1)
    """Most local steps of a round; a server is held to the run's own `training.steps` too."""
    attempts: int = Field(10, ge=1)
    """Most times that one round is trained, or evaluated, in a session: a round that failed is repeated."""
    evaluations: int = Field(30_000, ge=1)
    """Most evaluations on the held-out text for a run, in all its sessions; each tells the server a loss."""
    held_out: int = Field(1000, ge=1)
    """Most held-out examples of an evaluation, even if `data.eval_examples` of the run is more."""
    hours_a_day: float = Field(24.0, gt=0, le=24)
    """Hours that this machine computes for runs in a day (UTC), all runs and sessions together."""
    adapter_norm: float = Field(10.0, gt=0)
    """Largest update of a layer that a server may send, relative to the layer's frozen weight (Frobenius
    norms); training changes a layer by a few per cent."""
    frame_mb: float = Field(1000.0, gt=0)
    """Largest message that is read, in MB (10^6 bytes)."""


class SiteSpec(Spec):
    """The requirements of one site, whatever the server asks for."""

    text: SiteTextSpec = SiteTextSpec()
    """The text."""
    machine: SiteMachineSpec = SiteMachineSpec()
    """The machine."""
    model: SiteModelSpec = SiteModelSpec()
    """The base model."""
    allows: SiteAllowsSpec = SiteAllowsSpec()
    """The data that may leave."""
    bounds: SiteBoundsSpec = SiteBoundsSpec()
    """The shallowest cut, and the least noise."""
    limits: SiteLimitsSpec = SiteLimitsSpec()
    """The most that a server may ask for."""
