"""Sections `plugins` and `trackers` of a run."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Annotated, Any

from pydantic import Field, model_validator

from splitft.registry import Registry
from splitft.specs.base import NameIn, Spec

TrackerFactory = Callable[..., Any]
"""(run folder, configuration as plain data, options) -> `splitft.tracking.trackers.Tracker`."""

TRACKERS: Registry[TrackerFactory] = Registry(
    "tracker", "splitft.trackers", {"csv": "splitft.tracking.trackers:CsvTracker"}
)
"""Every tracker by name."""


TrackerName = Annotated[str, NameIn(TRACKERS)]


class PluginSpec(Spec):
    """A Python file that adds choices: `my_rule.py`, or a mapping with its hash, as in a run folder."""

    file: str
    """Path of the file, from the folder of the configuration."""
    sha256: str | None = Field(None, pattern=r"^[0-9a-f]{64}$", examples=["e3b0c442..."])
    """SHA-256 that the content must have; null for any. A run folder records it."""

    @model_validator(mode="before")
    @classmethod
    def _a_path_alone(cls, given: Any) -> Any:
        return {"file": given} if isinstance(given, str) else given


class TrackerSpec(Spec):
    """A tracker with options of its own: `{name: mine, uri: ...}`."""

    name: TrackerName
    """Name of the tracker."""
    options: dict[str, str | int | float | bool | None] = {}
    """Options of the tracker."""

    @model_validator(mode="before")
    @classmethod
    def _other_keys_are_options(cls, given: Any) -> Any:
        if isinstance(given, Mapping) and "options" not in given:
            return {"name": given.get("name"), "options": {k: v for k, v in given.items() if k != "name"}}
        return given
