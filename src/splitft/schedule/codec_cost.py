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
    ("fp8", "hidden"): Speed(2.2e9, 0.99e9),
    ("fp8", "gradient"): Speed(2.3e9, 0.99e9),
    ("int8", "hidden"): Speed(1.1e9, 3.6e9),
    ("int8", "gradient"): Speed(0.66e9, 3.7e9),
    ("int4", "hidden"): Speed(0.74e9, 1.0e9),
    ("int4", "gradient"): Speed(0.49e9, 1.1e9),
    ("int2", "hidden"): Speed(0.39e9, 1.2e9),
    ("int2", "gradient"): Speed(0.41e9, 1.2e9),
    ("topk", "hidden"): Speed(0.43e9, 6.5e9),
    ("topk", "gradient"): Speed(0.44e9, 6.7e9),
    ("bounded", "hidden"): Speed(0.37e9, 0.53e9),
    ("bounded", "gradient"): Speed(0.27e9, 0.55e9),
    ("temporal", "hidden"): Speed(0.27e9, 0.66e9),
    ("temporal", "gradient"): Speed(0.24e9, 0.69e9),
    ("principal", "hidden"): Speed(0.074e9, 0.11e9),
    ("principal", "gradient"): Speed(0.075e9, 0.11e9),
}
"""By codec and role, on one core of an Intel Xeon (family 6 model 167); others take next to none."""


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
