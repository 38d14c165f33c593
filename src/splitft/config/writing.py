"""From `RunConfig` back to text: a resolved file, a commented one to start from, a schema for editors."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from typing import Any

import yaml
from pydantic import BaseModel

from splitft.config.explain import fits, schema_of
from splitft.config.reading import FLOAT
from splitft.config.run import RunConfig
from splitft.specs import Spec

_WIDTH = 100

_OPENING = """\
# A splitft run. Check and train it:   splitft train THIS_FILE
# Override any key for one run:        splitft train THIS_FILE training.rounds=5 lora.rank=8
# Every key may be left out; it then has the value written here.
"""


class _Dumper(yaml.SafeDumper):
    """SafeDumper that keeps lists and text on one line."""


_Dumper.add_implicit_resolver(*FLOAT, None)  # so that text which we would read as a number is quoted
_Dumper.add_representer(
    list, lambda dumper, items: dumper.represent_sequence("tag:yaml.org,2002:seq", items, flow_style=True)
)
_Dumper.add_representer(
    str,
    lambda dumper, text: dumper.represent_scalar(
        "tag:yaml.org,2002:str", text, style='"' if "\n" in text else None
    ),
)


def dump(config: RunConfig) -> str:
    """Return the whole configuration as YAML, defaults included; `load` reads an equal one."""
    return _yaml(config.model_dump(mode="json"))


def json_schema() -> dict[str, Any]:
    """Return the JSON schema of the configuration, for editors and other programs."""
    return RunConfig.model_json_schema()


def template(config: RunConfig | None = None) -> str:
    """Return a commented configuration: each key with meaning, valid values, and its value in `config`."""
    return commented(config or RunConfig(), _OPENING)


def commented(spec: Spec, opening: str) -> str:
    """Return any specification as a commented file."""
    return opening + _section(spec, "", schema_of(type(spec)))


def _section(spec: BaseModel, indent: str, schema: Mapping[str, Any]) -> str:
    """Return the lines of one section and of the sections in it."""
    plain = spec.model_dump(mode="json")
    text = ""
    for key, field in type(spec).model_fields.items():
        text += "\n" if not indent else ""
        text += _comment(field.description or "", indent)
        value, known = getattr(spec, key), schema["properties"][key]
        if isinstance(value, BaseModel):
            inner = next((one for one in known.get("anyOf", [known]) if "properties" in one), known)
            text += f"{indent}{key}:\n" + _section(value, indent + "  ", inner)
        else:
            line = _yaml({key: plain[key]}).rstrip("\n")
            choices = fits(known)
            if len(line := f"{indent}{line}  # {choices}") > _WIDTH:
                text += _comment(f"Give {choices}.", indent)
                line = line.removesuffix(f"  # {choices}")
            text += f"{line}\n"
    return text


def _comment(text: str, indent: str) -> str:
    lines = textwrap.wrap(" ".join(text.split()), _WIDTH - len(indent) - 2, break_long_words=False)
    return "".join(f"{indent}# {line}\n" for line in lines)


def _yaml(value: object) -> str:
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, width=10**6, allow_unicode=True)
