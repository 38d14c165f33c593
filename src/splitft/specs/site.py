"""What a data owner fixes for its own machine: text, memory, base model, and what may leave.

The file stays on the site. Whoever runs the server asks for things; what is fixed here is not negotiable.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from splitft.specs.base import Spec
from splitft.specs.privacy import SiteBoundsSpec
from splitft.specs.schedule import DeviceName, DeviceSpec

CodecName = Literal[
    "fp64", "fp32", "bf16", "fp8", "int8", "int4", "int2", "topk", "bounded", "temporal", "principal"
]
"""A codec by its name alone; its options are the run's."""
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$", examples=["9f86d081... (64 hexadecimal digits)"])]


class SiteTextSpec(Spec):
    """The site's own text, in its own format."""

    source: str | None = None
    """A .txt, .jsonl, .csv, .tsv or .parquet file of this machine, or `python-docs`. With null, a run that
    names anything but embedded text is refused: nobody else says what is read here."""
    text: str = "text"
    """Column that holds the text; the loss covers all of it."""
    prompt: str | None = None
    """Column of the prompt; no loss on it. Needs `completion`, and replaces `text`."""
    completion: str | None = None
    """Column of the completion, which carries the loss."""
    separator: str = "\n"
    """What stands between prompt and completion."""

    @model_validator(mode="after")
    def _prompt_and_completion_come_together(self) -> SiteTextSpec:
        if (self.prompt is None) != (self.completion is None):
            raise ValueError("prompt and completion come together: give both columns, or neither")
        return self


class SiteMachineSpec(Spec):
    """What this machine is and what training may take of it."""

    device: DeviceName | DeviceSpec | None = None
    """What the schedule takes this machine for; `measured` measures it; null for what the run assumes."""
    memory_gb: float | None = Field(None, gt=0)
    """Memory that training may use, in GB (10^9 bytes); cuts that would need more are refused."""


class SiteModelSpec(Spec):
    """Where the base model comes from, and which of its files are trusted."""

    folder: str | None = None
    """Folder of this machine that holds the run's model; null for what the run names (hub cache, alias)."""
    trusted: dict[str, Sha256] | None = None
    """SHA-256 of each base-model file that this site trusts, by file name; null trusts what the server's
    manifest says. Either way a file must be the very one that the server has."""


class SiteAllowsSpec(Spec):
    """What may leave, and how."""

    labels: bool = False
    """Whether token ids may leave: with `split.labels: server` whoever runs the server reads the text."""
    hidden: tuple[CodecName, ...] | None = None
    """Codecs in which hidden states may leave; null for any."""
    gradient: tuple[CodecName, ...] | None = None
    """Codecs in which gradients may leave; null for any."""
    adapter: tuple[CodecName, ...] | None = None
    """Codecs in which adapters may leave; null for any."""


class SiteSpec(Spec):
    """What one site insists on, whatever the server asks for."""

    text: SiteTextSpec = SiteTextSpec()
    """The text."""
    machine: SiteMachineSpec = SiteMachineSpec()
    """The machine."""
    model: SiteModelSpec = SiteModelSpec()
    """The base model."""
    allows: SiteAllowsSpec = SiteAllowsSpec()
    """What may leave."""
    bounds: SiteBoundsSpec = SiteBoundsSpec()
    """The shallowest cut, and the least noise."""
