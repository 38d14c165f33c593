"""A summary as JSON text, one line for each value and client.

Values by round are a `Series`, which keeps its JSON text, so that earlier rounds are not spelled out again.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any


class Series(list[Any]):
    """A list that grows by rounds, with its JSON text."""

    def __init__(self, values: Iterable[Any] = (), text: str = "") -> None:
        super().__init__(values)
        self.text = text

    def append(self, value: Any) -> None:
        """Add a value."""
        self.text += f"{', ' if self else ''}{json.dumps(value, allow_nan=False)}"
        super().append(value)

    def copy(self) -> Series:
        """Return a list of its own."""
        return Series(self, self.text)


def json_text(summary: Mapping[str, Any]) -> str:
    """Return JSON with a line for each value and client; a Series is not spelled out again."""
    lines = []
    for key, value in summary.items():
        text = _value_text(value)
        if key == "clients" and value:
            text = "[\n    " + ",\n    ".join(map(_value_text, value)) + "\n  ]"
        lines.append(f"  {json.dumps(key)}: {text}")
    return "{\n" + ",\n".join(lines) + "\n}" if lines else "{}"


def _value_text(value: Any) -> str:
    if isinstance(value, Series):
        return f"[{value.text}]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(key)}: {_value_text(one)}" for key, one in value.items()) + "}"
    return json.dumps(value, allow_nan=False)
