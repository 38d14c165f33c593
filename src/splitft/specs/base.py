"""The base class of all specifications, and the annotation of fields that name a registry's entry."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, GetCoreSchemaHandler, GetJsonSchemaHandler
from pydantic_core import CoreSchema, PydanticCustomError, core_schema

from splitft.registry import Registry


class Spec(BaseModel):
    """Frozen, strict about its keys, documented by its field docstrings."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class NameIn:
    """Annotation of a field whose value is one of a registry's names: `Annotated[str, NameIn(RULES)]`.

    The JSON schema lists the names that are known when it is made, those of plug-ins included.
    """

    def __init__(self, registry: Registry[Any]) -> None:
        self._registry = registry

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_after_validator_function(self._check, handler(source))

    def __get_pydantic_json_schema__(
        self, schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> dict[str, Any]:
        return {"type": "string", "enum": list(self._registry)}

    def _check(self, name: str) -> str:
        if name not in self._registry:
            names = ", ".join(self._registry)
            raise PydanticCustomError("literal_error", "no such {kind}; give one of {names}", {
                "kind": self._registry.kind, "names": names,
            })  # fmt: skip
        return name


def field_docs(spec: type[BaseModel]) -> dict[str, str]:
    """Return each field's documentation, for commented files and help texts."""
    return {name: field.description or "" for name, field in spec.model_fields.items()}
