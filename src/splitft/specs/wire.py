"""Section `wire`: a codec for each role, and the loss of quality allowed if a run chooses by itself.

hidden: int4          gradient: bounded:rel=1e-2          hidden: {codec: bounded, rel: 1.0e-2}
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, GetCoreSchemaHandler, GetJsonSchemaHandler, model_validator
from pydantic_core import CoreSchema, PydanticCustomError, core_schema

from splitft.specs.base import Spec
from splitft.specs.codecs import CODECS, CodecChoice, CodecRole, codecs_for, kind_of

AUTO = "auto"


class CodecFor:
    """A field that names a codec for one role, with its options: `Annotated[str, CodecFor("adapter")]`.

    A mapping `{codec: bounded, rel: 0.01}` becomes the text `bounded:rel=0.01`. The JSON schema lists the
    codecs that are known when it is made, those of plug-ins included.
    """

    def __init__(self, role: CodecRole, auto: bool = False) -> None:
        """Accept `auto` too if a run may choose the codec."""
        self._role, self._auto = role, auto

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_before_validator_function(self._canonical, handler(source))

    def __get_pydantic_json_schema__(
        self, schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> dict[str, Any]:
        names = [*codecs_for(self._role), *([AUTO] if self._auto else [])]
        return {"type": "string", "pattern": f"^({'|'.join(names)})$"}

    def _canonical(self, given: Any) -> str:
        if isinstance(given, Mapping):
            options = ",".join(f"{key}={value}" for key, value in given.items() if key != "codec")
            given = f"{given.get('codec')}:{options}"
        if self._auto and given == AUTO:
            return AUTO
        name = given.partition(":")[0] if isinstance(given, str) else ""
        if name not in CODECS or self._role not in CODECS[name].roles:
            raise PydanticCustomError("codec", "no such codec")
        return str(CodecChoice.parse(given))


class WireSpec(Spec):
    """Codecs of the tensors that are sent, by role; `wire: auto` chooses for hidden states and gradients."""

    hidden: Annotated[str, CodecFor("hidden", auto=True)] = "bf16"
    """Codec of hidden states. `int8`: 4 times fewer bytes than fp32; `int4`: 8 times; `principal`: 1 to 8
    bits a number, 2 by default, along axes learned during the run (`principal:bits=3` with `principal:bits=1`
    for gradients: 14 to 15 times in all); `temporal`: differences to the last epoch; `bounded:rel=1e-2` or
    `bounded:abs=0.1`: a bound on the error; `auto`: the cheapest codec whose measured effect stays within
    `budget`. fp64 is for exactness studies on a float64 model."""
    gradient: Annotated[str, CodecFor("gradient", auto=True)] = "bf16"
    """Codec of gradients of hidden states, with stochastic rounding so that errors cancel; also `int2` and
    `topk`, with error feedback: the error of a message is added to the next."""
    adapter: Annotated[str, CodecFor("adapter")] = "fp32"
    """Codec of adapters. Only changes since the last message are sent. fp32 keeps every bit; `bf16` and
    `int8` round the change, and the rounding error is added in the next round."""
    budget: float = Field(0.005, gt=0, le=1)
    """With `auto`: largest relative rise of perplexity that a codec may cause; 0.005 is half a percent."""
    in_process: Literal["bytes", "direct"] = "bytes"
    """In simulation, `bytes` encodes every message as in a deployed run; `direct` only rounds its tensors,
    which is faster. The results are equal; with `direct` only the tensors' bytes are counted."""

    @model_validator(mode="before")
    @classmethod
    def _auto_is_for_both(cls, given: Any) -> Any:
        return {"hidden": AUTO, "gradient": AUTO} if given == AUTO else given

    @property
    def chooses(self) -> bool:
        """True if a codec is still to be chosen."""
        return AUTO in (self.hidden, self.gradient)

    @property
    def needs_example_ids(self) -> bool:
        """True if clients must number the sequences whose hidden states they send."""
        return self.hidden != AUTO and kind_of(self.hidden).needs_example_ids
