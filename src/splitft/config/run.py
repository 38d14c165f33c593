"""`RunConfig`: the specifications of all rooms in one value.

Each section is a room's own spec (`splitft.specs`), which has its bounds and defaults. Requirements between
two sections are in `config.compatibility`; `splitft.run` checks what needs the model or the text.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, model_validator
from pydantic_core import PydanticCustomError

from splitft.config.compatibility import conflicts
from splitft.methods import METHODS
from splitft.specs import (
    AggregateSpec,
    ClientsSpec,
    DataSpec,
    DeploySpec,
    DevicesSpec,
    LoraSpec,
    ModelSpec,
    PrivacySpec,
    ScheduleSpec,
    Spec,
    SplitSpec,
    TrainingSpec,
    WireSpec,
)
from splitft.specs.base import NameIn
from splitft.specs.extensions import PluginSpec, TrackerName, TrackerSpec


class RunConfig(Spec):
    """Everything a run depends on."""

    model: ModelSpec = ModelSpec()
    """The language model."""
    data: DataSpec = DataSpec()
    """The text."""
    clients: ClientsSpec = ClientsSpec()
    """The clients, their cuts and their shares of the text."""
    lora: LoraSpec = LoraSpec()
    """The adapters."""
    split: SplitSpec = SplitSpec()
    """The placement of the labels and of the server's adapters."""
    training: TrainingSpec = TrainingSpec()
    """Rounds, steps, batches and the optimizer."""
    aggregate: AggregateSpec = AggregateSpec()
    """The aggregation of the clients' adapters."""
    schedule: ScheduleSpec = ScheduleSpec()
    """The controller that chooses the cuts, and the simulated machines and links."""
    wire: WireSpec = WireSpec()
    """The codecs of the tensors that are sent."""
    privacy: PrivacySpec = PrivacySpec()
    """The clients' defences of their messages and updates."""
    deploy: DeploySpec = DeploySpec()
    """The sites and timeouts of a deployed run."""
    devices: DevicesSpec = DevicesSpec()
    """The devices that compute: CPU or accelerators."""
    trackers: tuple[TrackerName | TrackerSpec, ...] = ()
    """Trackers that receive the run's events while it trains: `csv`, or a plug-in's name."""
    plugins: tuple[PluginSpec, ...] = ()
    """Python files that add rules, controllers, codecs and the like by name (docs/write-your-own.md). They
    are code that runs with your rights: name only files that you have read."""
    method: Annotated[str, NameIn(METHODS)] = "splitft"
    """The method. It fixes the keys that define it, and has its own defaults (`splitft.methods`)."""
    seed: int = Field(0, ge=0, lt=2**32)
    """Fixes shares, initial factors and batches: equal seeds give equal runs on one machine."""

    @model_validator(mode="after")
    def _parts_fit_together(self) -> RunConfig:
        if found := conflicts(self):
            text = "; ".join(f"{paths[0]}: {message}" for paths, message in found)
            raise PydanticCustomError("conflict", "{text}", {"text": text, "found": found})
        return self

    @property
    def cuts(self) -> tuple[int, ...] | None:
        """One cut for each client; None where the controller decides or every client has the whole model."""
        given = self.clients.cuts
        if isinstance(given, str):
            return None
        return (given,) * self.clients.count if isinstance(given, int) else given
