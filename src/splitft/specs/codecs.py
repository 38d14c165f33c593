"""The codecs by name: the options, roles, memory and speed of each.

    CODECS["int4"]                CodecKind: options, roles, memory, speed; known without torch
    codec_of("int4")              the codec of `splitft.codecs`, which encodes and decodes

To add a codec, write a class with the methods of `splitft.codecs.Codec` and one line: here, in a plug-in
file, or as an entry point of the group `splitft.codecs`.

    CODECS.add("mine", CodecKind(Mine, options={"bits": CodecOption()}))      wire: {hidden: "mine:bits=3"}
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

from splitft.registry import Lazy, Registry

CodecRole = Literal["hidden", "gradient", "adapter"]
ROLES: tuple[CodecRole, ...] = ("hidden", "gradient", "adapter")


@dataclass(frozen=True)
class CodecOption:
    """A number above 0 that a user may give after the name of a codec."""

    fits: Callable[[float], bool] = lambda value: True
    """True if a number above 0 is allowed."""
    allowed: str = "a number above 0"
    """The allowed numbers in words, for error messages."""


@dataclass(frozen=True)
class Speed:
    """Throughput of one codec on one core, in bytes of float32 input a second."""

    encode: float
    decode: float


@dataclass(frozen=True)
class CodecKind:
    """One choice of codec and the facts about it."""

    make: Callable[..., Any]
    """Return the codec (a `splitft.codecs.Codec`); called with the options by name."""
    options: Mapping[str, CodecOption] = field(default_factory=dict)
    """Options by name."""
    exclusive: bool = False
    """True if a user may give at most one of the options."""
    roles: frozenset[CodecRole] = frozenset({"hidden", "gradient"})
    """Roles of the tensors that it may encode."""
    memory: Literal["none", "sender", "both"] = "none"
    """The ends that must remember earlier messages, which must then come in order. With `both`, they begin
    anew together: in a deployed run with each session and after an absence (`CodecState.restart`)."""
    learned: str | None = None
    """Name in the memory that appears once the codec has learned; before, it sends something larger."""
    needs_example_ids: bool = False
    """True if it compares a sequence with itself in the last epoch, and must know which one it is."""
    exact_bytes: int = 0
    """Widest floating-point type that passes unchanged, in bytes; 0 if the codec rounds."""
    flattens_adapters: bool = False
    """True if a LoRA factor, which is narrow, is encoded as one row of all its numbers."""
    on_device: bool = False
    """True if it encodes and decodes on any device: only its bytes are copied to the CPU, or from there.
    Other codecs have their tensors on the CPU."""
    missing_on: frozenset[str] = frozenset()
    """Types of device, such as `mps`, that lack a data type which it needs."""
    draws_gradients: bool = False
    """True if it rounds gradients at random. Random numbers are drawn on the CPU and would be as large as the
    tensor, so gradients are encoded on the CPU."""
    speeds: Mapping[CodecRole, Speed] = field(default_factory=dict)
    """Measured throughput by role; without one, encoding takes no time on the simulated clock."""

    def runs_on(self, device_type: str) -> bool:
        """Return whether it encodes and decodes on devices of this type."""
        return device_type == "cpu" or (self.on_device and device_type not in self.missing_on)

    def read_options(self, name: str, texts: Mapping[str, str]) -> dict[str, float]:
        """Parse the options of the codec `name`. Raises ValueError that says what is allowed."""
        for key in texts:
            if key not in self.options:
                known = ", ".join(self.options) or "no options"
                raise ValueError(f"{name} has no option {key!r}; it has {known}")
        options = {key: _number(f"{name}: {key}", text) for key, text in texts.items()}
        if self.exclusive and len(options) > 1:
            raise ValueError(f"{name} takes one option: give {' or '.join(self.options)}, not both")
        for key, value in options.items():
            if not self.options[key].fits(value):
                raise ValueError(f"{name}: {key} is {value:g}; give {self.options[key].allowed}")
        return options


@dataclass(frozen=True)
class CodecChoice:
    """A codec with its options, from `name` or `name:option=number,...`."""

    codec: str
    options: Mapping[str, float]

    @classmethod
    def parse(cls, text: str) -> CodecChoice:
        """Parse a user's text. Raises ValueError that says what is allowed."""
        name, _, rest = text.partition(":")
        if name not in CODECS:
            raise ValueError(f"found {name!r}; give one of {', '.join(CODECS)}")
        texts = {key: value for key, _, value in (one.partition("=") for one in rest.split(",")) if key}
        return cls(name, CODECS[name].read_options(name, texts))

    @property
    def kind(self) -> CodecKind:
        """The entry of its codec."""
        return CODECS[self.codec]

    def __str__(self) -> str:
        rest = ",".join(f"{key}={value:g}" for key, value in self.options.items())
        return f"{self.codec}:{rest}" if rest else self.codec


def kind_of(text: str) -> CodecKind:
    """Return the entry of a codec, given with or without options."""
    return CODECS[text.partition(":")[0]]


def codecs_for(role: CodecRole) -> list[str]:
    """Return the names of the codecs that may carry a role."""
    return [name for name, kind in CODECS.items() if role in kind.roles]


def _number(what: str, value: str) -> float:
    try:
        number = float(value)
    except ValueError:
        number = float("nan")
    if not 0 < number < float("inf"):
        raise ValueError(f"{what} is {value!r}; give a number above 0")
    return number


_ALL = frozenset(ROLES)
_CAST = Lazy("splitft.codecs.cast:Cast")

CODECS: Registry[CodecKind] = Registry(
    "codec",
    "splitft.codecs",
    {
        "fp64": CodecKind(partial(_CAST, "fp64"), roles=_ALL, exact_bytes=8, on_device=True),
        "fp32": CodecKind(partial(_CAST, "fp32"), roles=_ALL, exact_bytes=4, on_device=True),
        "bf16": CodecKind(partial(_CAST, "bf16"), roles=_ALL, on_device=True),
        "fp8": CodecKind(
            Lazy("splitft.codecs.cast:ScaledCast"),
            on_device=True,
            missing_on=frozenset({"mps"}),
            speeds={"hidden": Speed(2.2e9, 0.99e9), "gradient": Speed(2.3e9, 0.99e9)},
        ),
        "int8": CodecKind(
            Lazy("splitft.codecs.quantize:Int8"),
            roles=_ALL,
            flattens_adapters=True,
            on_device=True,
            draws_gradients=True,
            speeds={"hidden": Speed(1.1e9, 3.6e9), "gradient": Speed(0.66e9, 3.7e9)},
        ),
        "int4": CodecKind(
            partial(Lazy("splitft.codecs.quantize:Packed"), 4),
            on_device=True,
            draws_gradients=True,
            speeds={"hidden": Speed(0.74e9, 1.0e9), "gradient": Speed(0.49e9, 1.1e9)},
        ),
        "int2": CodecKind(
            Lazy("splitft.codecs.quantize:int2"),
            memory="sender",
            speeds={"hidden": Speed(0.39e9, 1.2e9), "gradient": Speed(0.41e9, 1.2e9)},
        ),
        "topk": CodecKind(
            Lazy("splitft.codecs.top_k:top_k"),
            options={"share": CodecOption(float.is_integer, "a whole number")},
            memory="sender",
            speeds={"hidden": Speed(0.43e9, 6.5e9), "gradient": Speed(0.44e9, 6.7e9)},
        ),
        "bounded": CodecKind(
            Lazy("splitft.codecs.error_bounded:bounded"),
            options={"abs": CodecOption(), "rel": CodecOption()},
            exclusive=True,
            speeds={"hidden": Speed(0.37e9, 0.53e9), "gradient": Speed(0.27e9, 0.55e9)},
        ),
        "temporal": CodecKind(
            Lazy("splitft.codecs.temporal:Temporal"),
            options={
                "skip": CodecOption(lambda share: share < 1, "a number below 1"),
                "megabytes": CodecOption(),
            },
            memory="both",
            needs_example_ids=True,
            speeds={"hidden": Speed(0.27e9, 0.66e9), "gradient": Speed(0.24e9, 0.69e9)},
        ),
        "principal": CodecKind(
            Lazy("splitft.codecs.transform:Principal"),
            options={"bits": CodecOption(lambda bits: 1 <= bits <= 8, "1 to 8")},
            memory="both",
            learned="basis",
            speeds={"hidden": Speed(0.074e9, 0.11e9), "gradient": Speed(0.075e9, 0.11e9)},
        ),
    },
)
"""Every codec by name, from the most bytes for hidden states to the fewest. The speeds are those of one core
of an Intel Xeon (family 6 model 167), as `benchmarks/codec_speed.py` measures them."""
