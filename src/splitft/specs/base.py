"""What every specification is: frozen, strict about its keys, documented by its field docstrings."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Spec(BaseModel):
    """Frozen, strict about its keys, documented by its field docstrings."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


def field_docs(spec: type[BaseModel]) -> dict[str, str]:
    """Each field's documentation, for commented files and help texts."""
    return {name: field.description or "" for name, field in spec.model_fields.items()}
