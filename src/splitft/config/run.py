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
    """Where labels and the server's adapters live."""
    training: TrainingSpec = TrainingSpec()
    """Rounds, steps, batches and the optimizer."""
    aggregate: AggregateSpec = AggregateSpec()
    """How the clients' adapters become one."""
    schedule: ScheduleSpec = ScheduleSpec()
    """Who chooses the cuts."""
    wire: WireSpec = WireSpec()
    """How tensors travel."""
    privacy: PrivacySpec = PrivacySpec()
    """What clients do to their messages before they leave."""
    deploy: DeploySpec = DeploySpec()
    """Sites and waiting times, when the run is on real machines."""
    trackers: tuple[TrackerName | TrackerSpec, ...] = ()
    """What is told of the run while it trains, beside its folder: `csv`, or a plug-in's name."""
    plugins: tuple[PluginSpec, ...] = ()
    """Python files that add rules, controllers, codecs and the like by name (docs/write-your-own.md). They
    are code that runs with your rights: name only files that you have read."""
    method: Annotated[str, NameIn(METHODS)] = "splitft"
    """The method to run: it sets what defines it, and has defaults of its own (`splitft.methods`)."""
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
