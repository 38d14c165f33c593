"""How tensors travel."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from splitft.specs.base import Spec

Codec = Annotated[str, Field(pattern="^(bf16|fp32|fp64)$")]


class WireSpec(Spec):
    """How tensors travel, by role."""

    hidden: Codec = "bf16"
    """Codec of hidden states: bf16, fp32, or fp64 for exactness studies on a float64 model."""
    gradient: Codec = "bf16"
    """Codec of gradients of hidden states."""
    adapter: Codec = "fp32"
    """Codec of adapters."""
    in_process: Literal["bytes", "direct"] = "bytes"
    """In simulation, pass every message through bytes, or hand its rounded tensors over for speed: the
    results are equal, and bytes are then those of the tensors alone."""
