"""Turn validation errors into messages about the user's file: place, value found, valid values, nearest name.

    run.yaml:12: training.rouns: no such key; did you mean rounds?
    run.yaml:13: training.lr: found 'fast'; give a number above 0
    lora.targets=attn: lora.targets: found 'attn'; give attention | all-linear, or a list of text; did you ...

Valid values are read from the JSON schema of the specification, so that messages agree with the validation.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from splitft.registry import generation

Place = tuple[str | int, ...]
"""Keys and indices that lead to a value."""
Schema = Mapping[str, Any]

_PREFIX = "Value error, "  # which pydantic puts before the message of a validator


def explain(
    error: ValidationError,
    kind: type[BaseModel],
    data: Mapping[str, Any],
    origins: Mapping[Place, str],
    default: str,
) -> list[str]:
    """Return one line for each error in data of the type `kind`.

    `origins` has a prefix (file and line) for places, `default` for the rest.
    """
    messages: dict[Place, str] = {}
    for detail in error.errors(include_url=False):
        if detail["type"] != "conflict":
            place = _place(detail["loc"], data)
            messages.setdefault(place, _message(place, detail, data, kind))  # a union has one error a member
    deepest = {place for place in messages if not any(_is_within(other, place) for other in messages)}
    messages = {place: message for place, message in messages.items() if place in deepest}
    faulty = list(messages)
    for place, message in _second_look(data, faulty, kind):
        messages.setdefault(place, message)
    return [_origin(place, origins, default) + _line(place, message) for place, message in messages.items()]


def name(place: Place) -> str:
    """Return a place as a user writes it: clients.cuts[2]."""
    text = ""
    for part in place:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else part
    return text


def _line(place: Place, message: str) -> str:
    return f"{name(place)}: {message}" if place else message


def _keys(text: str) -> Place:
    """Return the place with this name: the inverse of `name`."""
    parts = re.findall(r"[^.\[\]]+", text)
    return tuple(int(part) if part.isdecimal() else part for part in parts)


def _origin(place: Place, origins: Mapping[Place, str], default: str) -> str:
    """Return the prefix of the nearest enclosing key, or else of the first key inside."""
    for length in range(len(place), 0, -1):
        if place[:length] in origins:
            return origins[place[:length]]
    within = (origin for key, origin in origins.items() if place and key[: len(place)] == place)
    return next(within, default)


def _place(loc: Place, data: Any) -> Place:
    """Return pydantic's location without the names that it adds for members of a union."""
    place: list[str | int] = []
    for position, part in enumerate(loc):
        if isinstance(data, Mapping):
            if part not in data and (position < len(loc) - 1 or _is_member(part)):
                continue
            place.append(part)
            data = data.get(part)
        elif isinstance(data, Sequence) and not isinstance(data, str) and isinstance(part, int):
            place.append(part)
            data = data[part] if part < len(data) else None
    return tuple(place)


def _is_member(part: str | int) -> bool:
    """Return True for a member of a union, such as `DeviceSpec` or `literal['a']`; False for a key."""
    return isinstance(part, str) and (
        part in ("str", "int", "float", "bool") or part != part.lower() or "[" in part
    )


def _message(place: Place, detail: ErrorDetails, data: Any, kind: type[BaseModel]) -> str:
    """Return the message for one place: the value found and the valid ones."""
    schema = _schema(place, kind)
    if detail["type"] == "extra_forbidden" or schema is None:
        return _unknown_key(place, kind)
    if detail["type"] == "value_error":
        return detail["msg"].removeprefix(_PREFIX)
    if detail["type"] == "missing":
        return f"is missing; give {fits(schema)}"
    for part in place:
        data = data.get(part) if isinstance(data, Mapping) else data[part]
    message = f"found {_short(data)}; give {fits(schema)}"
    near = difflib.get_close_matches(data, _choices(schema), n=1) if isinstance(data, str) else []
    return f"{message}; did you mean {near[0]}?" if near else message


def _unknown_key(place: Place, kind: type[BaseModel]) -> str:
    """Return the message for an unknown key: the nearest key, or the sections that have one of this name."""
    key = str(place[-1])
    known = _keys_of(_schema(place[:-1], kind) or {})
    if near := difflib.get_close_matches(key, known, n=1):
        return f"no such key; did you mean {near[0]}?"
    homes = [
        f"{section}.{key}" for section, field in schema_of(kind)["properties"].items()
        if key in field.get("properties", {})
    ]  # fmt: skip
    if homes:
        return f"no such key here; did you mean {' or '.join(homes)}?"
    return f"no such key; give one of {', '.join(known)}" if known else "no such key"


def _keys_of(schema: Schema) -> list[str]:
    """Return the keys of a schema or of its members."""
    return [key for member in schema.get("anyOf", [schema]) for key in member.get("properties", {})]


def _second_look(
    data: Mapping[str, Any], faulty: Sequence[Place], kind: type[BaseModel]
) -> list[tuple[Place, str]]:
    """Return conflicts in the rest of the data; pydantic checks for these only if every value is valid.

    Faulty places are removed. A conflict with one of them is left out, since it would be with a default. An
    error inside a section hides conflicts between sections, so the check is repeated without that section.
    """
    rest = json.loads(json.dumps(data))
    for place in sorted(faulty, key=len, reverse=True):
        _remove(rest, place)
    try:
        kind.model_validate_json(json.dumps(rest), strict=True)
    except ValidationError as error:
        details = error.errors()
    else:
        return []
    found: list[tuple[Place, str]] = []
    for detail in details:
        if detail["type"] == "conflict":
            found += [
                (_keys(paths[0]), message) for paths, message in detail["ctx"]["found"]
                if not any(_overlap(place, _keys(path)) for place in faulty for path in paths)
            ]  # fmt: skip
    sections = [
        (_place(detail["loc"], rest), detail) for detail in details if detail["type"] == "value_error"
    ]
    for section, detail in sections:
        message = detail["msg"].removeprefix(_PREFIX)
        if not any(place[: len(section)] == section and str(place[-1]) in message for place in faulty):
            found.append((section, message))
    if sections:
        found += _second_look(rest, [*faulty, *(section for section, _ in sections)], kind)
    return found


def _is_within(inner: Place, outer: Place) -> bool:
    """Return True if a place is inside another one."""
    return len(inner) > len(outer) and inner[: len(outer)] == outer


def _overlap(one: Place, other: Place) -> bool:
    """Return True if one place contains the other."""
    shared = min(len(one), len(other))
    return one[:shared] == other[:shared]


def _remove(data: Any, place: Place) -> None:
    """Remove one value from nested mappings, if it is there; from a list, all values."""
    for part in place[:-1]:
        data = data.get(part, {}) if isinstance(data, dict) else {}
    if isinstance(data, list):
        data.clear()
    elif isinstance(data, dict) and place:
        data.pop(place[-1], None)


def schema_of(kind: type[BaseModel]) -> Schema:
    """Return the JSON schema of a specification with plug-ins' names and all references resolved."""
    return _schema_of(kind, generation())


@cache
def _schema_of(kind: type[BaseModel], generation: int) -> Schema:
    schema = kind.model_json_schema()
    definitions = schema.pop("$defs", {})

    def written_out(part: Any) -> Any:
        if isinstance(part, list):
            return [written_out(item) for item in part]
        if not isinstance(part, dict):
            return part
        if "$ref" in part:
            name = part["$ref"].rsplit("/", 1)[-1]
            return {**written_out(definitions[name]), **{k: v for k, v in part.items() if k != "$ref"}}
        return {key: written_out(value) for key, value in part.items()}

    whole: Schema = written_out(schema)
    return whole


def _schema(place: Place, kind: type[BaseModel]) -> Schema | None:
    """Return the part of the schema for a place, or None if there is no such place."""
    schemas = [schema_of(kind)]
    for part in place:
        below: list[Schema] = []
        for schema in schemas:
            for member in schema.get("anyOf", [schema]):
                if isinstance(part, int) and "items" in member:
                    below.append(member["items"])
                elif part in member.get("properties", {}):
                    below.append(member["properties"][part])
                elif isinstance(member.get("additionalProperties"), Mapping):
                    below.append(member["additionalProperties"])
        schemas = below
    return schemas[0] if schemas else None


def _choices(schema: Schema) -> list[str]:
    """Return the names that a schema allows, if it lists any."""
    if "pattern" in schema and "examples" not in schema:
        return str(schema["pattern"]).strip("^$()").split("|")
    found = [schema["const"]] if "const" in schema else list(schema.get("enum", []))
    return [*found, *(choice for member in schema.get("anyOf", []) for choice in _choices(member))]


def fits(schema: Schema) -> str:
    """Return the values that a schema allows, in words: `a whole number, at least 1`."""
    if "anyOf" in schema:
        one = ", or ".join(fits(member) for member in schema["anyOf"] if "items" not in member)
        lists = [member for member in schema["anyOf"] if "items" in member]
        many = ["a list of these" if fits(member["items"]) == one else fits(member) for member in lists]
        return ", or ".join([one, *many])
    if choices := _choices(schema):
        return " | ".join(choices)
    if "examples" in schema:
        return f"text such as {schema['examples'][0]}"
    if schema.get("type") == "array":
        return f"a list of ({fits(schema['items'])})" if "items" in schema else "a list"
    if "properties" in schema:
        return f"a section with {', '.join(schema['properties'])}"
    kinds = {
        "integer": "a whole number", "number": "a number", "string": "text",
        "boolean": "true | false", "null": "null", "object": "a section",
    }  # fmt: skip
    words = {
        "minimum": "at least", "exclusiveMinimum": "above", "maximum": "at most", "exclusiveMaximum": "below",
    }  # fmt: skip
    limits = " and ".join(f"{word} {schema[key]:.15g}" for key, word in words.items() if key in schema)
    return ", ".join(filter(None, [kinds.get(schema.get("type", ""), "something else"), limits]))


def _short(value: object) -> str:
    """Return a value as in the file, shortened to a line."""
    text = repr(value) if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."
