"""How tensors travel: a codec for each role, and what it may cost in quality if it is chosen by itself.

hidden: int4          gradient: bounded:rel=1e-2          hidden: {codec: bounded, rel: 1.0e-2}
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, WithJsonSchema, model_validator
from pydantic_core import PydanticCustomError

from splitft.specs.base import Spec

OPTIONS: dict[str, tuple[str, ...]] = {
    "fp64": (),
    "fp32": (),
    "bf16": (),
    "fp8": (),
    "int8": (),
    "int4": (),
    "int2": (),
    "topk": ("share",),
    "bounded": ("abs", "rel"),
    "temporal": ("skip", "megabytes"),
    "principal": ("bits",),
}
"""Every codec that a user may name, and its options, which are numbers above 0."""
AUTO = "auto"
LEAST_BITS, MOST_BITS = 1.0, 8.0
ADAPTER_CODECS = ("fp64", "fp32", "bf16", "int8")


@dataclass(frozen=True)
class CodecChoice:
    """A codec with its options, from `name` or `name:option=number,...`."""

    codec: str
    options: Mapping[str, float] = field(default_factory=dict)

    @classmethod
    def parse(cls, text: str) -> CodecChoice:
        """Raises ValueError that says what an option may be."""
        name, _, rest = text.partition(":")
        if name not in OPTIONS:
            raise ValueError(f"found {name!r}; give one of {', '.join(OPTIONS)}")
        options: dict[str, float] = {}
        for part in filter(None, rest.split(",")):
            key, _, value = part.partition("=")
            if key not in OPTIONS[name]:
                known = ", ".join(OPTIONS[name]) or "no options"
                raise ValueError(f"{name} has no option {key!r}; it has {known}")
            options[key] = _number(f"{name}: {key}", value)
        return cls(name, options)

    def __post_init__(self) -> None:
        if self.codec == "bounded" and len(self.options) > 1:
            raise ValueError("bounded takes one bound: give abs or rel, not both")
        if not LEAST_BITS <= self.options.get("bits", 2.0) <= MOST_BITS:
            raise ValueError(
                f"{self.codec}: bits is {self.options['bits']:g}; give {LEAST_BITS:g} to {MOST_BITS:g}"
            )
        if self.options.get("share", 1.0) != int(self.options.get("share", 1.0)):
            raise ValueError(f"{self.codec}: share is {self.options['share']:g}; give a whole number")
        if self.options.get("skip", 0.0) >= 1:
            raise ValueError(f"{self.codec}: skip is {self.options['skip']:g}; give a number below 1")

    def __str__(self) -> str:
        rest = ",".join(f"{key}={value:g}" for key, value in self.options.items())
        return f"{self.codec}:{rest}" if rest else self.codec


def _number(what: str, value: object) -> float:
    try:
        number = float(str(value))
    except ValueError:
        number = float("nan")
    if not 0 < number < float("inf"):
        raise ValueError(f"{what} is {value!r}; give a number above 0")
    return number


def _canonical(given: Any) -> Any:
    """`{codec: bounded, rel: 0.01}` and `bounded:rel=0.01` as one text."""
    if isinstance(given, Mapping):
        options = {str(key): value for key, value in given.items() if key != "codec"}
        given = f"{given.get('codec')}:{','.join(f'{key}={value}' for key, value in options.items())}"
    name = given.partition(":")[0] if isinstance(given, str) else None
    if name == AUTO == given:
        return given
    if name not in OPTIONS:
        raise PydanticCustomError("codec", "no such codec")
    return str(CodecChoice.parse(given))


def _names(*names: str) -> WithJsonSchema:
    return WithJsonSchema({"type": "string", "pattern": f"^({'|'.join(names)})$"})


Codec = Annotated[str, BeforeValidator(_canonical), _names(*OPTIONS, AUTO)]


class WireSpec(Spec):
    """How tensors travel, by role; `wire: auto` chooses for hidden states and gradients."""

    hidden: Codec = "bf16"
    """Codec of hidden states. `int8`: 4 times less than fp32; `int4`: 8 times; `principal`: as many bits as
    you give, 2 by default, along axes learnt as the run goes: `principal:bits=3` here and `principal:bits=1`
    for gradients are 14 to 15 times less in all; `temporal`: differences to the last epoch;
    `bounded:rel=1e-2` or `bounded:abs=0.1`: your bound on the error; `auto`: the cheapest whose measured
    effect stays within `budget`. fp64 is for exactness studies on a float64 model."""
    gradient: Codec = "bf16"
    """Codec of gradients of hidden states, rounded at random so that errors cancel; also `int2` and `topk`,
    which make good later what they leave out."""
    adapter: Annotated[str, Field(pattern=f"^({'|'.join(ADAPTER_CODECS)})$")] = "fp32"
    """Codec of adapters. Only what changed since the other side last saw it travels; fp32 keeps every bit,
    `bf16` and `int8` round the change, and what they leave out is made good in the next round."""
    budget: float = Field(0.005, gt=0, le=1)
    """With `auto`: largest rise of perplexity that a codec may cause, as a share: 0.005 is half a percent."""
    in_process: Literal["bytes", "direct"] = "bytes"
    """In simulation, pass every message through bytes, or hand its rounded tensors over for speed: the
    results are equal, and bytes are then those of the tensors alone."""

    @model_validator(mode="before")
    @classmethod
    def _auto_is_for_both(cls, given: Any) -> Any:
        return {"hidden": AUTO, "gradient": AUTO} if given == AUTO else given

    @property
    def chooses(self) -> bool:
        """Whether any codec is still to be chosen."""
        return AUTO in (self.hidden, self.gradient)
