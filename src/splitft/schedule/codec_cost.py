"""The cost of codecs on the simulated clock: bytes on the link, and seconds at both ends.

    N x D numbers --encode at the sender--> bytes on the link --decode at the receiver-->

Seconds are those of one core as they were measured once (`specs.codecs`), so that simulated times are the
same on every machine. A codec without a measured speed takes no time.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

from splitft.errors import ScheduleError
from splitft.specs.codecs import CodecRole, kind_of

FLOAT_BYTES = 4
"""Bytes of a number before it is encoded."""


def codec_seconds(codec: str, role: CodecRole) -> tuple[float, float]:
    """Return the seconds of encoding and of decoding one number with a codec, as a user writes it."""
    speed = kind_of(codec).speeds.get(role)
    return (FLOAT_BYTES / speed.encode, FLOAT_BYTES / speed.decode) if speed else (0.0, 0.0)


@dataclass(frozen=True)
class WireBytes:
    """Cost of one number on the wire, by role: 4 bytes for fp32, 2 for bf16, a little over 1 for int8."""

    hidden: float = 2.0
    """Bytes of a hidden state."""
    gradient: float = 2.0
    """Bytes of its gradient."""
    adapter: float = 4.0
    """Bytes of a LoRA factor or an optimizer moment."""
    hidden_s: tuple[float, float] = (0.0, 0.0)
    """Seconds of encoding and of decoding a hidden state."""
    gradient_s: tuple[float, float] = (0.0, 0.0)
    """Seconds of encoding and of decoding a gradient."""

    def __post_init__(self) -> None:
        for entry in fields(self):
            value = getattr(self, entry.name)
            if entry.name.endswith("_s"):
                if min(value) < 0:
                    raise ScheduleError(f"{entry.name} is {value}; seconds are 0 or more")
            elif not value > 0:
                raise ScheduleError(f"{entry.name} takes {value} bytes an element; it must be above 0")
