"""What a codec costs on the simulated clock: bytes on the link, and seconds at both ends.

    N x D numbers --encode at the sender--> bytes on the link --decode at the receiver-->

Seconds are those of one core, as `benchmarks/codec_speed.py` measures them, so that simulated times are the
same on every machine; casts are one pass over memory and count as nothing.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

from splitft.errors import ScheduleError

FLOAT_BYTES = 4
"""Of a number before it is encoded."""


@dataclass(frozen=True)
class Speed:
    """Of one codec, in bytes of float32 input a second."""

    encode: float
    decode: float


SPEEDS: dict[tuple[str, str], Speed] = {
    ("fp8", "hidden"): Speed(3.7e9, 1.3e9),
    ("fp8", "gradient"): Speed(3.7e9, 1.2e9),
    ("int8", "hidden"): Speed(3.4e9, 14e9),
    ("int8", "gradient"): Speed(1.4e9, 14e9),
    ("int4", "hidden"): Speed(0.63e9, 0.89e9),
    ("int4", "gradient"): Speed(0.46e9, 1.1e9),
    ("int2", "hidden"): Speed(0.37e9, 0.93e9),
    ("int2", "gradient"): Speed(0.36e9, 1.1e9),
    ("topk", "hidden"): Speed(0.42e9, 11e9),
    ("topk", "gradient"): Speed(0.41e9, 11e9),
    ("bounded", "hidden"): Speed(0.57e9, 0.78e9),
    ("bounded", "gradient"): Speed(0.34e9, 0.79e9),
    ("temporal", "hidden"): Speed(0.28e9, 0.63e9),
    ("temporal", "gradient"): Speed(0.23e9, 0.63e9),
    ("principal", "hidden"): Speed(0.088e9, 0.10e9),
    ("principal", "gradient"): Speed(0.084e9, 0.10e9),
}
"""By codec and role, on one core of an AMD EPYC (family 26); what is not here takes no time to speak of."""


def codec_seconds(codec: str, role: str) -> tuple[float, float]:
    """Seconds of encoding and of decoding one number."""
    speed = SPEEDS.get((codec, role))
    return (FLOAT_BYTES / speed.encode, FLOAT_BYTES / speed.decode) if speed else (0.0, 0.0)


@dataclass(frozen=True)
class WireBytes:
    """What an element takes on the wire, by role: 4 bytes for fp32, 2 for bf16, 1 and more for int8."""

    hidden: float = 2.0
    """Bytes of a hidden state."""
    gradient: float = 2.0
    """Bytes of its gradient."""
    adapter: float = 4.0
    """Bytes of a LoRA factor or an optimizer moment."""
    hidden_s: tuple[float, float] = (0.0, 0.0)
    """Seconds of encoding and of decoding a hidden state."""
    gradient_s: tuple[float, float] = (0.0, 0.0)
    """The same of a gradient."""

    def __post_init__(self) -> None:
        for entry in fields(self):
            value = getattr(self, entry.name)
            if entry.name.endswith("_s"):
                if min(value) < 0:
                    raise ScheduleError(f"{entry.name} is {value}; seconds are 0 or more")
            elif not value > 0:
                raise ScheduleError(f"{entry.name} takes {value} bytes an element; it must be above 0")
